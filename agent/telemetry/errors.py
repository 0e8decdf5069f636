"""Keeps a bug in one place from ending the agent: logs it with its traceback, counts it, and goes on or tries again.

What comes from outside is a value, a `Problem` or an `AgentError`, and its module says what follows. Any other
exception is a bug of ours. One that concerns a single path, event or reading is contained there (`Errors.contained`);
one that ends a task has it started again (`Errors.keep_running`). Both are counted by part, in `agent_errors_total` and
in `/status`. What the sync loop itself cannot contain ends the agent, since nothing is right without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal

from agent.core.errors import AgentError
from agent.retry import Backoff
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics

log = get_logger("errors")

Part = Literal[
    "apply",
    "catch-up",
    "dev-server",
    "drift",
    "event",
    "health",
    "heartbeat",
    "link",
    "memory",
    "record",
    "run-settings",
    "shadow",
    "sync",
    "write-back",
]
"""Where a bug was contained; the label of the metric."""

RESTART: Final = Backoff(first=0.5, most=30.0, least=0.1)
"""Between two starts of a task that failed. A bug that strikes at each start costs two starts a minute."""

STEADY_AFTER: Final = 60.0
"""Seconds for which a task must have run to count as started well."""


class Errors:
    """Counts the bugs that were contained, by part."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.counts: dict[Part, int] = {}
        """By part, those that there were."""
        self.latest: dict[Part, str] = {}
        """By part, the latest one's class and text."""

    def caught(self, part: Part, error: BaseException, **fields: object) -> None:
        """Log `error` with its traceback and count it. `fields` go into the log line."""
        self.counts[part] = self.counts.get(part, 0) + 1
        self.latest[part] = f"{type(error).__name__}: {error}"[:200]
        self._metrics.agent_errors.labels(part).inc()
        log.error("agent.bug", part=part, exc_info=error, **fields)

    @contextmanager
    def contained(
        self, part: Part, then: Callable[[], object] | None = None, **fields: object
    ) -> Iterator[None]:
        """Contain a bug in the block, and call `then` after one. An `AgentError` is no bug and passes."""
        try:
            yield
        except AgentError:
            raise
        except Exception as error:
            self.caught(part, error, **fields)
            if then is not None:
                then()

    async def keep_running(self, part: Part, start: Callable[[], Awaitable[None]]) -> None:
        """Run a task that is to run for ever; start it again, after a growing wait, when a bug ends it.

        Raises the `AgentError` that ends it on purpose.
        """
        failures = 0
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            try:
                return await start()
            except Exception as error:
                if (meant := _meant(error)) is not None:
                    raise meant from None
                failures = 1 if clock() - began > STEADY_AFTER else failures + 1
                wait = RESTART.delay(failures)
                self.caught(part, error, attempt=failures, wait=round(wait, 2))
                await asyncio.sleep(wait)

    def report(self) -> dict[str, dict[str, object]]:
        """What `/status` shows: by part, how many there were and the latest."""
        return {part: {"count": count, "latest": self.latest[part]} for part, count in self.counts.items()}


def _meant(error: BaseException) -> AgentError | None:
    """The `AgentError` that ends a task on purpose, alone or in a task group; None: it is a bug."""
    if isinstance(error, AgentError):
        return error
    if isinstance(error, BaseExceptionGroup):
        return next((found for each in error.exceptions if (found := _meant(each)) is not None), None)
    return None
