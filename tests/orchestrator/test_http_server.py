"""HTTP as `serve` speaks it, by llhttp: what it must not keep, and what it refuses, over real sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from orchestrator_stub.process import MOST_HEAD, BoundedHttp, Server

ASKED: list[str] = []

ONE_READ = 262_144
"""Bytes that asyncio reads at once: what follows a piece of a body in one of these is not counted."""


async def length(request: Request) -> Response:
    ASKED.append(request.url.path)
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
async def port() -> AsyncIterator[int]:
    app = Starlette(routes=[Route("/{path:path}", length, methods=["GET", "POST"])])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(
            uvicorn.Config(
                app, http=BoundedHttp, log_config=None, access_log=False, timeout_graceful_shutdown=1
            )
        )
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        yield listener.getsockname()[1]
        server.should_exit = True
        await serving


async def told(port: int, *pieces: bytes, finish: bytes = b"") -> bytes:
    """What comes back until the server ends the connection; `finish` is sent once all pieces are."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    async with asyncio.timeout(20):
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            writer.write(finish)
            got = await reader.read()
        except ConnectionError:
            pass  # it was closed while more was sent
    writer.close()
    return got


CLOSE = b"Host: a\r\nConnection: close\r\n"
CHUNKED = b"POST /kept HTTP/1.1\r\n" + CLOSE + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n"


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"GET /never?", b"x"),
        (b"GET /never HTTP/1.1\r\nX: ", b"x"),
        (b"GET /never HTTP/1.1\r\n", b"X: y\r\n"),
        (CHUNKED + b"0\r\nX: ", b"x"),
    ],
    ids=["target", "header", "headers", "trailer"],
)
async def test_a_head_that_never_ends_is_not_kept(port: int, begin: bytes, more: bytes) -> None:
    ASKED.clear()
    piece = more * (16_384 // len(more))
    answer = await told(port, begin, *[piece] * ((ONE_READ + 2 * MOST_HEAD) // 16_384))
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400"), answer[:100]
    assert "/never" not in ASKED


async def test_what_is_long_and_ends_is_read(port: int) -> None:
    head = b"GET / HTTP/1.1\r\n" + CLOSE + b"X: " + b"x" * 32_000
    assert (await told(port, head, finish=b"\r\n\r\n")).endswith(b"\r\n\r\n0")
    body = [b"x" * 65_536] * 32
    post = b"POST / HTTP/1.1\r\n" + CLOSE + b"Content-Length: %d\r\n\r\n" % (65_536 * 32)
    assert (await told(port, post, *body)).endswith(str(65_536 * 32).encode())
    chunks = [b"10000\r\n" + b"x" * 65_536 + b"\r\n"] * 4
    sent = await told(port, CHUNKED, *chunks, finish=b"0\r\n\r\n")
    assert sent.endswith(str(65_536 * 4 + 1).encode())
    # A kept connection begins each time anew.
    asked = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 30_000 + b"\r\n\r\n"
    answers = await told(port, *[asked] * 4, finish=b"GET / HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert answers.count(b"HTTP/1.1 200") == 5


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
        b"Content-Length: 3\r\nContent-Length: 4\r\n",
        b"Content-Length: +3\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"X : y\r\n",
        b"X: a\x00b\r\n",
    ],
)
async def test_what_two_servers_would_read_differently_is_refused(port: int, head: bytes) -> None:
    ASKED.clear()
    request = b"POST /meant HTTP/1.1\r\n" + CLOSE + head + b"\r\n"
    answer = await told(port, request + b"0\r\n\r\nGET /smuggled HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 400"), answer[:100]
    assert "/smuggled" not in ASKED


@pytest.mark.parametrize("target", [b"/\xff", b"http://[", b"/a b"])
async def test_a_target_that_is_none_is_answered(port: int, target: bytes) -> None:
    answer = await told(port, b"GET " + target + b" HTTP/1.1\r\n" + CLOSE + b"\r\n")
    assert answer.startswith(b"HTTP/1.1 400"), answer[:100]
