"""What passes the door, and what of it: on real sockets, byte by byte."""

from __future__ import annotations

import pytest

from tests.orchestrator.door.world import World, body, fields, status, within


async def test_a_request_passes_and_its_answer_comes_back(world: World) -> None:
    preview = await world.preview()
    world.dev.answers["/a"] = b"HTTP/1.1 203 Fine\r\nContent-Length: 5\r\nX-Kept: Yes\r\n\r\nhello"
    answer = await world.ask(preview, "/a?b=c%20d")
    assert (status(answer), body(answer), fields(answer, "x-kept")) == (203, b"hello", ["Yes"])
    head, _ = world.dev.asked[0]
    assert head.startswith(b"GET /a?b=c%20d HTTP/1.1\r\nHost: " + preview.host.encode())
    assert b"X-Forwarded-Proto: https\r\n" in head


async def test_the_doors_cookie_is_for_the_door_alone(world: World) -> None:
    preview = await world.preview()
    name = "__Host-preview"
    world.dev.answers["/"] = (
        f"HTTP/1.1 200 OK\r\nSet-Cookie: {name}=theirs; Path=/\r\nset-cookie: {name} =x\r\n"
        "Set-Cookie: own=1\r\nContent-Length: 0\r\n\r\n"
    ).encode()
    answer = await world.ask(preview, "/", "GET", "Cookie: own=1; b=2")
    assert fields(answer, "set-cookie") == ["own=1"]
    head = world.dev.asked[0][0]
    assert name.encode() not in head
    assert head.count(b"Cookie:") == 1
    assert b"Cookie: own=1; b=2\r\n" in head


FRAMED = (
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", b"abcde"),
    (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", b"until the end"),
    (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
     b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
    (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 7\r\n\r\n", b""),
    (b"HTTP/1.1 204 No Content\r\nX-Content-Length: 0\r\n\r\n", b""),
)  # fmt: skip


def unframed(answer: bytes) -> bytes:
    """An answer's body, taken out of its chunks."""
    found, rest = b"", body(answer)
    if not fields(answer, "transfer-encoding"):
        return rest
    while True:
        size, _, rest = rest.partition(b"\r\n")
        if size == b"0":
            return found
        found, rest = found + rest[: int(size, 16)], rest[int(size, 16) + 2 :]


async def test_bodies_are_copied_by_their_framing(world: World) -> None:
    preview = await world.preview()
    for sent, came in FRAMED:
        world.dev.answers["/"] = sent
        assert (sent, unframed(await world.ask(preview))) == (sent, came)
        # The connection is still in step: what follows is answered for itself.
        two = await preview.request("/x"), await preview.request("/y", "GET", "Connection: close")
        assert (await world.say(await preview.request("/"), *two)).count(b"HTTP/1.1 200 OK\r\n") >= 2


async def test_an_answer_to_head_has_no_body_and_its_length(world: World) -> None:
    preview = await world.preview()
    world.dev.answers["/"] = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"
    two = await preview.request("/", "HEAD") + await preview.request("/y", "GET", "Connection: close")
    answer = await world.say(two)
    assert answer.count(b"HTTP/1.1 200") == 2
    assert fields(answer, "content-length") == ["7"]


async def test_a_body_goes_up_in_both_framings(world: World) -> None:
    preview = await world.preview()
    big = b"x" * 300_000
    answer = await world.say(
        await preview.request("/up", "POST", f"Content-Length: {len(big)}"), big[:100_000], big[100_000:],
        await preview.request("/up", "POST", "Transfer-Encoding: chunked", "Expect: 100-continue"),
        b"3\r\nabc\r\n0\r\nTrailer: dropped\r\n\r\n", await preview.request("/", "GET", "Connection: close"),
    )  # fmt: skip
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.count(b"HTTP/1.1 100") == 1
    assert [part for _, part in world.dev.asked] == [big, b"3\r\nabc\r\n0\r\n\r\n", b""]


async def test_nothing_of_an_answer_speaks_to_the_proxies_in_front(world: World) -> None:
    preview = await world.preview()
    world.dev.answers["/"] = (
        b"HTTP/1.1 200 OK\r\nfly-replay: app=another\r\nX-Accel-Redirect: /etc/\r\nAlt-Svc: h3=x\r\n"
        b"Keep-Alive: timeout=5\r\nConnection: X-Mine\r\nX-Mine: 1\r\nContent-Length: 0\r\n\r\n"
    )
    answer = await world.ask(preview)
    for name in ("fly-replay", "x-accel-redirect", "alt-svc", "keep-alive", "x-mine"):
        assert fields(answer, name) == []


async def test_what_a_project_says_of_caches_holds_and_is_private(world: World) -> None:
    preview = await world.preview()
    for said, wanted in {
        "no-cache": "no-cache, private", "no-store": "no-store, private", "": "private",
        "max-age=31536000,immutable": "max-age=31536000, immutable, private",
        "public, max-age=5, S-MaxAge=60, private": "max-age=5, private",
    }.items():  # fmt: skip
        field = f"Cache-Control: {said}\r\n" if said else ""
        world.dev.answers["/"] = f"HTTP/1.1 200 OK\r\n{field}Content-Length: 2\r\n\r\nok".encode()
        assert fields(await world.ask(preview), "Cache-Control") == [wanted]
    two = b'Cache-Control: no-cache\r\ncache-control: public, x="a, public"\r\n'
    world.dev.answers["/"] = b"HTTP/1.1 200 OK\r\n" + two + b"Content-Length: 2\r\n\r\nok"
    assert fields(await world.ask(preview), "Cache-Control") == ['no-cache, x="a, public", private']


async def test_a_client_cannot_claim_to_come_from_elsewhere(world: World) -> None:
    preview = await world.preview()
    await world.ask(preview, "/", "GET", "X-Forwarded-Host: bank.example", "X-Forwarded-Proto: http",
                    "Forwarded: host=bank.example", "Connection: X-Secret, Host, Cookie", "X-Secret: 1")  # fmt: skip
    head = world.dev.asked[0][0]
    assert b"bank" not in head
    assert b"X-Secret" not in head
    assert head.count(b"Host: " + preview.host.encode()) == 2  # of the request, and X-Forwarded-Host


async def test_what_is_asked_on_one_connection_is_judged_for_itself(world: World) -> None:
    """A proxy in front sends requests of several people and hosts on one connection."""
    mine, other = await world.preview(), await world.preview()
    stranger = await other.request("/stranger", cookie=False)
    crossed = (await mine.request("/crossed")).replace(mine.host.encode(), other.host.encode())
    answer = await world.say(
        await mine.request("/1"), stranger, crossed, await other.request("/2"),
        await mine.request("/3", "GET", "Connection: close"),
    )  # fmt: skip
    assert [answer.count(b"HTTP/1.1 %d" % code) for code in (200, 401)] == [3, 2]
    assert world.dev.paths == ["/1", "/2", "/3"]


async def test_connections_to_the_dev_server_are_kept_and_replaced_when_they_ended(world: World) -> None:
    preview = await world.preview()
    reader, writer = await world.connect()
    for _ in range(3):
        writer.write(await preview.request("/"))
        await reader.readuntil(b"ok")
    assert world.dev.connections == 1
    world.dev.answers["/last"] = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok"
    for path in ("/last", "/again"):
        writer.write(await preview.request(path))
        await reader.readuntil(b"ok")
    assert world.dev.connections == 2
    writer.close()
    await within("the dev server's side ends too", lambda: world.dev.gone == 2)


async def test_an_answer_that_is_cut_off_does_not_look_whole(world: World) -> None:
    preview = await world.preview()
    world.dev.cut = {"/length", "/chunks"}
    world.dev.answers = {
        "/length": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhalf",
        "/chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
    }
    for path in world.dev.cut:
        reader, writer = await world.connect()
        writer.write(await preview.request(path))
        came = await reader.read()
        # Fewer bytes than were promised, and no last chunk: a browser sees that something is missing.
        assert b"200 OK" in came
        assert not came.endswith(b"0\r\n\r\n")
        writer.close()


async def test_a_body_that_nobody_takes_is_no_trouble(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing answers where the preview should be, or it answers before it has read."""
    away = await world.preview(preview_url="http://127.0.0.1:1")
    for more in ("Content-Length: 500000", "Transfer-Encoding: chunked"):
        answer = await world.say(await away.request("/", "POST", more), b"5\r\nhello\r\n")
        assert status(answer) == 503
    preview = await world.preview()
    answer = await world.say(
        await preview.request("/", "POST", "Content-Length: 9", "Connection: close"), b"123456789"
    )
    assert status(answer) == 200
    assert "door.failed" not in capsys.readouterr().out


async def test_a_browser_that_leaves_takes_its_question_back(world: World) -> None:
    preview = await world.preview()
    _, writer = await world.connect()
    writer.write(await preview.request("/silent"))
    await within("it was asked", lambda: world.dev.asked)
    writer.close()
    await within("the dev server's connection ends", lambda: world.dev.gone == 1)


async def test_an_old_client_gets_its_body_to_the_end(world: World) -> None:
    """As nginx asks unless it is told otherwise."""
    preview = await world.preview()
    world.dev.answers["/"] = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    asked = (await preview.request("/")).replace(b"HTTP/1.1", b"HTTP/1.0")
    answer = await world.say(asked)
    assert body(answer) == b"abc"
    assert fields(answer, "connection") == ["close"]
