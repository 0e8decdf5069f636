"""Measure how long each save took from its commit to its rename; log it, and put it into its writer's trace.

An event that could not be applied when it came, because its bytes had to be fetched or the disk was full, is measured
when a catch-up has brought it: the slow ones are those that a figure must not leave out. Metrics and status are counted
at once; lines and spans are written when `tell` is called, so that a burst does not wait for its own log.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from agent.core.clock_skew import ClockSkew, Moment
from agent.core.model import Commit, Cursor, RelPath, TraceParent
from agent.core.reconcile import Outcome
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics
from agent.telemetry.spans import Spans
from agent.telemetry.status import Applied, SyncStatus

log = get_logger("sync")

MOST_LATE: Final = 1_000
"""Commits remembered until they are caught up with; as many as may wait to be applied."""

LATE: Final = frozenset({Outcome.APPLIED, Outcome.WAITING})
"""What a catch-up brings when the event itself did not: bytes by reference, or a batch that was undone."""


class _Arrival(NamedTuple):
    """A commit that is on disk, without its content. `lag`: seconds from commit to rename; times: wall clock."""

    event_type: str
    revision: int | None
    file_path: RelPath | None
    files: int
    by: str
    lag: float
    received_at: float | None
    at: float
    trace: TraceParent | None

    @classmethod
    def of(cls, commit: Commit, by: str, lag: float, at: float) -> _Arrival:
        """`by`: what brought it, `event` or `sync`."""
        files = len(commit.changes)
        path = commit.changes[0].path if files == 1 else None
        return cls(commit.event, commit.revision, path, files, by, lag, commit.received_at, at, commit.trace)


class LagMeter:
    """Measures the lag of every event, from what became of it. `clock` gives now on both clocks."""

    def __init__(
        self,
        metrics: Metrics,
        status: SyncStatus,
        skew: ClockSkew,
        spans: Spans | None = None,
        *,
        clock: Callable[[], Moment] = lambda: Moment(time.time(), time.monotonic()),
    ) -> None:
        self._metrics = metrics
        self._status = status
        self._skew = skew
        self._spans = spans
        self._clock = clock
        self._late: dict[int, Commit] = {}
        self._untold: list[_Arrival] = []

    def observe(self, steps: Sequence[tuple[Commit, Outcome]], *, applied: bool) -> None:
        """What became of the events of one batch, just now; not `applied`: the disk did not take it."""
        became = Counter((commit.event, outcome.value if applied else "undone") for commit, outcome in steps)
        for (event, what), count in became.items():
            self._metrics.events.labels(event, what).inc(count)
        arrived = []
        for commit, outcome in steps:
            if applied and outcome is Outcome.APPLIED:
                self._late.pop(commit.revision or 0, None)
                arrived.append(commit)
            elif outcome in LATE and commit.revision is not None and len(self._late) < MOST_LATE:
                self._late[commit.revision] = commit
        self._arrived(arrived, "event")

    def caught_up(self, cursor: Cursor) -> None:
        """Everything up to the cursor is on disk, just now."""
        if not self._late:
            return
        late, self._late = self._late, {}
        arrived = []
        for revision, commit in late.items():
            if commit.epoch not in (None, cursor.epoch):
                continue
            if revision <= cursor.revision or revision in cursor.islands:
                arrived.append(commit)
            else:
                self._late[revision] = commit
        self._arrived(arrived, "sync")

    def tell(self) -> None:
        """Log what arrived since the last call, and put it into its writers' traces."""
        untold, self._untold = self._untold, []
        line = log.bind()
        for arrival in untold:
            line.info(
                "event.applied",
                event_type=arrival.event_type,
                revision=arrival.revision,
                file_path=arrival.file_path,
                files=arrival.files,
                by=arrival.by,
                lag_ms=round(arrival.lag * 1000, 1),
                **({"trace_id": arrival.trace.trace_id} if arrival.trace else {}),
            )
            if self._spans is not None:
                self._record(self._spans, arrival)

    def _arrived(self, commits: Sequence[Commit], by: str) -> None:
        now = self._clock()
        arrival = None
        for commit in commits:
            if commit.timestamp is None:
                continue
            lag = self._skew.since(commit.timestamp, now)
            self._metrics.event_lag.observe(lag)
            self._status.lags.append(lag)
            arrival = _Arrival.of(commit, by, lag, now.wall)
            self._untold.append(arrival)
        if arrival is not None:
            trace = str(arrival.trace) if arrival.trace else None
            self._status.last_applied = Applied(arrival.event_type, arrival.revision, arrival.lag, trace)

    @staticmethod
    def _record(spans: Spans, arrival: _Arrival) -> None:
        spans.record(
            "preview.apply",
            arrival.received_at or arrival.at,
            arrival.at,
            {
                "preview.event": arrival.event_type,
                "preview.revision": arrival.revision,
                "preview.files": arrival.files,
                "preview.by": arrival.by,
                "preview.lag_seconds": arrival.lag,
            },
            arrival.trace,
        )
