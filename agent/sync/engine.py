"""The sync loop: hydrate, follow the events, catch up. The only place where the tree changes.

What an event or an answer means is decided in `core.reconcile`, and when it is acted on in `core.scheduler`. Everything
here runs in one thread and between two awaits, so tree, disk and ledger move together.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from functools import partial

from msgspec import structs

from agent.core.clock_skew import ClockSkew
from agent.core.errors import AgentError, MalformedMessage, SessionGone, Superseded, TooLarge
from agent.core.messages import Changes, Current, Head
from agent.core.model import Cursor, Entry, Problem, RelPath, Tree
from agent.core.reconcile import Gap, Outcome, Plan, Reason, catch_up, reconcile
from agent.core.scheduler import Follower, Request
from agent.fs.inspect import Drift, FileStat
from agent.link.source import EventSource
from agent.retry import Backoff
from agent.snapshot.download import StagedSnapshot
from agent.snapshot.unpack import StagingFailed
from agent.sync import obstacles
from agent.sync.catchup import Answer, CatchUp, revision_of
from agent.sync.drift import DriftWatch, Observed
from agent.sync.drift_policy import DriftPolicy, Policy
from agent.sync.hydrate import Hydration, observe_build
from agent.sync.intake import Intake
from agent.sync.preview import Preview, Unseen, changes_of, files_of
from agent.sync.recording import Recording
from agent.sync.workspace import ApplyResult, Workspace
from agent.telemetry.latency import LagMeter
from agent.telemetry.logging import get_logger, traced
from agent.telemetry.metrics import Metrics
from agent.telemetry.spans import Spans
from agent.telemetry.status import Problems, SyncPhase, SyncStatus
from agent.write_back.flow import WriteBack

log = get_logger("sync")

TURN = 64
"""Signals planned together when they arrive together, after which other tasks get their turn: a flood costs fewer
transactions of the ledger, and cannot starve the heartbeat."""

FAILED_TURN = Backoff(first=0.1, most=15.0, least=0.05)
"""After a turn of the loop that a bug has ended."""

LINK_NEEDS = frozenset({Reason.JOIN, Reason.OVERFLOW})
"""While one of these is wanted the link has an unanswered `Resync`, and is not live."""


class Sync:
    """The loop over the parts it is given. `run` ends only by cancellation or by an error that ends the agent."""

    def __init__(
        self,
        follower: Follower,
        workspace: Workspace,
        source: EventSource,
        catch_up: CatchUp,
        problems: Problems,
        metrics: Metrics,
        status: SyncStatus,
        *,
        snapshot_url: str | None,
        on_tree: Callable[[Collection[RelPath]], None],
        on_hydrated: Callable[[], None],
        preview: Preview | None = None,
        drift_policy: Policy = "report",
        skew: ClockSkew | None = None,
        spans: Spans | None = None,
        write_back: WriteBack | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Put the loop on its parts; nothing runs yet.

        Args:
            snapshot_url: Where the first tree is; None: the session API is asked.
            on_tree: Called with the paths that changed, after they changed.
            on_hydrated: Called once, when there is a whole tree.
            preview: Who shows the tree; None: nobody.
            drift_policy: As the setting; `off` where nothing else can touch the directory.
            skew: How far the database's clock is from ours; None: not at all.
            spans: Where a save's way goes to; None: nowhere.
            write_back: Asked before a file is replaced, and for changes that are a tool's to make; None: none are.
            clock: Gives monotonic seconds.
        """
        # What it stands on.
        self._follower = follower
        self._workspace = workspace
        self._source = source
        self._catch_up = catch_up
        self._problems = problems.owned_by("sync.engine")
        self._metrics = metrics
        self._status = status
        self._spans = spans
        self._on_tree = on_tree
        self._on_hydrated = on_hydrated
        self._preview = preview or Unseen()
        self._snapshot_url = snapshot_url
        self._drift_policy = drift_policy
        self._write_back = write_back
        self._clock = clock
        self._drift = DriftWatch(workspace.disk, lambda: workspace.expected(self.tree), self._observe_drift)
        self.patches = follower.patches
        self._patched = partial(follower.patched, read=workspace.disk.content)
        self._lag = LagMeter(metrics, status, skew or ClockSkew(), spans)

        self._errors = problems.errors
        self._recording = Recording(workspace, lambda: self.tree, self._errors, self._lag.tell)
        self._intake = Intake(
            follower=follower, catch_up=catch_up, problems=self._problems, metrics=metrics, status=status,
            patched=self._patched, clock=clock, wake=lambda: self._wake.set(),
        )  # fmt: skip
        self._drifting = DriftPolicy(
            policy=drift_policy, follower=follower, workspace=workspace, problems=self._problems,
            metrics=metrics, drifted=lambda: self.drifted, exempt=self._exempt,
            strangers=lambda: self._drift.strangers, clock=clock, wake=lambda: self._wake.set(),
        )  # fmt: skip
        self._hydration = Hydration(
            follower=follower, workspace=workspace, catch_up=catch_up, drift=self._drift, status=status,
            metrics=metrics, spans=spans, preview=self._preview, plan=self._plan_of_snapshot,
            settle=self._settle, drift_policy=drift_policy, exempt=self._exempt, clock=clock,
        )  # fmt: skip

        # Waking: `_keep_time` sleeps until `_asleep_until`, or until `_wake` is set.
        self._wake = asyncio.Event()
        self._asleep_until: float | None = None
        self._turn_failures = 0
        """In a row."""

        # The catch-up under way.
        self._asking: asyncio.Task[Answer] | None = None
        self._request: Request | None = None

    # --- what others read, and may ask for

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
    def drifted(self) -> Collection[RelPath]:
        """The files that another process changed and that are not right again."""
        return [path for path, drift in self._drift.open.items() if not self._exempt(drift)]

    @property
    def watch_renewals(self) -> int:
        """How often the watch over the project had to be made again."""
        return self._drift.renewals

    @property
    def waiting_paths(self) -> Collection[RelPath]:
        """Paths that the disk could not hold and that are tried again."""
        return self._follower.unusable

    def confirm(
        self, moved: Mapping[RelPath, tuple[Entry, FileStat | None]], revision: int | None = None
    ) -> None:
        """The database has what stands at these paths, as these entries; with the stat of each file that was read.

        `revision`: of the commit that wrote just these. It is applied: its event is a duplicate.
        """
        cursor = self.tree.cursor if revision is None else self.tree.cursor.with_revision(revision)
        entries = {path: entry for path, (entry, _) in moved.items()}
        self._preview.commit(cursor.revision, files_of(entries, self.tree.entries))
        self._follower.adopt(Tree(cursor, self.tree.entries.update(entries)))
        self._workspace.confirm(moved)
        self._recording.soon()
        self._wake.set()

    def _exempt(self, drift: Drift) -> bool:
        return self._write_back is not None and self._write_back.exempt(drift)

    def hear(self, head: Head, asked_at: Cursor | None = None) -> None:
        """The heartbeat's answer: where the database is. `asked_at`: our cursor when it was asked for."""
        if self._status.phase in (SyncPhase.FOLLOWING, SyncPhase.HALTED):
            self._follower.compare(head, self._clock(), asked_at)
            self._show_behind()
            self._wake.set()

    def _show_behind(self) -> None:
        behind, here = self._follower.behind, self.tree.cursor.revision
        if behind is None:
            self._problems.clear("head_behind")
        else:
            detail = f"the database stands at revision {behind}, and {here} is applied: it has lost commits"
            self._problems.add(Problem("head_behind", detail))

    def hurry(self) -> None:
        """The orchestrator asks for a catch-up now."""
        self._follower.need(Reason.HEAD, self._clock())
        self._wake.set()

    async def run(self) -> None:
        """Make the tree whole, then keep it equal to the database's."""
        await self._hydration.run(self._snapshot_url)
        self._recording.soon()
        self._status.phase = SyncPhase.FOLLOWING
        self._on_hydrated()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._receive(), name="sync-receive")
                tasks.create_task(self._keep_time(), name="sync-clock")
                tasks.create_task(
                    self._errors.keep_running("sync", self._watch_obstacles), name="sync-obstacles"
                )
                if self._drift_policy != "off":
                    tasks.create_task(self._errors.keep_running("drift", self._drift.run), name="sync-drift")
        finally:
            await self._end()

    async def _end(self) -> None:
        """Record what is on disk. A plan being applied is finished by then: applying never awaits."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)
        self._recording.cancel()
        self._workspace.close(self.tree.cursor)
        self._lag.tell()

    def _plan_of_snapshot(self, staged: StagedSnapshot) -> Plan:
        forgotten = staged.ahead or self._follower.holds_forgotten
        plan = reconcile(self.tree, staged.manifest, staged.staged, forgotten=forgotten)
        if staged.plain:
            return structs.replace(plan, tree=structs.replace(plan.tree, cursor=Cursor()))
        return plan

    # --- the loop

    async def _receive(self) -> None:
        source = self._source
        while True:
            self._intake.take(await source.receive())
            for _ in range(TURN - 1):
                if (signal := source.receive_now()) is None:
                    break
                self._intake.take(signal)
            else:
                await asyncio.sleep(0)
            self._turn_contained()

    async def _keep_time(self) -> None:
        while True:
            self._wake.clear()
            self._turn_contained()
            if self._turn_failures:
                await asyncio.sleep(FAILED_TURN.delay(self._turn_failures))
            deadline = self._asleep_until = self._follower.next_deadline()
            wait = None if deadline is None else max(0.0, deadline - self._clock()) + 0.001
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._wake.wait()

    def _watch_obstacles(self) -> Coroutine[None, None, None]:
        return obstacles.watch(self._workspace.disk, lambda: self._follower.unusable, self._obstacles_moved)

    def _obstacles_moved(self, paths: Sequence[RelPath]) -> None:
        log.info("path.obstacle_moved", files=len(paths), file_path=paths[0])
        self._follower.obstacle_moved(paths, self._clock())
        self._wake.set()

    def _turn_contained(self) -> None:
        """Take a turn. A bug in it is counted, and what was in hand is asked for again, later each time."""

        def again() -> None:
            self._turn_failures += 1
            self._follower.need(Reason.DISK, self._clock() + FAILED_TURN.delay(self._turn_failures))

        failures = self._turn_failures
        with self._errors.contained("sync", again):
            self._turn()
        if failures == self._turn_failures:
            self._turn_failures = 0

    def _turn(self) -> None:
        """Do all that can be done now. Synchronous: nothing else sees the tree half-moved."""
        if self._status.phase is SyncPhase.FOLLOWING:
            while (ready := self._follower.ready(self._clock())) is not None:
                coalesced = sum(len(commit.changes) for commit, _ in ready.steps) - len(ready.plan.operations)
                with traced(ready.trace):
                    applied = self._apply(ready.plan)
                self._lag.observe(ready.steps, applied=applied)
                if len(ready.steps) > 1 and coalesced > 0:
                    self._metrics.coalesced.inc(coalesced)
        try:
            self._advance_catch_up()
        except AgentError:
            raise
        except Exception as error:
            self._errors.caught("catch-up", error)
            self._ask_again("sync.failed", "a bug, see the traceback", self._clock(), error)
        deadline = self._follower.next_deadline()
        if deadline is not None and (self._asleep_until is None or deadline < self._asleep_until):
            self._wake.set()

    def _advance_catch_up(self) -> None:
        if self._asking is not None and self._asking.done():
            self._finish_catch_up(self._asking)
        if self._asking is None:
            request = self._follower.request(self._clock())
            if request is not None:
                self._ask(request)
            elif self._catch_up.attempts and not self._follower.needs:
                self._catch_up.not_needed()
        self._preview.commit(self.tree.cursor.revision, {})

    def _apply(self, plan: Plan) -> bool:
        """Make the disk and the tree follow a plan. False: the environment failed, all was undone."""
        started, before, applied = self._clock(), self.tree.entries, ApplyResult(undone=True)
        if self._write_back is not None:
            with self._errors.contained("write-back"):
                plan = self._write_back.before(plan)
        self._preview.begin([each.path for each in plan.operations])
        with self._errors.contained("apply"):
            applied = self._workspace.apply(plan.operations, before)
        self._recording.soon()
        return self._settle(plan, applied, started)

    def _settle(self, plan: Plan, applied: ApplyResult, started: float) -> bool:
        """Have the tree say what is now true on disk, and tell of it. Returns False when all was undone."""
        before = self.tree.entries
        for problem in plan.problems:
            self._problems.add(problem)
        self._follower.settle(plan, self._clock(), failed=applied.failed, undone=applied.undone)
        self._workspace.confirmed(self._follower.unusable)
        if applied.undone and applied.done:
            # Not even the undoing was possible everywhere: the tree says what stands there, not what should.
            stuck = {each.path: each.entry for each in plan.operations if each.path in applied.done}
            self._follower.adopt(structs.replace(self.tree, entries=self.tree.entries.update(stuck)))
        if applied.undone:
            self._preview.undo()
        self._preview.commit(self.tree.cursor.revision, changes_of(plan.operations, applied.done, before))
        if applied.done:
            self._problems.clear("content_unavailable", "drift", "hash_mismatch", paths=applied.done)
            self._metrics.apply.observe(self._clock() - started)
            with self._errors.contained("dev-server"):
                self._on_tree(applied.done)
        return not applied.undone

    def _observe_drift(self, observed: Observed) -> None:
        with self._errors.contained("drift"):
            self._drifting.observe(observed)

    # --- catch-up

    def _ask(self, request: Request) -> None:
        log.info(
            "sync.asked", reason=request.reason.value, revision=request.revision, paths=len(request.paths)
        )
        self._metrics.resyncs.labels(request.reason.value).inc()
        if not self._catch_up.can_ask:
            # Nothing can be asked; what is missing comes with the next snapshot or event.
            self._follower.answered(self._clock(), by_nobody=True)
            self._source.caught_up()
            return
        self._request = request
        self._asking = asyncio.create_task(self._catch_up.ask(request, self._patched), name="catch-up")
        self._asking.add_done_callback(lambda _: self._wake.set())

    def _finish_catch_up(self, asking: asyncio.Task[Answer]) -> None:
        """Take an answer into the tree, or plan the next question."""
        now = self._clock()
        try:
            answer = asking.result()
        except (SessionGone, Superseded):
            raise
        except AgentError as error:
            if isinstance(error, StagingFailed):
                self._workspace.staging_failed(error.error)
            self._ask_again("sync.failed", str(error), now, error)
            return
        plan = self._plan_of(answer)
        if plan is not None:
            free_at = self._follower.free_at(operation.path for operation in plan.operations)
            if free_at > now:
                asyncio.get_running_loop().call_later(free_at - now, self._wake.set)
                return
            if (refusal := self._accept(answer, plan)) is not None:
                self._ask_again("sync.retry", refusal, now, gap=plan.gap)
                return
        request, self._asking, self._request = self._request, None, None
        self._catch_up.succeeded()
        self._status.phase = SyncPhase.FOLLOWING
        self._lag.caught_up(self.tree.cursor)
        self._lag.tell()
        self._status.last_catch_up_at = time.time()
        self._follower.answered(now, revision_of(answer))
        self._workspace.confirmed(self._follower.unusable)
        if Reason.DISK not in self._follower.needs:
            self._workspace.undone_is_over()
        self._show_behind()
        if not self._follower.pending_paths:
            self._problems.clear("hash_mismatch")
        if LINK_NEEDS.isdisjoint(self._follower.needs):
            self._source.caught_up()
        forward = request is not None and self.tree.cursor.revision > request.revision
        if request is not None and request.reason is Reason.HEAD and plan is not None and forward:
            self._suspect_link()
        log.info(
            "sync.caught_up",
            revision=self.tree.cursor.revision,
            operations=len(plan.operations) if plan else 0,
            kind=type(answer).__name__.lower(),
        )

    def _suspect_link(self) -> None:
        """Replace the link when its events are missing for the second time in a row: one may be lost on a good link."""
        if self._intake.missed_before:
            self._source.suspect("commits are found by the heartbeat alone")
        self._intake.missed_before = True

    def _plan_of(self, answer: Answer) -> Plan | None:
        if isinstance(answer, Current):
            return None
        if isinstance(answer, Changes):
            return catch_up(self.tree, answer)
        return self._plan_of_snapshot(answer)

    def _accept(self, answer: Answer, plan: Plan) -> str | None:
        """Apply an answer. Returns why it was not possible now, None when it is done."""
        if plan.gap is not None and plan.outcome is not Outcome.APPLIED:
            return f"the answer did not fit: {plan.gap.reason.value}"
        snapshot = answer if isinstance(answer, StagedSnapshot) else None
        if snapshot is not None and (doubt := self._catch_up.doubts(self.tree, plan)) is not None:
            self._status.phase = SyncPhase.HALTED
            return doubt.detail
        if not self._apply(plan):
            return "the disk could not take the answer"
        if snapshot is not None:
            self._workspace.record_whole(self.tree)
            observe_build(self._metrics, snapshot)
        return None

    def _ask_again(
        self, event: str, why: str, now: float, error: Exception | None = None, gap: Gap | None = None
    ) -> None:
        """Let what was asked for be due again, after a wait. `error`: why there was no answer at all. `gap`: what the
        answer did not bring.

        What is too large, or cannot be read time and again, is not asked again as it was.
        """
        whole = self._request is not None and self._request.epoch is None
        unreadable = isinstance(error, MalformedMessage) or not isinstance(error, AgentError | None)
        too_large = isinstance(error, TooLarge) or (unreadable and self._catch_up.attempts > 0)
        self._asking = self._request = None
        wait = self._catch_up.wait(error, least_question=whole)
        log.warning(event, why=why, attempt=self._catch_up.attempts, wait=round(wait, 2))
        self._workspace.disk.drop_staged()
        self._recording.soon()
        self._follower.failed(now, wait, too_large=too_large, missing=gap.paths if gap else frozenset())
