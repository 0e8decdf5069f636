"""From commit to rename: measured whichever way the file came, logged with its trace, kept for status."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import structlog
from msgspec import structs
from structlog.testing import capture_logs

from agent.core.clock_skew import ClockSkew, Moment
from agent.core.model import Change, Commit, Cursor, RelPath, TraceParent, digest_of
from agent.core.reconcile import Outcome
from agent.telemetry.latency import LATE, MOST_LATE, LagMeter
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import SyncStatus

NOW = 1_800_000_000.0
TRACE = TraceParent("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "01")
COMMIT = Commit(
    "file:update",
    (Change(RelPath("a"), digest_of(b"x"), 1, b"x"),),
    revision=7,
    epoch="e",
    timestamp=NOW - 0.2,
    trace=TRACE,
    received_at=NOW - 0.1,
)


@dataclass
class Sink:
    """Keeps the spans it is given."""

    spans: list[tuple[Any, ...]] = field(default_factory=list)

    def record(self, *span: Any) -> None:
        self.spans.append(span)


@dataclass
class Bench:
    """A meter and everything it writes to."""

    metrics: Metrics = field(default_factory=Metrics)
    status: SyncStatus = field(default_factory=SyncStatus)
    skew: ClockSkew = field(default_factory=ClockSkew)
    sink: Sink = field(default_factory=Sink)
    now: Moment = field(default_factory=lambda: Moment(NOW, 10.0))

    def __post_init__(self) -> None:
        self.meter = LagMeter(self.metrics, self.status, self.skew, self.sink, clock=lambda: self.now)

    @property
    def measured(self) -> list[float]:
        return list(self.status.lags)

    def count(self, outcome: str) -> float | None:
        labels = {"event": "file:update", "outcome": outcome}
        return self.metrics.registry.get_sample_value("preview_agent_events_total", labels)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_applied_event_is_measured_told_and_put_into_its_trace(bench: Bench) -> None:
    with capture_logs() as lines:
        bench.meter.observe([(COMMIT, Outcome.APPLIED)], applied=True)
        bench.now = Moment(NOW + 0.05, 10.05)
        assert not lines
        assert not bench.sink.spans
        bench.meter.tell()
        bench.meter.tell()
    assert bench.measured == [pytest.approx(0.2, abs=1e-6)]
    assert bench.count("applied") == 1
    assert bench.metrics.registry.get_sample_value("preview_agent_event_lag_seconds_count") == 1
    (line,) = lines
    assert line["event"] == "event.applied"
    assert (line["revision"], line["file_path"], line["by"], line["lag_ms"]) == (7, "a", "event", 200.0)
    assert line["trace_id"] == TRACE.trace_id
    assert bench.status.last_applied is not None
    assert bench.status.last_applied.traceparent == str(TRACE)
    ((name, start, end, attributes, parent),) = bench.sink.spans
    assert (name, start, end, parent) == ("preview.apply", NOW - 0.1, NOW, TRACE)
    assert attributes["preview.lag_seconds"] == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("outcome", sorted(set(Outcome) - {Outcome.APPLIED}))
def test_what_was_not_applied_is_not_measured(bench: Bench, outcome: Outcome) -> None:
    bench.meter.observe([(COMMIT, outcome)], applied=True)
    assert bench.measured == []
    assert bench.count(outcome.value) == 1


@pytest.mark.parametrize(
    ("outcome", "applied"), [(Outcome.WAITING, True), (Outcome.APPLIED, False)], ids=["reference", "undone"]
)
def test_a_late_one_is_measured_when_the_catch_up_has_brought_it(
    bench: Bench, outcome: Outcome, applied: bool
) -> None:
    bench.meter.observe([(COMMIT, outcome)], applied=applied)
    bench.now = Moment(NOW + 3, 13.0)
    bench.meter.caught_up(Cursor("e", 6))
    assert bench.measured == []
    with capture_logs() as lines:
        bench.meter.caught_up(Cursor("e", 7))
        bench.meter.tell()
    assert bench.measured == [pytest.approx(3.2, abs=1e-6)]
    assert lines[0]["by"] == "sync"
    bench.meter.caught_up(Cursor("e", 9))
    assert len(bench.measured) == 1
    assert outcome in LATE


def test_another_history_and_a_second_delivery_are_not_measured_twice(bench: Bench) -> None:
    bench.meter.observe([(COMMIT, Outcome.WAITING)], applied=True)
    bench.meter.caught_up(Cursor("another", 50))
    bench.meter.caught_up(Cursor("e", 50))
    assert bench.measured == []
    bench.meter.observe([(COMMIT, Outcome.APPLIED)], applied=False)
    bench.meter.observe([(COMMIT, Outcome.APPLIED)], applied=True)
    bench.meter.caught_up(Cursor("e", 50))
    assert len(bench.measured) == 1


def test_what_is_remembered_is_bounded(bench: Bench) -> None:
    for revision in range(MOST_LATE + 50):
        bench.meter.observe([(structs.replace(COMMIT, revision=revision), Outcome.WAITING)], applied=True)
    bench.meter.caught_up(Cursor("e", 10**6))
    assert bench.metrics.registry.get_sample_value("preview_agent_event_lag_seconds_count") == MOST_LATE


def test_a_clock_that_is_behind_does_not_make_a_lag_of_minutes(bench: Bench) -> None:
    bench.skew.answered(int(NOW) - 300, bench.now, bench.now)  # theirs is five minutes behind
    bench.meter.observe([(structs.replace(COMMIT, timestamp=NOW - 300.2), Outcome.APPLIED)], applied=True)
    known = bench.skew.bounds(bench.now)
    assert known is not None
    assert bench.measured[0] == pytest.approx(0.2, abs=known.uncertainty + 1e-6)


def test_logs_meanwhile_carry_the_trace() -> None:
    from agent.telemetry.logging import traced

    structlog.contextvars.clear_contextvars()
    with traced(TRACE):
        assert structlog.contextvars.get_contextvars() == {"trace_id": TRACE.trace_id}
    with traced(None):
        assert structlog.contextvars.get_contextvars() == {}
