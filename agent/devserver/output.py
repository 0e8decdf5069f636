"""Keeps what the dev server said last, for status and problems, and logs it up to a bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from agent.telemetry.logging import get_logger

OUTPUT_LINES = 200
"""Lines of output that are kept for status and problems."""
LOGGED_LINES = 100
"""Lines of output a second that go to the log, so that a loop that prints does not occupy the agent."""
log = get_logger("supervisor")


class OutputLog:
    """Keeps the last lines of the dev server's output, and logs them up to a bound."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._second = self._in_second = self._not_logged = 0
        self.lines: deque[str] = deque(maxlen=OUTPUT_LINES)

    def add(self, line: str) -> None:
        """Take one line."""
        self.lines.append(line)
        second = int(self._clock())
        if second != self._second:
            if self._not_logged:
                log.warning("dev_server.output_silenced", source="dev", lines=self._not_logged)
            self._second, self._in_second, self._not_logged = second, 0, 0
        self._in_second += 1
        if self._in_second > LOGGED_LINES:
            self._not_logged += 1
        elif line.strip():
            log.info("dev_server.output", source="dev", line=line)
