"""Being PID 1, a subreaper, or neither: orphans are collected, signals become one call.

In Docker the agent is PID 1, under Fly's init it is not, on a laptop it is a child of a shell. The behaviour
is the same everywhere: `adopt` makes the agent the subreaper of its descendants, so that what a dying guard
leaves behind comes here instead of to init, and every SIGCHLD collects the dead that nobody else waits for.

asyncio waits for the processes it started itself. Those are never collected here: whoever starts one does so
inside `hold()` and registers it with `own`. RACE: a child may die between fork and registration; while a
hold lasts nothing is collected at all, and the sweep is made up for at its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator

from agent.devserver.guard import FORWARDED, PR_SET_CHILD_SUBREAPER, PR_SET_DUMPABLE, descendants, prctl

STOP_SIGNALS = FORWARDED


class Reaper:
    """Collects orphans on the running loop. One a process."""

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
        """`pid` has somebody who waits for it."""
        self._own.add(pid)

    def disown(self, pid: int) -> None:
        """`pid` has been waited for."""
        self._own.discard(pid)

    def sweep(self) -> None:
        """Collect every dead child that is not our own."""
        if self._holds:
            self._missed = True
            return
        while (pid := _first_dead()) is not None:
            strangers = [pid] if pid not in self._own else [p for p in _dead_children() if p not in self._own]
            if not strangers:
                return
            for stranger in strangers:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(stranger, os.WNOHANG)
                    self.reaped += 1

    def kill_strangers(self) -> None:
        """Kill what was left to us: a guard that was killed itself cannot do it any more."""
        if sys.platform != "linux":
            return
        watched = self._own.union(*(descendants(pid) for pid in self._own))
        for pid in descendants(os.getpid()) - watched:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _first_dead() -> int | None:
    """A dead child, left in place; None when there is none."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return found.si_pid if found is not None and found.si_pid else None


def _dead_children() -> list[int]:
    """All zombies whose parent is this process; empty where there is no /proc."""
    if sys.platform != "linux":
        return []
    me = str(os.getpid()).encode()
    dead = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as stat:
                    state, parent = stat.read().rpartition(b")")[2].split()[:2]
            except OSError:
                continue
            if state == b"Z" and parent == me:
                dead.append(int(name))
    return dead


@contextlib.contextmanager
def stop_signals(stop: Callable[[signal.Signals, int], None]) -> Iterator[None]:
    """Call `stop(signal, count)` on the loop for TERM, INT, HUP and QUIT.

    `count` is 1 for the first of them, 2 for the second: the one that means *now*. As PID 1 a signal without
    a handler is dropped by the kernel, so this is what makes `docker stop` work at all. Those that came while they
    were blocked come now.
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
