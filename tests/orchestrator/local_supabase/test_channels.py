"""The realtime server, frame by frame: what the real one answers, for both serializers."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from orchestrator_stub.platform.tokens import Keyring, new_es256, new_hs256
from tests.fakes.serving import Local, quick, serve_local

pytestmark = pytest.mark.asyncio(loop_scope="module")

BOTH = pytest.mark.parametrize("vsn", ["1.0.0", "2.0.0"])
PROJECT = str(uuid4())
TOPIC = f"project:{PROJECT}"


def agent(local: Local, project: str = PROJECT, **more: object) -> str:
    return local.token(project_id=project, session_id=str(uuid4()), **more)  # type: ignore[arg-type]


@BOTH
@pytest.mark.parametrize(
    "path", ["/realtime/v1/websocket", "/realtime/v1/socket/websocket", "/socket/websocket"]
)
async def test_every_path_speaks_both_versions(local: Local, vsn: str, path: str) -> None:
    async with local.socket(vsn, path) as client:
        ref = await client.push("phoenix", "heartbeat", {})
        assert await client.reply(ref) == {"status": "ok", "response": {}}


async def test_a_heartbeat_without_a_ref_is_answered_without_one(local: Local) -> None:
    async with local.socket() as client:
        await client.connection.send(json.dumps([None, None, "phoenix", "heartbeat", {}]))
        assert await client.frame() == [None, None, "phoenix", "phx_reply", {"status": "ok", "response": {}}]


@BOTH
async def test_the_database_broadcasts_to_who_may_listen(local: Local, vsn: str) -> None:
    async with local.socket(vsn) as client:
        joined = await client.join(TOPIC, agent(local), broadcast={"replication_ready": True})
        assert joined == {"status": "ok", "response": {"postgres_changes": []}}
        system = await client.until(lambda f: f[3] == "system")
        assert system[4] == {
            "extension": "system",
            "status": "ok",
            "message": "Replication connection established",
            "channel": TOPIC,
        }
        await local.send(TOPIC, "file:update", {"file_path": "a.ts", "content": "ä\0b"[:1]})
        body = await client.broadcast()
        id_ = body["payload"].pop("id")
        assert body == {
            "type": "broadcast",
            "event": "file:update",
            "payload": {"file_path": "a.ts", "content": "ä"},
            "meta": {"id": id_},
        }


async def test_commits_arrive_in_their_order(local: Local) -> None:
    """The transaction that began first commits last."""
    async with local.socket() as client:
        await client.join(TOPIC, agent(local))
        async with (
            await psycopg.AsyncConnection.connect(local.dsn) as early,
            await psycopg.AsyncConnection.connect(local.dsn) as late,
        ):
            send = "select realtime.send(jsonb_build_object('n', %s::int), 'n', %s, true)"
            await early.execute(send, (1, TOPIC))
            await late.execute(send, (2, TOPIC))
            await late.commit()
            await early.execute(send, (3, TOPIC))
            await early.commit()
        assert [(await client.broadcast())["payload"]["n"] for _ in range(3)] == [2, 1, 3]


async def test_a_rolled_back_broadcast_is_never_heard(local: Local) -> None:
    async with local.socket() as client:
        await client.join(TOPIC, agent(local))
        await local.sql(
            "begin; select realtime.send('{}', 'x', 'project:' || gen_random_uuid(), true); rollback"
        )
        await local.send(TOPIC, "after", {})
        assert (await client.broadcast())["event"] == "after"


async def test_a_burst_arrives_whole(local: Local) -> None:
    async with local.socket() as client:
        await client.join(TOPIC, agent(local))
        await local.sql(
            "select realtime.send(jsonb_build_object('n', n), 'n', %s, true) from generate_series(1, 500) n",
            TOPIC,
        )
        assert [(await client.broadcast())["payload"]["n"] for _ in range(500)] == list(range(1, 501))


# --- who may not


@BOTH
async def test_a_token_of_another_project_is_refused(local: Local, vsn: str) -> None:
    async with local.socket(vsn) as client:
        assert await client.join(TOPIC, agent(local, str(uuid4()))) == {
            "status": "error",
            "response": {
                "reason": f"Unauthorized: You do not have permissions to read from this Channel topic: {TOPIC}"
            },
        }
        await local.send(TOPIC, "file:update", {})
        assert await client.silent()


async def test_bad_tokens_are_refused_with_the_original_words(local: Local) -> None:
    good = agent(local)
    head, body, signature = good.split(".")
    tampered = f"{head}.{body}.{signature[:-4]}AAAA"
    none = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0." + body + "."
    no_role = local.keys.keyring.sign({"exp": int(time.time() + 60), "project_id": PROJECT})
    no_exp = local.keys.keyring.sign({"role": "preview_agent", "project_id": PROJECT})
    expired = agent(local, ttl=-100)
    unknown_role = local.token("no_such_role", project_id=PROJECT)
    not_granted = local.token("postgres", project_id=PROJECT)
    denied = f"Unauthorized: You do not have permissions to read from this Channel topic: {TOPIC}"
    words = {
        tampered: "JwtSignatureError: Failed to validate JWT signature",
        none: "JwtSignerError: Failed to generate JWT signer, check your JWT secret or JWKS configuration",
        no_role: "InvalidJWTToken: Fields `role` and `exp` are required in JWT",
        no_exp: "InvalidJWTToken: Fields `role` and `exp` are required in JWT",
        "rubbish": "MalformedJWT: The token provided is not a valid JWT",
        unknown_role: denied,
        local.keys.anon_key: denied,
    }
    async with local.socket() as client:
        for token, reason in words.items():
            assert await client.join(TOPIC, token) == {"status": "error", "response": {"reason": reason}}
        reason = (await client.join(TOPIC, expired))["response"]["reason"]
        assert reason.startswith("InvalidJWTToken: Token has expired 10")
        assert reason.endswith(" seconds ago")
        assert (await client.join(TOPIC, not_granted))["status"] == "error"
        assert (await client.join(TOPIC, good))["status"] == "ok"


async def test_private_and_public_are_two_topics(local: Local) -> None:
    async with local.socket() as public, local.socket() as private:
        assert (await public.join(TOPIC, private=False))["status"] == "ok"
        assert (await private.join(TOPIC, agent(local)))["status"] == "ok"
        await local.send(TOPIC, "secret", {"x": 1})
        assert (await private.broadcast())["event"] == "secret"
        await local.send(TOPIC, "open", {"x": 1}, private=False)
        assert (await public.broadcast())["event"] == "open"
        assert await private.silent()


async def test_a_container_cannot_broadcast(local: Local) -> None:
    """Neither on the socket nor over HTTP; the real server says nothing at all to the first."""
    async with local.socket() as container, local.socket() as other:
        await container.join(TOPIC, agent(local), broadcast={"ack": True, "self": True})
        await other.join(TOPIC, agent(local))
        forged = {"type": "broadcast", "event": "file:update", "payload": {"file_path": "x"}}
        await container.push(f"realtime:{TOPIC}", "broadcast", forged)
        assert await container.silent()
        batch = {"messages": [{"topic": TOPIC, "event": "file:update", "payload": {}, "private": True}]}
        headers = {"authorization": f"Bearer {agent(local)}", "apikey": local.keys.anon_key}
        assert (
            await local.http.post("/realtime/v1/api/broadcast", json=batch, headers=headers)
        ).status_code == 202
        single = f"/realtime/v1/api/broadcast/{TOPIC}/events/file:update?private=true"
        assert (await local.http.post(single, json={}, headers=headers)).status_code == 403
        assert await other.silent()
        assert await local.sql("select count(*) from realtime.messages") == [(0,)]


@pytest.mark.parametrize(
    ("key", "status", "text"),
    [
        ("", 401, "API key is missing"),
        ("rubbish", 401, "The token provided is not a valid JWT"),
    ],
)
async def test_a_handshake_without_a_key_is_refused(local: Local, key: str, status: int, text: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with connect(f"ws://127.0.0.1:{local.port}/realtime/v1/websocket?apikey={key}"):
            pass
    assert refused.value.response.status_code == status
    assert json.loads(refused.value.response.body or b"") == {"error": text}


async def test_a_minted_token_is_no_api_key(local: Local) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with local.socket(key=agent(local)):
            pass
    assert refused.value.response.status_code == 401


# --- the life of a channel


async def test_a_channel_closes_when_its_token_expires_and_the_socket_stays(local: Local) -> None:
    async with local.socket() as client:
        assert (await client.join(TOPIC, agent(local, ttl=3)))["status"] == "ok"
        join_ref = str(client.ref)
        system = await client.frame(timeout=30)
        assert system[3] == "system"
        assert system[4]["status"] == "error"
        assert re.fullmatch(r"Token has expired \d seconds ago", system[4]["message"])
        assert await client.frame() == [join_ref, join_ref, f"realtime:{TOPIC}", "phx_close", {}]
        assert (await client.join(TOPIC, agent(local)))["status"] == "ok"


async def test_a_new_token_prolongs_without_a_word(local: Local) -> None:
    async with local.socket() as client:
        await client.join(TOPIC, agent(local, ttl=3))
        ref = str(client.ref)
        await client.push(f"realtime:{TOPIC}", "access_token", {"access_token": agent(local)}, join_ref=ref)
        await asyncio.sleep(3.1)
        assert await client.silent()
        await local.send(TOPIC, "still", {})
        assert (await client.broadcast())["event"] == "still"


async def test_a_new_token_without_the_right_closes_the_channel(local: Local) -> None:
    async with local.socket() as client:
        await client.join(TOPIC, agent(local))
        token = agent(local, str(uuid4()))
        await client.push(f"realtime:{TOPIC}", "access_token", {"access_token": token})
        system, closed = await client.frame(), await client.frame()
        assert "You do not have permissions to read" in system[4]["message"]
        assert closed[3] == "phx_close"


async def test_a_second_join_replaces_the_first(local: Local) -> None:
    async with local.socket() as client:
        topic = f"realtime:{TOPIC}"
        join = {"config": {"private": True}, "access_token": agent(local)}
        first = await client.push(topic, "phx_join", join)
        await client.reply(first)
        second = await client.push(topic, "phx_join", join)
        assert (await client.frame())[1] == second
        assert await client.frame() == [first, first, topic, "phx_close", {}]
        await local.send(TOPIC, "once", {})
        assert (await client.broadcast())["event"] == "once"
        assert await client.silent()


@BOTH
async def test_leaving(local: Local, vsn: str) -> None:
    async with local.socket(vsn) as client:
        topic = f"realtime:{TOPIC}"
        await client.join(TOPIC, agent(local))
        join_ref = str(client.ref)
        ref = await client.push(topic, "phx_leave", {}, join_ref=join_ref)
        assert await client.reply(ref) == {"status": "ok", "response": {}}
        closed = await client.frame()
        assert closed[1:] == [join_ref, topic, "phx_close", {}]
        await local.send(TOPIC, "gone", {})
        assert await client.silent()


async def test_a_topic_nobody_joined(local: Local) -> None:
    async with local.socket() as client:
        ref = await client.push("realtime:nowhere", "broadcast", {})
        assert await client.reply(ref) == {"status": "error", "response": {"reason": "unmatched topic"}}
        ref = await client.push("realtime:nowhere", "phx_leave", {})
        assert (await client.reply(ref))["status"] == "ok"
        ref = await client.push("elsewhere", "phx_join", {})
        assert (await client.reply(ref))["response"] == {"reason": "unmatched topic"}


JUNK = ["", "{", "[]", "[1,2,3,4,5]", '{"topic":1}', "null", b"\x00", b"\x03\xff\xff"]


@BOTH
async def test_junk_closes_that_socket_and_no_other(local: Local, vsn: str) -> None:
    async with local.socket(vsn) as other:
        for junk in JUNK:
            async with local.socket(vsn) as client:
                await client.connection.send(junk)
                with pytest.raises(ConnectionClosed) as closed:
                    await client.frame()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1011
        assert await other.silent()


async def test_an_idle_socket_is_closed(database: str, tmp_path: Path) -> None:
    async with (
        serve_local(database, tmp_path, limits=quick(idle_seconds=0.2)) as local,
        local.socket() as client,
    ):
        with pytest.raises(ConnectionClosed) as closed:
            await client.frame()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1000


async def test_tokens_of_an_asymmetric_key_count_by_their_kid(database: str, tmp_path: Path) -> None:
    known, unknown = new_es256("k1"), new_es256("k2")
    ring = Keyring.from_jwks({"keys": [new_hs256("local"), known]})
    claims = {"role": "preview_agent", "project_id": PROJECT, "exp": int(time.time() + 60)}
    good = Keyring.from_jwks({"keys": [known]}).sign(claims)
    bad = Keyring.from_jwks({"keys": [unknown]}).sign(claims)
    async with serve_local(database, tmp_path, keyring=ring) as local, local.socket() as client:
        assert (await client.join(TOPIC, good))["status"] == "ok"
        refused = await client.join(TOPIC, bad)
        assert refused["response"]["reason"].startswith("JwtSignerError: ")


async def test_a_replay_that_cannot_be_is_refused_and_the_socket_lives(local: Local) -> None:
    async with local.socket() as client:
        for since in (10**30, -(10**18)):
            refused = await client.join(TOPIC, agent(local), broadcast={"replay": {"since": since}})
            assert refused["response"]["reason"].startswith("UnableToReplayMessages: ")
        denied = await client.join("nul\0", agent(local))
        assert denied["response"]["reason"].startswith("Unauthorized: ")
        assert await client.silent()


async def test_no_key_and_no_token_reaches_a_log(
    database: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serve_local(database, tmp_path) as local:
        tokens = [agent(local), agent(local, str(uuid4())), agent(local, ttl=-60)]
        async with local.socket() as client:
            for token in tokens:
                await client.join(TOPIC, token)
                await client.push(f"realtime:{TOPIC}", "access_token", {"access_token": token})
            await client.connection.send("junk")
        with pytest.raises(InvalidStatus):
            async with local.socket(key=tokens[0]):
                pass
        sign = f"/storage/v1/object/project-snapshots/x?token={tokens[0]}"
        await local.http.get(sign)
        await local.http.post(
            "/rest/v1/rpc/nothing", json={}, headers={"authorization": f"Bearer {tokens[2]}"}
        )
    ours = "\n".join(
        record.getMessage() + str(record.__dict__)
        for record in caplog.records
        if not record.name.startswith(("websockets", "httpx", "httpcore"))  # the test's own clients
    )
    assert "realtime.bad_frame" in ours
    for secret in (*tokens, local.keys.anon_key, local.keys.service_key):
        assert secret not in ours
        assert secret.rsplit(".", 1)[1] not in ours
