"""Reads a directory, by stat and by hash, without following a link. Nothing here can write.

Every path is named relative to an open directory. Only a file of the size that it should have is read: another size is
another content, and whoever writes a file decides how large it is (`truncate -s 1T`).

`fs.project_dir.ProjectDir` adds writing to a `DirectoryView`; `sync.shadow` reads another process's directory and has
no more than the view.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from agent.core.errors import PathRefused
from agent.core.model import PROTECTED, Digest, Entry, Problem, RelPath, Tree, parse_path
from agent.fs.dirfd import MOST_LISTED, Blocked, DirectoryCache
from agent.fs.syscalls import READ_FILE
from agent.fs.turns import Steps

CHUNK = 2**18
"""Bytes read at a time: about 0.4 ms of hashing."""

UNREAD = Digest("0" * 64)
"""The digest of content that was not read and differs from what it should be. No known content has it."""

_UNSIGNED = struct.Struct("<QQQQ")
_SIGNED = struct.Struct("<qqqq")
"""SQLite's integers are signed."""
_LOW_64_BITS = 2**64 - 1


def _packed(inode: int, size: int, mtime_ns: int, ctime_ns: int) -> bytes:
    return _UNSIGNED.pack(
        inode & _LOW_64_BITS, size & _LOW_64_BITS, mtime_ns & _LOW_64_BITS, ctime_ns & _LOW_64_BITS
    )


class FileStat(bytes):
    """A file's inode, size, and times of modification and change when its content was known.

    An equal stat later means that the file was not touched. A program cannot set the change time back, which is why it
    is here; a chmod moves it too, so a different stat means *read it again*, not *changed*.

    Size in bytes, times in nanoseconds, packed into one `bytes`: there is one of each file, and it takes 80 bytes of
    memory instead of 240. Of each number the lowest 64 bits are kept. A modification time can be anything
    (`touch -d 2300-01-01`), and 64 bits of nanoseconds end in 2262; two times that differ by a multiple of 584 years
    compare equal, but setting one moves the change time.
    """

    __slots__ = ()

    def __new__(cls, inode: int, size: int, mtime_ns: int, ctime_ns: int) -> FileStat:
        return super().__new__(cls, _packed(inode, size, mtime_ns, ctime_ns))

    @classmethod
    def of(cls, found: os.stat_result) -> FileStat:
        """Take it from what `os.stat` returned."""
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def from_columns(cls, columns: Sequence[int]) -> FileStat:
        """Take it from the ledger's columns."""
        return super().__new__(cls, _SIGNED.pack(*columns))

    @property
    def columns(self) -> tuple[int, ...]:
        """Inode, size, modification and change time as the ledger's columns take them."""
        return _SIGNED.unpack(self)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.columns[1]

    @property
    def newest_ns(self) -> int:
        """The later of the two times."""
        return max(self.columns[2:])

    def matches(self, found: os.stat_result) -> bool:
        """Whether `found` shows a file that was not touched since."""
        return self == _packed(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def __repr__(self) -> str:
        return "FileStat(inode={}, size={}, mtime_ns={}, ctime_ns={})".format(*self.columns)


@dataclass(frozen=True, slots=True)
class Drift:
    """A file that is not as the agent left it.

    Attributes:
        path: where.
        rule: `changed`, `missing`, `appeared` (the agent did not write it) or `not_a_file`.
        digest: what the file there holds; `UNREAD` where it was not read, None when there is no file.
        stat: the stat of the file there, None when there is no file.
    """

    path: RelPath
    rule: str
    digest: Digest | None = None
    stat: FileStat | None = None

    def problem(self) -> Problem:
        """The problem that says it."""
        what = {
            "changed": "was changed inside the container",
            "missing": "was removed inside the container",
            "appeared": "was put there by something else",
            "not_a_file": "was replaced by something that is no file",
        }[self.rule]
        return Problem("drift", f"{self.path} {what}", self.path, self.rule)


def lstat(directory: int, name: str) -> os.stat_result | None:
    """Stat `name` without following a link; None when nothing is there. Raises `OSError`."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def may_hold(entry: Entry | None, size: int) -> bool:
    """Whether a file of `size` bytes may hold what `entry` says, so that only reading it tells."""
    return entry is not None and entry.digest not in (None, UNREAD) and entry.size == size


def digest_steps(directory: int, name: str, size: int) -> Steps[tuple[Digest, FileStat] | None]:
    """Hash a regular file that should have `size` bytes.

    Returns:
        Its digest and its stat from *before* it was read, so that a change during the reading shows in its times. The
        digest is `UNREAD` when its size is another or becomes so. None when there is no regular file.

    Raises:
        OSError: it cannot be read.
    """
    try:
        descriptor = os.open(name, READ_FILE, dir_fd=directory)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENOTDIR):
            return None
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            return None
        whole, left = hashlib.sha256(), size if found.st_size == size else -1
        # One byte more than there should be shows a file that grows.
        while left >= 0 and (chunk := os.read(descriptor, min(CHUNK, left + 1))):
            whole.update(chunk)
            left -= len(chunk)
            if left > 0:
                yield
        return Digest(whole.hexdigest()) if left == 0 else UNREAD, FileStat.of(found)
    finally:
        os.close(descriptor)


def drift_steps(
    path: RelPath,
    directory: int,
    name: str,
    found: os.stat_result,
    expected: FileStat | None,
    entry: Entry | None,
    wanted: Entry | None = None,
    may_read: Callable[[int], bool] = lambda size: True,
) -> Steps[Drift | None]:
    """Find out what became of a file whose stat is not the expected one.

    Args:
        path: the file's path, which is `name` in `directory`.
        directory: an open directory.
        name: see `path`.
        found: its stat now.
        expected: its stat when its content was known; None for a file that the agent did not write.
        entry: what it should hold.
        wanted: what it is about to hold; a file that holds that already is read too, to say so.
        may_read: whether so many bytes may be read.

    Returns:
        None when it still holds what `entry` says.
    """
    if not stat.S_ISREG(found.st_mode):
        return Drift(path, "not_a_file")
    unread = Drift(path, "appeared" if expected is None else "changed", UNREAD, FileStat.of(found))
    size = found.st_size
    if not (may_hold(entry, size) or may_hold(wanted, size)) or not may_read(size):
        return unread
    try:
        read = yield from digest_steps(directory, name, size)
    except OSError as error:
        # Not permitted, held by a lease, on a bad sector: that file alone cannot be told. Without descriptors none can.
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return unread
    if read is None:
        return Drift(path, "missing")
    if entry is not None and entry.digest == read[0]:
        return None
    return Drift(path, unread.rule, *read)


@dataclass(frozen=True, slots=True)
class Audit:
    """A recorded tree compared with the disk.

    `stats`: the files that hold what the tree says, with their present stat. `drifts`: the others.
    """

    stats: dict[RelPath, FileStat]
    drifts: tuple[Drift, ...]


class DirectoryView:
    """Reads what is below `root`. Not thread-safe.

    `make_root` is for a subclass that also writes; without it `root` itself may be a link.
    """

    def __init__(self, root: Path, *, make_root: Callable[[], None] | None = None) -> None:
        self.root = root
        self._directories = DirectoryCache(root, make_root)

    def close(self) -> None:
        """Close every descriptor."""
        self._directories.close()

    def stat(self, path: RelPath) -> FileStat | None:
        """Stat the regular file at `path`; None when there is none, or it cannot be reached."""
        try:
            found = lstat(*self._directories.parent(path))
        except (OSError, Blocked):
            return None
        return FileStat.of(found) if found is not None and stat.S_ISREG(found.st_mode) else None

    def lstat(self, path: str) -> os.stat_result | None:
        """Stat what stands at `path`, whatever it is; None when there is nothing, or it cannot be reached."""
        try:
            return lstat(*self._directories.parent(path))
        except (OSError, Blocked):
            return None

    def listing(self, path: str) -> list[tuple[str, os.stat_result]]:
        """Stat what is in the directory at `path` ("" is the root), at most `MOST_LISTED` names of it.

        Nothing, when it is none or cannot be read.
        """
        try:
            with os.scandir(self._directories.open(path)) as entries:
                return [
                    (entry.name, found)
                    for entry in islice(entries, MOST_LISTED)
                    if (found := _stat(entry)) is not None
                ]
        except (OSError, Blocked):
            return []

    def content(self, path: RelPath, size: int) -> bytes | None:
        """Read the regular file at `path` if it has `size` bytes; None when it has not, or cannot be read."""
        try:
            directory, name = self._directories.parent(path)
            with open(os.open(name, READ_FILE, dir_fd=directory), "rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_size != size:
                    return None
                return file.read(size) if size else b""
        except (OSError, Blocked):
            return None

    def digest_steps(self, path: RelPath, size: int) -> Steps[tuple[Digest, FileStat] | None]:
        """Hash the file at `path`; see the function `digest_steps`."""
        try:
            return (yield from digest_steps(*self._directories.parent(path), size))
        except (FileNotFoundError, Blocked):
            return None

    def check_steps(
        self, path: RelPath, known: FileStat | None, entry: Entry | None
    ) -> Steps[Drift | FileStat | None]:
        """Compare one path with what the agent left there.

        Args:
            path: the file's.
            known: its stat then.
            entry: what it held; None, or a tombstone, when there should be nothing.

        Returns:
            A `FileStat` when the file is as it should be (another than `known` if it was only touched), None when
            there is nothing and should be nothing, else the drift.

        Raises:
            OSError: it cannot be read.
        """
        should_be = entry is not None and entry.is_file
        try:
            directory, name = self._directories.parent(path)
            found = lstat(directory, name)
            if found is not None:
                if known is not None and should_be and known.matches(found):
                    return known
                drift = yield from drift_steps(path, directory, name, found, known, entry)
                return FileStat.of(found) if drift is None else drift
        except (FileNotFoundError, Blocked):
            pass
        return Drift(path, "missing") if should_be else None

    def audit_steps(self, tree: Tree, stats: Mapping[RelPath, FileStat]) -> Steps[Audit]:
        """Compare a recorded tree with the disk, by stat and where that differs by hash.

        Nothing may be changed between two steps. A file that cannot be read is taken for another: what should be there
        is asked for and written again.
        """
        held: dict[RelPath, FileStat] = {}
        drifts: list[Drift] = []
        for path, entry in sorted(tree.files().items()):
            found: Drift | FileStat | None
            try:
                found = yield from self.check_steps(path, stats.get(path), entry)
            except OSError:
                found = Drift(path, "changed", UNREAD)
            if isinstance(found, FileStat):
                held[path] = found
            elif found is not None:
                drifts.append(found)
            yield
        return Audit(held, tuple(drifts))

    def obstacle(self, path: RelPath) -> object:
        """What stands at `path` or above it, to be compared with the same later; says nothing in itself."""
        try:
            directory, name = self._directories.parent(path)
            above, found = os.fstat(directory), lstat(directory, name)
        except Blocked as blocked:
            return blocked.path, blocked.rule
        except OSError as error:
            return error.errno
        return (above.st_mode, above.st_uid), found and (
            found.st_dev, found.st_ino, found.st_mode, found.st_mtime_ns, found.st_ctime_ns
        )  # fmt: skip

    def scan(self) -> dict[RelPath, FileStat]:
        """Stat every regular file below the root that a project may have; links and protected directories are left out.

        Raises `OSError` when a directory cannot be read.
        """
        return dict(found for found in self._walk() if found is not None)

    def _walk(self) -> Iterator[tuple[RelPath, FileStat] | None]:
        """Yield every file of the project's, and None after each directory."""
        waiting = [""]
        while waiting:
            at = waiting.pop()
            try:
                with os.scandir(self._directories.open(at)) as listing:
                    entries = [
                        (entry.name, found) for entry in listing if (found := _stat(entry)) is not None
                    ]
            except (FileNotFoundError, Blocked):
                continue
            for name, found in entries:
                if name in PROTECTED:
                    continue
                try:
                    path = parse_path(f"{at}/{name}" if at else name)
                except PathRefused:
                    continue
                if stat.S_ISDIR(found.st_mode):
                    waiting.append(path)
                elif stat.S_ISREG(found.st_mode):
                    yield path, FileStat.of(found)
            yield None


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """None when it was removed while its directory was listed."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
