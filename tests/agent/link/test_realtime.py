"""The link against a real websocket server: it joins, hears, and comes back from everything."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from agent.link.realtime import realtime_link
from agent.link.source import Resync
from agent.link.types import LinkSettings, LinkState
from tests.agent.link.one_link import (
    QUICK,
    Issuer,
    SimulatedPolicy,
    comes_back,
    running,
    stream_to,
    until,
    wall,
)
from tests.fakes.realtime import TOPIC, FakeRealtime

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")
"""The hook that replaces it would apply to every test below its conftest, and rename them."""


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return SimulatedPolicy()


async def test_joins_catches_up_and_delivers(server: FakeRealtime, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await server.broadcast("file:update", {"revision": 1})
        await server.broadcast("file:delete", {"revision": 2}, binary=False)
        await until(lambda: len(link.events) == 2, "two events")
    assert link.events == [("file:update", {"revision": 1}), ("file:delete", {"revision": 2})]
    assert link.resyncs[0] == "joined"
    assert server.joins[0].topic == TOPIC
    assert server.joins[0].token == issuer.current().value
    assert "apikey=publishable" in server.requests[0]
    assert server.left == 1, "a stopped link says goodbye"


async def test_is_not_live_before_catch_up(server: FakeRealtime, issuer: Issuer) -> None:
    server.replication_delay = 0.05
    async with running(stream_to(server, issuer), answer=False) as link:
        await until(lambda: len(link.resyncs) == 2, "both orders to catch up")
        assert link.resyncs == ["joined", "replication_ready"]
        assert link.stream.state is LinkState.CATCHING_UP
        link.stream.caught_up()
        assert link.stream.state is LinkState.LIVE


async def test_a_catch_up_does_not_answer_a_resync_that_still_waits(
    server: FakeRealtime, issuer: Issuer
) -> None:
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


async def test_heartbeats_keep_it_alive(server: FakeRealtime, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: server.heartbeats >= 3, "three heartbeats")
        assert len(server.joins) == 1
        assert link.stream.state is LinkState.LIVE


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012])
async def test_comes_back_from_a_close(server: FakeRealtime, issuer: Issuer, code: int) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await server.close_sockets(code)
        await comes_back(link, server)
        assert link.stream.report()["losses"] == {f"closed_{code}": 1}


async def test_what_was_sent_before_a_close_is_delivered(server: FakeRealtime, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        for n in range(200):
            await server.broadcast("file:update", {"n": n, "content": "x" * 2_000})
        await server.close_sockets(1001)
        await until(lambda: link.stream.report()["losses"] == {"closed_1001": 1}, "the loss")
        await until(lambda: len(link.events) == 200, "all events")
        assert [payload["n"] for _, payload in link.events] == list(range(200))  # type: ignore[index]


async def test_a_frame_over_the_limit_costs_the_socket(server: FakeRealtime, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer, replace(QUICK, max_frame=10_000))) as link:
        await link.live()
        await server.broadcast("file:update", {"content": "x" * 9_000})
        await server.broadcast("file:update", {"content": "x" * 10_000})
        await comes_back(link, server)
        assert link.stream.report()["losses"] == {"oversize": 1}
        assert len(link.events) == 2


async def test_comes_back_from_a_reset(server: FakeRealtime, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        server.abort_sockets()
        await comes_back(link, server)


async def test_mute_heartbeats_replace_the_socket(server: FakeRealtime, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        server.mute_heartbeats = True
        await until(lambda: len(server.joins) >= 2, "a new socket")
        server.mute_heartbeats = False
        await comes_back(link, server)
        assert "heartbeat_timeout" in link.stream.report()["losses"]


async def test_no_join_reply_replaces_the_socket(server: FakeRealtime, issuer: Issuer) -> None:
    server.mute_joins = True
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: len(server.joins) >= 2, "a second attempt")
        server.mute_joins = False
        await link.live()
        refs = [channel.join_ref for channel in server.joins]
        assert len({id(channel.socket) for channel in server.joins}) == len(refs), (
            "never two joins on one socket"
        )


@pytest.mark.parametrize("event", ["phx_close", "phx_error"])
async def test_a_channel_that_ends_is_joined_again(server: FakeRealtime, issuer: Issuer, event: str) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await server.shut_channels(event=event)
        await comes_back(link, server)


async def test_rate_limit_backs_off(server: FakeRealtime, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await server.shut_channels("Too many messages per second")
        await comes_back(link, server)
        assert "rate_limited" in link.stream.report()["losses"]


async def test_handshake_429_waits_as_asked(server: FakeRealtime, issuer: Issuer) -> None:
    server.refuse_handshake = (429, {"Retry-After": "1"})
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: bool(server.requests), "the first attempt")
        began = asyncio.get_running_loop().time()
        server.refuse_handshake = None
        await link.live()
        assert asyncio.get_running_loop().time() - began > 0.9
        assert link.stream.report()["refusals"] == {"429": 1}


async def test_overflow_becomes_one_resync(server: FakeRealtime, issuer: Issuer) -> None:
    settings = LinkSettings(timing=QUICK.timing, queue_events=10)
    stream = stream_to(server, issuer, settings)
    task = asyncio.create_task(stream.run())
    try:
        await until(lambda: bool(server.channels), "a join")
        for n in range(50):
            await server.broadcast("file:update", {"n": n})
        await until(lambda: stream.report()["overflows"] == 5, "the queue to overflow")
        assert stream.report()["queue_depth"] <= 10
        first = await stream.receive()
        assert first == Resync("overflow")
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_clock_jump_drops_the_socket(server: FakeRealtime, issuer: Issuer) -> None:
    slept = 0.0
    stream = realtime_link(server.url, None, TOPIC, issuer, settings=QUICK, wall=lambda: wall() + slept)
    async with running(stream) as link:
        await link.live()
        slept = 60.0
        await comes_back(link, server)
        assert link.stream.report()["clock_jumps"] == 1
        assert "clock_jump" in link.resyncs


async def test_a_suspicion_replaces_a_channel_that_brings_nothing(
    server: FakeRealtime, issuer: Issuer
) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        server.deafen()
        link.stream.suspect("head is 7, the link brought 5")
        await comes_back(link, server)


async def test_suspicions_in_a_row_are_one(server: FakeRealtime, issuer: Issuer) -> None:
    """The owner of the socket is interrupted again while it is already being interrupted."""
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        for _ in range(5):
            link.stream.suspect("again")
            await asyncio.sleep(0)
        await comes_back(link, server)
        assert link.stream.report()["losses"] == {"suspected": 1}


async def test_a_bug_in_reading_ends_the_link_loudly(
    server: FakeRealtime, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
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
        await asyncio.wait_for(task, 5)
    assert caught.group_contains(ZeroDivisionError)
