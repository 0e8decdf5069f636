"""Runs long work in steps, so that other tasks of the event loop have their turn between two of them.

Reading a project means reading files whose number and size others choose. So that work is a generator which yields
where it may be interrupted. `in_turns` runs it on the event loop; `at_once` runs it in a thread, or where no other task
may see it half done. `in_thread` is for what nothing else may touch meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""Work that returns a `T`."""

TURN = 0.005
"""Seconds for which work keeps the event loop: nobody sees a save wait so long."""


def at_once(steps: Steps[T]) -> T:
    """Run all steps without a pause."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


async def in_turns(steps: Steps[T], pause: Callable[[], None] = lambda: None) -> T:
    """Run all steps, and let other tasks run after each `TURN`. `pause` is called before they do."""
    over = time.monotonic() + TURN
    try:
        while True:
            next(steps)
            if time.monotonic() >= over:
                pause()
                await asyncio.sleep(0)
                over = time.monotonic() + TURN
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()


async def in_thread(work: Callable[[], T]) -> T:
    """Run `work` in a thread, and to its end even when cancelled: what it works on is closed only afterwards."""
    running = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait([running])
        raise
