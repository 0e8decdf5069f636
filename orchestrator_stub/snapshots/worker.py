"""Builds what `create_project_snapshot` asked for, in the background, deletes old archives, and reaps turns.

A request is a row of `public.project_snapshots`. PostgreSQL notifies when one is made; the table is also polled, since
a notification can be lost. A row is taken with `SKIP LOCKED`, so any number of orchestrators share the work. One that
is killed leaves its request `building`; after `ABANDONED` another takes it. What deleted projects left
(`deletion`) is cleaned and projects are kept up (`upkeep`) while no request waits.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, Protocol
from uuid import UUID

import psycopg
import structlog
import tenacity
from psycopg.types.json import Jsonb

from orchestrator_stub.platform.database import Pool
from orchestrator_stub.platform.storage import StorageClient, StorageFailure
from orchestrator_stub.snapshots.builder import BUCKET, SnapshotBuilder, is_delta
from orchestrator_stub.snapshots.deletion import CHANNEL as DELETIONS
from orchestrator_stub.snapshots.deletion import DeletedProjects
from orchestrator_stub.snapshots.model import SnapshotUnavailable
from orchestrator_stub.snapshots.turns import Turns
from orchestrator_stub.snapshots.upkeep import Upkeep

log = structlog.get_logger("snapshot_worker")

CHANNEL: Final = "snapshot_requests"

POLL_SECONDS: Final = 30.0
"""Between two polls of the table when no notification comes."""

ABANDONED: Final = "10 minutes"
"""After which a request in `building` is taken again: no build takes that long. Counted from when it was taken, or one
that waited as long in a backlog would be built by every orchestrator at once."""

KEEP_SECONDS: Final = 24 * 3600.0
"""How long an archive stays: no session that was given its URL lives longer."""

KEEP_DELTA_SECONDS: Final = 2 * 3600.0
"""How long a delta stays: its URL is good for an hour at most, and it is of use to who asked for it alone. As long
stays an archive that was replaced."""

CLEAR_SECONDS: Final = 3600.0
"""Between two deletions of old archives."""

TAKE: Final = f"""
update public.project_snapshots set state = 'building', taken_at = now()
where id = (
  select id from public.project_snapshots
  where state = 'requested' or (state = 'building' and coalesce(taken_at, created_at) < now() - interval '{ABANDONED}')
  order by created_at for update skip locked limit 1
)
returning id, project_id
"""  # noqa: S608 - a constant

DONE: Final = """
update public.project_snapshots set state = 'ready', epoch = %s, revision = %s, object_path = %s, size_bytes = %s,
  problem = null, finished_at = now()
where id = %s
"""

FAILED: Final = """
update public.project_snapshots set state = 'failed', problem = %s, finished_at = now() where id = %s
"""

SAY: Final = """
select preview.publish(%(topic)s, 'snapshot:ready', case
  when octet_length(%(payload)s::jsonb::text) <= s.broadcast_limit_bytes then %(payload)s::jsonb
  else %(payload)s::jsonb || '{"manifest": null}' end)
from preview.settings s
"""
"""Realtime drops a message above its limit and says nothing; without its manifest, which is in the archive, this one is
small."""

RECENT: Final = """
select distinct project_id from (
  select project_id, created_at from preview.sessions
  union all select project_id, created_at from public.project_snapshots
) known where created_at > now() - interval '3 days'
"""


class BackgroundWork(Protocol):
    """What else is done in the background."""

    async def step(self) -> bool:
        """Take one bounded step. False: there is nothing to do now. Raises `psycopg.OperationalError`."""
        ...


class SnapshotWorker:
    """Does one orchestrator's share of the work.

    Args:
        dsn: For LISTEN, which needs a connection with a session of its own.
        also: Other work, a step at a time.
        url_ttl: Seconds that the URL in `snapshot:ready` lives.
        clock: Gives Unix seconds.
    """

    def __init__(
        self,
        dsn: str,
        pool: Pool,
        snapshots: SnapshotBuilder,
        storage: StorageClient,
        *,
        url_ttl: int,
        turns: Turns | None = None,
        upkeep: Upkeep | None = None,
        also: Sequence[BackgroundWork] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._dsn = dsn
        self._pool = pool
        self._snapshots = snapshots
        self._storage = storage
        self._deleted = DeletedProjects(pool, storage)
        self._turns = turns
        self._upkeep = upkeep
        self._also = also
        self._url_ttl = url_ttl
        self._clock = clock

    async def run(self) -> None:
        """Work for ever. While the database is away, retry."""
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(psycopg.Error),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=15),
            before_sleep=lambda state: log.warning("snapshot_worker.database_lost"),
        ):
            with attempt:
                await self._work()

    async def take_one(self) -> bool:
        """Build the oldest request. False: there is none."""
        async with self._pool.connection() as connection:
            row = await (await connection.execute(TAKE.encode())).fetchone()
        if row is None:
            return False
        request_id, project_id = row
        try:
            snapshot = await self._snapshots.build(project_id)
            url = await self._snapshots.signed_url(snapshot.object_path, self._url_ttl)
        except SnapshotUnavailable as error:
            log.warning("snapshot_worker.failed", project_id=str(project_id), reason=str(error))
            async with self._pool.connection() as connection:
                await connection.execute(FAILED, (str(error), request_id))
            return True
        manifest = snapshot.manifest
        payload = {
            "snapshot_url": url,
            "manifest": manifest,
            "timestamp": datetime.now(UTC).isoformat(),
        }
        # One transaction, so that no client hears of an archive that the table does not have.
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(
                DONE,
                (manifest["epoch"], manifest["revision"], snapshot.object_path, snapshot.bytes, request_id),
            )
            await connection.execute(
                SAY.encode(), {"topic": f"project:{project_id}", "payload": Jsonb(payload)}
            )
        return True

    async def clear_old(self) -> int:
        """Delete archives that no session can still be reading, but the newest of each project. Gives their number."""
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(RECENT)).fetchall()
        cleared = 0
        for (project_id,) in rows:
            cleared += await self._clear_project(project_id)
        return cleared

    async def _clear_project(self, project_id: UUID) -> int:
        found = await self._storage.list(BUCKET, f"{project_id}/")
        dated = sorted((_moment(item.get("created_at")), str(item.get("name"))) for item in found)
        # The newest that is whole (a delta alone opens no project), and what it replaced so lately that a session which
        # was given the URL of that may still be reading it.
        whole = [made for made, name in dated if not is_delta(name)]
        settled = max((made for made in whole if made < self._clock() - KEEP_DELTA_SECONDS), default=0.0)
        old = [
            f"{project_id}/{name}"
            for made, name in dated
            if made
            and (is_delta(name) or made < settled)
            and made < self._clock() - (KEEP_DELTA_SECONDS if is_delta(name) else KEEP_SECONDS)
        ]
        if old:
            await self._storage.delete(BUCKET, old)
        return len(old)

    async def _work(self) -> None:
        cleared_at = self._clock()
        async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as listener:
            await listener.execute(f"listen {CHANNEL}; listen {DELETIONS}".encode())
            while True:
                # Snapshots first: an editor waits for them, and nothing waits for a cleaning.
                is_more = await self.take_one() or await self._deleted.clean_some()
                if self._upkeep is not None:
                    is_more = is_more or await self._upkeep.step()
                    await self._upkeep.measure()
                for work in self._also:
                    is_more = await work.step() or is_more
                if self._turns is not None:
                    await self._turns.look_after()
                if self._clock() - cleared_at > CLEAR_SECONDS:
                    cleared_at = self._clock()
                    try:
                        await self.clear_old()
                        await self._deleted.reopen()
                    except StorageFailure as error:
                        log.warning("snapshot_worker.not_cleared", reason=str(error))
                if is_more:
                    continue
                async for _ in listener.notifies(timeout=POLL_SECONDS, stop_after=1):
                    break
                await asyncio.sleep(0)


def _moment(text: object) -> float:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0
