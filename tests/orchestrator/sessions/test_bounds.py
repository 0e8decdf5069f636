"""What callers may cost: sessions at a time for a user's token, bytes of archives for a session's."""

from __future__ import annotations

import asyncio
import random
import string
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from orchestrator_stub.http.requests import Requests
from orchestrator_stub.http.routes.agents import AgentRoutes
from orchestrator_stub.http.routes.sessions import SessionRoutes
from orchestrator_stub.platform.storage import StorageClient
from orchestrator_stub.sessions.catchup import Catchup
from orchestrator_stub.snapshots.allowance import Allowance
from orchestrator_stub.snapshots.builder import SnapshotBuilder
from orchestrator_stub.snapshots.cache import PostgresCacheStore, SnapshotCache
from tests.fakes.serving import serve_local
from tests.orchestrator.sessions.control_world import (
    World,
    assert_problem,
    bearer,
    control_world,
    head_of,
    in_process,
    sync,
)

MIB = 2**20


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database, user_sessions=4, project_sessions=3) as running:
        yield running


async def ask(world: World, user: UUID, project: UUID, key: str | None = None, **body: Any) -> httpx.Response:
    """`POST /v1/sessions` by a user."""
    headers = bearer(world.user_token(user)) | ({"Idempotency-Key": key} if key else {})
    return await world.http.post("/v1/sessions", json={"project_id": str(project), **body}, headers=headers)


# --- sessions


async def test_a_user_has_a_bounded_number_of_sessions_in_a_project(world: World) -> None:
    user = await world.user()
    project = await world.project(user)
    made = [await ask(world, user, project, f"k{number}") for number in range(3)]
    assert [answer.status_code for answer in made] == [201] * 3
    refused = await ask(world, user, project)
    problem = assert_problem(refused, 429, "too_many_sessions")
    assert problem["limit"] == 3
    assert int(refused.headers["retry-after"]) > 0
    again = await ask(world, user, project, "k1")
    assert (again.status_code, again.json()["session_id"]) == (200, made[1].json()["session_id"])
    assert (await world.create(project)).status_code == 201, "the service decides for itself"
    ending = await world.http.delete(
        f"/v1/sessions/{made[0].json()['session_id']}", headers=bearer(world.user_token(user))
    )
    assert ending.status_code == 202
    await world.http.delete(
        f"/v1/sessions/{made[1].json()['session_id']}", headers=bearer(world.user_token(user))
    )
    await world.controller.sweep()
    assert (await ask(world, user, project)).status_code == 201


async def test_a_user_has_a_bounded_number_of_sessions_in_all(world: World) -> None:
    user, other = await world.user(), await world.user()
    projects = [await world.project(user) for _ in range(5)]
    statuses = [(await ask(world, user, project)).status_code for project in projects]
    assert statuses == [201] * 4 + [429]
    assert (await ask(world, other, await world.project(other))).status_code == 201


async def test_a_hundred_at_once_are_no_more(world: World) -> None:
    user = await world.user()
    projects = [await world.project(user) for _ in range(4)]
    answers = await asyncio.gather(*(ask(world, user, projects[number % 4]) for number in range(40)))
    assert sorted(answer.status_code for answer in answers) == [201] * 4 + [429] * 36
    assert await world.sql("select count(*) from preview.sessions") == [(4,)]


async def test_bringing_a_failed_session_back_is_making_one(world: World) -> None:
    user = await world.user()
    project = await world.project(user)
    first = (await ask(world, user, project, "k0")).json()["session_id"]
    await world.controller.end(UUID(first), problem="machine_gone: a test")
    await world.controller.settled(UUID(first), 5)
    while (await world.sql("select state from preview.sessions where id = %s", first))[0][0] != "failed":
        await world.controller.sweep()
    kept = await world.sql("select requested_by from preview.sessions where id = %s", first)
    assert kept == [(None,)], "who asked for it is nobody's business any more"
    for number in range(1, 4):
        assert (await ask(world, user, project, f"k{number}")).status_code == 201
    assert_problem(await ask(world, user, project, "k0", generation=2), 429, "too_many_sessions")
    assert (await ask(world, user, project, "k1", generation=2)).status_code == 200, "this one is alive"


@pytest.mark.parametrize(
    "claims", [{"sub": "not-a-uuid"}, {"sub": f"{uuid4()}\0"}, {"sub": "a\0"}, {"app": {"x": ["a\0b"]}}]
)
async def test_a_token_that_names_nobody_is_refused(world: World, claims: dict[str, Any]) -> None:
    user = await world.user()
    project = await world.project(user)
    form = {"role": "authenticated", "sub": str(user), "aud": "authenticated", "exp": 4e9, **claims}
    for path in (f"/v1/sessions?project_id={project}", f"/v1/sessions/{uuid4()}"):
        answer = await world.http.get(path, headers=bearer(world.keys.sign(form)))
        assert_problem(answer, 401, "token_claims")


# --- archives


async def test_a_session_stores_a_bounded_number_of_bytes(database: str, tmp_path: Path) -> None:
    """Sixty revisions and a large file: each revision that the agent claims to stand at is another delta."""
    dice = random.Random(1)
    async with (
        serve_local(database, tmp_path / "storage") as local,
        httpx.AsyncClient(trust_env=False) as http,
        control_world(database, inline_limit=1000) as world,
    ):
        storage = StorageClient(f"{local.url}/storage/v1", local.keys.service_key, http)
        snapshots = SnapshotCache(
            world.pool,
            SnapshotBuilder(world.pool, storage),
            PostgresCacheStore(world.pool),
            url_ttl=600,
            allowance=Allowance(world.pool, 3 * MIB),
        )
        catchup = Catchup(world.pool, snapshots, storage, inline_limit=1000)
        requests = Requests(world.settings, world.store, world.keys)
        app = in_process(
            SessionRoutes(
                requests, world.settings, world.controller, world.store, snapshots, world.runs, world.screens
            ),
            AgentRoutes(
                requests, world.settings, world.controller, world.store, catchup, world.screens
            ),
        )  # fmt: skip
        world.http = httpx.AsyncClient(transport=app, base_url="https://orchestrator.invalid")
        project = await world.project()
        for number in range(20):
            await world.write(project, "a.ts", str(number))
        await world.write(project, "big.txt", "".join(dice.choices(string.printable, k=MIB)))
        first, second = [(await world.create(project)).json() for _ in range(2)]

        async def stored() -> int:
            rows = await world.sql(
                "select coalesce(sum((metadata ->> 'size')::bigint), 0)::bigint from storage.objects"
            )
            return int(rows[0][0])

        epoch = (await head_of(world, first))["epoch"]
        answers = await asyncio.gather(
            *(sync(world, first, epoch=epoch, revision=number, reason="gap") for number in range(20))
        )
        kinds = [answer.status_code for answer in answers]
        assert kinds.count(200) in (4, 5)
        assert await stored() < 5 * MIB
        refused = next(answer for answer in answers if answer.status_code == 429)
        problem = assert_problem(refused, 429, "storage_allowance_spent")
        assert problem["limit"] == 3 * MIB
        wait = int(refused.headers["retry-after"])
        assert 0 < wait <= 3600

        # What is stored already costs nothing, and another session has an allowance of its own.
        given = kinds.index(200)
        assert (await sync(world, first, epoch=epoch, revision=given, reason="gap")).status_code == 200
        missing = kinds.index(429)
        assert (await sync(world, second, epoch=epoch, revision=missing, reason="gap")).status_code == 200

        missing = kinds.index(429, missing + 1)
        assert (await sync(world, first, epoch=epoch, revision=missing, reason="gap")).status_code == 429
        await world.sql(
            "update preview.sessions set stored_at = stored_at - %s * interval '1 second'", wait + 60
        )
        assert (await sync(world, first, epoch=epoch, revision=missing, reason="gap")).status_code == 200
        rebuild = await world.http.post(
            f"/v1/sessions/{first['session_id']}/snapshot",
            json={"rebuild": True},
            headers=bearer(world.user_token((await world.sql("select owner_id from public.projects"))[0][0])),
        )
        assert_problem(rebuild, 429, "storage_allowance_spent")
        await world.http.aclose()
