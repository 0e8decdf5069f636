"""PURE: what the dev server's states are and how one leads to another. Time and chance are passed in.

    absent ──hydrated──▶ installing ──installed──▶ starting ──served──▶ ready
                             ▲                        ▲  │                │
                  edited ┌───┘                    due │  │ exited, late   │ exited, three probes missed
                         │                            │  ▼                ▼
                       failed ◀──budget spent──────── backoff ◀────── (a crash)

    stopping comes before every planned end of the process: a restart after a swap of node_modules, a hung
    server, a stale dependency cache, and the end of the agent.

`step` is the whole table. An input that means nothing in the state it meets is ignored, on purpose: probes
and exits of a process that has since been replaced carry its `generation` and change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class State(StrEnum):
    """As in the protocol."""

    ABSENT = "absent"
    INSTALLING = "installing"
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    FAILED = "failed"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Policy:
    """The numbers, in seconds unless they count."""

    start_timeout: float = 60.0
    """Without any HTTP answer for so long a start has failed; Vite takes half a second."""
    healthy_after: float = 60.0
    """Ready for so long makes earlier crashes history."""
    max_crashes: int = 5
    crash_window: float = 60.0
    """So many crashes within so long: trying again without a change is pointless."""
    backoff_first: float = 0.5
    backoff_most: float = 10.0
    missed_probes: int = 3
    """One slow answer is a busy server, three in a row are a hung one."""
    outdated_answers: int = 2
    """Vite answers 504 once while it re-optimises by itself; twice means its cache is wrong."""
    debounce: float = 0.5
    """A lock file and its package.json are two saves and one install."""


@dataclass(frozen=True, slots=True)
class Hydrated:
    """The tree is whole. `runnable`: there is something to start."""

    runnable: bool


@dataclass(frozen=True, slots=True)
class Edited:
    """Files changed. `dependencies`: what decides the install; `relevant`: what may cure a failed server."""

    dependencies: bool
    relevant: bool
    runnable: bool = True


@dataclass(frozen=True, slots=True)
class Installed:
    """An install ended. `restart`: what runs now is out of date. `usable`: there is something to run with."""

    ok: bool
    restart: bool
    usable: bool


@dataclass(frozen=True, slots=True)
class Exited:
    """The process ended; `why` is a label for metrics: `exit`, `signal`, `oom`."""

    generation: int
    why: str


@dataclass(frozen=True, slots=True)
class Answered:
    """The server speaks HTTP, though not yet what makes a preview."""

    generation: int


@dataclass(frozen=True, slots=True)
class Served:
    """Page, entry module and HMR socket answer."""

    generation: int


@dataclass(frozen=True, slots=True)
class Missed:
    """A probe had no answer at all."""

    generation: int


@dataclass(frozen=True, slots=True)
class Outdated:
    """The entry module's graph answered `504 Outdated Optimize Dep`."""

    generation: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The agent ends."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed, maybe enough of it."""


Input = Hydrated | Edited | Installed | Exited | Answered | Served | Missed | Outdated | Stop | Tick


class Command(StrEnum):
    """What the shell has to do."""

    INSTALL = "install"
    START = "start"
    START_FRESH = "start_fresh"
    """Start without the dependency cache of the last time."""
    TERMINATE = "terminate"


class After(StrEnum):
    """What a stop was for."""

    NOTHING = "nothing"
    START = "start"
    START_FRESH = "start_fresh"
    CRASH = "crash"


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the dev server stands. `generation` counts starts; times are seconds of the caller's clock."""

    state: State = State.ABSENT
    since: float = 0.0
    generation: int = 0
    hydrated: bool = False
    installing: bool = False
    install_due: float | None = None
    due: float | None = None
    """In `starting`: when it is too late. In `backoff`: when to try again."""
    crashes: tuple[float, ...] = ()
    failures: int = 0
    """Crashes since the server was last healthy; what the backoff grows with."""
    missed: int = 0
    outdated: int = 0
    cache_cleared: bool = False
    after: After = After.NOTHING
    reason: str = ""
    """Why the state is what it is: `exit`, `signal`, `oom`, `hung`, `late`, `dependencies`, `cache`, `install`."""
    ended: bool = False
    """`Stop` was seen: nothing starts any more."""

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return self.state in (State.STARTING, State.READY, State.STOPPING)

    @property
    def next_due(self) -> float | None:
        """When `Tick` is wanted next."""
        times = [at for at in (self.due, None if self.installing else self.install_due) if at is not None]
        return min(times, default=None)


Step = tuple[Machine, tuple[Command, ...]]
NOTHING: tuple[Command, ...] = ()


def step(machine: Machine, given: Input, now: float, *, policy: Policy, jitter: float) -> Step:
    """The machine after `given`, and what to do about it. `jitter` is in [0, 1)."""
    if machine.ended and not isinstance(given, Exited):
        return machine, NOTHING
    match given:
        case Stop():
            return _end(machine, now)
        case Tick():
            return _tick(machine, now, policy, jitter)
        case Hydrated(runnable):
            machine = replace(machine, hydrated=True)
            if machine.state is not State.ABSENT or not runnable or machine.installing:
                return machine, NOTHING
            return _install(_enter(machine, State.INSTALLING, now))
        case Edited():
            return _edited(machine, given, now, policy), NOTHING
        case Installed():
            return _installed(machine, given, now, policy)
        case _ if given.generation != machine.generation or not machine.alive:
            return machine, NOTHING
        case Exited(why=why):
            return _exited(machine, why, now, policy, jitter)
        case Answered():
            late = machine.state is State.STARTING
            return (replace(machine, due=None) if late else replace(machine, missed=0)), NOTHING
        case Served():
            machine = replace(machine, missed=0, outdated=0)
            if machine.state is not State.STARTING:
                return machine, NOTHING
            return _enter(machine, State.READY, now), NOTHING
        case Missed():
            return _missed(machine, now, policy)
        case Outdated():
            return _outdated(machine, now, policy)


def _enter(machine: Machine, state: State, now: float, reason: str = "", due: float | None = None) -> Machine:
    return replace(machine, state=state, since=now, reason=reason, due=due)


def _install(machine: Machine) -> Step:
    return replace(machine, installing=True, install_due=None), (Command.INSTALL,)


def _start(machine: Machine, now: float, policy: Policy, command: Command, reason: str = "") -> Step:
    machine = _enter(machine, State.STARTING, now, reason, now + policy.start_timeout)
    return replace(machine, generation=machine.generation + 1, missed=0, outdated=0), (command,)


def _terminate(machine: Machine, now: float, reason: str, after: After) -> Step:
    return replace(_enter(machine, State.STOPPING, now, reason), after=after), (Command.TERMINATE,)


def _end(machine: Machine, now: float) -> Step:
    machine = replace(machine, ended=True, install_due=None)
    if machine.state is State.STOPPING:
        return replace(machine, after=After.NOTHING), NOTHING
    if machine.alive:
        return _terminate(machine, now, "stop", After.NOTHING)
    return _enter(machine, State.ABSENT, now, "stop"), NOTHING


def _tick(machine: Machine, now: float, policy: Policy, jitter: float) -> Step:
    if machine.install_due is not None and machine.install_due <= now and not machine.installing:
        if machine.state in (State.ABSENT, State.FAILED):
            machine = _enter(machine, State.INSTALLING, now)
        return _install(machine)
    if machine.due is None or machine.due > now:
        return machine, NOTHING
    if machine.state is State.BACKOFF:
        return _start(machine, now, policy, Command.START, machine.reason)
    if machine.state is State.STARTING:
        return _terminate(machine, now, "late", After.CRASH)
    return machine, NOTHING


def _edited(machine: Machine, edit: Edited, now: float, policy: Policy) -> Machine:
    if not machine.hydrated or (machine.state is State.ABSENT and not edit.runnable):
        return machine
    soon = now + policy.debounce
    if edit.dependencies or (edit.relevant and machine.state in (State.ABSENT, State.FAILED)):
        machine = replace(machine, install_due=soon)
    if edit.relevant and machine.state is State.BACKOFF:
        machine = replace(machine, due=min(soon, machine.due or soon))
    return machine


def _installed(machine: Machine, ended: Installed, now: float, policy: Policy) -> Step:
    machine = replace(machine, installing=False)
    if ended.ok and ended.restart:
        machine = replace(machine, cache_cleared=False)
    match machine.state:
        case State.INSTALLING if ended.usable:
            return _start(machine, now, policy, Command.START)
        case State.INSTALLING:
            return _enter(machine, State.FAILED, now, "install"), NOTHING
        case State.STARTING | State.READY if ended.ok and ended.restart:
            return _terminate(machine, now, "dependencies", After.START)
        case State.BACKOFF if ended.ok and ended.restart:
            return _start(machine, now, policy, Command.START, "dependencies")
        case _:
            return machine, NOTHING


def _exited(machine: Machine, why: str, now: float, policy: Policy, jitter: float) -> Step:
    if machine.ended:
        return _enter(machine, State.ABSENT, now, "stop"), NOTHING
    if machine.state is State.STOPPING and machine.after is After.START:
        return _start(machine, now, policy, Command.START, machine.reason)
    if machine.state is State.STOPPING and machine.after is After.START_FRESH:
        return _start(machine, now, policy, Command.START_FRESH, machine.reason)
    if machine.state is State.STOPPING:
        why = machine.reason
    if machine.state is State.READY and now - machine.since >= policy.healthy_after:
        machine = replace(machine, crashes=(), failures=0)
    recent = (*(at for at in machine.crashes if now - at < policy.crash_window), now)
    machine = replace(machine, crashes=recent[-policy.max_crashes :], failures=machine.failures + 1)
    if len(recent) >= policy.max_crashes:
        return _enter(machine, State.FAILED, now, why), NOTHING
    delay = min(policy.backoff_most, policy.backoff_first * 2.0 ** min(machine.failures - 1, 16))
    return _enter(machine, State.BACKOFF, now, why, now + delay * (0.5 + jitter / 2)), NOTHING


def _missed(machine: Machine, now: float, policy: Policy) -> Step:
    if machine.state is not State.READY:
        return machine, NOTHING
    machine = replace(machine, missed=machine.missed + 1)
    if machine.missed < policy.missed_probes:
        return machine, NOTHING
    if now - machine.since >= policy.healthy_after:
        machine = replace(machine, crashes=(), failures=0)
    return _terminate(machine, now, "hung", After.CRASH)


def _outdated(machine: Machine, now: float, policy: Policy) -> Step:
    if machine.state is State.STOPPING:
        return machine, NOTHING
    machine = replace(machine, outdated=machine.outdated + 1)
    if machine.outdated < policy.outdated_answers or machine.cache_cleared:
        return machine, NOTHING
    return _terminate(replace(machine, cache_cleared=True), now, "cache", After.START_FRESH)
