"""Deletes what a deleted project left outside of its tables: objects in Storage, messages of its topic.

The transaction that deletes the project queues it (`preview.deleted_projects`), and the database refuses its id from
then on. Objects go in batches through the Storage API, which alone knows where the bytes are. A row is claimed for
`CLAIM`; when its orchestrator is killed, the next one takes it. A row is marked cleaned when nothing is left, so doing
it twice does nothing.
"""

from __future__ import annotations

from typing import Final
from uuid import UUID

import psycopg
import structlog

from orchestrator_stub.platform.database import Pool, fetch_one
from orchestrator_stub.platform.storage import ASSETS, StorageClient, StorageFailure

log = structlog.get_logger("deleted_projects")

CHANNEL: Final = "deleted_projects"

BUCKETS: Final = (ASSETS, "project-snapshots", "preview-bundles", "preview-modules")
"""Where a project has a directory named by its id."""

BATCH: Final = 200
"""Objects deleted in one call. Storage takes 1,000; a call must end before its timeout."""

CLAIM: Final = "10 minutes"
"""After which a killed orchestrator's claim ends; a batch takes seconds."""

REST: Final = "5 minutes"
"""Before a project whose objects Storage did not delete is tried again, so that others are taken meanwhile."""

LATE: Final = "7 days"
"""How long a cleaned project is checked again: an upload or a build that was under way may have ended after."""

UNCLAIMED: Final = "2 days"
"""Assets younger than this are looked through for projects that were never written to."""

TAKE: Final = f"""
update preview.deleted_projects set claimed_until = now() + interval '{CLAIM}'
where project_id = (
  select project_id from preview.deleted_projects
  where cleaned_at is null and (claimed_until is null or claimed_until < now())
  order by deleted_at for update skip locked limit 1
)
returning project_id
"""  # noqa: S608 - a constant

OBJECTS: Final = """
select o.bucket_id, o.name from unnest(%(buckets)s::text[]) bucket
cross join lateral (
  select i.bucket_id, i.name from storage.objects i
  where i.bucket_id = bucket and i.name > %(project)s || '/' and i.name < %(project)s || '0'
  order by i.name limit %(limit)s
) o
limit %(limit)s
"""

STILL_THERE: Final = "select count(*) from storage.objects where bucket_id = %s and name = any(%s)"

RELEASE: Final = "update preview.deleted_projects set claimed_until = null where project_id = %s"

POSTPONE: Final = f"""
update preview.deleted_projects set claimed_until = now() + interval '{REST}' where project_id = %s
"""  # noqa: S608 - a constant

CLEANED: Final = """
update preview.deleted_projects set cleaned_at = now(), claimed_until = null where project_id = %s
"""

REOPEN: Final = f"""
update preview.deleted_projects d set cleaned_at = null, queued_at = now()
where d.cleaned_at is not null and d.deleted_at > now() - interval '{LATE}' and exists (
  select from unnest(%s::text[]) bucket join storage.objects o
    on o.bucket_id = bucket and o.name > d.project_id || '/' and o.name < d.project_id || '0')
returning d.project_id
"""  # noqa: S608 - a constant

HEADS: Final = f"""
select count(*) from (
  select distinct left(o.name, 36)::uuid as project_id from storage.objects o
  where o.bucket_id = 'project-assets' and o.created_at > now() - interval '{UNCLAIMED}'
    and o.name ~ '^[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}/[0-9a-f]{{64}}$'
) a
where not exists (select from public.project_heads h where h.project_id = a.project_id)
  and preview.give_head(a.project_id)
"""  # noqa: S608 - a constant


class DeletedProjects:
    """Does one orchestrator's share of the work."""

    def __init__(self, pool: Pool, storage: StorageClient) -> None:
        self._pool = pool
        self._storage = storage

    async def clean_some(self) -> bool:
        """One batch of the project that has waited longest. False: there is nothing to do now.

        Raises `psycopg.OperationalError`; what Storage refuses is tried again later.
        """
        taken = await fetch_one(self._pool, TAKE, ())
        if taken is None:
            return False
        project_id: UUID = taken[0]
        try:
            is_more = await self._delete_objects(project_id)
        except StorageFailure as failure:
            log.warning("deleted_project.postponed", project_id=str(project_id), reason=str(failure))
            await self._run(POSTPONE, project_id)
            return True
        if is_more:
            await self._run(RELEASE, project_id)
            return True
        await self._delete_messages(project_id)
        await self._run(CLEANED, project_id)
        log.info("deleted_project.cleaned", project_id=str(project_id))
        return True

    async def reopen(self) -> int:
        """Queue projects again that got objects after their cleaning, and give their number.

        Projects that have assets but no head get one.

        Without a head a deletion would not be noticed: a product's own table has no trigger of ours.
        """
        async with self._pool.connection() as connection:
            await connection.execute(HEADS.encode())
            cursor = await connection.execute(REOPEN.encode(), (list(BUCKETS),))
            return len(await cursor.fetchall())

    async def _delete_objects(self, project_id: UUID) -> bool:
        """Delete one batch; whether there may be more."""
        values = {"buckets": list(BUCKETS), "project": str(project_id), "limit": BATCH}
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(OBJECTS.encode(), values)).fetchall()
        for bucket in BUCKETS:
            names = [name for where, name in rows if where == bucket]
            if not names:
                continue
            await self._storage.delete(bucket, names)
            left = await fetch_one(self._pool, STILL_THERE, (bucket, names))
            if left and left[0]:
                raise StorageFailure(f"delete {left[0]} objects", "they are still there", transient=True)
        return len(rows) == BATCH

    async def _delete_messages(self, project_id: UUID) -> None:
        try:
            for topic in (f"project:{project_id}", f"preview:{project_id}"):
                await self._run("delete from realtime.messages where topic = %s", topic)
        except psycopg.errors.InsufficientPrivilege:
            # No policy lets them be read any more, and Realtime keeps none for more than three days.
            log.info("deleted_project.messages_left", project_id=str(project_id))

    async def _run(self, query: str, value: object) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(query.encode(), (value,))
