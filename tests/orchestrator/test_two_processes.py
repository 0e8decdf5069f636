"""Two `serve` processes on one database and one Fly, each killed by SIGKILL again and again, under load.

The rest of the suite kills an orchestrator at any step of its own; here it is the operating system that does, with
what was on its way in sockets and in PostgreSQL at that moment.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import uvicorn

from orchestrator_stub.machines.driver import owner_of
from orchestrator_stub.process import Server
from tests.fakes.fly import APP, TOKEN, Fly
from tests.orchestrator.sessions.control_world import bearer
from tests.ports import free_port
from tests.system.plane import Plane, eventually, running_plane

SESSIONS = 24
"""Enough that every kill finds some of them half-way."""


@dataclass
class Orchestrator:
    """One `serve` process, and the next one on its port."""

    port: int
    environ: dict[str, str]
    log: Path
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "orchestrator_stub", "serve", stdout=log, stderr=log,
                env={"PATH": os.environ["PATH"], "PORT": str(self.port), **self.environ},
            )  # fmt: skip

    async def kill(self, number: signal.Signals = signal.SIGKILL) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return await self.process.wait()


@asynccontextmanager
async def fly_served(fly: Fly) -> AsyncIterator[str]:
    """The fake Machines API on a port of its own; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(uvicorn.Config(fly.app(), log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            await serving


async def is_ready(http: httpx.AsyncClient, port: int) -> bool:
    try:
        return (await http.get(f"http://127.0.0.1:{port}/readyz")).status_code == 200
    except httpx.HTTPError:
        return False


def settings_of(plane: Plane, fly_url: str) -> dict[str, str]:
    return {
        "DATABASE_URL": plane.dsn,
        "SUPABASE_URL": plane.url,
        "SUPABASE_ANON_KEY": plane.keys.anon_key,
        "SUPABASE_SERVICE_ROLE_KEY": plane.keys.service_key,
        "SUPABASE_JWT_SECRET": "a secret of at least thirty-two bytes, for the tests",
        "MACHINE_DRIVER": "fly",
        "FLY_API_URL": fly_url,
        "FLY_API_TOKEN": TOKEN,
        "FLY_APP": APP,
        "FLY_PER_SECOND": "100",
        "CLAIM_SECONDS": "2",
        "SWEEP_SECONDS": "0.5",
        "CREATE_WAIT": "0",
        "TEMPLATE_DIR": "",
        "LOG_FORMAT": "json",
    }


async def test_killed_by_the_system_in_turn_they_lose_and_double_nothing(
    database: str, tmp_path: Path
) -> None:
    fly = Fly(latency=0.05, start_seconds=0.2, per_second=1000, burst=1000)
    async with (
        running_plane(database, tmp_path / "plane") as plane,
        fly_served(fly) as fly_url,
        httpx.AsyncClient(headers=bearer(plane.keys.service_key), timeout=10, trust_env=False) as http,
    ):
        projects = [(await plane.project({"a.ts": "a"})).id for _ in range(3)]
        ports = [free_port(), free_port()]
        environ = settings_of(plane, fly_url)
        both = [Orchestrator(port, environ, tmp_path / f"{port}.log") for port in ports]
        stop = asyncio.Event()

        async def asked(method: str, path: str, **content: Any) -> dict[str, Any]:
            """Of whichever answers, again and again, as a product's backend would."""

            async def answer() -> dict[str, Any] | None:
                try:
                    got = await http.request(
                        method, f"http://127.0.0.1:{random.choice(ports)}{path}", **content
                    )
                except httpx.HTTPError:
                    return None
                assert got.status_code < 500 or got.status_code == 503, got.text
                return dict(got.json()) if got.is_success else None

            found: dict[str, Any] = await eventually(f"{method} {path} is answered", answer, 60)
            return found

        async def killing() -> None:
            n = 0
            while not stop.is_set():
                await asyncio.sleep(random.uniform(0.8, 1.6))
                victim, n = both[n % 2], n + 1
                other = both[n % 2]
                # On a busy machine a start takes longer than the other's life would be, and nobody would answer.
                await eventually("the other one answers", partial(is_ready, http, other.port), 60)
                await victim.kill()
                await victim.start()

        async def client(n: int) -> tuple[str, bool]:
            """One session, asked for three times; every third is ended again."""
            for _ in range(3):
                session = await asked(
                    "POST", "/v1/sessions", json={"project_id": str(projects[n % 3])},
                    headers={"Idempotency-Key": f"key-{n}"},
                )  # fmt: skip
                await asyncio.sleep(random.uniform(0, 1.5))
            if n % 3 == 0:
                await asked("DELETE", f"/v1/sessions/{session['session_id']}")
            return session["session_id"], n % 3 != 0

        try:
            for orchestrator in both:
                await orchestrator.start()
            kill = asyncio.create_task(killing())
            told = dict(await asyncio.gather(*(client(n) for n in range(SESSIONS))))
            stop.set()
            await kill

            async def settled() -> bool:
                listed = await asked("GET", "/v1/sessions?ended=true&limit=1000")
                assert {s["session_id"] for s in listed["sessions"]} == set(told), (
                    "one for each key, and no more"
                )
                owners = [owner_of(machine["name"]) for machine in fly.live()]
                names = Counter(owner and owner[:2] for owner in owners)
                wanted = Counter(
                    (UUID(s["session_id"]), 1)
                    for s in listed["sessions"]
                    if s["state"] not in ("gone", "failed")
                )
                ended = {s["session_id"] for s in listed["sessions"] if s["state"] == "gone"}
                known = {s["machine"]["id"] for s in listed["sessions"] if s["machine"]}
                return (
                    names == wanted
                    and ended == {session_id for session_id, wanted in told.items() if not wanted}
                    and known == {machine["id"] for machine in fly.live()}
                )

            await eventually("each session has its one machine, and what was ended none", settled, 30)
            names = [machine["name"] for machine in fly.machines.values()]
            assert len(names) == len(set(names)), "none was made twice, not even for a moment"
            assert not fly.invalid
            for orchestrator in both:
                # The one that was killed last may still be starting.
                await eventually("it serves", partial(is_ready, http, orchestrator.port))
                assert await orchestrator.kill(signal.SIGTERM) == 0
        finally:
            for orchestrator in both:
                if orchestrator.process is not None and orchestrator.process.returncode is None:
                    await orchestrator.kill()
        said = "".join(orchestrator.log.read_text() for orchestrator in both)
        assert "Traceback" not in said, said[-3000:]
        assert plane.keys.service_key not in said
