"""Runs a server process: listens, speaks HTTP, logs, stops in order."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import nullcontext
from email.utils import formatdate
from typing import Any, TypeVar

import structlog
import uvicorn
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from orchestrator_stub.platform.redaction import Redactor

MOST_HEAD = 65_536
"""Bytes of a request's head, as h11 has it."""

T = TypeVar("T")


class CannotServe(Exception):
    """The service cannot start; the message says why in one line."""


def stop_event() -> asyncio.Event:
    """Set when somebody asks the process to stop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    return stop


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` gives; None when `stop` was set first, and `work` is cancelled then."""
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([working, stopping], return_when=asyncio.FIRST_COMPLETED)
        return None if stop.is_set() else working.result()
    finally:
        for task in (working, stopping):
            task.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)


def listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 picks a free one. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Name the protocol, so that asyncio sets TCP_NODELAY on what is accepted: an answer in two writes waits 40 ms else.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


class Dated:
    """ASGI middleware: sets `Date` when an answer is made.

    Agents measure their clocks against it, and uvicorn renews its own only every ten ticks: up to a second too old on
    top of its resolution.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = formatdate(usegmt=True).encode()
                message = {**message, "headers": [*message.get("headers", ()), (b"date", date)]}
            await send(message)

        await self._app(scope, receive, dated)


class BoundedHttp(HttpToolsProtocol):
    """HTTP by llhttp, which takes less of a request's processor time than h11; and h11's bound, which it lacks.

    Without one, a header that never ends is kept whole.
    """

    _unread = 0
    """Bytes since a head, a piece of a body or a message was whole."""

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > MOST_HEAD and not self.transport.is_closing():
            self.send_400_response("The head is too large.")

    def on_headers_complete(self) -> None:
        self._unread = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unread = 0
        super().on_message_complete()


class Server(uvicorn.Server):
    """uvicorn with an exact `Date` and without signal handlers: whoever runs it stops it by `should_exit`."""

    def __init__(self, config: uvicorn.Config) -> None:
        config.app = Dated(config.app)
        config.date_header = False
        if config.http == "auto":
            config.http = "h11"  # and not what happens to be installed
        super().__init__(config)

    def capture_signals(self) -> Any:
        return nullcontext()


def configure_logs(level: str, form: str, redactor: Redactor) -> None:
    """Structured logs to stderr: JSON lines, or for people on a terminal (`form`: json, console, auto).

    `redactor` sees every line, those that libraries log through the standard module too.
    """
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    # It warns of each attempt of its own retries; we log the outcome.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor] = [
        structlog.processors.format_exc_info,
        redactor,
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
    ]
    lines = logging.StreamHandler(sys.stderr)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    lines.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=[remove, *last])
    )
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    structlog.configure(
        processors=[*before, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )
