"""Every route from both sides: what each kind of caller gets, and what each kind of nonsense gets."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from uuid import UUID, uuid4

import jwt
import pytest

from orchestrator_stub.platform.tokens import KeySet, read_session
from orchestrator_stub.relay.accounts import MachineNats, Operator
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.lifecycle import State
from orchestrator_stub.snapshots.model import SignedSnapshot
from orchestrator_stub.write_back.changes import BODY_BYTES
from tests.contract.golden import assert_same_form, load
from tests.fakes.machines import FakeMachines
from tests.orchestrator.sessions.control_world import (
    AGENTS,
    ROUTES,
    SERVICE_KEY,
    World,
    assert_problem,
    bearer,
    control_world,
    head_of,
    report,
    sync,
    write_token,
)

SERVICE = bearer(SERVICE_KEY)
OPTIONAL = frozenset({"region", "problem", "action"})


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


# --- creating


async def test_a_session_is_a_machine_with_exactly_the_protocol_s_environment(world: World) -> None:
    project = await world.project()
    answer = await world.create(project)
    assert answer.status_code == 201
    session = answer.json()
    assert answer.headers["location"] == f"/v1/sessions/{session['session_id']}"
    assert_same_form(session, load("session"), optional=OPTIONAL)
    assert session["state"] == "provisioning"
    [spec] = world.platform.specs.values()
    assert set(spec.env) == {
        "PROJECT_ID", "SESSION_ID", "SNAPSHOT_URL", "REALTIME_TOKEN", "REALTIME_URL", "REALTIME_API_KEY",
        "SESSION_API_URL", "LOG_LEVEL", "RUN_REVISION",
        "SNAPSHOT_MAX_ENTRIES", "SNAPSHOT_MAX_BYTES", "SNAPSHOT_MAX_FILE_BYTES", "SNAPSHOT_MAX_MANIFEST_BYTES",
        "SNAPSHOT_MAX_COMPRESSED_BYTES",
    }  # fmt: skip
    assert spec.env["REALTIME_URL"] == "wss://project.supabase.invalid/realtime/v1"
    assert spec.env["SESSION_API_URL"] == "https://orchestrator.invalid"
    assert SERVICE_KEY not in "".join(spec.env.values())
    assert SERVICE_KEY not in repr(spec)
    assert spec.env["REALTIME_TOKEN"] not in repr(spec)
    claims = read_session(world.keys, spec.env["REALTIME_TOKEN"])
    assert (claims.project_id, str(claims.session_id)) == (project, session["session_id"])


async def test_the_same_key_is_the_same_session_and_one_machine(world: World) -> None:
    project = await world.project()
    answers = await asyncio.gather(*(world.create(project, key="k") for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 7 + [201]
    assert len({answer.json()["session_id"] for answer in answers}) == 1
    assert len(world.platform.born) == 1


async def test_a_key_is_its_project_s(world: World) -> None:
    """Whoever guesses the key of another tenant's next request takes nothing from it."""
    one, other = await world.project(), await world.project()
    first, second = await world.create(one, key="preview"), await world.create(other, key="preview")
    assert (first.status_code, second.status_code) == (201, 201)
    assert first.json()["session_id"] != second.json()["session_id"]


async def test_a_newer_generation_replaces_the_machine_and_the_older_is_told_to_stop(world: World) -> None:
    project = await world.project()
    first = (await world.create(project, key="k")).json()
    old = world.token(first)
    second = (await world.create(project, key="k", generation=2)).json()
    assert second["session_id"] == first["session_id"]
    assert second["generation"] == 2
    assert second["machine"]["id"] != first["machine"]["id"]
    assert [m.id for m in world.platform.live(UUID(first["session_id"]))] == [second["machine"]["id"]]
    told = await report(world, first, old)
    assert told.json()["action"] == "stop"
    assert_same_form(told.json(), load("status.answer.stop"))
    body = {"epoch": None, "revision": 0, "reason": "join"}
    path = f"/v1/sessions/{first['session_id']}"
    conflict = await world.http.post(f"{path}/sync", json=body, headers=bearer(old))
    assert assert_problem(conflict, 409, "generation_superseded")["generation"] == 2
    assert_problem(await world.http.post(f"{path}/token", headers=bearer(old)), 409, "generation_superseded")
    again = (await world.create(project, key="k", generation=2)).json()
    assert again["machine"] == second["machine"]
    older = (await world.create(project, key="k", generation=1)).json()
    assert older["generation"] == 2


async def test_ready_when_the_agent_says_so_and_not_before(world: World) -> None:
    session = await world.session()
    token = world.token(session)
    for state in ("starting", "hydrating", "installing"):
        await report(world, session, token, state=state)
        shown = await world.http.get(f"/v1/sessions/{session['session_id']}", headers=SERVICE)
        assert shown.json()["state"] == "provisioning"
    answer = await report(world, session, token, state="degraded")
    assert_same_form(answer.json(), load("status.answer"), optional=OPTIONAL)
    shown = await world.http.get(f"/v1/sessions/{session['session_id']}", headers=SERVICE)
    assert shown.json()["state"] == "ready"


async def test_how_long_it_took_is_told_once(database: str) -> None:
    told: list[float] = []
    async with control_world(database, on_ready=told.append) as world:
        session = await world.session()
        await world.pass_time(7)
        for _ in range(2):
            await report(world, session, world.token(session))
    assert told == [pytest.approx(7, abs=2)]


async def test_each_part_of_making_a_machine_is_told(world: World) -> None:
    told: list[str] = []
    controller = SessionController(
        world.settings, world.store, world.snapshots, FakeMachines(world.platform), world.keys,
        runs=world.runs, installation=world.installation, on_part=lambda part, seconds: told.append(part),
    )  # fmt: skip
    project = await world.project()
    for generation in (1, 2):
        session, _ = await controller.request(project, key="k", generation=generation, ttl=600)
        await controller.settled(session.id, 5)
    assert told == ["snapshot", "token", "machine", "replace", "snapshot", "token", "machine"]


async def test_a_refused_machine_is_a_failed_session_that_says_why(world: World) -> None:
    world.platform.refuse = "the image does not exist"
    session = (await world.create(await world.project())).json()
    for _ in range(100):
        shown = (await world.http.get(f"/v1/sessions/{session['session_id']}", headers=SERVICE)).json()
        if shown["state"] == "failed":
            break
        await asyncio.sleep(0.01)
    assert shown["state"] == "failed"
    assert "the image does not exist" in shown["problem"]
    assert not world.platform.machines


async def test_a_platform_that_is_away_is_not_the_end(world: World) -> None:
    world.platform.down = True
    session = (await world.create(await world.project())).json()
    assert (session["state"], session["machine"]) == ("provisioning", None)
    assert "does not answer" in session["problem"]
    world.platform.down = False
    await world.controller.sweep()
    shown = (await world.http.get(f"/v1/sessions/{session['session_id']}", headers=SERVICE)).json()
    assert shown["machine"] is not None
    assert "problem" not in shown


async def test_the_time_to_live_is_bounded(world: World) -> None:
    project = await world.project()
    body = {"project_id": str(project), "ttl_seconds": 10**9}
    session = (await world.http.post("/v1/sessions", json=body, headers=SERVICE)).json()
    [[seconds]] = await world.sql(
        "select extract(epoch from expires_at - created_at)::float8 from preview.sessions where id = %s",
        session["session_id"],
    )
    assert seconds == pytest.approx(world.settings.session_ttl_max, abs=1)


async def test_ending_twice_is_ending_once(world: World) -> None:
    session = await world.session()
    path = f"/v1/sessions/{session['session_id']}"
    first = await world.http.delete(path, headers=SERVICE)
    assert first.status_code == 202
    assert first.json()["state"] == "draining"
    while (await world.http.get(path, headers=SERVICE)).json()["state"] != "gone":
        await asyncio.sleep(0.01)
    assert not world.platform.machines
    assert (await world.http.delete(path, headers=SERVICE)).status_code == 200
    assert_problem(await world.http.post(f"{path}/snapshot", headers=SERVICE), 410, "session_over")
    token = bearer(world.token(session))
    body = {"epoch": None, "revision": 0, "reason": "join"}
    assert_problem(await world.http.post(f"{path}/sync", json=body, headers=token), 410, "session_over")
    assert_problem(await world.http.post(f"{path}/token", headers=token), 410, "session_over")
    assert_problem(await report(world, session, world.token(session)), 410, "session_over")


async def test_a_draining_agent_is_told_to_stop(world: World) -> None:
    session = await world.session()
    world.platform.down = True
    await world.http.delete(f"/v1/sessions/{session['session_id']}", headers=SERVICE)
    assert (await report(world, session, world.token(session))).json()["action"] == "stop"


# --- following the project


async def test_sync_tells_what_happened(world: World) -> None:
    session = await world.session()
    project = UUID(session["project_id"])
    assert (await sync(world, session)).json() == {
        "kind": "snapshot",
        "snapshot_url": f"https://storage.invalid/{project}.zip?token=t",
        "manifest": {"files": [], "revision": 1},
    }
    await world.write(project, "src/a.ts", "a\n")
    head = await head_of(world, session)
    epoch = head["epoch"]
    changes = (await sync(world, session, epoch=epoch, revision=0, reason="gap")).json()
    assert changes["kind"] == "changes"
    assert [(c["file_path"], c["content"]) for c in changes["changes"]] == [("src/a.ts", "a\n")]
    current = (await sync(world, session, epoch=epoch, revision=1, reason="head")).json()
    assert_same_form(current, load("sync.answer.current"))
    await world.sql("select public.delete_project_file(%s, %s)", project, "src/a.ts")
    await world.write(project, "src/b.ts", "b\n")
    changes = (await sync(world, session, epoch=epoch, revision=0, reason="gap")).json()
    assert_same_form(changes, load("sync.answer.changes"))
    for other in ({"epoch": str(uuid4())}, {"epoch": epoch, "revision": 99}):
        assert (await sync(world, session, **other)).json()["kind"] == "snapshot"


async def test_what_no_difference_can_mend_is_answered_with_a_snapshot(world: World) -> None:
    session = await world.session()
    epoch = (await head_of(world, session))["epoch"]
    world.snapshots.asked.clear()
    ahead = (await sync(world, session, epoch=epoch, revision=99, reason="head")).json()
    assert (ahead["kind"], ahead["reason"]) == ("snapshot", "ahead"), "the database has lost commits"
    assert (await sync(world, session, epoch=epoch, reason="tree_hash")).json()["kind"] == "snapshot"
    assert (await sync(world, session, epoch=None, reason="snapshot_rejected")).json()["kind"] == "snapshot"
    assert (await sync(world, session, epoch=None, reason="snapshot_expired")).json()["kind"] == "snapshot"
    assert world.snapshots.asked == [(None, True), (None, False), (None, True), (None, False)]
    assert world.snapshots.resigned == 1, "a URL that was tried is not offered again"


async def test_binary_files_travel_with_their_bytes(world: World) -> None:
    session = await world.session()
    project = session["project_id"]
    content = bytes(range(256))
    digest = hashlib.sha256(content).hexdigest()
    world.assets.objects[f"project-assets/{project}/{digest}"] = content
    change = {"file_path": "logo.png", "content_hash": digest, "encoding": "base64"}
    await world.sql(
        "insert into storage.objects (bucket_id, name, metadata) values ('project-assets', %s, %s)",
        f"{project}/{digest}",
        json.dumps({"size": len(content)}),
    )
    await world.sql("select public.apply_project_files(%s, %s::jsonb)", project, json.dumps([change]))
    epoch = (await head_of(world, session))["epoch"]
    for body in ({"revision": 0}, {"revision": 1, "paths": ["logo.png"], "reason": "reference"}):
        [sent] = (await sync(world, session, epoch=epoch, **body)).json()["changes"]
        assert base64.b64decode(sent["content"]) == content
        assert sent["encoding"] == "base64"


async def test_too_much_for_one_answer_becomes_a_delta(database: str) -> None:
    async with control_world(database, inline_limit=1000) as world:
        session = await world.session()
        for path in ("a", "b"):
            await world.write(UUID(session["project_id"]), path, path * 800)
        epoch = (await head_of(world, session))["epoch"]
        world.snapshots.asked.clear()
        assert (await sync(world, session, epoch=epoch, revision=1)).json()["kind"] == "changes"
        assert (await sync(world, session, epoch=epoch, revision=0)).json()["kind"] == "snapshot"
        assert world.snapshots.asked == [(0, False)]


async def test_a_heartbeat_tells_the_agent_to_sync_when_it_is_behind_or_different(world: World) -> None:
    session = await world.session()
    await world.write(UUID(session["project_id"]), "a", "a")
    token = world.token(session)
    head = await head_of(world, session)
    assert head["action"] == "sync"
    level = {"revision": head["revision"], "epoch": head["epoch"]}
    assert "action" not in (await report(world, session, token, **level, tree_hash=head["tree_hash"])).json()
    assert (await report(world, session, token, **level, tree_hash="0" * 64)).json()["action"] == "sync"
    line = b"a\0" + hashlib.sha256(b"a").hexdigest().encode() + b"\n"
    assert head["tree_hash"] == hashlib.sha256(line).hexdigest()


async def test_a_report_is_kept_whatever_text_is_in_it(world: World) -> None:
    """PostgreSQL's jsonb holds neither a NUL nor NaN, and an agent repeats what other programs said."""
    session = await world.session()
    token = world.token(session)
    odd = [{"kind": "install_failed", "detail": "exit\0 code \U0001f4a5"}]
    answer = await report(world, session, token, problems=odd, **{"\0": 2**70, "rate": float("nan")})
    assert answer.status_code == 200, answer.text
    [[kept]] = await world.sql("select status from preview.sessions where id = %s", session["session_id"])
    assert kept["problems"][0]["detail"].endswith("\U0001f4a5")


async def test_a_token_is_renewed_by_the_machine_it_belongs_to(world: World) -> None:
    session = await world.session()
    path = f"/v1/sessions/{session['session_id']}/token"
    answer = await world.http.post(path, json={}, headers=bearer(world.token(session)))
    assert_same_form(answer.json(), load("token.answer"))
    assert str(read_session(world.keys, answer.json()["realtime_token"]).session_id) == session["session_id"]
    late = world.token(session, ttl=-3600)
    assert (await world.http.post(path, headers=bearer(late))).status_code == 200, "a machine that restarted"
    assert_problem(await report(world, session, late), 401, "token_expired")
    too_late = world.token(session, ttl=-3600 * 48)
    assert_problem(await world.http.post(path, headers=bearer(too_late)), 401, "token_expired")


async def test_with_nats_a_machine_gets_its_token_at_the_start_and_the_next_with_its_own(
    world: World,
) -> None:
    keys = Operator().keys
    world.controller.nats = MachineNats(keys, "tls://nats.test:4222", "realtime")
    by_realtime = await world.session()
    wanted = {"project_id": str(await world.project()), "run": {"transport": "nats"}}
    by_nats = (await world.http.post("/v1/sessions", json=wanted, headers=SERVICE)).json()
    told = {spec.session_id: spec.env for spec in world.platform.specs.values()}
    assert "NATS_JWT" not in told[UUID(by_realtime["session_id"])]
    environment = told[UUID(by_nats["session_id"])]
    assert environment["REALTIME_URL"] == "tls://nats.test:4222"
    answer = await world.http.post(
        f"/v1/sessions/{by_nats['session_id']}/token", json={}, headers=bearer(world.token(by_nats))
    )
    for token in (environment["NATS_JWT"], answer.json()["nats_jwt"]):
        claims = jwt.decode(token, options={"verify_signature": False})
        assert claims["iss"] == keys.edge.signing.public
        assert claims["nats"]["issuer_account"] == keys.edge.public
        assert claims["nats"]["pub"] == {"deny": [">"]}
        assert claims["nats"]["sub"]["allow"][0] == f"pv.out.{by_nats['project_id']}"
        assert 0 < claims["exp"] - claims["iat"] <= 601


# --- nonsense, and parts that are away


async def test_every_route_answers_nonsense_with_a_problem(world: World) -> None:
    session = await world.session()
    token = bearer(world.token(session))
    before = await world.sql("select count(*) from preview.sessions")
    for method, route in ROUTES:
        headers = token if route.endswith(AGENTS) else SERVICE
        most = world.settings.body_limit
        if route.endswith("changes"):
            headers, most = bearer(write_token(session)), BODY_BYTES
        path = route.replace("{id}", session["session_id"]).replace("{project}", session["project_id"])
        for unknown_method in ("PATCH", "TRACE", "BREW"):
            wrong = await world.http.request(unknown_method, path, headers=headers)
            assert_problem(wrong, 405, "method_not_allowed")
            assert method in wrong.headers["allow"]
        if method in ("POST", "PUT") and not route.endswith(("token", "suspend", "wake")):  # no body is read
            for junk in (
                b"{",
                b"[]",
                b'"x"',
                b"\xff\xfe",
                b'{"revision": -1, "project_id": 7, "rebuild": {}}',
            ):
                answer = await world.http.request(method, path, content=junk, headers=headers)
                assert_problem(answer, 400, "bad_body")
            huge = b'{"x": "' + b"x" * most + b'"}'
            answer = await world.http.request(method, path, content=huge, headers=headers)
            assert_problem(answer, 413, "body_too_large")
            if route.endswith("sync"):
                for odd in ({"epoch": "\0"}, {"epoch": "x", "paths": ["a\0b"]}):
                    body = {"epoch": None, "revision": 0, "reason": "gap", **odd}
                    answer = await world.http.request(method, path, json=body, headers=headers)
                    assert_problem(answer, 400, "bad_body")
        for nobody in (str(uuid4()), "junk", "%00", "%ff"):
            if "{id}" in route and not route.endswith(AGENTS):
                answer = await world.http.request(
                    method, route.replace("{id}", nobody), json={}, headers=headers
                )
                assert_problem(answer, 404, "session_unknown")
    assert_problem(await world.http.get("/v2/nothing", headers=SERVICE), 404, "path_unknown")
    unknown = await world.http.post("/v1/sessions", json={"project_id": str(uuid4())}, headers=SERVICE)
    assert_problem(unknown, 404, "project_unknown")
    extra = {"project_id": session["project_id"], "machine": "big"}
    assert_problem(await world.http.post("/v1/sessions", json=extra, headers=SERVICE), 400, "bad_body")
    for key in ("k" * 256, "", "\u00e9", "a\tb"):
        answer = await world.http.post(
            "/v1/sessions",
            json={"project_id": session["project_id"]},
            headers=SERVICE | {"Idempotency-Key": key.encode("latin-1")},
        )
        assert_problem(answer, 400, "bad_idempotency_key")
    for query in ("limit=0", "limit=1001", "limit=x", "limit=" + "9" * 5000, "ended=maybe"):
        assert_problem(await world.http.get(f"/v1/sessions?{query}", headers=SERVICE), 400, "bad_query")
    for query in ("project_id=junk", f"project_id={uuid4()}x"):
        assert_problem(await world.http.get(f"/v1/sessions?{query}", headers=SERVICE), 404, "project_unknown")
    assert await world.sql("select count(*) from preview.sessions") == before, "nothing half-made"


async def test_a_part_that_is_away_is_a_503_that_says_when_to_ask_again(world: World) -> None:
    session = await world.session()
    world.snapshots.broken = True
    answer = await sync(world, session)
    assert_problem(answer, 503, "snapshot_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    await world.pool.close()
    answer = await sync(world, session)
    assert_problem(answer, 503, "unavailable")
    assert int(answer.headers["retry-after"]) >= 1


async def test_keys_that_only_verify_start_nothing_and_say_so(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = await world.session()
    token = bearer(world.token(session))
    public = KeySet(tuple(replace(key, private=None) for key in world.keys._set.keys))
    monkeypatch.setattr(world.keys, "_set", public)
    path = f"/v1/sessions/{session['session_id']}"
    assert_problem(await world.http.post(f"{path}/token", headers=token), 503, "unavailable")
    question = {"epoch": None, "revision": 0, "reason": "join"}
    assert (await world.http.post(f"{path}/sync", json=question, headers=token)).status_code == 200
    waiting = (await world.create(await world.project())).json()
    assert waiting["state"] == "provisioning"
    assert waiting["problem"].startswith("provisioning: no key of the set is private")
    monkeypatch.undo()
    await world.pass_time(60)
    await world.controller.sweep()
    async with asyncio.timeout(15):
        while (
            made := await world.controller.settled(UUID(waiting["session_id"]), 1)
        ) and made.machine_id is None:
            await asyncio.sleep(0.02)


async def test_no_request_takes_for_ever(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator_stub.http.requests.BODY_SECONDS", 0.1)

    async def never(*_: object, **__: object) -> SignedSnapshot:
        await asyncio.Event().wait()
        raise AssertionError

    async def drip() -> AsyncIterator[bytes]:
        yield b'{"epoch": null,'
        await asyncio.Event().wait()

    async with control_world(database, request_timeout=0.3) as world:
        session = await world.session()
        path, token = f"/v1/sessions/{session['session_id']}", bearer(world.token(session))
        slow = await world.http.post(f"{path}/sync", content=drip(), headers=token)
        assert_problem(slow, 408, "body_too_slow")
        monkeypatch.setattr(world.snapshots, "signed_snapshot", never)
        answer = await world.http.post(f"{path}/snapshot", headers=SERVICE)
        assert_problem(answer, 503, "unavailable")
        assert int(answer.headers["retry-after"]) >= 1


async def test_the_states_of_the_answers_are_the_protocol_s() -> None:
    assert {state.value for state in State} == {
        "requested", "provisioning", "ready", "suspended", "draining", "gone", "failed",
    }  # fmt: skip
