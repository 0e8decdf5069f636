"""One link in simulated time, over either transport, the issuer of its tokens, and what came out of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

from agent.link.loop import LinkLoop
from agent.link.nats import nats_link
from agent.link.realtime import realtime_link
from agent.link.source import Received, Resync, Signal
from agent.link.types import LinkSettings, LinkState, Timing
from agent.replay.simulated_clock import SimulatedLoop
from agent.tokens import Token, Tokens, TokenSource
from tests.fakes.nats import PROJECT, FakeNats
from tests.fakes.realtime import TOPIC, FakeRealtime, jwt

Server = FakeRealtime | FakeNats

TRANSPORTS: dict[str, type[FakeRealtime] | type[FakeNats]] = {"realtime": FakeRealtime, "nats": FakeNats}

either = pytest.mark.parametrize("server", TRANSPORTS, indirect=True)
"""A test of the fixture `server` that is made with both transports."""


def realtime_only(why: str) -> pytest.MarkDecorator:
    """A test of the fixture `server` that NATS cannot have: it is skipped there, and says why."""
    skipped = pytest.param("nats", marks=pytest.mark.skip(reason=f"NATS {why}"))
    return pytest.mark.parametrize("server", ["realtime", skipped], indirect=True)


QUICK = LinkSettings(
    timing=Timing(
        heartbeat_every=0.2, heartbeat_within=0.2, join_within=0.4, replication_within=0.3, late_tick=0.5
    ),
    open_within=1.0,
    backoff_first=0.02,
    backoff_most=0.1,
    backoff_least=0.005,
    stable_after=1.0,
    refused_retry=0.3,
    renew_pause=0.1,
    renew_within=0.5,
    rejoin_least=0.05,
    check_every=0.02,
    close_within=0.5,
)
"""The same machine with deadlines that a test can wait for."""


class SimulatedPolicy(asyncio.DefaultEventLoopPolicy):
    """Every loop of this module has a clock that jumps: no deadline here depends on how busy the machine is."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return SimulatedLoop()


def wall() -> float:
    """Unix seconds of the simulation."""
    return 1_800_000_000.0 + asyncio.get_running_loop().time()


class Issuer:
    """A `TokenSource` whose tokens are made here; `refuse` makes it say no."""

    def __init__(self, lifetime: float = 600.0) -> None:
        self.lifetime = lifetime
        self.made = 0
        self.asked = 0
        self.refuse: Exception | None = None
        first = self.make()
        self.tokens = Tokens(first, nats_jwt=first)

    def make(self) -> str:
        self.made += 1
        now = wall()
        return jwt(now + self.lifetime, now, name=f"token-{self.made}")

    def current(self) -> Token | None:
        return self.tokens.current()

    @property
    def problem(self) -> str | None:
        return None

    async def renew_token(self) -> Token:
        self.asked += 1
        await asyncio.sleep(0)
        if self.refuse is not None:
            raise self.refuse
        token = self.make()
        return self.tokens.accept(token, token)


class Link:
    """A running stream and what came out of it; every Resync is answered as sync would."""

    def __init__(self, stream: LinkLoop, answer: bool = True) -> None:
        self.stream = stream
        self.answer = answer
        self.signals: list[Signal] = []

    async def consume(self) -> None:
        while True:
            signal = await self.stream.receive()
            self.signals.append(signal)
            if self.answer and isinstance(signal, Resync):
                self.stream.caught_up()

    @property
    def resyncs(self) -> list[str]:
        return [s.reason for s in self.signals if isinstance(s, Resync)]

    @property
    def events(self) -> list[tuple[str, object]]:
        return [(s.event, s.payload) for s in self.signals if isinstance(s, Received)]

    async def live(self) -> None:
        await until(lambda: self.stream.state is LinkState.LIVE, "the link to be live")


async def until(condition: Callable[[], bool], what: str, within: float = 60.0) -> None:
    """Wait for a condition, or fail saying for what."""
    deadline = asyncio.get_running_loop().time() + within
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"waited {within} s for {what}"
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(stream: LinkLoop, *, answer: bool = True) -> AsyncIterator[Link]:
    link = Link(stream, answer)
    tasks = [asyncio.create_task(stream.run()), asyncio.create_task(link.consume())]
    try:
        yield link
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task


def stream_to(
    server: Server,
    issuer: TokenSource,
    settings: LinkSettings = QUICK,
    wall: Callable[[], float] = wall,
    url: str | None = None,
) -> LinkLoop:
    """A link to `server`, or to `url`, which leads there."""
    if isinstance(server, FakeNats):
        return nats_link(url or server.url, PROJECT, issuer, settings=settings, wall=wall)
    return realtime_link(url or server.url, "publishable", TOPIC, issuer, settings=settings, wall=wall)


async def comes_back(link: Link, server: Server, joins: int = 2) -> None:
    """The proof of every fault: joined again, ordered to catch up again, live, and receiving."""
    await until(lambda: len(server.joins) >= joins and bool(server.channels), "another join")
    await link.live()
    before = len(link.events)
    await until(lambda: bool(server.channels), "a channel")
    await server.broadcast("file:update", {"after": True})
    await until(lambda: len(link.events) > before, "an event after the fault")
    assert link.resyncs.count("joined") >= 2
