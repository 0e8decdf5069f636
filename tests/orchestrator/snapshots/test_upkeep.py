"""Upkeep over a real database and the real storage endpoints: what is due is done, once, by whoever comes first."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from prometheus_client import CollectorRegistry
from psycopg_pool import AsyncConnectionPool

from orchestrator_stub.platform.storage import ASSETS, StorageClient, StorageFailure
from orchestrator_stub.snapshots.upkeep import REST, Upkeep
from tests.fakes.serving import Local, serve_local


class Works:
    """A project, and orchestrators that keep it up."""

    def __init__(self, local: Local, pool: AsyncConnectionPool[Any], http: httpx.AsyncClient) -> None:
        self.local = local
        self.pool = pool
        self.storage = StorageClient(f"{local.url}/storage/v1", local.keys.service_key, http)
        self.registry = CollectorRegistry()
        self.now = 0.0
        self.upkeep = self.orchestrator(self.registry)

    def orchestrator(self, registry: CollectorRegistry | None = None) -> Upkeep:
        return Upkeep(self.pool, self.storage, registry=registry, clock=lambda: self.now)

    async def project(self) -> UUID:
        user_id, project_id = uuid4(), uuid4()
        await self.local.sql("insert into auth.users (id) values (%s)", user_id)
        await self.local.sql("insert into public.user_profiles (id) values (%s)", user_id)
        await self.local.sql(
            "insert into public.projects (id, owner_id) values (%s, %s)", project_id, user_id
        )
        return project_id

    async def upload(self, project_id: UUID, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        await self.storage.upload(ASSETS, f"{project_id}/{digest}", content, len(content))
        return digest

    async def name(self, project_id: UUID, path: str, digest: str) -> None:
        change = [{"file_path": path, "content_hash": digest, "encoding": "base64"}]
        await self.local.sql(
            "select public.apply_project_files(%s, %s::jsonb)", project_id, json.dumps(change)
        )

    async def days_pass(self) -> None:
        """Nothing is fresh any more, and all of it is due."""
        await self.local.sql("update storage.objects set created_at = created_at - interval '3 days'")
        await self.local.sql("update public.project_heads set kept_up_at = kept_up_at - interval '3 days'")

    async def keep_up(self) -> int:
        steps = 0
        while await self.upkeep.step():
            steps += 1
        return steps

    async def objects(self, project_id: UUID) -> set[str]:
        found = await self.storage.list(ASSETS, f"{project_id}/")
        return {str(item["name"]) for item in found}

    def value(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"preview_orchestrator_{name}", labels)
        assert value is not None, name
        return value


@pytest.fixture
async def works(database: str, tmp_path: Path) -> AsyncIterator[Works]:
    async with serve_local(database, tmp_path / "storage") as local:
        pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]] = AsyncConnectionPool(
            database, min_size=1, max_size=4, open=False, kwargs={"autocommit": True}
        )
        async with pool, httpx.AsyncClient(trust_env=False) as http:
            yield Works(local, pool, http)


async def test_objects_that_nothing_names_are_collected_and_others_stay(works: Works) -> None:
    project, other = await works.project(), await works.project()
    named, orphan = await works.upload(project, b"named"), await works.upload(project, b"orphan")
    theirs = await works.upload(other, b"orphan")
    await works.name(project, "a.png", named)
    await works.name(other, "a.png", theirs)
    await works.keep_up()
    assert await works.objects(project) == {named, orphan}, "an upload comes before the save that names it"
    await works.days_pass()
    await works.keep_up()
    assert await works.objects(project) == {named}
    assert await works.objects(other) == {theirs}
    assert works.value("forgotten_total", what="assets") == 1
    # Its bytes come again, and can be named.
    await works.name(project, "b.png", await works.upload(project, b"orphan"))


async def test_it_goes_on_where_it_was_killed(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    project = await works.project()
    orphan = await works.upload(project, b"orphan")
    await works.local.sql("select public.upsert_project_file(%s, 'a', '1')", project)
    await works.days_pass()
    real = works.storage.delete

    async def killed(bucket: str, paths: list[str], *, after: bool) -> None:
        if after:
            await real(bucket, paths)
        raise asyncio.CancelledError

    for after in (False, True):
        monkeypatch.setattr(
            works.storage, "delete", lambda bucket, paths, after=after: killed(bucket, paths, after=after)
        )
        with pytest.raises(asyncio.CancelledError):
            await works.keep_up()
        assert await works.objects(project) == (set() if after else {orphan})
        with pytest.raises(psycopg.Error) as error:
            await works.name(project, "a.png", orphan)
        assert error.value.sqlstate == ("PT400" if after else "PT503")
    monkeypatch.undo()
    await works.keep_up()
    assert await works.local.sql("select * from preview.unused_assets") == []


async def test_a_storage_that_refuses_is_left_alone_for_a_while(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = await works.project()
    await works.upload(project, b"orphan")
    await works.local.sql("select public.upsert_project_file(%s, 'a', '1')", project)
    await works.days_pass()
    calls = 0

    async def refuse(bucket: str, paths: list[str]) -> None:
        nonlocal calls
        calls += 1
        raise StorageFailure("delete", "HTTP 503", transient=True)

    monkeypatch.setattr(works.storage, "delete", refuse)
    assert await works.keep_up() == 2
    assert calls == 1
    await works.days_pass()
    assert await works.keep_up() == 2, "history is forgotten meanwhile, and becomes splices"
    assert calls == 1
    monkeypatch.undo()
    works.now += REST
    await works.keep_up()
    assert await works.objects(project) == set()


async def test_a_right_that_is_missing_does_not_end_the_worker(works: Works) -> None:
    await works.local.sql("alter function preview.keep_up rename to other")
    assert not await works.upkeep.step()
    await works.local.sql("alter function preview.other rename to keep_up")
    project = await works.project()
    await works.local.sql("select public.upsert_project_file(%s, 'a', '1')", project)
    await works.days_pass()
    assert not await works.upkeep.step(), "it rests"
    works.now += REST
    assert await works.upkeep.step()


async def test_many_orchestrators_do_each_project_once(works: Works) -> None:
    projects = [await works.project() for _ in range(6)]
    for project in projects:
        await works.local.sql("select public.upsert_project_file(%s, 'a', '1')", project)
    await works.days_pass()
    orchestrators = [works.orchestrator() for _ in range(4)]

    async def work(upkeep: Upkeep) -> int:
        steps = 0
        while await upkeep.step():
            steps += 1
        return steps

    # Each is kept up, and looked through for what becomes splices.
    assert sum(await asyncio.gather(*map(work, orchestrators))) == 2 * len(projects)


async def archive(works: Works, project: UUID, name: str, *, hours: float) -> None:
    """An archive of so long ago."""
    await works.storage.upload("project-snapshots", f"{project}/{name}.zip", b"zip", 3)
    await works.local.sql(
        "update storage.objects set created_at = now() - %s * interval '1 hour' where name = %s",
        hours,
        f"{project}/{name}.zip",
    )


async def test_archives_sessions_and_requests_that_nobody_needs_are_collected(works: Works) -> None:
    project, lately = await works.project(), await works.project()
    for each in (project, lately):
        await works.local.sql("select public.upsert_project_file(%s, 'a', '1')", each)
    for name, hours in (("1-a", 80), ("2-b", 60), ("2-from-1-c", 30), ("3-d", 20)):
        await archive(works, project, name, hours=hours)
    # One that was replaced a moment ago may be on its way to a machine; one of forgotten history is of no use.
    await archive(works, lately, "5-a", hours=60)
    await archive(works, lately, "6-b", hours=1)
    for state, days in (("gone", 31), ("failed", 31), ("gone", 29), ("ready", 31)):
        await works.local.sql(
            "insert into preview.sessions (project_id, state, state_since, expires_at)"
            " values (%s, %s, now() - %s * interval '1 day', now())",
            project, state, days,
        )  # fmt: skip
    for state, days in (("ready", 8), ("failed", 8), ("ready", 6), ("building", 8)):
        await works.local.sql(
            "insert into public.project_snapshots (project_id, state, created_at, finished_at)"
            " values (%s, %s, now() - %s * interval '1 day', now() - %s * interval '1 day')",
            project, state, days, days,
        )  # fmt: skip
    await works.local.sql("update public.project_heads set kept_up_at = '-infinity'")
    await works.keep_up()

    async def left(of: UUID) -> set[str]:
        return {str(item["name"]) for item in await works.storage.list("project-snapshots", f"{of}/")}

    assert await left(project) == {"3-d.zip"}
    assert await left(lately) == {"5-a.zip", "6-b.zip"}
    states = "select state from preview.sessions order by state"
    assert await works.local.sql(states) == [("gone",), ("ready",)]
    states = "select state from public.project_snapshots order by state"
    assert await works.local.sql(states) == [("building",), ("ready",)]
    collected = {
        what: works.value("forgotten_total", what=what) for what in ("archives", "sessions", "requests")
    }
    assert collected == {"archives": 3, "sessions": 2, "requests": 2}
    await works.local.sql(
        "update public.project_heads set kept_up_at = '-infinity', pruned_revision = 6, revision = 6"
    )
    await works.local.sql("update storage.objects set created_at = created_at - interval '3 days'")
    await works.keep_up()
    assert await left(project) == set(), "history is forgotten beyond the last"
    assert await left(lately) == {"6-b.zip"}
    for setting in ("sessions_kept", "snapshot_requests_kept", "archives_kept"):
        await works.local.sql(f"update preview.settings set {setting} = null")
    await works.local.sql("update preview.sessions set state = 'gone', state_since = '-infinity'")
    await works.local.sql(
        "update public.project_heads set kept_up_at = '-infinity', pruned_revision = 9, revision = 9"
    )
    await works.keep_up()
    assert await works.local.sql("select count(*) from preview.sessions") == [(2,)], (
        "nothing is ever collected"
    )
    assert await left(lately) == {"6-b.zip"}


async def test_what_waits_is_measured(works: Works) -> None:
    projects = [await works.project() for _ in range(3)]
    await works.upkeep.measure()
    assert works.value("deleted_projects") == works.value("deleted_projects_oldest_seconds") == 0
    assert works.value("upkeep_overdue_seconds") == 0
    await works.days_pass()
    await works.local.sql("delete from public.projects where id = any(%s)", projects[:2])
    await works.local.sql("update preview.deleted_projects set queued_at = now() - interval '1 hour'")
    await works.upkeep.measure()
    assert works.value("deleted_projects") == 0, "that was just done"
    works.now += 15
    await works.upkeep.measure()
    assert works.value("deleted_projects") == 2
    assert 3600 <= works.value("deleted_projects_oldest_seconds") < 3700
    assert 0 <= works.value("upkeep_overdue_seconds") - 2 * 86400 < 100
