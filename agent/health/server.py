"""Serves `/livez`, `/readyz`, `/status` and `/metrics` over HTTP; changes nothing.

Anybody who reaches the machine can ask, the project's own code included, so it tells no secret, reads no more
than a request line and its headers, keeps no connection, and waits for no client longer than a few seconds.

`/livez` is always 200: a stuck event loop does not answer at all, which is what a liveness probe is for. `/readyz` is
200 or 503, with the reason as its body.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import sys
import time
from collections.abc import Callable
from http import HTTPStatus

import orjson
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from agent import net
from agent.config import Settings
from agent.core.errors import SettingsError
from agent.health.report import Report

PATIENCE = 5.0
"""Seconds for a request to arrive and its answer to be sent."""
MOST_BYTES = 16 * 1024
"""Of request line and headers; browsers send 1 KB."""
MOST_AT_ONCE = 256
"""Connections. A prober and a scraper need two; a program may hold as many silent ones as it likes."""
MOST_TAKEN = 64
"""Connections that are taken in one turn of the loop. Whoever has asked is answered three turns later, when three times
as many are newer at most: fewer than would make it the oldest of `MOST_AT_ONCE`."""
MOST_UNASKED = 1024
"""Connections that the kernel keeps to itself until they ask something (Linux): a program that opens hundreds of silent
ones at once does not push out a prober whose request is on its way."""
REST = 20
"""How many times as long as it took a body is given again: asking for it all the time takes a twentieth of the loop."""

Answer = tuple[HTTPStatus, str, bytes]
_ACCEPT = re.compile(rb"(?im)^accept:[ \t]*([^\r\n]*)")
JSON = "application/json"
TEXT = "text/plain; charset=utf-8"


async def serve(
    settings: Settings,
    report: Report,
    registry: CollectorRegistry,
    *,
    on_bound: Callable[[int], None] = lambda port: None,
) -> None:
    """Serve on HEALTH_HOST and HEALTH_PORT until cancelled.

    Args:
        settings: where to listen.
        report: what to serve.
        registry: the metrics.
        on_bound: called with the port, once it is listened on (HEALTH_PORT=0 picks one).

    Raises:
        SettingsError: the address cannot be listened on.
    """
    listener = _listen(settings.health_host, settings.health_port)
    open_now: dict[asyncio.Task[object], None] = {}
    recent = Recent()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The oldest makes room: it is silent, or does not read, since the others are answered at once.
        if len(open_now) >= MOST_AT_ONCE:
            oldest = next(iter(open_now))
            del open_now[oldest]
            oldest.cancel()
        task = asyncio.current_task()
        assert task is not None
        open_now[task] = None
        try:
            with contextlib.suppress(
                OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError
            ):
                async with asyncio.timeout(PATIENCE):
                    head = await reader.readuntil(b"\r\n\r\n")
                    said: Answer = HTTPStatus.INTERNAL_SERVER_ERROR, TEXT, b"a bug, see the log\n"
                    with report.errors.contained("health"):
                        said = answer(head, report, registry, recent)
                    _write(writer, said, head=head[:5] == b"HEAD ")
                    await writer.drain()
        finally:
            open_now.pop(task, None)
            writer.close()

    server = await asyncio.start_server(connected, sock=listener, limit=MOST_BYTES, backlog=MOST_TAKEN)
    listener.listen(MOST_UNASKED)
    on_bound(listener.getsockname()[1])
    async with server:
        await server.serve_forever()


class Recent:
    """Bodies that took a while to make, given again while making them anew would take more than its share of the loop.

    Anybody in the machine can ask a thousand times a second. A body is good for `REST` times as long as it took: what
    costs 2 ms is at most 40 ms old.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._bodies: dict[str, tuple[float, bytes]] = {}

    def body(self, kind: str, make: Callable[[], bytes]) -> bytes:
        """Return the body of that `kind`, made now or a moment ago. There are few kinds."""
        began = self._clock()
        until, body = self._bodies.get(kind, (began, b""))
        if began >= until:
            body = make()
            ended = self._clock()
            self._bodies[kind] = ended + REST * (ended - began), body
        return body


def answer(
    request: bytes, report: Report, registry: CollectorRegistry, recent: Recent | None = None
) -> Answer:
    """Return status, content type and body for one request's head; the body may be a `recent` one."""
    recent = recent or Recent()
    words = request.split(b"\r\n", 1)[0].split(b" ")
    if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
        return HTTPStatus.BAD_REQUEST, TEXT, b"not HTTP/1\n"
    if words[0] not in (b"GET", b"HEAD"):
        return HTTPStatus.METHOD_NOT_ALLOWED, TEXT, b"only GET\n"
    match words[1].split(b"?", 1)[0]:
        case b"/livez":
            return HTTPStatus.OK, TEXT, b"alive\n"
        case b"/readyz":
            ready = report.ready()
            text = f"{'ready' if ready else 'not ready'}: {report.why()}\n"
            return HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, TEXT, text.encode()
        case b"/status":
            option = orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE
            body = recent.body(JSON, lambda: net.json_bytes(report.status(), option))
            return HTTPStatus.OK, JSON, body
        case b"/metrics":
            accept = _ACCEPT.search(request)
            encode, kind = choose_encoder(accept[1].decode("latin-1") if accept else "")
            return HTTPStatus.OK, kind, recent.body(kind, lambda: encode(registry))
    return HTTPStatus.NOT_FOUND, TEXT, b"/livez /readyz /status /metrics\n"


def _write(writer: asyncio.StreamWriter, answer: Answer, *, head: bool = False) -> None:
    status, kind, body = answer
    allow = "Allow: GET, HEAD\r\n" if status is HTTPStatus.METHOD_NOT_ALLOWED else ""
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        f"Cache-Control: no-store\r\n{allow}Connection: close\r\n\r\n"
    )
    writer.write(lines.encode() + (b"" if head else body))


def _listen(wanted: str, port: int) -> socket.socket:
    name = net.listening_host(wanted)
    both = name == "::" and socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        listener = socket.create_server((name, port), family=family, dualstack_ipv6=both)
        if sys.platform == "linux":
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, int(PATIENCE))
        return listener
    except OSError as error:
        reason = error.strerror or str(error)
        raise SettingsError([f"HEALTH_PORT: cannot listen on {wanted} port {port}: {reason}"]) from None
