"""Caches signed snapshots: which archive was built for a revision, and a URL for it that is still good.

An entry is named by project, epoch, revision and base, so it never goes out of date. Entries are in Redis where there
is one and in PostgreSQL otherwise. When the store does not answer, a snapshot is built as if there were no entry.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Protocol
from uuid import UUID
from weakref import WeakValueDictionary

import orjson
import psycopg
import structlog
from prometheus_client import CollectorRegistry, Counter
from psycopg.types.json import Jsonb

from orchestrator_stub.platform.database import Pool, fetch_one, head_of
from orchestrator_stub.snapshots import newest
from orchestrator_stub.snapshots.allowance import Allowance, AllowanceSpent
from orchestrator_stub.snapshots.builder import StoredSnapshot
from orchestrator_stub.snapshots.model import SignedSnapshot, SnapshotUnavailable

log = structlog.get_logger("snapshot_cache")

KEEP_SECONDS: Final = 6 * 3600.0
"""How long an entry stays: well below the day after which the archive itself is deleted."""

URL_RESERVE: Final = 0.5
"""Share of its life that a cached URL must still have: a machine fetches it minutes after it gets it."""

REBUILD_REST: Final = 30.0
"""Seconds after a rebuild in which no other is made: a hundred agents report one broken archive within moments, and
whoever holds a session's token could otherwise fill the bucket."""

REDIS_TIMEOUT: Final = 0.5
"""Seconds. Waiting longer would take more time than building."""

REDIS_REST: Final = 5.0
"""Seconds during which a Redis that failed is not asked again: not every session should wait for it."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One archive in the bucket, and a URL for it. `url_until` and `rebuilt_at` are Unix seconds; 0: never rebuilt."""

    object_path: str
    manifest: dict[str, Any]
    url: str
    url_until: float
    rebuilt_at: float = 0.0

    def __repr__(self) -> str:
        return f"CacheEntry({self.object_path})"


class CacheStore(Protocol):
    """Keeps entries. A miss and a store that does not answer look the same."""

    async def get(self, project_id: UUID, stamp: str) -> CacheEntry | None:
        """The entry put under this name, or None: never put, dropped or expired."""
        ...

    async def put(self, project_id: UUID, stamp: str, entry: CacheEntry) -> None:
        """Keep `entry` for `KEEP_SECONDS`, in place of an older one."""
        ...

    async def drop(self, project_id: UUID, stamp: str) -> None:
        """Forget the entry: its archive is broken or gone."""
        ...

    async def close(self) -> None: ...


class PostgresCacheStore:
    """Keeps entries in the table `preview.snapshot_offers`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def get(self, project_id: UUID, stamp: str) -> CacheEntry | None:
        row = await self._run(
            "select kept from preview.snapshot_offers"
            " where project_id = %s and stamp = %s and kept_until > now()",
            project_id,
            stamp,
        )
        return _entry(row[0]) if row else None

    async def put(self, project_id: UUID, stamp: str, entry: CacheEntry) -> None:
        await self._run(
            "insert into preview.snapshot_offers (project_id, stamp, kept, kept_until)"
            " values (%s, %s, %s, now() + %s * interval '1 second')"
            " on conflict (project_id, stamp) do update"
            " set kept = excluded.kept, kept_until = excluded.kept_until returning true",
            project_id,
            stamp,
            Jsonb(_as_json(entry)),
            KEEP_SECONDS,
        )
        # A transaction of its own: one that kept an entry as well would hold those of a project that is being deleted,
        # and wait for its head, which the deletion holds.
        await self._run(
            "delete from preview.snapshot_offers where ctid = any (array("
            " select ctid from preview.snapshot_offers where kept_until < now() - interval '1 minute'"
            " order by kept_until limit 100 for update skip locked)) returning true"
        )

    async def drop(self, project_id: UUID, stamp: str) -> None:
        await self._run(
            "delete from preview.snapshot_offers where project_id = %s and stamp = %s returning true",
            project_id,
            stamp,
        )

    async def close(self) -> None:
        """The pool is its owner's."""

    async def _run(self, query: str, *values: object) -> tuple[Any, ...] | None:
        try:
            return await fetch_one(self._pool, query, values)
        except psycopg.Error as error:
            log.warning("snapshot_cache.away", where="postgres", reason=type(error).__name__)
            return None


class RedisCacheStore:
    """Keeps entries in Redis, under `preview:offer:{project}:{stamp}`. `clock`: seconds, monotonic."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        # Not at the top: most installations, and every `dev`, start without it.
        import redis.asyncio
        import redis.exceptions

        self._away = (redis.exceptions.RedisError, OSError)
        self._redis = redis.asyncio.Redis.from_url(
            url, socket_timeout=REDIS_TIMEOUT, socket_connect_timeout=REDIS_TIMEOUT
        )
        self._clock = clock
        self._rests_until = float("-inf")

    async def get(self, project_id: UUID, stamp: str) -> CacheEntry | None:
        found = await self._ask(lambda: self._redis.get(_key(project_id, stamp)))
        try:
            return _entry(orjson.loads(found)) if isinstance(found, bytes) else None
        except orjson.JSONDecodeError:
            return None

    async def put(self, project_id: UUID, stamp: str, entry: CacheEntry) -> None:
        form = orjson.dumps(_as_json(entry))
        await self._ask(lambda: self._redis.set(_key(project_id, stamp), form, ex=int(KEEP_SECONDS)))

    async def drop(self, project_id: UUID, stamp: str) -> None:
        await self._ask(lambda: self._redis.delete(_key(project_id, stamp)))

    async def close(self) -> None:
        await self._redis.aclose()

    async def _ask(self, command: Callable[[], Any]) -> Any:
        if self._clock() < self._rests_until:
            return None
        try:
            return await command()
        except self._away as error:
            self._rests_until = self._clock() + REDIS_REST
            log.warning("snapshot_cache.away", where="redis", reason=type(error).__name__)
            return None


class Builder(Protocol):
    """Builds and signs: a `SnapshotBuilder`."""

    async def build(
        self, project_id: UUID, *, base_revision: int | None = None, anew: bool = False
    ) -> StoredSnapshot: ...

    async def signed_url(self, object_path: str, expires_in: int) -> str: ...


class SnapshotCache:
    """A `SnapshotSource` that builds a revision once, for all orchestrators, and signs it seldom.

    Args:
        url_ttl: Seconds that a URL lives.
        allowance: What may be stored for one session; None: anything.
        since_bytes: Saved since an earlier archive, at most, for a session to begin with that one.
        scope: Where the URLs lead. Entries of another storage, or of this one under another address, do not count.
        clock: Gives Unix seconds.
    """

    def __init__(
        self,
        pool: Pool,
        builder: Builder,
        cache: CacheStore,
        *,
        url_ttl: int,
        scope: str = "",
        allowance: Allowance | None = None,
        since_bytes: int = 500_000,
        registry: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pool = pool
        self._allowance = allowance
        self._since_bytes = since_bytes
        self._builder = builder
        self._cache = cache
        self._url_ttl = url_ttl
        self._scope = hashlib.sha256(scope.encode()).hexdigest()[:16]
        self._clock = clock
        self._locks: WeakValueDictionary[tuple[UUID, str], asyncio.Lock] = WeakValueDictionary()
        self._given = Counter(
            "preview_orchestrator_snapshot_offers",
            "Signed snapshots given out: kept (from the cache), signed (a new URL), earlier (of a revision before),"
            " built. Or refused to a session.",
            ["how"],
            registry=registry,
        )

    async def signed_snapshot(
        self,
        project_id: UUID,
        *,
        base_revision: int | None = None,
        rebuild: bool = False,
        resign: bool = False,
        payer: UUID | None = None,
        earlier: bool = False,
    ) -> SignedSnapshot:
        """A snapshot of the project's head, from the cache or built. Args and Raises: as in `SnapshotSource`."""
        stamp = await self._stamp(project_id, base_revision)
        lock = self._locks.setdefault((project_id, stamp), asyncio.Lock())
        async with lock:
            entry = await self._cache.get(project_id, stamp)
            if rebuild and (entry is None or self._clock() - entry.rebuilt_at >= REBUILD_REST):
                await self._cache.drop(project_id, stamp)
                entry = None
            if (
                not resign
                and entry is not None
                and entry.url_until - self._clock() > self._url_ttl * URL_RESERVE
            ):
                self._given.labels("kept").inc()
                return SignedSnapshot(entry.url, entry.manifest)
            if entry is not None:
                try:
                    return await self._signed(project_id, stamp, entry, "signed")
                except SnapshotUnavailable:
                    log.info(
                        "snapshot_cache.archive_gone",
                        project_id=str(project_id),
                        object_path=entry.object_path,
                    )
            if earlier and not rebuild and (found := await self._earlier(project_id)):
                return found
            built = await self._build(project_id, base_revision, rebuild, payer)
            # A save may have come between: the entry is named by the revision that the archive holds.
            stamp = self._stamp_of(built.manifest["epoch"], built.manifest["revision"], base_revision)
            rebuilt_at = self._clock() if rebuild else 0.0
            fresh = CacheEntry(
                built.object_path, built.manifest, url="", url_until=0.0, rebuilt_at=rebuilt_at
            )
            return await self._signed(project_id, stamp, fresh, "built")

    async def _earlier(self, project_id: UUID) -> SignedSnapshot | None:
        archive = await newest.find(self._pool, project_id, self._since_bytes)
        if archive is None:
            return None
        try:
            url = await self._builder.signed_url(archive.object_path, self._url_ttl)
        except SnapshotUnavailable:
            await newest.drop(self._pool, project_id, archive.object_path)
            return None
        self._given.labels("earlier").inc()
        return SignedSnapshot(url, {"revision": archive.revision})

    async def _build(
        self, project_id: UUID, base_revision: int | None, anew: bool, payer: UUID | None
    ) -> StoredSnapshot:
        if payer is None or self._allowance is None:
            return await self._builder.build(project_id, base_revision=base_revision, anew=anew)
        try:
            async with self._allowance.spending(payer) as stored:
                built = await self._builder.build(project_id, base_revision=base_revision, anew=anew)
                stored.append(built)
                return built
        except AllowanceSpent:
            self._given.labels("refused").inc()
            raise

    async def _signed(self, project_id: UUID, stamp: str, entry: CacheEntry, how: str) -> SignedSnapshot:
        url_until = self._clock() + self._url_ttl
        url = await self._builder.signed_url(entry.object_path, self._url_ttl)
        await self._cache.put(project_id, stamp, replace(entry, url=url, url_until=url_until))
        self._given.labels(how).inc()
        return SignedSnapshot(url, entry.manifest)

    async def _stamp(self, project_id: UUID, base_revision: int | None) -> str:
        try:
            head = await head_of(self._pool, project_id)
        except psycopg.OperationalError as error:
            raise SnapshotUnavailable("cannot find a snapshot: the database does not answer") from error
        if head is None:
            raise SnapshotUnavailable(f"cannot find a snapshot: there is no project {project_id}")
        return self._stamp_of(head.epoch, head.revision, base_revision)

    def _stamp_of(self, epoch: str, revision: int, base: int | None) -> str:
        whole = f"{self._scope}:{epoch}:{revision}"
        return whole if base is None else f"{whole}:from:{base}"


def _key(project_id: UUID, stamp: str) -> str:
    return f"preview:offer:{project_id}:{stamp}"


def _as_json(entry: CacheEntry) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in fields(entry)}


def _entry(form: Any) -> CacheEntry | None:
    try:
        return CacheEntry(
            object_path=str(form["object_path"]),
            manifest=dict(form["manifest"]),
            url=str(form["url"]),
            url_until=float(form["url_until"]),
            rebuilt_at=float(form.get("rebuilt_at", 0.0)),
        )
    except (KeyError, TypeError, ValueError):
        return None
