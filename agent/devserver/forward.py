"""Passes connections on to a dev server that listens elsewhere than where visitors come.

A command that ignores PORT and HOST serves where its author wanted it, often on loopback alone. While it is the one
server of the project, what comes to DEV_PORT is handed to it, byte for byte: nothing of it is read here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from agent.devserver.listeners import Listener

AT_ONCE = 256
"""Connections. A browser opens six to an origin and one socket; beyond this they wait to be accepted."""
PIECE = 65536
"""Bytes that are read at a time, and about what waits in each direction."""
CONNECT_SECONDS = 5.0


class Forward:
    """Listens for visitors and passes them on. Make it with `open`."""

    def __init__(self, target: Listener) -> None:
        self.target = target
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._servers: list[asyncio.Server] = []
        self._open: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(cls, hosts: Sequence[str], port: int, target: Listener) -> Forward:
        """Listen on `port` of each of `hosts`. Raises `OSError` when one cannot be listened on."""
        made = cls(target)
        try:
            for host in hosts:
                made._servers.append(await asyncio.start_server(made._accept, host, port, limit=PIECE))
        except OSError:
            await made.close()
            raise
        return made

    async def close(self) -> None:
        """Stop listening and cut what is open."""
        for server in self._servers:
            server.close()
        for task in list(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        onward: asyncio.StreamWriter | None = None
        try:
            async with self._slots:
                async with asyncio.timeout(CONNECT_SECONDS):
                    back, onward = await asyncio.open_connection(
                        self.target.target, self.target.port, limit=PIECE
                    )
                await asyncio.gather(_copy(reader, onward), _copy(back, writer))
        except (OSError, TimeoutError):
            pass  # either end is gone: so is the connection
        finally:
            for end in (writer, onward):
                if end is not None:
                    end.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the end of the stream, and pass the end on."""
    while piece := await reader.read(PIECE):
        writer.write(piece)
        await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()
