"""Makes files in a private directory on the project's file system, before they appear in the project.

Staging stands outside the watched tree, so a watcher never sees a file in the making, and on the project's mount, so
that a rename is enough to make it appear. Only names of the agent's own form are removed from it: a wrong setting must
not cost anybody a file.

A file is made under a name of its own or, when nothing stands at its path yet, under that path in a staged tree. A
directory that is new then appears by one rename with all that is in it: one instead of 20,000 for as many files in
1,261 directories. It also lets a file system that places files near their directory place them well.
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
from agent.fs.turns import Steps, at_once

COPY_CHUNK = 2**20
"""Bytes of a file that are in memory while it is copied."""

MOST_EMPTIED = 100
"""Names of a directory that are removed in one step: some milliseconds."""

_OWN_NAME = re.compile(r"(file|tree)-[0-9a-f]{8}-[0-9a-f]+")


@dataclass(slots=True)
class _StagedDirectory:
    """How many whole files it has, and the paths of its directories."""

    files: int = 0
    below: list[RelPath] = field(default_factory=list)


class StagedTree:
    """A tree of new files, filled by one thread and then promoted from.

    Nobody else can put anything into staging, so paths in it are handed to the kernel whole.

    Args:
        staging: descriptor of the staging directory.
        name: the tree's in there.
        permissions: those of the project's directories, which a promoted one keeps.
    """

    def __init__(self, staging: int, name: str, permissions: DirectoryPermissions) -> None:
        self.name = name
        self._staging = staging
        self._permissions = permissions
        self._directories: dict[RelPath, _StagedDirectory] = {}

        # The directory that the last file was made in, kept open for the next one.
        self._at: str | None = None
        self._descriptor = -1
        os.mkdir(name, 0o700, dir_fd=staging)

    def place(self, path: RelPath) -> str:
        """Where `path` is, seen from the staging directory."""
        return f"{self.name}/{path}"

    def create(self, path: RelPath, mode: int) -> int:
        """Open a new file at `path`. Raises `OSError`, also where only a case twin is in the way."""
        above, _, name = path.rpartition("/")
        if above != self._at:
            self._enter(RelPath(above))
        return os.open(name, CREATE_FILE, mode, dir_fd=self._descriptor)

    def count(self, path: RelPath) -> None:
        """Note that the file at `path` is whole."""
        self._directories[RelPath(path.rpartition("/")[0])].files += 1

    def whole(self, promoted: Mapping[RelPath, Sized]) -> set[RelPath]:
        """The directories that hold, at any depth, nothing but `promoted` files (by directory)."""
        partial: set[RelPath] = {RelPath("")}
        for path, directory in self._directories.items():
            if len(promoted.get(path, ())) != directory.files:
                partial.update(parents(path), (path,))
        return self._directories.keys() - partial

    def within(self, path: RelPath) -> Iterator[RelPath]:
        """The directory `path` and all below it, each before those in it."""
        waiting = [path]
        while waiting:
            at = waiting.pop()
            yield at
            waiting += reversed(self._directories[at].below)

    def close(self) -> None:
        """Close the open directory."""
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
        self._directories.setdefault(path, _StagedDirectory())
        self._descriptor = os.open(self.place(path), OPEN_DIRECTORY, dir_fd=self._staging)
        self._at = path

    def _add(self, path: RelPath) -> None:
        self._directories[path] = _StagedDirectory()
        above = self._directories.get(RelPath(path.rpartition("/")[0]))
        if above is not None:
            above.below.append(path)


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A whole file in staging.

    Attributes:
        name: what `Write.staged` wants: the file's own name, or that of the tree which has it under its path.
        digest: of its content.
        size: in bytes.
    """

    name: str
    digest: Digest
    size: int


@dataclass(frozen=True, slots=True)
class TempFile:
    """A file in staging that a transaction is about to promote.

    Attributes:
        name: in staging.
        inode: by which it is known in the project.
        size: in bytes.
        mtime_ns: when it was written last. A rename changes neither; the change time it does.
        prestaged: it was staged before the transaction began, and stays for the next one when this one fails.
    """

    name: str
    inode: int
    size: int
    mtime_ns: int
    prestaged: bool = False

    @classmethod
    def of(cls, name: str, found: os.stat_result, *, prestaged: bool = False) -> TempFile:
        """Take it from its stat in staging."""
        return cls(name, found.st_ino, found.st_size, found.st_mtime_ns, prestaged)

    def is_whole(self, found: os.stat_result) -> bool:
        """Whether `found` shows this file, and nobody has written to it since it left staging."""
        return (found.st_ino, found.st_size, found.st_mtime_ns) == (self.inode, self.size, self.mtime_ns)


class StagedFileWriter:
    """Writes one file in pieces and hashes them. Ends with `finish` or `abort`. Raises `OSError`."""

    def __init__(self, staging: Staging, name: str, descriptor: int, path: RelPath | None) -> None:
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
        self._staging.finish(self._descriptor, self._path)
        return StagedFile(self._name, Digest(self._hash.hexdigest()), self._size)

    def abort(self) -> None:
        """Close and remove the file."""
        self._staging.abort(self._name, self._descriptor, self._path)


class Staging:
    """The staging directory, locked against a second agent while it is open.

    Args:
        path: where; made if it is not there.
        file_mode: what every file made here ends up with, whatever the umask.
        permissions: the same for directories; files get the same owner.
    """

    def __init__(self, path: Path, *, file_mode: int, permissions: DirectoryPermissions) -> None:
        self._path = path
        self._file_mode = file_mode
        self._permissions = permissions
        self._owner = permissions.owner

        self.descriptor = -1
        """The open directory, which carries the lock; renames go out of it and into it. Read only."""

        # Names: those of an earlier run are never met.
        self._run = secrets.token_hex(4)
        self._numbers = itertools.count()

        # What `_probe` learns: whether a new file lacks its mode or its owner.
        self._set_mode = True
        self._set_owner = False

        # The tree that is being filled, and the files and directories that wait to be removed.
        self._tree: StagedTree | None = None
        self.waste: list[str] = []

    def open(self, root: int) -> None:
        """Make the directory, lock it, and prove that a rename from here reaches `root` (a descriptor).

        What an earlier run left is removed first: on a full disk it may hold the space that this run needs.

        Raises:
            RootUnusable: it cannot be made, another agent uses it, it is on another file system than the project, or
                the agent may not give files to the owner.
        """
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.descriptor = open_directory(self._path)
            self._make_private()
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.clear()
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
        """Unlock and close. What is staged stays until `clear`, or the next `open`."""
        self._close_tree()
        if self.descriptor != -1:
            os.close(self.descriptor)
            self.descriptor = -1

    # --- files for later transactions

    def stage(self, path: RelPath | None = None) -> StagedFileWriter:
        """Begin a file, in the staged tree when `path` says where it is going to stand. Raises `OSError`."""
        name, descriptor, path = self._begin(path)
        return StagedFileWriter(self, name, descriptor, path)

    def stage_whole(self, content: bytes, path: RelPath | None = None) -> str:
        """Stage a file in one piece, not hashed; returns the name for `Write.staged`. Raises `OSError`."""
        name, descriptor, path = self._begin(path)
        try:
            write_all(descriptor, content)
        except BaseException:
            self.abort(name, descriptor, path)
            raise
        self.finish(descriptor, path)
        return name

    def finish(self, descriptor: int, path: RelPath | None) -> None:
        """Set a file's mode and owner, close it, and count it where it is in the tree."""
        try:
            self._set_permissions(descriptor, self._file_mode)
        finally:
            os.close(descriptor)
        if path is not None and self._tree is not None:
            self._tree.count(path)

    def abort(self, name: str, descriptor: int, path: RelPath | None) -> None:
        """Close and remove a file that was begun."""
        os.close(descriptor)
        self.discard(name if path is None else f"{name}/{path}")

    def _begin(self, path: RelPath | None) -> tuple[str, int, RelPath | None]:
        """Open a new file; the last is None where it is not in the tree.

        An error of the tree says nothing yet: it may come of another path.
        """
        if path is not None:
            with suppress(OSError):
                if self._tree is None:
                    self._tree = StagedTree(self.descriptor, self._new_name("tree"), self._permissions)
                return self._tree.name, self._tree.create(path, self._file_mode), path
        name = self.new_name()
        return name, self._create(name, self._file_mode), None

    # --- what a transaction takes and leaves

    def tree(self, name: str) -> StagedTree | None:
        """The tree of that `name`, if it is the present one."""
        return self._tree if self._tree is not None and self._tree.name == name else None

    def take(self, name: str, *, executable: bool) -> tuple[TempFile, FileStat]:
        """A file that was staged earlier, ready for promotion, and its stat. Raises `OSError`, also when it is gone."""
        if executable:
            os.chmod(name, self._mode(True), dir_fd=self.descriptor)
        found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        return TempFile.of(name, found, prestaged=True), FileStat.of(found)

    def put(self, content: Iterable[bytes], *, executable: bool) -> TempFile:
        """Make a whole file of the chunks of `content`. Raises `OSError`, leaving nothing."""
        name = self.new_name()
        mode = self._mode(executable)
        descriptor = self._create(name, mode)
        try:
            for chunk in content:
                write_all(descriptor, chunk)
            self._set_permissions(descriptor, mode)
            found = os.fstat(descriptor)
        except BaseException:
            self.abort(name, descriptor, None)
            raise
        os.close(descriptor)
        return TempFile.of(name, found)

    def copy(self, name: str, directory: int, most: int) -> str | None:
        """Copy the regular file `name` of `directory`; of one that grows meanwhile, its beginning.

        Returns:
            The copy's name; None when it is no regular file, or larger than `most` bytes.

        Raises:
            OSError: it cannot be copied; nothing is left.
        """
        source = os.open(name, READ_FILE, dir_fd=directory)
        try:
            found = os.fstat(source)
            if stat.S_ISDIR(found.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(found.st_mode) or found.st_size > most:
                return None
            return self.put(_chunks(source, found.st_size), executable=found.st_mode & 0o100 != 0).name
        finally:
            os.close(source)

    def new_name(self) -> str:
        """A new file name."""
        return self._new_name("file")

    def discard(self, name: str) -> None:
        """Remove the file `name` if it is there."""
        with suppress(OSError):
            os.unlink(name, dir_fd=self.descriptor)

    def discard_later(self, names: Iterable[str]) -> None:
        """Have these files and directories removed by `removal`."""
        self.waste += names

    def drop_tree(self) -> None:
        """Have removed what is left of the tree that was promoted from; the next file begins another."""
        if self._tree is not None:
            self.discard_later([self._tree.name])
            self._close_tree()

    def drop(self) -> int:
        """Have everything removed that any run made here; returns how many files and trees."""
        self._close_tree()
        self.waste = [name for name in os.listdir(self.descriptor) if _OWN_NAME.fullmatch(name)]
        return len(self.waste)

    def clear(self) -> int:
        """Remove everything that any run made here; returns how many files and trees."""
        count = self.drop()
        at_once(self.removal())
        return count

    def removal(self) -> Steps[None]:
        """Remove what waits for it, with all that is in it, as far as that goes. Raises nothing.

        A directory in one is first moved up into staging, so that neither the depth nor the number of open directories
        grows with what a program made, which may be deeper than any stack. What cannot be removed has a name of ours
        and is tried again at the next start.
        """
        while self.waste:
            at = self.waste.pop()
            with suppress(OSError):
                try:
                    descriptor = os.open(at, OPEN_DIRECTORY, dir_fd=self.descriptor)
                except NotADirectoryError:
                    os.unlink(at, dir_fd=self.descriptor)
                else:
                    self._empty(at, descriptor)
            yield

    def _empty(self, at: str, descriptor: int) -> None:
        """Remove the open directory `at`, or some of what is in it; then it waits again. Raises `OSError`."""
        try:
            with os.scandir(descriptor) as inside:
                names = [each.name for each in itertools.islice(inside, MOST_EMPTIED)]
            gone = [name for name in names if self._remove_or_lift(name, descriptor)]
        finally:
            os.close(descriptor)
        if gone and len(names) == MOST_EMPTIED:
            self.waste.append(at)
        else:
            os.rmdir(at, dir_fd=self.descriptor)

    def _remove_or_lift(self, name: str, directory: int) -> bool:
        """Unlink `name` in `directory`; one that is a directory is moved up, and waits. False when it stays."""
        with suppress(OSError):
            try:
                os.unlink(name, dir_fd=directory)
            except (IsADirectoryError, PermissionError):
                with suppress(OSError):
                    os.rmdir(name, dir_fd=directory)
                    return True
                lifted = self._new_name("tree")
                os.rename(name, lifted, src_dir_fd=directory, dst_dir_fd=self.descriptor)
                self.waste.append(lifted)
            return True
        return False

    # --- how files are made

    def _new_name(self, kind: str) -> str:
        return f"{kind}-{self._run}-{next(self._numbers):x}"

    def _create(self, name: str, mode: int) -> int:
        return os.open(name, CREATE_FILE, mode, dir_fd=self.descriptor)

    def _mode(self, executable: bool) -> int:
        """A file's permission bits: whoever may read an executable may run it."""
        return self._file_mode | (self._file_mode & 0o444) >> 2 if executable else self._file_mode

    def _set_permissions(self, descriptor: int, mode: int) -> None:
        if self._set_mode:
            os.fchmod(descriptor, mode)
        if self._set_owner and self._owner is not None:
            os.fchown(descriptor, *self._owner)

    def _close_tree(self) -> None:
        if self._tree is not None:
            self._tree.close()
            self._tree = None

    def _make_private(self) -> None:
        """Close the directory to others: what they can put here, they can make the agent promote."""
        found = os.fstat(self.descriptor)
        if found.st_uid != os.geteuid():
            raise RootUnusable(
                f"the staging directory {self._path} belongs to another user (uid {found.st_uid})"
            )
        if found.st_mode & 0o077:
            os.fchmod(self.descriptor, 0o700)

    def _probe(self, root: int) -> None:
        """Learn on one file what the umask, the owner and the mounts do to those that follow."""
        name = self.new_name()
        descriptor = self._create(name, 0o777)
        try:
            found = os.fstat(descriptor)
            self._set_mode = self._mode(True) & ~found.st_mode != 0
            self._set_owner = self._owner is not None and self._owner != (found.st_uid, found.st_gid)
            if self._set_owner and self._owner is not None:
                try:
                    os.fchown(descriptor, *self._owner)
                except PermissionError as error:
                    uid, gid = self._owner
                    raise RootUnusable(f"cannot give files to {uid}:{gid}: {error.strerror}") from error
            try:
                # The kernel compares the mounts before it finds that "." can be no target: a probe with no effect.
                os.rename(name, ".", src_dir_fd=self.descriptor, dst_dir_fd=root)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise RootUnusable(
                        f"the staging directory {self._path} is on another file system than the project;"
                        " set STAGING_DIR to a directory beside it"
                    ) from error
        finally:
            self.abort(name, descriptor, None)


def _chunks(descriptor: int, size: int) -> Iterator[bytes]:
    """Read so many bytes, or what there is."""
    while size and (chunk := os.read(descriptor, min(COPY_CHUNK, size))):
        yield chunk
        size -= len(chunk)
