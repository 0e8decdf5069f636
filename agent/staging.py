"""Where files are made before they appear: a private directory on the project's own file system.

It stands outside the watched tree, so nothing that watches the project sees a file in the making, and on the same
mount, so that a rename suffices to make it appear. Only names of our own form are ever removed from it: a wrong
setting must not cost anybody a file.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import itertools
import os
import re
import secrets
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agent.errors import RootUnusable
from agent.model import Digest

_OURS = re.compile(r"stage-[0-9a-f]{8}-[0-9a-f]+")
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

_LIBC = ctypes.CDLL(None, use_errno=True)
_RENAME_EXCHANGE = 2

NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What systems say that cannot exchange two names: some network and FUSE file systems, gVisor, anything but Linux."""


@dataclass(frozen=True, slots=True)
class Staged:
    """A whole file waiting in staging under `name`. `size` in bytes."""

    name: str
    digest: Digest
    size: int


@dataclass(slots=True)
class Temp:
    """A file in staging that a batch is about to promote. `descriptor` is open when the batch is just this one."""

    name: str
    inode: int
    descriptor: int | None = None

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


class Stage:
    """One file being written, hashed as it passes. Ends with `finish` or `abort`; raises `OSError`."""

    def __init__(self, staging: Staging, name: str, descriptor: int) -> None:
        self._staging = staging
        self._name = name
        self._descriptor = descriptor
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append `chunk`."""
        write_all(self._descriptor, chunk)
        self._hash.update(chunk)
        self._size += len(chunk)

    def finish(self) -> Staged:
        """Close the file and say what it holds."""
        self._staging.adopt(self._name, self._descriptor)
        return Staged(self._name, Digest(self._hash.hexdigest()), self._size)

    def abort(self) -> None:
        """Throw the file away."""
        os.close(self._descriptor)
        self._staging.discard(self._name)


class Staging:
    """The staging directory, locked for as long as it is open.

    `file_mode` and `owner` (uid, gid) are what every file made here ends up with, whatever the umask.
    """

    def __init__(self, path: Path, *, file_mode: int, owner: tuple[int, int] | None) -> None:
        self._path = path
        self._file_mode = file_mode
        self._owner = owner
        self._descriptor = -1
        self._prefix = f"stage-{secrets.token_hex(4)}-"
        self._numbers = itertools.count()
        self._inodes: dict[str, int] = {}
        self._set_mode = True
        self._set_owner = False

    @property
    def descriptor(self) -> int:
        """The open directory, for renames out of it and into it."""
        return self._descriptor

    def open(self, root: int) -> None:
        """Make the directory if need be, lock it, and prove that a rename from here reaches `root`.

        Raises `RootUnusable`: not creatable, in use by another agent, on another file system than the project, or
        not allowed to give files to `owner`.
        """
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise RootUnusable(f"cannot use the staging directory {self._path}: {error.strerror}") from error
        try:
            self._make_private()
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        if self._descriptor != -1:
            os.close(self._descriptor)
            self._descriptor = -1
        self._inodes.clear()

    def mode(self, executable: bool) -> int:
        """The permission bits of a file: whoever may read an executable may run it."""
        return self._file_mode | (self._file_mode & 0o444) >> 2 if executable else self._file_mode

    def new_name(self) -> str:
        """A name nobody else uses here."""
        return f"{self._prefix}{next(self._numbers):x}"

    def stage(self) -> Stage:
        """Begin a file. Raises `OSError`."""
        name = self.new_name()
        return Stage(self, name, self._create(name, self._file_mode))

    def put(self, content: bytes, *, executable: bool, hold: bool) -> Temp:
        """Make a whole file of `content`; with `hold` its descriptor stays open. Raises `OSError`, leaving nothing."""
        name = self.new_name()
        mode = self.mode(executable)
        descriptor = self._create(name, mode)
        try:
            write_all(descriptor, content)
            self._dress(descriptor, mode)
            if hold:
                return Temp(name, 0, descriptor)
            inode = os.fstat(descriptor).st_ino
        except BaseException:
            os.close(descriptor)
            self.discard(name)
            raise
        os.close(descriptor)
        return Temp(name, inode)

    def take(self, name: str, *, executable: bool) -> Temp:
        """A file staged earlier, ready for promotion. Raises `OSError`; `FileNotFoundError` if there is none."""
        inode = self._inodes.get(name)
        if inode is None:
            raise FileNotFoundError(errno.ENOENT, f"nothing is staged as {name}")
        if executable:
            os.chmod(name, self.mode(True), dir_fd=self._descriptor)
        return Temp(name, inode)

    def adopt(self, name: str, descriptor: int) -> None:
        """Finish the file `name`: mode, owner, identity; closes `descriptor`."""
        try:
            self._dress(descriptor, self._file_mode)
            self._inodes[name] = os.fstat(descriptor).st_ino
        finally:
            os.close(descriptor)

    def discard(self, name: str) -> None:
        """Remove `name` if it is there."""
        self._inodes.pop(name, None)
        with suppress(OSError):
            os.unlink(name, dir_fd=self._descriptor)

    def clear(self) -> int:
        """Remove everything of ours, leftovers of earlier lives included; how many there were."""
        ours = [name for name in os.listdir(self._descriptor) if _OURS.fullmatch(name)]
        for name in ours:
            self.discard(name)
        return len(ours)

    def _make_private(self) -> None:
        """What others can put here, they can make us promote."""
        found = os.fstat(self._descriptor)
        if found.st_uid != os.geteuid():
            raise RootUnusable(
                f"the staging directory {self._path} belongs to another user (uid {found.st_uid})"
            )
        if found.st_mode & 0o077:
            os.fchmod(self._descriptor, 0o700)

    def _create(self, name: str, mode: int) -> int:
        return os.open(name, _CREATE, mode, dir_fd=self._descriptor)

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


def write_all(descriptor: int, content: bytes | bytearray | memoryview) -> None:
    """Write every byte; a write may be cut short when space runs out. Raises `OSError`."""
    written = os.write(descriptor, content)
    if written != len(content):
        rest = memoryview(content)[written:]
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def exchange(source: str, target: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
    """Let two names change what they stand for, in one step (renameat2(2), which `os` lacks). Raises `OSError`."""
    sys.audit("os.rename", source, target, src_dir_fd, dst_dir_fd)
    call = getattr(_LIBC, "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(src_dir_fd, os.fsencode(source), dst_dir_fd, os.fsencode(target), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
