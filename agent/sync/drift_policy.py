"""Does what DRIFT_POLICY says about files that another process changed.

`report` shows them, `restore` asks the database what they should hold, `keep` leaves them be. The database's next word
on a path wins in any case. What nobody knows (`DriftWatch.strangers`) is only ever shown: it is not ours to restore.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from agent.core.model import RelPath, Tree
from agent.core.scheduler import Follower
from agent.fs.inspect import Drift
from agent.sync.drift import Observed
from agent.sync.workspace import Workspace
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import OwnedProblems

log = get_logger("drift")

Policy = Literal["report", "restore", "keep", "off"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftPolicy:
    """Attributes:
    drifted: gives the paths that are not as they should be now.
    exempt: says whether a change is a tool's to make.
    strangers: gives the files that nobody knows.
    wake: has the loop look what is to be asked.
    """

    policy: Policy
    follower: Follower
    workspace: Workspace
    problems: OwnedProblems
    metrics: Metrics
    drifted: Callable[[], Collection[RelPath]]
    exempt: Callable[[Drift], bool]
    strangers: Callable[[], Collection[RelPath]]
    clock: Callable[[], float]
    wake: Callable[[], None]

    def observe(self, observed: Observed) -> None:
        """Take in what the watch has seen."""
        self.workspace.remember_stats(observed)
        self.metrics.drift_files.set(len(self.drifted()))
        self.problems.clear("drift", paths=observed.settled)
        restore = self.policy == "restore"
        strangers = self.strangers()
        drifts = [drift for drift in observed.drifts if not self.exempt(drift)]
        ours = [drift for drift in drifts if restore and drift.path not in strangers]
        if self.policy in ("report", "restore"):
            for drift in drifts:
                if not restore or drift.path in strangers:
                    self.problems.add(drift.problem())
        if ours:
            self._restore(ours)

    def _restore(self, drifts: Sequence[Drift]) -> None:
        """Take what stands there for unconfirmed, and ask what should."""
        paths = [drift.path for drift in drifts]
        log.warning("drift.restoring", files=len(paths), file_path=paths[0])
        tree: Tree = self.workspace.unconfirmed(self.follower.tree, drifts)
        self.follower.adopt(tree)
        self.follower.doubt(paths, self.clock())
        self.wake()
