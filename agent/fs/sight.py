"""Looking at a directory: what stands in it, by stat and by hash, no link followed. Nothing here can write.

`fs.project_dir.Disk` is one that also writes; `sync.shadow` looks at a directory that belongs to somebody else,
and has no more than this.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.core.errors import PathRefused
from agent.core.model import PROTECTED, Digest, Entry, RelPath, Tree, parse_path
from agent.fs.dirfd import Blocked, Jail
from agent.fs.looks import Drift, FileStat, compare, look, reading
from agent.fs.turns import Steps, at_once


@dataclass(frozen=True, slots=True)
class Audit:
    """A recorded tree held against the disk.

    `stats`: the files that hold what the tree says, as they look now. `drifts`: the others.
    """

    stats: dict[RelPath, FileStat]
    drifts: tuple[Drift, ...]


class Sight:
    """One root, looked at. `make_root` is for those who also write, should it be gone. Not thread-safe."""

    def __init__(self, root: Path, *, make_root: Callable[[], None] | None = None) -> None:
        self._root = root
        self._jail = Jail(root, make_root)

    @property
    def root(self) -> Path:
        """The directory."""
        return self._root

    def close(self) -> None:
        """Let go of every descriptor."""
        self._jail.forget()

    def look(self, path: RelPath) -> FileStat | None:
        """How the regular file at `path` looks now, no link followed; None when there is none."""
        above, _, name = path.rpartition("/")
        try:
            found = look(self._jail.directory(above), name)
        except (OSError, Blocked):
            return None
        return FileStat.of(found) if found is not None and stat.S_ISREG(found.st_mode) else None

    def reading(self, path: RelPath, size: int) -> Steps[tuple[Digest, FileStat] | None]:
        """What the file at `path` holds, no link followed; None when there is none. As `looks.reading`."""
        above, _, name = path.rpartition("/")
        try:
            return (yield from reading(self._jail.directory(above), name, size))
        except (FileNotFoundError, Blocked):
            return None

    def checking(
        self, path: RelPath, known: FileStat | None, entry: Entry | None
    ) -> Steps[Drift | FileStat | None]:
        """Hold one path against what the agent left there.

        A `FileStat` when it is as it should be (newer than `known` if it was only touched), None when there is nothing
        and should be nothing, else the drift. Raises `OSError` when it cannot be looked at.
        """
        above, _, name = path.rpartition("/")
        try:
            directory = self._jail.directory(above)
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
        return at_once(self.auditing(tree, stats))

    def auditing(self, tree: Tree, stats: Mapping[RelPath, FileStat]) -> Steps[Audit]:
        """As `audit`, in steps. Nothing may be changed between them."""
        held: dict[RelPath, FileStat] = {}
        drifts: list[Drift] = []
        for path, entry in sorted(tree.files().items()):
            found = yield from self.checking(path, stats.get(path), entry)
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
                with os.scandir(self._jail.directory(at)) as listing:
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
