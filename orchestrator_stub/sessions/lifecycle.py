"""Decides a session's states. PURE: data in, data out; the clock and the database are the caller's.

    requested ──take_up──▶ provisioning ──report──▶ ready
        │                    │     ▲                  │
        │                    │     └──── replace ─────┤        (a newer generation of machine)
        └───────── end ──────┴──────── end ───────────┘
                              ▼
                           draining ──destroyed──▶ gone        (ended by a request or the clock)
                                    └─destroyed──▶ failed      (ended because of a problem)

    ready ──suspend──▶ suspended ──wake──▶ provisioning ──report──▶ ready      (the same machine, unless it is gone)

A session in `draining` still may have a machine; in `gone` and `failed` it has none. An event
without a row in the table below is ignored on purpose: two orchestrators, a late heartbeat and a sweeper may all send
the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from uuid import UUID

from orchestrator_stub.config import Timing


class State(StrEnum):
    """Where a session is (protocol: control plane)."""

    REQUESTED = "requested"
    PROVISIONING = "provisioning"
    READY = "ready"
    SUSPENDED = "suspended"
    DRAINING = "draining"
    GONE = "gone"
    FAILED = "failed"


class Event(StrEnum):
    """What can happen to it."""

    TAKE_UP = "take_up"
    """An orchestrator starts to make, or goes on making, the machine."""
    REPORT = "report"
    """The agent's status says the preview is served."""
    REPLACE = "replace"
    """A newer generation was asked for: the machine in place is to be replaced."""
    SUSPEND = "suspend"
    """Nobody looks at it: its machine is put to sleep."""
    WAKE = "wake"
    """Somebody wants to see it: its machine is woken, or another made."""
    END = "end"
    """Deleted, expired, or not heard from: no more machine is wanted."""
    TAKE_DOWN = "take_down"
    """An orchestrator starts to destroy, or goes on destroying, what is left of it."""
    DESTROYED = "destroyed"
    """No machine of this session is left."""


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.REQUESTED, Event.TAKE_UP): State.PROVISIONING,
    (State.PROVISIONING, Event.TAKE_UP): State.PROVISIONING,
    # Its orchestrator was killed before it wrote the machine down, and the agent reported all the same.
    (State.READY, Event.TAKE_UP): State.READY,
    (State.PROVISIONING, Event.REPORT): State.READY,
    (State.READY, Event.REPORT): State.READY,
    (State.REQUESTED, Event.REPLACE): State.REQUESTED,
    (State.PROVISIONING, Event.REPLACE): State.PROVISIONING,
    (State.READY, Event.REPLACE): State.PROVISIONING,
    (State.FAILED, Event.REPLACE): State.PROVISIONING,
    (State.READY, Event.SUSPEND): State.SUSPENDED,
    # What an agent says between the decision and its sleep.
    (State.SUSPENDED, Event.REPORT): State.SUSPENDED,
    (State.SUSPENDED, Event.WAKE): State.PROVISIONING,
    (State.SUSPENDED, Event.REPLACE): State.PROVISIONING,
    (State.SUSPENDED, Event.END): State.DRAINING,
    (State.REQUESTED, Event.END): State.DRAINING,
    (State.PROVISIONING, Event.END): State.DRAINING,
    (State.READY, Event.END): State.DRAINING,
    (State.DRAINING, Event.TAKE_DOWN): State.DRAINING,
    (State.DRAINING, Event.DESTROYED): State.GONE,
}
"""`DRAINING + DESTROYED` is `FAILED` instead when the session carries a problem."""

LIVE = frozenset({State.REQUESTED, State.PROVISIONING, State.READY})
"""A machine is wanted."""

KEPT = LIVE | {State.SUSPENDED}
"""Its machine, if it has one, is the session's and may say so."""

ENDED = frozenset({State.GONE, State.FAILED})
"""No machine is left, and nothing more will happen by itself."""


def moves(event: Event) -> dict[State, State]:
    """From which state to which `event` leads; in a state that is not a key it means nothing."""
    return {state: after for (state, happened), after in TRANSITIONS.items() if happened is event}


@dataclass(frozen=True, slots=True)
class Session:
    """One row of `preview.sessions`. Times are Unix seconds."""

    id: UUID
    project_id: UUID
    state: State
    generation: int
    idempotency_key: str | None
    created_at: float
    expires_at: float
    state_since: float
    claimed_until: float | None = None
    lease_until: float | None = None
    machine_driver: str | None = None
    machine_id: str | None = None
    machine_region: str | None = None
    preview_url: str | None = None
    problem: str | None = None
    run_revision: int = 0
    """Of its run settings, its project's and its own together; it moves with each change."""
    image: str | None = None
    image_next: str | None = None
    """What a rollout wants its next machine to be made of."""
    rolled: bool = False
    """A rollout replaced the machine that ran, and the new one is not ready yet."""
    waking: bool = False
    """Its machine was woken, and has not said yet that all is right."""
    trial: bool = False
    """A rollout made it, to try an image."""


class Action(StrEnum):
    """What the sweeper should do about a session."""

    LEAVE = "leave"
    PROVISION = "provision"
    ROLL = "roll"
    UNLOAD = "unload"
    """It sleeps too long: destroy its machine; the session stays."""
    RENEW = "renew"
    """Its machine does not wake: make another."""
    DRAIN = "drain"
    DESTROY = "destroy"


@dataclass(frozen=True, slots=True)
class Judgement:
    """`action`, and the problem to record when the end is not an ordinary one."""

    action: Action
    problem: str | None = None


def judge(session: Session, now: float, timing: Timing) -> Judgement:
    """What is due for `session` at `now`. Deciding twice, or by two sweepers at once, changes nothing."""
    claimed = session.claimed_until is not None and session.claimed_until > now
    match session.state:
        case State.GONE | State.FAILED:
            return Judgement(Action.LEAVE)
        case State.DRAINING:
            return Judgement(Action.LEAVE if claimed else Action.DESTROY)
    if session.expires_at <= now:
        return Judgement(Action.DRAIN)
    match session.state:
        case State.SUSPENDED:
            late = session.state_since + timing.asleep <= now
            unload = late and session.machine_id is not None and not claimed
            return Judgement(Action.UNLOAD if unload else Action.LEAVE)
        case State.PROVISIONING if session.waking:
            late = session.state_since + timing.wake <= now
            return Judgement(Action.RENEW if late and not claimed else Action.LEAVE)
        case State.READY:
            if session.lease_until is not None and session.lease_until <= now:
                return Judgement(Action.DRAIN, "lease_lapsed: the machine stopped sending its status")
            if session.image_next is not None and not claimed:
                return Judgement(Action.ROLL)
        case _ if session.state_since + _patience(session, timing) <= now:
            return Judgement(Action.DRAIN, "provision_timeout: the preview did not become ready in time")
    return Judgement(Action.LEAVE if claimed or session.machine_id is not None else Action.PROVISION)


def _patience(session: Session, timing: Timing) -> float:
    """Seconds that a machine has to become ready. Somebody's preview is away while a rollout waits for one."""
    return min(timing.rollout, timing.provision) if session.rolled or session.trial else timing.provision


PROBLEMS: Final = (
    "machine_refused",
    "template_refused",
    "machine_gone",
    "lease_lapsed",
    "provision_timeout",
    "provisioning",
)
"""The first words of every problem a session can have, up to the colon."""
