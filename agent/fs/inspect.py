"""Looking at a directory: what stands in it, by stat and by hash, no link followed. Nothing here can write.

`fs.project_dir.ProjectDir` is one that also writes; `sync.shadow` looks at a directory that belongs to somebody else,
and has no more than this.

What stands at a name, and what has become of it: by stat, and by hash where the stat is not the expected one.

Everything is named relative to an open directory, and no link is followed. Only a file of the very size that it should
have is read: another size is another content, and how large a file is decides whoever writes it (`truncate -s 1T`).
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.core.errors import PathRefused
from agent.core.model import PROTECTED, Digest, Entry, Problem, RelPath, Tree, parse_path
from agent.fs.dirfd import Blocked, DirectoryCache
from agent.fs.turns import Steps, at_once

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


@dataclass(frozen=True, slots=True)
class Audit:
    """A recorded tree held against the disk.

    `stats`: the files that hold what the tree says, as they look now. `drifts`: the others.
    """

    stats: dict[RelPath, FileStat]
    drifts: tuple[Drift, ...]


class DirectoryView:
    """One root, looked at. `make_root` is for those who also write, should it be gone. Not thread-safe."""

    def __init__(self, root: Path, *, make_root: Callable[[], None] | None = None) -> None:
        self._root = root
        self._directories = DirectoryCache(root, make_root)

    @property
    def root(self) -> Path:
        """The directory."""
        return self._root

    def close(self) -> None:
        """Let go of every descriptor."""
        self._directories.close()

    def stat(self, path: RelPath) -> FileStat | None:
        """How the regular file at `path` looks now, no link followed; None when there is none."""
        above, _, name = path.rpartition("/")
        try:
            found = look(self._directories.open(above), name)
        except (OSError, Blocked):
            return None
        return FileStat.of(found) if found is not None and stat.S_ISREG(found.st_mode) else None

    def digest_steps(self, path: RelPath, size: int) -> Steps[tuple[Digest, FileStat] | None]:
        """What the file at `path` holds, no link followed; None when there is none. As `looks.reading`."""
        above, _, name = path.rpartition("/")
        try:
            return (yield from reading(self._directories.open(above), name, size))
        except (FileNotFoundError, Blocked):
            return None

    def check_steps(
        self, path: RelPath, known: FileStat | None, entry: Entry | None
    ) -> Steps[Drift | FileStat | None]:
        """Hold one path against what the agent left there.

        A `FileStat` when it is as it should be (newer than `known` if it was only touched), None when there is nothing
        and should be nothing, else the drift. Raises `OSError` when it cannot be looked at.
        """
        above, _, name = path.rpartition("/")
        try:
            directory = self._directories.open(above)
            found = look(directory, name)
            should_be = entry is not None and entry.is_file
            if found is None:
                return Drift(path, "missing") if should_be else None
            if known is not None and should_be and known.is_of(found):
                return known
            drift = yield from compare(path, directory, name, found, known, entry)
            return FileStat.of(found) if drift is None else drift
        except (FileNotFoundError, Blocked):
            return Drift(path, "missing") if entry is not None and entry.is_file else None

    def audit(self, tree: Tree, stats: Mapping[RelPath, FileStat]) -> Audit:
        """Hold a whole recorded tree against the disk: by stat, and by hash where that differs."""
        return at_once(self.audit_steps(tree, stats))

    def audit_steps(self, tree: Tree, stats: Mapping[RelPath, FileStat]) -> Steps[Audit]:
        """As `audit`, in steps. Nothing may be changed between them."""
        held: dict[RelPath, FileStat] = {}
        drifts: list[Drift] = []
        for path, entry in sorted(tree.files().items()):
            found = yield from self.check_steps(path, stats.get(path), entry)
            if isinstance(found, FileStat):
                held[path] = found
            elif found is not None:
                drifts.append(found)
            yield
        return Audit(held, tuple(drifts))

    def scan(self) -> dict[RelPath, FileStat]:
        """Every regular file below the root that a project may have, links and protected directories left out."""
        return dict(self._walk(""))

    def _walk(self, start: str) -> Iterator[tuple[RelPath, FileStat]]:
        waiting = [start]
        while waiting:
            at = waiting.pop()
            try:
                with os.scandir(self._directories.open(at)) as listing:
                    entries = [(e.name, found) for e in listing if (found := _stat(e)) is not None]
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


def _stat(entry: os.DirEntry[str]) -> os.stat_result | None:
    """How it looks; None when it went while its directory was listed."""
    try:
        return entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return None
