"""What a deleted project leaves is read by nobody and is cleared away; real database, storage endpoints and sockets."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from orchestrator_stub.platform.storage import StorageClient, StorageFailure
from orchestrator_stub.sessions.store import ProjectUnknown, SessionStore
from orchestrator_stub.snapshots import deletion
from orchestrator_stub.snapshots.builder import SnapshotBuilder
from orchestrator_stub.snapshots.deletion import BUCKETS, DeletedProjects
from orchestrator_stub.snapshots.worker import SnapshotWorker
from tests.fakes.serving import Local, serve_local

SECRET = b"the owner's secret"
HASH = hashlib.sha256(SECRET).hexdigest()


class Works:
    """People, a project of one of them, and what each does with their own token."""

    def __init__(self, local: Local, pool: AsyncConnectionPool[Any], http: httpx.AsyncClient) -> None:
        self.local = local
        self.pool = pool
        self.http = http
        self.storage = StorageClient(f"{local.url}/storage/v1", local.keys.service_key, http)
        self.deleted = DeletedProjects(pool, self.storage)

    def worker(self) -> SnapshotWorker:
        return SnapshotWorker(
            self.local.dsn, self.pool, SnapshotBuilder(self.pool, self.storage), self.storage, url_ttl=60
        )

    async def user(self) -> UUID:
        user_id = uuid4()
        await self.local.sql("insert into auth.users (id) values (%s)", user_id)
        await self.local.sql("insert into public.user_profiles (id) values (%s)", user_id)
        return user_id

    async def project(self, owner: UUID, project_id: UUID | None = None) -> UUID:
        project_id = project_id or uuid4()
        await self.local.sql("insert into public.projects (id, owner_id) values (%s, %s)", project_id, owner)
        return project_id

    def headers(self, user_id: UUID) -> dict[str, str]:
        token = self.local.token(role="authenticated", sub=str(user_id))
        return {"authorization": f"Bearer {token}", "apikey": self.local.keys.anon_key}

    async def upload(self, user_id: UUID, project_id: UUID) -> httpx.Response:
        url = f"{self.local.url}/storage/v1/object/project-assets/{project_id}/{HASH}"
        return await self.http.post(url, content=SECRET, headers=self.headers(user_id))

    async def download(self, user_id: UUID, project_id: UUID) -> httpx.Response:
        url = f"{self.local.url}/storage/v1/object/authenticated/project-assets/{project_id}/{HASH}"
        return await self.http.get(url, headers=self.headers(user_id))

    async def rpc(self, user_id: UUID, name: str, **arguments: object) -> httpx.Response:
        url = f"{self.local.url}/rest/v1/rpc/{name}"
        return await self.http.post(url, json=arguments, headers=self.headers(user_id))

    async def save(self, user_id: UUID, project_id: UUID) -> httpx.Response:
        return await self.rpc(
            user_id,
            "upsert_project_file",
            project_uuid=str(project_id),
            p_file_path="secret.ts",
            p_content="hunter2",
        )

    async def fill(self, owner: UUID, project_id: UUID) -> None:
        """Everything that a project leaves somewhere."""
        assert (await self.upload(owner, project_id)).status_code == 200
        assert (await self.save(owner, project_id)).status_code == 200
        assert (
            await self.rpc(owner, "create_project_snapshot", project_uuid=str(project_id))
        ).status_code == 200
        assert await self.worker().take_one()
        await self.storage.upload("preview-bundles", f"{project_id}/a/b/bundle.js", b"x", 1)
        await self.storage.upload("preview-modules", f"{project_id}/{'a' * 40}/{uuid4()}.0", b"x", 1)

    async def objects(self, project_id: UUID) -> list[str]:
        rows = await self.local.sql(
            "select bucket_id from storage.objects where name like %s order by 1", f"{project_id}/%"
        )
        return [bucket for (bucket,) in rows]

    async def left(self, project_id: UUID) -> tuple[list[str], int]:
        """Objects by bucket, and messages."""
        rows = await self.local.sql(
            "select count(*) from realtime.messages where topic = %s", f"project:{project_id}"
        )
        return await self.objects(project_id), rows[0][0]

    async def delete(self, project_id: UUID) -> None:
        await self.local.sql("delete from public.projects where id = %s", project_id)

    async def clean(self) -> None:
        while await self.deleted.clean_some():
            pass


@pytest.fixture
async def works(database: str, tmp_path: Path) -> AsyncIterator[Works]:
    async with serve_local(database, tmp_path / "storage") as local:
        pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]] = AsyncConnectionPool(
            database, min_size=1, max_size=4, open=False, kwargs={"autocommit": True}
        )
        async with pool, httpx.AsyncClient(trust_env=False) as http:
            yield Works(local, pool, http)


@pytest.mark.parametrize("cleaned", [False, True], ids=["at once", "after the cleaning"])
async def test_whoever_has_the_id_next_reads_nothing_of_the_old(works: Works, cleaned: bool) -> None:
    owner, other = await works.user(), await works.user()
    project_id = await works.project(owner)
    await works.fill(owner, project_id)
    assert (await works.download(owner, project_id)).content == SECRET
    await works.delete(project_id)
    if cleaned:
        await works.clean()
    await works.project(other, project_id)  # as a product's own table may allow, or the service role

    for somebody in (owner, other):
        assert (await works.download(somebody, project_id)).status_code == 400
        listed = await works.http.post(
            f"{works.local.url}/storage/v1/object/list/project-assets",
            json={"prefix": f"{project_id}/"},
            headers=works.headers(somebody),
        )
        assert listed.json() == []
        assert (await works.rpc(somebody, "list_current_files", project_uuid=str(project_id))).json() == []
        assert (await works.upload(somebody, project_id)).status_code == 400
        async with works.local.socket() as phoenix:
            topic = f"realtime:project:{project_id}"
            replay = {"since": 0, "limit": 25}
            config = {
                "broadcast": {"self": False, "ack": False, "replay": replay},
                "presence": {"key": ""},
                "private": True,
            }
            token = works.local.token(role="authenticated", sub=str(somebody))
            await phoenix.push(topic, "phx_join", {"config": config, "access_token": token})
            frame = await phoenix.frame()
            assert "hunter2" not in str(frame)
            assert "error" in str(frame), frame
    refused = await works.save(other, project_id)
    assert refused.status_code == 410, refused.text
    assert "was deleted, and its id is not used again" in refused.json()["message"]
    assert (await works.save(owner, project_id)).status_code == 404
    store = SessionStore(works.pool)
    assert not await store.may({"role": "authenticated", "sub": str(other)}, project_id, "read")
    with pytest.raises(ProjectUnknown):
        await store.create(project_id, key=None, generation=1, ttl=60)


async def test_a_deletion_clears_everything_it_left_and_nothing_else(works: Works) -> None:
    owner = await works.user()
    project_id, kept = await works.project(owner), await works.project(owner)
    for project in (project_id, kept):
        await works.fill(owner, project)
    await works.storage.upload("project-assets", "somebody/else.png", b"x", 1)
    before = await works.left(kept)
    assert sorted(before[0]) == sorted(BUCKETS)
    await works.delete(project_id)
    running = asyncio.create_task(works.worker().run())
    try:
        await until(lambda: is_cleaned(works, project_id))
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert await works.left(project_id) == ([], 0)
    assert await works.left(kept) == before
    assert await works.local.sql("select count(*) from storage.objects where name = 'somebody/else.png'") == [
        (1,)
    ]


async def test_cleaning_goes_on_where_it_was_killed(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deletion, "BATCH", 2)
    owner = await works.user()
    project_id = await works.project(owner)
    for number in range(5):
        await works.storage.upload("project-assets", f"{project_id}/{number:064x}", b"x", 1)
    await works.delete(project_id)
    assert await works.deleted.clean_some()
    assert len(await works.objects(project_id)) == 3
    # Killed with the claim held: nobody takes it before its time, and then whoever comes.
    await works.local.sql("update preview.deleted_projects set claimed_until = now() + interval '1 minute'")
    assert not await works.deleted.clean_some()
    await works.local.sql("update preview.deleted_projects set claimed_until = now() - interval '1 second'")
    await works.clean()
    assert await works.left(project_id) == ([], 0)
    assert await is_cleaned(works, project_id)


async def test_a_storage_that_refuses_is_asked_again_later(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await works.user()
    refused, next_one = await works.project(owner), await works.project(owner)
    for project in (refused, next_one):
        await works.fill(owner, project)
        await works.delete(project)
    real = StorageClient.delete

    async def away(self: StorageClient, bucket: str, paths: list[str]) -> None:
        if paths[0].startswith(str(refused)):
            raise StorageFailure("delete", "HTTP 503", transient=True)
        await real(self, bucket, paths)

    monkeypatch.setattr(StorageClient, "delete", away)
    await works.clean()
    assert (await is_cleaned(works, refused), await is_cleaned(works, next_one)) == (False, True)
    monkeypatch.undo()
    await works.local.sql("update preview.deleted_projects set claimed_until = now() - interval '1 second'")
    await works.clean()
    assert await works.left(refused) == ([], 0)


async def test_what_comes_after_the_cleaning_is_cleared_too(works: Works) -> None:
    owner = await works.user()
    project_id = await works.project(owner)
    await works.fill(owner, project_id)
    await works.delete(project_id)
    await works.clean()
    assert await works.deleted.reopen() == 0
    # A build or an upload that was under way.
    await works.storage.upload("project-snapshots", f"{project_id}/9-late.zip", b"x", 1)
    assert await works.deleted.reopen() == 1
    await works.clean()
    assert await works.objects(project_id) == []


async def test_a_products_project_with_assets_alone_is_looked_after(works: Works) -> None:
    """No trigger of ours is on a product's table: without a head, its deletion would go unnoticed."""
    await works.local.sql("drop trigger new_head on public.projects")
    owner = await works.user()
    project_id = await works.project(owner)
    assert (await works.upload(owner, project_id)).status_code == 200
    assert await works.local.sql("select count(*) from public.project_heads") == [(0,)]
    await works.deleted.reopen()
    await works.delete(project_id)
    await works.clean()
    assert await works.objects(project_id) == []


async def is_cleaned(works: Works, project_id: UUID) -> bool:
    rows = await works.local.sql(
        "select cleaned_at is not null from preview.deleted_projects where project_id = %s", project_id
    )
    return rows == [(True,)]


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)
