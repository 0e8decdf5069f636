"""Decides when to try again: full jitter, never sooner than the peer asked, and deadlines. On tenacity.

Full jitter waits at random between zero and a bound that doubles, so that a thousand agents that lost a peer together
do not come back to it together.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from typing import Final

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception_type,
    stop_after_attempt,
    wait_random_exponential,
)
from tenacity.wait import wait_base

from agent.core.errors import Unavailable

LONGEST_ASKED: Final = 300.0
"""Seconds. The most that `Retry-After` is believed: a wrong clock, or a gateway's page for a maintenance of an hour,
must not silence an agent for longer."""


class Backoff(wait_base):
    """Full jitter by the number of failures in a row, in seconds; also a wait strategy of tenacity."""

    def __init__(
        self, first: float, most: float, least: float = 0.0, *, at_once: tuple[type[Exception], ...] = ()
    ) -> None:
        """
        Args:
            first: the bound after one failure; it doubles with each.
            most: the bound at last. What the peer asks for may be more.
            least: never less, however the dice fall.
            at_once: errors after which nothing is waited for, because their cause is gone by then.
        """
        self._jitter = wait_random_exponential(multiplier=first, max=most, min=least)
        self._at_once = at_once

    def delay(self, failures: int, error: BaseException | None = None) -> float:
        """Return the seconds to wait after so many failures in a row, from 1; `error` is the latest."""
        state = RetryCallState(Retrying(), None, (), {})
        state.attempt_number = failures
        return self._after(state, error)

    def __call__(self, retry_state: RetryCallState) -> float:
        """Return the same, as tenacity calls it."""
        return self._after(retry_state, retry_state.outcome.exception() if retry_state.outcome else None)

    def _after(self, state: RetryCallState, error: BaseException | None) -> float:
        if isinstance(error, self._at_once):
            return 0.0
        return max(self._jitter(state), asked_wait(error))


def retrying(backoff: Backoff, *, attempts: int, on: tuple[type[Exception], ...]) -> AsyncRetrying:
    """Make what calls a coroutine function again after one of the errors `on`; the last is raised as it is."""
    return AsyncRetrying(
        stop=stop_after_attempt(attempts), wait=backoff, retry=retry_if_exception_type(on), reraise=True
    )


@asynccontextmanager
async def within(seconds: float, what: str, reason: str) -> AsyncIterator[None]:
    """Give the block a deadline. Raises `Unavailable(what, reason)` when it passes."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise Unavailable(what, reason) from None


def asked_wait(error: BaseException | None) -> float:
    """Return the seconds that the peer asked to wait; 0 when it did not."""
    return (error.retry_after or 0.0) if isinstance(error, Unavailable) else 0.0


def retry_after(value: str | None, now: float) -> float | None:
    """Read a `Retry-After` header in either form, as seconds to wait; None when absent or unreadable.

    `now`: Unix seconds.
    """
    if value is None:
        return None
    try:
        wait = float(value)
    except ValueError:
        moment = http_date(value)
        if moment is None:
            return None
        wait = moment - now
    return min(max(wait, 0.0), LONGEST_ASKED) if wait == wait else None


def http_date(value: str | None) -> float | None:
    """Read an HTTP date, as Unix seconds; None when absent or unreadable."""
    try:
        return None if value is None else parsedate_to_datetime(value).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
