"""Every fault of the link, made for real through a broken network, in simulated time with production settings.

Each ends the same way: the link is live, the tree is equal, and the next commit arrives through the socket. All of it
is made with either transport, Realtime's channel and NATS, but for what `NOT_OF_NATS` says.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from websockets.exceptions import ConnectionClosed

from agent.link.types import LinkSettings, LinkState
from agent.replay.simulated_clock import simulate
from tests.agent.link.link_world import World, now
from tests.agent.link.one_link import TRANSPORTS
from tests.profiles import NIGHTLY

either = pytest.mark.parametrize("transport", TRANSPORTS)

Fault = Callable[[World], Awaitable[None]]

DEAD_SOCKET = 20 + 10 + 1
"""Worst detection of a dead peer: heartbeat interval, its deadline, a check."""

UNDER_WAY = LinkSettings().open_within
"""An attempt that fell into a hole is given up, also when the hole has closed meanwhile."""

ONE_RETRY = 4.0
"""One reconnect after a first backoff of at most half a second, the join, the catch-up, and a commit received."""


async def cut(world: World) -> None:
    assert world.proxy.cut() >= 1  # two, while the one takes the place of the other


async def half_open(world: World) -> None:
    assert world.proxy.half_open() == 1


async def stall_for_a_minute(world: World) -> None:
    world.proxy.stall()
    await asyncio.sleep(60)
    world.proxy.flow()


async def slow_network(world: World) -> None:
    world.proxy.delay = 1.0


async def listener_gone_for_two_minutes(world: World) -> None:
    world.proxy.stop_listening()
    world.proxy.cut()
    await asyncio.sleep(120)
    await world.proxy.listen()


async def resets_at_connect(world: World) -> None:
    world.proxy.refuse = True
    world.proxy.cut()
    await asyncio.sleep(60)
    world.proxy.refuse = False


async def black_hole_at_connect(world: World) -> None:
    world.proxy.black_hole = True
    world.proxy.cut()
    await asyncio.sleep(60)
    world.proxy.black_hole = False


async def mute_heartbeats(world: World) -> None:
    world.server.mute_heartbeats = True
    await asyncio.sleep(DEAD_SOCKET)
    world.server.mute_heartbeats = False


async def no_join_reply(world: World) -> None:
    world.server.mute_joins = True
    world.proxy.cut()
    await asyncio.sleep(30)
    world.server.mute_joins = False


async def late_join_reply(world: World) -> None:
    world.server.join_delay = 25.0
    world.proxy.cut()
    await asyncio.sleep(30)
    world.server.join_delay = 0.0


async def no_replication_feed(world: World) -> None:
    world.server.replication_ready = False
    world.proxy.cut()


async def close_1000(world: World) -> None:
    await world.server.close_sockets(1000)


async def close_1001(world: World) -> None:
    await world.server.close_sockets(1001)


async def close_1012_after_notice(world: World) -> None:
    await world.server.system("error", "Server requested disconnect")
    await world.server.close_sockets(1012)


async def close_frame_and_then_silence(world: World) -> None:
    """The close is said, and the far side is gone before the connection ends."""
    for pipe in world.proxy.pipes:
        pipe.client.write(world.server.goodbye())
    world.proxy.half_open()


async def channel_crash(world: World) -> None:
    await world.server.shut_channels(event="phx_error")


async def rate_limited(world: World) -> None:
    await world.server.shut_channels("Too many messages per second")


async def refused_429(world: World) -> None:
    world.server.refuse_handshake = (429, {"Retry-After": "45"})
    world.proxy.cut()
    await asyncio.sleep(2)
    world.server.refuse_handshake = None


async def refused_503(world: World) -> None:
    world.server.refuse_handshake = (503, {})
    world.proxy.cut()
    await asyncio.sleep(60)
    world.server.refuse_handshake = None


async def refused_401(world: World) -> None:
    world.server.refuse_handshake = (401, {})
    world.proxy.cut()
    await asyncio.sleep(30)
    world.server.refuse_handshake = None


async def token_expired_early(world: World) -> None:
    await world.server.shut_channels("Token has expired 0 seconds ago")


async def token_expired_and_api_down(world: World) -> None:
    world.api_down = True
    await world.server.shut_channels("Token has expired 0 seconds ago")
    await asyncio.sleep(90)
    world.api_down = False


async def token_revoked_then_restored(world: World) -> None:
    world.token_refused = True
    world.server.join_error = "Unauthorized: You do not have permissions to read from this Channel topic"
    await world.server.shut_channels("You no longer have permission to read from this Channel topic")
    await world.until(lambda: world.link.state is LinkState.REFUSED, "refusal", 10)
    await asyncio.sleep(120)
    assert world.link.problems()
    world.token_refused, world.server.join_error = False, None


async def silent_channel_and_a_commit(world: World) -> None:
    world.server.deafen()
    await world.commit()


async def forgotten_channel(world: World) -> None:
    world.server.deafen()
    world.server.unmatched_topic = True


async def oversize_frame(world: World) -> None:
    frame = world.server.message("file:update", {"content": "x" * (8 * 1024 * 1024)})
    for socket in list(world.server.sockets):
        with contextlib.suppress(ConnectionClosed):
            await socket.send(frame)


async def junk(world: World) -> None:
    for raw in (b"\x04", b"\xff" * 40, "{", "[]", "[1,2,3,4,5]", '"text"', b"", b"\x04\xff\xff\xff\x01abc"):
        for socket in list(world.server.sockets):
            await socket.send(raw)


async def suspended_for_an_hour(world: World) -> None:
    """The machine slept: its monotonic clock stood still, the far side gave up, TCP does not know."""
    world.proxy.half_open()
    world.asleep += 3600


async def last_event_lost(world: World) -> None:
    channels, world.server.channels = world.server.channels, {}
    await world.commit()
    world.server.channels = channels


FAULTS: dict[Fault, float] = {
    cut: ONE_RETRY,
    half_open: DEAD_SOCKET + ONE_RETRY,
    stall_for_a_minute: DEAD_SOCKET + ONE_RETRY,
    slow_network: ONE_RETRY,
    listener_gone_for_two_minutes: 30 + ONE_RETRY,
    resets_at_connect: 30 + ONE_RETRY,
    black_hole_at_connect: UNDER_WAY + 30 + ONE_RETRY,
    mute_heartbeats: 30 + ONE_RETRY,
    no_join_reply: 20 + ONE_RETRY,
    late_join_reply: 30 + ONE_RETRY,
    no_replication_feed: 5 + ONE_RETRY,
    close_1000: ONE_RETRY,
    close_1001: ONE_RETRY,
    close_1012_after_notice: ONE_RETRY,
    close_frame_and_then_silence: 3 + ONE_RETRY,
    channel_crash: ONE_RETRY,
    rate_limited: ONE_RETRY,
    refused_429: 45 + ONE_RETRY,
    refused_503: 30 + ONE_RETRY,
    refused_401: 70 + ONE_RETRY,
    token_expired_early: ONE_RETRY,
    token_expired_and_api_down: 30 + ONE_RETRY,
    token_revoked_then_restored: 70 + ONE_RETRY,
    silent_channel_and_a_commit: 32 + ONE_RETRY,
    forgotten_channel: 60 + ONE_RETRY,
    oversize_frame: ONE_RETRY,
    junk: ONE_RETRY,
    suspended_for_an_hour: 2 * ONE_RETRY,
    last_event_lost: 32 + ONE_RETRY,
}
"""Each fault, and how many seconds after its end the link may take to be live, equal and hearing."""


NOT_OF_NATS: dict[Fault, str] = {
    no_replication_feed: "what NATS publishes is complete from the subscription on",
    forgotten_channel: "NATS does not say that it forgot a subscription, which is silent_channel_and_a_commit",
}
"""What NATS cannot have, and why."""


@either
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_comes_back_from(fault: Fault, transport: str) -> None:
    if transport == "nats" and fault in NOT_OF_NATS:
        pytest.skip(NOT_OF_NATS[fault])

    async def scenario() -> None:
        async with World.made(transport) as world:
            await world.hears(within=5)
            await asyncio.sleep(40)
            await fault(world)
            await world.hears(within=FAULTS[fault])
            await asyncio.sleep(90)
            await world.hears(within=5)

    simulate(scenario())


@either
def test_a_quiet_shift_is_one_join_and_a_token_every_seven_minutes(transport: str) -> None:
    """8 hours without a fault: no reconnect, the token always fresh, and nothing grows."""

    async def scenario() -> None:
        async with World.made(transport) as world:
            await world.hears(within=5)
            for _ in range(8 * 6):
                await asyncio.sleep(600)
                assert world.link.state is LinkState.LIVE
                token = world.current()
                assert token is not None
                assert token.expires_at is not None
                assert token.expires_at - world.wall() > 100
            await world.hears(within=5)
            report = world.link.report()
            # NATS takes no token on an open connection: each is for another, made before the former is given up.
            sockets = 1 if transport == "realtime" else world.tokens_made
            assert (report["sockets"], report["joins"], report["losses"]) == (sockets, 1, {})
            assert 8 * 3600 / 430 < world.tokens_made < 8 * 3600 / 380
            assert world.server.token_in_force == token.value
            assert len(world.server.sockets) == 1

    simulate(scenario())


@either
def test_a_wrong_api_key_asks_neither_side_in_a_loop(transport: str) -> None:
    """An hour of 401: about a try a minute, a token for each, and the problem reported all the while."""

    async def scenario() -> None:
        async with World.made(transport) as world:
            world.server.refuse_handshake = (401, {})
            await asyncio.sleep(3600)
            assert world.link.state is LinkState.REFUSED
            assert world.link.problems()[0].kind == "token_refused"
            assert 40 < len(world.server.requests) < 130
            assert world.tokens_made < 130
            world.server.refuse_handshake = None
            await world.hears(within=90 + ONE_RETRY)
            assert world.link.problems() == ()

    simulate(scenario())


@either
def test_half_a_minute_of_being_joined_earns_a_fresh_backoff(transport: str) -> None:
    async def scenario() -> None:
        async with World.made(transport) as world:
            await listener_gone_for_two_minutes(world)
            await world.hears(within=30 + ONE_RETRY)
            grown = world.link.report()["attempt"]
            assert isinstance(grown, int)
            assert grown > 4
            await cut(world)
            await world.until(lambda: world.link.report()["attempt"] == grown + 1, "the loss", 5)
            await world.hears(within=30 + ONE_RETRY)
            await asyncio.sleep(31)
            await cut(world)
            await world.until(lambda: world.link.report()["attempt"] == 1, "a fresh start", 5)
            await world.hears(within=ONE_RETRY)

    simulate(scenario())


@either
def test_a_refusal_long_after_another_is_a_first_one(transport: str) -> None:
    """Only refusals in a row are retried slowly."""

    async def scenario() -> None:
        async with World.made(transport) as world:
            for _ in range(3):
                await world.hears(within=5)
                await asyncio.sleep(60)
                world.server.refuse_handshake = (401, {})
                seen = len(world.server.requests)
                await cut(world)
                await world.until(lambda: len(world.server.requests) > seen, "the refusal", 5)  # noqa: B023
                world.server.refuse_handshake = None
                await world.hears(within=ONE_RETRY)

    simulate(scenario())


FLAPS = [fault for fault in FAULTS if fault not in (slow_network, no_replication_feed)]


@pytest.mark.parametrize("transport", ["realtime", pytest.param("nats", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("seed", range(8 if NIGHTLY else 1))
def test_eight_hours_of_flapping(seed: int, transport: str) -> None:
    """Faults of every kind every minute and a half, commits all the while; never deaf, never a tight loop."""

    async def scenario() -> None:
        rng = random.Random(seed)
        seen: Counter[str] = Counter()
        async with World.made(transport) as world:
            attempts: list[float] = []
            counted = 0

            async def commits() -> None:
                nonlocal counted
                while True:
                    await asyncio.sleep(rng.expovariate(1 / 7))
                    await world.commit()
                    attempts.extend([now()] * (world.proxy.accepted - counted))
                    counted = world.proxy.accepted

            committing = asyncio.create_task(commits())
            while now() < 8 * 3600:
                await asyncio.sleep(rng.expovariate(1 / 60))
                if len(world.server.channels) != 1 or world.link.state is not LinkState.LIVE:
                    continue
                fault = rng.choice(FLAPS)
                seen[fault.__name__] += 1
                await fault(world)
                world.server.unmatched_topic = False
                if rng.random() < 0.5:
                    await world.hears(within=120)
            committing.cancel()
            await world.hears(within=120)
            await world.until(lambda: world.cursor == world.head, "an equal tree", 60)
        assert world.head > 3_000
        assert len(seen) > len(FLAPS) * 0.8
        assert len(world.by_socket) > 0.5 * world.head, "most commits come through the socket, faults or not"
        minutes = Counter(int(at // 60) for at in attempts)
        assert max(minutes.values()) < 30, "never a tight loop of connections"

    simulate(scenario())
