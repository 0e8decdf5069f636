"""Rooms to be tested: orchestrators that listen, over one real database, and browsers that speak Yjs to them."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
import uvicorn
import websockets
from pycrdt import Doc, Text, create_sync_message, create_update_message, handle_sync_message

from orchestrator_stub.http.application import application
from orchestrator_stub.http.requests import Requests
from orchestrator_stub.process import Server
from orchestrator_stub.rooms.routes import RoomRoutes, kept
from orchestrator_stub.rooms.service import Rooms
from tests.orchestrator.sessions.control_world import World, bearer

PATH = "src/App.tsx"


async def until(what: str, found: Callable[[], Any | Awaitable[Any]], seconds: float = 60) -> Any:
    """Ask until it is so."""
    try:
        async with asyncio.timeout(seconds):
            while True:
                value = found()
                if isinstance(value, Awaitable):
                    value = await value
                if value:
                    return value
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {seconds} s: {what}") from None


@dataclass
class Browser:
    """A browser in a room. `doc` is thrown away where the room is another one, as the page does."""

    url: str
    doc: Doc[Text] = field(default_factory=Doc)
    text: Text | None = None
    said: list[dict[str, Any]] = field(default_factory=list)
    closed: tuple[int, str] | None = None
    socket: Any = None
    synced: bool = False
    _task: asyncio.Task[None] | None = None

    async def open(self) -> Browser:
        self.socket = await websockets.connect(self.url, max_size=None)
        self._task = asyncio.create_task(self._hear())
        await until("the room answers", lambda: self.synced or self.closed)
        return self

    async def _hear(self) -> None:
        try:
            async for message in self.socket:
                if isinstance(message, str):
                    self.said.append(json.loads(message))
                    if self.said[-1]["type"] == "welcome":
                        self.text = self.doc.get(self.said[-1]["root"], type=Text)
                        await self.socket.send(create_sync_message(self.doc))
                elif message[0] == 0:
                    reply = handle_sync_message(message[1:], self.doc)
                    if reply is not None:
                        await self.socket.send(reply)
                    self.synced = self.synced or message[1] == 1
        except websockets.ConnectionClosed:
            pass
        await self.socket.wait_closed()
        self.closed = (self.socket.close_code, self.socket.close_reason)

    async def type(self, at: int, text: str) -> None:
        """Insert at a byte."""
        assert self.text is not None
        before = self.doc.get_state()
        self.text.insert(at, text)
        await self.socket.send(create_update_message(self.doc.get_update(before)))

    async def type_after(self, mark: str, text: str) -> None:
        """Type behind what stands there already, a key at a time."""
        for key in text:
            at = len(str(self.text)[: str(self.text).index(mark)].encode()) + len(mark.encode())
            mark += key
            await self.type(at, key)
            await asyncio.sleep(0.005)

    def __str__(self) -> str:
        return str(self.text)

    async def close(self) -> None:
        if self.socket is not None:
            await self.socket.close()
        if self._task is not None:
            await self._task


@dataclass
class Place:
    """One orchestrator with rooms, listening."""

    world: World
    rooms: Rooms
    url: str
    opened: list[Browser] = field(default_factory=list)

    async def ask(self, user: UUID, project: UUID, path: str = PATH) -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url) as http:
            return await http.post(
                f"/v1/projects/{project}/rooms", json={"path": path},
                headers=bearer(self.world.user_token(user)),
            )  # fmt: skip

    async def address(self, user: UUID, project: UUID, path: str = PATH) -> str:
        answer = await self.ask(user, project, path)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["url"])

    async def browser(self, user: UUID, project: UUID, path: str = PATH) -> Browser:
        browser = Browser(await self.address(user, project, path))
        self.opened.append(browser)
        return await browser.open()


@asynccontextmanager
async def place(world: World, **options: Any) -> AsyncIterator[Place]:
    """An orchestrator that listens. `options` of `Rooms`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        dsn = world.settings.database_url.get_secret_value()
        rooms = Rooms(dsn, world.pool, options.pop("address", url), **options)
        requests = Requests(world.settings, world.store, world.keys)
        routes = RoomRoutes(requests, rooms).routes()
        server = Server(uvicorn.Config(application(routes), log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        here = Place(world, rooms, url)
        try:
            async with kept(rooms):
                await until("it listens", lambda: server.started)
                yield here
        finally:
            for browser in here.opened:
                await browser.close()
            server.should_exit = True
            await serving


async def file_of(world: World, project: UUID, path: str = PATH) -> tuple[str, int]:
    """The file's text and version."""
    ((content, version),) = await world.sql(
        "select content, version from public.project_files where project_id = %s and file_path = %s"
        " and is_current_version",
        project, path,
    )  # fmt: skip
    return content, version
