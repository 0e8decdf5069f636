"""A web server that serves bytes badly: it cuts, resets, stalls, drips and refuses, on real sockets."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Answer:
    """One answer. `cut`: after so many bytes of the body the connection ends, `how`: close, reset or stall.

    `announced` False: no Content-Length, the end of the connection is the end of the body. `piece` bytes are sent at
    a time, with `pause` seconds between.
    """

    body: bytes = b""
    status: int = 200
    headers: Sequence[tuple[str, str]] = ()
    cut: int | None = None
    how: str = "close"
    announced: bool = True
    piece: int = 65_536
    pause: float = 0.0


@dataclass(slots=True)
class Origin:
    """Gives its `answers` in turn, the last one for ever. `requests` has each request's head, `bodies` its body."""

    answers: list[Answer]
    requests: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(head.decode())
            # Read whole: what is left in a socket that is closed resets the connection, answer and all.
            length = re.search(rb"(?im)^content-length: *(\d+)", head)
            self.bodies.append(await reader.readexactly(int(length[1])) if length else b"")
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
            await self._answer(answer, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(
        self, answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        lines = [f"HTTP/1.1 {answer.status} Whatever", "Connection: close"]
        if answer.announced:
            lines.append(f"Content-Length: {len(answer.body)}")
        lines += [f"{name}: {value}" for name, value in answer.headers]
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        body = answer.body if answer.cut is None else answer.body[: answer.cut]
        for at in range(0, len(body), answer.piece):
            writer.write(body[at : at + answer.piece])
            await writer.drain()
            if answer.pause:
                await asyncio.sleep(answer.pause)
        await writer.drain()
        if answer.cut is None or answer.how == "close":
            return
        if answer.how == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
            return
        await reader.read()  # stalled until the client goes away


@asynccontextmanager
async def origin(*answers: Answer, tls: ssl.SSLContext | None = None) -> AsyncIterator[Origin]:
    """An origin on a free port of the loopback, for the time of the block."""
    it = Origin(list(answers))
    server = await asyncio.start_server(it._serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        port = server.sockets[0].getsockname()[1]
        it.url = f"{'https' if tls else 'http'}://127.0.0.1:{port}/storage/v1/object/sign/project-snapshots/p/s.zip?token=SECRET"
        yield it
