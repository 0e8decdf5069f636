"""Work that others take turns with: it is written in steps, and stops between two of them.

Looking at a project means reading its files, and neither their number nor their size is ours to choose. So what looks
is a generator that yields wherever it may be left alone for a while. On the event loop `in_turns` runs it; `at_once` is
for a thread of its own, and for what must be seen whole by everybody else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Generator
from typing import TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]
"""Work that gives a `T` in the end."""

TURN = 0.005
"""Seconds for which work has the event loop to itself: a save that comes meanwhile is not seen to wait."""


def at_once(steps: Steps[T]) -> T:
    """Run all of it."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            result: T = end.value
            return result


async def in_turns(steps: Steps[T], pause: Callable[[], None] = lambda: None) -> T:
    """Run all of it, and let every other task have its turn whenever `TURN` is over. `pause` is called before that."""
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
