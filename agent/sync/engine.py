"""The loop: hydrate → stream → plan → disk → ledger. The only place where the tree changes.

Everything that is decided is decided in `core.reconcile` and `core.scheduler`; everything here happens in one
thread and between two awaits, so the tree, the disk and the ledger move together.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal

from msgspec import structs

from agent.core.clock_skew import ClockSkew
from agent.core.errors import (
    AgentError,
    CredentialRejected,
    MalformedMessage,
    PathRefused,
    RootUnusable,
    SessionGone,
    Superseded,
    Unavailable,
)
from agent.core.messages import Changes, Current, Head, read_event
from agent.core.model import (
    Commit,
    Cursor,
    Problem,
    RelPath,
    SnapshotReady,
    Tree,
    read_traceparent,
)
from agent.core.reconcile import Outcome, Plan, Reason, brake, catch_up, reconcile
from agent.core.scheduler import Follower, Request
from agent.fs.inspect import Drift
from agent.link.source import EventSource, Received, Resync, Signal
from agent.snapshot.download import StagedSnapshot
from agent.sync.catchup import BACKOFF, Answer, CatchUp
from agent.sync.drift import DriftWatch, Observed
from agent.sync.latency import LagMeter
from agent.sync.ledger import LedgerState
from agent.sync.workspace import Workspace
from agent.telemetry.logging import get_logger, traced
from agent.telemetry.metrics import Metrics
from agent.telemetry.spans import SpanSink
from agent.telemetry.status import Problems, SyncPhase, SyncStatus

log = get_logger("sync")

REFUSED_RETRY = 60.0
"""Seconds between questions once the token is refused for good: somebody may still mend it."""

UNFIT_RETRY = 1.0
"""Seconds at least before what could not be used is asked for again: the same answer would come at once."""

TURN = 64
"""Signals planned together when they arrive together, after which other tasks get their turn: a flood costs fewer
transactions of the ledger, and cannot starve the heartbeat."""

RECORD_WITHIN = 0.05
"""Seconds for which the ledger and the log may lag behind the disk: a kill in between costs a look at those files and
their lines, and the person waiting for a save does not wait for its bookkeeping."""

LINK_NEEDS = frozenset({Reason.JOIN, Reason.OVERFLOW})
"""While one of these is wanted the link has an unanswered `Resync`, and is not live."""

RESYNC_REASONS = {"overflow": Reason.OVERFLOW}


@dataclass(slots=True)
class Parts:
    """What the loop stands on. `on_tree`: called with the paths that changed, after they changed."""

    follower: Follower
    workspace: Workspace
    source: EventSource
    catch_up: CatchUp
    problems: Problems
    metrics: Metrics
    status: SyncStatus
    on_tree: Callable[[Collection[RelPath]], None]
    on_hydrated: Callable[[], None]
    skew: ClockSkew = field(default_factory=ClockSkew)
    spans: SpanSink | None = None


class Sync:
    """See the module. `run` ends only by cancellation or by an error that ends the agent."""

    def __init__(
        self,
        parts: Parts,
        *,
        snapshot_url: str | None,
        drift_policy: Literal["report", "restore", "keep", "off"] = "report",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`drift_policy`: as the setting; `off` where nothing else can touch the directory and nobody looks at it."""
        self._p = parts
        self._follower = parts.follower
        self._snapshot_url = snapshot_url
        self._clock = clock
        self._drift_policy = drift_policy
        self._drift = DriftWatch(
            parts.workspace.disk, lambda: parts.workspace.claims(self.tree), self._observe_drift
        )
        self._lag = LagMeter(parts.metrics, parts.status, parts.skew, parts.spans)
        self._wake = asyncio.Event()
        self._asking: asyncio.Task[Answer] | None = None
        self._request: Request | None = None
        self._attempt = 0
        self._doubted: str | None = None
        self._silent = False
        self._asleep_until: float | None = None
        self._recording: asyncio.TimerHandle | None = None

    # --- what others see and say

    @property
    def tree(self) -> Tree:
        """What is true on disk."""
        return self._follower.tree

    @property
    def head_revision(self) -> int:
        """The highest revision heard of."""
        return self._follower.head_revision

    @property
    def queue_depth(self) -> int:
        """Commits received and not applied."""
        return len(self._follower.waiting)

    @property
    def pending_paths(self) -> frozenset[RelPath]:
        """Paths whose content a catch-up has to bring."""
        return self._follower.pending_paths

    @property
    def pending(self) -> tuple[Reason, ...]:
        """Why a catch-up is wanted."""
        return self._follower.needs

    @property
    def watch_renewals(self) -> int:
        """How often the watch over the project had to be made again."""
        return self._drift.renewals

    def hear(self, head: Head) -> None:
        """The heartbeat's answer: where the database is."""
        if self._p.status.phase in (SyncPhase.FOLLOWING, SyncPhase.HALTED):
            self._follower.compare(head, self._clock())
            self._wake.set()

    def hurry(self) -> None:
        """The orchestrator asks for a catch-up now."""
        self._follower.need(Reason.HEAD, self._clock())
        self._wake.set()

    async def run(self) -> None:
        """Make the tree whole, then keep it equal to the database's."""
        await self._begin()
        self._p.status.phase = SyncPhase.FOLLOWING
        self._p.status.hydrated_at = time.time()
        self._p.on_hydrated()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(), name="sync-receive")
                tasks.create_task(self._keep_time(), name="sync-clock")
                if self._drift_policy != "off":
                    tasks.create_task(self._drift.run(), name="sync-drift")
        finally:
            await self._end()

    async def _end(self) -> None:
        """The batch in hand is finished by construction: nothing here can be interrupted between two awaits."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        if self._recording is not None:
            self._recording.cancel()
        self._p.workspace.close(self.tree.cursor)
        self._lag.tell()

    # --- the first tree

    async def _begin(self) -> None:
        workspace = self._p.workspace
        loaded = workspace.open()
        if loaded is not None:
            await self._resume(loaded)
            return
        self._p.status.mode = "rebuild" if workspace.holds_files() else "fresh"
        self._p.status.phase = SyncPhase.HYDRATING
        started = self._clock()
        staged = await self._p.catch_up.first(self._snapshot_url)
        if not self._apply(self._plan_of(staged)):
            problems = "; ".join(problem.detail for problem in self._p.problems.open.values())
            raise RootUnusable(f"the first snapshot could not be put in place: {problems}")
        workspace.record_whole(self.tree)
        self._hydrated(staged, self._clock() - started)

    async def _resume(self, loaded: LedgerState) -> None:
        """Go on from where an earlier life was: what the ledger says, corrected by what the disk holds."""
        self._p.status.mode = "resume"
        tree, drifts = await self._p.workspace.audit(loaded)
        self._follower.adopt(tree)
        self._follower.doubt((drift.path for drift in drifts), self._clock())
        self._follower.need(Reason.JOIN, self._clock())
        log.info(
            "hydrate.resumed",
            revision=tree.cursor.revision,
            files=len(self._p.workspace.stats),
            drifted=len(drifts),
        )

    def _hydrated(self, staged: StagedSnapshot, seconds: float) -> None:
        self._p.metrics.hydrate.observe(seconds)
        self._built(staged)
        if self._p.spans is not None:
            now = time.time()
            self._p.spans.record("preview.hydrate", now - seconds, now, {"preview.files": len(staged.staged)})
        log.info(
            "hydrate.done",
            mode=self._p.status.mode,
            revision=self.tree.cursor.revision,
            files=len(staged.staged),
            bytes=staged.size,
            seconds=round(seconds, 3),
        )

    def _built(self, staged: StagedSnapshot) -> None:
        if staged.manifest.build_seconds is not None:
            self._p.metrics.snapshot_build.observe(staged.manifest.build_seconds)

    def _plan_of(self, staged: StagedSnapshot) -> Plan:
        plan = reconcile(self.tree, staged.manifest, staged.staged)
        if staged.plain:
            return structs.replace(plan, tree=structs.replace(plan.tree, cursor=Cursor()))
        return plan

    # --- the loop

    async def _receive(self) -> None:
        source = self._p.source
        while True:
            self._take(await source.receive())
            for _ in range(TURN - 1):
                if (signal := source.receive_now()) is None:
                    break
                self._take(signal)
            else:
                await asyncio.sleep(0)
            self._turn()

    async def _keep_time(self) -> None:
        while True:
            self._wake.clear()
            self._turn()
            deadline = self._asleep_until = self._follower.next_deadline()
            wait = None if deadline is None else max(0.0, deadline - self._clock()) + 0.001
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    def _take(self, signal: Signal) -> None:
        now = self._clock()
        if isinstance(signal, Resync):
            self._follower.need(RESYNC_REASONS.get(signal.reason, Reason.JOIN), now)
            self._wake.set()
            return
        self._silent = False
        self._p.status.last_event_at = signal.at
        with traced(read_traceparent(signal.payload.get("traceparent"))):
            self._receive_event(signal, now)

    def _receive_event(self, signal: Received, now: float) -> None:
        commit = self._read(signal)
        if isinstance(commit, SnapshotReady):
            self._p.catch_up.offered = commit.snapshot_url
            self._follower.need(Reason.SNAPSHOT_READY, now)
            self._wake.set()
        elif commit is not None:
            for problem in commit.problems:
                self._p.problems.add(problem)
            self._follower.receive(commit, now)

    def _read(self, received: Received) -> Commit | SnapshotReady | None:
        try:
            read = read_event(received.event, received.payload, received.at)
        except (MalformedMessage, PathRefused) as error:
            log.warning("event.malformed", event_type=received.event, why=str(error))
            self._p.metrics.events.labels(received.event, "malformed").inc()
            self._follower.need(Reason.DOORBELL, self._clock())
            self._wake.set()
            return None
        if read is None:
            self._p.metrics.events.labels("other", "unknown").inc()
        return read

    def _turn(self) -> None:
        """Do all that can be done now. Synchronous: nothing else sees the tree half-moved."""
        if self._p.status.phase is SyncPhase.FOLLOWING:
            while (batch := self._follower.ready(self._clock())) is not None:
                coalesced = sum(len(commit.changes) for commit, _ in batch.steps) - len(batch.operations)
                with traced(batch.trace):
                    applied = self._apply(batch.plan)
                self._lag.observe(batch.steps, applied=applied)
                if len(batch.steps) > 1 and coalesced > 0:
                    self._p.metrics.coalesced.inc(coalesced)
        if self._asking is not None and self._asking.done():
            self._land(self._asking)
        if self._asking is None:
            request = self._follower.request(self._clock())
            if request is not None:
                self._ask(request)
        deadline = self._follower.next_deadline()
        if deadline is not None and (self._asleep_until is None or deadline < self._asleep_until):
            self._wake.set()

    def _apply(self, plan: Plan) -> bool:
        """Make the disk and the tree follow a plan. False: the environment failed, all was undone."""
        started = self._clock()
        for problem in plan.problems:
            self._p.problems.add(problem)
        applied = self._p.workspace.apply(plan.operations, self.tree.entries)
        self._follower.settle(plan, self._clock(), failed=applied.failed, undone=applied.undone)
        if applied.undone and applied.done:
            # Not even the undoing was possible everywhere: the tree says what stands there, not what should.
            stuck = {each.path: each.entry for each in plan.operations if each.path in applied.done}
            self._follower.adopt(structs.replace(self.tree, entries=self.tree.entries.update(stuck)))
        if self._recording is None:
            self._recording = asyncio.get_running_loop().call_later(RECORD_WITHIN, self._record)
        if applied.done:
            self._p.metrics.apply.observe(self._clock() - started)
            self._p.on_tree(applied.done)
        return not applied.undone

    def _record(self) -> None:
        self._recording = None
        self._p.workspace.record(self.tree.cursor)
        self._lag.tell()

    # --- drift

    def _observe_drift(self, observed: Observed) -> None:
        """Files that something else changed, by DRIFT_POLICY; the database's next word on a path wins in any case."""
        self._p.workspace.looked(observed)
        self._p.metrics.drift_files.set(len(self._drift.open))
        for path in observed.settled:
            self._p.problems.clear("drift", path)
        if self._drift_policy == "report":
            for drift in observed.drifts:
                self._p.problems.add(drift.problem())
        elif self._drift_policy == "restore" and observed.drifts:
            self._restore(observed.drifts)

    def _restore(self, drifts: Sequence[Drift]) -> None:
        """Take what stands there for unconfirmed, and ask what should."""
        paths = [drift.path for drift in drifts]
        log.warning("drift.restoring", files=len(paths), file_path=paths[0])
        self._follower.adopt(self._p.workspace.unconfirmed(self.tree, drifts))
        self._follower.doubt(paths, self._clock())
        self._wake.set()

    # --- catch-up

    def _ask(self, request: Request) -> None:
        log.info(
            "sync.asked", reason=request.reason.value, revision=request.revision, paths=len(request.paths)
        )
        self._p.metrics.resyncs.labels(request.reason.value).inc()
        if not self._p.catch_up.can_ask:
            # Nothing can be asked; what is missing comes with the next snapshot or event.
            self._follower.answered(self._clock())
            self._p.source.caught_up()
            return
        self._request = request
        self._asking = asyncio.create_task(self._p.catch_up.ask(request), name="catch-up")
        self._asking.add_done_callback(lambda _: self._wake.set())

    def _land(self, asking: asyncio.Task[Answer]) -> None:
        """Take an answer into the tree, or plan the next question."""
        now = self._clock()
        try:
            answer = asking.result()
        except AgentError as error:
            self._asking = None
            self._failed(error, now)
            return
        plan = self._plan_for(answer)
        if plan is not None:
            free_at = self._follower.free_at(operation.path for operation in plan.operations)
            if free_at > now:
                asyncio.get_running_loop().call_later(free_at - now, self._wake.set)
                return
            if not self._accept(answer, plan, now):
                return
        lost = self._request is not None and self._request.reason is Reason.HEAD and plan is not None
        self._asking = self._request = None
        self._attempt = 0
        self._release()
        self._lag.caught_up(self.tree.cursor)
        self._lag.tell()
        self._p.status.last_catch_up_at = time.time()
        self._follower.answered(now, _revision_of(answer))
        if LINK_NEEDS.isdisjoint(self._follower.needs):
            self._p.source.caught_up()
        if lost:
            # One event may be lost on a good link; two heartbeats that found commits with no event between did not
            # meet a good link. A new socket costs little.
            if self._silent:
                self._p.source.suspect("commits are found by the heartbeat alone")
            self._silent = True
        log.info(
            "sync.caught_up",
            revision=self.tree.cursor.revision,
            operations=len(plan.operations) if plan else 0,
            kind=type(answer).__name__.lower(),
        )

    def _plan_for(self, answer: Answer) -> Plan | None:
        if isinstance(answer, Current):
            return None
        if isinstance(answer, Changes):
            return catch_up(self.tree, answer)
        return self._plan_of(answer)

    def _accept(self, answer: Answer, plan: Plan, now: float) -> bool:
        """Apply an answer. False: it was not possible now, and the question is due again."""
        if plan.gap is not None and plan.outcome is not Outcome.APPLIED:
            self._ask_again(
                "sync.retry", f"the answer did not fit: {plan.gap.reason.value}", now, UNFIT_RETRY
            )
            return False
        if isinstance(answer, StagedSnapshot):
            problem = brake(self.tree, plan)
            wanted = answer.manifest.hash()
            if problem is not None and self._doubted != wanted:
                self._halt(problem, wanted)
                self._ask_again("sync.retry", problem.detail, now, UNFIT_RETRY)
                return False
            self._release()
        if not self._apply(plan):
            self._ask_again("sync.retry", "the disk could not take the answer", now, UNFIT_RETRY)
            return False
        if isinstance(answer, StagedSnapshot):
            self._p.workspace.record_whole(self.tree)
            self._built(answer)
        return True

    def _halt(self, problem: Problem, wanted: str) -> None:
        """The brake: nothing is applied until another build of the snapshot says the same, or something else."""
        self._doubted = wanted
        self._p.status.phase = SyncPhase.HALTED
        self._p.problems.add(problem)
        self._p.catch_up.distrust()

    def _release(self) -> None:
        self._doubted = None
        self._p.problems.clear_kinds("mass_delete")
        self._p.status.phase = SyncPhase.FOLLOWING

    def _failed(self, error: AgentError, now: float) -> None:
        """There is no answer."""
        if isinstance(error, (SessionGone, Superseded)):
            raise error
        least = 0.0
        if isinstance(error, CredentialRejected):
            self._p.problems.add(Problem("token_refused", str(error)))
            least = REFUSED_RETRY
        elif isinstance(error, Unavailable):
            self._p.problems.add(Problem("session_api_unreachable", str(error)))
        self._ask_again("sync.failed", str(error), now, least, error)

    def _ask_again(
        self, event: str, why: str, now: float, least: float, error: AgentError | None = None
    ) -> None:
        """What was asked for is due again, in `least` seconds or later."""
        self._asking = None
        self._attempt += 1
        wait = max(least, BACKOFF.delay(self._attempt, error))
        log.warning(event, why=why, attempt=self._attempt, wait=round(wait, 2))
        self._p.workspace.disk.clear_staging()
        self._follower.failed(now, wait)


def _revision_of(answer: Answer) -> int | None:
    if isinstance(answer, StagedSnapshot):
        return None if answer.plain else answer.manifest.revision
    return answer.revision
