"""The short way through a websocket delivers exactly what the library's own way does, however the bytes are cut."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.frames import Close, Frame, Opcode
from websockets.uri import parse_uri
from websockets.utils import accept_key

from agent.framing import MAX_HEAD_BYTES, DirectConnection
from tests.profiles import examples

MOST = 70_000
"""The `max_size` of these connections: above the 16-bit lengths, small enough to be passed in a test."""


class Recorder(asyncio.Transport):
    """A transport that keeps what was written and closes when told."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def write_eof(self) -> None:
        self.closed = True

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


class Plain(ClientConnection):
    """The library's way, its messages kept instead of queued."""

    messages: list[bytes]
    parts: list[bytes]

    def process_event(self, event: Any) -> None:
        if isinstance(event, Frame) and event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self.parts.append(bytes(event.data))
            if event.fin:
                self.messages.append(b"".join(self.parts))
                self.parts.clear()
        else:
            super().process_event(event)


def shake(connection: ClientConnection) -> tuple[Recorder, bytes]:
    """Send the handshake; returns the transport and the server's answer to it."""
    transport = Recorder()
    connection.connection_made(transport)
    request = connection.protocol.connect()
    connection.protocol.send_request(request)
    connection.send_data()
    accept = accept_key(request.headers["Sec-WebSocket-Key"])
    answer = (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {accept}\r\n\r\n"
    )
    return transport, answer.encode()


def protocol() -> ClientProtocol:
    return ClientProtocol(parse_uri("ws://test/"), max_size=MOST)


def feed(connection: ClientConnection, stream: bytes, cuts: list[int]) -> None:
    at = 0
    for cut in [*sorted(c % (len(stream) + 1) for c in cuts), len(stream)]:
        if cut > at:
            connection.data_received(stream[at:cut])
            at = cut


async def both(frames: bytes, cuts: list[int], attach_after: int = 0) -> tuple[Any, Any]:
    """What each way made of the same bytes: messages, what was written back, and how it ended."""
    plain = Plain(protocol())
    plain.messages, plain.parts = [], []
    transport, answer = shake(plain)
    sent = len(transport.written)
    feed(plain, answer + frames, cuts)
    expected = (plain.messages, opened_masks(bytes(transport.written[sent:])), ended(plain), transport.closed)

    direct = DirectConnection(protocol(), max_size=MOST)
    messages: list[bytes] = []
    ends: list[None] = []
    transport, answer = shake(direct)
    sent = len(transport.written)
    if not attach_after:
        direct.attach(messages.append, lambda: ends.append(None))
    feed(direct, answer + frames, cuts)
    if attach_after:
        direct.attach(messages.append, lambda: ends.append(None))
    result = (messages, opened_masks(bytes(transport.written[sent:])), direct.end, transport.closed)
    if direct.end is not None and not attach_after:
        assert ends, "the end was told"
    return result, expected


def ended(connection: ClientConnection) -> tuple[Close | None, Close | None] | None:
    state = connection.protocol.state.name
    return None if state == "OPEN" else (connection.protocol.close_rcvd, connection.protocol.close_sent)


def opened_masks(written: bytes) -> list[tuple[int, bytes]]:
    """The client's frames without their random masks."""
    frames = []
    while written:
        length = written[1] & 0x7F
        mask, body = written[2:6], written[6 : 6 + length]
        frames.append((written[0], bytes(b ^ mask[i % 4] for i, b in enumerate(body))))
        written = written[6 + length :]
    return frames


payloads = (
    st.binary(max_size=40)
    | st.sampled_from([0, 1, 124, 125, 126, 127, 128, 65_534, 65_535, 65_536, MOST, MOST + 1]).map(bytes)
)  # fmt: skip
texts = st.text(max_size=20).map(lambda text: text.encode(errors="surrogatepass"))
whole = st.tuples(st.sampled_from([Opcode.TEXT, Opcode.BINARY]), payloads | texts).map(
    lambda part: Frame(*part).serialize(mask=False)
)
control = st.tuples(st.sampled_from([Opcode.PING, Opcode.PONG]), st.binary(max_size=125)).map(
    lambda part: Frame(*part).serialize(mask=False)
)
closing = st.sampled_from([1000, 1001, 1012, 4000]).map(
    lambda code: Frame(Opcode.CLOSE, Close(code, "bye").serialize()).serialize(mask=False)
)
fragmented = st.lists(st.binary(max_size=30), min_size=2, max_size=4).flatmap(
    lambda parts: st.just(
        b"".join(
            Frame(Opcode.BINARY if n == 0 else Opcode.CONT, part, fin=n == len(parts) - 1).serialize(
                mask=False
            )
            for n, part in enumerate(parts)
        )
    )
)
interrupted = st.tuples(st.binary(max_size=9), control, st.binary(max_size=9)).map(
    lambda parts: (
        Frame(Opcode.TEXT, parts[0], fin=False).serialize(mask=False)
        + parts[1]
        + Frame(Opcode.CONT, parts[2]).serialize(mask=False)
    )
)
masked = st.binary(max_size=10).map(lambda data: Frame(Opcode.BINARY, data).serialize(mask=True))
junk = st.binary(min_size=1, max_size=20)
streams = st.lists(
    whole | whole | control | fragmented | interrupted | closing | masked | junk, max_size=8
).map(b"".join)


@given(streams, st.lists(st.integers(0, 200_000), max_size=12))
@examples(200, 3_000)
def test_both_ways_are_one(stream: bytes, cuts: list[int]) -> None:
    result, expected = asyncio.run(both(stream, cuts))
    assert result == expected


@given(st.lists(whole | control | fragmented, max_size=4).map(b"".join))
@examples(20, 100)
def test_byte_by_byte(stream: bytes) -> None:
    stream = stream[:2_000]
    result, expected = asyncio.run(both(stream, list(range(len(stream) + 200))))
    assert result == expected


async def test_what_comes_before_anybody_listens_is_kept() -> None:
    frames = b"".join(Frame(Opcode.TEXT, text).serialize(mask=False) for text in (b"one", b"two"))
    result, expected = await both(frames, [], attach_after=1)
    assert result == expected
    assert result[0] == [b"one", b"two"]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 5\r\n\r\nnever",
        b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 2\r\n\r\nno",
        b"junk\r\n\r\nmore",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * (MAX_HEAD_BYTES + 10),
    ],
)
@pytest.mark.parametrize("cut", [[], [10], [40, 41, 42]])
async def test_a_refused_handshake_is_the_librarys(answer: bytes, cut: list[int]) -> None:
    seen = []
    for connection in (ClientConnection(protocol()), DirectConnection(protocol(), max_size=MOST)):
        shake(connection)
        feed(connection, answer, cut)
        error = connection.protocol.handshake_exc
        seen.append((type(error), getattr(getattr(error, "response", None), "status_code", None)))
    assert seen[0] == seen[1]
    assert seen[0][0] is not type(None)
