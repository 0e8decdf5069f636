"""Reads each signal of the link into a commit, or into a request to catch up, and gives it to the follower.

A signal that cannot be read is one need more: the database tells what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from msgspec import structs

from agent.core.errors import MalformedMessage, PathRefused
from agent.core.messages import SnapshotOffer, read_event
from agent.core.model import Change, Commit, read_traceparent
from agent.core.reconcile import Reason
from agent.core.scheduler import Follower
from agent.link.source import Received, Resync, Signal
from agent.sync.catchup import CatchUp
from agent.telemetry.logging import get_logger, traced
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import OwnedProblems, SyncStatus

log = get_logger("sync")


@dataclass(slots=True, kw_only=True)
class Intake:
    """Takes signals for the loop.

    Attributes:
        patched: makes what came as splices whole.
        clock: gives monotonic seconds.
        wake: has the loop see what is to be asked.
        missed_before: the latest catch-up found commits whose events never came; no longer once an event is taken.
    """

    follower: Follower
    catch_up: CatchUp
    problems: OwnedProblems
    metrics: Metrics
    status: SyncStatus
    patched: Callable[[tuple[Change, ...]], tuple[Change, ...]]
    clock: Callable[[], float]
    wake: Callable[[], None]
    missed_before: bool = False

    def take(self, signal: Signal) -> None:
        """Take one signal. A bug in reading it is contained, and asked about."""
        now = self.clock()
        if isinstance(signal, Resync):
            self._need(Reason.OVERFLOW if signal.reason == "overflow" else Reason.JOIN, now)
            return
        self.missed_before = False
        self.status.last_event_at = signal.at
        with (
            self.problems.problems.errors.contained(
                "event", lambda: self._need(Reason.DOORBELL, now), event_type=signal.event
            ),
            traced(read_traceparent(signal.payload.get("traceparent"))),
        ):
            self._receive(signal, now)

    def _need(self, reason: Reason, now: float) -> None:
        self.follower.need(reason, now)
        self.wake()

    def _receive(self, signal: Received, now: float) -> None:
        commit = self._read(signal)
        if isinstance(commit, SnapshotOffer):
            self.catch_up.offered = commit.snapshot_url
            self._need(Reason.SNAPSHOT_READY, now)
        elif commit is not None:
            for problem in commit.problems:
                self.problems.add(problem)
            self.follower.receive(structs.replace(commit, changes=self.patched(commit.changes)), now)

    def _read(self, received: Received) -> Commit | SnapshotOffer | None:
        try:
            read = read_event(received.event, received.payload, received.at)
        except (MalformedMessage, PathRefused) as error:
            log.warning("event.malformed", event_type=received.event, why=str(error))
            self.metrics.events.labels(received.event, "malformed").inc()
            self._need(Reason.DOORBELL, self.clock())
            return None
        if read is None:
            self.metrics.events.labels("other", "unknown").inc()
        return read
