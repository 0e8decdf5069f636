"""Writes the log from a thread, so that nobody waits for who reads it.

Standard output is a pipe of the platform's, or a file on a disk. A reader that stalls, a full disk and a reader that
has gone would stop the event loop, and with it saves, health and SIGTERM. So lines are handed to a thread; what it
cannot get rid of is bounded, dropped and counted.
"""

from __future__ import annotations

import atexit
import os
import select
import threading
import time
from collections import deque
from contextlib import suppress

from agent.telemetry.logging import get_logger

MOST_WAITING = 2**20
"""Bytes of lines that wait. A log that stands still for a second has some hundred kilobytes."""

GATHER = 0.002
"""Seconds in which lines gather before they are written: a burst is one write, and does not wake the thread 500 times
while the event loop has other work."""

DRAIN_WITHIN = 1.0
"""Seconds that the end of the process waits for its last lines."""

log = get_logger("log")


class LogWriter:
    """A text file whose `write` returns at once. Thread-safe. `descriptor` is where the lines go; it is not closed."""

    def __init__(self, descriptor: int, *, most: int = MOST_WAITING) -> None:
        self._descriptor = descriptor
        self._most = most
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._waiting = 0
        """Bytes not written yet, with those the thread has in hand."""
        self._draining = False
        self._told = 0
        self.dropped = 0
        """Lines that were not written, because too many waited or because the system refused them."""
        threading.Thread(target=self._run, name="log", daemon=True).start()
        atexit.register(self.drain)

    def write(self, text: str) -> int:
        """Take one line, with its end; dropped when too much waits already."""
        line = text.encode("utf-8", "backslashreplace")
        with self._changed:
            if self._waiting + len(line) > self._most:
                self.dropped += 1
            else:
                self._lines.append(line)
                self._waiting += len(line)
                if len(self._lines) == 1:
                    self._changed.notify_all()
        return len(text)

    def flush(self) -> None:
        """Do nothing; `drain` waits."""

    def drain(self, within: float = DRAIN_WITHIN) -> bool:
        """Wait until everything is written, at most `within` seconds. Returns whether it is."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._waiting, within)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
                gather = not self._draining
            if gather:
                time.sleep(GATHER)
            with self._changed:
                lines = list(self._lines)
                self._lines.clear()
            written = self._put(b"".join(lines))
            with self._changed:
                self._waiting -= sum(map(len, lines))
                if not written:
                    self.dropped += len(lines)
                news, self._told = self.dropped - self._told, self.dropped
                self._changed.notify_all()
            if written and news:
                log.warning("log.dropped", lines=news)

    def _put(self, content: bytes) -> bool:
        """Write all of it, however long that takes. Returns False when the system refuses."""
        rest = memoryview(content)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # whoever made the pipe made it non-blocking
                with suppress(OSError):
                    select.select([], [self._descriptor], [], 1.0)
            except OSError:
                return False
        return True
