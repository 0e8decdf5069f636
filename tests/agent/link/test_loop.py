"""What every transport gets from the loop: here one of lines over TCP, which has nothing but `hold`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest

from agent.link.loop import ConnectionEnd, LinkLoop
from agent.link.source import EventSource, Received
from agent.link.types import Cause, LinkState, LinkStateMachine
from agent.replay.harness import ScenarioSource
from agent.tokens import Token
from tests.agent.link.one_link import QUICK, Issuer, SimulatedPolicy, running, until, wall

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")
"""The hook that replaces it would apply to every test below its conftest, and rename them."""


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return SimulatedPolicy()


@dataclass
class Lines:
    """A transport: says its token on one line, is answered `ok`, then every line is an event."""

    port: int
    topic: str = "lines"

    async def hold(self, link: LinkLoop, token: Token) -> ConnectionEnd:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError as error:
            return ConnectionEnd("unreachable", type(error).__name__)
        link.machine.move(Cause.OPENED, "connected")
        reading = asyncio.create_task(self._read(link, reader))
        reading.add_done_callback(lambda _: link.interrupt())
        try:
            writer.write(token.value.encode() + b"\n")
            while True:
                await link.interrupted(asyncio.get_running_loop().time() + 60.0)
                if (newer := link.newer_token()) is not None:
                    writer.write(newer.value.encode() + b"\n")
                if reading.done():
                    return link.ending or reading.result()
                if link.ending is not None:
                    return link.ending
        finally:
            reading.cancel()
            writer.transport.abort()

    async def _read(self, link: LinkLoop, reader: asyncio.StreamReader) -> ConnectionEnd:
        async for line in reader:
            if line == b"ok\n":
                link.machine.joined("taken", feed_ready=True)
            elif line == b"no\n":
                return ConnectionEnd("refused", "no", refused=True, refusal="no")
            else:
                link.deliver(Received("line", json.loads(line), link.wall()), len(line))
        return ConnectionEnd("closed", "the other side closed")


@dataclass
class LineServer:
    """The other side: takes a token that is in `good`, or any while `good` is None."""

    good: set[str] | None = None
    tokens: list[str] = field(default_factory=list)
    open: list[asyncio.StreamWriter] = field(default_factory=list)
    port: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.append(writer)
        with contextlib.suppress(ConnectionError):
            async for line in reader:
                self.tokens.append(line.decode().strip())
                taken = self.good is None or self.tokens[-1] in self.good
                writer.write(b"ok\n" if taken else b"no\n")
        self.open.remove(writer)
        writer.transport.abort()

    def say(self, **payload: object) -> None:
        for writer in self.open:
            writer.write(json.dumps(payload).encode() + b"\n")


@pytest.fixture
async def lines() -> AsyncIterator[LineServer]:
    far = LineServer()
    server = await asyncio.start_server(far.serve, "127.0.0.1", 0)
    far.port = server.sockets[0].getsockname()[1]
    yield far
    server.close()
    for writer in list(far.open):
        writer.transport.abort()
    await until(lambda: not far.open, "the connections to end")


def link_to(far: LineServer, issuer: Issuer, clock: Callable[[], float] = wall) -> LinkLoop:
    return LinkLoop(Lines(far.port), issuer, settings=QUICK, wall=clock)


async def test_another_transport_needs_one_method(lines: LineServer, issuer: Issuer) -> None:
    async with running(link_to(lines, issuer)) as link:
        await link.live()
        lines.say(n=1)
        await until(lambda: len(link.events) == 1, "an event")
        for writer in list(lines.open):
            writer.transport.abort()
        await until(lambda: link.stream.report()["joins"] == 2, "a second connection")
        await link.live()
        lines.say(n=2)
        await until(lambda: len(link.events) == 2, "an event after the loss")
    assert link.resyncs == ["joined", "joined"]
    report = link.stream.report()
    assert (report["topic"], report["sockets"], report["losses"]) == ("lines", 2, {"closed": 1})
    assert link.stream.state is LinkState.BACKOFF


async def test_a_refused_token_is_replaced_by_a_newer_one(lines: LineServer, issuer: Issuer) -> None:
    first = issuer.current()
    assert first is not None
    lines.good = set()
    async with running(link_to(lines, issuer)) as link:
        await until(lambda: len(lines.tokens) >= 3, "three tries")
        assert link.stream.problems()[0].kind == "token_refused"
        assert first.value not in lines.tokens[1:], "the refused one was tried once"
        lines.good = None
        await link.live()
        assert link.stream.problems() == ()
        assert link.stream.report()["refusals"] == {"no": link.stream.report()["losses"]["refused"]}  # type: ignore[index]


async def test_a_machine_that_slept_gets_a_new_connection(lines: LineServer, issuer: Issuer) -> None:
    slept = 0.0
    async with running(link_to(lines, issuer, lambda: wall() + slept)) as link:
        await link.live()
        slept = 60.0
        await until(lambda: link.stream.report()["joins"] == 2, "a new connection")
        await link.live()
        assert link.stream.report()["losses"] == {"clock_jump": 1}
        assert link.resyncs == ["joined", "clock_jump", "joined"]


async def test_only_a_link_that_looks_live_can_be_suspected(lines: LineServer, issuer: Issuer) -> None:
    async with running(link_to(lines, issuer), answer=False) as link:
        await until(lambda: link.stream.state is LinkState.CATCHING_UP, "the join")
        link.stream.suspect("an event did not come")
        await asyncio.sleep(1.0)
        assert link.stream.report()["losses"] == {}
        link.stream.caught_up()
        link.stream.suspect("an event did not come")
        await until(lambda: link.stream.report()["joins"] == 2, "a new connection")


async def test_a_bug_in_a_transport_ends_the_link(issuer: Issuer) -> None:
    class Broken:
        topic = "broken"

        async def hold(self, link: LinkLoop, token: Token) -> ConnectionEnd:
            raise ZeroDivisionError("a bug")

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(LinkLoop(Broken(), issuer, settings=QUICK, wall=wall).run(), 5)
    assert caught.group_contains(ZeroDivisionError)


async def test_every_event_source_has_what_the_rest_of_the_agent_reads(issuer: Issuer) -> None:
    sources: list[EventSource] = [LinkLoop(Lines(0), issuer, settings=QUICK, wall=wall), ScenarioSource()]
    for source in sources:
        assert source.state in LinkState
        assert source.since > 0
        assert source.problems() == ()
        report = source.report()
        assert isinstance(report["why"], str)
        assert (report["queue_depth"], report["clock_jumps"], report["refusals"]) == (0, 0, {})


def test_live_takes_a_catch_up_and_a_feed_in_any_order() -> None:
    for order in ((0, 1), (1, 0)):
        machine = LinkStateMachine()
        machine.move(Cause.OPENED, "open")
        machine.joined("taken", feed_ready=False)
        steps = (machine.caught_up, machine.feed_ready)
        steps[order[0]]()
        assert machine.state is LinkState.CATCHING_UP
        steps[order[1]]()
        assert machine.state is LinkState.LIVE
        machine.behind("overflow")
        machine.feed_ready()
        assert machine.state is LinkState.CATCHING_UP, "what was missed is still missing"
        machine.caught_up()
        assert machine.state is LinkState.LIVE
