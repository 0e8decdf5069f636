"""`preview-agent check` where REALTIME_URL is of NATS: what each failure says, and what to do about it."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from agent.cli import check
from agent.config import Settings, read_environment
from agent.replay.simulated_clock import simulate
from orchestrator_stub.relay.accounts import Operator
from orchestrator_stub.relay.embedded import EmbeddedNats
from tests.agent.cli.test_check import environment
from tests.fakes.certificates import certificate
from tests.fakes.nats import PROJECT, FakeNats
from tests.fakes.realtime import jwt
from tests.ports import free_port

pytestmark = pytest.mark.asyncio(loop_scope="module")

WELL = "takes NATS_JWT, valid for 600 s, and the subscription to the project"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedNats]:
    embedded = EmbeddedNats(tmp_path_factory.mktemp("nats") / "server")
    await embedded.start()
    yield embedded
    await embedded.stop()


def token(server: EmbeddedNats, project: UUID | None = None, life: float = 600.5) -> str:
    return server.operator.keys.machine_token(project or UUID(PROJECT), uuid4(), time.time() + life)


def machine(tmp_path: Path, url: str, nats_jwt: str = "", **more: str) -> dict[str, str]:
    nats = {"REALTIME_URL": url, "NATS_JWT": nats_jwt or jwt(time.time() + 600.5), "PROJECT_ID": PROJECT}
    return environment(tmp_path, **nats, **more)


async def said(given: dict[str, str]) -> str:
    """What the whole command says of NATS; no token is in any of its lines."""
    lines: list[str] = []
    await check.check(given, lines.append)
    assert given["NATS_JWT"] not in "\n".join(lines)
    (line,) = (line for line in lines if line[6:].startswith("nats "))
    assert not any(line[6:].startswith("realtime ") for line in lines)
    return line[:4].strip() + ": " + line[20:]


async def answer(given: dict[str, str]) -> str:
    """What the one question is answered; quicker than the whole."""
    settings: Settings = read_environment(given)
    (finding,) = await check._nats(settings)
    return f"{finding.grade}: {finding.detail}"


async def test_a_server_that_takes_the_token_is_well(tmp_path: Path, server: EmbeddedNats) -> None:
    assert await said(machine(tmp_path, server.url, token(server))) in (
        f"ok: 127.0.0.1:{server.port} {WELL}", f"ok: 127.0.0.1:{server.port} {WELL.replace('600', '599')}"
    )  # fmt: skip


REFUSED: dict[str, tuple[Callable[[EmbeddedNats], str], str]] = {
    "another project's": (
        lambda server: token(server, uuid4()),
        "NATS_JWT may not hear this project; is it of another session, or PROJECT_ID wrong?",
    ),
    "another deployment's": (
        lambda server: Operator().keys.machine_token(UUID(PROJECT), uuid4(), time.time() + 600),
        "NATS_JWT is refused; the server must include the accounts.conf of the orchestrator's nats-keys",
    ),
    "expired": (
        lambda server: token(server, life=-60),
        "NATS_JWT expired N s ago; SESSION_API_URL can give a new one",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
async def test_a_token_that_does_not_count(tmp_path: Path, server: EmbeddedNats, kind: str) -> None:
    make, sentence = REFUSED[kind]
    told = await answer(machine(tmp_path, server.url, make(server)))
    assert re.sub(r"\d+ s ago", "N s ago", told) == f"fail: 127.0.0.1:{server.port}: {sentence}"


async def test_no_server_and_no_name(tmp_path: Path) -> None:
    port = free_port()
    told = await answer(machine(tmp_path, f"nats://127.0.0.1:{port}"))
    assert told.startswith(f"fail: 127.0.0.1:{port}: ")
    assert told.endswith("does it run, may this machine reach it, is REALTIME_URL right?")
    told = await answer(machine(tmp_path, "tls://nobody.invalid"))
    assert told.startswith("fail: nobody.invalid:4222: the name has no address; check REALTIME_URL")


@pytest.mark.parametrize("greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x1b[31m\xff", b""])
async def test_something_else_that_listens_there(tmp_path: Path, greeting: bytes) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        told = await answer(machine(tmp_path, f"nats://127.0.0.1:{port}"))
    assert told.startswith(f"fail: 127.0.0.1:{port}: no NATS server answers there, but ")
    assert told.endswith("; check REALTIME_URL")
    assert "\x1b" not in told


async def test_tls_that_is_none_and_a_certificate_of_nobodys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    async with FakeNats() as plain:
        told = await answer(machine(tmp_path, f"tls://127.0.0.1:{plain.port}"))
        assert told.startswith(f"fail: 127.0.0.1:{plain.port}: the server speaks no TLS, and is not shown")
        assert plain.requests == []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate(tmp_path))
    async with FakeNats(tls=tls) as server:
        told = await answer(machine(tmp_path, server.url))
        assert told.startswith(f"fail: 127.0.0.1:{server.port}: its certificate is not trusted; check it")
        assert server.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        assert WELL in await answer(machine(tmp_path, server.url))


async def test_a_server_that_is_full(tmp_path: Path) -> None:
    async with FakeNats() as server:
        server.refuse_handshake = (503, {})
        told = await answer(machine(tmp_path, server.url))
    assert told.endswith("the server has as many connections as it takes; raise its max_connections")


async def test_a_server_that_does_not_answer_the_subscription(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with FakeNats() as server:
            server.mute_joins = True
            told = await answer(machine(tmp_path, server.url))
        assert told.endswith("the server took NATS_JWT, and did not answer the subscription")

    await asyncio.to_thread(lambda: simulate(scenario()))


async def test_a_token_that_is_none(tmp_path: Path, server: EmbeddedNats) -> None:
    assert await answer(machine(tmp_path, server.url, "not.a-token")) == "fail: NATS_JWT: not a JWT"
