"""The link against a real server of either transport: it joins, hears, and comes back from everything."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from agent.link.source import Resync
from agent.link.types import LinkSettings, LinkState
from tests.agent.link.one_link import (
    QUICK,
    Issuer,
    Server,
    SimulatedPolicy,
    comes_back,
    either,
    realtime_only,
    running,
    stream_to,
    until,
    wall,
)
from tests.fakes.realtime import TOPIC, Channel, FakeRealtime

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")
"""The hook that replaces it would apply to every test below its conftest, and rename them."""


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return SimulatedPolicy()


@either
async def test_joins_catches_up_and_delivers(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await server.broadcast("file:update", {"revision": 1})
        await server.broadcast("file:delete", {"revision": 2}, binary=False)
        await until(lambda: len(link.events) == 2, "two events")
    assert link.events == [("file:update", {"revision": 1}), ("file:delete", {"revision": 2})]
    assert link.resyncs[0] == "joined"
    token = issuer.current()
    assert token is not None
    assert server.joins[0].token == token.value
    if isinstance(server, FakeRealtime):
        assert server.joins[0].topic == TOPIC
        assert "apikey=publishable" in server.requests[0]
        assert server.left == 1, "a stopped link says goodbye"
    await until(lambda: not server.sockets, "the socket to be closed")


@realtime_only("is complete from the subscription on")
async def test_is_not_live_before_catch_up(server: Server, issuer: Issuer) -> None:
    server.replication_delay = 0.05
    async with running(stream_to(server, issuer), answer=False) as link:
        await until(lambda: len(link.resyncs) == 2, "both orders to catch up")
        assert link.resyncs == ["joined", "replication_ready"]
        assert link.stream.state is LinkState.CATCHING_UP
        link.stream.caught_up()
        assert link.stream.state is LinkState.LIVE


@realtime_only("is complete from the subscription on: there is one order to catch up")
async def test_a_catch_up_does_not_answer_a_resync_that_still_waits(server: Server, issuer: Issuer) -> None:
    """It began before: what the second order is about may not be in it."""
    server.replication_delay = 0.05
    stream = stream_to(server, issuer)
    task = asyncio.create_task(stream.run())
    try:
        assert await stream.receive() == Resync("joined")
        await until(lambda: stream.report()["queue_depth"] == 1, "the second order")
        stream.caught_up()
        assert stream.state is LinkState.CATCHING_UP
        assert await stream.receive() == Resync("replication_ready")
        stream.caught_up()
        assert stream.state is LinkState.LIVE
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@either
async def test_heartbeats_keep_it_alive(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: server.heartbeats >= 3, "three heartbeats")
        assert len(server.joins) == 1
        assert link.stream.state is LinkState.LIVE


@either
@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012])
async def test_comes_back_from_a_close(server: Server, issuer: Issuer, code: int) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await server.close_sockets(code)
        await comes_back(link, server)
        # A server of NATS says why in words, or closes without one.
        said = "closed" if code == 1000 else "server_error"
        cause = f"closed_{code}" if isinstance(server, FakeRealtime) else said
        assert link.stream.report()["losses"] == {cause: 1}


@either
async def test_what_was_sent_before_a_close_is_delivered(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        for n in range(200):
            await server.broadcast("file:update", {"n": n, "content": "x" * 2_000})
        await server.close_sockets(1001)
        await until(lambda: link.stream.report()["losses"] != {}, "the loss")
        await until(lambda: len(link.events) == 200, "all events")
        assert [payload["n"] for _, payload in link.events] == list(range(200))  # type: ignore[index]


@either
async def test_a_frame_over_the_limit_costs_the_socket(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer, replace(QUICK, max_frame=10_000))) as link:
        await link.live()
        await server.broadcast("file:update", {"content": "x" * 9_000})
        await server.broadcast("file:update", {"content": "x" * 10_000})
        await comes_back(link, server)
        assert link.stream.report()["losses"] == {"oversize": 1}
        assert len(link.events) == 2


@either
async def test_comes_back_from_a_reset(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        server.abort_sockets()
        await comes_back(link, server)


@either
async def test_mute_heartbeats_replace_the_socket(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        server.mute_heartbeats = True
        await until(lambda: len(server.joins) >= 2, "a new socket")
        server.mute_heartbeats = False
        await comes_back(link, server)
        assert "heartbeat_timeout" in link.stream.report()["losses"]


@either
async def test_no_join_reply_replaces_the_socket(server: Server, issuer: Issuer) -> None:
    server.mute_joins = True
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: len(server.joins) >= 2, "a second attempt")
        server.mute_joins = False
        await link.live()
        sockets = [join.socket if isinstance(join, Channel) else join for join in server.joins]
        assert len({id(socket) for socket in sockets}) == len(sockets), "never two joins on one socket"


@either
@pytest.mark.parametrize("event", ["phx_close", "phx_error"])
async def test_a_channel_that_ends_is_joined_again(server: Server, issuer: Issuer, event: str) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await server.shut_channels(event=event)
        await comes_back(link, server)


@either
async def test_rate_limit_backs_off(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await server.shut_channels("Too many messages per second")
        await comes_back(link, server)
        assert "rate_limited" in link.stream.report()["losses"]


@realtime_only("does not say how long to wait")
async def test_handshake_429_waits_as_asked(server: Server, issuer: Issuer) -> None:
    server.refuse_handshake = (429, {"Retry-After": "1"})
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: bool(server.requests), "the first attempt")
        began = asyncio.get_running_loop().time()
        server.refuse_handshake = None
        await link.live()
        assert asyncio.get_running_loop().time() - began > 0.9
        assert link.stream.report()["refusals"] == {"429": 1}


@either
async def test_overflow_becomes_one_resync(
    server: Server, issuer: Issuer, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = LinkSettings(timing=QUICK.timing, queue_events=10)
    stream = stream_to(server, issuer, settings)
    task = asyncio.create_task(stream.run())
    try:
        await until(lambda: stream.joined, "a join")
        for n in range(50):
            await server.broadcast("file:update", {"n": n})
        # The client for NATS has a queue of its own before ours, and drops what does not fit, one by one.
        least = 5 if isinstance(server, FakeRealtime) else 1
        await until(lambda: int(str(stream.report()["overflows"])) >= least, "the queue to overflow")
        await asyncio.sleep(1)
        assert stream.report()["queue_depth"] <= 10
        first = await stream.receive()
        assert first == Resync("overflow")
        assert capsys.readouterr().out.count("why=overflow") == stream.report()["overflows"] <= 5
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@either
async def test_a_clock_jump_drops_the_socket(server: Server, issuer: Issuer) -> None:
    slept = 0.0
    stream = stream_to(server, issuer, wall=lambda: wall() + slept)
    async with running(stream) as link:
        await link.live()
        slept = 60.0
        await comes_back(link, server)
        assert link.stream.report()["clock_jumps"] == 1
        assert "clock_jump" in link.resyncs


@either
async def test_a_suspicion_replaces_a_channel_that_brings_nothing(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        server.deafen()
        link.stream.suspect("head is 7, the link brought 5")
        await comes_back(link, server)


@either
async def test_suspicions_in_a_row_are_one(server: Server, issuer: Issuer) -> None:
    """The owner of the socket is interrupted again while it is already being interrupted."""
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        for _ in range(5):
            link.stream.suspect("again")
            await asyncio.sleep(0)
        await comes_back(link, server)
        assert link.stream.report()["losses"] == {"suspected": 1}


@either
async def test_a_bug_in_reading_ends_the_link_loudly(
    server: Server, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a link without a reader nor an endless reconnect: the first root task to end stops the agent."""
    stream = stream_to(server, issuer)
    task = asyncio.create_task(stream.run())
    await until(lambda: bool(server.channels), "a join")

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(stream._queue, "put", broken)
    await server.broadcast("file:update", {"revision": 1})
    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(task, 30)
    assert caught.group_contains(ZeroDivisionError)
