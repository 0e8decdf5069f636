"""The database and the orchestrator say exactly what the golden messages say: no field more, no field less."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from tests.contract.golden import DIRECTORY, assert_same_form, load
from tests.system.plane import Agent, Plane, Project, running_plane

BIG = "x" * 300_000


@pytest.fixture
async def plane(database: str, tmp_path: Path) -> AsyncIterator[Plane]:
    async with running_plane(database, tmp_path) as plane:
        yield plane


@pytest.fixture
async def project(plane: Plane) -> Project:
    return await plane.project({"src/App.tsx": "export default 1\n"})


@pytest.fixture
async def agent(project: Project, tmp_path: Path) -> Agent:
    """A session whose machine is never started: the test speaks in its place."""
    return await project.session(tmp_path / "machine")


async def said(project: Project) -> list[tuple[str, dict[str, Any]]]:
    """Every message the database sent on the project's topic, oldest first."""
    async with await psycopg.AsyncConnection.connect(project.plane.dsn) as connection:
        rows = await connection.execute(
            "select event, payload from realtime.messages where topic = %s"
            " order by inserted_at, (payload->>'revision')::int",
            (f"project:{project.id}",),
        )
        return await rows.fetchall()


async def call(
    agent: Agent, method: str, name: str, body: object, token: str | None = None
) -> httpx.Response:
    url = f"{agent.environ['SESSION_API_URL']}/v1/sessions/{agent.session_id}/{name}"
    headers = {"authorization": f"Bearer {token or agent.environ['REALTIME_TOKEN']}"}
    async with httpx.AsyncClient(trust_env=False) as http:
        return await http.request(method, url, json=body, headers=headers)


async def test_the_database_s_events(project: Project) -> None:
    await project.save("src/one.ts", "1\n")
    await project.save("src/big.ts", BIG)
    await project.delete("src/one.ts")
    await project.bulk({"src/a.ts": "a\n", "src/big.ts": None})
    await project.bulk({f"{'p' * 100}/{n:04}.ts": f"{n}\n" for n in range(1500)})
    traceparent = load("event.file_update.traced")["payload"]["traceparent"]
    project.plane.http.headers["traceparent"] = traceparent
    await project.save("src/one.ts", "traced\n")
    del project.plane.http.headers["traceparent"]
    messages = (await said(project))[1:]
    goldens = [
        "event.file_update",
        "event.file_update.by_reference",
        "event.file_delete",
        "event.bulk_apply",
        "event.bulk_apply.doorbell",
        "event.file_update.traced",
    ]
    assert len(messages) == len(goldens)
    for (event, payload), name in zip(messages, goldens, strict=True):
        golden = load(name)
        assert event == golden["event"]
        assert_same_form(payload, golden["payload"], optional=frozenset({"id"}), at=name)
    assert messages[1][1]["content"] is None
    assert [payload["revision"] for _, payload in messages] == [2, 3, 4, 5, 6, 7]
    assert messages[-1][1]["traceparent"] == traceparent


async def test_splices_in_events_and_answers(project: Project, agent: Agent) -> None:
    large = "".join(f"export const n{n} = {n}\n" for n in range(2000))
    await project.save("src/large.ts", large)
    here = await project.rpc("changes_since", epoch="none", revision=0)
    await project.save("src/large.ts", large.replace("n7 =", "seven ="))
    await project.bulk({"src/large.ts": large, "src/App.tsx": None})
    update, bulk = (await said(project))[-2:]
    for (event, payload), name in ((update, "event.file_update.splices"), (bulk, "event.bulk_apply.splices")):
        assert event == load(name)["event"]
        assert_same_form(payload, load(name)["payload"], optional=frozenset({"id"}), at=name)
    await project.save("src/large.ts", large.replace("n8 =", "eight ="))
    request = {**load("sync.request.accept"), "epoch": here["epoch"], "revision": here["revision"]}
    answer = (await call(agent, "POST", "sync", request)).json()
    assert_same_form(
        [change for change in answer["changes"] if change["action"] == "update"],
        load("sync.answer.splices")["changes"],
    )
    plain = (await call(agent, "POST", "sync", {**request, "accept": ["of-tomorrow"]})).json()
    assert all(change.get("content") for change in plain["changes"] if change["action"] == "update")


async def test_the_session(project: Project, plane: Plane) -> None:
    answer = await plane.http.post("/v1/sessions", json={"project_id": str(project.id), "ttl_seconds": 3600})
    assert_same_form(answer.json(), load("session"), optional=frozenset({"region", "problem"}))
    shown = await plane.http.get(f"/v1/sessions/{answer.json()['session_id']}")
    screen = {"applied", "shown", "errors", "agent"}
    assert screen <= shown.json().keys()
    assert_same_form(shown.json(), load("session"), optional=frozenset({"region", "problem", *screen}))


async def test_the_environment_is_the_protocol_s_and_holds_no_service_key(agent: Agent, plane: Plane) -> None:
    required = {
        "PROJECT_ID",
        "SESSION_ID",
        "SNAPSHOT_URL",
        "REALTIME_TOKEN",
        "REALTIME_URL",
        "REALTIME_API_KEY",
        "SESSION_API_URL",
    }
    assert required <= set(agent.environ)
    assert not any(plane.keys.service_key in value for value in agent.environ.values())


async def test_the_sync_answers(agent: Agent, project: Project) -> None:
    start = await call(agent, "POST", "sync", load("sync.request.start"))
    assert_same_form(start.json(), load("sync.answer.snapshot"))
    here = (await project.rpc("changes_since", epoch="none", revision=0)) | {}
    request = {"epoch": here["epoch"], "revision": here["revision"], "reason": "gap"}
    assert_same_form((await call(agent, "POST", "sync", request)).json(), load("sync.answer.current"))
    await project.bulk({"src/a.ts": "a\n", "src/App.tsx": None})
    assert_same_form((await call(agent, "POST", "sync", request)).json(), load("sync.answer.changes"))
    paths = {**request, "revision": request["revision"] + 1, "paths": ["src/a.ts", "never/was.ts"]}
    answer = (await call(agent, "POST", "sync", paths)).json()
    assert_same_form(answer, load("sync.answer.changes"))
    assert [(c["file_path"], c["action"]) for c in answer["changes"]] == [
        ("src/a.ts", "update"), ("never/was.ts", "delete"),
    ]  # fmt: skip


async def test_the_manifest_full_and_delta(agent: Agent, project: Project) -> None:
    here = await project.rpc("changes_since", epoch="none", revision=0)
    for n in range(10):
        await project.save(f"big{n}.txt", BIG)
    await project.delete("src/App.tsx")
    requests = {
        "manifest.full": {"epoch": None, "revision": 0, "reason": "start"},
        "manifest.delta": {"epoch": here["epoch"], "revision": here["revision"], "reason": "gap"},
    }
    for name, request in requests.items():
        answer = (await call(agent, "POST", "sync", request)).json()
        assert answer["kind"] == "snapshot", name
        async with httpx.AsyncClient(trust_env=False) as http:
            content = (await http.get(answer["snapshot_url"])).content
        archive = zipfile.ZipFile(io.BytesIO(content))
        assert archive.namelist()[0] == ".preview-sync/manifest.json"
        manifest = json.loads(archive.read(".preview-sync/manifest.json"))
        optional = frozenset({"executable", "build_seconds"})
        assert_same_form(manifest, load(name), optional=optional)
        assert (manifest["base_revision"] is None) == (name == "manifest.full")


async def test_token_and_status(agent: Agent) -> None:
    assert_same_form((await call(agent, "POST", "token", {})).json(), load("token.answer"))
    answer = await call(agent, "PUT", "status", load("status.request"))
    assert_same_form(answer.json(), load("status.answer"), optional=frozenset({"action"}))


async def test_layers(agent: Agent) -> None:
    missing = (await call(agent, "POST", "modules", load("modules.request"))).json()
    assert all(isinstance(url, str) for url in missing["upload_urls"])
    assert_same_form(
        {**missing, "upload_urls": []}, load("modules.answer.missing"), optional=frozenset({"upload_urls"})
    )
    async with httpx.AsyncClient(trust_env=False) as http:
        assert (await http.put(missing["upload_urls"][0], content=b"12345")).is_success
    assert (await call(agent, "PUT", "modules", load("modules.sent.request"))).json() == load(
        "modules.sent.answer"
    )
    assert_same_form(
        (await call(agent, "POST", "modules", load("modules.request"))).json(), load("modules.answer")
    )


async def test_run_settings(agent: Agent, plane: Plane, project: Project) -> None:
    path = f"/v1/projects/{project.id}/run"
    answer = await plane.http.put(path, json=load("run.change.request"))
    assert answer.json() == {**load("run.shown"), "run_revision": 1}
    assert (await plane.http.get(path)).json() == answer.json()
    told = (await call(agent, "GET", "run", None)).json()
    assert told == {**load("run.answer"), "run_revision": 1, "write_back": []}
    await set_rules(plane, project)
    told = (await call(agent, "GET", "run", None)).json()
    assert told == {**load("run.answer"), "run_revision": 2}
    assert (await call(agent, "PUT", "status", load("status.request"))).json()["run_revision"] == 2


async def set_rules(plane: Plane, project: Project) -> None:
    """The golden rules, as the service sets them."""
    rules = load("run.answer")["write_back"]
    answer = await plane.http.post(
        "/rest/v1/rpc/set_write_back", json={"project_uuid": str(project.id), "p_rules": rules}
    )
    assert answer.is_success, answer.text


async def test_write_back(agent: Agent, plane: Plane, project: Project) -> None:
    assert_same_form((await call(agent, "POST", "token", {})).json(), load("token.answer"))
    await set_rules(plane, project)
    token = (await call(agent, "POST", "token", {})).json()
    assert_same_form(token, load("token.answer.writes"))
    head = (await call(agent, "PUT", "status", load("status.request"))).json()
    await project.save("package-lock.json", "{}")
    request = {**load("changes.request"), "epoch": head["epoch"]}
    answer = await call(agent, "POST", "changes", request, token["write_token"])
    assert [(r["outcome"], r.get("rule")) for r in answer.json()["results"]] == [
        ("conflict", None),
        ("proposed", None),
        ("same", None),
        ("refused", "glob"),
    ]
    for base in (1, 2):
        made = {**request["changes"][0], "base_version": base}
        offer = {**request, "offer_id": str(base), "changes": [made, *request["changes"][1:]]}
        answer = await call(agent, "POST", "changes", offer, token["write_token"])
        results = [r for r in answer.json()["results"] if r["outcome"] != "same"]
        assert_same_form({**answer.json(), "results": results}, load("changes.answer"))


@pytest.mark.parametrize(("which", "status"), [("refused", 400), ("taken", 200)])
async def test_which_variables_are_the_projects(
    plane: Plane, project: Project, which: str, status: int
) -> None:
    for name in json.loads((DIRECTORY.parent / "limits.json").read_text())["env"][which]:
        answer = await plane.http.put(f"/v1/projects/{project.id}/run", json={"env": {name: "a-value"}})
        assert answer.status_code == status, (name, answer.text)
        assert "a-value" not in answer.text


REFUSALS = sorted(path.stem for path in DIRECTORY.glob("problem*.json"))


@pytest.mark.parametrize("name", REFUSALS)
async def test_refusals_are_the_golden_problem_documents(
    name: str, agent: Agent, project: Project, plane: Plane, tmp_path: Path
) -> None:
    """An agent ends, or asks with less, because of these and nothing else: told by media type and `type`."""
    golden = load(name)
    asked: dict[str, Any] = {"method": "POST", "name": "sync", "body": load("sync.request.start")}
    match name.partition(".")[2]:
        case "":
            await plane.http.delete(f"/v1/sessions/{agent.session_id}")
        case "token_malformed":
            asked["token"] = "not a token"
        case "foreign_session":
            other = await project.session(tmp_path / "other")
            asked["token"] = other.environ["REALTIME_TOKEN"]
        case "session_unknown":
            async with await psycopg.AsyncConnection.connect(plane.dsn, autocommit=True) as connection:
                await connection.execute("delete from preview.sessions")
        case "path_unknown":
            asked["name"] = "of-tomorrow"
        case "generation_superseded":
            newer = {"project_id": str(project.id), "generation": 2}
            await plane.http.post("/v1/sessions", json=newer, headers={"Idempotency-Key": agent.key})
        case "body_too_large":
            asked |= {"method": "PUT", "name": "status", "body": {"problems": "x" * 65_536}}
    answer = await call(agent, **asked)
    assert answer.status_code == golden["status"], answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert_same_form(answer.json(), golden)
    assert (answer.json()["type"], answer.json()["status"]) == (golden["type"], golden["status"])
