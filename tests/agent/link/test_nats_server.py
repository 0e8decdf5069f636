"""The link against the real nats-server and its stream: what the fake promises, and what only the real one does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from agent.core.errors import CredentialRejected
from agent.link.loop import LinkLoop
from agent.link.nats import nats_link
from agent.link.types import LinkState
from agent.tokens import Token, Tokens
from orchestrator_stub.relay.accounts import Operator
from orchestrator_stub.relay.embedded import EmbeddedNats
from orchestrator_stub.relay.publisher import Event, NatsStream
from tests.agent.link.one_link import QUICK, running, until
from tests.fakes.nats import FakeNats
from tests.fakes.proxy import Proxy
from tests.fakes.realtime import jwt
from tests.orchestrator.relay.nats_world import client, stream_owner

pytestmark = pytest.mark.asyncio(loop_scope="module")

SETTINGS = replace(
    QUICK, timing=replace(QUICK.timing, heartbeat_within=10.0, join_within=10.0), open_within=5.0
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedNats]:
    embedded = EmbeddedNats(tmp_path_factory.mktemp("nats") / "server")
    await embedded.start()
    yield embedded
    await embedded.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stream(server: EmbeddedNats) -> AsyncIterator[NatsStream]:
    made = NatsStream(server.url, server.operator.keys)
    yield made
    await made.close()


class Session:
    """One project's session: its tokens, and what is published for it."""

    def __init__(
        self, server: EmbeddedNats, stream: NatsStream, *, life: float = 600.0, url: str = ""
    ) -> None:
        self.project = uuid4()
        self.server = server
        self.stream = stream
        self.life = life
        self.renewed = 0
        self.may_renew = True
        self.tokens = Tokens(self.session_token(), nats_jwt=self.mint())
        self.link: LinkLoop = nats_link(url or server.url, str(self.project), self, settings=SETTINGS)

    def session_token(self) -> str:
        return jwt(time.time() + self.life, time.time(), name=f"t{self.renewed}")

    def mint(
        self, project: UUID | None = None, operator: Operator | None = None, life: float | None = None
    ) -> str:
        keys = (operator or self.server.operator).keys
        return keys.machine_token(project or self.project, uuid4(), time.time() + (life or self.life))

    def current(self) -> Token | None:
        return self.tokens.current()

    @property
    def problem(self) -> str | None:
        return None

    async def renew_token(self) -> Token:
        if not self.may_renew:
            raise CredentialRejected("session API (token) refused the token: HTTP 401")
        self.renewed += 1
        return self.tokens.accept(self.session_token(), self.mint())

    async def publish(self, revision: int) -> None:
        text = f'{{"revision": {revision}}}'
        event = Event(0, 0, str(self.project), "file:update", f"{self.project}:e:{revision}", text)
        assert await self.stream.publish(event)


async def test_what_is_published_arrives_in_order(server: EmbeddedNats, stream: NatsStream) -> None:
    session = Session(server, stream)
    async with running(session.link) as link:
        await link.live()
        for revision in range(30):
            await session.publish(revision)
        await until(lambda: len(link.events) == 30, "thirty events")
    assert link.events == [("file:update", {"revision": n}) for n in range(30)]
    assert link.resyncs == ["joined"]


def in_order(events: list[tuple[str, object]], last: int) -> bool:
    """Whether every revision came, and each first in its turn; what two connections brought came twice."""
    heard = [payload["revision"] for _, payload in events]  # type: ignore[index]
    return list(dict.fromkeys(heard)) == list(range(1, last + 1))


async def test_tokens_are_replaced_without_a_gap(server: EmbeddedNats, stream: NatsStream) -> None:
    """A newer token makes another connection, which is subscribed before the former one is given up."""
    session = Session(server, stream)
    revision = 0
    async with running(session.link) as link:
        await link.live()
        for number in range(1, 6):
            await session.renew_token()
            while link.stream.report()["sockets"] == number:
                revision += 1
                await session.publish(revision)
        await until(lambda: link.events[-1][1] == {"revision": revision}, "the last event")
        report = link.stream.report()
    assert (report["losses"], report["joins"], report["sockets"]) == ({}, 1, 6)
    assert in_order(link.events, revision)


@pytest.mark.nightly
async def test_no_token_comes_to_its_end(server: EmbeddedNats, stream: NatsStream) -> None:
    """Tokens that live for ten seconds, for half a minute: the server would end each connection."""
    session = Session(server, stream, life=10.0)
    ends, revision = time.monotonic() + 30, 0
    async with running(session.link) as link:
        await link.live()
        while time.monotonic() < ends:
            revision += 1
            await session.publish(revision)
            await asyncio.sleep(0.01)
        await until(lambda: link.events[-1][1] == {"revision": revision}, "the last event")
        report = link.stream.report()
    assert (report["losses"], report["joins"]) == ({}, 1)
    assert session.renewed >= 3
    assert in_order(link.events, revision)


async def test_a_server_that_is_killed_is_found_again(tmp_path: Path) -> None:
    own = EmbeddedNats(tmp_path / "server")
    await own.start()
    stream = NatsStream(own.url, own.operator.keys)
    session = Session(own, stream)
    try:
        async with running(session.link) as link:
            await link.live()
            await own.kill()
            await until(lambda: link.stream.report()["losses"] != {}, "the loss")
            await own.start()
            await link.live()
            await session.publish(1)
            await until(lambda: len(link.events) == 1, "an event after it")
            assert link.resyncs == ["joined", "joined"]
    finally:
        await stream.close()
        await own.stop()


@pytest.mark.parametrize("kind", ["other_project", "other_operator", "junk", "expired"])
async def test_a_token_that_does_not_count_is_refused_and_shown(
    server: EmbeddedNats, stream: NatsStream, kind: str
) -> None:
    session = Session(server, stream)
    wrong = {
        "other_project": lambda: session.mint(uuid4()),
        "other_operator": lambda: session.mint(operator=Operator()),
        "junk": lambda: session.mint()[:-20] + "A" * 20,
        "expired": lambda: session.mint(life=-60.0),
    }[kind]()
    session.tokens = Tokens(session.session_token(), nats_jwt=wrong)
    session.may_renew = False
    async with running(session.link) as link:
        await until(lambda: link.stream.state is LinkState.REFUSED, "the refusal")
        await until(lambda: bool(link.stream.problems()), "the problem")
        assert link.stream.problems()[0].kind == "token_refused"
        assert wrong not in str(link.stream.report())
        session.may_renew = True
        await link.live()
        await session.publish(1)
        await until(lambda: len(link.events) == 1, "an event")
        assert link.stream.problems() == ()


async def test_what_was_not_published_for_this_project_is_ignored(
    server: EmbeddedNats, stream: NatsStream
) -> None:
    """Somebody of the stream's own account writes past the stream: no `Nats-Subject`, or another's."""
    session = Session(server, stream)
    async with running(session.link) as link, client(server.url, stream_owner(server)) as owner:
        await link.live()
        subject = f"pv.out.{session.project}"
        for headers in (
            {"Pv-Event": "file:update"},
            {"Pv-Event": "file:update", "Nats-Subject": f"pv.in.{uuid4()}"},
        ):
            await owner.publish(subject, b'{"revision": 9}', headers=headers)
        mine = {"Nats-Subject": f"pv.in.{session.project}"}
        for body, event in ((b"junk", "file:update"), (b"[]", "file:update"), (b'{"revision": 9}', "")):
            await owner.publish(subject, body, headers=mine | ({"Pv-Event": event} if event else {}))
        await owner.flush(5)
        await session.publish(1)
        await until(lambda: len(link.events) == 1, "the event that counts")
        assert link.events == [("file:update", {"revision": 1})]
        assert dict(link.stream.ignored) == {"other_subject": 2, "malformed": 3}


async def test_tls_that_is_none_gets_no_token() -> None:
    """A server, or somebody in between, that says it speaks no TLS."""
    async with FakeNats() as plain, Proxy("127.0.0.1", plain.port) as proxy:
        tokens = Tokens(jwt(time.time() + 600), nats_jwt=jwt(time.time() + 600))
        made = nats_link(f"tls://127.0.0.1:{proxy.port}", str(uuid4()), tokens, settings=SETTINGS)
        async with running(made) as link:
            await until(lambda: proxy.accepted >= 2, "two attempts")
            await until(lambda: "TLS" in str(link.stream.report()["why"]), "why, between two attempts")
        assert plain.requests == []


GREETINGS = [
    b"", b"INFO []\r\n", b"INFO 5\r\n", b"INFO {\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\xfe\r\n",
    b"x" * 2_000_000,
    b'INFO {"max_payload":"x","client_id":[],"headers":7,"nonce":5}\r\nPONG\r\n', b"INFO null\r\n",
    b'INFO {"nonce":"n"}\r\nPONG\r\nHMSG a 1 99 5\r\n\r\nINFO 7\r\n', b'INFO {"nonce":"n"}\r\n-ERR\r\n',
]  # fmt: skip


@pytest.mark.parametrize("greeting", GREETINGS, ids=lambda greeting: repr(greeting[:14]))
async def test_a_server_that_is_none_ends_no_link(greeting: bytes) -> None:
    """Something else listens there, or something hostile: tried again for ever, and the agent lives."""
    met = 0

    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal met
        met += 1
        with contextlib.suppress(ConnectionError):
            writer.write(greeting)
            await writer.drain()
            await asyncio.sleep(0.05)
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as listening:
        tokens = Tokens(jwt(time.time() + 600), nats_jwt=jwt(time.time() + 600))
        url = f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with running(nats_link(url, str(uuid4()), tokens, settings=SETTINGS)) as link:
            await until(lambda: met >= 3, "three attempts")
            assert link.events == []


@pytest.mark.parametrize(
    "greeting", [b'INFO {"nonce":"n"}\r\nPONG\r\n', b"\xff\xfe\r\n"], ids=["connects", "junk"]
)
async def test_a_link_is_stopped_at_any_moment(greeting: bytes) -> None:
    """`asyncio.wait_for`, which the client is made of, may swallow a cancellation that comes just as it is done."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            writer.write(greeting)
            await reader.read(100)
        writer.close()

    eager = replace(SETTINGS, backoff_first=0.0001, backoff_most=0.0001, backoff_least=0.0)
    async with await asyncio.start_server(greet, "127.0.0.1", 0) as listening:
        url = f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        for number in range(60):
            tokens = Tokens(jwt(time.time() + 600), nats_jwt=jwt(time.time() + 600))
            task = asyncio.create_task(nats_link(url, str(uuid4()), tokens, settings=eager).run())
            for _ in range(number):
                await asyncio.sleep(0)
            task.cancel()
            done, _ = await asyncio.wait([task], timeout=30)
            assert done, f"it goes on, cancelled after {number} steps"
