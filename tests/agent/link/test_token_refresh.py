"""The link and its token: renewed in time, pushed, refused, rotated, and never shown."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from agent.core.errors import CredentialRejected, Unavailable
from agent.link.types import LinkState
from agent.tokens import Token, Tokens
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
from tests.fakes.realtime import FakeRealtime, claims_of, jwt

pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")
"""The hook that replaces it would apply to every test below its conftest, and rename them."""


@pytest.fixture(scope="module")
def event_loop_policy() -> asyncio.AbstractEventLoopPolicy:
    return SimulatedPolicy()


@realtime_only("ends the connection together with its token")
async def test_expiry_rejoins_on_the_same_socket_with_a_new_token(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await asyncio.sleep(QUICK.rejoin_least)
        await server.shut_channels("Token has expired 0 seconds ago")
        await comes_back(link, server)
        first, second = server.joins
        assert first.socket is second.socket
        assert first.token != second.token
        assert link.stream.report()["sockets"] == 1


@either
async def test_a_token_is_refreshed_before_it_ends_and_given_to_the_server(server: Server) -> None:
    """Pushed on Realtime's channel; of another connection to NATS, after which there is one again."""
    issuer = Issuer(lifetime=1.0)
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        await until(lambda: claims_of(server.token_in_force)["sub"] == "token-2", "the next token there")
        await until(lambda: len(server.sockets) == 1, "one socket")
        assert link.stream.report()["joins"] == 1
        assert link.stream.report()["losses"] == {}
        assert link.stream.state is LinkState.LIVE


@either
async def test_an_expired_first_token_is_renewed_before_the_handshake(server: Server, issuer: Issuer) -> None:
    issuer.tokens = Tokens(jwt(wall() - 5, wall() - 600))
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        assert issuer.asked == 1
        assert len(server.joins) == 1


@either
async def test_refused_for_good_shows_and_recovers(server: Server, issuer: Issuer) -> None:
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


@either
async def test_an_unreachable_issuer_is_asked_until_it_answers(server: Server, issuer: Issuer) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        issuer.refuse = Unavailable("session API (token)", "HTTP 503")
        await asyncio.sleep(QUICK.rejoin_least)
        server.wall = lambda: wall() + issuer.lifetime
        await server.shut_channels("Token has expired 0 seconds ago")
        await until(lambda: issuer.asked >= 3, "three tries")
        assert link.stream.state in (LinkState.JOINING, LinkState.REFUSED)
        issuer.refuse, server.wall = None, wall
        await comes_back(link, server)


@either
async def test_an_expired_token_that_the_issuer_will_not_renew_is_a_refusal(
    server: Server, issuer: Issuer
) -> None:
    async with running(stream_to(server, issuer)) as link:
        await link.live()
        issuer.refuse = CredentialRejected("the session API refused the token: HTTP 401")
        await asyncio.sleep(QUICK.rejoin_least)
        server.wall = lambda: wall() + issuer.lifetime
        await server.shut_channels("Token has expired 0 seconds ago")
        await until(lambda: link.stream.state is LinkState.REFUSED, "the refusal")
        # NATS ends the connection before anybody is asked, and refuses the next one.
        losses = (
            {"token_refused": 1} if isinstance(server, FakeRealtime) else {"token_expired": 1, "refused": 1}
        )
        assert link.stream.report()["losses"] == losses
        issuer.refuse, server.wall = None, wall
        await comes_back(link, server)
        assert link.stream.problems() == ()


@realtime_only("has its token from the session API: a file holds the session's")
async def test_a_rotated_token_file_is_pushed(server: Server, tmp_path: Path) -> None:
    """Platforms that rotate a file need no session API."""
    file = tmp_path / "token"
    file.write_text(jwt(wall() + 600, wall(), name="one"))
    stream = stream_to(server, Tokens(None, file))
    async with running(stream) as link:
        await link.live()
        second = jwt(wall() + 1200, wall(), name="two")
        (tmp_path / "next").write_text(second)
        (tmp_path / "next").rename(file)
        await until(lambda: server.pushed_tokens == [second], "the new token on the channel")
        assert len(server.joins) == 1
        assert link.stream.state is LinkState.LIVE


@realtime_only("has its token from the session API: a file holds the session's")
async def test_a_rotated_token_file_ends_a_refusal_at_once(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(jwt(wall() + 600, wall(), name="bad"))
    good = jwt(wall() + 600, wall(), name="good")
    server.join_error_for = lambda token: None if token == good else "Unauthorized: no"
    slow = replace(QUICK, refused_retry=60.0)
    async with running(stream_to(server, Tokens(None, file), slow)) as link:
        await until(lambda: link.stream.state is LinkState.REFUSED, "the refusal")
        file.write_text(good)
        await link.live()


@realtime_only("does not say how long to wait")
async def test_a_new_token_does_not_cut_short_what_was_asked_for(server: Server, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(jwt(wall() + 600, wall(), name="one"))
    server.refuse_handshake = (429, {"Retry-After": "5"})
    stream = stream_to(server, Tokens(None, file))
    async with running(stream) as link:
        await until(lambda: link.stream.state is LinkState.BACKOFF, "the refusal")
        server.refuse_handshake = None
        began = wall()
        file.write_text(jwt(wall() + 1200, wall(), name="two"))
        await link.live()
        assert 5 <= wall() - began < 6
        assert len(server.requests) == 2


@either
async def test_no_secret_in_report_repr_or_logs(
    server: Server, issuer: Issuer, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
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


@either
async def test_a_refused_refresh_shows_while_the_link_is_live_and_goes(server: Server) -> None:
    issuer = Issuer(lifetime=1.0)
    issuer.refuse = CredentialRejected("the session API refused the token: HTTP 401")
    async with running(stream_to(server, issuer)) as link:
        await until(lambda: bool(link.stream.problems()), "the problem")
        assert link.stream.state is LinkState.LIVE
        issuer.refuse = None
        await until(lambda: not link.stream.problems(), "the problem to go")
        assert link.stream.report()["joins"] == 1


@either
async def test_an_issuer_that_never_answers_does_not_hold_the_link_up(server: Server) -> None:
    issuer = Issuer()
    expired = jwt(wall() - 5, wall() - 600)
    issuer.tokens = Tokens(expired, nats_jwt=expired)
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


@either
async def test_a_token_file_that_cannot_be_taken_is_shown_until_it_can(
    server: Server, tmp_path: Path
) -> None:
    place = tmp_path / "token"
    place.write_text(jwt(wall() + 600))
    stream = stream_to(server, Tokens(file=place, wall=wall, nats_jwt=jwt(wall() + 600)))
    async with running(stream) as link:
        await link.live()
        assert link.stream.problems() == ()
        place.write_text("half a tok")
        await until(lambda: bool(link.stream.problems()), "the problem")
        (problem,) = link.stream.problems()
        assert (problem.kind, str(place) in problem.detail) == ("token_refused", True)
        place.write_text(jwt(wall() + 1200))
        await until(lambda: not link.stream.problems(), "its end")
