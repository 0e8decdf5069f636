"""Runs an event loop whose clock jumps over idle time: hours pass in seconds, over real sockets.

When nothing is ready to run and no socket has anything to say, the loop does not wait for its next timer: it moves
its clock there. `loop.time()` is what asyncio's timeouts and sleeps go by, so everything that uses them lives in
simulated time; code that asks `time` itself does not. Work in the loop's threads takes no simulated time.

A replay as fast as it goes runs in it, and so do the tests whose deadlines must not depend on how busy a machine is.
"""

from __future__ import annotations

import asyncio
import os
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SETTLE = 4
"""How often the kernel is asked again, the processor given up in between, before time moves on: what was just
written to the loopback has arrived then. Were it ever late, it would arrive one timer later in simulated time."""

STUCK = 10.0
"""Real seconds without a timer or a byte after which the simulation is taken for deadlocked."""


class SimulatedLoop(asyncio.SelectorEventLoop):
    """A selector loop that jumps over idle time. `now` starts at 0 and is in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.in_threads = 0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self.in_threads += 1
        future.add_done_callback(self._back)
        return future

    def _back(self, _: asyncio.Future[Any]) -> None:
        self.in_threads -= 1


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is not None and timeout <= 0:
            return super().select(0)
        for _ in range(SETTLE):
            ready = super().select(0)
            if ready:
                return ready
            os.sched_yield()
        if self._loop.in_threads:
            return super().select(STUCK)
        if timeout is None:
            ready = super().select(STUCK)
            if not ready:
                raise RuntimeError("simulated time stands still: no timer, and no socket has anything to say")
            return ready
        self._loop.now += timeout
        return []


def simulate(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` in simulated time."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(main)
