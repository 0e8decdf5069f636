"""Forgets conflicts and proposals that nobody decided for a month (`preview.settings.kept_changes_kept`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import psycopg
import structlog

from orchestrator_stub.platform.database import Pool, fetch_one

log = structlog.get_logger("write_back")

AT_ONCE: Final = 500
"""Rows of one step."""
EVERY: Final = 3600.0
"""Seconds between two looks: what is a month old may be an hour older."""


class KeptUpkeep:
    """Does one orchestrator's share. `clock` gives seconds that only grow."""

    def __init__(self, pool: Pool, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._due = float("-inf")

    async def step(self) -> bool:
        """Take one bounded step. False: there is nothing to do now. Raises `psycopg.OperationalError`."""
        if self._clock() < self._due:
            return False
        try:
            row = await fetch_one(self._pool, "select preview.forget_kept(%s)", (AT_ONCE,))
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            log.warning("write_back.upkeep_postponed", reason=" ".join(str(error).split()))
            row = None
        gone = row[0] if row else 0
        if gone:
            log.info("write_back.forgotten", rows=gone)
        if gone == AT_ONCE:
            return True
        self._due = self._clock() + EVERY
        return False
