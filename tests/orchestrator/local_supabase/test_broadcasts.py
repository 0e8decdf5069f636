"""What clients send to each other, over the socket and over HTTP; presence, replay, limits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.fakes.serving import Local, Phoenix, quick, serve_local

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOM = "room"


def said(event: str, **payload: Any) -> dict[str, Any]:
    return {"type": "broadcast", "event": event, "payload": payload}


def binary_push(topic: str, event: str, payload: bytes, *, is_json: bool, ref: str, join_ref: str) -> bytes:
    parts = [join_ref.encode(), ref.encode(), topic.encode(), event.encode(), b""]
    return bytes([3, *(len(p) for p in parts), int(is_json)]) + b"".join(parts) + payload


async def public(client: Phoenix, **broadcast: bool) -> None:
    assert (await client.join(ROOM, private=False, broadcast=broadcast))["status"] == "ok"


async def test_self_and_ack_are_asked_for(local: Local) -> None:
    async with local.socket() as plain, local.socket() as full:
        await public(plain)
        await public(full, self=True, ack=True)
        await plain.push("realtime:room", "broadcast", said("a"))
        assert (await full.broadcast())["event"] == "a"
        assert await plain.silent()
        ref = await full.push("realtime:room", "broadcast", said("b"))
        assert (await full.broadcast())["event"] == "b"
        assert await full.reply(ref) == {"status": "ok", "response": {}}
        assert (await plain.broadcast()) == said("b")


async def test_every_form_reaches_every_version(local: Local) -> None:
    async with local.socket("1.0.0") as old, local.socket() as new, local.socket() as sender:
        for client in (old, new, sender):
            await public(client)
        await sender.push("realtime:room", "broadcast", said("text", x=1))
        await sender.connection.send(
            binary_push("realtime:room", "json", b'{"x":2}', is_json=True, ref="9", join_ref="1")
        )
        await sender.connection.send(
            binary_push("realtime:room", "raw", b"\0\xff", is_json=False, ref="9", join_ref="1")
        )
        assert [await new.broadcast() for _ in range(3)] == [
            said("text", x=1),
            said("json", x=2),
            {"type": "broadcast", "event": "raw", "payload": b"\0\xff"},
        ]
        assert [await old.broadcast() for _ in range(2)] == [said("text", x=1), said("json", x=2)]
        assert await old.silent(), "vsn 1 cannot say raw bytes"


async def test_the_batch_and_the_single_form_over_http(local: Local) -> None:
    async with local.socket() as client, local.socket("1.0.0") as old:
        await public(client)
        await public(old)
        messages = [{"topic": ROOM, "event": str(n), "payload": {"n": n}} for n in range(3)]
        answer = await local.http.post("/realtime/v1/api/broadcast", json={"messages": messages})
        assert (answer.status_code, answer.content) == (202, b"")
        assert [await client.broadcast() for _ in range(3)] == [said(str(n), n=n) for n in range(3)]
        at = f"/realtime/v1/api/broadcast/{ROOM}/events/one"
        assert (await local.http.post(at, json={"x": 1})).status_code == 202
        assert await client.broadcast() == said("one", x=1)
        raw = {"content-type": "application/octet-stream"}
        assert (await local.http.post(at, content=b"\xff", headers=raw)).status_code == 202
        assert (await client.broadcast())["payload"] == b"\xff"
        assert [(await old.broadcast())["event"] for _ in range(4)] == ["0", "1", "2", "one"]
        nobody = {"authorization": "Bearer rubbish", "apikey": ""}
        refused = await local.http.post(
            "/realtime/v1/api/broadcast", json={"messages": messages}, headers=nobody
        )
        assert refused.status_code == 401
        for bad in (b"{", b"[]", b'{"messages": [{"topic": 1}]}'):
            assert (await local.http.post("/realtime/v1/api/broadcast", content=bad)).status_code == 422


async def test_the_service_may_broadcast_in_private(local: Local) -> None:
    """It bypasses row level security, as on Supabase."""
    project = str(uuid4())
    topic = f"project:{project}"
    async with local.socket() as client:
        await client.join(topic, local.token(project_id=project))
        message = {"topic": topic, "event": "x", "payload": {}, "private": True}
        answer = await local.http.post("/realtime/v1/api/broadcast", json={"messages": [message]})
        assert answer.status_code == 202
        assert (await client.broadcast())["event"] == "x"


async def test_presence_is_told_to_everybody(local: Local) -> None:
    async with local.socket() as first, local.socket() as second:
        config = {"presence": {"key": "one", "enabled": True}}
        await first.join(ROOM, private=False, **config)
        state = await first.until(lambda f: f[3] == "presence_state")
        assert state[4] == {}
        ref = await first.push("realtime:room", "presence", {"event": "track", "payload": {"name": "a"}})
        assert (await first.reply(ref))["status"] == "ok"
        diff = (await first.until(lambda f: f[3] == "presence_diff"))[4]
        assert diff["joins"]["one"]["metas"][0]["name"] == "a"
        await second.join(ROOM, private=False, presence={"key": "two", "enabled": True})
        state = (await second.until(lambda f: f[3] == "presence_state"))[4]
        assert [meta["name"] for meta in state["one"]["metas"]] == ["a"]
        await first.push("realtime:room", "presence", {"event": "track", "payload": {"name": "b"}})
        diff = (await second.until(lambda f: f[3] == "presence_diff"))[4]
        joined, left = diff["joins"]["one"]["metas"][0], diff["leaves"]["one"]["metas"][0]
        assert (joined["name"], left["name"], joined["phx_ref_prev"]) == ("b", "a", left["phx_ref"])
        await first.connection.close()
        diff = (await second.until(lambda f: f[3] == "presence_diff"))[4]
        assert diff["leaves"]["one"]["metas"][0]["name"] == "b"


async def test_replay(local: Local) -> None:
    project = str(uuid4())
    topic, token = f"project:{project}", local.token(project_id=project)
    await local.send(topic, "old", {"n": 0})
    since = int(time.time() * 1000)
    for n in range(1, 31):
        await local.send(topic, "n", {"n": n})
    for vsn in ("1.0.0", "2.0.0"):
        async with local.socket(vsn) as client:
            await client.join(topic, token, broadcast={"replay": {"since": since, "limit": 100}})
            got = [await client.broadcast() for _ in range(25)]
            assert [m["payload"]["n"] for m in got] == list(range(6, 31)), "the newest 25, oldest first"
            assert all(m["meta"]["replayed"] is True and m["meta"]["id"] == m["payload"]["id"] for m in got)
            assert await client.silent()
    async with local.socket() as client:
        replay = {"replay": {"since": since}}
        refused = await client.join(topic, private=False, broadcast=replay)
        text = "UnableToReplayMessages: Replay is not allowed for public channels"
        assert refused["response"] == {"reason": text}
        refused = await client.join(topic, token, broadcast={"replay": {"since": "x"}})
        assert refused["response"] == {"reason": "UnableToReplayMessages: Replay params are not valid"}


async def test_limits_use_the_original_words(database: str, tmp_path: Path) -> None:
    now = time.time()  # and it stays so: rates count by the second
    limits = quick(connections=2, joins_per_second=2, channels_per_connection=1, payload_bytes=1000)
    async with (
        serve_local(database, tmp_path, limits=limits, clock=lambda: now) as local,
        local.socket() as client,
        local.socket() as other,
    ):
        with pytest.raises(InvalidStatus) as refused:
            async with local.socket():
                pass
        assert refused.value.response.status_code == 429
        assert json.loads(refused.value.response.body or b"") == {"error": "Too many connected users"}
        await public(client, ack=True)
        many = await client.join("another", private=False)
        assert many["response"] == {"reason": "ChannelRateLimitReached: Too many channels"}
        ref = await client.push("realtime:room", "broadcast", said("big", x="y" * 1000))
        assert (await client.reply(ref))["status"] == "error"
        await local.send(ROOM, "big", {"x": "y" * 1000}, private=False)
        await local.send(ROOM, "small", {}, private=False)
        assert (await client.broadcast())["event"] == "small", "the big one is dropped without a word"
        flood = await other.join("third", private=False)
        assert flood["response"] == {"reason": "ClientJoinRateLimitReached: Too many joins per second"}
        with pytest.raises(ConnectionClosed) as closed:
            await other.frame()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001


async def test_too_many_messages_close_every_listener(database: str, tmp_path: Path) -> None:
    limits = quick(messages_per_second=10)
    async with serve_local(database, tmp_path, limits=limits) as local, local.socket() as client:
        await public(client)
        await local.sql("select realtime.send('{}', 'x', 'room', false) from generate_series(1, 20)")
        system = await client.until(lambda f: f[3] == "system")
        assert system[4]["message"] == "Too many messages per second"
        assert (await client.frame())[3] == "phx_close"


async def test_a_reader_that_does_not_read_is_cut_off(database: str, tmp_path: Path) -> None:
    """And the others are not kept waiting."""
    limits = quick(backlog_bytes=200_000)
    async with (
        serve_local(database, tmp_path, limits=limits) as local,
        local.socket() as slow,
        local.socket() as quick_reader,
    ):
        await public(slow)
        await public(quick_reader)
        slow.connection.transport.pause_reading()
        for n in range(200):
            body = {"messages": [{"topic": ROOM, "event": str(n), "payload": {"x": "y" * 100_000}}]}
            assert (await local.http.post("/realtime/v1/api/broadcast", json=body)).status_code == 202
            assert (await quick_reader.broadcast())["event"] == str(n)
            if len(local.stand_in.realtime.connections) == 1:
                break
        assert len(local.stand_in.realtime.connections) == 1
        slow.connection.transport.abort()


async def test_messages_are_kept_for_three_days(database: str, tmp_path: Path) -> None:
    async with serve_local(database, tmp_path) as local:
        await local.send(ROOM, "old", {})
        await local.sql("update realtime.messages set inserted_at = now() - interval '73 hours'")
        await local.send(ROOM, "new", {})
    async with serve_local(database, tmp_path) as local:
        assert await local.sql("select event from realtime.messages") == [("new",)]
