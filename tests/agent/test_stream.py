"""The link against a real websocket server: it joins, hears, renews, and comes back from everything."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.errors import CredentialRejected, Unavailable
from agent.linksettings import LinkSettings, endpoint
from agent.linkstate import LinkState
from agent.phoenix import Timing
from agent.signals import Received, Resync, Signal
from agent.simulated import SimulatedLoop
from agent.stream import RealtimeStream
from agent.tokens import Token, Tokens
from tests.fakes.realtime import TOPIC, FakeRealtime, jwt

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
    look_every=0.02,
    close_within=0.5,
)
"""The same machine with deadlines that a test can wait for."""


pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")
"""The hook that replaces it would apply to every test below its conftest, and rename them."""


class SimulatedPolicy(asyncio.DefaultEventLoopPolicy):
    """Every loop of this module has a clock that jumps: no deadline here depends on how busy the machine is."""

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return SimulatedLoop()


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return SimulatedPolicy()


def wall() -> float:
    """Unix seconds of the simulation."""
    return 1_800_000_000.0 + asyncio.get_running_loop().time()


class Issuer:
    """A `TokenSource` whose tokens are made here; `refuse` makes it say no."""

    def __init__(self, life: float = 600.0) -> None:
        self.life = life
        self.made = 0
        self.asked = 0
        self.refuse: Exception | None = None
        self.tokens = Tokens(self.make())

    def make(self) -> str:
        self.made += 1
        now = wall()
        return jwt(now + self.life, now, name=f"token-{self.made}")

    def current(self) -> Token | None:
        return self.tokens.current()

    async def renew_token(self) -> Token:
        self.asked += 1
        await asyncio.sleep(0)
        if self.refuse is not None:
            raise self.refuse
        return self.tokens.accept(self.make())


class Link:
    """A running stream and what came out of it; every Resync is answered as sync would."""

    def __init__(self, stream: RealtimeStream, answer: bool = True) -> None:
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


async def until(condition: Callable[[], bool], what: str, within: float = 10.0) -> None:
    """Wait for a condition, or fail saying for what."""
    deadline = asyncio.get_running_loop().time() + within
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"waited {within} s for {what}"
        await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def running(stream: RealtimeStream, *, answer: bool = True) -> AsyncIterator[Link]:
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


@pytest.fixture
async def server() -> AsyncIterator[FakeRealtime]:
    async with FakeRealtime(wall=wall) as server:
        yield server


@pytest.fixture
async def issuer() -> Issuer:
    return Issuer()


def stream_to(server: FakeRealtime, issuer: Issuer, settings: LinkSettings = QUICK) -> RealtimeStream:
    return RealtimeStream(server.url, "publishable", TOPIC, issuer, settings=settings, wall=wall)


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


async def test_a_catch_up_does_not_answer_a_resync_nobody_has_seen(
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


async def comes_back(link: Link, server: FakeRealtime, joins: int = 2) -> None:
    """The proof of every fault: joined again, told to catch up again, live, and hearing."""
    await until(lambda: len(server.joins) >= joins and bool(server.channels), "another join")
    await link.live()
    before = len(link.events)
    await until(lambda: bool(server.channels), "a channel")
    await server.broadcast("file:update", {"after": True})
    await until(lambda: len(link.events) > before, "an event after the fault")
    assert link.resyncs.count("joined") >= 2


@pytest.mark.parametrize("code", [1000, 1001, 1011, 1012])
async def test_comes_back_from_a_close(server: FakeRealtime, issuer: Issuer, code: int) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await server.close_sockets(code)
        await comes_back(link, server)
        assert link.stream.report()["losses"] == {f"closed_{code}": 1}


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


async def test_a_new_token_does_not_cut_short_what_was_asked_for(
    server: FakeRealtime, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text(jwt(wall() + 600, wall(), name="one"))
    server.refuse_handshake = (429, {"Retry-After": "5"})
    stream = RealtimeStream(server.url, None, TOPIC, Tokens(None, file), settings=QUICK, wall=wall)
    async with running(stream) as link:
        await until(lambda: link.stream.state is LinkState.BACKOFF, "the refusal")
        server.refuse_handshake = None
        began = wall()
        file.write_text(jwt(wall() + 1200, wall(), name="two"))
        await link.live()
        assert 5 <= wall() - began < 6
        assert len(server.requests) == 2


async def test_expiry_rejoins_on_the_same_socket_with_a_new_token(
    server: FakeRealtime, issuer: Issuer
) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await asyncio.sleep(QUICK.rejoin_least)
        await server.shut_channels("Token has expired 0 seconds ago")
        await comes_back(link, server)
        first, second = server.joins
        assert first.socket is second.socket
        assert first.token != second.token
        assert link.stream.report()["sockets"] == 1


async def test_a_token_is_refreshed_before_it_ends_and_pushed(server: FakeRealtime) -> None:
    issuer = Issuer(life=1.0)
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: bool(server.pushed_tokens), "the next token on the channel")
        assert server.pushed_tokens[0] == issuer.current().value
        assert len(server.joins) == 1
        assert link.stream.state is LinkState.LIVE


async def test_an_expired_first_token_is_renewed_before_the_handshake(
    server: FakeRealtime, issuer: Issuer
) -> None:
    issuer.tokens = Tokens(jwt(wall() - 5, wall() - 600))
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        assert issuer.asked == 1
        assert len(server.joins) == 1


async def test_refused_for_good_shows_and_recovers(server: FakeRealtime, issuer: Issuer) -> None:
    server.join_error = (
        "Unauthorized: You do not have permissions to read from this Channel topic: project:p1"
    )
    issuer.refuse = CredentialRejected("the session API refused the token: HTTP 401")
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: link.stream.state is LinkState.REFUSED, "refusal")
        await until(lambda: bool(link.stream.problems()), "the problem to show")
        assert link.stream.problems()[0].kind == "token_refused"
        tries = len(server.joins)
        await until(lambda: len(server.joins) > tries, "a slow retry")
        server.join_error, issuer.refuse = None, None
        await link.live()
        assert link.stream.problems() == ()


async def test_an_unreachable_issuer_is_asked_until_it_answers(server: FakeRealtime, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        issuer.refuse = Unavailable("session API (token)", "HTTP 503")
        await asyncio.sleep(QUICK.rejoin_least)
        await server.shut_channels("Token has expired 0 seconds ago")
        await until(lambda: issuer.asked >= 3, "three tries")
        assert link.stream.state is LinkState.JOINING
        issuer.refuse = None
        await comes_back(link, server)


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
    stream = RealtimeStream(server.url, None, TOPIC, issuer, settings=QUICK, wall=lambda: wall() + slept)
    async with running(stream) as link:
        await link.live()
        slept = 60.0
        await comes_back(link, server)
        assert link.stream.report()["clock_jumps"] == 1
        assert "clock_jump" in link.resyncs


async def test_doubt_replaces_a_channel_that_went_deaf(server: FakeRealtime, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        server.deafen()
        link.stream.doubt("head is 7, the link brought 5")
        await comes_back(link, server)


async def test_doubts_in_a_row_are_one(server: FakeRealtime, issuer: Issuer) -> None:
    """The owner of the socket is interrupted again while it is already being interrupted."""
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        for _ in range(5):
            link.stream.doubt("again")
            await asyncio.sleep(0)
        await comes_back(link, server)
        assert link.stream.report()["losses"] == {"doubted": 1}


async def test_a_rotated_token_file_is_pushed(server: FakeRealtime, tmp_path: Path) -> None:
    """Platforms that rotate a file need no session API."""
    file = tmp_path / "token"
    file.write_text(jwt(wall() + 600, wall(), name="one"))
    stream = RealtimeStream(server.url, None, TOPIC, Tokens(None, file), settings=QUICK, wall=wall)
    async with running(stream) as link:
        await link.live()
        second = jwt(wall() + 1200, wall(), name="two")
        (tmp_path / "next").write_text(second)
        (tmp_path / "next").rename(file)
        await until(lambda: server.pushed_tokens == [second], "the new token on the channel")
        assert len(server.joins) == 1
        assert link.stream.state is LinkState.LIVE


async def test_a_rotated_token_file_ends_a_refusal_at_once(server: FakeRealtime, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(jwt(wall() + 600, wall(), name="bad"))
    good = jwt(wall() + 600, wall(), name="good")
    server.join_error_for = lambda token: None if token == good else "Unauthorized: no"
    slow = replace(QUICK, refused_retry=60.0)
    async with running(
        RealtimeStream(server.url, None, TOPIC, Tokens(None, file), settings=slow, wall=wall)
    ) as link:
        await until(lambda: link.stream.state is LinkState.REFUSED, "the refusal")
        file.write_text(good)
        await link.live()


async def test_a_bug_in_reading_ends_the_link_loudly(
    server: FakeRealtime, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a deaf link nor an endless reconnect: the first root task to end stops the agent."""
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


async def test_no_secret_in_report_repr_or_logs(
    server: FakeRealtime, issuer: Issuer, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    asyncio.get_running_loop().set_debug(True)
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        server.abort_sockets()
        server.refuse_handshake = (401, {})
        await until(lambda: link.stream.state is LinkState.REFUSED, "refusal")
        token = issuer.current()
        assert token is not None
        said = f"{link.stream.report()} {link.stream!r} {token!r} {link.stream.problems()}"
    # The library logs for our fake server as well, which is no part of the agent.
    said += "".join(r.getMessage() for r in caplog.records if r.name != "websockets.server")
    said += capsys.readouterr().out
    assert "link.state" in said
    assert token.value not in said
    assert token.value.split(".")[1] not in said
    assert "publishable" not in said


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
    """The token goes to the host of the settings or to nobody."""
    async with FakeRealtime(wall=wall) as elsewhere, FakeRealtime(wall=wall) as server:
        server.refuse_handshake = (302, {"Location": f"{elsewhere.url}/websocket?vsn=2.0.0"})
        async with running(stream_to(server, issuer)) as link:
            await until(lambda: len(server.requests) >= 3, "three attempts")
            assert elsewhere.requests == []
            server.refuse_handshake = None
            await link.live()
            assert link.stream.report()["losses"].keys() == {"handshake"}  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, key and all in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


async def test_over_tls_it_is_the_same(
    issuer: Issuer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records cut the stream where they like; a large frame comes in many pieces."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with FakeRealtime(wall=wall, tls=tls) as server, running(stream_to(server, issuer)) as link:
        await link.live()
        for number in range(50):
            await server.broadcast("file:update", {"n": number, "content": "x" * (number * number * 200)})
        await until(lambda: len(link.events) == 50, "fifty events")
        assert [payload["n"] for _, payload in link.events] == list(range(50))  # type: ignore[index]
        server.abort_sockets()
        await comes_back(link, server)


async def test_a_certificate_nobody_trusts_gets_no_token(
    issuer: Issuer, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)
    async with FakeRealtime(wall=wall, tls=tls) as server, running(stream_to(server, issuer)) as link:
        await until(lambda: link.stream.report()["losses"].get("unreachable", 0) >= 2, "two attempts")  # type: ignore[attr-defined]
        assert server.requests == []
        assert "SSLCertVerificationError" in str(link.stream.report()["why"])


async def test_a_refused_refresh_shows_while_the_link_is_live_and_goes(server: FakeRealtime) -> None:
    issuer = Issuer(life=1.0)
    issuer.refuse = CredentialRejected("the session API refused the token: HTTP 401")
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: bool(link.stream.problems()), "the problem")
        assert link.stream.state is LinkState.LIVE
        issuer.refuse = None
        await until(lambda: not link.stream.problems(), "the problem to go")
        assert link.stream.report()["joins"] == 1


async def test_an_issuer_that_never_answers_does_not_hold_the_link_up(server: FakeRealtime) -> None:
    issuer = Issuer()
    issuer.tokens = Tokens(jwt(wall() - 5, wall() - 600))
    silent = asyncio.Event()

    async def never() -> Token:
        issuer.asked += 1
        await silent.wait()
        raise AssertionError

    issuer.renew_token = never  # type: ignore[method-assign]
    server.wall = lambda: wall() - 60.0
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        assert issuer.asked >= 1, (
            "by our clock the token is expired; the server's clock is the one that counts"
        )
