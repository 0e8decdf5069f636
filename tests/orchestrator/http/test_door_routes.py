"""An address that lets a browser in, asked for over the session API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import pytest

from orchestrator_stub.door.passes import Passes, door_keys
from orchestrator_stub.door.store import DoorStore
from tests.orchestrator.sessions.control_world import (
    DOOR_KEYS,
    SERVICE_KEY,
    World,
    assert_problem,
    bearer,
    control_world,
)

SERVICE = bearer(SERVICE_KEY)


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


async def test_a_session_has_an_address_and_its_project_a_name(world: World) -> None:
    owner = await world.user()
    project = await world.project(owner)
    first, second = [(await world.create(project)).json() for _ in range(2)]
    member = bearer(world.user_token(owner))
    urls = []
    for session, headers in ((first, SERVICE), (second, member)):
        answer = await world.http.post(
            f"/v1/sessions/{session['session_id']}/door", json={"path": "/a?b=c#d"}, headers=headers
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["expires_at"].endswith("Z")
        urls.append(urlsplit(answer.json()["url"]))
        query = parse_qs(urls[-1].query)
        passes = Passes(door_keys(DOOR_KEYS), lambda: 0.0)
        found = passes.read("code", query["code"][0])
        assert found is not None
        assert (found.session_id, found.version) == (UUID(session["session_id"]), 0)
        assert query["to"] == ["/a?b=c#d"]
    # The name is the project's, whichever session: what a browser keeps for it outlives them.
    assert urls[0].netloc == urls[1].netloc
    other = (await world.session())["session_id"]
    elsewhere = await world.http.post(f"/v1/sessions/{other}/door", headers=SERVICE)
    assert urlsplit(elsewhere.json()["url"]).netloc != urls[0].netloc
    # A code after it was taken back is of the next version, and opens again.
    one = f"/v1/sessions/{first['session_id']}/door"
    assert (await world.http.post(f"{one}/revoke", headers=member)).json() == {"revoked": True}
    assert await DoorStore(world.pool).version(UUID(first["session_id"])) == 1
    assert await DoorStore(world.pool).version(UUID(second["session_id"])) == 0


async def test_what_is_refused(world: World) -> None:
    session = await world.session()
    one = f"/v1/sessions/{session['session_id']}"
    for path in (
        "//evil.example",
        "/\\evil.example",
        "https://evil.example",
        "a",
        "/a b",
        "/é",
        "/a\r\nX: 1",
        7,
    ):
        answer = await world.http.post(f"{one}/door", json={"path": path}, headers=SERVICE)
        assert_problem(answer, 400, "bad_body")
    await world.http.delete(one, headers=SERVICE)
    assert_problem(await world.http.post(f"{one}/door", headers=SERVICE), 410, "session_over")


async def test_two_that_ask_at_once_get_one_name(world: World) -> None:
    project = UUID((await world.session())["project_id"])
    labels = await asyncio.gather(*(DoorStore(world.pool).label(project) for _ in range(6)))
    assert len(set(labels)) == 1
