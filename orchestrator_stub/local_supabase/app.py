"""Puts the stand-in for Supabase together as routes and a lifespan that an ASGI application mounts:

local = stand_in(dsn, keys, storage_dir)
app = Starlette(routes=[*local.routes, …], lifespan=local.lifespan)
uvicorn.Config(app, **uvicorn_options())
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

from psycopg_pool import AsyncConnectionPool
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute

from orchestrator_stub.local_supabase.access import Pool
from orchestrator_stub.local_supabase.auth import Auth
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.realtime.broadcast import BroadcastRoutes
from orchestrator_stub.local_supabase.realtime.faults import Faults
from orchestrator_stub.local_supabase.realtime.limits import Limits
from orchestrator_stub.local_supabase.realtime.server import Realtime
from orchestrator_stub.local_supabase.rest import RestRoutes
from orchestrator_stub.local_supabase.storage.server import Storage

SOCKET_PATHS = ("/realtime/v1/websocket", "/realtime/v1/socket/websocket", "/socket/websocket")
"""Hosted, as the clients derive it; the long form; self-hosted."""

POOL_SIZE = 8
"""Connections. Joins, RPCs and the feed share them; a join holds one for about a millisecond."""


class StandIn(NamedTuple):
    """Routes and their lifespan; `realtime` for who wants to look inside."""

    routes: list[BaseRoute]
    lifespan: Callable[[Any], AbstractAsyncContextManager[None]]
    realtime: Realtime


def stand_in(
    dsn: str,
    keys: ProjectKeys,
    storage_dir: Path,
    *,
    faults: bool = False,
    limits: Limits | None = None,
    clock: Callable[[], float] = time.time,
) -> StandIn:
    """The stand-in over the database at `dsn` (bootstrapped, as a superuser) with files in `storage_dir`.

    The lifespan opens the connections and begins once the database is being listened to; uvicorn, on its way down,
    closes every socket with 1012. `faults` adds the endpoint that misbehaves on request. `clock` gives Unix seconds.
    """
    # Checked before use: a restarted database fails no request.
    check = AsyncConnectionPool.check_connection
    pool: Pool = AsyncConnectionPool(dsn, min_size=2, max_size=POOL_SIZE, open=False, timeout=10, check=check)
    realtime = Realtime(pool, keys, limits=limits, faults=Faults() if faults else None, clock=clock)
    storage = Storage(pool, keys, storage_dir, clock=clock)
    routes: list[BaseRoute] = [
        *(WebSocketRoute(path, realtime) for path in SOCKET_PATHS),
        *_open_to_browsers(
            [
                *BroadcastRoutes(realtime).routes(),
                *storage.routes(),
                *RestRoutes(pool, keys, clock=clock).routes(),
                *Auth(pool, keys, clock=clock).routes(),
            ]
        ),
    ]

    @asynccontextmanager
    async def lifespan(_app: Any) -> AsyncIterator[None]:
        storage.open()
        async with pool, asyncio.TaskGroup() as tasks:
            feed = tasks.create_task(realtime.follow(dsn), name="realtime-feed")
            await realtime.until_listening()
            try:
                yield
            finally:
                feed.cancel()

    return StandIn(routes, lifespan, realtime)


def _open_to_browsers(routes: Sequence[Route]) -> list[Route]:
    """The routes with the gateway's CORS: any origin, because nothing here goes by cookies."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=["*"],
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["Content-Range", "ETag"],
    )
    answered = [Route(r.path, r.endpoint, methods=list(r.methods or ()), middleware=[cors]) for r in routes]
    asked = [
        Route(path, _preflight, methods=["OPTIONS"], middleware=[cors])
        for path in {r.path: None for r in routes}
    ]
    return answered + asked


async def _preflight(_: Request) -> Response:
    """An OPTIONS that is no preflight; those are answered by the middleware."""
    return Response(status_code=204)
