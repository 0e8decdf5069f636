"""The state machine of the link, as a table: states, causes, and where each cause leads. Pure.

A cause that has no row in the current state is late, and is ignored on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Final


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
    """A credential was turned away: the same one is not tried again in a hurry."""
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
