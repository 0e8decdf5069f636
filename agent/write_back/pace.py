"""Says when the next offer may go out, and how large it may be: bounds, and a growing wait after failures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from agent.core.errors import AgentError, SessionGone, Superseded
from agent.retry import Backoff
from agent.telemetry.logging import get_logger

log = get_logger("write_back")

MOST_PATHS: Final = 50
"""Of one offer."""
MOST_A_MINUTE: Final = 30
"""Offers; the orchestrator counts, too."""
BACKOFF: Final = Backoff(first=0.5, most=60.0, least=0.2)
GONE_RETRY: Final = 60.0
"""Seconds after an answer that says that the session is over, or may give nothing back: the heartbeat ends it."""


@dataclass(slots=True)
class Pace:
    """Attributes:
    clock: gives monotonic seconds.
    most: paths of the next offer.
    failure: why the latest offer had no answer.
    """

    clock: Callable[[], float]
    most: int = MOST_PATHS
    failure: str = ""
    _failures: int = 0
    _not_before: float = 0.0
    _sent: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_A_MINUTE))

    def next(self) -> float:
        """Return when the next offer may go out."""
        full = len(self._sent) == MOST_A_MINUTE
        return max(self._not_before, self._sent[0] + 60.0 if full else 0.0)

    def sent(self) -> None:
        """Note that one goes out."""
        self._sent.append(self.clock())

    def answered(self) -> None:
        """Note that it was answered."""
        self._failures, self._not_before, self.failure = 0, 0.0, ""
        self.most = min(MOST_PATHS, self.most * 2)

    def wait(self, seconds: float, why: str = "") -> None:
        """Send none for so long."""
        self._not_before = max(self._not_before, self.clock() + seconds)
        self.failure = why or self.failure

    def failed(self, error: Exception) -> None:
        """Note that there was no answer; the same offer goes out again, whole, later each time."""
        self._failures += 1
        wait = BACKOFF.delay(self._failures, error if isinstance(error, AgentError) else None)
        if isinstance(error, SessionGone | Superseded):
            wait = GONE_RETRY
        self.wait(wait, str(error))
        log.warning("write_back.unanswered", why=self.failure, wait=round(wait, 2))
