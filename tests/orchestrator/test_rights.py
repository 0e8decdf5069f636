"""Who may what: every route with every kind of token, and all that a stolen session token can do and cannot."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import jwt
import pytest

from orchestrator_stub.platform.tokens import Keyring, mint_session, new_es256, read_session
from tests.orchestrator.sessions.control_world import (
    ROUTES,
    SERVICE_KEY,
    WRITE_KEYS,
    World,
    assert_problem,
    bearer,
    control_world,
    report,
    status_report,
    sync,
    write_token,
)

SERVICE = bearer(SERVICE_KEY)
OFFER = {
    "offer_id": "1", "epoch": "e", "generation": 2,
    "changes": [{"action": "upsert", "file_path": "a", "content": "x", "base_version": 0}],
}  # fmt: skip


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


OK = "ok"
ORDER = (
    "create",
    "list",
    "list all",
    "show",
    "shown",
    "snapshot",
    "room",
    "door",
    "revoke",
    "sync",
    "run",
    "modules",
    "send",
    "token",
    "status",
    "changes",
    "suspend",
    "wake",
    "delete",
)
"""The routes as the table's columns; what ends the session comes last."""

RIGHTS = {
    # who                        new lst all shw scr snp rom dor rvk syn run mod snd tok stat chg sus wak end
    "nobody":                    "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  401 401 401 401",
    "basic":                     "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  401 401 401 401",
    "junk":                      "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  401 401 401 401",
    "the service's key":         "ok  ok  ok  ok  ok  ok  403 ok  ok  401 401 401 401 401 401  401 409 ok  ok",
    "the service's token":       "ok  ok  ok  ok  ok  ok  403 ok  ok  401 401 401 401 401 401  401 409 ok  ok",
    "the owner":                 "ok  ok  403 ok  ok  ok  ok  ok  ok  401 401 401 401 401 401  401 409 ok  ok",
    "a stranger":                "404 404 403 404 404 404 404 404 404 401 401 401 401 401 401  401 404 404 404",
    "anon":                      "403 403 403 403 403 403 403 403 403 401 401 401 401 401 401  401 403 403 403",
    "nobody's user token":       "403 403 403 403 403 403 403 403 403 401 401 401 401 401 401  401 403 403 403",
    "its machine":               "403 403 403 403 403 403 403 403 403 ok  ok  ok  422 ok  ok   401 403 403 403",
    "in another role":           "403 403 403 403 403 403 403 403 403 ok  ok  ok  422 ok  ok   401 403 403 403",
    "the machine before":        "403 403 403 403 403 403 403 403 403 409 409 409 409 409 stop 401 403 403 403",
    "a machine to come":         "403 403 403 403 403 403 403 403 403 409 409 409 409 409 stop 401 403 403 403",
    "another session's":         "403 403 403 403 403 403 403 403 403 403 403 403 403 403 403  401 403 403 403",
    "another project's":         "403 403 403 403 403 403 403 403 403 403 403 403 403 403 403  401 403 403 403",
    "an hour late":              "401 401 401 401 401 401 401 401 401 401 401 401 401 ok  401  401 401 401 401",
    "two days late":             "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  401 401 401 401",
    "another key":               "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  401 401 401 401",
    "no signature":              "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  401 401 401 401",
    "a changed claim":           "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  401 401 401 401",
    "its write token":           "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  ok  401 401 401",
    "another session's to write": "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  403 401 401 401",
    "another project's to write": "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  403 401 401 401",
    "the one before's to write": "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  403 401 401 401",
    "a late one to write":       "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  401 401 401 401",
    "our key, other audience":   "401 401 401 401 401 401 401 401 401 401 401 401 401 401 401  401 401 401 401",
}  # fmt: skip


async def headers_of(world: World, who: str, session: dict[str, Any], owner: UUID) -> dict[str, str]:
    """What this caller sends."""

    def user(**claims: object) -> dict[str, str]:
        return bearer(world.keys.sign({"aud": "authenticated", "exp": time.time() + 60, **claims}))

    claims = {
        "project_id": UUID(session["project_id"]), "session_id": UUID(session["session_id"]), "generation": 2,
        "role": "preview_agent", "now": time.time(), "ttl": 600.0,
    }  # fmt: skip
    mine = world.token(session)
    head, _, signature = mine.split(".")
    match who:
        case "nobody":
            return {}
        case "basic":
            return {"Authorization": "Basic eDp5"}
        case "junk":
            return bearer("junk")
        case "the service's key":
            return SERVICE
        case "the service's token":
            return user(role="service_role")
        case "the owner":
            return bearer(world.user_token(owner))
        case "a stranger":
            return bearer(world.user_token(await world.user()))
        case "anon":
            return user(role="anon")
        case "nobody's user token":
            return user(role="authenticated")
        case "its machine":
            return bearer(mine)
        case "in another role":
            return bearer(world.token(session, role="authenticated"))
        case "the machine before":
            return bearer(world.token(session, generation=1))
        case "a machine to come":
            return bearer(world.token(session, generation=3))
        case "its write token":
            return bearer(write_token(session))
        case "another session's to write":
            return bearer(write_token(session, session_id=uuid4()))
        case "another project's to write":
            return bearer(write_token(session, project_id=uuid4()))
        case "the one before's to write":
            return bearer(write_token(session, generation=1))
        case "a late one to write":
            return bearer(write_token(session, now=time.time() - 700))
        case "our key, other audience":
            return bearer(mint_session(WRITE_KEYS, **claims))  # type: ignore[arg-type]
        case "another session's":
            return bearer(world.token(session, session_id=uuid4()))
        case "another project's":
            return bearer(world.token(session, project_id=uuid4()))
        case "an hour late":
            return bearer(world.token(session, ttl=-3600))
        case "two days late":
            return bearer(world.token(session, ttl=-48 * 3600))
        case "another key":
            return bearer(mint_session(Keyring.from_jwks({"keys": [new_es256("e1")]}), **claims))  # type: ignore[arg-type]
        case "no signature":
            unsigned = jwt.decode(mine, options={"verify_signature": False})
            return bearer(jwt.encode(unsigned, None, algorithm="none"))
        case _:
            other = world.token(session, generation=9).split(".")[1]
            return bearer(f"{head}.{other}.{signature}")


@pytest.mark.parametrize("who", RIGHTS)
async def test_every_route_with_every_kind_of_token(world: World, who: str) -> None:
    owner = await world.user()
    project = await world.project(owner)
    session = (await world.create(project, generation=2)).json()
    one = f"/v1/sessions/{session['session_id']}"
    requests: dict[str, tuple[str, str, object]] = {
        "create": ("POST", "/v1/sessions", {"project_id": str(project)}),
        "list": ("GET", f"/v1/sessions?project_id={project}", None),
        "list all": ("GET", "/v1/sessions", None),
        "show": ("GET", one, None),
        "shown": ("GET", f"{one}/shown?wait=0", None),
        "snapshot": ("POST", f"{one}/snapshot", {}),
        "room": ("POST", f"/v1/projects/{project}/rooms", {"path": "src/App.tsx"}),
        "door": ("POST", f"{one}/door", {}),
        "revoke": ("POST", f"{one}/door/revoke", None),
        "sync": ("POST", f"{one}/sync", {"epoch": None, "revision": 0, "reason": "join"}),
        "run": ("GET", f"{one}/run", None),
        "modules": ("POST", f"{one}/modules", {"key": 40 * "0"}),
        "send": ("PUT", f"{one}/modules", {"key": 40 * "0", "parts": [{"sha256": 64 * "0", "size": 1}]}),
        "token": ("POST", f"{one}/token", {}),
        "status": ("PUT", f"{one}/status", status_report({"revision": 0, "epoch": None})),
        "changes": ("POST", f"{one}/changes", OFFER),
        # The service's is not ready yet: 409 is for who may.
        "suspend": ("POST", f"{one}/suspend", None),
        "wake": ("POST", f"{one}/wake", None),
        "delete": ("DELETE", one, None),
    }
    assert {
        (m, p.partition("?")[0].replace(session["session_id"], "{id}").replace(str(project), "{project}"))
        for m, p, _ in requests.values()
    } == {*ROUTES}
    headers = await headers_of(world, who, session, owner)
    before = await world.sql("select id, state, generation, status from preview.sessions")
    for name, wanted in zip(ORDER, RIGHTS[who].split(), strict=True):
        method, path, body = requests[name]
        answer = await world.http.request(method, path, json=body, headers=headers)
        if wanted in (OK, "stop"):
            assert answer.is_success, (name, answer.text)
            assert (wanted == "stop") == (answer.json().get("action") == "stop"), (name, answer.text)
        else:
            assert answer.status_code == int(wanted), (name, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"
            assert ("www-authenticate" in answer.headers) == (wanted == "401")
    if OK not in RIGHTS[who]:
        assert await world.sql("select id, state, generation, status from preview.sessions") == before


async def test_what_a_stolen_session_token_can_do_and_what_ends_it(world: World) -> None:
    """The whole of the first list in docs/security.md, line by line; the channel is `tests/database/test_access.py`."""
    session = await world.session()
    path = f"/v1/sessions/{session['session_id']}"
    await world.write(UUID(session["project_id"]), "secret.ts", "its source\n")
    stolen = world.token(session)

    # Read the current files.
    answer = await sync(world, session, epoch=None)
    assert answer.json()["kind"] == "snapshot"
    epoch = (await report(world, session, stolen)).json()["epoch"]
    answer = await sync(world, session, epoch=epoch, revision=0)
    assert answer.json()["changes"][0]["content"] == "its source\n"
    # Exchange itself for the next token, also late.
    late = world.token(session, ttl=-3600)
    renewed = (await world.http.post(f"{path}/token", headers=bearer(late))).json()["realtime_token"]
    claims = read_session(world.keys, renewed)
    assert (str(claims.session_id), claims.generation) == (session["session_id"], session["generation"])
    # Call the preview ready, and keep the lease alive.
    assert (await report(world, session, stolen, state="serving")).status_code == 200
    await world.pass_time(world.settings.lease_seconds - 10)
    assert (await report(world, session, stolen, state="hydrating")).status_code == 200
    await world.pass_time(world.settings.lease_seconds - 10)
    await world.controller.sweep()
    assert (await world.http.get(path, headers=SERVICE)).json()["state"] == "ready"

    # A newer machine ends all of it; so does the session's end.
    await world.sql("update preview.sessions set idempotency_key = 'k' where id = %s", session["session_id"])
    replaced = (await world.create(UUID(session["project_id"]), key="k", generation=2)).json()
    assert replaced["session_id"] == session["session_id"]
    for token in (stolen, renewed, late):
        assert (await world.http.post(f"{path}/token", headers=bearer(token))).status_code == 409
    assert (await sync(world, session, epoch=epoch)).status_code == 409
    assert (await report(world, session, stolen)).json()["action"] == "stop"
    newer = world.token(replaced)
    await world.http.delete(path, headers=SERVICE)
    await world.controller.sweep()
    for token in (stolen, newer):
        assert (await world.http.post(f"{path}/token", headers=bearer(token))).status_code == 410
        assert (await report(world, session, token)).status_code == 410


async def test_a_user_has_previews_of_their_own_projects_only(world: World) -> None:
    ada, bob = await world.user(), await world.user()
    project = await world.project(ada)
    mine, his = bearer(world.user_token(ada)), bearer(world.user_token(bob))
    body = {"project_id": str(project)}
    session = (await world.http.post("/v1/sessions", json=body, headers=mine)).json()
    path = f"/v1/sessions/{session['session_id']}"
    assert (await world.http.get(path, headers=mine)).status_code == 200
    listed = await world.http.get("/v1/sessions", params=body, headers=mine)
    assert [s["session_id"] for s in listed.json()["sessions"]] == [session["session_id"]]
    assert_problem(await world.http.post("/v1/sessions", json=body, headers=his), 404, "project_unknown")
    assert_problem(await world.http.get("/v1/sessions", params=body, headers=his), 404, "project_unknown")
    assert_problem(await world.http.get("/v1/sessions", headers=mine), 403, "not_allowed")
    for method, where in (("GET", path), ("DELETE", path), ("POST", f"{path}/snapshot")):
        assert_problem(await world.http.request(method, where, headers=his), 404, "session_unknown")
    assert (await world.http.delete(path, headers=mine)).status_code == 202


async def test_what_a_stolen_session_token_cannot_do(world: World) -> None:
    """The whole list of docs/security.md, for the routes of this service."""
    session, other = await world.session(), await world.session()
    stolen = bearer(world.token(session))
    own, foreign = (f"/v1/sessions/{s['session_id']}" for s in (session, other))
    body = {"epoch": None, "revision": 0, "reason": "join"}
    creation = {"project_id": session["project_id"]}
    assert_problem(await world.http.post("/v1/sessions", json=creation, headers=stolen), 403, "not_allowed")
    for method, where in (
        ("GET", "/v1/sessions"), ("GET", own), ("DELETE", own), ("POST", f"{own}/snapshot"),
    ):  # fmt: skip
        assert_problem(await world.http.request(method, where, headers=stolen), 403, "not_allowed")
    for method, where, sent in (
        ("POST", f"{foreign}/sync", body),
        ("POST", f"{foreign}/token", {}),
        ("PUT", f"{foreign}/status", status_report({"revision": 0, "epoch": None})),
    ):
        answer = await world.http.request(method, where, json=sent, headers=stolen)
        assert_problem(answer, 403, "foreign_session")
    moved = bearer(world.token(session, project_id=UUID(other["project_id"])))
    assert_problem(await world.http.post(f"{own}/sync", json=body, headers=moved), 403, "foreign_session")
