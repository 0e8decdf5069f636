"""What stands at a name, and what has become of it: by stat, and by hash where the stat is not the expected one.

Everything is named relative to an open directory, and no link is followed. Only a file of the very size that it should
have is read: another size is another content, and how large a file is decides whoever writes it (`truncate -s 1T`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent.core.model import Digest, Entry, Problem, RelPath
from agent.fs.turns import Steps

PIECE = 2**18
"""Bytes that are read at a time: about 0.4 ms of hashing."""

UNREAD = Digest("0" * 64)
"""Stands for content that was not read and is another than it should be. No content is known that has this hash."""

_LOOKS = struct.Struct("<QQQQ")
_RECORDED = struct.Struct("<qqqq")
"""As SQLite's integers are signed."""
_KEPT = 2**64 - 1
"""The bits of each number that are kept."""


def _packed(inode: int, size: int, mtime_ns: int, ctime_ns: int) -> bytes:
    return _LOOKS.pack(inode & _KEPT, size & _KEPT, mtime_ns & _KEPT, ctime_ns & _KEPT)


class FileStat(bytes):
    """How a file looked when its content was known: enough to see that it has not been touched since.

    Inode, size in bytes, times of modification and change in nanoseconds. The change time cannot be set back by a
    program, which is why it is here; it also moves when only the mode changes, so a difference means *look again*, not
    *changed*. In one piece, because there is one of each file: 80 bytes of memory, of four numbers it were 240.

    Of each number the lowest 64 bits are kept. A file's time of modification can be anything (`touch -d 2300-01-01`),
    and in nanoseconds 64 bits end in 2262. Two that differ by a multiple of 584 years look the same then, but setting
    one moves the change time.
    """

    __slots__ = ()

    def __new__(cls, inode: int, size: int, mtime_ns: int, ctime_ns: int) -> FileStat:
        return super().__new__(cls, _packed(inode, size, mtime_ns, ctime_ns))

    @classmethod
    def of(cls, found: os.stat_result) -> FileStat:
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    @classmethod
    def recorded(cls, columns: Sequence[int]) -> FileStat:
        """From the ledger's columns."""
        return super().__new__(cls, _RECORDED.pack(*columns))

    @property
    def columns(self) -> tuple[int, ...]:
        """For the ledger."""
        return _RECORDED.unpack(self)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.columns[1]

    @property
    def newest_ns(self) -> int:
        """The later of the two times."""
        return max(self.columns[2:])

    def is_of(self, found: os.stat_result) -> bool:
        """Whether a file that looks like this has not been touched since."""
        return self == _packed(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)

    def __repr__(self) -> str:
        return "FileStat(inode={}, size={}, mtime_ns={}, ctime_ns={})".format(*self.columns)


@dataclass(frozen=True, slots=True)
class Drift:
    """A file that is not as the agent left it.

    `rule`: `changed`, `missing`, `appeared` (one the agent did not write), `not_a_file`. `digest` and `stat` are what
    stands there, None when it is no file; `UNREAD` where it was not read.
    """

    path: RelPath
    rule: str
    digest: Digest | None = None
    stat: FileStat | None = None

    def problem(self) -> Problem:
        told = {
            "changed": "was changed inside the container",
            "missing": "was removed inside the container",
            "appeared": "was put there by something else",
            "not_a_file": "was replaced by something that is no file",
        }[self.rule]
        return Problem("drift", f"{self.path} {told}", self.path, self.rule)


def look(directory: int, name: str) -> os.stat_result | None:
    """What stands at `name`, a link being a link; None when nothing does. Raises `OSError`."""
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def may_hold(entry: Entry | None, size: int) -> bool:
    """Whether a file of `size` bytes may be what `entry` says, so that only reading it tells."""
    return entry is not None and entry.digest not in (None, UNREAD) and entry.size == size


def reading(directory: int, name: str, size: int) -> Steps[tuple[Digest, FileStat] | None]:
    """The digest of a regular file of `size` bytes and how it looked *before* it was read; None when there is none.

    A change during the reading moves its times, so a digest of mixed content can never be taken for the stat's. What is
    of another size, or becomes so meanwhile, is `UNREAD`. Raises `OSError`.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, flags, dir_fd=directory)
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
        while left >= 0 and (piece := os.read(descriptor, min(PIECE, left + 1))):
            whole.update(piece)
            left -= len(piece)
            if left > 0:
                yield
        return Digest(whole.hexdigest()) if left == 0 else UNREAD, FileStat.of(found)
    finally:
        os.close(descriptor)


def compare(
    path: RelPath,
    directory: int,
    name: str,
    found: os.stat_result,
    expected: FileStat | None,
    entry: Entry | None,
    wanted: Entry | None = None,
    may_read: Callable[[int], bool] = lambda size: True,
) -> Steps[Drift | None]:
    """What became of a file whose stat is not the expected one; None when its content is still `entry`'s.

    It is read when it may hold what `entry` says, or `wanted`, and `may_read` so many bytes.
    """
    if not stat.S_ISREG(found.st_mode):
        return Drift(path, "not_a_file")
    unread = Drift(path, "appeared" if expected is None else "changed", UNREAD, FileStat.of(found))
    size = found.st_size
    if not (may_hold(entry, size) or may_hold(wanted, size)) or not may_read(size):
        return unread
    try:
        read = yield from reading(directory, name, size)
    except PermissionError:
        return unread
    if read is None:
        return Drift(path, "missing")
    if entry is not None and entry.digest == read[0]:
        return None
    return Drift(path, unread.rule, *read)
