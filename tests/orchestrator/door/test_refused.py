"""What never reaches a project: requests that mean two things, hosts of others, and whoever holds connections."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import Any

import pytest

from orchestrator_stub.door import connection, registry, service, upstream
from tests.orchestrator.door.world import Preview, World, count, status, within

SMUGGLED = {
    "length and coding": b"POST / HTTP/1.1\r\n{}Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nX",
    "coding and length": b"POST / HTTP/1.1\r\n{}Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\nX",
    "two lengths": b"POST / HTTP/1.1\r\n{}Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "two equal lengths": b"POST / HTTP/1.1\r\n{}Content-Length: 1\r\nContent-Length: 1\r\n\r\na",
    "lengths in a list": b"POST / HTTP/1.1\r\n{}Content-Length: 1, 1\r\n\r\na",
    "a length with a sign": b"POST / HTTP/1.1\r\n{}Content-Length: +1\r\n\r\na",
    "a length too long": b"POST / HTTP/1.1\r\n{}Content-Length: 99999999999999999999\r\n\r\na",
    "a coding behind chunked": b"POST / HTTP/1.1\r\n{}Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "a coding that looks like it": b"POST / HTTP/1.1\r\n{}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": b"POST / HTTP/1.1\r\n{}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "a coding of nothing and chunked": b"POST / HTTP/1.1\r\n{}Transfer-Encoding: ,chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": b"POST / HTTP/1.1\r\n{}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a blank before the colon": b"POST / HTTP/1.1\r\n{}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a bare LF in the head": b"GET / HTTP/1.1\n{}\r\n",
    "a bare LF behind a field": b"GET / HTTP/1.1\r\n{}X: 1\nY: 2\r\n\r\n",
    "a bare CR": b"GET / HTTP/1.1\r\n{}X: 1\rY: 2\r\n\r\n",
    "a folded line": b"GET / HTTP/1.1\r\n{}X: 1\r\n  2\r\n\r\n",
    "a NUL": b"GET / HTTP/1.1\r\n{}X: a\x00b\r\n\r\n",
    "a chunk of a bare LF": b"POST / HTTP/1.1\r\n{}Transfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown method": b"SPAM / HTTP/1.1\r\n{}\r\n",
    "another host in the address": b"GET http://evil.example/ HTTP/1.1\r\n{}\r\n",
    "a tunnel": b"CONNECT evil.example:443 HTTP/1.1\r\n{}\r\n",
    "an asterisk": b"OPTIONS * HTTP/1.1\r\n{}\r\n",
    "a handshake with a body":
        b"GET /ws HTTP/1.1\r\n{}Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 1\r\n\r\na",
    # A parser stops at its head, and the body would be lost.
    "another upgrade with a body":
        b"POST / HTTP/1.1\r\n{}Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 3\r\n\r\nabc",
    "another upgrade with chunks":
        b"POST / HTTP/1.1\r\n{}Connection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}  # fmt: skip


async def test_a_request_that_means_two_things_is_refused(world: World) -> None:
    preview = await world.preview()
    who = f"Host: {preview.host}\r\nCookie: {await preview.cookie()}\r\n".encode()
    # A request that hides behind it must not be seen either.
    hidden = await preview.request("/hidden", "GET", "Connection: close")
    for name, sent in SMUGGLED.items():
        world.dev.asked.clear()
        answer = await world.say(sent.replace(b"{}", who) + hidden)
        assert (name, status(answer)) in [(name, code) for code in (400, 405, 414, 431)]
        assert (name, answer.count(b"HTTP/1.1")) == (name, 1)
        # What is wrong with a body's chunk may be seen when its head has passed, and ends its connection.
        assert (name, world.dev.paths) in ((name, []), (name, ["/"]))


ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: identity\r\nConnection: close\r\n\r\na",
    b"HTTP/1.1 200 OK\nContent-Length: 0\n\n",
    b"HTTP/1.1 200 OK\r\nX: 1\r\n folded\r\nContent-Length: 0\r\n\r\n",
    b"hello\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\nContent-Length: 0\r\n\r\n",
)


async def test_an_answer_that_means_two_things_is_not_passed_on(world: World) -> None:
    preview = await world.preview()
    for answer in ANSWERS:
        world.dev.answers["/"] = answer
        assert (answer[:80], status(await world.ask(preview))) == (answer[:80], 502)
    # And what follows an answer is no answer to the next request.
    world.dev.answers["/"] = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    )
    both = await world.say(
        await preview.request("/"), await preview.request("/next", "GET", "Connection: close")
    )
    assert both.count(b"200 OK") == 2
    assert b"evil" not in both


async def test_only_a_host_of_ours_and_only_one(world: World) -> None:
    preview = await world.preview()
    label, cookie = preview.label, await preview.cookie()
    for host, code in {
        f"{label}.preview.test": 200, f"{label}.preview.test:443": 200, f"{label.upper()}.Preview.TEST": 200,
        f"{label}.preview.test:444": 404, f"{label}.preview.test.": 400, f"{label}.preview.test.evil": 404,
        f"x.{label}.preview.test": 404, "preview.test": 404, "127.0.0.1": 404, f"p{'0' * 24}.preview.test": 404,
        f"{label}.preview.test@evil": 400, f"{label}.preview.test/x": 400, "": 400, f"{label}%00.preview.test": 400,
    }.items():  # fmt: skip
        sent = f"GET / HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n"
        assert (host, status(await world.say(sent.encode()))) == (host, code)
    for hosts in ("", f"Host: {preview.host}\r\nHost: evil\r\n", f"Host: evil\r\nHost: {preview.host}\r\n"):
        assert status(await world.say(f"GET / HTTP/1.1\r\n{hosts}Cookie: {cookie}\r\n\r\n".encode())) == 400


async def test_heads_have_a_size(world: World) -> None:
    preview = await world.preview()
    for more in (
        [f"X: {'x' * 40_000}"], [f"X-{n}: 1" for n in range(300)], [f"Cookie: {'a=b; ' * 8_000}"],
        [f"{'X' * 40_000}: 1"],
    ):  # fmt: skip
        assert status(await world.ask(preview, "/", "GET", *more)) == 431
    assert status(await world.say(await preview.request("/" + "x" * 40_000))) in (414, 431)
    assert world.dev.asked == []
    # A head that never ends is not kept either.
    reader, writer = await world.connect()
    writer.write(b"GET / HTTP/1.1\r\nX: ")
    for _ in range(5):
        writer.write(b"x" * 20_000)
    assert status(await reader.read()) == 431
    writer.close()
    # A full jar still has our cookie in it.
    own = "; ".join(f"c{n}=v" for n in range(300))
    assert status(await world.ask(preview, "/", "GET", f"Cookie: {own}")) == 200


async def test_who_sends_a_head_slowly_is_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 0.3)
    preview = await world.preview()
    reader, writer = await world.connect()

    async def drip() -> None:
        for byte in (await preview.request("/")) * 1000:
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    assert status(await reader.read()) == 408
    dripping.cancel()
    writer.close()
    # Nor one that began behind a request that was whole.
    assert (await world.say(await preview.request("/") + b"GET / HTTP/1.1\r\n")).count(b"HTTP/1.1 408") == 1
    # Who has asked already may think for as long as a proxy in front keeps connections.
    reader, writer = await world.connect()
    writer.write(await preview.request("/"))
    await reader.readuntil(b"ok")
    await asyncio.sleep(0.5)
    writer.write(await preview.request("/"))
    await reader.readuntil(b"ok")
    writer.close()


async def test_a_body_that_stops_ends_its_connection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BODY_SECONDS", 0.2)
    preview = await world.preview()
    answer = await world.say(await preview.request("/", "POST", "Content-Length: 10"), b"half")
    assert b" 200 " not in answer
    assert world.dev.asked == []


async def test_connections_have_a_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    preview = await world.preview()
    monkeypatch.setattr(service, "MOST_CONNECTIONS", 3)
    kept = [await world.connect() for _ in range(3)]
    for reader, writer in kept:
        writer.write(await preview.request("/"))
        await reader.readuntil(b"ok")
    assert await world.say(await preview.request("/")) == b""
    kept[0][1].close()
    await within("there is room again", lambda: _passes(world, preview))
    for _, writer in kept:
        writer.close()


async def _passes(world: World, preview: Preview) -> bool:
    return b"200 OK" in await world.ask(preview)


async def test_exchanges_of_one_preview_have_a_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "MOST_HELD", 2)
    preview, other = await world.preview(), await world.preview()
    kept = [await upgraded(world, preview) for _ in range(2)]
    assert status(await world.ask(preview)) == 429
    assert status(await world.ask(other)) == 200
    for _, writer in kept:
        writer.close()
    await within("there is room again", lambda: _passes(world, preview))


UPGRADE = ("Connection: Upgrade", "Upgrade: websocket")


async def upgraded(
    world: World, preview: Preview, **given: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An open socket."""
    reader, writer = await world.connect()
    writer.write(await preview.request("/ws", "GET", *UPGRADE, f"Origin: https://{preview.host}", **given))
    assert status(await reader.readuntil(b"\r\n\r\n")) == 101
    return reader, writer


async def test_a_socket_is_spliced_after_its_101(world: World) -> None:
    preview = await world.preview()
    reader, writer = await upgraded(world, preview)
    # Also what looks like a request is nothing but bytes now.
    for sent in (b"\x81\x02hi", await preview.request("/other"), b"x" * 500_000):
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent
    assert world.dev.paths == ["/ws"]
    writer.close()
    await within("the other side ends with it", lambda: world.dev.gone == 1)


async def test_what_comes_before_the_101_is_passed_on_behind_it(world: World) -> None:
    preview = await world.preview()
    reader, writer = await world.connect()
    asked = await preview.request("/ws", "GET", *UPGRADE, f"Origin: https://{preview.host}")
    writer.write(asked + b"early")
    await reader.readuntil(b"\r\n\r\n")
    assert await reader.readexactly(5) == b"early"
    writer.close()


async def test_only_pages_of_the_preview_open_its_sockets(world: World) -> None:
    preview, other = await world.preview(), await world.preview()
    for origin in (
        None, "https://evil.example", "null", f"http://{preview.host}", f"https://{preview.host}:444",
        f"https://{other.host}", f"https://{preview.host}.evil",
    ):  # fmt: skip
        more = [] if origin is None else [f"Origin: {origin}"]
        for path in ("/ws", "/.preview-door/events"):
            answer = await world.say(await preview.request(path, "GET", *UPGRADE, *more))
            assert (origin, status(answer)) == (origin, 403)
    assert world.dev.asked == []


async def test_a_socket_that_is_refused_leaves_nothing_behind_it(world: World) -> None:
    """A request in what would have been the socket's bytes is not served, whatever the dev server says."""
    preview = await world.preview()
    asked = await preview.request("/no", "GET", *UPGRADE, f"Origin: https://{preview.host}")
    answer = await world.say(asked + await preview.request("/hidden"))
    assert (status(answer), answer.count(b"HTTP/1.1")) == (200, 1)
    assert world.dev.paths == ["/no"]
    # Nor is any other protocol begun: the request is one like any other, and the last of its connection.
    for protocol in ("h2c", "websocket, h2c", "TLS/1.0"):
        asked = await preview.request("/h2", "GET", "Connection: Upgrade", f"Upgrade: {protocol}")
        assert (await world.say(asked + await preview.request("/hidden"))).count(b"HTTP/1.1") == 1
    assert all(b"pgrade" not in head for head, _ in world.dev.asked[1:])
    assert "/hidden" not in world.dev.paths


async def test_a_page_of_another_site_asks_in_vain(world: World) -> None:
    """Pages of two projects stand in one product, and a browser sends the cookies of both."""
    preview = await world.preview()
    for more, code in {
        ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: no-cors"): 401,
        ("Sec-Fetch-Site: same-site", "Sec-Fetch-Mode: cors", "Origin: https://p0.preview.test"): 401,
        ("Origin: null",): 401,
        ("Sec-Fetch-Site: same-origin", "Sec-Fetch-Mode: cors", f"Origin: https://{preview.host}"): 200,
        ("Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"): 200,
        ("Sec-Fetch-Site: none", "Sec-Fetch-Mode: navigate"): 200,
    }.items():
        assert (more, status(await world.ask(preview, "/", "GET", *more))) == (more, code)
    assert count(world, "refused") == 3


@pytest.mark.parametrize("asked", ["an answer", "refusals", "a socket"])
async def test_who_takes_nothing_leaves_no_socket_behind(
    world: World, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """What a closed connection has not sent yet keeps it open: it is given up after a while."""
    monkeypatch.setattr(upstream, "DRAIN_SECONDS", 0.2)
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.2)
    preview = await world.preview()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", world.port))
    try:
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await within("it is accepted", lambda: world.door._connections)
        [served] = [each._writer.get_extra_info("socket") for each in world.door._connections]
        if asked == "an answer":
            world.dev.answers["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n" + bytes(
                20_000_000
            )
            await loop.sock_sendall(client, await preview.request("/"))
        elif asked == "refusals":
            many = b"GET / HTTP/1.1\r\nHost: nobody\r\n\r\n" * 2000
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(3):
                    for _ in range(1000):
                        await loop.sock_sendall(client, many)
        else:
            more = (*UPGRADE, f"Origin: https://{preview.host}")
            await loop.sock_sendall(client, await preview.request("/ws", "GET", *more))
            with suppress(TimeoutError, ConnectionError):
                async with asyncio.timeout(2):
                    for _ in range(1000):
                        await loop.sock_sendall(client, bytes(65536))
        await within("the door is done with it", lambda: not world.door._connections)
        await within("its socket is closed", lambda: served.fileno() == -1, 3)
    finally:
        client.close()
