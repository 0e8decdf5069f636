"""The settings of the link: every number with its reason. Pure. Seconds and bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final


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
    """The token in force is pushed again so often although the server has it. A server ignores an identical token
    without a word; one that has lost the channel answers `unmatched topic`, which nothing else would tell us."""
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
    """A channel that tells of expiry sooner than this after its join is not joined again on the same socket: the
    backoff stands between us and a loop of joins."""

    # Between two connections.
    backoff_first: float = 0.5
    backoff_most: float = 30.0
    """Full jitter up to min(most, first x 2^n): a thousand agents must not come back together, and the server closes
    whoever joins too fast (1001)."""
    backoff_least: float = 0.05
    """Never a tight loop, whatever the jitter."""
    stable_after: float = 30.0
    """A link that was joined this long starts with a fresh backoff."""
    refused_retry: float = 60.0
    """Between attempts with a credential that was turned away; spread over half to all of it."""

    # The token.
    renew_pause: float = 30.0
    """Least time between two renewals nobody asked for, so that a wrong clock cannot make a loop of them."""
    renew_within: float = 20.0
    """A whole renewal: an answer that trickles in must not hold the link up."""

    # The queue.
    queue_events: int = 4096
    queue_bytes: int = 64 * 1024 * 1024
    """Past either, everything that waits is dropped for one `Resync`: the database has it all."""

    # The clock.
    check_every: float = 1.0
    """How often the clock, a rotated token file and the state of the socket are checked."""
    clock_jump: float = 5.0
    """Wall clock against monotonic. Slewing never gets here; a suspended machine does."""


DEFAULTS: Final = LinkSettings()
