"""Watches where a project listens while nothing answers where visitors come, and passes visitors on to that place.

A command that ignores PORT and HOST serves where its author wanted it, often on loopback alone. While that is the one
place where the project's programs listen, what comes to DEV_PORT is handed to it, byte for byte: nothing of it is read
here. Of several places the problem names them, and the settings have to say which it is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence

from agent import net
from agent.config import Settings
from agent.core.model import Problem
from agent.devserver import probe
from agent.devserver.listeners import Listener, listeners
from agent.telemetry.logging import get_logger

READ_EVERY = 1.0
"""Seconds between two readings of where the project listens."""
SETTLED_SECONDS = 5.0
"""Seconds for which another port must have been the only one before visitors are passed on to it: of two servers that
one command starts, the preview's may be the later one, and would find its port taken by us."""

AT_ONCE = 256
"""Connections. A browser opens six to an origin and one socket; beyond this they wait to be accepted."""
PIECE = 65536
"""Bytes that are read at a time, and about what waits in each direction."""
CONNECT_SECONDS = 5.0

log = get_logger("supervisor")


class Elsewhere:
    """Where the programs of one start of the dev server listen."""

    def __init__(self, settings: Settings, host: str, *, uid: int | None, clock: Callable[[], float]) -> None:
        """Make the watch of one start.

        Args:
            settings: The agent's, with the project's run settings in them.
            host: Where the dev server is to listen.
            uid: A user that runs nothing but the project; None: there is none.
            clock: Monotonic, seconds.
        """
        self._host = host
        self._port = settings.dev_port
        self._named = settings.dev_server_port
        self._timeout = settings.dev_probe_seconds
        self._uid = uid
        self._clock = clock
        self._listeners: tuple[Listener, ...] = ()
        self._forward: Forward | None = None
        self.problem: Problem | None = None
        """Why visitors could not be passed on."""

    @property
    def target(self) -> Listener | None:
        """Where visitors are passed on to."""
        return self._forward.target if self._forward else None

    def why_late(self, nothing: str) -> str:
        """Return what to do about a server that did not answer in time. `nothing`: a clause that says so."""
        if not self._listeners:
            return (
                f"{nothing}, and nothing of the project listens; set DEV_COMMAND to what serves on this port"
            )
        where = ", ".join(str(each) for each in self._listeners[:8])
        return f"{nothing}; the project listens on {where}: set DEV_PORT to the port of the preview"

    async def watch(self, pid: int, is_up: Callable[[], bool]) -> None:
        """Watch what `pid` and its descendants listen on, until the server answers or visitors are passed on."""
        before: tuple[Listener, ...] = ()
        since = self._clock()
        while not is_up():
            await asyncio.sleep(READ_EVERY)
            self._listeners = await asyncio.to_thread(listeners, pid, uid=self._uid)
            if self._listeners != before:
                before, since = self._listeners, self._clock()
            named = [each for each in before if each.port == self._named] or before
            (only,) = named if len(named) == 1 else (None,)
            if only is None or only.serves(net.visitors_hosts(self._host), self._port):
                continue  # a server that is where visitors come, and says nothing, is slow
            its_own = only.port == (self._named or self._port)  # nothing else of the project wants that port
            if its_own or self._clock() - since >= SETTLED_SECONDS:
                await self._pass_on(only, is_up)
                if self._forward:
                    return

    async def close(self) -> None:
        """Pass nobody on any more, and cut who is passed on."""
        forward, self._forward = self._forward, None
        if forward:
            await forward.close()

    async def _pass_on(self, only: Listener, is_up: Callable[[], bool]) -> None:
        host = f"[{only.target}]" if ":" in only.target else only.target
        if not await probe.answers(f"http://{host}:{only.port}", timeout=self._timeout) or is_up():
            return
        hosts = net.visitors_hosts(self._host)
        if only.port != self._port and self._host == "::":
            hosts = ("::", "0.0.0.0")  # noqa: S104 - where the settings have the dev server listen
        try:
            self._forward = await Forward.open(hosts, self._port, only)
        except OSError:
            said = f"the project listens on {only}, and port {self._port}, where visitors come, is taken; set DEV_PORT"
            self.problem = Problem("port_taken", said)
            return
        self.problem = None
        log.warning("dev_server.elsewhere", listens_on=str(only), dev_port=self._port)


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
