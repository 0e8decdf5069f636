"""Where the link connects to: the endpoint, redirects, TLS."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import pytest

from agent.link.realtime import endpoint
from tests.agent.link.one_link import (
    TRANSPORTS,
    Issuer,
    SimulatedPolicy,
    comes_back,
    running,
    stream_to,
    until,
    wall,
)
from tests.fakes.certificates import certificate
from tests.fakes.realtime import FakeRealtime

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")
"""The hook that replaces it would apply to every test below its conftest, and rename them."""


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return SimulatedPolicy()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("wss://x.supabase.co/realtime/v1", "wss://x.supabase.co/realtime/v1/websocket?apikey=k&vsn=2.0.0"),
        (
            "https://x.supabase.co/realtime/v1/",
            "wss://x.supabase.co/realtime/v1/websocket?apikey=k&vsn=2.0.0",
        ),
        ("ws://h:4000/socket/websocket", "ws://h:4000/socket/websocket?apikey=k&vsn=2.0.0"),
        ("http://h/socket?vsn=1.0.0&apikey=old&log=1", "ws://h/socket/websocket?log=1&apikey=k&vsn=2.0.0"),
    ],
)
def test_the_endpoint_is_the_official_clients(url: str, expected: str) -> None:
    assert endpoint(url, "k") == expected


@pytest.mark.parametrize(
    "url", ["", "x.supabase.co", "ftp://h/", "ws:///path", "/realtime/v1", "ws://h:99999/x"]
)
def test_an_endpoint_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="must be ws"):
        endpoint(url, "k")


async def test_a_redirect_is_not_followed(issuer: Issuer) -> None:
    """The token goes to no other host than that of the settings."""
    async with FakeRealtime(wall=wall) as elsewhere, FakeRealtime(wall=wall) as server:
        server.refuse_handshake = (302, {"Location": f"{elsewhere.url}/websocket?vsn=2.0.0"})
        async with running(stream_to(server, issuer)) as link:
            await until(lambda: len(server.requests) >= 3, "three attempts")
            assert elsewhere.requests == []
            server.refuse_handshake = None
            await link.live()
            assert link.stream.report()["losses"].keys() == {"handshake"}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 and its key."""
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_over_tls_it_is_the_same(
    transport: str, issuer: Issuer, both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records cut the stream where they like; a large frame comes in many pieces."""
    monkeypatch.setenv("SSL_CERT_FILE", str(both))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(both)
    async with (
        TRANSPORTS[transport](wall=wall, tls=tls) as server,
        running(stream_to(server, issuer)) as link,
    ):
        await link.live()
        for number in range(50):
            await server.broadcast("file:update", {"n": number, "content": "x" * (number * number * 200)})
        await until(lambda: len(link.events) == 50, "fifty events")
        assert [payload["n"] for _, payload in link.events] == list(range(50))  # type: ignore[index]
        server.abort_sockets()
        await comes_back(link, server)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_untrusted_certificate_gets_no_token(
    transport: str, issuer: Issuer, both: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(both)
    async with (
        TRANSPORTS[transport](wall=wall, tls=tls) as server,
        running(stream_to(server, issuer)) as link,
    ):
        await until(lambda: link.stream.report()["losses"].get("unreachable", 0) >= 2, "two attempts")  # type: ignore[attr-defined]
        assert server.requests == []
        await until(
            lambda: "SSLCertVerificationError" in str(link.stream.report()["why"]),
            "why, between two attempts",
        )
