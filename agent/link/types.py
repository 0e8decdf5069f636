"""Holds what the modules of the link share: the events of a channel, the link's state machine, and its settings. Pure.

The state machine is a table of states, causes, and where each cause leads. A cause that has no row in the current
state is late, and is ignored on purpose. Every setting has its reason; they are seconds and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Literal, NamedTuple


class Received(NamedTuple):
    """An application event on our topic.

    A tuple, because one is made for every message, in half the time of a frozen dataclass.
    """

    event: str
    payload: dict[str, object]
    at: float
    """When its frame was read, Unix seconds."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The server accepted our join: broadcasts arrive from here on, those before it may be lost."""


@dataclass(frozen=True, slots=True)
class ReplicationReady:
    """The server's own feed from the database is up: broadcasts from before that may be lost."""


@dataclass(frozen=True, slots=True)
class TokenExpired:
    """The server closed the channel because the token expired; the socket stays, and a new token joins again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The server refused the token for another reason than its age."""

    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """The socket or its channel is of no use any more: close it and open another."""

    cause: str
    """One word, for metrics."""
    reason: str
    """A sentence, for a person."""


ChannelEvent = Received | Joined | ReplicationReady | TokenExpired | Refused | Dropped

ErrorKind = Literal["expired", "credential", "rate_limited", "other"]

_CREDENTIAL_WORDS: Final = (
    "Unauthorized",
    "InvalidJWT",
    "MalformedJWT",
    "JwtSign",
    "JWT signature",
    "JWT signer",
    "valid JWT",
    "`role` and `exp`",
    "permission",
    "Token expiration time is invalid",
)
"""What the server's texts contain when it does not accept a credential (supabase/realtime: realtime_channel.ex)."""


def classify_error(reason: str) -> ErrorKind:
    """Return what an error text of the server means. The protocol has no codes for errors, only texts."""
    if "has expired" in reason:
        return "expired"
    if any(word in reason for word in _CREDENTIAL_WORDS):
        return "credential"
    if "Too many" in reason or "RateLimit" in reason:
        return "rate_limited"
    return "other"


class LinkState(StrEnum):
    """What the link is doing (protocol: states of the link)."""

    CONNECTING = "connecting"
    JOINING = "joining"
    CATCHING_UP = "catching_up"
    LIVE = "live"
    BACKOFF = "backoff"
    REFUSED = "refused"


class Cause(StrEnum):
    """What moves the link from one state to another."""

    OPENED = "opened"
    """The handshake succeeded and the join is sent."""
    JOINED = "joined"
    """The server answered our join with ok."""
    CAUGHT_UP = "caught_up"
    """A catch-up succeeded that began after everything we may have missed, and the server's replication is ready."""
    BEHIND = "behind"
    """Something may have been missed on a joined channel: the queue overflowed, replication (re)started, the clock
    jumped."""
    EXPIRED = "expired"
    """The token expired; the socket stays and is joined again with the next token."""
    LOST = "lost"
    """The socket or the channel is of no use any more."""
    REFUSED = "refused"
    """A credential was refused: the same one is tried again only after a long pause."""
    RETRY = "retry"
    """The delay is over, or a new token came."""


TRANSITIONS: Final[Mapping[tuple[LinkState, Cause], LinkState]] = MappingProxyType(
    {
        (LinkState.CONNECTING, Cause.OPENED): LinkState.JOINING,
        (LinkState.CONNECTING, Cause.LOST): LinkState.BACKOFF,
        (LinkState.CONNECTING, Cause.REFUSED): LinkState.REFUSED,
        (LinkState.JOINING, Cause.JOINED): LinkState.CATCHING_UP,
        (LinkState.JOINING, Cause.EXPIRED): LinkState.JOINING,
        (LinkState.JOINING, Cause.LOST): LinkState.BACKOFF,
        (LinkState.JOINING, Cause.REFUSED): LinkState.REFUSED,
        (LinkState.CATCHING_UP, Cause.CAUGHT_UP): LinkState.LIVE,
        (LinkState.CATCHING_UP, Cause.BEHIND): LinkState.CATCHING_UP,
        (LinkState.CATCHING_UP, Cause.EXPIRED): LinkState.JOINING,
        (LinkState.CATCHING_UP, Cause.LOST): LinkState.BACKOFF,
        (LinkState.CATCHING_UP, Cause.REFUSED): LinkState.REFUSED,
        (LinkState.LIVE, Cause.BEHIND): LinkState.CATCHING_UP,
        (LinkState.LIVE, Cause.EXPIRED): LinkState.JOINING,
        (LinkState.LIVE, Cause.LOST): LinkState.BACKOFF,
        (LinkState.LIVE, Cause.REFUSED): LinkState.REFUSED,
        (LinkState.BACKOFF, Cause.RETRY): LinkState.CONNECTING,
        (LinkState.REFUSED, Cause.RETRY): LinkState.CONNECTING,
    }
)

WITH_SOCKET: Final = frozenset({LinkState.JOINING, LinkState.CATCHING_UP, LinkState.LIVE})
"""States in which a socket is open."""

JOINED_STATES: Final = frozenset({LinkState.CATCHING_UP, LinkState.LIVE})

Observer = Callable[[LinkState, Cause, LinkState, str], None]
"""Called after every transition with the state left, the cause, the state entered, and the reason in words."""


class LinkStateMachine:
    """Holds the state of one link across all its connections, and the reason of the last transition.

    A joined link is live when two things are true: a catch-up succeeded that began after everything that may have been
    missed (`caught_up`), and what the server sends is complete (`feed_ready`).
    """

    def __init__(self, observe: Observer | None = None) -> None:
        self.state = LinkState.CONNECTING
        self.why = "started"
        self._observe = observe
        self._caught_up = False
        self._feed_ready = False

    def move(self, cause: Cause, why: str) -> bool:
        """Follow the table. Returns False when `cause` is late, and then nothing happened."""
        target = TRANSITIONS.get((self.state, cause))
        if target is None:
            return False
        source, self.state, self.why = self.state, target, why
        if self._observe is not None:
            self._observe(source, cause, target, why)
        return True

    def joined(self, why: str, *, feed_ready: bool) -> None:
        """Note that the server accepted the join. `feed_ready`: what it sends is complete from here on."""
        self._caught_up = False
        self._feed_ready = feed_ready
        self.move(Cause.JOINED, why)

    def feed_ready(self) -> None:
        """Note that what the server sends is complete from here on."""
        self._feed_ready = True
        self._become_live_if_complete()

    def behind(self, why: str) -> None:
        """Note that something may have been missed: only the next catch-up makes the link live again."""
        if self.state in JOINED_STATES:
            self._caught_up = False
            self.move(Cause.BEHIND, why)

    def caught_up(self) -> None:
        """Note that a catch-up succeeded which began after the link fell behind."""
        if self.state is LinkState.CATCHING_UP:
            self._caught_up = True
            self._become_live_if_complete()

    def _become_live_if_complete(self) -> None:
        if self._caught_up and self._feed_ready:
            self.move(Cause.CAUGHT_UP, "caught up")


@dataclass(frozen=True, slots=True)
class Timing:
    """The deadlines of the channel protocol (`link.channel`)."""

    heartbeat_every: float = 20.0
    """The server closes a socket that was silent for 60 s; two heartbeats may be lost before that."""
    heartbeat_within: float = 10.0
    """An unanswered heartbeat older than this means a dead socket, whatever TCP says."""
    join_within: float = 20.0
    """Join errors take 5 s by design and a cold tenant longer. A late reply is never waited for on a second join."""
    replication_within: float = 5.0
    """A server that has not said `Replication connection established` by then is taken for one that never says it.
    Where it says it later after all, the link has fallen behind."""
    probe_every: float = 60.0
    """The token in force is pushed again so often although the server has it. A server ignores an identical
    token; only to such a push does one that has lost the channel answer `unmatched topic`."""
    late_tick: float = 1.0
    """A deadline noticed this late was missed by our own stalled loop: unread frames get this much time first."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """The settings of the link, with the protocol's deadlines in `timing`."""

    timing: Timing = field(default_factory=Timing)

    # One connection.
    open_within: float = 10.0
    """TCP, TLS and the handshake together."""
    close_within: float = 1.0
    """A closing handshake, begun by either side; a dead peer must not hold up the drain or a new connection."""
    max_frame: int = 8 * 1024 * 1024
    """The server sends at most 5,000,000 bytes in a frame; the `websockets` default of 1 MiB would close."""
    rejoin_least: float = 5.0
    """A channel that reports expiry sooner than this after its join is not joined again on the same socket, so that the
    backoff prevents a loop of joins."""

    # Between two connections.
    backoff_first: float = 0.5
    backoff_most: float = 30.0
    """Full jitter up to min(most, first x 2^n): a thousand agents must not come back together, and the server closes
    whoever joins too fast (1001)."""
    backoff_least: float = 0.05
    """No tight loop, whatever the jitter."""
    stable_after: float = 30.0
    """A link that was joined this long starts with a fresh backoff."""
    refused_retry: float = 60.0
    """Between attempts with a credential that was refused; spread over half to all of it."""

    # The token.
    renew_pause: float = 30.0
    """Least time between two renewals that no server asked for, so that a wrong clock does not make a loop of them."""
    renew_within: float = 20.0
    """A whole renewal, whose answer may come byte by byte."""

    # The queue.
    queue_events: int = 4096
    queue_bytes: int = 64 * 1024 * 1024
    """Past either, everything that waits is replaced by one `Resync`: the database has it all."""

    # The clock.
    check_every: float = 1.0
    """How often the clock, a rotated token file and the state of the socket are checked."""
    clock_jump: float = 5.0
    """Wall clock against monotonic. Slewing never gets here; a suspended machine does."""


DEFAULTS: Final = LinkSettings()
