"""Where files are made before they appear: a private directory on the project's own file system.

It stands outside the watched tree, so nothing that watches the project sees a file in the making, and on the same
mount, so that a rename suffices to make it appear. Only names of our own form are ever removed from it: a wrong
setting must not cost anybody a file.

Each life works in a directory of its own in there, and in turn in the rooms of that. ext4 looks for a free inode near
the directory, and one without a journal passes over each that was freed in the last minutes, one by one: where every
save makes a file and removes one, that soon costs more than all else. Rooms below a directory that is marked as the top
of hierarchies are put far from each other, where there is space.

Files that wait in staging in the directories they are to have, so that a new directory appears by one rename.

A hydration makes thousands of files. Each under a name of its own in one directory, they would all be renamed one by
one, and a file system that keeps a file near its directory would put them all near the wrong one. Here they are made
where they belong, only under another root; a directory that the project does not have yet is then renamed with all that
is in it: of 20,000 files in 1,261 new directories below one, one rename instead of 20,000.

The tree stands in staging, where nobody but us can put anything, so paths in it are handed to the kernel whole.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from agent.core.errors import RootUnusable
from agent.core.model import Digest, RelPath, parents
from agent.fs.dirfd import DirectoryPermissions
from agent.fs.inspect import FileStat
from agent.fs.places import OPEN_DIRECTORY, open_directory
from agent.fs.syscalls import CREATE_FILE, READ_FILE, write_all


@dataclass(slots=True)
class _Directory:
    """What was put into one: so many whole files, and these directories."""

    files: int = 0
    below: list[RelPath] = field(default_factory=list)


class StagedTree:
    """One tree below the directory `staging`, filled by one thread and then promoted from.

    `permissions` are those of the project's directories: a renamed one keeps it.
    """

    def __init__(self, staging: int, name: str, permissions: DirectoryPermissions) -> None:
        self._staging = staging
        self._permissions = permissions
        self._directories: dict[RelPath, _Directory] = {}
        self._at: str | None = None
        self._descriptor = -1
        self.name = name
        os.mkdir(name, 0o700, dir_fd=staging)

    def place(self, path: RelPath) -> str:
        """Where `path` waits, seen from the staging directory."""
        return f"{self.name}/{path}"

    def create(self, path: RelPath, mode: int) -> int:
        """A descriptor of a new file at `path`. Raises `OSError`, also for what only another path's twin prevents."""
        above, _, name = path.rpartition("/")
        if above != self._at:
            self._enter(RelPath(above))
        return os.open(name, CREATE_FILE, mode, dir_fd=self._descriptor)

    def count(self, path: RelPath) -> None:
        """The file at `path` is whole."""
        self._directories[RelPath(path.rpartition("/")[0])].files += 1

    def whole(self, promoted: Mapping[RelPath, Sized]) -> set[RelPath]:
        """The directories in which nothing waits, at any depth, that is not `promoted` (files, by directory)."""
        partial: set[RelPath] = {RelPath("")}
        for path, directory in self._directories.items():
            if len(promoted.get(path, ())) != directory.files:
                partial.update(parents(path), (path,))
        return self._directories.keys() - partial

    def within(self, path: RelPath) -> Iterator[RelPath]:
        """The directory `path` and all below it, each before those in it."""
        yield path
        for below in self._directories[path].below:
            yield from self.within(below)

    def close(self) -> None:
        """Let go of the directory in hand."""
        self._at = None
        if self._descriptor != -1:
            os.close(self._descriptor)
            self._descriptor = -1

    def _enter(self, path: RelPath) -> None:
        self.close()
        for directory in (*parents(path), path) if path else ():
            if directory not in self._directories:
                os.mkdir(self.place(directory), self._permissions.mode, dir_fd=self._staging)
                self._add(directory)
                self._permissions.set_on(self.place(directory), self._staging)
        self._directories.setdefault(path, _Directory())
        self._descriptor = os.open(self.place(path), OPEN_DIRECTORY, dir_fd=self._staging)
        self._at = path

    def _add(self, path: RelPath) -> None:
        self._directories[path] = _Directory()
        above = self._directories.get(RelPath(path.rpartition("/")[0]))
        if above is not None:
            above.below.append(path)


def remove_tree(name: str, staging: int) -> None:
    """Remove the directory `name` with all that is in it, as far as that goes."""
    with suppress(OSError):
        descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=staging)
        try:
            with os.scandir(descriptor) as listing:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing]
            for each, is_directory in found:
                if is_directory:
                    remove_tree(each, descriptor)
                else:
                    with suppress(OSError):
                        os.unlink(each, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        os.rmdir(name, dir_fd=staging)


ROOMS = tuple(f"{number:x}" for number in range(16))
"""The directories in which files are made in turn. On ext4 without a journal, after a hundred thousand saves in some
minutes, making a file took 700 µs in a single one, 350 in four, 90 in sixteen."""

COPY_PIECE = 2**20
"""Bytes that are in memory of a file while it is copied."""

_LIFE = re.compile(r"life-[0-9a-f]{8}")
_OURS = re.compile(r"stage-[0-9a-f]{8}-[0-9a-f]+")
_TREE = re.compile(r"tree-[0-9a-f]{8}-[0-9a-f]+")

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_TOP_OF_HIERARCHIES = 0x20000
"""`FS_IOC_GETFLAGS`, `FS_IOC_SETFLAGS`, `FS_TOPDIR_FL` of linux/fs.h; what `chattr +T` does."""


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A whole file waiting in staging. `name` is what `Write.staged` wants: the file's own, or that of the tree in
    which it waits under its path. `size` in bytes."""

    name: str
    digest: Digest
    size: int


@dataclass(slots=True)
class TempFile:
    """A file in staging that a batch is about to promote. `descriptor` is open when the batch is just this one.

    `lasting`: it was staged before the batch began, and waits for the next one when this one fails.
    """

    name: str
    inode: int
    descriptor: int | None = None
    lasting: bool = False

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class StagedFileWriter:
    """One file being written, hashed as it passes. Ends with `finish` or `abort`; raises `OSError`."""

    def __init__(self, staging: Staging, name: str, descriptor: int, path: RelPath | None = None) -> None:
        self._staging = staging
        self._name = name
        self._descriptor = descriptor
        self._path = path
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append `chunk`."""
        write_all(self._descriptor, chunk)
        self._hash.update(chunk)
        self._size += len(chunk)

    def finish(self) -> StagedFile:
        """Close the file and say what it holds."""
        self._staging.adopt(self._descriptor, self._path)
        return StagedFile(self._name, Digest(self._hash.hexdigest()), self._size)

    def abort(self) -> None:
        """Throw the file away."""
        os.close(self._descriptor)
        self._staging.discard(self._name if self._path is None else f"{self._name}/{self._path}")


class Staging:
    """The staging directory, locked for as long as it is open.

    `file_mode`, `permissions` and their owner are what everything made here ends up with, whatever the umask.
    """

    def __init__(self, path: Path, *, file_mode: int, permissions: DirectoryPermissions) -> None:
        self._path = path
        self._file_mode = file_mode
        self._permissions = permissions
        self._owner = permissions.owner
        self._lock = -1
        self._descriptor = -1
        self._tree: StagedTree | None = None
        self._spent: list[str] = []
        life = secrets.token_hex(4)
        self._life = f"life-{life}"
        self._prefix = f"stage-{life}-"
        self._numbers = itertools.count()
        self._set_mode = True
        self._set_owner = False

    @property
    def descriptor(self) -> int:
        """The open directory of this life, for renames out of it and into it."""
        return self._descriptor

    def open(self, root: int) -> None:
        """Make the directory if need be, lock it, and prove that a rename from here reaches `root`.

        What earlier lives left goes first: on a full disk it may be what holds the room that this one needs.

        Raises `RootUnusable`: not creatable, in use by another agent, on another file system than the project, or
        not allowed to give files to `owner`.
        """
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = open_directory(self._path)
        except OSError as error:
            raise RootUnusable(f"cannot use the staging directory {self._path}: {error.strerror}") from error
        try:
            self._make_private()
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end_earlier_lives()
            self._begin_life()
            self._probe(root)
        except BlockingIOError:
            self.close()
            raise RootUnusable(f"the staging directory {self._path} is in use by another agent") from None
        except OSError as error:
            self.close()
            raise RootUnusable(f"cannot use the staging directory {self._path}: {error.strerror}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock and close; what is staged stays until `clear`."""
        self._leave_tree()
        if self._descriptor != -1:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._lock != -1:
            for room in (*ROOMS, ""):
                with suppress(OSError):
                    os.rmdir(f"{self._life}/{room}", dir_fd=self._lock)
            os.close(self._lock)
            self._lock = -1

    def mode(self, executable: bool) -> int:
        """The permission bits of a file: whoever may read an executable may run it."""
        return self._file_mode | (self._file_mode & 0o444) >> 2 if executable else self._file_mode

    def new_name(self) -> str:
        """A name nobody else uses here."""
        number = next(self._numbers)
        return f"{ROOMS[number % len(ROOMS)]}/{self._prefix}{number:x}"

    def stage(self, path: RelPath | None = None) -> StagedFileWriter:
        """Begin a file; where it is meant for a `path` at which nothing stands yet, in its tree. Raises `OSError`."""
        if path is not None:
            # What the file system holds against this path says nothing yet: it may suffer another one.
            with suppress(OSError):
                tree = self._fill()
                return StagedFileWriter(self, tree.name, tree.create(path, self._file_mode), path)
        name = self.new_name()
        return StagedFileWriter(self, name, self._create(name, self._file_mode))

    def stage_whole(self, content: bytes, path: RelPath | None = None) -> str:
        """A file in one piece, as `stage` has it; the name it waits by. Not hashed. Raises `OSError`."""
        descriptor = -1
        if path is not None:
            try:
                tree = self._fill()
                descriptor = tree.create(path, self._file_mode)
                name = tree.name
            except OSError:
                path = None
        if path is None:
            name = self.new_name()
            descriptor = self._create(name, self._file_mode)
        try:
            write_all(descriptor, content)
        except BaseException:
            os.close(descriptor)
            self.discard(name if path is None else f"{name}/{path}")
            raise
        self.adopt(descriptor, path)
        return name

    def _fill(self) -> StagedTree:
        """The tree that files are put into; begins one."""
        if self._tree is None:
            self._tree = StagedTree(
                self._descriptor, f"tree-{self._life[5:]}-{next(self._numbers):x}", self._permissions
            )
        return self._tree

    def tree(self, name: str) -> StagedTree | None:
        """The tree of that `name`, if it is the one that is being filled or promoted from."""
        return self._tree if self._tree is not None and self._tree.name == name else None

    def put(self, content: bytes, *, executable: bool, hold: bool) -> TempFile:
        """Make a whole file of `content`; with `hold` its descriptor stays open. Raises `OSError`, leaving nothing."""
        name = self.new_name()
        mode = self.mode(executable)
        descriptor = self._create(name, mode)
        try:
            write_all(descriptor, content)
            self._dress(descriptor, mode)
            if hold:
                return TempFile(name, 0, descriptor)
            inode = os.fstat(descriptor).st_ino
        except BaseException:
            os.close(descriptor)
            self.discard(name)
            raise
        os.close(descriptor)
        return TempFile(name, inode)

    def copy(self, name: str, directory: int, most: int) -> str | None:
        """Copy the regular file `name` of `directory`, of one that grows its beginning; the copy's name.

        None when it is no regular file, or larger than `most` bytes. Raises `OSError`.
        """
        source = os.open(name, READ_FILE, dir_fd=directory)
        try:
            found = os.fstat(source)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(found.st_mode) or found.st_size > most:
                return None
            copied = self.put(b"", executable=found.st_mode & 0o100 != 0, hold=True)
            assert copied.descriptor is not None
            left = found.st_size
            try:
                while left and (piece := os.read(source, min(COPY_PIECE, left))):
                    write_all(copied.descriptor, piece)
                    left -= len(piece)
            except BaseException:
                self.discard(copied.name)
                raise
            finally:
                copied.close()
            return copied.name
        finally:
            os.close(source)

    def take(self, name: str, *, executable: bool) -> tuple[TempFile, FileStat]:
        """A file staged earlier, ready for promotion, and how it looks. Raises `OSError`, also when there is none."""
        if executable:
            os.chmod(name, self.mode(True), dir_fd=self._descriptor)
        found = os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        return TempFile(name, found.st_ino, lasting=True), FileStat.of(found)

    def adopt(self, descriptor: int, path: RelPath | None) -> None:
        """Finish a file: mode, owner, and its place in the tree if it has one; closes `descriptor`."""
        try:
            self._dress(descriptor, self._file_mode)
        finally:
            os.close(descriptor)
        if path is not None and self._tree is not None:
            self._tree.count(path)

    def drop_tree(self) -> None:
        """The tree was promoted from: what is left of it goes, so that the next file begins another."""
        if self._tree is not None:
            name = self._tree.name
            self._leave_tree()
            remove_tree(name, self._descriptor)

    def discard(self, name: str) -> None:
        """Remove `name` if it is there."""
        with suppress(OSError):
            os.unlink(name, dir_fd=self._descriptor)

    def spend(self, names: Iterable[str]) -> None:
        """Nobody needs these any more; they go with the next `sweep`."""
        self._spent += names

    def sweep(self) -> int:
        """Remove what is spent; how many things that were."""
        spent, self._spent = self._spent, []
        for name in spent:
            self.discard(name)
        return len(spent)

    def clear(self) -> int:
        """Remove everything this life made; how many things there were. What earlier lives left, `open` removed."""
        self._leave_tree()
        self._spent.clear()
        ours = [f"{room}/{name}" for room in ROOMS for name in self._listed(room) if _OURS.fullmatch(name)]
        for name in ours:
            self.discard(name)
        trees = [name for name in os.listdir(self._descriptor) if _TREE.fullmatch(name)]
        for name in trees:
            remove_tree(name, self._descriptor)
        return len(ours) + len(trees)

    def _leave_tree(self) -> None:
        if self._tree is not None:
            self._tree.close()
            self._tree = None

    def _listed(self, room: str) -> list[str]:
        try:
            descriptor = os.open(room, OPEN_DIRECTORY, dir_fd=self._descriptor)
        except FileNotFoundError:
            return []
        try:
            return os.listdir(descriptor)
        finally:
            os.close(descriptor)

    def _end_earlier_lives(self) -> None:
        for name in os.listdir(self._lock):
            if _LIFE.fullmatch(name):
                remove_tree(name, self._lock)

    def _begin_life(self) -> None:
        os.mkdir(self._life, 0o700, dir_fd=self._lock)
        self._descriptor = os.open(self._life, OPEN_DIRECTORY, dir_fd=self._lock)
        _mark_top(self._descriptor)
        for room in ROOMS:
            os.mkdir(room, 0o700, dir_fd=self._descriptor)

    def _make_private(self) -> None:
        """What others can put here, they can make us promote."""
        found = os.fstat(self._lock)
        if found.st_uid != os.geteuid():
            raise RootUnusable(
                f"the staging directory {self._path} belongs to another user (uid {found.st_uid})"
            )
        if found.st_mode & 0o077:
            os.fchmod(self._lock, 0o700)

    def _create(self, name: str, mode: int) -> int:
        return os.open(name, CREATE_FILE, mode, dir_fd=self._descriptor)

    def _dress(self, descriptor: int, mode: int) -> None:
        if self._set_mode:
            os.fchmod(descriptor, mode)
        if self._set_owner and self._owner is not None:
            os.fchown(descriptor, *self._owner)

    def _probe(self, root: int) -> None:
        """Learn on one file what the umask, the owner and the mounts do to those that follow."""
        name = self.new_name()
        descriptor = self._create(name, 0o777)
        try:
            found = os.fstat(descriptor)
            self._set_mode = self.mode(True) & ~found.st_mode != 0
            self._set_owner = self._owner is not None and self._owner != (found.st_uid, found.st_gid)
            if self._set_owner and self._owner is not None:
                try:
                    os.fchown(descriptor, *self._owner)
                except PermissionError as error:
                    uid, gid = self._owner
                    raise RootUnusable(f"cannot give files to {uid}:{gid}: {error.strerror}") from error
            try:
                # The kernel compares the mounts before it finds that "." can be no target: a probe with no effect.
                os.rename(name, ".", src_dir_fd=self._descriptor, dst_dir_fd=root)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise RootUnusable(
                        f"the staging directory {self._path} is on another file system than the project;"
                        " set STAGING_DIR to a directory beside it"
                    ) from error
        finally:
            os.close(descriptor)
            self.discard(name)


def _mark_top(directory: int) -> None:
    """Let ext4 spread what is made in `directory`. Most file systems know no such mark: then nothing is lost."""
    with suppress(OSError):
        flags = int.from_bytes(fcntl.ioctl(directory, _GET_FLAGS, bytes(8))[:4], sys.byteorder)
        if not flags & _TOP_OF_HIERARCHIES:
            marked = (flags | _TOP_OF_HIERARCHIES).to_bytes(4, sys.byteorder) + bytes(4)
            fcntl.ioctl(directory, _SET_FLAGS, marked)
