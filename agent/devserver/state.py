"""Decides, from what happened to the dev server, what it does next. Pure: time and chance are passed in.

    absent ──hydrated──▶ installing ──installed──▶ starting ──answered──▶ ready
                             ▲                        ▲  │                  │
                  edited ┌───┘                    due │  │ exited, late     │ exited, too many probes missed
                         │                            │  ▼                  ▼
                       failed ◀──too many crashes──── backoff ◀────────────┘

    stopping comes before every planned end of the process: a restart after node_modules was replaced, a hung
    server, a stale dependency cache, and the end of the agent.

`step` is the whole table. It ignores, on purpose, an input that has no meaning in the current phase, and every
observation of a process that was replaced since (its `generation` is an older one).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Phase(StrEnum):
    """What the dev server is doing; the value is what status and metrics show."""

    ABSENT = "absent"
    INSTALLING = "installing"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """The bounds on starts and restarts, in seconds unless they count."""

    start_timeout: float = 60.0
    """A start without any HTTP answer after this long has failed. Vite takes half a second."""
    healthy_after: float = 60.0
    """A server that was ready for this long has its earlier crashes forgotten."""
    max_crashes: int = 5
    crash_window: float = 60.0
    """`max_crashes` within `crash_window`: the server failed, and only a change of the project starts it again."""
    backoff_first: float = 0.5
    backoff_most: float = 10.0
    missed_probes: int = 6
    """At the 5 s of DEV_PROBE_SECONDS half a minute without an answer: hung. A slow page takes less."""
    outdated_answers: int = 2
    """Vite answers 504 once while it re-optimises by itself; twice means its cache is wrong."""
    debounce: float = 0.5
    """A lock file and its package.json are two saves and one install."""


@dataclass(frozen=True, slots=True)
class Hydrated:
    """The project's files are all there. `runnable`: there is something to start."""

    runnable: bool


@dataclass(frozen=True, slots=True)
class Edited:
    """Files changed. `dependencies`: one that decides the install; `relevant`: one that may fix a failed server."""

    dependencies: bool
    relevant: bool
    runnable: bool = True


@dataclass(frozen=True, slots=True)
class Installed:
    """An install ended. `restart`: what runs now is out of date, for `reason`. `usable`: there is something to run."""

    ok: bool
    restart: bool
    usable: bool
    reason: str = "dependencies"


@dataclass(frozen=True)
class Observed:
    """Something was seen of the process that the start number `generation` made."""

    generation: int


@dataclass(frozen=True)
class Exited(Observed):
    """The process ended; `why` is a label for metrics: `exit`, `signal`, `oom`, `port_taken`."""

    why: str


class Answered(Observed):
    """The server answers HTTP, whatever it answers: it is up. Its dependency cache is no wrong one."""


class Missed(Observed):
    """A probe had no answer for as long as one may take."""


class Outdated(Observed):
    """The entry module or a dependency of it answered `504 Outdated Optimize Dep`."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The agent ends."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Probed = Answered | Missed | Outdated
Input = Hydrated | Edited | Installed | Exited | Probed | Stop | Tick


class Command(StrEnum):
    """What the supervisor has to do."""

    INSTALL = "install"
    START = "start"
    START_FRESH = "start_fresh"
    """Start without the dependency cache of the previous run."""
    TERMINATE = "terminate"


@dataclass(frozen=True, slots=True)
class DevServerState:
    """Everything that the next decision depends on. Times are seconds of the caller's clock."""

    # The phase.
    phase: Phase = Phase.ABSENT
    since: float = 0.0
    """When the phase began."""
    reason: str = ""
    """Why this phase: `exit`, `signal`, `oom`, `port_taken`, `hung`, `late`, `dependencies`, `settings`, `cache`,
    `install`."""
    due: float | None = None
    """In `starting`: when it is too late. In `backoff`: when to start again."""
    restart: Command | None = None
    """In `stopping`: how to start again once the process has ended; None: its end counts as a crash."""
    ended: bool = False
    """`Stop` was given: nothing starts any more."""

    # The process.
    generation: int = 0
    """How many starts there were."""
    missed: int = 0
    """Probes in a row without an answer."""
    outdated: int = 0
    cache_cleared: bool = False
    """The dependency cache was dropped once for these dependencies, and is not dropped again."""

    # Its crashes.
    crashes: tuple[float, ...] = ()
    failures: int = 0
    """Crashes since the server was last healthy; the backoff grows with it."""

    # The project and its install.
    hydrated: bool = False
    installing: bool = False
    install_due: float | None = None

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self.phase in (Phase.STARTING, Phase.READY, Phase.STOPPING)

    @property
    def next_due(self) -> float | None:
        """When to give `Tick` at the latest; None: nothing is due."""
        times = [at for at in (self.due, None if self.installing else self.install_due) if at is not None]
        return min(times, default=None)


Step = tuple[DevServerState, tuple[Command, ...]]
NOTHING: tuple[Command, ...] = ()


def step(state: DevServerState, given: Input, now: float, *, policy: RestartPolicy, jitter: float) -> Step:
    """Apply one input.

    Args:
        state: The state before.
        given: What happened.
        now: The time, on the clock that every time in `state` is from.
        policy: The bounds.
        jitter: Random, in [0, 1): spreads the backoff over half to all of it.

    Returns:
        The state after, and the commands to carry out, in order.
    """
    if state.ended and not isinstance(given, Exited):
        return state, NOTHING
    match given:
        case Stop():
            return _end(state, now)
        case Tick():
            return _tick(state, now, policy, jitter)
        case Hydrated(runnable):
            state = replace(state, hydrated=True)
            if state.phase is not Phase.ABSENT or not runnable or state.installing:
                return state, NOTHING
            return _install(_enter(state, Phase.INSTALLING, now))
        case Edited():
            return _edited(state, given, now, policy), NOTHING
        case Installed():
            return _installed(state, given, now, policy)
        case _ if given.generation != state.generation or not state.alive:
            return state, NOTHING
        case Exited(why=why):
            return _exited(state, why, now, policy, jitter)
        case Answered():
            return replace(_up(state, now), outdated=0), NOTHING
        case Missed():
            return _missed(state, now, policy)
        case Outdated():
            return _outdated(state, now, policy)


def _enter(
    state: DevServerState, phase: Phase, now: float, reason: str = "", due: float | None = None
) -> DevServerState:
    return replace(state, phase=phase, since=now, reason=reason, due=due)


def _up(state: DevServerState, now: float) -> DevServerState:
    """The server answered."""
    state = replace(state, missed=0)
    return _enter(state, Phase.READY, now) if state.phase is Phase.STARTING else state


def _install(state: DevServerState) -> Step:
    return replace(state, installing=True, install_due=None), (Command.INSTALL,)


def _start(
    state: DevServerState, now: float, policy: RestartPolicy, command: Command, reason: str = ""
) -> Step:
    state = _enter(state, Phase.STARTING, now, reason, now + policy.start_timeout)
    return replace(state, generation=state.generation + 1, missed=0, outdated=0), (command,)


def _terminate(state: DevServerState, now: float, reason: str, restart: Command | None = None) -> Step:
    return replace(_enter(state, Phase.STOPPING, now, reason), restart=restart), (Command.TERMINATE,)


def _end(state: DevServerState, now: float) -> Step:
    state = replace(state, ended=True, install_due=None)
    if state.phase is Phase.STOPPING:
        return state, NOTHING
    if state.alive:
        return _terminate(state, now, "stop")
    return _enter(state, Phase.ABSENT, now, "stop"), NOTHING


def _tick(state: DevServerState, now: float, policy: RestartPolicy, jitter: float) -> Step:
    if state.install_due is not None and state.install_due <= now and not state.installing:
        if state.phase in (Phase.ABSENT, Phase.FAILED):
            state = _enter(state, Phase.INSTALLING, now)
        return _install(state)
    if state.due is None or state.due > now:
        return state, NOTHING
    if state.phase is Phase.BACKOFF:
        return _start(state, now, policy, Command.START, state.reason)
    if state.phase is Phase.STARTING:
        return _terminate(state, now, "late")
    return state, NOTHING


def _edited(state: DevServerState, edit: Edited, now: float, policy: RestartPolicy) -> DevServerState:
    if not state.hydrated or (state.phase is Phase.ABSENT and not edit.runnable):
        return state
    soon = now + policy.debounce
    if edit.dependencies or (edit.relevant and state.phase in (Phase.ABSENT, Phase.FAILED)):
        state = replace(state, install_due=soon)
    if edit.relevant and state.phase is Phase.BACKOFF:
        state = replace(state, due=min(soon, state.due or soon))
    return state


def _installed(state: DevServerState, ended: Installed, now: float, policy: RestartPolicy) -> Step:
    state = replace(state, installing=False)
    if ended.ok and ended.restart:
        state = replace(state, cache_cleared=False)
    match state.phase:
        case Phase.INSTALLING if ended.usable:
            return _start(state, now, policy, Command.START)
        case Phase.INSTALLING:
            return _enter(state, Phase.FAILED, now, "install"), NOTHING
        case Phase.STARTING | Phase.READY if ended.ok and ended.restart:
            return _terminate(state, now, ended.reason, Command.START)
        case Phase.BACKOFF if ended.ok and ended.restart:
            return _start(state, now, policy, Command.START, ended.reason)
        case _:
            return state, NOTHING


def _exited(state: DevServerState, why: str, now: float, policy: RestartPolicy, jitter: float) -> Step:
    if state.ended:
        return _enter(state, Phase.ABSENT, now, "stop"), NOTHING
    if state.phase is Phase.STOPPING and state.restart is not None:
        return _start(state, now, policy, state.restart, state.reason)
    if state.phase is Phase.STOPPING:
        why = state.reason
    if state.phase is Phase.READY and now - state.since >= policy.healthy_after:
        state = replace(state, crashes=(), failures=0)
    if why == "port_taken":
        # Nothing of the project's failed: the port is tried until it is free.
        state = replace(state, failures=state.failures + 1)
        return _backoff(state, why, now, policy, jitter), NOTHING
    recent = (*(at for at in state.crashes if now - at < policy.crash_window), now)
    state = replace(state, crashes=recent[-policy.max_crashes :], failures=state.failures + 1)
    if len(recent) >= policy.max_crashes:
        return _enter(state, Phase.FAILED, now, why), NOTHING
    return _backoff(state, why, now, policy, jitter), NOTHING


def _backoff(
    state: DevServerState, why: str, now: float, policy: RestartPolicy, jitter: float
) -> DevServerState:
    delay = min(policy.backoff_most, policy.backoff_first * 2.0 ** min(state.failures - 1, 16))
    return _enter(state, Phase.BACKOFF, now, why, now + delay * (0.5 + jitter / 2))


def _missed(state: DevServerState, now: float, policy: RestartPolicy) -> Step:
    if state.phase is not Phase.READY:
        return state, NOTHING
    state = replace(state, missed=state.missed + 1)
    if state.missed < policy.missed_probes:
        return state, NOTHING
    if now - state.since >= policy.healthy_after:
        state = replace(state, crashes=(), failures=0)
    return _terminate(state, now, "hung")


def _outdated(state: DevServerState, now: float, policy: RestartPolicy) -> Step:
    if state.phase is Phase.STOPPING:
        return state, NOTHING
    if state.cache_cleared:
        return _up(state, now), NOTHING  # it was no stale cache of a run before
    due = None if state.phase is Phase.STARTING else state.due
    state = replace(state, missed=0, outdated=state.outdated + 1, due=due)
    if state.outdated < policy.outdated_answers:
        return state, NOTHING
    return _terminate(replace(state, cache_cleared=True), now, "cache", Command.START_FRESH)
