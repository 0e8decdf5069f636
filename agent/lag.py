"""How long each save took from its commit to its rename: measured, logged, and put into its writer's trace.

An event that could not be applied when it came, because its bytes had to be fetched or the disk was full, is measured
when a catch-up has brought it: the slow ones are those that a figure must not leave out.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from agent.model import Commit, Cursor
from agent.plan import Outcome
from agent.skew import ClockSkew, Moment
from agent.spans import SpanSink
from agent.status import Applied, SyncStatus
from agent.telemetry import Metrics, get_logger

log = get_logger("sync")

MOST_LATE: Final = 1_000
"""Commits remembered until they are caught up with; as many as may wait to be applied."""

LATE: Final = frozenset({Outcome.APPLIED, Outcome.WAITING})
"""What a catch-up brings when the event itself did not: bytes by reference, or a batch that was undone."""


class LagMeter:
    """Hears what became of every event. `clock` gives now on both clocks."""

    def __init__(
        self,
        metrics: Metrics,
        status: SyncStatus,
        skew: ClockSkew,
        spans: SpanSink | None = None,
        *,
        clock: Callable[[], Moment] = lambda: Moment(time.time(), time.monotonic()),
    ) -> None:
        self._metrics = metrics
        self._status = status
        self._skew = skew
        self._spans = spans
        self._clock = clock
        self._late: dict[int, Commit] = {}

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

    def _arrived(self, commits: Sequence[Commit], by: str) -> None:
        now = self._clock()
        line = log.bind()
        last: tuple[Commit, float] | None = None
        for commit in commits:
            if commit.timestamp is None:
                continue
            lag = self._skew.since(commit.timestamp, now)
            self._metrics.event_lag.observe(lag)
            self._status.lags.append(lag)
            last = commit, lag
            line.info(
                "event.applied",
                event_type=commit.event,
                revision=commit.revision,
                file_path=commit.changes[0].path if len(commit.changes) == 1 else None,
                files=len(commit.changes),
                by=by,
                lag_ms=round(lag * 1000, 1),
                **({"trace_id": commit.trace.trace_id} if commit.trace else {}),
            )
            if self._spans is not None:
                self._record(self._spans, commit, now, lag, by)
        if last is not None:
            commit, lag = last
            trace = str(commit.trace) if commit.trace else None
            self._status.last_applied = Applied(commit.event, commit.revision, lag, trace)

    def _record(self, spans: SpanSink, commit: Commit, now: Moment, lag: float, by: str) -> None:
        spans.record(
            "preview.apply",
            commit.received_at or now.wall,
            now.wall,
            {
                "preview.event": commit.event,
                "preview.revision": commit.revision,
                "preview.files": len(commit.changes),
                "preview.by": by,
                "preview.lag_seconds": lag,
            },
            commit.trace,
        )
