"""Offers that are kept: which archive was built for a revision, and a URL for it that is still good.

Kept in Redis where there is one, in PostgreSQL otherwise, behind one interface; either is a cache and no more. When it
does not answer, offers are built as if it were empty. An entry is named by project, epoch, revision and base, so it can
never be out of date; it can only be of no use any more.
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
from orchestrator_stub.snapshots.builder import Snapshot
from orchestrator_stub.snapshots.model import Offer, SnapshotUnavailable

log = structlog.get_logger("offers")

KEEP_SECONDS: Final = 6 * 3600.0
"""How long an entry stays: well below the day after which the archive itself is cleared away."""

URL_RESERVE: Final = 0.5
"""Share of its life that a kept URL must still have: a machine needs it minutes after it is given."""

REBUILD_REST: Final = 30.0
"""Seconds after a rebuild during which another is not made: a hundred agents that were given one broken archive say so
within moments of each other, and whoever holds a session's token could otherwise fill the bucket."""

REDIS_TIMEOUT: Final = 0.5
"""Seconds. A cache that takes longer than building is none."""

REDIS_REST: Final = 5.0
"""Seconds during which a Redis that failed is not asked again: not every session should wait for it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One archive in the bucket, and a URL for it. `url_until` and `rebuilt_at` in Unix seconds; 0: never rebuilt."""

    object_path: str
    manifest: dict[str, Any]
    url: str
    url_until: float
    rebuilt_at: float = 0.0

    def __repr__(self) -> str:
        return f"Kept({self.object_path})"


class OfferCache(Protocol):
    """Where offers are kept. A miss and a cache that is away look the same."""

    async def get(self, project_id: UUID, stamp: str) -> Kept | None:
        """What was put under this name, unless it was dropped or its time is up."""
        ...

    async def put(self, project_id: UUID, stamp: str, kept: Kept) -> None:
        """Keep it for `KEEP_SECONDS`; what was there before is replaced."""
        ...

    async def drop(self, project_id: UUID, stamp: str) -> None:
        """It is of no use: the archive was found broken, or is gone."""
        ...

    async def close(self) -> None: ...


class PostgresOffers:
    """In `preview.snapshot_offers`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def get(self, project_id: UUID, stamp: str) -> Kept | None:
        row = await self._run(
            "select kept from preview.snapshot_offers"
            " where project_id = %s and stamp = %s and kept_until > now()",
            project_id,
            stamp,
        )
        return _kept(row[0]) if row else None

    async def put(self, project_id: UUID, stamp: str, kept: Kept) -> None:
        await self._run(
            "with old as (delete from preview.snapshot_offers where kept_until < now() - interval '1 minute')"
            " insert into preview.snapshot_offers (project_id, stamp, kept, kept_until)"
            " values (%s, %s, %s, now() + %s * interval '1 second')"
            " on conflict (project_id, stamp) do update"
            " set kept = excluded.kept, kept_until = excluded.kept_until returning true",
            project_id,
            stamp,
            Jsonb(_form(kept)),
            KEEP_SECONDS,
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
            log.warning("offers.away", where="postgres", reason=type(error).__name__)
            return None


class RedisOffers:
    """In Redis, under `preview:offer:{project}:{stamp}`. `clock` in seconds, monotonic."""

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

    async def get(self, project_id: UUID, stamp: str) -> Kept | None:
        found = await self._ask(lambda: self._redis.get(_key(project_id, stamp)))
        try:
            return _kept(orjson.loads(found)) if isinstance(found, bytes) else None
        except orjson.JSONDecodeError:
            return None

    async def put(self, project_id: UUID, stamp: str, kept: Kept) -> None:
        form = orjson.dumps(_form(kept))
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
            log.warning("offers.away", where="redis", reason=type(error).__name__)
            return None


class Builder(Protocol):
    """What builds and signs: `Snapshots`."""

    async def build(
        self, project_id: UUID, *, base_revision: int | None = None, anew: bool = False
    ) -> Snapshot: ...

    async def signed_url(self, object_path: str, expires_in: int) -> str: ...


class KeptSnapshots:
    """A `SnapshotSource` that builds a revision once, for all orchestrators, and signs it seldom.

    `url_ttl`: seconds that a URL lives. `scope`: where the URLs lead; those kept for another storage, or for this
    one under another address, are not offered. `clock` gives Unix seconds.
    """

    def __init__(
        self,
        pool: Pool,
        builder: Builder,
        cache: OfferCache,
        *,
        url_ttl: int,
        scope: str = "",
        registry: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._pool = pool
        self._builder = builder
        self._cache = cache
        self._url_ttl = url_ttl
        self._scope = hashlib.sha256(scope.encode()).hexdigest()[:16]
        self._clock = clock
        self._locks: WeakValueDictionary[tuple[UUID, str], asyncio.Lock] = WeakValueDictionary()
        self._offers = Counter(
            "preview_orchestrator_snapshot_offers",
            "Offers made: kept (nothing to do), signed (a new URL), built.",
            ["how"],
            registry=registry,
        )

    async def offer(
        self,
        project_id: UUID,
        *,
        base_revision: int | None = None,
        rebuild: bool = False,
        resign: bool = False,
    ) -> Offer:
        """A snapshot of the project's head, signed. `rebuild`: not a kept archive; `resign`: not a kept URL.

        Raises `SnapshotUnavailable`.
        """
        stamp = await self._stamp(project_id, base_revision)
        lock = self._locks.setdefault((project_id, stamp), asyncio.Lock())
        async with lock:
            kept = await self._cache.get(project_id, stamp)
            if rebuild and (kept is None or self._clock() - kept.rebuilt_at >= REBUILD_REST):
                await self._cache.drop(project_id, stamp)
                kept = None
            if (
                not resign
                and kept is not None
                and kept.url_until - self._clock() > self._url_ttl * URL_RESERVE
            ):
                self._offers.labels("kept").inc()
                return Offer(kept.url, kept.manifest)
            if kept is not None:
                try:
                    return await self._signed(project_id, stamp, kept, "signed")
                except SnapshotUnavailable:
                    log.info("offers.gone", project_id=str(project_id), object_path=kept.object_path)
            built = await self._builder.build(project_id, base_revision=base_revision, anew=rebuild)
            # A save may have come between: the archive is of the revision that it names, and is kept as that.
            stamp = self._stamp_of(built.manifest["epoch"], built.manifest["revision"], base_revision)
            rebuilt_at = self._clock() if rebuild else 0.0
            fresh = Kept(built.object_path, built.manifest, url="", url_until=0.0, rebuilt_at=rebuilt_at)
            return await self._signed(project_id, stamp, fresh, "built")

    async def _signed(self, project_id: UUID, stamp: str, kept: Kept, how: str) -> Offer:
        url_until = self._clock() + self._url_ttl
        url = await self._builder.signed_url(kept.object_path, self._url_ttl)
        await self._cache.put(project_id, stamp, replace(kept, url=url, url_until=url_until))
        self._offers.labels(how).inc()
        return Offer(url, kept.manifest)

    async def _stamp(self, project_id: UUID, base_revision: int | None) -> str:
        try:
            head = await head_of(self._pool, project_id)
        except psycopg.OperationalError as error:
            raise SnapshotUnavailable("cannot offer a snapshot: the database does not answer") from error
        if head is None:
            raise SnapshotUnavailable(f"cannot offer a snapshot: there is no project {project_id}")
        return self._stamp_of(head.epoch, head.revision, base_revision)

    def _stamp_of(self, epoch: str, revision: int, base: int | None) -> str:
        whole = f"{self._scope}:{epoch}:{revision}"
        return whole if base is None else f"{whole}:from:{base}"


def _key(project_id: UUID, stamp: str) -> str:
    return f"preview:offer:{project_id}:{stamp}"


def _form(kept: Kept) -> dict[str, Any]:
    return {field.name: getattr(kept, field.name) for field in fields(kept)}


def _kept(form: Any) -> Kept | None:
    try:
        return Kept(
            object_path=str(form["object_path"]),
            manifest=dict(form["manifest"]),
            url=str(form["url"]),
            url_until=float(form["url_until"]),
            rebuilt_at=float(form.get("rebuilt_at", 0.0)),
        )
    except (KeyError, TypeError, ValueError):
        return None
