"""Lets the realtime server write finished frames to uvicorn's WebSockets, synchronously.

ASGI's `websocket.send` encodes a frame per socket and needs a task per socket to be awaited in. A fan-out server
wants neither: it has one finished frame for thousands of sockets. `FrameSocket` therefore puts itself into the
scope, and the realtime endpoint writes through it, synchronously, with the buffer's size in sight. Measured by
`bench/cases/realtime_server.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

EXTENSION = "preview_sync.frames"
"""Where the socket is found in the ASGI scope's `extensions`."""

MAX_FRAME_BYTES = 5_000_000
"""Inbound, as Supabase Realtime's endpoint has it."""


class _Quiet(logging.LoggerAdapter[logging.Logger]):
    """A logger from WARNING up."""

    def isEnabledFor(self, level: int) -> bool:
        return level >= logging.WARNING and super().isEnabledFor(level)

    @property
    def level(self) -> int:
        return max(self.logger.level, logging.WARNING)


class FrameSocket(WebSocketsSansIOProtocol):
    """One accepted connection. `uvicorn.Config(ws=FrameSocket)`, best by `uvicorn_options()`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # At INFO uvicorn prints each handshake's query string, and the API key in it; below that, each frame.
        self.logger = self.conn.logger = _Quiet(self.logger)  # type: ignore[assignment]
        self.conn.debug = False
        self.before_shutdown: Callable[[], None] | None = None
        """Called when the server goes, while frames can still be written; the close with 1012 follows."""

    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = self.scope["extensions"]
        extensions[EXTENSION] = self
        await super().run_asgi()

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body":
            # A refused handshake is complete as well; uvicorn logs an error otherwise.
            self.handshake_complete = True

    def shutdown(self) -> None:
        if self.before_shutdown is not None:
            self.before_shutdown()
        super().shutdown()

    @property
    def open(self) -> bool:
        """Whether a frame written now has a chance to arrive."""
        return not (self.close_sent or self.disconnected or self.transport.is_closing())

    @property
    def backlog(self) -> int:
        """Bytes written and not yet taken by the kernel."""
        return self.transport.get_write_buffer_size()

    def write_frame(self, frame: bytes) -> None:
        """Send a finished frame (`frames.websocket_frame`). Never blocks; see `backlog`. Too late is silent."""
        if self.open:
            self.transport.write(frame)

    async def finish(self, code: int) -> None:
        """Start the closing handshake with `code`. The application's `receive` hears of it."""
        if self.open:
            await self.send({"type": "websocket.close", "code": code})

    def abort(self) -> None:
        """Cut the connection with no closing handshake, dropping what is buffered."""
        self.transport.abort()


def uvicorn_options() -> dict[str, Any]:
    """What `uvicorn.Config` must be told for the realtime endpoint to be itself.

    No compression and no protocol pings (clients of this protocol heartbeat), frames up to 5,000,000 bytes.

    A listening socket that is handed to uvicorn should be made with `IPPROTO_TCP`: asyncio sets TCP_NODELAY on what it
    accepts only where the protocol is named, and without it each answer of two writes waits 40 ms.
    """
    return {
        "ws": FrameSocket,
        "ws_max_size": MAX_FRAME_BYTES,
        "ws_per_message_deflate": False,
        "ws_ping_interval": None,
        "ws_ping_timeout": None,
    }
