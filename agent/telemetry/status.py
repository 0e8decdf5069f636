"""Holds what the agent is doing and what is wrong, for `/status`, the heartbeat and the metrics.

The agent's state is derived from its parts, never set: a stored one can be wrong.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum

from agent.core.model import PROBLEM_OWNERS, Problem, ProblemKind, ProblemOwner
from agent.telemetry.errors import Errors
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics

log = get_logger("status")

LINK_PATIENCE = 10.0
"""Seconds without a live link before the agent calls itself degraded: most reconnects are over by then."""


class AgentState(StrEnum):
    """The agent as a whole (protocol: States)."""

    STARTING = "starting"
    HYDRATING = "hydrating"
    INSTALLING = "installing"
    SERVING = "serving"
    DEGRADED = "degraded"
    DRAINING = "draining"
    STOPPED = "stopped"
    HALTED = "halted"


class SyncPhase(StrEnum):
    """How far the tree is."""

    STARTING = "starting"
    HYDRATING = "hydrating"
    FOLLOWING = "following"
    HALTED = "halted"


def agent_state(
    phase: SyncPhase, dev_server: str, *, link_down_for: float, draining: bool, problems: int
) -> AgentState:
    """Derive the agent's state from its parts.

    Args:
        phase: of the tree.
        dev_server: state of the dev server.
        link_down_for: seconds without a live link; 0 while it is live.
        draining: whether the agent was told to stop.
        problems: how many are open that leave the preview worse than it should be.
    """
    if draining:
        return AgentState.DRAINING
    if phase is SyncPhase.HALTED:
        return AgentState.HALTED
    if phase is not SyncPhase.FOLLOWING:
        return AgentState(phase.value)
    if dev_server == "installing":
        return AgentState.INSTALLING
    if dev_server in ("failed", "backoff") or problems or link_down_for > LINK_PATIENCE:
        return AgentState.DEGRADED
    return AgentState.SERVING if dev_server in ("ready", "absent") else AgentState.STARTING


MAX_OF_KIND = 100
"""Problems of one kind kept one by one: a thousand refused paths must not fill memory or the heartbeat, and must not
leave a refused token without its place."""


@dataclass(slots=True)
class Problems:
    """The open problems, at most `MAX_OF_KIND` of each kind. Each kind is opened and closed by its owner alone
    (`core.model.PROBLEM_OWNERS`).

    Three owners keep theirs themselves and are asked at each report: the dev server, the link, the session API.
    """

    metrics: Metrics
    errors: Errors = field(init=False)
    open: dict[tuple[ProblemKind, str | None], Problem] = field(default_factory=dict)
    dropped: Counter[ProblemKind] = field(default_factory=Counter)
    """By kind, how many were not kept because there were so many already."""

    def __post_init__(self) -> None:
        self.errors = Errors(self.metrics)

    def owned_by(self, owner: ProblemOwner) -> OwnedProblems:
        """Return what `owner` opens and closes its problems with."""
        return OwnedProblems(self, owner)

    def add(self, problem: Problem) -> None:
        """Open a problem; the same kind on the same path stands once. To be called through `owned_by`."""
        key = (problem.kind, problem.path)
        if key not in self.open:
            if sum(1 for kind, _ in self.open if kind == problem.kind) >= MAX_OF_KIND:
                self.dropped[problem.kind] += 1
                return
            self.metrics.problems_opened.labels(problem.kind).inc()
            log.warning(
                "problem.opened",
                kind=problem.kind,
                rule=problem.rule,
                detail=problem.detail,
                file_path=problem.path,
            )
        self.open[key] = problem

    def remove(self, key: tuple[ProblemKind, str | None]) -> None:
        """Close a problem; nothing happens when there is none. To be called through `owned_by`."""
        if self.open.pop(key, None) is not None:
            log.info("problem.closed", kind=key[0], file_path=key[1])


@dataclass(frozen=True, slots=True)
class OwnedProblems:
    """The problems of one owner, who cannot open or close another's: that is a bug, and raises `ValueError`."""

    problems: Problems
    owner: ProblemOwner

    def add(self, problem: Problem) -> None:
        """Open a problem, or say anew what is wrong."""
        self._check(problem.kind)
        self.problems.add(problem)

    def clear(
        self, *kinds: ProblemKind, paths: Collection[str] | None = None, but: Collection[Problem] = ()
    ) -> None:
        """Close the owner's problems of these kinds (none: of all) on these paths (None: wherever), less `but`."""
        for kind in kinds:
            self._check(kind)
        for (kind, path), problem in list(self.problems.open.items()):
            wanted = kind in kinds if kinds else PROBLEM_OWNERS[kind] == self.owner
            if wanted and (paths is None or path in paths) and problem not in but:
                self.problems.remove((kind, path))

    def close(self, problem: Problem) -> None:
        """Close just this problem, if it is still what is said of its kind and path."""
        self._check(problem.kind)
        if self.problems.open.get((problem.kind, problem.path)) == problem:
            self.problems.remove((problem.kind, problem.path))

    def open(self, kind: ProblemKind) -> list[Problem]:
        """The open problems of a kind."""
        return [problem for (each, _), problem in self.problems.open.items() if each == kind]

    def _check(self, kind: ProblemKind) -> None:
        if PROBLEM_OWNERS[kind] != self.owner:
            raise ValueError(f"problems of kind {kind} are {PROBLEM_OWNERS[kind]}'s, not {self.owner}'s")


@dataclass(frozen=True, slots=True)
class Applied:
    """The event that reached the disk last. `lag` in seconds; `traceparent` is its writer's, when it has one."""

    event: str
    revision: int | None
    lag: float
    traceparent: str | None


@dataclass(slots=True)
class SyncStatus:
    """What `sync` reports; written by it alone. Times are Unix seconds."""

    phase: SyncPhase = SyncPhase.STARTING
    mode: str | None = None
    """How the tree came to be: fresh, resume or rebuild."""
    last_event_at: float | None = None
    last_catch_up_at: float | None = None
    lags: deque[float] = field(default_factory=lambda: deque(maxlen=40))
    """Seconds from commit to rename of the latest events, oldest first."""
    last_applied: Applied | None = None
    started_at: float = field(default_factory=time.time)
