"""Being watched: `/livez`, `/readyz`, `/metrics`, and the document of the routes, `/openapi.json`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import psycopg_pool
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator_stub import __version__
from orchestrator_stub.app import CreateBody, SnapshotBody, StatusBody, SyncBody
from orchestrator_stub.sessions import State

READY_TIMEOUT = 2.0
"""Seconds for the database to answer a readiness probe: below the usual 3 s of whoever asks."""

PREFIX = "preview_orchestrator_"

Pool = psycopg_pool.AsyncConnectionPool[psycopg.AsyncConnection[Any]]


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


PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
}
SESSION = {
    "type": "object",
    "required": [
        "session_id", "project_id", "state", "generation", "preview_url", "created_at", "expires_at", "machine",
    ],
    "properties": {
        "session_id": {"type": "string", "format": "uuid"},
        "project_id": {"type": "string", "format": "uuid"},
        "state": {"type": "string", "enum": [state.value for state in State]},
        "generation": {"type": "integer", "minimum": 1},
        "preview_url": {"type": ["string", "null"]},
        "created_at": {"type": "string", "format": "date-time"},
        "expires_at": {"type": "string", "format": "date-time"},
        "machine": {
            "type": ["object", "null"],
            "required": ["driver", "id"],
            "properties": {
                "driver": {"type": "string"}, "id": {"type": "string"}, "region": {"type": "string"},
            },
        },
        "problem": {"type": "string"},
    },
}  # fmt: skip


def openapi_document() -> dict[str, Any]:
    """The routes of the control plane and the session API, as OpenAPI 3.1."""
    ours: list[dict[str, list[str]]] = [{"service": []}, {"user": []}]
    theirs: list[dict[str, list[str]]] = [{"session": []}]
    one = "/v1/sessions/{session_id}"
    key = {"name": "Idempotency-Key", "in": "header", "schema": {"type": "string", "maxLength": 255}}
    listing = [
        {"name": "project_id", "in": "query", "schema": {"type": "string", "format": "uuid"}},
        {"name": "ended", "in": "query", "schema": {"type": "boolean"}},
        {"name": "limit", "in": "query", "schema": {"type": "integer", "minimum": 1, "maximum": 1000}},
    ]
    session = {"$ref": "#/components/schemas/Session"}
    listed = {
        "type": "object",
        "required": ["sessions"],
        "properties": {"sessions": {"type": "array", "items": session}},
    }
    anything = {"type": "object"}
    return {
        "openapi": "3.1.0",
        "info": {"title": "preview-sync orchestrator", "version": __version__},
        "paths": {
            "/v1/sessions": {
                "post": _operation(
                    "Make a session", ours, session, body="CreateBody", made=True, extra=[key]
                ),
                "get": _operation("List sessions", ours, listed, extra=listing),
            },
            one: {
                "get": _operation("Show a session", ours, session, path=True),
                "delete": _operation("End a session", ours, session, path=True, accepted=True),
            },
            f"{one}/snapshot": {
                "post": _operation("Offer a snapshot", ours, anything, path=True, body="SnapshotBody")
            },
            f"{one}/sync": {"post": _operation("Catch up", theirs, anything, path=True, body="SyncBody")},
            f"{one}/token": {"post": _operation("Renew the token", theirs, anything, path=True)},
            f"{one}/status": {"put": _operation("Heartbeat", theirs, anything, path=True, body="StatusBody")},
        },
        "components": {
            "schemas": {
                "Session": SESSION,
                "Problem": PROBLEM,
                **{
                    form.__name__: form.model_json_schema()
                    for form in (CreateBody, SnapshotBody, SyncBody, StatusBody)
                },
            },
            "securitySchemes": {
                "service": {"type": "http", "scheme": "bearer", "description": "The service key."},
                "user": {"type": "http", "scheme": "bearer", "description": "A user's access token."},
                "session": {"type": "http", "scheme": "bearer", "description": "The session's own token."},
            },
        },
    }


def _operation(
    summary: str,
    security: list[dict[str, list[str]]],
    answer: dict[str, Any],
    *,
    body: str | None = None,
    path: bool = False,
    made: bool = False,
    accepted: bool = False,
    extra: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    content = {"application/json": {"schema": answer}}
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    parameters = list(extra or [])
    if path:
        parameters.append(
            {
                "name": "session_id",
                "in": "path",
                "required": True,
                "schema": {"type": "string", "format": "uuid"},
            }
        )
    answers = {"200": {"description": "Done.", "content": content}}
    if made:
        answers["201"] = {"description": "Made.", "content": content}
    if accepted:
        answers["202"] = {"description": "Under way.", "content": content}
    answers["default"] = {"description": "A problem, and what to do about it.", "content": problem}
    operation: dict[str, Any] = {"summary": summary, "security": security, "responses": answers}
    if parameters:
        operation["parameters"] = parameters
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body}"}
        operation["requestBody"] = {
            "required": body != "SnapshotBody",
            "content": {"application/json": {"schema": schema}},
        }
    return operation
