"""Cached snapshots: one suite on PostgreSQL and on a real Redis, and a Redis that goes away in the middle."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from orchestrator_stub.snapshots import cache as cache_module
from orchestrator_stub.snapshots.builder import StoredSnapshot
from orchestrator_stub.snapshots.cache import (
    CacheEntry,
    CacheStore,
    PostgresCacheStore,
    RedisCacheStore,
    SnapshotCache,
)
from orchestrator_stub.snapshots.model import SnapshotUnavailable
from tests.orchestrator.sessions.control_world import World, control_world
from tests.ports import free_port

TTL = 600


class RedisServer:
    """A real `redis-server` of our own; skipped where there is none."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self.process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        if shutil.which("redis-server") is None:
            pytest.skip("there is no redis-server here")
        self.process = await asyncio.create_subprocess_exec(
            "redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "",
            "--dir", str(self.directory), stdout=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        async with asyncio.timeout(15):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except OSError:
                    await asyncio.sleep(0.01)
                else:
                    writer.close()
                    return

    async def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            await self.process.wait()
            self.process = None


class PaperBuilder:
    """Builds by noting it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.built: list[tuple[int | None, bool]] = []
        self.signed = 0
        self.gone = False

    async def build(
        self, project_id: UUID, *, base_revision: int | None = None, anew: bool = False
    ) -> StoredSnapshot:
        await asyncio.sleep(0.01)
        [[epoch, revision]] = await self.world.sql(
            "select epoch::text, revision from public.project_heads where project_id = %s", project_id
        )
        self.built.append((base_revision, anew))
        manifest = {"epoch": epoch, "revision": revision, "base_revision": base_revision, "files": []}
        self.gone = False
        return StoredSnapshot(f"{project_id}/{len(self.built)}.zip", manifest, 1, "0" * 64, 0.01)

    async def signed_url(self, object_path: str, expires_in: int) -> str:
        if self.gone:
            raise SnapshotUnavailable("no such object")
        self.signed += 1
        return f"https://s.invalid/{object_path}?n={self.signed}"


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


@pytest.fixture
async def redis_server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    server = RedisServer(tmp_path)
    yield server
    await server.stop()


@pytest.fixture(params=["postgres", "redis"])
async def cache(request: Any, world: World, redis_server: RedisServer) -> AsyncIterator[CacheStore]:
    made: CacheStore
    if request.param == "redis":
        await redis_server.start()
        made = RedisCacheStore(redis_server.url)
    else:
        made = PostgresCacheStore(world.pool)
    yield made
    await made.close()


def source(world: World, builder: PaperBuilder, cache: CacheStore, now: list[float]) -> SnapshotCache:
    return SnapshotCache(world.pool, builder, cache, url_ttl=TTL, clock=lambda: now[0])


async def test_what_is_put_is_got_until_it_is_dropped(world: World, cache: CacheStore) -> None:
    project, other = await world.project(), await world.project()
    kept = CacheEntry("p/1.zip", {"files": [{"file_path": "ä"}], "revision": 1}, "https://u", 12.5)
    assert await cache.get(project, "e:1") is None
    await cache.put(project, "e:1", kept)
    assert await cache.get(project, "e:1") == kept
    assert await cache.get(project, "e:2") is None
    assert await cache.get(other, "e:1") is None
    newer = CacheEntry("p/1.zip", {"files": []}, "https://v", 13.5)
    await cache.put(project, "e:1", newer)
    assert await cache.get(project, "e:1") == newer
    await cache.drop(project, "e:1")
    await cache.drop(project, "e:1")
    assert await cache.get(project, "e:1") is None


async def test_a_revision_is_built_once_for_all_and_signed_seldom(world: World, cache: CacheStore) -> None:
    project, now = await world.project(), [1000.0]
    builder = PaperBuilder(world)
    one, other = (source(world, builder, cache, now) for _ in range(2))
    offered = await asyncio.gather(*(one.signed_snapshot(project) for _ in range(5)))
    assert len({offer.url for offer in offered}) == 1
    assert (await other.signed_snapshot(project)).url == offered[0].url
    assert (len(builder.built), builder.signed) == (1, 1)
    now[0] += TTL * 0.6
    assert (await other.signed_snapshot(project)).url != offered[0].url, (
        "what is left of its life is too short"
    )
    assert (len(builder.built), builder.signed) == (1, 2)
    await world.write(project, "a", "a")
    assert (await one.signed_snapshot(project)).manifest["revision"] == 1
    await one.signed_snapshot(project, base_revision=0)
    assert builder.built == [(None, False), (None, False), (0, False)]


async def test_a_url_that_leads_nowhere_is_not_offered_again(world: World, cache: CacheStore) -> None:
    project, now = await world.project(), [1000.0]
    builder = PaperBuilder(world)
    here = source(world, builder, cache, now)
    first = await here.signed_snapshot(project)
    assert (await here.signed_snapshot(project, resign=True)).url != first.url
    moved = SnapshotCache(
        world.pool, builder, cache, url_ttl=TTL, scope="http://127.0.0.1:2", clock=lambda: now[0]
    )
    assert (await moved.signed_snapshot(project)).url not in {
        first.url,
        (await here.signed_snapshot(project)).url,
    }


async def test_a_broken_or_vanished_archive_is_built_anew(world: World, cache: CacheStore) -> None:
    project, now = await world.project(), [1000.0]
    builder = PaperBuilder(world)
    kept = source(world, builder, cache, now)
    first = await kept.signed_snapshot(project)
    again = await kept.signed_snapshot(project, rebuild=True)
    assert again.url != first.url
    assert builder.built == [(None, False), (None, True)]
    assert (await kept.signed_snapshot(project)).url == again.url
    now[0] += TTL
    builder.gone = True
    await kept.signed_snapshot(project)
    assert len(builder.built) == 3


async def test_a_hundred_complaints_about_one_archive_are_one_rebuild(
    world: World, cache: CacheStore
) -> None:
    project, now = await world.project(), [1000.0]
    builder = PaperBuilder(world)
    here, there = source(world, builder, cache, now), source(world, builder, cache, now)
    broken = await here.signed_snapshot(project)
    for orchestrator in (here, there):
        offered = await asyncio.gather(
            *(orchestrator.signed_snapshot(project, rebuild=True) for _ in range(50))
        )
        assert broken.url not in {offer.url for offer in offered}
    assert builder.built == [(None, False), (None, True)]
    now[0] += cache_module.REBUILD_REST
    await there.signed_snapshot(project, rebuild=True)
    assert builder.built[2:] == [(None, True)]


async def test_a_redis_that_goes_away_in_the_middle_costs_time_and_nothing_else(
    world: World, redis_server: RedisServer
) -> None:
    await redis_server.start()
    project, now, clock = await world.project(), [1000.0], [0.0]
    builder = PaperBuilder(world)
    cache = RedisCacheStore(redis_server.url, clock=lambda: clock[0])
    kept = source(world, builder, cache, now)
    await kept.signed_snapshot(project)
    await redis_server.stop()
    for _ in range(3):
        await kept.signed_snapshot(project)
    assert len(builder.built) == 4
    await redis_server.start()
    await kept.signed_snapshot(project)
    assert len(builder.built) == 5, "it is left alone for a moment"
    clock[0] += cache_module.REDIS_REST + 1
    await kept.signed_snapshot(project)
    await kept.signed_snapshot(project)
    assert len(builder.built) == 6, "and then used again"
    await cache.close()


async def test_junk_in_the_cache_is_a_miss(world: World, redis_server: RedisServer) -> None:
    await redis_server.start()
    project = await world.project()
    cache = RedisCacheStore(redis_server.url)
    for junk in (b"{", b"[]", b'{"object_path": 1}'):
        await cache._redis.set(f"preview:offer:{project}:e:1", junk)
        assert await cache.get(project, "e:1") is None
    await world.sql(
        "insert into preview.snapshot_offers values (%s, 'e:1', '{}', now() + interval '1 hour')", project
    )
    assert await PostgresCacheStore(world.pool).get(project, "e:1") is None
    await cache.close()


async def test_without_its_project_or_database_there_is_no_offer(world: World) -> None:
    kept = source(world, PaperBuilder(world), PostgresCacheStore(world.pool), [0.0])
    with pytest.raises(SnapshotUnavailable, match="no project"):
        await kept.signed_snapshot(uuid4())
    project = await world.project()
    await world.pool.close()
    assert await PostgresCacheStore(world.pool).get(project, "e:1") is None
    with pytest.raises(SnapshotUnavailable, match="database"):
        await kept.signed_snapshot(project)
