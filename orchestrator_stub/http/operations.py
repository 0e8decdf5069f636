"""Serves what operators ask: `/livez`, `/readyz`, `/metrics`, and the document of the routes, `/openapi.json`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Iterable, Mapping

import psycopg
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator_stub.http.openapi import openapi_document
from orchestrator_stub.platform.database import Pool
from orchestrator_stub.platform.tokens import KEY_PROBLEMS
from orchestrator_stub.sessions.lifecycle import ENDED, PROBLEMS, State

READY_TIMEOUT = 2.0
"""Seconds for the database to answer a readiness probe: below the usual 3 s of whoever asks."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""What requests are counted under; whatever else a client invents is `other`, lest each be a series for ever."""

PREFIX = "preview_orchestrator_"

SESSIONS = """
select state, problem, agent, count(*)
from (select state, split_part(problem, ':', 1) as problem, status ->> 'state' as agent from preview.sessions) each
group by 1, 2, 3
"""


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
        self.suspends = Counter(
            PREFIX + "suspends", "Machines that this orchestrator put to sleep.", registry=registry
        )
        self.wakes_seconds = Histogram(
            PREFIX + "wakes_seconds",
            "From the wish that a machine wakes to its agent saying that it serves what the database has.",
            buckets=(0.1, 0.2, 0.5, 1, 2, 5, 10, 20),
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
        self.troubled = Gauge(
            PREFIX + "session_problems",
            "Sessions by the problem that ended them or holds them up.",
            ["problem"],
            registry=registry,
        )
        self.agents = Gauge(
            PREFIX + "agents",
            "Agents of sessions that are not over, by the state they reported last.",
            ["state"],
            registry=registry,
        )
        self.last_sweep = Gauge(
            PREFIX + "last_sweep_timestamp_seconds",
            "When this orchestrator last swept to the end; of several, one sweeps at a time. 0: not yet.",
            registry=registry,
        )
        self.key_problems = Gauge(
            PREFIX + "key_problems",
            "What is wrong with the key set now. unread: its file gives none and the one of before is in force.",
            ["kind"],
            registry=registry,
        )
        ProcessCollector(namespace=PREFIX.rstrip("_"), registry=registry)
        PlatformCollector(registry=registry)

    def show(self, counted: Iterable[tuple[str, str | None, str | None, int]]) -> None:
        """The sessions as the database has them: state, problem, the agent's own state, how many."""
        states, problems, agents = Counts[str](), Counts[str](), Counts[str]()
        for state, problem, agent, number in counted:
            states[state] += number
            if problem:
                problems[problem] += number
            if agent and State(state) not in ENDED:
                agents[agent] += number
        self.forget()
        for each in State:
            self.sessions.labels(each.value).set(states[each.value])
        problems.update(dict.fromkeys(PROBLEMS, 0))
        for gauge, counts in ((self.troubled, problems), (self.agents, agents)):
            for label, number in counts.items():
                gauge.labels(label).set(number)

    def part_took(self, part: str, seconds: float) -> None:
        """A part of making a machine is done."""
        self.provision_seconds.labels(part).observe(seconds)

    def watch_keys(self, problems: Callable[[], Mapping[str, int]]) -> None:
        """Ask for the key set's problems at each scrape: nobody may have shown a token since the set changed."""

        def number_of(kind: str) -> Callable[[], float]:
            return lambda: problems()[kind]

        for kind in KEY_PROBLEMS:
            self.key_problems.labels(kind).set_function(number_of(kind))

    def forget(self) -> None:
        """Nothing is known of the sessions now, and nothing is said."""
        for gauge in (self.sessions, self.troubled, self.agents):
            gauge.clear()


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
                method = scope["method"] if scope["method"] in METHODS else "other"
                self._metrics.requests.labels(route, method, message["status"]).inc()
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
        except (psycopg.Error, OSError):
            return JSONResponse({"ready": False, "why": "the database does not answer"}, 503)
        return JSONResponse({"ready": True})

    async def show_metrics(request: Request) -> Response:
        try:
            async with asyncio.timeout(READY_TIMEOUT), pool.connection() as connection:
                cursor = await connection.execute(SESSIONS)
                metrics.show(await cursor.fetchall())
        except (psycopg.Error, OSError):
            metrics.forget()
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(metrics.registry), headers={"content-type": kind})

    async def openapi(_: Request) -> Response:
        return JSONResponse(openapi_document())

    table: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/livez": livez,
        "/readyz": readyz,
        "/metrics": show_metrics,
        "/openapi.json": openapi,
    }
    return [Route(path, endpoint, methods=["GET"]) for path, endpoint in table.items()]
