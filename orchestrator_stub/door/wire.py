"""Parses HTTP/1 as it comes off a socket, by llhttp (httptools). Bytes in, heads and pieces of bodies out; no sockets.

llhttp is strict: a bare LF, a folded line, a second Content-Length, Content-Length beside Transfer-Encoding, a coding
that does not end in `chunked` and a character that has no place in a field are errors of its own. What it does not
bound (the size of a head, of trailers, what follows an upgrade, codings before `chunked`) is bounded here.

`events` holds, in order, a head, its body's pieces and `END`, and so on.
"""

from __future__ import annotations

from collections import deque
from typing import Final

import httptools

from orchestrator_stub.door.heads import (
    BadHead,
    Headers,
    RequestHead,
    ResponseHead,
    asks_for_websocket,
    values,
)

MOST_HEAD: Final = 32 * 1024
"""Bytes of a head, or of trailers. Node takes 16 KB; cookies of a preview's own may be as much again."""

MOST_FIELDS: Final = 200
"""Fields of a head."""


class End:
    """The message is over."""


END: Final = End()


class _Wire:
    """What both directions share: fields are gathered, and counted before there are too many of them."""

    def __init__(self) -> None:
        self._fields: list[tuple[bytes, bytes]] = []
        self._size = 0
        self._within = False
        """A head has begun and is not whole yet: what is fed is counted."""
        self._refused: BadHead | None = None

    def on_header(self, name: bytes, value: bytes) -> None:
        self._size += len(name) + len(value) + 4
        if self._size > MOST_HEAD or len(self._fields) >= MOST_FIELDS:
            self._refused = BadHead(431, "the head is too large")
            raise self._refused
        self._fields.append((name, value))

    def _headers(self) -> Headers:
        fields, self._fields, self._size = tuple(self._fields), [], 0
        self._within = False
        return fields

    def _is_chunked(self, headers: Headers, status: int) -> bool:
        """Whether the body comes in chunks. Any other coding would be lost on the way; what has one is refused."""
        codings = [value.strip().lower() for value in values(headers, b"transfer-encoding")]
        if codings not in ([], [b"chunked"]):
            self._refused = BadHead(status, "the only transfer coding is chunked")
            raise self._refused
        return bool(codings)


class RequestWire(_Wire):
    """The requests of one connection."""

    def __init__(self) -> None:
        super().__init__()
        self.events: deque[RequestHead | bytes | End] = deque()
        self.rest: bytes | None = None
        """What came with a request for an upgrade, once there was one: nothing may be fed any more."""
        self._target = b""
        self._fed = 0
        self._parser = httptools.HttpRequestParser(self)

    @property
    def in_head(self) -> bool:
        """Whether a head has begun and is not whole yet."""
        return self._within

    def feed(self, data: bytes) -> None:
        """Take what came. Raises `BadHead` for what is no request, with `events` holding what came before it."""
        self._fed = self._fed + len(data) if self._within else 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.rest = bytes(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            raise self._refused or BadHead(400, f"this is no HTTP: {error}") from None
        except httptools.HttpParserCallbackError:
            raise self._refused or BadHead(400, "this is no HTTP") from None
        if self._within and self._fed > MOST_HEAD:
            raise BadHead(431, "the head is too large")

    def on_message_begin(self) -> None:
        self._target, self._within = b"", True

    def on_url(self, url: bytes) -> None:
        self._target += url
        if len(self._target) > MOST_HEAD:
            self._refused = BadHead(414, "the address is too long")
            raise self._refused

    def on_headers_complete(self) -> None:
        headers = self._headers()
        method = self._parser.get_method().decode()
        lengths = values(headers, b"content-length")
        chunked = self._is_chunked(headers, 400)
        upgrade = asks_for_websocket(method, headers)
        # At any upgrade the parser stops behind the head, so a body would be lost.
        if (chunked or (lengths and int(lengths[0]))) and self._parser.should_upgrade():
            self._refused = BadHead(400, "a handshake has no body")
            raise self._refused
        self.events.append(
            RequestHead(
                method, self._target, self._parser.get_http_version(), headers,
                None if chunked else int(lengths[0]) if lengths else 0,
                self._parser.should_keep_alive(), upgrade,
            )
        )  # fmt: skip

    def on_body(self, body: bytes) -> None:
        self.events.append(body)

    def on_message_complete(self) -> None:
        self._headers()  # trailers, which are not passed on
        self.events.append(END)


class ResponseWire(_Wire):
    """The answer to one request, with the interim ones (1xx) before it. `bodiless`: it answers HEAD."""

    def __init__(self, *, bodiless: bool = False) -> None:
        super().__init__()
        self.events: deque[ResponseHead | bytes | End] = deque()
        self.rest: bytes | None = None
        """What came after a 101."""
        self.done = False
        self.surplus = False
        """More came than the answer: the connection is good for nothing else."""
        self._bodiless = bodiless
        self._reason = b""
        self._head: ResponseHead | None = None
        self._fed = 0
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Take what came. Raises `BadHead` for what is no answer."""
        if self.done:
            self.surplus = True
            return
        self._fed = self._fed + len(data) if self._within else 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self.rest = bytes(data[upgrade.args[0] :])
        except (httptools.HttpParserError, httptools.HttpParserCallbackError) as error:
            if not self.events or self.events[-1] is not END:
                raise self._refused or BadHead(502, f"the answer is no HTTP: {error}") from None
            self.surplus = True  # the body of an answer to HEAD, or what follows an answer
        if self._within and self._fed > MOST_HEAD:
            raise BadHead(502, "the answer's head is too large")

    def feed_eof(self) -> None:
        """The connection ended. Raises `BadHead` when the answer was not whole."""
        if self._head is not None and self._head.until_close and not self.done:
            self._end()
        elif not self.done:
            raise BadHead(502, "the answer was cut off")

    def on_message_begin(self) -> None:
        if self.done:
            self.surplus = True
            return
        self._reason, self._within = b"", True

    def on_status(self, reason: bytes) -> None:
        self._reason += reason

    def on_headers_complete(self) -> None:
        headers = self._headers()
        if self.done:
            return
        status = self._parser.get_status_code()
        lengths = values(headers, b"content-length")
        chunked = self._is_chunked(headers, 502)
        without = self._bodiless or status < 200 or status in (204, 304)
        self._head = ResponseHead(
            status, self._reason, headers,
            0 if without else None if chunked or not lengths else int(lengths[0]),
            not (without or chunked or lengths), self._parser.should_keep_alive(),
        )  # fmt: skip
        self.events.append(self._head)
        if self._bodiless and status >= 200:
            self._end()

    def on_body(self, body: bytes) -> None:
        if self.done:
            self.surplus = True
        else:
            self.events.append(body)

    def on_message_complete(self) -> None:
        self._headers()
        if self._head is not None and (self._head.status >= 200 or self._head.status == 101):
            self._end()

    def _end(self) -> None:
        if not self.done:
            self.done = True
            self.events.append(END)
