"""A TCP proxy that breaks connections the way networks do: cuts, stalls, delays, half-opens, refuses.

It stands between a client and a real server and knows nothing of what it carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field


@dataclass(eq=False)
class Pipe:
    """One connection through the proxy: two sockets and the two tasks between them."""

    client: asyncio.StreamWriter
    upstream: asyncio.StreamWriter
    frozen: bool = False
    """True: bytes are taken from both sides and never arrive: what a half-open connection looks like."""


@dataclass
class Proxy:
    """`async with Proxy(host, port) as proxy`; connect to `proxy.port`. Switches act on the next chunk or connect."""

    host: str
    upstream_port: int
    delay: float = 0.0
    """Seconds each chunk is held back, both ways, in order."""
    refuse: bool = False
    """Accept and reset at once, as a dead backend behind a load balancer does."""
    black_hole: bool = False
    """Accept and never say a word."""
    pipes: set[Pipe] = field(default_factory=set)
    accepted: int = 0
    _server: asyncio.Server | None = None
    _flowing: asyncio.Event = field(default_factory=asyncio.Event)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def __aenter__(self) -> Proxy:
        self._flowing.set()
        await self.listen()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.stop_listening()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    port: int = 0

    async def listen(self) -> None:
        """Be there (again), on the same port."""
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop_listening(self) -> None:
        """Connections are refused by the kernel from here on; those that are open stay."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def stall(self) -> None:
        """Stop reading from both sides: TCP backpressure, then silence."""
        self._flowing.clear()

    def flow(self) -> None:
        """End a stall; what was held back arrives."""
        self._flowing.set()

    def half_open(self) -> int:
        """The far side is gone and nobody told us: open connections swallow everything. Returns how many."""
        for pipe in self.pipes:
            pipe.frozen = True
            pipe.upstream.transport.abort()
        return len(self.pipes)

    def cut(self) -> int:
        """Reset both sides of every open connection. Returns how many."""
        cut = len(self.pipes)
        for pipe in list(self.pipes):
            reset(pipe.client)
            reset(pipe.upstream)
        return cut

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.create_task(self._carry(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.refuse:
            reset(writer)
            return
        if self.black_hole:
            with contextlib.suppress(ConnectionError):
                while await reader.read(65536):
                    pass
            writer.transport.abort()
            return
        try:
            up_reader, up_writer = await asyncio.open_connection(self.host, self.upstream_port)
        except ConnectionError:
            reset(writer)
            return
        pipe = Pipe(writer, up_writer)
        self.pipes.add(pipe)
        try:
            there = asyncio.create_task(self._pump(pipe, reader, up_writer))
            back = asyncio.create_task(self._pump(pipe, up_reader, writer))
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
            if pipe.frozen:
                await there
            there.cancel()
            back.cancel()
            await asyncio.gather(there, back, return_exceptions=True)
        finally:
            self.pipes.discard(pipe)
            writer.transport.abort()
            up_writer.transport.abort()

    async def _pump(self, pipe: Pipe, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while True:
                await self._flowing.wait()
                chunk = await reader.read(65536)
                if not chunk:
                    return
                await self._flowing.wait()
                if self.delay:
                    await asyncio.sleep(self.delay)
                if not pipe.frozen:
                    writer.write(chunk)
                    await writer.drain()


def reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    raw: socket.socket | None = writer.get_extra_info("socket")
    if raw is not None and not writer.transport.is_closing():
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
