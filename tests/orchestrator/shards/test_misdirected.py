"""What an orchestrator answers that is asked for what another database has: 421 and where, before it asks who asks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orchestrator_stub.shards.misdirected import Misdirected
from orchestrator_stub.shards.placement import Shards, id_of_shard

URLS = ("http://zero", "http://one", "http://two")
METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS"]


def on(shard: int) -> UUID:
    return id_of_shard(shard, uuid4()) if shard else uuid4()


async def echo(request: Request) -> Response:
    return JSONResponse({"body": (await request.body()).decode(), "query": str(request.query_params)})


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    """Database 1 of three, of pages of one origin, and a body of at most 1,000 bytes."""
    app = Starlette(routes=[Route("/{path:path}", echo, methods=METHODS)])
    placed = Misdirected(app, Shards(URLS, 1), origins=["https://app.example"], body_limit=1000)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(placed), base_url="http://one") as client:
        yield client


@pytest.mark.parametrize("shard", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/sessions/{}"), ("DELETE", "/v1/sessions/{}"), ("PUT", "/v1/sessions/{}/status"),
        ("POST", "/v1/sessions/{}/door/revoke"), ("GET", "/v1/projects/{}/shown"),
        ("GET", "/v1/sessions?project_id={}"), ("POST", "/v1/sessions?project_id={}"),
    ],
)  # fmt: skip
async def test_an_id_of_another_database_is_sent_there(
    http: httpx.AsyncClient, shard: int, method: str, path: str
) -> None:
    answer = await http.request(method, path.format(on(shard)))
    if shard == 1:
        assert answer.status_code == 200
        return
    assert (answer.status_code, answer.headers["content-type"]) == (421, "application/problem+json")
    said = answer.json()
    assert said["type"] == "urn:preview-sync:problem:misdirected"
    assert (said["shard"], said["url"]) == (shard, URLS[shard] if shard < 3 else None)


@pytest.mark.parametrize("write", [str, lambda id: str(id).upper(), lambda id: id.hex])
async def test_however_an_id_is_written(http: httpx.AsyncClient, write: Any) -> None:
    assert (await http.get(f"/v1/sessions/{write(on(0))}")).status_code == 421
    assert (await http.get(f"/v1/sessions/{write(on(1))}")).status_code == 200


async def test_a_session_is_made_where_its_project_is_and_the_body_arrives_whole(
    http: httpx.AsyncClient,
) -> None:
    for shard, status in ((0, 421), (1, 200), (2, 421)):
        body = {"project_id": str(on(shard)), "more": "x" * 500}
        answer = await http.post("/v1/sessions", json=body)
        assert answer.status_code == status
        if status == 200:
            assert json.loads(answer.json()["body"]) == body

    async def pieces() -> AsyncIterator[bytes]:
        for piece in (b'{"project_id":', b'"' + str(on(1)).encode(), b'"}'):
            yield piece

    assert (await http.post("/v1/sessions", content=pieces())).json()["body"].endswith('"}')


@pytest.mark.parametrize(
    "body", [b"", b"no json", b"[]", b'{"project_id": 1}', b'{"project_id": "x"}', b"\xff", b"x" * 5000]
)
async def test_what_names_nothing_is_for_the_route_to_refuse(http: httpx.AsyncClient, body: bytes) -> None:
    answer = await http.post("/v1/sessions", content=body.replace(b"\xff", b"{"))
    assert answer.status_code == 200
    assert answer.json()["body"] == body.replace(b"\xff", b"{").decode()


@pytest.mark.parametrize("path", ["/v1/sessions/no-id", "/v1/sessions", "/livez", "/v1/sessions?project_id="])
async def test_what_is_no_id_passes(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code == 200


async def test_a_page_of_the_product_may_read_where_it_should_have_asked(http: httpx.AsyncClient) -> None:
    for origin, allowed in (("https://app.example", "https://app.example"), ("https://other.example", None)):
        answer = await http.get(f"/v1/sessions/{on(2)}", headers={"origin": origin})
        assert answer.status_code == 421
        assert answer.headers.get("access-control-allow-origin") == allowed
    assert (await http.options(f"/v1/sessions/{on(2)}")).status_code == 200, "asks nothing"


async def test_a_body_that_never_comes_ends_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator_stub.shards.misdirected.BODY_SECONDS", 0.01)
    reached = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{", "what came is given on"
        reached.set()

    first = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> Any:
        return first.pop() if first else await asyncio.Event().wait()

    async def send(message: Any) -> None: ...

    scope = {"type": "http", "method": "POST", "path": "/v1/sessions", "query_string": b"", "headers": []}
    async with asyncio.timeout(20):
        await Misdirected(app, Shards(URLS, 1), origins=(), body_limit=1000)(scope, receive, send)
    assert reached.is_set()
