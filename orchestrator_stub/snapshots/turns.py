"""Looks after turns: ends those that nobody resumed, forgets those that are long over, and counts how turns end.

The database does all of it in short statements that pass by what another holds, so any number of orchestrators may. A
turn that is over is counted by one of them: it is marked in the statement that finds it, so the sum over all is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from orchestrator_stub.platform.database import Pool, fetch_one

log = structlog.get_logger("turns")

EVERY_SECONDS: Final = 15.0
"""Between two looks: as often as a scrape may ask."""

OUTCOMES: Final = ("ended", "abandoned", "reaped")

AT_ONCE: Final = 100
"""Turns in one statement."""

REAP: Final = "select preview.reap_turns(%s)"

COUNT: Final = """
with over as (
  update preview.turns set counted = true where id in (
    select id from preview.turns where state <> 'open' and not counted order by id limit %s for update skip locked)
  returning state
)
select count(*) filter (where state = 'ended'), count(*) filter (where state = 'abandoned'),
  count(*) filter (where state = 'reaped') from over
"""

OPEN: Final = """
select count(*), coalesce(extract(epoch from clock_timestamp() - min(begun_at)), 0)::float8
from preview.turns where state = 'open'
"""


class Turns:
    """One orchestrator's share. `clock` gives seconds that only grow."""

    def __init__(
        self,
        pool: Pool,
        *,
        registry: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._looked_at = float("-inf")
        self._total = Counter(
            "preview_orchestrator_turns", "Turns that are over, by how.", ["outcome"], registry=registry
        )
        for outcome in OUTCOMES:
            self._total.labels(outcome)
        self._open = Gauge(
            "preview_orchestrator_turns_open", "Turns that may yet end, of all projects.", registry=registry
        )
        self._oldest = Gauge(
            "preview_orchestrator_turns_oldest_seconds", "Since the oldest of them began.", registry=registry
        )

    async def look_after(self) -> None:
        """Reap, count and measure, unless that was just done. Raises `psycopg.Error`."""
        if self._clock() - self._looked_at < EVERY_SECONDS:
            return
        self._looked_at = self._clock()
        while reaped := await fetch_one(self._pool, REAP, (AT_ONCE,)):
            if any(reaped[0].values()):
                log.info("turns.reaped", **reaped[0])
            if max(reaped[0].values()) < AT_ONCE:
                break
        while counted := await fetch_one(self._pool, COUNT, (AT_ONCE,)):
            for outcome, number in zip(OUTCOMES, counted, strict=True):
                self._total.labels(outcome).inc(number)
            if sum(counted) < AT_ONCE:
                break
        row = await fetch_one(self._pool, OPEN, ())
        if row is not None:
            self._open.set(row[0])
            self._oldest.set(row[1])
