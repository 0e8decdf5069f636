"""A door to be tried: real sockets, a real database, and a dev server that says exactly the bytes it is told to."""

from __future__ import annotations

import asyncio
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

from prometheus_client import CollectorRegistry
from psycopg.types.json import Jsonb

from orchestrator_stub.door.decision import Address
from orchestrator_stub.door.passes import Passes, door_keys
from orchestrator_stub.door.service import Door
from orchestrator_stub.door.store import Access, DoorStore
from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.process import listen

KEYS = f"t:{b64encode(bytes(range(32))).decode()}"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def within(
    what: str, condition: Callable[[], Awaitable[object] | object], seconds: float = 10.0
) -> Any:
    """The condition's first true value. Fails with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        value = await value if isinstance(value, Awaitable) else value
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


@dataclass
class DevServer:
    """Answers by path, with exactly the bytes of `answers`, and keeps what it was asked. `/ws` switches and echoes."""

    answers: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[bytes, bytes]] = field(default_factory=list)
    """Heads and bodies, as they came."""
    cut: set[str] = field(default_factory=set)
    """Paths after whose answer the connection ends."""
    port: int = 0
    connections: int = 0
    gone: int = 0
    """Connections that ended."""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[DevServer]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    @property
    def paths(self) -> list[str]:
        return [head.split(b" ", 2)[1].decode() for head, _ in self.asked]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                lower = head.lower()
                body = b""
                if b"content-length:" in lower:
                    body = await reader.readexactly(int(lower.split(b"content-length:")[1].split(b"\r\n")[0]))
                elif b"transfer-encoding: chunked" in lower:
                    body = await reader.readuntil(b"0\r\n\r\n")
                self.asked.append((head, body))
                path = head.split(b" ", 2)[1].decode().partition("?")[0]
                if path == "/ws":
                    writer.write(
                        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
                    )
                    while data := await reader.read(65536):
                        writer.write(data)
                    return
                if path == "/silent":
                    await reader.read()
                    return
                answer = self.answers.get(path, OK)
                writer.write(answer)
                if path in self.cut:
                    return
                if b"content-length" not in answer.lower() and b"chunked" not in answer.lower():
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.gone += 1
            writer.close()


@dataclass
class Preview:
    """One project with one session behind the door."""

    world: World
    project_id: UUID
    session_id: UUID
    label: str

    @property
    def host(self) -> str:
        return f"{self.label}.{self.world.address.domain}"

    async def code(self, path: str = "/") -> str:
        """A code, as the session API gives it."""
        url, _ = await self.world.access.open(self.project_id, self.session_id, path)
        return parse_qs(urlsplit(url).query)["code"][0]

    async def cookie(self) -> str:
        """What a browser sends that was let in."""
        version = await DoorStore(self.world.pool).version(self.session_id) or 0
        value = self.world.door.passes.cookie(self.session_id, version, time.time() + 3600)
        return f"{self.world.address.cookie.decode()}={value}"

    async def request(self, path: str = "/", method: str = "GET", *more: str, cookie: bool = True) -> bytes:
        """A request's head, with what lets it in."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}", *more]
        if cookie:
            lines.append(f"Cookie: {await self.cookie()}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def set(self, **changed: object) -> None:
        """Change the session's row."""
        for name, value in changed.items():
            kept = Jsonb(value) if isinstance(value, dict) else value
            await self.world.sql(
                f"update preview.sessions set {name} = %s where id = %s", kept, self.session_id
            )


@dataclass
class World:
    """A running door and what is around it."""

    door: Door
    port: int
    dev: DevServer
    access: Access
    address: Address
    pool: Any
    woken: list[UUID]

    async def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        async with self.pool.connection() as connection:
            cursor = await connection.execute(query.encode(), values)
            return await cursor.fetchall() if cursor.description else []

    async def preview(self, project_id: UUID | None = None, **session: object) -> Preview:
        """A session that is ready, of a project of its own."""
        if project_id is None:
            rows = await self.sql("insert into auth.users (id) values (gen_random_uuid()) returning id")
            await self.sql("insert into public.user_profiles (id) values (%s)", rows[0][0])
            rows = await self.sql(
                "insert into public.projects (owner_id) values (%s) returning id", rows[0][0]
            )
            project_id = rows[0][0]
        assert project_id is not None
        rows = await self.sql(
            "insert into preview.sessions (project_id, state, expires_at, preview_url)"
            " select %s, 'ready', now() + interval '1 hour', %s where preview.give_head(%s) returning id",
            project_id, f"http://127.0.0.1:{self.dev.port}", project_id,
        )  # fmt: skip
        found = Preview(self, project_id, rows[0][0], await DoorStore(self.pool).label(project_id))
        await found.set(**session)
        return found

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def say(self, *pieces: bytes) -> bytes:
        """What comes back for these bytes on a connection of their own, until the door closes it."""
        reader, writer = await self.connect()
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
            async with asyncio.timeout(10):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    async def ask(
        self, preview: Preview, path: str = "/", method: str = "GET", *more: str, **given: Any
    ) -> bytes:
        """The answer to one request."""
        return await self.say(await preview.request(path, method, "Connection: close", *more, **given))


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


def fields(answer: bytes, name: str) -> list[str]:
    """Every value of a field of an answer."""
    head = answer.partition(b"\r\n\r\n")[0].decode("latin-1")
    pairs = [line.partition(":") for line in head.split("\r\n")[1:]]
    return [value.strip() for key, _, value in pairs if key.lower() == name.lower()]


def body(answer: bytes) -> bytes:
    return answer.partition(b"\r\n\r\n")[2]


@asynccontextmanager
async def door_world(
    dsn: str, *, domain: str = "preview.test", open: bool = False, replay: str | None = None
) -> AsyncIterator[World]:
    """A door on a free port, over the database at `dsn`."""
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    address = Address(domain.replace("PORT", str(port)), open=open)
    woken: list[UUID] = []

    async def note(session: Any) -> None:
        woken.append(session.session_id)

    async with DevServer().running() as dev, pool_of(dsn, size=4, timeout=5) as pool:
        store = DoorStore(pool)
        door = Door(
            store, dsn, door_keys(KEYS), address, metrics=CollectorRegistry(), replay=replay, wake=note
        )
        access = Access(store, Passes(door_keys(KEYS), time.time), address)
        running = asyncio.create_task(door.run(listener))
        try:
            yield World(door, port, dev, access, address, pool, woken)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            listener.close()


def count(world: World, outcome: str) -> float:
    """How many requests ended so."""
    return world.door._requests.labels(outcome)._value.get()
