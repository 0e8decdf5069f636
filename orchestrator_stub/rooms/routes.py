"""Serves the way into a room: a code for a member, and the socket that it opens."""

from __future__ import annotations

import asyncio
import importlib.util
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import quote
from uuid import UUID

from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket

from orchestrator_stub.config import Settings
from orchestrator_stub.http.bodies import RoomBody
from orchestrator_stub.http.forms import json_answer, rfc3339
from orchestrator_stub.http.problems import Refusal
from orchestrator_stub.http.requests import Requests
from orchestrator_stub.platform.database import Pool
from orchestrator_stub.rooms.store import CODE_SECONDS, digest_of

if TYPE_CHECKING:
    from orchestrator_stub.rooms.service import Rooms


class RoomRoutes:
    """For members who may write. `rooms` None: the extra `collab` is not installed."""

    def __init__(self, requests: Requests, rooms: Rooms | None) -> None:
        self._requests = requests
        self._rooms = rooms

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        return [
            self._requests.route("/v1/projects/{project_id}/rooms", POST=self.room),
            WebSocketRoute("/v1/rooms/{project_id}/{path:path}", self.enter_room),
        ]

    async def room(self, request: Request) -> Response:
        """An address that lets the asker into a file's room within a minute, once."""
        caller, project_id = await self._requests.project(request)
        body = await self._requests.body(request, RoomBody)
        if caller.user is None or not await self._requests.may(caller, project_id, "write"):
            raise Refusal(403, "not_allowed", "Only members who may write may do that, with their own token.")
        if self._rooms is None:
            raise Refusal(
                503, "no_rooms", "This orchestrator has no rooms: the extra `collab` is not installed."
            )
        code = secrets.token_urlsafe(32)
        store = self._rooms.store
        if not await store.give_code(digest_of(code), project_id, body.path, UUID(str(caller.user["sub"]))):
            raise Refusal(
                429, "too_many_codes", "Use the codes that you have, or wait a minute.", retry_after=10
            )
        held = await store.held(project_id, body.path)
        address = (held.address if held else store.address).replace("http", "ws", 1).rstrip("/")
        url = f"{address}/v1/rooms/{project_id}/{quote(body.path, safe='/')}?code={code}"
        return json_answer({"url": url, "expires_at": rfc3339(time.time() + CODE_SECONDS)})

    async def enter_room(self, socket: WebSocket) -> None:
        """A browser comes with its code."""
        code = socket.query_params.get("code", "")
        try:
            project_id = UUID(socket.path_params["project_id"])
        except ValueError:
            await socket.close(4401)
            return
        if self._rooms is None:
            await socket.close(4503)
            return
        await self._rooms.serve(socket, project_id, socket.path_params["path"], code)


def rooms_of(settings: Settings, pool: Pool, registry: CollectorRegistry | None = None) -> Rooms | None:
    """The rooms of this process; None without pycrdt, which the extra `collab` brings."""
    if importlib.util.find_spec("pycrdt") is None:
        return None
    from orchestrator_stub.rooms.service import Rooms

    address = str(settings.rooms_url or settings.agent_facing_url)
    return Rooms(settings.database_url.get_secret_value(), pool, address, registry=registry)


@asynccontextmanager
async def kept(rooms: Rooms | None) -> AsyncIterator[Rooms | None]:
    """Have the rooms kept while the block runs, and what is in them saved at its end."""
    if rooms is None:
        yield None
        return
    running = asyncio.create_task(rooms.run(), name="rooms")
    try:
        yield rooms
    finally:
        await rooms.close()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
