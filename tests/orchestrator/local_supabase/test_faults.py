"""Each fault the realtime server can be asked for, seen from a client's side."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from uuid import uuid4

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from tests.fakes.serving import Local, Phoenix, serve_local

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOPIC = "faulty"


async def ready(client: Phoenix) -> None:
    assert (await client.join(TOPIC, private=False))["status"] == "ok"


async def numbers(local: Local, count: int) -> None:
    await local.sql(
        "select realtime.send(jsonb_build_object('n', n), 'n', %s, false) from generate_series(1, %s) n",
        TOPIC,
        count,
    )


async def heard(client: Phoenix) -> list[int]:
    """Every number that came before the mark."""
    got = []
    while (body := await client.broadcast())["event"] != "mark":
        got.append(body["payload"]["n"])
    return got


async def mark(local: Local) -> None:
    await local.send(TOPIC, "mark", {}, private=False)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ({"drop": 2}, [3, 4, 5]),
        ({"duplicate": 2}, [1, 1, 2, 2, 3, 4, 5]),
        ({"reorder": 3}, [3, 2, 1, 4, 5]),
        ({"drop": 1, "duplicate": 1}, [2, 2, 3, 4, 5]),
    ],
)
async def test_messages_lost_doubled_shuffled(
    local: Local, fault: dict[str, int], expected: list[int]
) -> None:
    async with local.socket() as client:
        await ready(client)
        await local.fault(**fault)
        await numbers(local, 5)
        await mark(local)
        assert await heard(client) == expected


async def test_a_blackout_loses_everything_and_the_socket_stays(local: Local) -> None:
    async with local.socket() as client:
        await ready(client)
        await local.fault(blackout=60)
        await numbers(local, 2)
        await client.push("phoenix", "heartbeat", {})
        with pytest.raises(TimeoutError):
            await client.frame(timeout=1)
        await local.http.delete("/realtime/v1/faults")
        await mark(local)
        assert await heard(client) == []


async def test_heartbeats_and_joins_can_be_left_unanswered(local: Local) -> None:
    async with local.socket() as client:
        await local.fault(mute_heartbeats=True, mute_joins=True)
        await client.push("phoenix", "heartbeat", {})
        await client.push(f"realtime:{TOPIC}", "phx_join", {"config": {}})
        with pytest.raises(TimeoutError):
            await client.frame(timeout=0.2)
        await local.http.delete("/realtime/v1/faults")
        assert await client.silent()


async def test_a_late_join_reply(local: Local) -> None:
    async with local.socket() as client:
        await local.fault(join_delay=1)
        ref = await client.push(f"realtime:{TOPIC}", "phx_join", {"config": {}})
        with pytest.raises(TimeoutError):
            await client.frame(timeout=0.2)
        assert (await client.reply(ref))["status"] == "ok"


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012])
async def test_sockets_close_with_a_code(local: Local, code: int) -> None:
    async with local.socket() as client:
        await ready(client)
        assert await local.fault(action="close", code=code) == {"done": 1}
        if code == 1012:
            assert (await client.frame())[4]["message"] == "Server requested disconnect"
        with pytest.raises(ConnectionClosed) as closed:
            await client.frame()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == code


async def test_an_abort_has_no_goodbye(local: Local) -> None:
    async with local.socket() as client:
        await ready(client)
        await local.fault(action="abort")
        with pytest.raises(ConnectionClosed) as closed:
            await client.frame()
        assert closed.value.rcvd is None


@pytest.mark.parametrize(
    ("action", "text"),
    [("expire_tokens", "Token has expired 0 seconds ago"), ("rate_limit", "Too many messages per second")],
)
async def test_channels_are_ended_with_a_reason(local: Local, action: str, text: str) -> None:
    async with local.socket() as client, local.socket() as untouched:
        await ready(client)
        await untouched.join("elsewhere", private=False)
        await local.fault(action=action, topic=TOPIC)
        assert (await client.frame())[4]["message"] == text
        assert (await client.frame())[3] == "phx_close"
        assert await untouched.silent()
        await ready(client)


async def test_a_crash_is_phx_error_with_the_join_ref(local: Local) -> None:
    async with local.socket() as client:
        await ready(client)
        join_ref = str(client.ref)
        await local.fault(action="crash")
        assert await client.frame() == [join_ref, join_ref, f"realtime:{TOPIC}", "phx_error", {}]


async def test_an_oversize_frame(local: Local) -> None:
    async with local.socket() as client:
        await ready(client)
        await local.fault(action="oversize", size=9_000_000)
        assert len((await client.broadcast())["payload"]["junk"]) == 9_000_000


async def test_handshakes_are_refused_as_often_as_asked(local: Local) -> None:
    await local.fault(refuse=2, refuse_status=429, refuse_error="Too many joins per second")
    for _ in range(2):
        with pytest.raises(InvalidStatus) as refused:
            async with local.socket():
                pass
        assert refused.value.response.status_code == 429
        assert json.loads(refused.value.response.body or b"") == {"error": "Too many joins per second"}
    async with local.socket() as client:
        await ready(client)


async def test_nonsense_is_refused_and_changes_nothing(local: Local) -> None:
    for nonsense in (
        {"drop": -1},
        {"drop": "x"},
        {"nothing": 1},
        {"action": "explode"},
        {"mute_joins": 3},
        [],
    ):
        answer = await local.http.post("/realtime/v1/faults", json=nonsense)
        assert answer.status_code == 422, nonsense
    assert (await local.http.get("/realtime/v1/faults")).json()["drop"] == 0
    anonymous = {"authorization": f"Bearer {local.keys.anon_key}"}
    assert (await local.http.post("/realtime/v1/faults", json={}, headers=anonymous)).status_code == 401


async def test_without_the_switch_there_are_no_faults(database: str, tmp_path: Path) -> None:
    async with serve_local(database, tmp_path, faults=False) as local:
        assert (await local.http.post("/realtime/v1/faults", json={"drop": 1})).status_code == 404


async def test_a_restarted_server_tells_its_clients_to_come_back(database: str, tmp_path: Path) -> None:
    async with serve_local(database, tmp_path) as local:
        async with asyncio.timeout(10):
            client_context = local.socket()
            client = await client_context.__aenter__()
            await ready(client)
    assert (await client.frame())[4]["message"] == "Server requested disconnect"
    with pytest.raises(ConnectionClosed) as closed:
        await client.frame()
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1012
    await client_context.__aexit__(None, None, None)


async def test_a_lost_database_connection_is_made_again(local: Local) -> None:
    """What was said in between is lost, as with the hosted server; what comes after is heard."""
    async with local.socket() as client:
        await client.join(f"project:{uuid4()}", private=False)
        await ready(client)
        await local.sql(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        async with asyncio.timeout(10):
            while local.stand_in.realtime.listening:
                await asyncio.sleep(0.01)
            await local.stand_in.realtime.until_listening()
        await mark(local)
        assert await heard(client) == []
