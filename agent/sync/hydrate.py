"""Makes the first tree: goes on from the ledger of an earlier run, or takes a snapshot.

Where there is no ledger and the directory holds files, nothing says which of them the agent wrote. What the snapshot's
manifest calls deleted was the project's, and goes; what neither knows is somebody else's, stays, and is reported as
drift, so that a file which the database deleted while the agent was down does not stay unseen.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from agent.core.errors import RootUnusable
from agent.core.model import RelPath
from agent.core.reconcile import Plan, Reason
from agent.core.scheduler import Follower
from agent.fs.inspect import Drift
from agent.fs.turns import in_thread
from agent.snapshot.download import StagedSnapshot
from agent.sync.catchup import CatchUp
from agent.sync.drift import DriftWatch
from agent.sync.drift_policy import Policy
from agent.sync.ledger import LedgerState
from agent.sync.preview import Preview
from agent.sync.workspace import ApplyResult, Workspace
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics
from agent.telemetry.spans import Spans
from agent.telemetry.status import SyncPhase, SyncStatus

log = get_logger("sync")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hydration:
    """The parts of the loop that the first tree is made with.

    Attributes:
        plan: what a snapshot asks for.
        settle: has the tree say what the disk did of a plan since a time; returns False when it could not.
        drift_policy: with `report` and `restore` the files that nobody knows are shown.
        exempt: says whether a change is a tool's to make: its file is left, and its entry.
    """

    follower: Follower
    workspace: Workspace
    catch_up: CatchUp
    drift: DriftWatch
    status: SyncStatus
    metrics: Metrics
    spans: Spans | None
    preview: Preview
    plan: Callable[[StagedSnapshot], Plan]
    settle: Callable[[Plan, ApplyResult, float], bool]
    drift_policy: Policy
    exempt: Callable[[Drift], bool]
    clock: Callable[[], float]

    async def run(self, url: str | None) -> None:
        """Make the tree whole; `url` is where a snapshot is, None asks the session API.

        Raises:
            RootUnusable: the disk cannot take it.
            HydrationImpossible, CredentialRejected: there is no snapshot to be had.
        """
        workspace = self.workspace
        loaded = await in_thread(workspace.open)  # with whatever an earlier run left
        if loaded is not None:
            await self._resume(loaded)
            return
        found = await asyncio.to_thread(workspace.found)  # as many as a project likes to make
        self.status.mode = "rebuild" if found else "fresh"
        self.status.phase = SyncPhase.HYDRATING
        started = self.clock()
        staged = await self.catch_up.first(url)
        await self._tell_ours(found, staged)
        plan = self.plan(staged)
        self.preview.begin([each.path for each in plan.operations])
        applied = await workspace.apply_in_thread(plan.operations, self.follower.tree.entries)
        if not self.settle(plan, applied, started):
            raise RootUnusable(f"the first snapshot could not be put in place: {workspace.failure}")
        await workspace.record_in_thread(self.follower.tree)
        self._tell(staged, self.clock() - started)

    async def _tell_ours(self, found: set[RelPath], staged: StagedSnapshot) -> None:
        """Remove what the database has deleted, and remember what it never had."""
        manifest = staged.manifest
        gone = found & manifest.deleted.keys() - manifest.files.keys()
        if gone:
            log.info("hydrate.discarded", files=len(gone), file_path=min(gone))
            await in_thread(lambda: self.workspace.discard(sorted(gone)))
        if self.drift_policy in ("report", "restore") and not staged.plain:
            self.drift.strangers = frozenset(found - gone - manifest.files.keys())

    async def _resume(self, loaded: LedgerState) -> None:
        """Go on from where an earlier run was: what the ledger says, corrected by what the disk holds."""
        self.status.mode = "resume"
        tree, drifts = await self.workspace.audit(loaded, self.exempt)
        self.follower.adopt(tree)
        self.follower.doubt((drift.path for drift in drifts), self.clock())
        self.follower.need(Reason.JOIN, self.clock())
        log.info(
            "hydrate.resumed",
            revision=tree.cursor.revision,
            files=len(self.workspace.stats),
            drifted=len(drifts),
        )

    def _tell(self, staged: StagedSnapshot, seconds: float) -> None:
        self.metrics.hydrate.observe(seconds)
        observe_build(self.metrics, staged)
        if self.spans is not None:
            now = time.time()
            self.spans.record("preview.hydrate", now - seconds, now, {"preview.files": len(staged.staged)})
        log.info(
            "hydrate.done",
            mode=self.status.mode,
            revision=self.follower.tree.cursor.revision,
            files=len(staged.staged),
            bytes=staged.size,
            seconds=round(seconds, 3),
        )


def observe_build(metrics: Metrics, staged: StagedSnapshot) -> None:
    """Count how long the orchestrator took to build a snapshot, when it says so."""
    if staged.manifest.build_seconds is not None:
        metrics.snapshot_build.observe(staged.manifest.build_seconds)
