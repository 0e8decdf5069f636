"""Records when each part of a start ended.

hydrated     the first tree is on the disk
modules      node_modules is what the project wants
dev_server   its process runs
first_page   it answers
shown        a browser has a revision on the screen; only where somebody looks
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, get_args

Part = Literal["hydrated", "modules", "dev_server", "first_page", "shown"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)


def process_age() -> float:
    """Return the seconds since the system started this process; where it does not say, processor seconds used."""
    try:
        stat = Path("/proc/self/stat").read_text()
        ticks = int(stat.rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.process_time()


class StartTimeline:
    """The parts of one start. `age`: seconds since the process was started; `wall`: Unix seconds."""

    def __init__(self, age: Callable[[], float] = process_age, wall: Callable[[], float] = time.time) -> None:
        self._age = age
        self._wall = wall
        self._done: dict[Part, float] = {}
        self.on_part: Callable[[Part, float, float], None] = lambda part, since, until: None
        """Told of each part, and from when until when it took, in Unix seconds."""

    def mark(self, part: Part) -> None:
        """Note that a part is done. Only the first time counts, and nothing after the first page but `shown`."""
        if part in self._done or ("first_page" in self._done and part != "shown"):
            return
        before = max(self._done.values(), default=0.0)
        age, now = self._age(), self._wall()
        self._done[part] = age
        self.on_part(part, now - max(0.0, age - before), now)

    def report(self) -> dict[str, float]:
        """Return the seconds from the start of the process to the end of each part that is done."""
        return {part: round(self._done[part], 3) for part in PARTS if part in self._done}
