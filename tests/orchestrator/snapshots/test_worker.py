"""The job behind `create_project_snapshot`, over a real database and the real storage endpoints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from orchestrator_stub.platform.storage import StorageClient
from orchestrator_stub.snapshots.builder import BUCKET, SnapshotBuilder
from orchestrator_stub.snapshots.worker import TAKE, SnapshotWorker
from tests.fakes.serving import Local, serve_local


class Works:
    """A project, and jobs that share its requests."""

    def __init__(
        self, local: Local, pool: AsyncConnectionPool[Any], http: httpx.AsyncClient, project: UUID
    ) -> None:
        self.local = local
        self.project_id = project
        self.storage = StorageClient(f"{local.url}/storage/v1", local.keys.service_key, http)
        self.pool = pool
        self.now = time.time()

    def worker(self) -> SnapshotWorker:
        snapshots = SnapshotBuilder(self.pool, self.storage)
        return SnapshotWorker(
            self.local.dsn, self.pool, snapshots, self.storage, url_ttl=60, clock=lambda: self.now
        )

    async def save(self, content: str) -> None:
        await self.local.sql("select public.upsert_project_file(%s, 'a.ts', %s)", self.project_id, content)

    async def ask(self) -> str:
        rows = await self.local.sql("select public.create_project_snapshot(%s)", self.project_id)
        return str(rows[0][0]["snapshot_id"])

    async def request(self, snapshot_id: str) -> tuple[Any, ...]:
        rows = await self.local.sql(
            "select state, revision, object_path, size_bytes, problem from public.project_snapshots where id = %s",
            snapshot_id,
        )
        return rows[0]


@pytest.fixture
async def works(database: str, tmp_path: Path) -> AsyncIterator[Works]:
    async with serve_local(database, tmp_path / "storage") as local:
        user_id, project_id = uuid4(), uuid4()
        await local.sql("insert into auth.users (id) values (%s)", user_id)
        await local.sql("insert into public.user_profiles (id) values (%s)", user_id)
        await local.sql("insert into public.projects (id, owner_id) values (%s, %s)", project_id, user_id)
        pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]] = AsyncConnectionPool(
            database, min_size=1, max_size=4, open=False, kwargs={"autocommit": True}
        )
        async with pool, httpx.AsyncClient() as http:
            yield Works(local, pool, http, project_id)


async def test_what_is_asked_for_is_built_kept_and_said(works: Works) -> None:
    await works.save("one")
    running = asyncio.create_task(works.worker().run())
    try:
        async with works.local.socket() as phoenix:
            topic = f"realtime:project:{works.project_id}"
            token = works.local.token(project_id=str(works.project_id))
            config = {"broadcast": {"self": False, "ack": False}, "presence": {"key": ""}, "private": True}
            await phoenix.push(topic, "phx_join", {"config": config, "access_token": token})
            assert (await phoenix.frame())[3] == "phx_reply"
            snapshot_id = await works.ask()
            while True:
                frame = await phoenix.frame()
                if "snapshot:ready" in str(frame):
                    break
        said = frame[4] if isinstance(frame[4], dict) else {}
        payload = said.get("payload", said)
        url = (payload.get("binary") or payload)["snapshot_url"] if isinstance(payload, dict) else ""
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    state, revision, path, size, problem = await works.request(snapshot_id)
    assert (state, revision, problem) == ("ready", 1, None)
    assert len(await works.storage.download(BUCKET, path)) == size
    async with httpx.AsyncClient() as http:
        assert len((await http.get(url)).content) == size


async def test_two_jobs_share_and_none_is_built_twice(works: Works) -> None:
    await works.save("one")
    await works.ask()
    assert sorted(await asyncio.gather(works.worker().take_one(), works.worker().take_one())) == [False, True]
    assert not await works.worker().take_one()


async def test_what_a_killed_orchestrator_left_is_taken_again(works: Works) -> None:
    await works.save("one")
    snapshot_id = await works.ask()
    await works.local.sql("update public.project_snapshots set state = 'building'")
    assert not await works.worker().take_one(), "it may still be at it"
    await works.local.sql("update public.project_snapshots set created_at = now() - interval '11 minutes'")
    assert await works.worker().take_one()
    assert (await works.request(snapshot_id))[0] == "ready"


async def test_a_request_that_waited_long_is_built_by_one_orchestrator(works: Works) -> None:
    await works.save("one")
    snapshot_id = await works.ask()
    await works.local.sql("update public.project_snapshots set created_at = now() - interval '1 hour'")
    taken = [await works.local.sql(TAKE) for _ in range(3)]
    assert [len(rows) for rows in taken] == [1, 0, 0], "the first is still building"
    await works.local.sql("update public.project_snapshots set taken_at = now() - interval '11 minutes'")
    assert await works.worker().take_one(), "its orchestrator was killed"
    assert (await works.request(snapshot_id))[0] == "ready"


@pytest.mark.parametrize(("files", "inline"), [(3, True), (490, False), (501, False)])
async def test_a_manifest_that_realtime_would_drop_is_left_out(
    works: Works, files: int, inline: bool
) -> None:
    deep = "/".join(["d" * 120] * 4)
    changes = [{"file_path": f"{deep}/{number}.ts", "content": str(number)} for number in range(files)]
    await works.local.sql(
        "select public.apply_project_files(%s, %s::jsonb)", works.project_id, json.dumps(changes)
    )
    await works.ask()
    assert await works.worker().take_one()
    [(size, manifest, limit)] = await works.local.sql(
        "select octet_length(payload::text), payload -> 'manifest', broadcast_limit_bytes from realtime.messages,"
        " preview.settings where event = 'snapshot:ready'"
    )
    assert size <= limit + len('{"id": "00000000-0000-4000-8000-000000000000"}')
    assert (manifest is not None) is inline
    if manifest:
        assert len(manifest["files"]) == files


async def test_a_build_that_fails_says_why(works: Works) -> None:
    await works.save("one")
    snapshot_id = await works.ask()
    await works.local.sql("update storage.buckets set file_size_limit = 1 where id = %s", BUCKET)
    assert await works.worker().take_one()
    state, *_, problem = await works.request(snapshot_id)
    assert state == "failed"
    assert "cannot build a snapshot" in problem


async def test_old_archives_go_and_the_newest_stays(works: Works) -> None:
    for content in ("one", "two", "three"):
        await works.save(content)
        await works.ask()
        assert await works.worker().take_one()
    assert await works.worker().clear_old() == 0
    works.now += 25 * 3600
    assert await works.worker().clear_old() == 2
    left = await works.storage.list(BUCKET, f"{works.project_id}/")
    assert [item["name"].split("-")[0] for item in left] == ["3"]


async def test_a_delta_goes_as_soon_as_its_url_is_over_and_is_not_taken_for_the_newest(works: Works) -> None:
    for content in ("one", "two"):
        await works.save(content)
        await works.ask()
        assert await works.worker().take_one()
    delta = await SnapshotBuilder(works.pool, works.storage).build(works.project_id, base_revision=1)
    assert "from" in delta.object_path
    works.now += 3 * 3600
    assert await works.worker().clear_old() == 1
    works.now += 25 * 3600
    assert await works.worker().clear_old() == 1
    left = await works.storage.list(BUCKET, f"{works.project_id}/")
    assert [item["name"].split("-")[0] for item in left] == ["2"]
