"""Listens, accepts within bounds, and stops in order: the door as a whole."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Final
from uuid import UUID

import psycopg
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from orchestrator_stub.door import pages
from orchestrator_stub.door.connection import Connection
from orchestrator_stub.door.decision import Address, Behind
from orchestrator_stub.door.passes import Passes
from orchestrator_stub.door.registry import GAP_SECONDS, Away, Registry
from orchestrator_stub.door.store import DoorStore
from orchestrator_stub.door.upstream import PIECE, Unreachable, connect, keep_alive, target_of
from orchestrator_stub.platform.tokens import Keyring

log = structlog.get_logger("door")

MOST_CONNECTIONS: Final = 10_000
"""Of one door. Each takes two descriptors at most; more doors take more."""
STOP_SECONDS: Final = 5.0
"""For requests under way at a stop. Sockets are ended at once: their pages come back by themselves."""
READY_SECONDS: Final = 10.0
"""From an agent that serves to a door that knows: a report, a row and a notification."""
EVENT_SECONDS: Final = 1.0
QUIET_SECONDS: Final = 15.0
"""After which a silent stream of events says that it lives: proxies close what is silent for a minute."""

OUTCOMES: Final = (
    "passed", "upgraded", "replayed", "entered", "checked", "blocked", "waiting", "woken", "followed", "probe",
    "refused", "malformed", "too_many", "unreachable", "bad_answer", "closed", "revoked",
)  # fmt: skip
"""What becomes of requests, as they are counted. `closed`: the database does not say who may come in; `revoked`: an
open exchange was ended because it was no longer allowed."""

WakeSession = Callable[[Behind], Awaitable[None]]


class Door:
    """One door. `run` serves `listener` until it is cancelled, then stops in order.

    Args:
        store: What stands behind which label.
        dsn: For LISTEN, which needs a connection with a session of its own.
        keys: What codes and cookies are signed with.
        address: Under which names it is reached.
        metrics: Where it counts.
        replay: The Fly app whose proxy is asked to replay requests to its machines; None: the door proxies.
        wake: Told of a session that sleeps and that somebody wants to see, beside the note of it in the database.
        now: Unix seconds.
    """

    def __init__(
        self,
        store: DoorStore,
        dsn: str,
        keys: Keyring,
        address: Address,
        *,
        metrics: CollectorRegistry,
        replay: str | None = None,
        wake: WakeSession | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.address = address
        self.replay = replay
        self.now = now
        self._wake = wake
        self.passes = Passes(keys, now)
        self._store = store
        self._connections: dict[Connection, asyncio.Task[None] | None] = {}
        self.draining = False
        self._requests = Counter(
            "preview_orchestrator_door_requests", "Requests at the door, by what became of them.", ["outcome"],
            registry=metrics,
        )  # fmt: skip
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self.sockets = Gauge(
            "preview_orchestrator_door_sockets", "Sockets that are open after an upgrade.", registry=metrics
        )
        open_now = Gauge("preview_orchestrator_door_connections", "Open connections.", registry=metrics)
        open_now.set_function(lambda: len(self._connections))
        self.registry = Registry(
            store, dsn, open=address.open, on_closed=lambda: self.count("revoked"), now=now
        )

    async def wake(self, session: Behind) -> None:
        """Have a session woken if it sleeps; one that is not ready otherwise is being started.

        The note outlives a wake that fails, or whoever was at it: the page asks once, and a sweep goes on.
        """
        if session.state != "suspended":
            return
        try:
            await self._store.want_awake(session.session_id)
            if self._wake is not None:
                await self._wake(session)
        except (psycopg.Error, OSError) as error:
            log.warning("door.not_woken", session_id=str(session.session_id), reason=type(error).__name__)

    async def until_ready(self, label: str, session_id: UUID) -> None:
        """Wait until a session's preview is shown instead of the waiting page, for `READY_SECONDS` at most."""
        with suppress(TimeoutError, Away):
            async with asyncio.timeout(READY_SECONDS):
                while True:
                    standing = await self.registry.of(label) or ()
                    if any(each.ready and each.session_id == session_id for each in standing):
                        return
                    await asyncio.sleep(GAP_SECONDS)

    def count(self, outcome: str) -> None:
        """Count one request."""
        self._requests.labels(outcome).inc()

    async def run(self, listener: socket.socket) -> None:
        """Serve `listener` until cancelled."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(self._protocol, sock=listener, backlog=1024)
        try:
            await self.registry.run()
        finally:
            self.draining = True
            server.close()
            await self._stop()

    async def _stop(self) -> None:
        for connection in list(self._connections):
            if not connection.busy or connection.endless:
                connection.abort()
        tasks = [task for task in self._connections.values() if task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_SECONDS)
        for connection in list(self._connections):
            connection.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _protocol(self) -> asyncio.Protocol:
        return ClientProtocol(self)

    async def serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: ClientProtocol
    ) -> None:
        """Serve one accepted connection."""
        if len(self._connections) >= MOST_CONNECTIONS:
            self.count("too_many")
            writer.transport.abort()
            return
        keep_alive(writer)
        connection = Connection(self, reader, writer)
        client.gone = connection.gone
        self._connections[connection] = asyncio.current_task()
        try:
            await connection.run()
        except Exception:
            log.exception("door.failed")
        finally:
            del self._connections[connection]

    async def progress(self, label: str, session: Behind) -> AsyncIterator[bytes]:
        """How a start goes on, as lines of an event stream, empty where there is nothing new; ends with the start."""
        told, quiet = "", 0.0
        while True:
            text = await self._told(label, session)
            quiet += EVENT_SECONDS
            if text != told or quiet >= QUIET_SECONDS:
                yield f"data: {text}\n\n".encode() if text != told else b": still here\n\n"
                told, quiet = text, 0.0
            else:
                yield b""
            if json.loads(text)["ready"]:
                return
            await asyncio.sleep(EVENT_SECONDS)

    async def _told(self, label: str, session: Behind) -> str:
        with suppress(Away, psycopg.Error, OSError):
            standing = await self.registry.of(label) or ()
            now = next((each for each in standing if each.session_id == session.session_id), None)
            if now is not None and now.ready and await _answers(now.preview_url):
                return pages.told(None, ready=True)
            return pages.told(await self._store.progress(session.session_id), ready=False)
        return pages.told(
            {"session": "starting", "agent": None, "problem": None, "problems": None}, ready=False
        )


async def _answers(preview_url: str | None) -> bool:
    """Whether something accepts connections where the preview should be."""
    try:
        (await connect(target_of(preview_url))).abort()
    except Unreachable:
        return False
    return True


class ClientProtocol(asyncio.StreamReaderProtocol):
    """A stream that says when its other side left, also while nobody reads from it."""

    def __init__(self, door: Door) -> None:
        loop = asyncio.get_running_loop()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await door.serve(reader, writer, self)

        super().__init__(asyncio.StreamReader(limit=PIECE, loop=loop), serve, loop=loop)
        self.gone: Callable[[], None] = lambda: None

    def eof_received(self) -> bool:
        self.gone()
        return bool(super().eof_received())

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone()
        super().connection_lost(exc)
