"""Defines what the rest of the agent sees of the link: signals, the queue they wait in, and `EventSource`.

A signal is an event or an order to catch up. Any transport that delivers events, and reports when some may be missing,
can replace Realtime.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from agent.core.model import Problem
from agent.link.types import LinkState
from agent.link.types import Received as Received


@dataclass(frozen=True, slots=True)
class Resync:
    """The order to catch up from the database, then to call `caught_up`: something may have been missed."""

    reason: str
    """One word, for metrics: joined, replication_ready, overflow, clock_jump."""


Signal = Received | Resync


class EventSource(Protocol):
    """A source of events: all that the rest of the agent knows of the link.

    `link.loop.LinkLoop` is one over any transport; a replay has one without any.
    """

    @property
    def state(self) -> LinkState:
        """What the link is doing."""

    @property
    def since(self) -> float:
        """Since when it has been doing that, Unix seconds."""

    async def run(self) -> None:
        """Hold the connection for ever; ends only by cancellation, or by a bug."""

    async def receive(self) -> Signal:
        """Return the next signal, in order; waits for one."""

    def receive_now(self) -> Signal | None:
        """Return the next signal if one waits, so that what arrived together is planned together."""

    def caught_up(self) -> None:
        """Note that a catch-up succeeded which began after the last `Resync` was received."""

    def suspect(self, reason: str) -> None:
        """Replace a connection that looks live and did not deliver what it should have."""

    def problems(self) -> tuple[Problem, ...]:
        """Return what a person should know is wrong with the link now."""

    def report(self) -> dict[str, object]:
        """Return what `/status` shows of the link; no secret.

        Always there: `why`, how the state came about; `queue_depth`, `clock_jumps` and `refusals` (counts by reason),
        which are metrics too.
        """


class SignalQueue:
    """A queue of signals, bounded in events and bytes; past a bound, one `Resync` replaces all that wait."""

    def __init__(self, most_events: int, most_bytes: int) -> None:
        """`most_events`, `most_bytes`: the bounds on what waits."""
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
        """Add an event of `size` bytes. Returns False when the queue was full, and now holds one `Resync` instead."""
        if len(self._waiting) >= self._most_events or self._bytes + size > self._most_bytes:
            self.overflow()
            return False
        if not self._waiting:
            self._filled.set()
        self._waiting.append((event, size))
        self._bytes += size
        return True

    def overflow(self) -> bool:
        """Replace all that waits by one `Resync`. Returns False when it is all that waits already."""
        if len(self._waiting) == 1 and self._waiting[0][0] == Resync("overflow"):
            return False
        self._waiting.clear()
        self._bytes = self.resyncs_waiting = 0
        self.overflows += 1
        self.resync("overflow")
        return True

    def resync(self, reason: str) -> None:
        """Add an order to catch up, unless the last signal in the queue already is one."""
        if not self._waiting or not isinstance(self._waiting[-1][0], Resync):
            self._waiting.append((Resync(reason), 0))
            self.resyncs_waiting += 1
            self._filled.set()

    async def get(self) -> Signal:
        """Remove and return the oldest signal; waits for one."""
        while (signal := self.get_now()) is None:
            self._filled.clear()
            await self._filled.wait()
        return signal

    def get_now(self) -> Signal | None:
        """Remove and return the oldest signal, if there is one."""
        if not self._waiting:
            return None
        signal, size = self._waiting.popleft()
        self._bytes -= size
        if isinstance(signal, Resync):
            self.resyncs_waiting -= 1
        return signal
