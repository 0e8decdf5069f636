"""SYNC_MODE=shadow: compare what the other flow puts into the live directory with what the database says.

The agent hydrates and follows into a directory of its own (SHADOW_DIR). The other flow's directory (PROJECT_DIR) is
read over and over and never written: there is no `ProjectDir` on it, only a `DirectoryView`. A file is read where
its stat is not the one that its hash was taken at. Reading is done in a thread, so that the link and the tree do
not wait for a slow disk.

Polled, not watched: a watch on every directory of the other flow's tree takes from the kernel's budget that its dev
server needs, and sees nothing on some network mounts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from agent.core.divergence import Comparison
from agent.core.model import Digest, Entry, Problem, RelPath
from agent.fs.inspect import UNREAD, DirectoryView, FileStat, may_hold
from agent.telemetry.logging import get_logger
from agent.telemetry.status import OwnedProblems, Problems

log = get_logger("shadow")

LOOKS = 5
"""In one settling time: what moved and moved back in between is not taken for what stood."""
IDLE_SHARE = 50
"""A look that took long is followed by a rest this many times as long: at most 2 % of a core."""
MOST_SHOWN = 50
"""Differences shown one by one; the rest is counted. The list of problems must keep room for the others."""
RACY_NS = 100_000_000
"""Nanoseconds. A file that was changed this shortly before it was read may change again within the clock's tick, and
look the same: its hash is not kept for the next look (git's racily clean entries)."""


@dataclass(slots=True)
class Shadow:
    """See the module. `wanted` gives the tree as the database has it; `look` may begin once `hydrated` is called."""

    live: DirectoryView
    comparison: Comparison
    problems: Problems
    wanted: Callable[[], Mapping[RelPath, Entry]]
    clock: Callable[[], float] = time.monotonic
    looks: int = 0
    looked_at: float | None = None
    """Unix seconds."""
    equal_since: float | None = None
    """Unix seconds since when no difference stood; None while one does, or before the first look."""
    _known: dict[RelPath, tuple[FileStat, Digest]] = field(default_factory=dict)
    _shown: set[RelPath] = field(default_factory=set)
    _hydrated: asyncio.Event = field(default_factory=asyncio.Event)
    _stopping: bool = False
    _owned: OwnedProblems = field(init=False)

    def __post_init__(self) -> None:
        self._owned = self.problems.owned_by("sync.shadow")

    def hydrated(self) -> None:
        """There is a whole tree to compare with."""
        self._hydrated.set()

    async def run(self) -> None:
        """Look until cancelled."""
        await self._hydrated.wait()
        try:
            while True:
                started = self.clock()
                await self._turn()
                rest = max(self.comparison.settle / LOOKS, IDLE_SHARE * (self.clock() - started))
                await asyncio.sleep(rest)
        finally:
            self.live.close()

    async def _turn(self) -> None:
        wanted = self.wanted()
        reading = asyncio.ensure_future(asyncio.to_thread(self.read, wanted))
        try:
            found = await asyncio.shield(reading)
        except asyncio.CancelledError:
            self._stopping = True
            with suppress(OSError):
                await reading
            raise
        except OSError as error:
            self._owned.add(Problem("live_unreadable", f"cannot look at {self.live.root}: {error.strerror}"))
            return
        self._owned.clear("live_unreadable")
        self.compare(wanted, found)

    def read(self, wanted: Mapping[RelPath, Entry]) -> dict[RelPath, Digest | FileStat | None]:
        """The live directory's files, and what those of them hold that are `wanted`. Raises `OSError`.

        What is there and not wanted is not read: that it is there is all that is asked. Nor is what cannot be it by its
        size: how it looks tells it from what stood there before.
        """
        found: dict[RelPath, Digest | FileStat | None] = {}
        known: dict[RelPath, tuple[FileStat, Digest]] = {}
        for path, stat in self.live.scan().items():
            if self._stopping:
                break
            entry = wanted.get(path)
            if entry is None or entry.digest is None:
                found[path] = None
                continue
            if not may_hold(entry, stat.size):
                found[path] = stat
                continue
            before = self._known.get(path)
            if before is not None and before[0] == stat:
                found[path], known[path] = before[1], before
                continue
            try:
                read = self._read(path, stat.size)
            except OSError:
                found[path] = None
                continue
            if read is None:
                continue
            if read[0] == UNREAD:
                found[path] = read[1]
                continue
            found[path] = read[0]
            if time.time_ns() - read[1].newest_ns > RACY_NS:
                known[path] = read[1], read[0]
        self._known = known
        return found

    def _read(self, path: RelPath, size: int) -> tuple[Digest, FileStat] | None:
        """What it holds; None when it is gone, or there is no more time for it."""
        steps = self.live.digest_steps(path, size)
        try:
            while not self._stopping:
                next(steps)
        except StopIteration as end:
            read: tuple[Digest, FileStat] | None = end.value
            return read
        finally:
            steps.close()
        return None

    def compare(
        self, wanted: Mapping[RelPath, Entry], found: Mapping[RelPath, Digest | FileStat | None]
    ) -> None:
        """Hold `found` against the tree, and tell what came of it."""
        before = self.comparison.counts()
        self.comparison.compare(wanted, found, self.clock())
        self.looks += 1
        self.looked_at = time.time()
        standing = self.comparison.open
        if standing:
            self.equal_since = None
        elif self.equal_since is None:
            self.equal_since = self.looked_at
        shown = dict(list(standing.items())[:MOST_SHOWN])
        self._owned.clear("shadow_difference", paths=self._shown - shown.keys())
        for difference in shown.values():
            self._owned.add(difference.problem())
        self._shown = set(shown)
        counts = self.comparison.counts()
        if counts != before or self.looks == 1:
            log.info("shadow.compared", files=self.comparison.compared, **counts)

    def report(self) -> dict[str, object]:
        """For status."""
        now = self.clock()
        return {
            "live_dir": str(self.live.root),
            "looks": self.looks,
            "looked_at": self.looked_at,
            "files": self.comparison.compared,
            "equal_since": self.equal_since,
            "unsettled": self.comparison.unsettled,
            "differences": self.comparison.counts(),
            "paths": [
                {"file_path": each.path, "rule": each.rule.value, "seconds": round(now - each.since, 1)}
                for each in list(self.comparison.open.values())[:MOST_SHOWN]
            ],
        }

    def collect(self) -> Iterator[Metric]:
        """The figures, read at each scrape."""
        differences = GaugeMetricFamily(
            "preview_agent_shadow_differences",
            "Files that differ between the live directory and the database, by how.",
            labels=["rule"],
        )
        for rule, count in self.comparison.counts().items():
            differences.add_metric([rule], count)
        yield differences
        for name, text, value in (
            ("files", "Files compared at the latest look.", self.comparison.compared),
            ("unsettled_files", "Files that differ and may be in flight.", self.comparison.unsettled),
        ):
            yield GaugeMetricFamily(f"preview_agent_shadow_{name}", text, value=value)
        yield CounterMetricFamily(
            "preview_agent_shadow_looks", "Looks at the live directory.", value=self.looks
        )
