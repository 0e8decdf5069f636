"""Drops layers that nobody uses, and deletes the objects that no layer names.

A layer goes when it was not used for MODULES_KEEP_SECONDS, or when the projects' layers together are above
MODULES_TOTAL_BYTES, those used longest ago first; shared ones go by `modules drop` alone. Its objects follow after some
hours, when no URL to them and no upload is good any more: so do those of uploads that were never told. Any number of
orchestrators may do this, and any may be killed between any two lines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import psycopg
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from orchestrator_stub.config import Settings
from orchestrator_stub.modules.layers import BUCKET, Limits
from orchestrator_stub.platform.database import Pool, fetch_one
from orchestrator_stub.platform.storage import StorageClient, StorageFailure

log = structlog.get_logger("modules")

EVERY: Final = 60.0
"""Seconds between two looks: nothing here is urgent."""
AT_ONCE: Final = 200
"""Rows, or objects, of one step."""

DROP: Final = """
with kept as (
  select id, used_at, parts is null as sending, sum(size_bytes) over (order by used_at desc, id) as total
  from preview.modules where project_id is not null
), gone as (
  delete from preview.modules where id in (
    select id from kept
    where used_at < now() - make_interval(secs => case when sending then %(sending)s else %(keep)s end)
       or total > %(total)s
    order by used_at limit %(most)s
  ) returning id
)
select count(*) from gone
"""

UNNAMED: Final = """
select array_agg(name) from (
  select o.name from storage.objects o
  where o.bucket_id = %(bucket)s and o.created_at < now() - make_interval(secs => %(sending)s) and not exists (
    select from preview.modules m
    where m.id::text = split_part(split_part(o.name, '/', 3), '.', 1)
      and (m.parts is null or split_part(o.name, '.', 2) = any (
        select number::text from generate_series(0, jsonb_array_length(m.parts) - 1) number)))
  limit %(most)s
) unnamed
"""

MEASURE: Final = """
select coalesce(sum(size_bytes) filter (where project_id is not null), 0)::float8,
       coalesce(sum(size_bytes) filter (where project_id is null), 0)::float8
from preview.modules where parts is not null
"""

SENDING: Final = 3 * 3600.0
"""Seconds after which no URL that was signed for an object is good: two hours for an upload, one at most to read."""


def kept_of(settings: Settings) -> Limits:
    """What the settings keep."""
    return Limits(
        settings.modules_layer_bytes,
        settings.modules_project_bytes,
        settings.modules_total_bytes,
        settings.modules_keep_seconds,
    )


class ModuleUpkeep:
    """Does one orchestrator's share. `clock` gives seconds that only grow."""

    def __init__(
        self,
        pool: Pool,
        storage: StorageClient,
        limits: Limits,
        *,
        registry: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._storage = storage
        self._limits = limits
        self._clock = clock
        self._due = float("-inf")
        prefix = "preview_orchestrator_"
        self._dropped = Counter(
            prefix + "modules_dropped", "Dependency layers that upkeep dropped.", registry=registry
        )
        self._bytes = Gauge(
            prefix + "modules_bytes",
            "Dependency layers that are stored, compressed.",
            ["owner"],
            registry=registry,
        )

    async def step(self) -> bool:
        """Take one bounded step. False: there is nothing to do now. Raises `psycopg.OperationalError`."""
        if self._clock() < self._due:
            return False
        limits = self._limits
        given = {
            "sending": SENDING,
            "keep": limits.keep,
            "total": limits.total,
            "most": AT_ONCE,
            "bucket": BUCKET,
        }
        try:
            row = await fetch_one(self._pool, DROP, given)
            dropped = row[0] if row else 0
            self._dropped.inc(dropped)
            found = await fetch_one(self._pool, UNNAMED, given)
            names = (found[0] if found else None) or []
            if names:
                await self._storage.delete(BUCKET, names)
            measured = await fetch_one(self._pool, MEASURE, {})
        except psycopg.OperationalError:
            raise
        except (StorageFailure, psycopg.Error) as error:
            log.warning("modules.upkeep_postponed", reason=" ".join(str(error).split()))
            self._due = self._clock() + EVERY
            return False
        for owner, size in zip(("project", "shared"), measured or (0.0, 0.0), strict=True):
            self._bytes.labels(owner).set(size)
        if dropped or names:
            log.info("modules.upkeep", dropped=dropped, objects=len(names))
        is_more = dropped == AT_ONCE or len(names) == AT_ONCE
        self._due = self._clock() + (0.0 if is_more else EVERY)
        return bool(is_more)
