"""Collects orphaned processes, whether the agent is PID 1 or not, and turns stop signals into one call.

In Docker the agent is PID 1, under Fly's init it is not, on a laptop it is a child of a shell. The behaviour is the
same everywhere: `adopt` makes the agent the subreaper of its descendants, so that the children of a killed guard come
here instead of to init, and every SIGCHLD collects the dead children that no other code waits for.

asyncio waits for the processes it started itself. Those are never collected here: whoever starts one does so
inside `hold()` and registers it with `own`. RACE: a child may die between fork and registration; during a
hold nothing is collected at all, and the sweep follows when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from agent.devserver.guard import (
    FORWARDED,
    PR_SET_CHILD_SUBREAPER,
    PR_SET_DUMPABLE,
    descendants,
    prctl,
    processes,
)

STOP_SIGNALS = FORWARDED


class Reaper:
    """Collects orphans on the running loop. One for the whole process."""

    def __init__(self) -> None:
        self._own: set[int] = set()
        self._holds = 0
        self._missed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self.reaped = 0
        """Orphans collected so far."""

    def adopt(self) -> None:
        """Become a subreaper and collect orphans from now on. Call it on the running loop.

        Also closes `/proc/<agent>/environ` and `mem` to other processes of the same user: where the agent cannot
        give the project a user of its own, its credentials are at least not one `cat` away.
        """
        self._loop = asyncio.get_running_loop()
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_DUMPABLE, 0)
        self._loop.add_signal_handler(signal.SIGCHLD, self.sweep)
        self.sweep()

    def release(self) -> None:
        """Stop collecting."""
        if self._loop is not None:
            self._loop.remove_signal_handler(signal.SIGCHLD)
            self._loop = None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Collect nothing while a child of our own is being started and registered."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            if self._missed and not self._holds:
                self._missed = False
                self.sweep()

    def own(self, pid: int) -> None:
        """Leave the child `pid` to its caller, who waits for it."""
        self._own.add(pid)

    def disown(self, pid: int) -> None:
        """Note that `pid` was waited for."""
        self._own.discard(pid)

    def sweep(self) -> None:
        """Collect every dead child that is not our own."""
        if self._holds:
            self._missed = True
            return
        while (pid := _first_dead()) is not None:
            orphans = [pid] if pid not in self._own else [p for p in _dead_children() if p not in self._own]
            if not orphans:
                return
            for orphan in orphans:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(orphan, os.WNOHANG)
                    self.reaped += 1

    def kill_orphans(self) -> None:
        """Kill every descendant that no living guard watches: a guard that was killed cannot do it any more."""
        if sys.platform != "linux":
            return
        watched = self._own.union(*(descendants(pid) for pid in self._own))
        for pid in descendants(os.getpid()) - watched:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _first_dead() -> int | None:
    """Return a dead child without collecting it; None when there is none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found is not None and found.si_pid else None


def _dead_children() -> list[int]:
    """Return all zombies whose parent is this process; empty where there is no /proc."""
    if sys.platform != "linux":
        return []
    me = os.getpid()
    return [pid for pid, parent, dead in processes() if dead and parent == me]


@contextlib.contextmanager
def stop_signals(stop: Callable[[signal.Signals, int], None]) -> Iterator[None]:
    """Call `stop(signal, count)` on the loop for TERM, INT, HUP and QUIT.

    `count` is 1 for the first of them; from the second on the agent ends at once. For PID 1 the kernel drops a signal
    that has no handler, so without this `docker stop` would have no effect. Signals that came while they were blocked
    are delivered now.
    """
    loop = asyncio.get_running_loop()
    count = 0

    def received(number: signal.Signals) -> None:
        nonlocal count
        count += 1
        stop(number, count)

    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, received, number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
