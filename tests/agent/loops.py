"""Event loops that are measured: how long nothing else has a turn while something runs on them."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine

from agent.telemetry.loop import LoopStalls, WatchedLoop

STALL = 0.25
"""Seconds that nothing may keep the loop for."""


def longest_turn(work: Callable[[], Coroutine[object, object, object]]) -> float:
    """Run `work` on a loop of its own. Returns its longest turn in seconds of the thread's processor time, which other
    processes on the machine do not lengthen. What earlier tests left is kept from the garbage collector meanwhile: to
    go through all of it took 0.25 s in the middle of a turn.
    """
    stalls = LoopStalls(time.thread_time)
    gc.collect()
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=lambda: WatchedLoop(stalls)) as runner:
            runner.run(work())
    finally:
        gc.unfreeze()
    return stalls.longest
