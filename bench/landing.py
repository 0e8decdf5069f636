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
        while self._read():
            pass

    def wait(self, wanted: Mapping[str, int], seconds: float) -> float:
        """The moment (`perf_counter`) when the last of `wanted`, sizes by name, was there. Raises `NotLanded`."""
        missing = dict(wanted)
        deadline = time.perf_counter() + seconds
        while missing:
            left = deadline - time.perf_counter()
            if len(missing) > 1:
                time.sleep(BETWEEN_LOOKS)
            if left <= 0 or not self._poll.poll(left * 1000):
                raise NotLanded(f"{len(missing)} of {len(wanted)} files did not come within {seconds:.0f} s")
            self._strike(missing)
        return time.perf_counter()

    async def arrival(self, wanted: Mapping[str, int], seconds: float) -> float:
        """`wait`, on an event loop that has other work."""
        missing = dict(wanted)
        loop = asyncio.get_running_loop()
        there = loop.create_future()

        def look() -> None:
            loop.remove_reader(self.fd)
            try:
                self._strike(missing)
            except NotLanded as error:
                there.set_exception(error)
                return
            if not missing:
                there.set_result(time.perf_counter())
            elif len(missing) > 1:
                later[:] = [loop.call_later(BETWEEN_LOOKS, loop.add_reader, self.fd, look)]
            else:
                loop.add_reader(self.fd, look)

        later: list[asyncio.TimerHandle] = []
        loop.add_reader(self.fd, look)
        try:
            async with asyncio.timeout(seconds):
                return float(await there)
        except TimeoutError:
            raise NotLanded(
                f"{len(missing)} of {len(wanted)} files did not come within {seconds:.0f} s"
            ) from None
        finally:
            for timer in later:
                timer.cancel()
            loop.remove_reader(self.fd)

    def _strike(self, missing: dict[str, int]) -> None:
        for name in self._read():
            if name in missing and self._size(name) == missing[name]:
                del missing[name]

    def _size(self, name: str) -> int | None:
        try:
            return os.stat(self.directory / name).st_size
        except FileNotFoundError:
            return None

    def _read(self) -> list[str]:
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
