"""Being watched: `/livez`, `/readyz`, `/metrics`, and the document of the routes, `/openapi.json`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import psycopg
import psycopg_pool
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator_stub.database import Pool
from orchestrator_stub.openapi import openapi_document
from orchestrator_stub.sessions import State

READY_TIMEOUT = 2.0
"""Seconds for the database to answer a readiness probe: below the usual 3 s of whoever asks."""

PREFIX = "preview_orchestrator_"


class Metrics:
    """The orchestrator's own numbers. No label names a project, a session or a machine."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            PREFIX + "requests", "Answered requests.", ["route", "method", "status"], registry=registry
        )
        self.request_seconds = Histogram(
            PREFIX + "request_seconds",
            "From the request's head to the answer's.",
            ["route"],
            registry=registry,
        )
        self.ready_seconds = Histogram(
            PREFIX + "session_ready_seconds",
            "From the wish for a machine to its agent saying that the preview is served.",
            buckets=(1, 2, 5, 10, 20, 30, 60, 120, 300),
            registry=registry,
        )
        self.provision_seconds = Histogram(
            PREFIX + "provision_seconds",
            "Making a machine, by part: replace (the older one), template, snapshot, token, machine.",
            ["part"],
            buckets=(0.001, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 60),
            registry=registry,
        )
        self.sessions = Gauge(PREFIX + "sessions", "Sessions by state.", ["state"], registry=registry)


class Measured:
    """ASGI: every request counted and timed under the path of its route, not the path it asked for."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()

        async def measured(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", None) or "other"
                self._metrics.request_seconds.labels(route).observe(time.perf_counter() - started)
                self._metrics.requests.labels(route, scope["method"], message["status"]).inc()
            await send(message)

        await self._app(scope, receive, measured)


def routes(pool: Pool, metrics: Metrics) -> list[BaseRoute]:
    """To be mounted at the root beside the API."""

    async def livez(_: Request) -> Response:
        return JSONResponse({"alive": True})

    async def readyz(_: Request) -> Response:
        try:
            async with asyncio.timeout(READY_TIMEOUT), pool.connection() as connection:
                await connection.execute("select 1 from preview.sessions limit 1")
        except (psycopg.Error, psycopg_pool.PoolTimeout, OSError):
            return JSONResponse({"ready": False, "why": "the database does not answer"}, 503)
        return JSONResponse({"ready": True})

    async def show_metrics(_: Request) -> Response:
        try:
            async with asyncio.timeout(READY_TIMEOUT), pool.connection() as connection:
                cursor = await connection.execute(
                    "select state, count(*) from preview.sessions group by state"
                )
                counts = dict(await cursor.fetchall())
            for state in State:
                metrics.sessions.labels(state).set(counts.get(state.value, 0))
        except (psycopg.Error, psycopg_pool.PoolTimeout, OSError):
            metrics.sessions.clear()
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def openapi(_: Request) -> Response:
        return JSONResponse(openapi_document())

    table: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/livez": livez,
        "/readyz": readyz,
        "/metrics": show_metrics,
        "/openapi.json": openapi,
    }
    return [Route(path, endpoint, methods=["GET"]) for path, endpoint in table.items()]
