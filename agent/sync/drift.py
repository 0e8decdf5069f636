"""Report which of the agent's files another process changed: a formatter in the container, `git checkout`, a script.

inotify (`watchfiles`) names the files that may have changed; the recorded stat and then the hash say whether they did.
A write of our own has exactly the stat that was recorded for it, so it is never taken for drift. Files that the agent
did not write are no drift: build output and lock files come and go as they like.

Watched are the directories that hold our files, each by itself. A recursive watch would put one on every directory of
`node_modules` and eat the kernel's budget of watches, which the dev server needs too.

Events can be lost (the kernel's queue is bounded, and there is a moment between two sets of watches), so after each
arming and every few minutes the whole tree is compared once, by stat.

A file whose name is not UTF-8 is none of ours, and `watchfiles` cannot name it: it fails, and what else it had seen is
lost. The watch is then made again, and comparing everything finds what was lost. (`watchfiles.awatch` wraps that
failure in an exception group, and needs more code around it than `RustNotify` itself.) It is made again, too, when it
names more files at once than are followed: a program may make 20,000 a second beside ours for as long as it likes, and
what piles up meanwhile goes with the old watch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from watchfiles._rust_notify import RustNotify, WatchfilesRustInternalError

from agent.core.model import Entry, RelPath, parents
from agent.fs.inspect import Drift, FileStat
from agent.fs.notify import changed as notify_changed
from agent.fs.project_dir import ProjectDir
from agent.fs.turns import Steps, in_turns
from agent.telemetry.logging import get_logger

log = get_logger("drift")

Expected = Callable[[], tuple[Mapping[RelPath, Entry], Mapping[RelPath, FileStat]]]
"""Returns what should be on disk now: the tree's entries, and each file's stat when it was put there.

Called anew for each comparison. What it returns must move in one step with the disk: no await between it and
`ProjectDir.apply`.
"""

STEP_MS = 200
"""Quiet time after which a burst of events is taken. Also how often the waiting thread wakes when idle."""
LONGEST_MS = 500
"""A burst that does not end is taken this often."""
MOST_NAMES = 5_000
"""Names of one burst that are looked at. Each is 0.4 KB of memory; a checkout of all our files has fewer."""
RENEW_SECONDS = 0.5
"""Between a watch that failed and the next: a program may make such names without end."""
RENEW_REST = 10
"""The same, as a multiple of what comparing everything took last: at most a tenth of a core goes into it."""
MOST_STRANGERS = 1_000
"""Files of others that are followed; a thousand say what is wrong."""


class _TooMany(Exception):
    """More names than are followed."""


_ROOT = RelPath(".")
"""The root itself, as events name it."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What changed since the last report.

    `drifts`: new, or other than reported before. `settled`: paths reported earlier that are right again, or no longer
    ours. `touched`: files with another stat that hold what they should; their new stats save hashing them again.
    """

    drifts: tuple[Drift, ...]
    settled: tuple[RelPath, ...]
    touched: Mapping[RelPath, FileStat]


class DriftWatch:
    """Reports what drifts until it is cancelled. `sweep_seconds`: between two comparisons of everything."""

    def __init__(
        self,
        disk: ProjectDir,
        expected: Expected,
        report: Callable[[Observed], None],
        *,
        sweep_seconds: float = 300.0,
    ) -> None:
        self._disk = disk
        self._expected = expected
        self._report = report
        self._sweep_seconds = sweep_seconds
        self._open: dict[RelPath, Drift] = {}
        self._seen = _Seen()
        self._sweep_took = 0.0
        self.strangers: frozenset[RelPath] = frozenset()
        """Files that nobody knows, found where the ledger of an earlier run is lost: shown until they go."""
        self.renewals = 0
        """How often the watch had to be made again."""

    @property
    def open(self) -> Mapping[RelPath, Drift]:
        """The files that are not as they should be now."""
        return self._open

    async def run(self) -> None:
        """Watch. Without watches to be had (the kernel's limit) it sweeps, ten times as often."""
        while True:
            watched = self._directories()
            try:
                notify = await asyncio.to_thread(self._watch, watched)
            except (OSError, WatchfilesRustInternalError):
                await self._sweep()
                await asyncio.sleep(self._sweep_seconds / 10)
                continue
            try:
                with notify:
                    await self._sweep()
                    while await self._turn(notify, watched):
                        pass
            except (WatchfilesRustInternalError, _TooMany) as error:
                if not self.renewals:
                    log.warning("drift.watch_renewed", why=str(error))
                self.renewals += 1
                await asyncio.sleep(max(RENEW_SECONDS, RENEW_REST * self._sweep_took))

    async def _turn(self, notify: RustNotify, watched: frozenset[RelPath]) -> bool:
        """Wait for one burst and compare what it names. Returns False when other directories are to be watched now."""
        raw = await notify_changed(notify, LONGEST_MS, STEP_MS, self._sweep_seconds)
        if raw is None:
            await self._sweep()
            return True
        if len(raw) > MOST_NAMES:
            raise _TooMany(f"{len(raw)} names at once")
        entries, _ = self._expected()
        changed = {path for place in raw if (path := self._relative(place)) is not None}
        others = {path for path in changed if path not in entries}
        # A directory of ours came or went: its watch went with it, and so did everything below.
        moved = others & (watched | {_ROOT})
        if moved:
            changed.update(p for p in entries if _ROOT in moved or not moved.isdisjoint(parents(p)))
        await self._compare(changed)
        return not others or (not moved and self._directories() == watched)

    def _directories(self) -> frozenset[RelPath]:
        entries, _ = self._expected()
        return frozenset(
            parent for path, entry in entries.items() if entry.is_file for parent in parents(path)
        )

    def _watch(self, watched: Iterable[RelPath]) -> RustNotify:
        """Watch the root and these directories. Raises `OSError` and `WatchfilesRustInternalError`."""
        return RustNotify(self._places(watched), False, False, 0, False, True)

    def _places(self, watched: Iterable[RelPath]) -> list[str]:
        root = self._disk.root
        places = (root / path for path in watched)
        return [str(root), *(str(place) for place in places if place.is_dir() and not place.is_symlink())]

    def _relative(self, place: str) -> RelPath | None:
        root = str(self._disk.root)
        if place == root:
            return _ROOT
        return RelPath(place[len(root) + 1 :]) if place.startswith(f"{root}/") else None

    async def _sweep(self) -> None:
        began = time.monotonic()
        entries, _ = self._expected()
        await self._compare({*entries, *self._open, *sorted(self.strangers)[:MOST_STRANGERS]})
        self._sweep_took = time.monotonic() - began

    async def _compare(self, paths: Iterable[RelPath]) -> None:
        """Compare these files, and report before anybody else has a turn: it may not be true any more afterwards."""
        await in_turns(self._comparing(sorted(paths)), self._tell)
        self._tell()

    def _comparing(self, paths: Iterable[RelPath]) -> Steps[None]:
        for path in paths:
            yield
            entry, known = before = self._expected_at(path)
            found: Drift | FileStat | None = None
            if (entry is not None and entry.is_file) or (entry is None and path in self.strangers):
                try:
                    found = yield from self._disk.check_steps(path, known, entry)
                except OSError:
                    continue
            # When another content is expected now, it was written meanwhile: the watch names that change too.
            if self._expected_at(path) == before:
                self._note(path, found, known)

    def _expected_at(self, path: RelPath) -> tuple[Entry | None, FileStat | None]:
        entries, stats = self._expected()
        return entries.get(path), stats.get(path)

    def _note(self, path: RelPath, found: Drift | FileStat | None, known: FileStat | None) -> None:
        if isinstance(found, Drift):
            if self._open.get(path) != found:
                self._open[path] = found
                self._seen.drifts.append(found)
            return
        if self._open.pop(path, None) is not None:
            self._seen.settled.append(path)
        if found is not None and found != known:
            self._seen.touched[path] = found

    def _tell(self) -> None:
        seen, self._seen = self._seen, _Seen()
        if seen.drifts or seen.settled or seen.touched:
            self._report(Observed(tuple(seen.drifts), tuple(seen.settled), seen.touched))


@dataclass(slots=True)
class _Seen:
    """What was found and not reported yet."""

    drifts: list[Drift] = field(default_factory=list)
    settled: list[RelPath] = field(default_factory=list)
    touched: dict[RelPath, FileStat] = field(default_factory=dict)
