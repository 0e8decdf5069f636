"""Measures the control plane: answers a second, sessions made at once, and seconds until one preview is ready.

- Answers: `sync` when nothing is missing, against a bare route of the same server in the same process. Ours looks up
  token, session and project; the route returns a constant. One raw-socket client asks both.
- Sessions: seconds until 200 asked for at once are ready, on a fake Fly that keeps Fly's limit (forty a second here,
  one a second there); the note says what the limit alone takes. None is made twice, no request is above the limit.
- One preview: from the request to `ready` on the local driver, with a cached snapshot, a real agent and a real Vite.
  Its parts follow each other without a gap: those of the request from the orchestrator's metrics, those of the agent
  from its log's timestamps.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from uuid import UUID

import httpx
import structlog
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from bench.cases.start import log_moments
from bench.harness.results import Row, in_turn, ratio_of
from orchestrator_stub.http.application import application
from orchestrator_stub.http.requests import Requests
from orchestrator_stub.http.routes.agents import AgentRoutes
from orchestrator_stub.http.routes.sessions import SessionRoutes
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.machines.driver import owner_of
from orchestrator_stub.machines.fly import FlyMachines, FlyShape
from orchestrator_stub.machines.fly_api import Buckets, FlyApi, Rate
from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.platform.migrations import bootstrap, migrate
from orchestrator_stub.platform.sealing import SealingKeys
from orchestrator_stub.platform.tokens import Keyring, new_hs256
from orchestrator_stub.sessions.catchup import Catchup
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.run_settings import RunSettings
from orchestrator_stub.sessions.shown import Screens
from orchestrator_stub.sessions.store import SessionStore
from tests.fakes.fly import APP, TOKEN, Fly
from tests.fakes.machines import Platform
from tests.orchestrator.sessions.control_world import (
    SERVICE_KEY,
    PaperAssets,
    PaperSnapshots,
    World,
    bearer,
    control_world,
    in_process,
    settings_for,
)
from tests.system.stack import Stack, copy_example

AT_LEAST = 0.5
"""Of the bare route's rate."""

AT_ONCE = 8
"""Connections of the client: more than the server's one core can serve."""

NAMES = {
    "snapshot": "snapshot from the cache, signed",
    "token": "token minted",
    "machine": "machine started",
    "request": "the rest of the request",
    "wired": "agent: process to wired",
    "hydrated": "agent: hydrated",
    "installed": "agent: dependencies installed",
    "served": "agent: dev server serves the page",
    "reported": "ready reported, and seen",
    "ready": "all of it",
}
AGENT = {
    "wired": "agent.started",
    "hydrated": "hydrate.done",
    "installed": "install.done",
    "served": "dev_server.state:ready",
}
"""The agent's parts, each ending with this line of its log."""

SESSIONS = 200
FLY = Rate(40.0, 20)


def run(quick: bool) -> Sequence[Row]:
    """Answers, sessions at once, one preview."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with tempfile.TemporaryDirectory(prefix="bench-control-") as place, asyncio.Runner() as runner:
        server = EmbeddedPostgres(Path(place) / "postgres")
        dsn = runner.run(server.start())
        try:
            runner.run(_prepare(dsn))
            rows = [_sync_rate(dsn, quick), *runner.run(_many(dsn, 50 if quick else SESSIONS))]
        finally:
            runner.run(server.stop())
        return [*rows, *_one_preview(Path(place), 2 if quick else 5)]


async def _prepare(dsn: str) -> None:
    await bootstrap(dsn)
    await migrate(dsn)


# --- sync beside a bare route


def _sync_rate(dsn: str, quick: bool) -> Row:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, dsn), daemon=True)
    process.start()
    try:
        port, sync, bare = ours.recv()
        seconds = 0.5 if quick else 1.0
        samples = in_turn(
            {
                "sync": lambda: asyncio.run(_rate(port, sync, seconds)),
                "bare": lambda: asyncio.run(_rate(port, bare, seconds)),
            },
            5 if quick else 15,
        )
    finally:
        process.terminate()
        process.join()
    return Row(
        "sync answering `current`",
        median(samples["sync"]),
        "answers/s",
        "a bare route",
        median(samples["bare"]),
        ratio_of(samples["sync"], samples["bare"]),
        sense="speed",
        at_least=AT_LEAST,
        samples=len(samples["sync"]),
    )


def _serve(pipe: Connection, dsn: str) -> None:
    asyncio.run(_serve_until_ended(pipe, dsn))


async def _serve_until_ended(pipe: Connection, dsn: str) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    async with control_world(dsn) as world:
        session = await world.session()
        await world.write(UUID(session["project_id"]), "a.ts", "a\n")
        [[epoch]] = await world.sql(
            "select epoch::text from public.project_heads where project_id = %s", session["project_id"]
        )
        form = b'{"kind":"current","epoch":"%s","revision":1}' % epoch.encode()

        async def bare(request: Request) -> Response:
            await request.body()
            return Response(form, media_type="application/json")

        catchup = Catchup(world.pool, world.snapshots, world.assets, inline_limit=2_000_000)
        requests = Requests(world.settings, world.store, world.keys)
        screens = Screens("", world.store)
        api = AgentRoutes(requests, world.settings, world.controller, world.store, catchup, screens)
        app = application([*api.routes(), Route("/bare", bare, methods=["POST"])])
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve([listener]))
        async with asyncio.timeout(30):
            while not server.started:
                if serving.done():
                    await serving
                await asyncio.sleep(0.005)
        body = b'{"epoch":"%s","revision":1,"reason":"head"}' % epoch.encode()
        token = world.token(session, ttl=3600)
        sync = _request(f"/v1/sessions/{session['session_id']}/sync", token, body)
        pipe.send((listener.getsockname()[1], sync, _request("/bare", token, body)))
        await serving


def _request(path: str, token: str, body: bytes) -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def _rate(port: int, request: bytes, seconds: float) -> float:
    """Answers a second to `AT_ONCE` clients that each wait for the last before the next."""
    deadline = time.perf_counter() + seconds

    async def client() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answered = 0
        while time.perf_counter() < deadline:
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            body = await reader.readexactly(length)
            assert b'"current"' in body
            answered += 1
        writer.close()
        return answered

    started = time.perf_counter()
    total = sum(await asyncio.gather(*(client() for _ in range(AT_ONCE))))
    return total / (time.perf_counter() - started)


# --- many at once


@asynccontextmanager
async def _on_fly(dsn: str, fly: Fly) -> AsyncIterator[World]:
    settings = settings_for(dsn, create_wait=0)
    keys = Keyring.from_jwks({"keys": [new_hs256("h")]})
    snapshots, assets = PaperSnapshots(), PaperAssets()
    async with pool_of(dsn, timeout=30) as pool, httpx.AsyncClient(transport=fly.transport()) as http:
        store = SessionStore(pool)
        api = FlyApi("http://fly.invalid/v1", APP, TOKEN, http, buckets=Buckets(), writes=FLY)
        driver = FlyMachines(api, FlyShape(APP, "image"))
        installation = await store.installation()
        runs = RunSettings(pool, SealingKeys())
        controller = SessionController(
            settings, store, snapshots, driver, keys, runs=runs, installation=installation
        )
        catchup = Catchup(pool, snapshots, assets, inline_limit=2_000_000)
        requests, screens = Requests(settings, store, keys), Screens("", store)
        transport = in_process(
            SessionRoutes(requests, settings, controller, store, snapshots, runs, screens),
            AgentRoutes(requests, settings, controller, store, catchup, screens),
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://x", timeout=120) as client:
            yield World(
                settings,
                pool,
                keys,
                Platform(),
                snapshots,
                assets,
                store,
                controller,
                client,
                installation,
                screens,
            )
            await controller.close()


async def _many(dsn: str, count: int) -> list[Row]:
    fly = Fly(latency=0.05, start_seconds=0.5, per_second=FLY.per_second, burst=FLY.burst)
    async with _on_fly(dsn, fly) as world:
        projects = [await world.project() for _ in range(10)]
        started = time.perf_counter()
        ready_after: list[float] = []

        async def one(n: int) -> None:
            session = (await world.create(projects[n % 10], key=f"bench-{n}")).json()
            session_id = UUID(session["session_id"])
            while True:
                mine = [m for m in fly.live() if (owner_of(m["name"]) or (None,))[0] == session_id]
                if mine:
                    break
                await asyncio.sleep(0.05)
            # What its agent would say once it serves.
            answer = await world.http.put(
                f"/v1/sessions/{session_id}/status",
                json={"state": "serving", "revision": 0},
                headers=bearer(mine[0]["config"]["env"]["REALTIME_TOKEN"]),
            )
            assert answer.status_code == 200, answer.text
            shown = await world.http.get(f"/v1/sessions/{session_id}", headers=bearer(SERVICE_KEY))
            assert shown.json()["state"] == "ready", shown.text
            ready_after.append(time.perf_counter() - started)

        await asyncio.gather(*(one(n) for n in range(count)))
        assert len(ready_after) == len(fly.live()) == count, "each has one machine"
        assert len({machine["name"] for machine in fly.live()}) == count
        assert fly.answers[429] == 0, f"{fly.answers[429]} requests were above Fly's limit"
        assert not fly.invalid, fly.invalid[:3]
    floor = max(count - FLY.burst, 0) / FLY.per_second
    note = f"the limit alone takes {floor:.1f} s; 0 answers 429, 0 machines twice"
    return [Row(f"{count} sessions at once, fake Fly", max(ready_after), "s until all are ready", note=note)]


# --- one preview, for real


def _one_preview(place: Path, rounds: int) -> list[Row]:
    stack = Stack(copy_example(place / "app"), place / "state", ("--no-watch",))
    taken: dict[str, list[float]] = {part: [] for part in NAMES}
    try:
        stack.start()
        url, key = stack.info["orchestrator_url"], stack.info["service_key"]
        with httpx.Client(base_url=url, headers=bearer(key), timeout=60) as http:
            for _ in range(rounds):
                for part, seconds in _one_session(http, stack.info["project_id"], place / "state").items():
                    taken[part].append(seconds * 1000)
    finally:
        stack.kill()
    whole = median(taken["ready"])
    return [
        Row(
            f"session to ready: {NAMES[part]}",
            median(each),
            "ms",
            samples=rounds,
            note="" if part == "ready" else f"{median(each) / whole:.0%}",
        )
        for part, each in taken.items()
    ]


def _one_session(http: httpx.Client, project_id: str, state: Path) -> dict[str, float]:
    """Seconds of each part of one session's start."""
    before = _parts(http)
    began = time.time()
    session = http.post("/v1/sessions", json={"project_id": project_id}).json()
    answered = time.time()
    parts = {part: after - before.get(part, 0.0) for part, after in _parts(http).items()}
    log = state / "machines" / session["session_id"] / "agent.log"
    while session["state"] != "ready":
        assert time.time() - began < 120, session
        assert session["state"] not in ("failed", "gone"), session
        time.sleep(0.01)
        session = http.get(f"/v1/sessions/{session['session_id']}").json()
    ready = time.time()
    moments = dict(reversed(log_moments(log.read_text())))
    http.delete(f"/v1/sessions/{session['session_id']}")
    taken = {part: parts[part] for part in ("snapshot", "token", "machine")}
    taken["request"] = answered - began - sum(taken.values())
    at = answered
    for part, event in AGENT.items():
        taken[part] = moments[event] - at
        at = moments[event]
    return {**taken, "reported": ready - at, "ready": ready - began}


def _parts(http: httpx.Client) -> dict[str, float]:
    """What the orchestrator spent on each part of making machines, in all."""
    return {
        sample.labels["part"]: sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if sample.name == "preview_orchestrator_provision_seconds_sum"
    }
