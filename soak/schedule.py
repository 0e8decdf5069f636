"""PURE: what a soak is made of, and which faults strike when. The same seed and settings give the same schedule.

Kinds are dealt from a deck, each as often as its weight: first every kind once, then the rest, both shuffled. So ten
minutes meet all of them whatever the seed, and a longer run meets them in proportion. Times are seconds of *work*: the
pauses in which equality is looked at do not count.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What can break."""

    EVENTS_DROPPED = "events dropped"
    EVENTS_DOUBLED = "events doubled"
    EVENTS_REORDERED = "events reordered"
    SOCKETS_CUT = "sockets cut"
    SOCKETS_CLOSED = "sockets closed"
    CHANNELS_CRASHED = "channels crashed"
    TOKENS_EXPIRED = "tokens expired"
    RATE_LIMITED = "rate limited"
    HUGE_FRAME = "huge frame"
    BLACKOUT = "blackout"
    HANDSHAKES_REFUSED = "handshakes refused"
    JOINS_SLOW = "joins slow"
    JOINS_MUTE = "joins mute"
    HEARTBEATS_MUTE = "heartbeats mute"
    AGENT_KILLED = "agent killed"
    AGENT_SUSPENDED = "agent suspended"
    MACHINE_REPLACED = "machine replaced"
    DEV_SERVER_KILLED = "dev server killed"
    DRIFT = "drift"
    PROJECT_HOSTILE = "project hostile"
    DISK_FULL = "disk full"
    NO_INODES = "no inodes"
    CLOCK_JUMPED = "clock jumped"
    HISTORY_REPLACED = "history replaced"
    PROJECT_DELETED = "project deleted"
    CONNECTIONS_KILLED = "connections killed"
    DATABASE_CRASHED = "database crashed"
    ORCHESTRATOR_RESTARTED = "orchestrator restarted"
    ORCHESTRATOR_KILLED = "orchestrator killed"
    SUPABASE_KILLED = "supabase killed"


DECK: dict[Kind, int] = {
    Kind.EVENTS_DROPPED: 4,
    Kind.EVENTS_DOUBLED: 4,
    Kind.EVENTS_REORDERED: 4,
    Kind.SOCKETS_CUT: 4,
    Kind.SOCKETS_CLOSED: 4,
    Kind.CHANNELS_CRASHED: 3,
    Kind.TOKENS_EXPIRED: 4,
    Kind.RATE_LIMITED: 2,
    Kind.HUGE_FRAME: 2,
    Kind.BLACKOUT: 3,
    Kind.HANDSHAKES_REFUSED: 3,
    Kind.JOINS_SLOW: 2,
    Kind.JOINS_MUTE: 2,
    Kind.HEARTBEATS_MUTE: 2,
    Kind.AGENT_KILLED: 5,
    Kind.AGENT_SUSPENDED: 3,
    Kind.MACHINE_REPLACED: 2,
    Kind.DEV_SERVER_KILLED: 4,
    Kind.DRIFT: 5,
    Kind.PROJECT_HOSTILE: 3,
    Kind.DISK_FULL: 2,
    Kind.NO_INODES: 2,
    Kind.CLOCK_JUMPED: 2,
    Kind.HISTORY_REPLACED: 2,
    Kind.PROJECT_DELETED: 2,
    Kind.CONNECTIONS_KILLED: 2,
    Kind.DATABASE_CRASHED: 1,
    Kind.ORCHESTRATOR_RESTARTED: 1,
    Kind.ORCHESTRATOR_KILLED: 1,
    Kind.SUPABASE_KILLED: 1,
}
"""How many of each are in the deck of 81: small faults often, those that end a watched process seldom, so that its life
is long enough to see it grow."""

ENDS_A_SERVER = frozenset({Kind.ORCHESTRATOR_RESTARTED, Kind.ORCHESTRATOR_KILLED, Kind.SUPABASE_KILLED})
"""They are among the first `EARLY` of a deck: what follows in ten minutes is long enough to see the servers grow."""

EARLY = 10

ENDS_AN_AGENT = frozenset({Kind.AGENT_KILLED, Kind.MACHINE_REPLACED})
"""They meet agents of odd numbers only: half of the fleet lives from the start to the stop."""


@dataclass(frozen=True, slots=True)
class Settings:
    """One soak. Times in seconds."""

    seed: int
    minutes: float = 10.0
    agents: int = 20
    vite: int = 2
    """Agents whose project is the example, with a real Vite (140-250 MB each). The others serve with a small server."""
    fault_every: float = 7.0
    """On average, of work; no wait is longer than two of them."""
    longest: float = 6.0
    """Of what lasts a while; some kinds last a multiple of it."""
    check_every: float = 90.0
    """Of work between two looks at equality."""
    pause: float = 2.5
    """On average, between two actions of one editor."""
    last_word: float = 0.5
    """How often a look at equality comes after a last save without faults. Without one the loss of a last event has to
    be found by the agents' heartbeats, which takes up to 36 s."""
    patience: float = 300.0
    """For all to be equal. Of no consequence for who is quick: twenty agents share what cores there are."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `agent` and `project` are numbers; what a kind does not need it ignores."""

    at: float
    kind: Kind
    agent: int
    project: int
    seconds: float
    count: int
    wide: bool
    """All of them at once, not only one project's."""


def project_of(agent: int) -> int:
    """The project that an agent's session is of: every fifth agent shares its neighbour's, as two browsers do."""
    return agent - 1 if agent % 5 == 4 else agent


def projects(settings: Settings) -> list[int]:
    """The projects' numbers."""
    return sorted({project_of(agent) for agent in range(settings.agents)})


def draw(settings: Settings) -> Iterator[Fault]:
    """The faults in order, for ever."""
    dice = random.Random(f"faults {settings.seed}")
    mortal = [agent for agent in range(settings.agents) if agent % 2] or [0]
    at = 0.0
    deck: list[Kind] = []
    while True:
        if not deck:
            deck = _shuffled(dice)
        at += dice.uniform(0, 2 * settings.fault_every)
        kind = deck.pop(0)
        yield Fault(
            at=at,
            kind=kind,
            agent=dice.choice(mortal) if kind in ENDS_AN_AGENT else dice.randrange(settings.agents),
            project=dice.choice(projects(settings)),
            seconds=dice.uniform(settings.longest / 12, settings.longest),
            count=dice.randrange(1, 9),
            wide=dice.random() < 0.3,
        )


def _shuffled(dice: random.Random) -> list[Kind]:
    """A deck: every kind once, then the others that its weight has."""
    once = [kind for kind in DECK if kind not in ENDS_A_SERVER]
    dice.shuffle(once)
    for kind in sorted(ENDS_A_SERVER):
        once.insert(dice.randrange(EARLY - 2), kind)
    rest = [kind for kind, times in DECK.items() for _ in range(times - 1)]
    dice.shuffle(rest)
    return [*once, *rest]
