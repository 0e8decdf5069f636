"""Counts what one project does on the local realtime server, against the limits of a Supabase plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What one project may do. None: no limit, because nobody is billed here."""

    connections: int | None = 10_000
    """Open sockets; the hosted number of the Team plan."""
    joins_per_second: int | None = 2_500
    """Averaged over up to a minute, as the real counters are. Team plan."""
    messages_per_second: int | None = None
    """Counted one per broadcast and one per delivery, averaged likewise. Hosted: 100, 500, 2,500."""
    channels_per_connection: int = 100
    payload_bytes: int = 256_000
    """One broadcast's payload as JSON. The Free plan's, the strictest, so that what works here works there."""
    idle_seconds: float = 60.0
    """A socket without client data for so long is closed."""
    join_error_delay: float = 5.0
    """Seconds before a refused join is answered, which slows down clients that ask in a loop."""
    backlog_bytes: int = 16 * 1024 * 1024
    """Unsent bytes of one socket; beyond it the reader is too slow and is cut off."""
    replication_ready_seconds: float = 10.0
    """How long a join that asked for `replication_ready` waits for the database."""


class Rate:
    """Events per second, averaged over the seconds seen, at most the last 60."""

    def __init__(self, limit: int | None, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._buckets: deque[list[int]] = deque()
        self._total = 0

    def exceeded(self, more: int = 0) -> bool:
        """Count `more` events; whether the average is now above the limit."""
        if self._limit is None:
            return False
        second = int(self._clock())
        if not self._buckets or self._buckets[-1][0] != second:
            self._buckets.append([second, 0])
        self._buckets[-1][1] += more
        self._total += more
        while self._buckets[0][0] <= second - 60:
            self._total -= self._buckets.popleft()[1]
        return self._total / (second - self._buckets[0][0] + 1) > self._limit
