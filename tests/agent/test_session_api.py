"""The session API's client: what it sends, how it reads answers, and how each refusal is sorted."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import re
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID

import httpx
import pytest
import respx

from agent import session_api as session_module
from agent.core.clock_skew import Moment
from agent.core.errors import (
    CredentialRejected,
    MalformedMessage,
    SessionGone,
    Superseded,
    TooLarge,
    Unavailable,
)
from agent.core.messages import Changes, Current, Head, SnapshotOffer
from agent.core.model import RelPath
from agent.replay.simulated_clock import simulate
from agent.session_api import SessionApi
from agent.tokens import Tokens
from tests.fakes.origin import Answer, origin
from tests.fakes.realtime import jwt

SESSION = UUID("22222222-2222-4222-8222-222222222222")
BASE = "http://orchestrator.test/api"
URL = f"{BASE}/v1/sessions/{SESSION}"
TOKEN = jwt(2_000_000_000, name="secret-token")


@pytest.fixture
async def api() -> AsyncIterator[SessionApi]:
    async with httpx.AsyncClient() as http:
        yield SessionApi(BASE + "/", SESSION, Tokens(TOKEN), http, clock=lambda: Moment(1_800_000_000.0, 0.0))


@respx.mock
async def test_sync_asks_and_reads_each_kind(api: SessionApi) -> None:
    route = respx.post(f"{URL}/sync").mock(
        side_effect=[
            httpx.Response(200, json={"kind": "current", "epoch": "e", "revision": 4}),
            httpx.Response(
                200, json={"kind": "changes", "epoch": "e", "revision": 5, "base_revision": 4, "changes": []}
            ),
            httpx.Response(200, json={"kind": "snapshot", "snapshot_url": "https://s/x", "manifest": None}),
        ]
    )
    assert await api.sync("e", 4, "joined") == Current("e", 4)
    assert await api.sync("e", 4, "gap", [RelPath("a/b")]) == Changes("e", 5, 4, ())
    assert await api.sync(None, 0, "epoch") == SnapshotOffer("https://s/x")
    bodies = [json.loads(call.request.content) for call in route.calls]
    assert bodies == [
        {"epoch": "e", "revision": 4, "reason": "joined"},
        {"epoch": "e", "revision": 4, "reason": "gap", "paths": ["a/b"]},
        {"epoch": None, "revision": 0, "reason": "epoch"},
    ]
    assert route.calls[0].request.headers["authorization"] == f"Bearer {TOKEN}"


@respx.mock
async def test_a_renewed_token_is_in_force_at_once(api: SessionApi) -> None:
    newer = jwt(2_000_000_600, name="newer")
    respx.post(f"{URL}/token").respond(
        200, json={"realtime_token": newer, "expires_at": "2033-05-18T03:43:20Z"}
    )
    status = respx.put(f"{URL}/status").respond(200, json={"epoch": "e", "revision": 1, "action": "sync"})
    token = await api.renew_token()
    assert token.value == newer
    assert api.current() is token
    assert await api.report_status({"state": "serving"}) == Head("e", 1, None, "sync")
    assert status.calls[0].request.headers["authorization"] == f"Bearer {newer}"


OURS = "application/problem+json"
HTML = b"<html><body>No such page</body></html>"


def problem(status: int, kind: str = "of_the_test", **more: object) -> dict[str, object]:
    """As the orchestrator writes one."""
    urn = f"urn:preview-sync:problem:{kind}"
    return {"type": urn, "title": "No", "status": status, "detail": "because of the test", **more}


def said(status: int, document: object, media: str = OURS) -> httpx.Response:
    return httpx.Response(
        status,
        content=json.dumps(document).encode(),
        headers={"content-type": media, "location": "http://elsewhere.test/"},
    )


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, CredentialRejected), (403, CredentialRejected), (404, SessionGone), (410, SessionGone),
        (409, Superseded), (408, Unavailable), (413, TooLarge), (429, Unavailable), (500, Unavailable),
        (503, Unavailable), (400, MalformedMessage), (422, TooLarge),
    ],
)  # fmt: skip
@respx.mock
async def test_each_refusal_is_sorted_and_tells_its_problem(
    api: SessionApi, status: int, error: type[Exception]
) -> None:
    respx.post(f"{URL}/sync").mock(return_value=said(status, problem(status)))
    with pytest.raises(error, match=rf"{status}, No: because of the test") as caught:
        await api.sync("e", 1, "joined")
    assert type(caught.value) is error
    assert TOKEN not in str(caught.value)


def stranger(name: str, status: int) -> tuple[bytes, str]:
    """What somebody who is not the orchestrator may say, and its media type."""
    ours = problem(status, "session_unknown")
    return {
        "a page": (HTML, "text/html; charset=utf-8"),
        "nothing": (b"", ""),
        "its own JSON": (b'{"error":"not_found","message":"no route"}', "application/json"),
        "its own problem": (json.dumps(ours | {"type": "about:blank"}).encode(), OURS),
        "ours as JSON": (json.dumps(ours).encode(), "application/json"),
        "ours of another status": (json.dumps(ours | {"status": 500}).encode(), OURS),
        "ours without a status": (json.dumps({"type": ours["type"]}).encode(), OURS),
        "ours cut short": (json.dumps(ours).encode()[:-1], OURS),
        "ours in a list": (json.dumps([ours]).encode(), OURS),
        "ours of no type": (json.dumps(ours | {"type": 7}).encode(), OURS),
    }[name]


STRANGERS = (
    "a page", "nothing", "its own JSON", "its own problem", "ours as JSON", "ours of another status",
    "ours without a status", "ours cut short", "ours in a list", "ours of no type",
)  # fmt: skip


@pytest.mark.parametrize("who", STRANGERS)
@pytest.mark.parametrize("status", [301, 302, 400, 401, 403, 404, 405, 409, 410, 422, 451])
@respx.mock
async def test_what_stands_in_front_is_not_believed(api: SessionApi, status: int, who: str) -> None:
    """A bad deploy answers for the orchestrator; no session is over because of it."""
    content, media = stranger(who, status)
    answer = httpx.Response(status, content=content, headers={"content-type": media, "retry-after": "7"})
    respx.post(f"{URL}/sync").mock(return_value=answer)
    with pytest.raises(Unavailable, match=f"HTTP {status}") as caught:
        await api.sync("e", 1, "joined")
    assert type(caught.value) is (TooLarge if status == 422 else Unavailable)
    assert caught.value.retry_after == 7


@respx.mock
async def test_a_path_that_the_orchestrator_does_not_serve_says_nothing_of_the_session(
    api: SessionApi,
) -> None:
    respx.post(f"{URL}/sync").mock(return_value=said(404, problem(404, "path_unknown")))
    with pytest.raises(Unavailable, match="404, No: because of the test"):
        await api.sync("e", 1, "joined")


@pytest.mark.parametrize("who", ["a page", "nothing"])
@pytest.mark.parametrize("status", [413, 429, 502])
@respx.mock
async def test_what_anybody_may_say_is_believed_of_anybody(api: SessionApi, status: int, who: str) -> None:
    content, media = stranger(who, status)
    answer = httpx.Response(status, content=content, headers={"content-type": media})
    respx.put(f"{URL}/status").mock(return_value=answer)
    with pytest.raises(TooLarge if status == 413 else Unavailable, match=f"HTTP {status}"):
        await api.report_status({"state": "serving"})


@respx.mock
async def test_a_page_of_any_size_is_a_refusal_like_another(api: SessionApi) -> None:
    respx.post(f"{URL}/sync").respond(404, content=b" " * 10_000_000, headers={"content-type": "text/html"})
    with pytest.raises(Unavailable, match="HTTP 404"):
        await api.sync("e", 1, "joined")


@respx.mock
async def test_the_wait_that_is_asked_for_is_passed_on(api: SessionApi) -> None:
    respx.post(f"{URL}/sync").respond(503, headers={"Retry-After": "17"}, text="<html>busy</html>")
    with pytest.raises(Unavailable) as caught:
        await api.sync("e", 1, "joined")
    assert caught.value.retry_after == 17


@pytest.mark.parametrize(
    "failure",
    [httpx.ConnectError("x"), httpx.ReadTimeout("x"), httpx.RemoteProtocolError("x"), httpx.PoolTimeout("x")],
)
@respx.mock
async def test_a_broken_network_is_unavailable(api: SessionApi, failure: Exception) -> None:
    respx.post(f"{URL}/sync").mock(side_effect=failure)
    with pytest.raises(Unavailable, match=type(failure).__name__):
        await api.sync("e", 1, "joined")


@pytest.mark.parametrize("body", [b"", HTML, b"\xff", b'{"kind":"current"'])
@respx.mock
async def test_an_answer_that_is_no_json_is_somebody_else_s(api: SessionApi, body: bytes) -> None:
    respx.post(f"{URL}/sync").respond(200, content=body, headers={"content-type": "text/html"})
    with pytest.raises(Unavailable, match="HTTP 200"):
        await api.sync("e", 1, "joined")


@pytest.mark.parametrize("body", [b"[]", b"null", b'{"kind":"other","epoch":"e","revision":1}'])
@respx.mock
async def test_an_answer_of_the_wrong_form_is_malformed(api: SessionApi, body: bytes) -> None:
    respx.post(f"{URL}/sync").respond(200, content=body)
    with pytest.raises(MalformedMessage):
        await api.sync("e", 1, "joined")


@pytest.mark.parametrize(
    "answer", [{}, {"realtime_token": None}, {"realtime_token": "not-a-jwt"}, {"realtime_token": ""}, []]
)
@respx.mock
async def test_a_bad_token_answer_leaves_the_old_token_in_force(api: SessionApi, answer: Any) -> None:
    respx.post(f"{URL}/token").respond(200, json=answer)
    with pytest.raises(MalformedMessage):
        await api.renew_token()
    current = api.current()
    assert current is not None
    assert current.value == TOKEN


@respx.mock
async def test_an_endless_answer_is_not_read_to_its_end(
    api: SessionApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_ANSWER_BYTES", 1_000)
    respx.post(f"{URL}/sync").respond(200, content=b" " * 1_001)
    with pytest.raises(TooLarge, match="larger than 1000 bytes"):
        await api.sync("e", 1, "joined")


@pytest.mark.parametrize("status", [200, 404, 410])
@pytest.mark.parametrize(
    ("coding", "encode"),
    [
        ("gzip, gzip", lambda body: gzip.compress(gzip.compress(body))),
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("GZIP", gzip.compress),
        ("identity, gzip", gzip.compress),
        ("of-tomorrow", lambda body: body),
    ],
)
async def test_nothing_is_unpacked(coding: str, encode: Callable[[bytes], bytes], status: int) -> None:
    """Unpacked, a few kilobytes are gigabytes before anybody can count them."""
    bomb = encode(b" " * 20_000_000 + b'{"kind":"current","epoch":"e","revision":4}')
    media = ("Content-Type", OURS)
    async with (
        origin(Answer(bomb, status, [("Content-Encoding", coding), media])) as server,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        api = SessionApi(server.url.partition("/storage")[0], SESSION, Tokens(TOKEN), http)
        tracemalloc.start()
        try:
            with pytest.raises(
                Unavailable, match=f"HTTP {status}" if status != 200 else re.escape(repr(coding.lower()))
            ):
                await api.sync("e", 1, "joined")
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()
    assert "accept-encoding: identity" in server.requests[0].lower()


async def test_an_answer_that_says_it_is_not_encoded_is_read() -> None:
    body = b'{"kind":"current","epoch":"e","revision":4}'
    async with (
        origin(Answer(body, headers=[("Content-Encoding", "Identity")])) as server,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        api = SessionApi(server.url.partition("/storage")[0], SESSION, Tokens(TOKEN), http)
        assert await api.sync("e", 4, "joined") == Current("e", 4)


def test_an_answer_that_trickles_is_given_up() -> None:
    """Each byte comes in time, the last never does."""

    async def trickle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(20)

    async def scenario() -> None:
        server = await asyncio.start_server(trickle, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with httpx.AsyncClient(trust_env=False) as http:
            api = SessionApi(f"http://127.0.0.1:{port}", SESSION, Tokens(TOKEN), http)
            with pytest.raises(Unavailable, match="no whole answer within 120 s"):
                await api.sync("e", 1, "joined")
        assert 119 < asyncio.get_running_loop().time() < 125
        server.close()
        await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()})

    simulate(scenario())


async def test_without_a_token_nothing_is_sent() -> None:
    async with httpx.AsyncClient() as http:
        api = SessionApi(BASE, SESSION, Tokens(), http)
        with pytest.raises(CredentialRejected):
            await api.sync("e", 1, "joined")


# --- what is wrong with it


def kinds(api: SessionApi) -> list[str]:
    return [problem.kind for problem in api.problems()]


@respx.mock
async def test_a_question_that_failed_is_a_problem_until_it_is_answered(api: SessionApi) -> None:
    """By question: a heartbeat that is answered says nothing of the catch-up that is not."""
    sync = respx.post(f"{URL}/sync").respond(503)
    respx.put(f"{URL}/status").respond(200, json={"epoch": "e", "revision": 4})
    assert kinds(api) == []
    with pytest.raises(Unavailable):
        await api.sync("e", 1, "gap")
    assert kinds(api) == ["session_api_unreachable"]
    await api.report_status({})
    assert kinds(api) == ["session_api_unreachable"]
    sync.respond(200, json={"kind": "current", "epoch": "e", "revision": 4})
    await api.sync("e", 1, "gap")
    assert kinds(api) == []


@respx.mock
@pytest.mark.parametrize("question", ["sync", "token", "status"])
async def test_every_question_that_fails_is_a_problem(api: SessionApi, question: str) -> None:
    respx.route(url__startswith=URL).respond(200, json=[])
    ask: dict[str, Callable[[], Any]] = {
        "sync": lambda: api.sync("e", 1, "gap"),
        "token": api.renew_token,
        "status": lambda: api.report_status({}),
    }
    with pytest.raises(MalformedMessage):
        await ask[question]()
    assert kinds(api) == ["session_api_unreachable"]


@respx.mock
async def test_a_refusal_is_a_problem_of_the_token_it_was_asked_with() -> None:
    document = {"type": "urn:preview-sync:problem:token_refused", "status": 401, "title": "no"}
    respx.post(f"{URL}/sync").respond(
        401, json=document, headers={"content-type": "application/problem+json"}
    )
    tokens = Tokens(TOKEN)
    async with httpx.AsyncClient() as http:
        api = SessionApi(BASE, SESSION, tokens, http)
        with pytest.raises(CredentialRejected):
            await api.sync("e", 1, "gap")
        assert kinds(api) == ["session_api_refused"]
        tokens.accept(jwt(2_000_000_001, name="another"))
        assert kinds(api) == []


@respx.mock
async def test_a_question_that_nobody_asks_any_more_is_no_problem(api: SessionApi) -> None:
    respx.post(f"{URL}/sync").respond(503)
    with pytest.raises(Unavailable):
        await api.sync("e", 1, "gap")
    api.forget_failure("sync")
    assert kinds(api) == []
