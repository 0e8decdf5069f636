"""Runs the processes that are measured: PostgreSQL, the stand-in and one orchestrator, as they are deployed.

Sessions and their projects are put into the database by SQL, for making them one by one takes longer than all else, and
so are their machines into a Fly API in memory, which answers the sweeps.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import httpx
import psycopg
import uvicorn

from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.machines.driver import machine_name, mark_of
from orchestrator_stub.platform.tokens import Keyring, mint_session
from orchestrator_stub.process import Server
from soak.program import Program
from tests.fakes.fly import APP, TOKEN, Fly

SECRET: Final = "a secret of the capacity run, at least thirty-two bytes"

FILES: Final = 30
"""Of each project, 2 KB each: what a tree hash goes over."""

TTL: Final = 600.0
"""Seconds of a session's token, as the settings have it."""

PROJECTS: Final = """
with owner as (select id from public.user_profiles limit 1),
made as (
  insert into public.projects (owner_id) select owner.id from owner, generate_series(1, %(count)s) returning id),
files as (
  insert into public.project_files (project_id, file_path, file_type, content, content_hash, version, created_by,
    revision, size_bytes)
  select made.id, 'src/file' || n || '.ts', 'typescript', text, encode(sha256(text::bytea), 'hex'), 1, owner.id, 1, 2000
  from made, owner, generate_series(0, %(files)s - 1) n, lateral (select rpad(made.id::text || n, 2000, 'x') as text) t)
insert into preview.sessions (project_id, state, expires_at, lease_until, machine_id, machine_driver)
select made.id, 'ready', now() + interval '8 h', now() + interval '1 h', 'm' || made.id, 'fly' from made
returning id, project_id
"""


@dataclass(frozen=True, slots=True)
class Row:
    """One session as the database has it; `number` counts them."""

    number: int
    id: UUID
    project_id: UUID


class Stack:
    """All of it, below `place`; `running` makes it."""

    def __init__(self, place: Path) -> None:
        self.rows: list[Row] = []
        self.owner = UUID(int=0)
        self.dsn = ""
        self.url, self.control_url = "", ""
        self.keyring = Keyring.from_secret(SECRET)
        self.keys = ProjectKeys.of(self.keyring)
        self.fly = Fly(per_second=1e9, burst=10**9)
        self._place = place
        self._postgres = EmbeddedPostgres(
            place / "postgres",
            options={"shared_buffers": "512MB", "max_wal_size": "8GB", "max_connections": "100"},
        )
        self.realtime: Program
        self.orchestrator: Program
        self._mark = ""

    @property
    def pids(self) -> dict[str, int]:
        """By what is measured. PostgreSQL's is the first of its processes."""
        found = {
            "orchestrator": self.orchestrator.pid, "realtime": self.realtime.pid, "postgres": self._postgres.pid,
        }  # fmt: skip
        assert all(found.values()), found
        return {name: pid for name, pid in found.items() if pid is not None}

    async def start(self, fly_url: str) -> None:
        """Raises `CannotRun`, `EmbeddedPostgresError`."""
        self.dsn = await self._postgres.start()
        here, there = _free_ports(2)
        self.url, self.control_url = f"http://127.0.0.1:{here}", f"http://127.0.0.1:{there}"
        common = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ},
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "DATABASE_URL": self.dsn, "SUPABASE_JWT_SECRET": SECRET, "LOG_LEVEL": "warning", "LOG_FORMAT": "json",
        }  # fmt: skip
        command = (sys.executable, "-m", "orchestrator_stub")
        self.realtime = Program(
            "stand-in", (*command, "stand-in"),
            {**common, "STORAGE_DIR": str(self._place / "storage"), "PORT": str(here)},
            self._place / "stand-in.log", lambda: _answers(f"{self.url}/livez"),
        )  # fmt: skip
        self.orchestrator = Program(
            "orchestrator", (*command, "serve"),
            {
                **common, "SUPABASE_URL": self.url, "SUPABASE_ANON_KEY": self.keys.anon_key, "PORT": str(there),
                "SUPABASE_SERVICE_ROLE_KEY": self.keys.service_key, "TEMPLATE_DIR": "",
                "MACHINE_DRIVER": "fly", "FLY_API_URL": fly_url, "FLY_API_TOKEN": TOKEN, "FLY_APP": APP,
                # For a while sessions say only what they are asked for.
                "LEASE_SECONDS": "3600",
            },
            self._place / "orchestrator.log", lambda: _answers(f"{self.control_url}/readyz"),
        )  # fmt: skip
        await self.realtime.start()
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            await connection.execute("update preview.settings set writes_per_minute = 1000000000")
            made = await connection.execute(
                "insert into auth.users (id) values (gen_random_uuid()) returning id"
            )
            [self.owner] = await made.fetchone() or [self.owner]
            await connection.execute("insert into public.user_profiles (id) values (%s)", [self.owner])
        await self.orchestrator.start()
        async with await psycopg.AsyncConnection.connect(self.dsn) as connection:
            found = await (await connection.execute("select id from preview.installation")).fetchone()
            assert found is not None
            self._mark = mark_of(found[0])

    async def stop(self) -> None:
        for program in (self.orchestrator, self.realtime):
            await program.stop()
        await self._postgres.stop()

    async def grow_to(self, count: int) -> list[Row]:
        """Make sessions until there are so many; the new ones."""
        made: list[Row] = []
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            while len(self.rows) + len(made) < count:
                some = min(200, count - len(self.rows) - len(made))
                cursor = await connection.execute(PROJECTS, {"count": some, "files": FILES})
                for session_id, project_id in await cursor.fetchall():
                    made.append(Row(len(self.rows) + len(made), session_id, project_id))
                    self._machine(session_id, project_id)
            ids = [row.project_id for row in made]
            await connection.execute(
                "update public.project_heads set revision = 1 where project_id = any(%s)", [ids]
            )
            await connection.execute("analyze")
        self.rows.extend(made)
        return made

    def token(self, row: Row) -> str:
        """A session's first token."""
        return mint_session(
            self.keyring, project_id=row.project_id, session_id=row.id, generation=1, role="preview_agent",
            now=time.time(), ttl=TTL,
        )  # fmt: skip

    def _machine(self, session_id: UUID, project_id: UUID) -> None:
        machine_id = f"m{project_id}"
        self.fly.machines[machine_id] = {
            "id": machine_id, "name": machine_name(self._mark, session_id, 1), "state": "started", "region": "ams",
            "config": {}, "created_at": "2026-01-01T00:00:00Z", "_since": 0.0,
        }  # fmt: skip


@asynccontextmanager
async def running(place: Path) -> AsyncIterator[Stack]:
    """A stack that runs. Raises `CannotRun`, `EmbeddedPostgresError`."""
    stack = Stack(place)
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(uvicorn.Config(stack.fly.app(), log_config=None, access_log=False))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await stack.start(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")
        yield stack
    finally:
        await stack.stop()
        server.should_exit = True
        await serving


async def _answers(url: str) -> bool:
    try:
        async with httpx.AsyncClient(trust_env=False, verify=False) as http:
            return (await http.get(url)).is_success
    except httpx.HTTPError:
        return False


def _free_ports(count: int) -> Sequence[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
