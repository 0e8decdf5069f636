"""`POST …/changes`: what bodies are taken, what tokens, and that a lost answer is asked for again without harm."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx
import pytest

from orchestrator_stub.write_back.changes import FILE_BYTES
from tests.orchestrator.sessions.control_world import (
    World,
    assert_problem,
    bearer,
    control_world,
    write_token,
)
from tests.orchestrator.write_back.test_lockfiles import ELSEWHERE, HASH, URL, npm

RULES = [{"glob": "**/package-lock.json", "mode": "generated"}, {"glob": "gen/**", "mode": "generated"}]


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


@pytest.fixture
async def session(world: World) -> dict[str, Any]:
    """A session of a project with write-back."""
    session = await world.session()
    await world.sql("select set_write_back(%s, %s::jsonb)", session["project_id"], json.dumps(RULES))
    return session


def upsert(path: str, content: str | None, base: int = 0) -> dict[str, Any]:
    return {"action": "upsert", "file_path": path, "content": content, "base_version": base}


async def post(
    world: World, session: dict[str, Any], *changes: Any, token: str = "", **more: Any
) -> httpx.Response:
    [[epoch]] = await world.sql(
        "select epoch::text from project_heads where project_id = %s", session["project_id"]
    )
    body = {
        "offer_id": "1",
        "epoch": epoch,
        "generation": session["generation"],
        "changes": [*changes],
        **more,
    }
    return await world.http.post(
        f"/v1/sessions/{session['session_id']}/changes",
        json=body,
        headers=bearer(token or write_token(session)),
    )


async def test_the_token_is_given_only_where_there_is_write_back(world: World) -> None:
    session = await world.session()
    path = f"/v1/sessions/{session['session_id']}"
    mine = bearer(world.token(session))
    assert "write_token" not in (await world.http.post(f"{path}/token", headers=mine)).json()
    assert (await world.http.get(f"{path}/run", headers=mine)).json()["write_back"] == []
    await world.sql("select set_write_back(%s, %s::jsonb)", session["project_id"], json.dumps(RULES))
    token = (await world.http.post(f"{path}/token", headers=mine)).json()["write_token"]
    assert [
        rule["glob"] for rule in (await world.http.get(f"{path}/run", headers=mine)).json()["write_back"]
    ] == [rule["glob"] for rule in RULES]
    answer = await post(world, session, upsert("gen/a", "x"), token=token)
    assert answer.json()["results"][0]["outcome"] == "applied"
    await world.sql("update preview.run_settings set plain = '{\"write_back\": false}'")
    assert "write_token" not in (await world.http.post(f"{path}/token", headers=mine)).json()
    assert (await world.http.get(f"{path}/run", headers=mine)).json()["write_back"] == []
    answer = await post(world, session, upsert("gen/b", "x"), token=token, offer_id="2")
    assert answer.json()["results"][0] == {"file_path": "gen/b", "outcome": "refused", "rule": "off"}


async def test_offers_are_judged_file_by_file(world: World, session: dict[str, Any]) -> None:
    changes = [
        upsert("package-lock.json", npm(resolved=ELSEWHERE, integrity=HASH)),
        upsert("a/package-lock.json", npm(resolved=URL, integrity=HASH)),
        upsert("gen/nul", "a\0b"),
        upsert("gen/none", None),
        upsert("elsewhere", "x"),
        upsert("gen/ok", "ž"),
    ]
    answer = await post(world, session, *changes)
    assert [(r["outcome"], r.get("rule")) for r in answer.json()["results"]] == [
        ("refused", "lock_registry"), ("applied", None), ("refused", "text"), ("refused", "text"),
        ("refused", "glob"), ("applied", None),
    ]  # fmt: skip
    assert (await post(world, session, *changes)).json() == answer.json()


async def test_an_answer_is_the_same_although_the_lock_file_before_is_another(
    world: World, session: dict[str, Any]
) -> None:
    bad = upsert("package-lock.json", npm(resolved=ELSEWHERE, integrity=HASH))
    answer = await post(world, session, bad)
    await world.write(
        UUID(session["project_id"]), "package-lock.json", npm(resolved=ELSEWHERE + "?", integrity=HASH)
    )
    assert (await post(world, session, bad)).json() == answer.json()


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"changes": []}, 400, "bad_body"),
    ({"changes": [upsert("gen/a", "x"), upsert("gen/a", "y")]}, 400, "bad_body"),
    ({"changes": [{**upsert("gen/a", "x"), "action": "update"}]}, 400, "bad_body"),
    ({"changes": [{**upsert("gen/a", "x"), "base_version": -1}]}, 400, "bad_body"),
    ({"changes": [{**upsert("gen/a", "x"), "base_version": True}]}, 400, "bad_body"),
    ({"changes": [{**upsert("gen/a", "x"), "executable": 1}]}, 400, "bad_body"),
    ({"changes": [{**upsert("gen/a", "x"), "file_path": "a\0b"}]}, 400, "bad_body"),
    ({"offer_id": ""}, 400, "bad_body"),
    ({"offer_id": "x" * 65}, 400, "bad_body"),
    ({"generation": 7}, 400, "bad_body"),
    ({"changes": [upsert(f"gen/{n}", "x") for n in range(51)]}, 413, "offer_too_large"),
    ({"changes": [upsert("gen/a", "x" * (FILE_BYTES + 1))]}, 413, "offer_too_large"),
    ({"changes": [upsert(f"gen/{n}", "x" * FILE_BYTES) for n in range(5)]}, 413, "offer_too_large"),
    ({"changes": [upsert(f"gen/{n}", "x" * FILE_BYTES) for n in range(9)]}, 413, "body_too_large"),
]


async def test_a_body_that_is_none_changes_nothing(world: World, session: dict[str, Any]) -> None:
    for more, status, kind in BAD:
        assert_problem(
            await post(world, session, **{"changes": [upsert("gen/a", "x")], **more}), status, kind
        )
    assert await world.sql("select from project_files") == []


async def test_an_offer_that_was_another_and_too_many_are_told(world: World, session: dict[str, Any]) -> None:
    await post(world, session, upsert("gen/a", "x"))
    assert_problem(await post(world, session, upsert("gen/a", "y")), 422, "offer_id_used")
    await world.sql("update preview.write_back_state set tokens = 0, refilled_at = now()")
    answer = await post(world, session, upsert("gen/a", "y", 1), offer_id="2")
    assert_problem(answer, 429, "too_many_offers")
    assert 1 <= int(answer.headers["retry-after"]) <= 2


async def test_no_answer_to_an_offer_ends_a_session_but_its_own_end(
    world: World, session: dict[str, Any]
) -> None:
    path = f"/v1/sessions/{session['session_id']}"
    for state, status in (("ready", 200), ("draining", 410), ("gone", 410)):
        await world.sql("update preview.sessions set state = %s", state)
        assert (await post(world, session, upsert("gen/a", "x"))).status_code == status
    await world.sql("update preview.sessions set state = 'ready', generation = generation + 1")
    assert_problem(await post(world, session, upsert("gen/a", "x")), 403, "foreign_session")
    token = (await world.http.post(f"{path}/token", headers=bearer(world.token(session)))).status_code
    assert token == 409, "that is where a machine hears that it was replaced"
