"""Run settings from both sides: who may set and see what, what a machine is told, and that a secret is nowhere else."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from orchestrator_stub.http.requests import Requests
from orchestrator_stub.http.routes.run import RunRoutes
from orchestrator_stub.platform.sealing import CannotOpen, CannotSeal, SealingKeys
from orchestrator_stub.sessions.run_settings import RunSettings
from tests.orchestrator.sessions.control_world import (
    SERVICE_KEY,
    World,
    assert_problem,
    bearer,
    control_world,
    in_process,
    report,
)

SERVICE = bearer(SERVICE_KEY)
SECRET = "a-secret-of-the-project"
NPMRC = "//npm.example/:_authToken=a-token-of-the-registry\n"


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


async def change(world: World, project: UUID, who: dict[str, str] = SERVICE, **run: Any) -> httpx.Response:
    return await world.http.put(f"/v1/projects/{project}/run", json=run, headers=who)


async def read(world: World, session: dict[str, Any], **token: Any) -> httpx.Response:
    """As the session's agent."""
    mine = world.token(session, **token)
    return await world.http.get(f"/v1/sessions/{session['session_id']}/run", headers=bearer(mine))


async def member(world: World, project: UUID) -> dict[str, str]:
    """A member who may write and does not own."""
    user = await world.user()
    await world.sql(
        "insert into public.project_collaborators (project_id, user_id) values (%s, %s)", project, user
    )
    return bearer(world.user_token(user))


PLAIN = {"root": "apps/web", "dev_command": "npm run dev", "dev_port": 3000, "install_command": "npm ci",
         "allowed_hosts": [".preview.example", "own.example"], "transport": "nats"}  # fmt: skip
OWNERS = {"env": {"API_KEY": SECRET}, "npmrc": NPMRC, "public": True, "write_back": True}


async def test_what_a_member_sets_and_what_only_the_owner_and_the_service_do(world: World) -> None:
    owner = await world.user()
    project = await world.project(owner)
    owners, members = bearer(world.user_token(owner)), await member(world, project)
    strangers = bearer(world.user_token(await world.user()))
    session = (await world.create(project)).json()
    machine = bearer(world.token(session))
    for name, value in {**PLAIN, **OWNERS}.items():
        assert_problem(await change(world, project, {}, **{name: value}), 401, "token_missing")
        assert_problem(await change(world, project, machine, **{name: value}), 403, "not_allowed")
        assert_problem(await change(world, project, strangers, **{name: value}), 404, "project_unknown")
        answer = await change(world, project, members, **{name: value})
        if name in PLAIN:
            assert answer.json()[name] == value
        else:
            assert_problem(answer, 403, "not_allowed")
            for none in ({}, None):
                assert_problem(await change(world, project, members, **{name: none}), *(
                    (403, "not_allowed") if none is None or name == "env" else (400, "bad_body")))  # fmt: skip
            assert (await change(world, project, owners, **{name: value})).status_code == 200
        assert (await change(world, project, **{name: value})).status_code == 200
    path = f"/v1/projects/{project}/run"
    for who, status in (
        (owners, 200),
        (members, 200),
        (SERVICE, 200),
        (strangers, 404),
        (machine, 403),
        ({}, 401),
    ):
        assert (await world.http.get(path, headers=who)).status_code == status
    nobody = f"/v1/projects/{uuid4()}/run"
    assert_problem(await world.http.put(nobody, json={}, headers=SERVICE), 404, "project_unknown")


async def test_the_same_at_a_sessions_start(world: World) -> None:
    owner = await world.user()
    project = await world.project(owner)
    owners, members = bearer(world.user_token(owner)), await member(world, project)

    async def create(who: dict[str, str], **run: Any) -> httpx.Response:
        body = {"project_id": str(project), "run": run}
        return await world.http.post("/v1/sessions", json=body, headers=who)

    assert (await create(members, **PLAIN)).status_code == 201
    for name, value in OWNERS.items():
        assert_problem(await create(members, **{name: value}), 403, "not_allowed")
        assert (await create(owners, **{name: value})).status_code == 201


async def test_a_secret_is_given_to_the_agent_and_is_nowhere_else(world: World) -> None:
    project = await world.project()
    with capture_logs() as logs:
        answers = [await change(world, project, env={"API_KEY": SECRET}, npmrc=NPMRC, root="web")]
        answers.append(await world.http.get(f"/v1/projects/{project}/run", headers=SERVICE))
        body = {"project_id": str(project), "run": {"env": {"OWN": SECRET + "-of-the-session"}}}
        answers.append(await world.http.post("/v1/sessions", json=body, headers=SERVICE))
        session = answers[-1].json()
        answers.append(await world.http.get(f"/v1/sessions/{session['session_id']}", headers=SERVICE))
        told = await read(world, session)
        answers.append(await report(world, session, world.token(session)))
    assert told.json()["env"] == {"API_KEY": SECRET, "OWN": SECRET + "-of-the-session"}
    assert told.json()["npmrc"] == NPMRC
    assert told.headers["cache-control"] == "no-store"
    shown = answers[1].json()
    assert (shown["env_names"], shown["has_npmrc"]) == (["API_KEY"], True)
    [spec] = world.platform.specs.values()
    rows = await world.sql(
        "select t::text from preview.run_settings t union all select t::text from preview.sessions t"
    )
    everywhere = [answer.text for answer in answers] + [repr(logs), repr(dict(spec.env)), repr(rows)]
    for place in everywhere:
        assert SECRET not in place
        assert "_authToken" not in place
    assert spec.env["RUN_REVISION"] == "2"
    assert not {"API_KEY", "OWN", "NPMRC"} & set(spec.env)


async def test_what_is_no_secret_is_in_the_machines_environment_and_the_sessions_win(world: World) -> None:
    project = await world.project()
    await change(world, project, **PLAIN, env={"A": "of-the-project", "B": "of-the-project"})
    run = {"root": "apps/admin", "env": {"B": "of-the-session"}}
    answer = await world.http.post(
        "/v1/sessions", json={"project_id": str(project), "run": run}, headers=SERVICE
    )
    [spec] = world.platform.specs.values()
    assert {name: spec.env.get(name) for name in ("DEV_ROOT", "DEV_COMMAND", "DEV_SERVER_PORT", "INSTALL_COMMAND",
                                                  "PREVIEW_HOST", "RUN_REVISION", "RUN_NAMES")} == {
        "DEV_ROOT": "apps/admin", "DEV_COMMAND": "npm run dev", "DEV_SERVER_PORT": "3000",
        "INSTALL_COMMAND": "npm ci", "PREVIEW_HOST": ".preview.example own.example", "RUN_REVISION": "2",
        "RUN_NAMES": "DEV_COMMAND DEV_ROOT DEV_SERVER_PORT INSTALL_COMMAND PREVIEW_HOST",
    }  # fmt: skip
    told = (await read(world, answer.json())).json()
    assert (told["root"], told["dev_port"], told["run_revision"]) == ("apps/admin", 3000, 2)
    assert told["env"] == {"A": "of-the-project", "B": "of-the-session"}


async def test_a_machine_of_a_project_without_any_is_told_so(world: World) -> None:
    session = await world.session()
    [spec] = world.platform.specs.values()
    assert spec.env["RUN_REVISION"] == "0"
    assert "RUN_NAMES" not in spec.env
    assert (await read(world, session)).json()["run_revision"] == 0


async def test_a_change_keeps_what_it_does_not_name_and_null_takes_away(world: World) -> None:
    session = await world.session()
    project = UUID(session["project_id"])
    await change(world, project, root="web", dev_port=3000, env={"A": "1", "B": "2"}, npmrc=NPMRC)
    await change(world, project, dev_port=None, env={"A": None, "C": "3"})
    told = (await read(world, session)).json()
    assert (told["root"], told["dev_port"], told["npmrc"]) == ("web", None, NPMRC)
    assert told["env"] == {"B": "2", "C": "3"}
    await change(world, project, npmrc=None)
    assert (await read(world, session)).json()["npmrc"] is None


async def test_a_heartbeat_is_told_of_a_change(world: World) -> None:
    session = await world.session()
    seen = [(await report(world, session, world.token(session))).json()["run_revision"]]
    for number in range(2):
        await change(world, UUID(session["project_id"]), env={"A": str(number)})
        seen.append((await report(world, session, world.token(session))).json()["run_revision"])
    assert seen == [0, 1, 2]


async def test_they_are_read_with_the_current_token_alone(world: World) -> None:
    project = await world.project()
    session = (await world.create(project, key="k", generation=2)).json()
    assert (await read(world, session)).status_code == 200
    assert_problem(await read(world, session, ttl=-60), 401, "token_expired")
    assert_problem(await read(world, session, generation=1), 409, "generation_superseded")
    await world.http.delete(f"/v1/sessions/{session['session_id']}", headers=SERVICE)
    assert_problem(await read(world, session), 410, "session_over")


@pytest.mark.parametrize(
    "run",
    [
        {"root": "../x"}, {"root": "/etc"}, {"root": "a//b"}, {"root": "a/node_modules"}, {"root": "a\\b"},
        {"root": ""},
        {"dev_command": "vite 'open"}, {"dev_command": " "}, {"dev_command": "a\0b"}, {"dev_port": 0},
        {"dev_port": 65536}, {"dev_port": "3000"}, {"allowed_hosts": ["https://x.example"]}, {"allowed_hosts": ["*"]},
        {"allowed_hosts": ["a.example b.example"]}, {"allowed_hosts": ["a.example"] * 11},
        {"env": {"A": 1}}, {"env": {"A": "x\0"}},
        {"env": {"A": "x" * 32_769}}, {"env": {f"A{n}": "x" for n in range(101)}}, {"npmrc": "x" * 16_385},
        {"env": {"A": f"{SERVICE_KEY}"}}, {"transport": "pigeon"}, {"public": "yes"}, {"unknown": 1},
    ],
    ids=lambda run: json.dumps(run)[:40],
)  # fmt: skip
async def test_what_no_agent_could_use_is_refused(world: World, run: dict[str, Any]) -> None:
    project = await world.project()
    answer = await change(world, project, **run)
    assert_problem(answer, 400, "bad_body")
    assert SERVICE_KEY not in answer.text
    assert await world.sql("select 1 from preview.run_settings") == []


async def test_secrets_are_bounded_together(world: World) -> None:
    project = await world.project()
    assert (await change(world, project, env={"A": "x" * 30_000, "B": "x" * 30_000})).status_code == 200
    assert_problem(await change(world, project, env={"C": "x" * 10_000}), 413, "body_too_large")
    assert (await change(world, project, env={"A": None, "C": "x" * 10_000})).status_code == 200
    many = {f"N{n}": "x" for n in range(99)}
    assert_problem(await change(world, project, env=many), 413, "body_too_large")


async def test_without_a_key_no_secret_is_kept_and_what_was_kept_is_not_shown_wrong(world: World) -> None:
    session = await world.session()
    project = UUID(session["project_id"])
    assert (await change(world, project, env={"A": SECRET})).status_code == 200
    runs = RunSettings(world.pool, SealingKeys())
    requests = Requests(world.settings, world.store, world.keys)
    transport = in_process(RunRoutes(requests, world.settings, runs))
    async with httpx.AsyncClient(transport=transport, base_url="https://orchestrator.invalid") as http:
        keyless = replace(world, http=http)
        assert_problem(await change(keyless, project, env={"B": SECRET}), 503, "run_settings_no_key")
        assert (await change(keyless, project, root="web")).status_code == 200
        problem = assert_problem(await read(keyless, session), 503, "run_settings_sealed")
        assert "RUN_SETTINGS_KEYS" in problem["detail"]


async def test_a_value_that_was_moved_to_another_project_or_name_is_not_opened(world: World) -> None:
    session = await world.session()
    project, other = UUID(session["project_id"]), await world.project()
    await change(world, other, env={"A": SECRET})
    await change(world, project, env={"A": "x"})
    await world.sql(
        "update preview.run_settings set sealed = (select sealed from preview.run_settings where project_id = %s)"
        " where project_id = %s", other, project,
    )  # fmt: skip
    assert_problem(await read(world, session), 503, "run_settings_sealed")


async def test_they_go_with_their_project(world: World) -> None:
    project = await world.project()
    await change(world, project, env={"A": SECRET})
    await world.sql("delete from public.projects where id = %s", project)
    assert await world.sql("select 1 from preview.run_settings") == []


KEYS = SealingKeys({"new": b"n" * 32, "old": b"o" * 32})


@given(st.uuids(), st.text(), st.text())
def test_what_is_sealed_opens_where_it_was_sealed_and_nowhere_else(
    project: UUID, name: str, text: str
) -> None:
    sealed = KEYS.seal(project, name, text)
    assert KEYS.open(project, name, sealed) == text
    assert SealingKeys({"old": b"o" * 32, "new": b"n" * 32}).open(project, name, sealed) == text
    raw = bytearray(base64.b64decode(sealed.partition(".")[2]))
    raw[-1] ^= 1
    for where, what, stored in (
        (uuid4(), name, sealed), (project, name + "x", sealed), (project, name, sealed[:-8]), (project, name, ""),
        (project, name, f"new.{base64.b64encode(raw).decode()}"), (project, name, "other." + sealed.partition(".")[2]),
    ):  # fmt: skip
        with pytest.raises(CannotOpen):
            KEYS.open(where, what, stored)


def test_a_key_that_is_none_is_named_by_its_place_and_not_shown() -> None:
    good = f"a:{base64.b64encode(bytes(32)).decode()}"
    assert (
        SealingKeys.read(f"{good}\nb:{base64.b64encode(b'b' * 32).decode()}").seal(uuid4(), "n", "x")[:2]
        == "a."
    )
    for text in (
        "a",
        "a:secret",
        f"{good} {good}",
        f"{good} b:{base64.b64encode(bytes(16)).decode()}",
        f"-{good}",
    ):
        with pytest.raises(ValueError, match=r"key [12] ") as refused:
            SealingKeys.read(text)
        assert "secret" not in str(refused.value)
    with pytest.raises(CannotSeal):
        SealingKeys.read("").seal(uuid4(), "n", "x")
