"""Speaks to a session's dev server: one connection, one exchange at a time, and copying both ways after a 101."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

PIECE: Final = 64 * 1024
"""Bytes read at once, and the most that is kept of a body on its way."""

CONNECT_SECONDS: Final = 5.0
"""For a machine of the same network. One that does not answer is not up, and the page says so."""

DRAIN_SECONDS: Final = 120.0
"""For a reader that takes nothing: a phone in a tunnel comes back within it."""


class Unreachable(Exception):
    """Nothing answers where the preview should be."""


@dataclass(eq=False, slots=True)
class Upstream:
    """One connection to `target`."""

    target: tuple[str, int]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    @property
    def usable(self) -> bool:
        """Whether it looks alive."""
        return not (self.reader.at_eof() or self.writer.is_closing())

    def abort(self) -> None:
        """End it at once."""
        self.writer.transport.abort()


def target_of(preview_url: str | None) -> tuple[str, int]:
    """Host and port of a preview. Raises `Unreachable` for what is no address of a machine in plain http."""
    try:
        parts = urlsplit(preview_url or "")
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port, parts = None, 0, urlsplit("")
    if parts.scheme != "http" or host is None:
        raise Unreachable(f"{preview_url!r} is no address that the door can reach: http://HOST:PORT is")
    return host, port


async def connect(target: tuple[str, int]) -> Upstream:
    """A new connection. Raises `Unreachable`."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(*target, limit=PIECE)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"{target[0]}:{target[1]}: {error or type(error).__name__}") from None
    keep_alive(writer)
    return Upstream(target, reader, writer)


def keep_alive(writer: asyncio.StreamWriter) -> None:
    """Have the system notice a peer that vanished: a socket may be silent for hours, and still be wanted."""
    sock: socket.socket | None = writer.get_extra_info("socket")
    if sock is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):  # Linux
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


async def drained(writer: asyncio.StreamWriter) -> None:
    """Wait until the reader has taken enough. Raises `ConnectionError`, `TimeoutError`."""
    if writer.transport.get_write_buffer_size() > PIECE or writer.is_closing():
        async with asyncio.timeout(DRAIN_SECONDS):
            await writer.drain()


async def closed(writer: asyncio.StreamWriter) -> None:
    """Close it once what was written is sent. Raises `ConnectionError`, `TimeoutError`."""
    writer.close()
    async with asyncio.timeout(DRAIN_SECONDS):
        await writer.wait_closed()


async def splice(
    client: tuple[asyncio.StreamReader, asyncio.StreamWriter], upstream: Upstream, early: bytes, first: bytes
) -> None:
    """Copy both ways until one side ends.

    Args:
        client: The browser's side.
        upstream: The dev server's.
        early: What the browser sent before the 101.
        first: What the dev server sent behind it.
    """
    reader, writer = client
    if early:
        upstream.writer.write(early)
    if first:
        writer.write(first)
    both = {
        asyncio.create_task(_copy(reader, upstream.writer), name="door up"),
        asyncio.create_task(_copy(upstream.reader, writer), name="door down"),
    }
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        # The other one ends when what was written is sent, which a side that reads nothing never lets happen.
        await asyncio.wait(both, timeout=DRAIN_SECONDS)
    finally:
        for task in both:
            task.cancel()
        await asyncio.gather(*both, return_exceptions=True)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(PIECE):
            writer.write(data)
            await drained(writer)
    finally:
        # Either end is the end of both: a WebSocket has no half.
        writer.close()
