"""Seeing from outside when a file is there: the kernel's own word, the same for every contestant.

A directory is watched with inotify. A file has landed when it was renamed into place, or closed after writing by one
who writes in place, and what then stands under its name is what was sent. Looking every millisecond instead would be a
millisecond off, which is more than one file takes. Of many files that is how it is done until one is left: being woken
by each of five hundred takes the processor from the very programs that are timed.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import struct
import time
from collections.abc import Mapping
from pathlib import Path

IN_CLOSE_WRITE = 0x00000008
IN_MOVED_TO = 0x00000080
IN_Q_OVERFLOW = 0x00004000
"""From `sys/inotify.h`."""

_HEAD = struct.Struct("iIII")
"""An event without its name: watch, mask, cookie, length of the name."""


BETWEEN_LOOKS = 0.001
"""Seconds, while more than one file is missing."""


class NotLanded(Exception):
    """Files that were sent did not come in time."""


class Landing:
    """One watched directory. Only names and sizes are looked at while the clock runs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if (
            self.fd < 0
            or libc.inotify_add_watch(self.fd, os.fsencode(directory), IN_CLOSE_WRITE | IN_MOVED_TO) < 0
        ):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(directory))
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    def close(self) -> None:
        os.close(self.fd)

    def forget(self) -> None:
        """Drop what was seen so far."""
        while self.read():
            pass

    def wait(self, wanted: Mapping[str, int], seconds: float) -> float:
        """The moment (`perf_counter`) when the last of `wanted`, sizes by name, was there. Raises `NotLanded`."""
        look = _Look(self, wanted)
        deadline = time.perf_counter() + seconds
        while (landed := look.again()) is None:
            if look.many:
                time.sleep(BETWEEN_LOOKS)
            left = deadline - time.perf_counter()
            if left <= 0 or not self._poll.poll(left * 1000):
                raise look.failure(seconds)
        return landed

    async def arrival(self, wanted: Mapping[str, int], seconds: float) -> float:
        """`wait`, on an event loop that has other work."""
        look = _Look(self, wanted)
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self.fd, readable.set)
        try:
            async with asyncio.timeout(seconds):
                while (landed := look.again()) is None:
                    if look.many:
                        loop.remove_reader(self.fd)
                        await asyncio.sleep(BETWEEN_LOOKS)
                        loop.add_reader(self.fd, readable.set)
                    readable.clear()
                    await readable.wait()
        except TimeoutError:
            raise look.failure(seconds) from None
        finally:
            loop.remove_reader(self.fd)
        return landed

    def size(self, name: str) -> int | None:
        """Bytes; None when nothing is there."""
        try:
            return os.stat(self.directory / name).st_size
        except FileNotFoundError:
            return None

    def read(self) -> list[str]:
        """The names of which there was news."""
        try:
            events = os.read(self.fd, 65536)
        except BlockingIOError:
            return []
        names, at = [], 0
        while at < len(events):
            _, mask, _, length = _HEAD.unpack_from(events, at)
            if mask & IN_Q_OVERFLOW:
                raise NotLanded("the kernel dropped events: raise fs.inotify.max_queued_events")
            at += _HEAD.size + length
            names.append(os.fsdecode(events[at - length : at].rstrip(b"\0")))
        return names


class _Look:
    """What of `wanted` is still missing. Each name has to be heard of; then, once, what stands under all of them is
    looked at: a look at each when it comes would take the time from those that are timed."""

    def __init__(self, landing: Landing, wanted: Mapping[str, int]) -> None:
        self._landing = landing
        self._wanted = len(wanted)
        self._missing = dict(wanted)
        self._unheard = set(wanted)

    @property
    def many(self) -> bool:
        """Whether more than one is still to be heard of."""
        return len(self._unheard) > 1

    def again(self) -> float | None:
        """The moment when everything was there; None while it is not."""
        self._unheard.difference_update(self._landing.read())
        if self._unheard:
            return None
        now = time.perf_counter()
        self._missing = {
            name: size for name, size in self._missing.items() if self._landing.size(name) != size
        }
        self._unheard = set(self._missing)
        return None if self._missing else now

    def failure(self, seconds: float) -> NotLanded:
        """What to say when it is too late."""
        missing = len(self._unheard)
        return NotLanded(f"lost {missing} of {self._wanted} files: they were not there after {seconds:.0f} s")
