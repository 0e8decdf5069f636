"""How the link is held: every number with its reason. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines of the protocol, all in seconds."""

    heartbeat_every: float = 20.0
    """The server closes a socket that was silent for 60 s; two may be lost before that."""
    heartbeat_within: float = 10.0
    """An unanswered heartbeat older than this means a dead socket, whatever TCP says."""
    join_within: float = 20.0
    """Join errors take 5 s by design and a cold tenant longer. A late reply is never waited for on a second join."""
    replication_within: float = 5.0
    """How long to wait for `Replication connection established` before taking the server for one that does not
    say it. Where it comes later after all, it counts as having fallen behind."""
    probe_every: float = 60.0
    """How often the token in force is pushed again although the server has it. A server ignores an identical token
    without a word; one that has lost the channel answers `unmatched topic`, which nothing else would tell us."""
    late_tick: float = 1.0
    """A tick this late is our own lateness (a stalled loop): unread frames get this much time before judgement."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Every knob of the link but the protocol's deadlines. Seconds and bytes."""

    timing: Timing = field(default_factory=Timing)
    open_within: float = 10.0
    """For TCP, TLS and the handshake together."""
    backoff_first: float = 0.5
    backoff_most: float = 30.0
    """Full jitter between nothing and min(most, first x 2^n): a thousand agents must not come back together, and
    the server closes whoever joins too fast (1001)."""
    backoff_least: float = 0.05
    """Never a tight loop, however the dice fall."""
    stable_after: float = 30.0
    """A link live this long has earned a fresh backoff."""
    refused_retry: float = 60.0
    """Between attempts with a credential that was turned away; spread over half to all of it."""
    renew_pause: float = 30.0
    """Least time between two renewals nobody asked for, so that a wrong clock cannot make a loop of them."""
    renew_within: float = 20.0
    """For a whole renewal: an answer that trickles in must not hold the link up."""
    rejoin_least: float = 5.0
    """A channel that tells of expiry sooner than this after its join is not joined again on the same socket: the
    backoff stands between us and a loop of joins."""
    max_frame: int = 8 * 1024 * 1024
    """The server sends at most 5,000,000 bytes in a frame; the `websockets` default of 1 MiB would close."""
    queue_events: int = 4096
    queue_bytes: int = 64 * 1024 * 1024
    """Beyond either, everything waiting is dropped for one `Resync`: the database has it all."""
    clock_jump: float = 5.0
    """Wall clock against monotonic. Slewing never gets here; a suspended machine does."""
    look_every: float = 1.0
    """How often the clock and a rotated token file are looked at."""
    close_within: float = 1.0
    """For the closing handshake when we leave on our own; a dead peer must not hold up the drain."""


DEFAULTS: Final = LinkSettings()
