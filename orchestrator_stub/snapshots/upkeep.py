"""Keeps projects up: forgets history that nobody keeps, and collects assets, archives, ended sessions and old requests.

The database finds what is due and decides under the project's lock, one project and a bounded number of rows a step
(`preview.keep_up`). What it found unused cannot be named again until it is gone, so the bytes are deleted here, through
the Storage API, without holding anything. Superseded contents become splices in steps of their own (`preview.compact`),
which hold nothing that a save waits for. Any number of orchestrators may; being killed between any two lines leaves
work for the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import psycopg
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from orchestrator_stub.platform.database import Pool, fetch_one
from orchestrator_stub.platform.storage import ASSETS, StorageClient, StorageFailure
from orchestrator_stub.snapshots.builder import BUCKET as ARCHIVES

log = structlog.get_logger("upkeep")

AT_ONCE: Final = 500
"""Rows that one step deletes: 30 ms of the project's lock, so that no save waits for long."""

OBJECTS_AT_ONCE: Final = 200
"""Objects deleted in one call. Storage takes 1,000; a call must end before its timeout."""

REST: Final = 300.0
"""Seconds after something that was refused, before it is tried again: nothing here is urgent."""

EVERY_SECONDS: Final = 15.0
"""Between two measurements: as often as a scrape may ask."""

KEEP_UP: Final = "select preview.keep_up(%s)"

COMPACT: Final = "select preview.compact(%s)"

UNUSED: Final = """
select project_id, array_agg(content_hash order by content_hash) from (
  select project_id, content_hash from preview.unused_assets
  where project_id = (select project_id from preview.unused_assets order by found_at limit 1)
  order by content_hash limit %s
) oldest group by project_id
"""

GONE: Final = """
with gone as (
  delete from preview.unused_assets u
  where u.project_id = %(project)s and u.content_hash = any(%(hashes)s) and not exists (
    select from storage.objects o
    where o.bucket_id = 'project-assets' and o.name = u.project_id || '/' || u.content_hash)
  returning u.content_hash
)
select count(*) from gone
"""

POSTPONE: Final = """
with postponed as (update preview.unused_assets set found_at = now() where project_id = %s returning 1)
select count(*) from postponed
"""

WAITING: Final = """
select d.waiting, d.oldest, coalesce(extract(epoch from now() - h.kept_up_at - s.upkeep_every), 0)::float8
from (
  select count(*) as waiting, coalesce(extract(epoch from now() - min(queued_at)), 0)::float8 as oldest
  from preview.deleted_projects where cleaned_at is null
) d
cross join preview.settings s
left join (select kept_up_at from public.project_heads order by kept_up_at limit 1) h on true
"""

FORGOTTEN: Final = ("versions", "tombstones", "contents", "sessions", "requests", "assets", "archives")


class Upkeep:
    """Does one orchestrator's share. `clock` gives seconds that only grow."""

    def __init__(
        self,
        pool: Pool,
        storage: StorageClient,
        *,
        registry: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._storage = storage
        self._clock = clock
        self._rests_until = self._storage_rests_until = self._measured_at = float("-inf")
        prefix = "preview_orchestrator_"
        self._forgotten = Counter(
            prefix + "forgotten",
            "What upkeep removed: superseded versions, tombstones, contents that became splices, ended sessions,"
            " old requests for archives; assets and archives that nothing needed.",
            ["what"],
            registry=registry,
        )
        for what in FORGOTTEN:
            self._forgotten.labels(what)
        self._overdue = Gauge(
            prefix + "upkeep_overdue_seconds",
            "How long the project that has waited longest for its upkeep is over its time.",
            registry=registry,
        )
        self._deleted = Gauge(
            prefix + "deleted_projects", "Deleted projects that have yet to be cleaned up.", registry=registry
        )
        self._deleted_oldest = Gauge(
            prefix + "deleted_projects_oldest_seconds",
            "Since the deletion of the one that has waited longest.",
            registry=registry,
        )

    async def step(self) -> bool:
        """Take one bounded step. False: there is nothing to do now. Raises `psycopg.OperationalError`."""
        if self._clock() < self._rests_until:
            return False
        try:
            return await self._delete_unused() or await self._keep_up() or await self._compact()
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            # A right that is missing, say: it must not keep the worker from what else it does.
            log.warning("upkeep.postponed", reason=" ".join(str(error).split()))
            self._rests_until = self._clock() + REST
            return False

    async def measure(self) -> None:
        """Tell the metrics what waits, unless that was just done. Raises `psycopg.Error`."""
        if self._clock() - self._measured_at < EVERY_SECONDS:
            return
        self._measured_at = self._clock()
        row = await fetch_one(self._pool, WAITING, ())
        if row is not None:
            deleted, oldest, overdue = row
            self._deleted.set(deleted)
            self._deleted_oldest.set(oldest)
            self._overdue.set(max(0.0, overdue))

    async def _keep_up(self) -> bool:
        row = await fetch_one(self._pool, KEEP_UP, (AT_ONCE,))
        if row is None or row[0] is None:
            return False
        done = row[0]
        archives = done.pop("archives")
        for what in ("versions", "tombstones", "sessions", "requests"):
            self._forgotten.labels(what).inc(done[what])
        if any(number for what, number in done.items() if what != "project_id"):
            log.info("project.kept_up", **done)
        if archives:
            await self._delete_archives(done["project_id"], archives)
        return True

    async def _compact(self) -> bool:
        row = await fetch_one(self._pool, COMPACT, (AT_ONCE,))
        if row is None or row[0] is None:
            return False
        self._forgotten.labels("contents").inc(row[0]["contents"])
        return True

    async def _delete_archives(self, project_id: str, names: list[str]) -> None:
        """What Storage refuses is found again when the project is next kept up."""
        try:
            await self._storage.delete(ARCHIVES, names)
        except StorageFailure as failure:
            log.warning("archives.postponed", project_id=project_id, reason=str(failure))
            return
        self._forgotten.labels("archives").inc(len(names))

    async def _delete_unused(self) -> bool:
        row = await fetch_one(self._pool, UNUSED, (OBJECTS_AT_ONCE,))
        if row is None or self._clock() < self._storage_rests_until:
            return False
        project_id, hashes = row
        try:
            await self._storage.delete(ASSETS, [f"{project_id}/{digest}" for digest in hashes])
            row = await fetch_one(self._pool, GONE, {"project": project_id, "hashes": hashes})
            gone = int(row[0]) if row else 0
            if gone == 0:
                raise StorageFailure(f"delete {len(hashes)} objects", "they are still there", transient=True)
        except StorageFailure as failure:
            log.warning("assets.postponed", project_id=str(project_id), reason=str(failure))
            await fetch_one(self._pool, POSTPONE, (project_id,))
            self._storage_rests_until = self._clock() + REST
            return False
        self._forgotten.labels("assets").inc(gone)
        log.info("assets.collected", project_id=str(project_id), objects=gone)
        return True
