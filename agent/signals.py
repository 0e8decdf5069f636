"""What comes out of the link: events, and orders to catch up; and the queue they wait in.

`EventSource` is the seam: whatever can say "this happened" and "you may have missed something" can stand in for
Realtime.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from agent.linkstate import LinkState
from agent.meanings import Broadcast
from agent.model import Problem

Received = Broadcast
"""An application event: `event`, `payload`, and `at`, Unix seconds when its frame was read."""


@dataclass(frozen=True, slots=True)
class Resync:
    """Something may have been missed: catch up from the database, then call `caught_up`.

    `reason` is one word for metrics: joined, replication_ready, overflow.
    """

    reason: str


Signal = Received | Resync


class EventSource(Protocol):
    """Where events come from: all that the rest of the agent knows of the link.

    `agent.linkloop.LinkLoop` is one over any transport; a replay has one without any.
    """

    @property
    def state(self) -> LinkState:
        """What the link is doing."""

    @property
    def since(self) -> float:
        """Since when it has been doing that, Unix seconds."""

    async def run(self) -> None:
        """Own the connection, for ever; ends only by cancellation."""

    async def receive(self) -> Signal:
        """The next signal, in order."""

    def receive_now(self) -> Signal | None:
        """The next signal if one is waiting: what arrived together is planned together."""

    def caught_up(self) -> None:
        """One catch-up succeeded that began after the last `Resync` was received."""

    def doubt(self, reason: str) -> None:
        """Something came by another way that should have come by this one: make sure the link is not deaf."""

    def problems(self) -> tuple[Problem, ...]:
        """What a person should see of the link now."""

    def report(self) -> dict[str, object]:
        """What `/status` shows of the link; no secret.

        Always there: `why`, how the state came about; `queue_depth`, `clock_jumps` and `refusals` (counts by reason),
        which are metrics too.
        """


class SignalQueue:
    """Signals in order, bounded in number and bytes; past a bound all of them become one `Resync`."""

    def __init__(self, most_events: int, most_bytes: int) -> None:
        self._most_events = most_events
        self._most_bytes = most_bytes
        self._waiting: deque[tuple[Signal, int]] = deque()
        self._bytes = 0
        self._filled = asyncio.Event()
        self.resyncs_waiting = 0
        self.overflows = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, event: Received, size: int) -> bool:
        """Add an event of `size` bytes; False: it overflowed, and a `Resync` stands in for all that waited."""
        if len(self._waiting) >= self._most_events or self._bytes + size > self._most_bytes:
            self._waiting.clear()
            self._bytes = self.resyncs_waiting = 0
            self.overflows += 1
            self.resync("overflow")
            return False
        if not self._waiting:
            self._filled.set()
        self._waiting.append((event, size))
        self._bytes += size
        return True

    def resync(self, reason: str) -> None:
        """Add the order to catch up, unless the last thing in the queue already is one."""
        if not self._waiting or not isinstance(self._waiting[-1][0], Resync):
            self._waiting.append((Resync(reason), 0))
            self.resyncs_waiting += 1
            self._filled.set()

    async def get(self) -> Signal:
        """The oldest, waiting for one."""
        while (signal := self.get_now()) is None:
            self._filled.clear()
            await self._filled.wait()
        return signal

    def get_now(self) -> Signal | None:
        """The oldest, if there is one."""
        if not self._waiting:
            return None
        signal, size = self._waiting.popleft()
        self._bytes -= size
        if isinstance(signal, Resync):
            self.resyncs_waiting -= 1
        return signal
