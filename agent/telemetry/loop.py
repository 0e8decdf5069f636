"""Measures how long the event loop keeps everything else waiting.

Between two polls of its selector the loop runs callbacks, and nothing else has a turn: no save, no health, no signal.
The selector sees both ends of that time, so measuring costs two readings of the clock and wakes nobody. A machine that
sleeps, or an agent that is stopped, does so inside a poll nearly always, and is not counted.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import deque
from collections.abc import Callable

from agent.telemetry.logging import get_logger

log = get_logger("loop")

NOTED = 0.005
"""Seconds from which a turn is kept at all: `fs.turns.TURN`, which long work takes on purpose."""

LOGGED = 1.0
"""Seconds from which a turn is worth a line in the log."""

SLOT = 60.0
"""Seconds of a slot of the recent past."""

SLOTS = 5
"""Slots that are kept: several scrapes, of several scrapers, see the same stall."""


class LoopStalls:
    """The longest turns of one event loop, in seconds.

    Args:
        clock: what a turn is measured by. A test gives `time.thread_time`: on a machine with other work a turn takes
            as long as the system likes, and processor time is what the loop itself used.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.longest = 0.0
        """Since the start."""
        self._slots: deque[tuple[float, float]] = deque(maxlen=SLOTS)
        """Begin of the slot (the clock's time), and the longest turn in it."""

    def note(self, now: float, took: float) -> None:
        """Take in a turn that ended at `now`."""
        self.longest = max(self.longest, took)
        if self._slots and now - self._slots[-1][0] < SLOT:
            began, before = self._slots[-1]
            self._slots[-1] = began, max(before, took)
        else:
            self._slots.append((now, took))
        if took >= LOGGED:
            log.warning("loop.stalled", seconds=round(took, 3))

    def recent(self) -> float:
        """Return the longest turn of the last five minutes or so."""
        since = self.clock() - SLOT * SLOTS
        return max((took for began, took in self._slots if began >= since), default=0.0)

    def report(self) -> dict[str, float]:
        """For status."""
        return {
            "longest_stall_seconds": round(self.longest, 4),
            "recent_stall_seconds": round(self.recent(), 4),
        }


class _Selector(selectors.DefaultSelector):
    """The system's selector, which says how long nobody asked it."""

    def __init__(self, stalls: LoopStalls) -> None:
        super().__init__()
        self._stalls = stalls
        self._since: float | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        now = self._stalls.clock()
        if self._since is not None and (took := now - self._since) >= NOTED:
            self._stalls.note(now, took)
        ready = super().select(timeout)
        self._since = self._stalls.clock()
        return ready


class WatchedLoop(asyncio.SelectorEventLoop):
    """An event loop that knows its stalls. For `asyncio.Runner(loop_factory=WatchedLoop)`."""

    def __init__(self, stalls: LoopStalls | None = None) -> None:
        self.stalls = stalls or LoopStalls()
        super().__init__(_Selector(self.stalls))


def stalls_of_running_loop() -> LoopStalls | None:
    """Return what is known of the running loop; None of a loop that is not watched, as in a replay."""
    loop = asyncio.get_running_loop()
    return loop.stalls if isinstance(loop, WatchedLoop) else None
