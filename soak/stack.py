"""The processes of a soak: PostgreSQL, the stand-in, `preview-orchestrator serve`, and the machines that it makes.

    STATE/postgres     STATE/storage     STATE/keys.json     STATE/*.log
    STATE/machines/{session}   as `orchestrator_stub.machines.local` has them
    STATE/clocks/{session}     by how many seconds that machine's wall clock is wrong
    STATE/projects/{number}    the editors' directories

Everything is asked for as the product asks: sessions by the control plane's HTTP API, saves by RPC, faults of the
realtime server by its own endpoint. Only the database's crash and the kills are our own doing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psutil
import psycopg
from psycopg.rows import dict_row

from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.machines.local import LocalMachines
from orchestrator_stub.machines.processes import Record
from orchestrator_stub.platform.migrations import bootstrap, migrate
from orchestrator_stub.platform.tokens import Keyring, local_keyring
from soak.disk import MachinesDisk
from soak.program import CannotRun, Program

TOKEN_TTL = 60
"""Seconds, the least that the settings allow: every agent renews its token each 42 s."""

READY_SECONDS = 300.0
"""For all the first machines to report `ready`: npm install and twenty starts on shared cores."""

CLEANED_WITHIN = 120.0
"""Seconds for what deleted projects left to be cleared away at the end; the orchestrator looks every few."""

GIVES_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}
"""For the two servers: glibc gives freed memory back, as an agent does at each heartbeat. Otherwise the large bodies of
saves and snapshots raise a process's memory for a quarter of an hour before it stays, and a leak could not be told from
it: without this, a stand-in that was just started rose by 3 MB in four minutes, and one that had served 10,000 commits
by 0.3 MB in the next 12,000."""

THROWAWAY = {"fsync": "off", "full_page_writes": "off"}
"""What crashes is a process, not the machine, so nothing needs a flush to the disk. But a commit is in the log before
it is answered: a database that forgot acknowledged commits would give their revisions out again."""


@dataclass
class Session:
    """One agent's session, as the product's backend knows it."""

    number: int
    project_id: UUID
    key: str
    id: UUID
    generation: int = 1


class Stack:
    """All of it. `start` before anything else; `stop` whatever happened."""

    def __init__(self, state: Path) -> None:
        self.state = state.absolute()
        self.sessions: dict[int, Session] = {}
        self.dsn = ""
        self.keyring: Keyring
        self.keys: ProjectKeys
        self.http: httpx.AsyncClient
        self.deleted: list[UUID] = []
        """Projects that were made and deleted while the others were worked on."""
        """To the stand-in, with the service key."""
        self.control: httpx.AsyncClient
        """To the orchestrator, with the service key."""
        self.supabase: Program
        self.orchestrator: Program
        self.url = ""
        self.disk = MachinesDisk(self.state / "machines")
        self._postgres = EmbeddedPostgres(self.state / "postgres", options=THROWAWAY)

    @property
    def programs(self) -> tuple[Program, Program]:
        return self.supabase, self.orchestrator

    async def start(self) -> None:
        """Everything but the sessions. Raises `CannotRun`, `EmbeddedPostgresError`."""
        await self._clean()
        self.state.mkdir(parents=True)
        self.clocks.mkdir()
        self.disk.mount()
        self.keyring = local_keyring(self.state / "keys.json")
        self.keys = ProjectKeys.of(self.keyring)
        self.dsn = await self._postgres.start()
        await bootstrap(self.dsn)
        await migrate(self.dsn)
        here, there = _free_ports(2)
        self.url, control_url = f"http://127.0.0.1:{here}", f"http://127.0.0.1:{there}"
        bearer = {"apikey": self.keys.service_key, "authorization": f"Bearer {self.keys.service_key}"}
        self.http = httpx.AsyncClient(base_url=self.url, headers=bearer, timeout=30, trust_env=False)
        self.control = httpx.AsyncClient(base_url=control_url, headers=bearer, timeout=30, trust_env=False)
        common = {
            **{name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ},
            **GIVES_BACK,
            "DATABASE_URL": self.dsn,
            "JWT_KEYS_FILE": str(self.state / "keys.json"),
        }
        self.supabase = Program(
            "supabase",
            (sys.executable, "-m", "soak.supabase"),
            {
                **common,
                "STORAGE_DIR": str(self.state / "storage"),
                "PORT": str(here),
                "PYTHONPATH": str(Path(__file__).parents[1]),
            },
            self.state / "supabase.log",
            lambda: _answers(self.http, "/realtime/v1/faults"),
        )
        self.orchestrator = Program(
            "orchestrator",
            (sys.executable, "-m", "soak.orchestrator"),
            {
                **common,
                "SOAK_CLOCKS": str(self.clocks),
                "PYTHONPATH": str(Path(__file__).parents[1]),
                "SUPABASE_URL": self.url,
                "SUPABASE_ANON_KEY": self.keys.anon_key,
                "SUPABASE_SERVICE_ROLE_KEY": self.keys.service_key,
                "PORT": str(there),
                "MACHINES_DIR": str(self.state / "machines"),
                "MACHINE_DRIVER": "local",
                "TOKEN_TTL": str(TOKEN_TTL),
                "LOG_FORMAT": "json",
            },
            self.state / "orchestrator.log",
            lambda: _answers(self.control, "/readyz"),
        )
        await self.supabase.start()
        await self.orchestrator.start()

    async def _clean(self) -> None:
        """End what an earlier soak on this directory left, were it killed, and begin with nothing."""
        if self.state.exists():
            earlier = LocalMachines(self.state / "machines", environment={})
            for machine in await earlier.list():
                await earlier.retire(machine.id)
            if os.path.ismount(self.disk.place):
                self.disk.mounted = True
                self.disk.unmount()
            await asyncio.to_thread(shutil.rmtree, self.state)

    async def project(self, project_id: UUID, owner: UUID) -> None:
        """A project and its owner, as a product's sign-up makes them."""
        async with await self.connect() as connection:
            await connection.execute(
                "insert into auth.users (id, email) values (%s, %s)", (owner, f"{owner.hex}@soak.invalid")
            )
            await connection.execute(
                "insert into public.user_profiles (id, display_name) values (%s, 'soak')", (owner,)
            )
            await connection.execute(
                "insert into public.projects (id, owner_id, name) values (%s, %s, 'soak')",
                (project_id, owner),
            )

    async def delete_one_more(self, files: int) -> str:
        """Make a project beside the others, with texts and binary files, and delete it. Says what it had."""
        project_id = uuid4()
        await self.project(project_id, uuid4())
        changes: list[dict[str, Any]] = []
        for number in range(files):
            content = f"{project_id} {number}".encode() * 100
            digest = hashlib.sha256(content).hexdigest()
            place = f"/storage/v1/object/project-assets/{project_id}/{digest}"
            (await self.http.post(place, content=content)).raise_for_status()
            changes.append({"file_path": f"{number}.bin", "content_hash": digest, "encoding": "base64"})
        changes.append({"file_path": "a.txt", "content": "text"})
        await self.rows("select public.apply_project_files(%s, %s::jsonb)", project_id, json.dumps(changes))
        await self.rows("delete from public.projects where id = %s returning id", project_id)
        self.deleted.append(project_id)
        return f"{files} binary files"

    async def not_forgotten(self) -> list[str]:
        """What is still there of the projects that were deleted, some time after. An orchestrator that was killed keeps
        its claim on one for ten minutes; that one is left out.
        """
        deadline = time.monotonic() + CLEANED_WITHIN
        query = (
            "select project_id from preview.deleted_projects"
            " where cleaned_at is null and (claimed_until is null or claimed_until < now())"
        )
        while (rows := await self.rows(query)) and time.monotonic() < deadline:
            await asyncio.sleep(0.5)
        claimed = await self.rows("select project_id from preview.deleted_projects where cleaned_at is null")
        late = {row["project_id"] for row in claimed}
        wrong = [f"deleted, and nobody clears it away: project {row['project_id']}" for row in rows]
        for project_id in self.deleted:
            left = await self.rows(
                "select name from storage.objects where starts_with(name, %s)", f"{project_id}/"
            )
            if left and project_id not in late:
                wrong.append(f"deleted, and cleared away but for {len(left)} objects: project {project_id}")
        return wrong

    async def open(self, number: int, project_id: UUID) -> Session:
        """The session of an agent, and with it its machine. Raises `CannotRun` for a refusal."""
        key = f"soak-{uuid4()}"
        form = await self._create(project_id, key, 1)
        session = Session(number, project_id, key, UUID(form["session_id"]))
        self.sessions[number] = session
        return session

    async def replace(self, session: Session) -> None:
        """The session's next machine: what a platform's user does when one is gone. Raises `CannotRun`, `HTTPError`."""
        await self._create(session.project_id, session.key, session.generation + 1)
        session.generation += 1

    async def _create(self, project_id: UUID, key: str, generation: int) -> dict[str, Any]:
        answer = await self.control.post(
            "/v1/sessions",
            json={"project_id": str(project_id), "generation": generation},
            headers={"Idempotency-Key": key},
            timeout=60,
        )
        if answer.status_code >= 500:
            answer.raise_for_status()
        if not answer.is_success:
            raise CannotRun(f"a session was refused: {answer.status_code} {answer.text}")
        form: dict[str, Any] = answer.json()
        return form

    async def rows(self, query: str, *arguments: object) -> list[dict[str, Any]]:
        """What the database says, asked as its owner. Tried again while it comes back from a crash."""
        deadline = time.monotonic() + 60
        while True:
            try:
                async with await self.connect() as connection:
                    cursor = connection.cursor(row_factory=dict_row)
                    return await (await cursor.execute(query.encode(), arguments)).fetchall()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)

    async def connect(self) -> psycopg.AsyncConnection[Any]:
        return await psycopg.AsyncConnection.connect(self.dsn, autocommit=True, connect_timeout=10)

    # --- machines

    def directory(self, number: int) -> Path:
        """An agent's machine."""
        return self.state / "machines" / str(self.sessions[number].id)

    @property
    def clocks(self) -> Path:
        """Not on the machines' disk: a clock that jumped comes back while that is full."""
        return self.state / "clocks"

    def set_clock(self, number: int, by: float) -> None:
        """Let the wall clock of an agent's machine be wrong by so many seconds."""
        clock = self.clocks / str(self.sessions[number].id)
        new = clock.with_suffix(".new")
        new.write_text(str(by))
        new.replace(clock)

    def tree(self, number: int) -> Path:
        """An agent's PROJECT_DIR."""
        return self.directory(number) / "project"

    def record(self, number: int) -> Record | None:
        """Which process the machine is, as the driver wrote it down."""
        try:
            return Record(**json.loads((self.directory(number) / "machine.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def process(self, number: int) -> psutil.Process | None:
        """The agent's process while it lives."""
        record = self.record(number)
        with suppress(psutil.Error):
            if record is not None:
                process = psutil.Process(record.pid)
                if process.create_time() == record.started and process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    # --- the end

    async def close_sessions(self, seconds: float = 90.0) -> list[str]:
        """End every session as the product does, and wait until its machine is gone; what did not go."""
        for session in self.sessions.values():
            answer = await self.control.delete(f"/v1/sessions/{session.id}")
            if not answer.is_success:
                raise CannotRun(f"a session cannot be ended: {answer.status_code} {answer.text}")
        deadline = time.monotonic() + seconds
        while True:
            left = [
                f"session of agent {row['number']} is {row['state']}"
                for row in await self._states()
                if row["state"] != "gone"
            ]
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(0.2)

    async def _states(self) -> list[dict[str, Any]]:
        rows = await self.rows("select id, state, problem from preview.sessions")
        numbers = {session.id: session.number for session in self.sessions.values()}
        return [{**row, "number": numbers.get(row["id"])} for row in rows]

    async def stop(self) -> list[str]:
        """End the programs and the database; what had to be killed."""
        forced = []
        for name in ("orchestrator", "supabase"):
            program: Program | None = getattr(self, name, None)
            if program is not None and not await program.stop():
                forced.append(f"{name} did not end on SIGTERM and was killed")
        for name in ("http", "control"):
            client: httpx.AsyncClient | None = getattr(self, name, None)
            if client is not None:
                await client.aclose()
        await self._postgres.stop()
        return forced


def processes_of(state: Path) -> dict[int, str]:
    """Every process that has to do with the state directory: by command line, environment or working directory."""
    mark = str(state.resolve()).encode()
    # Whoever runs us has the directory on its command line, perhaps.
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in ours:
            continue
        try:
            condition = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            command = (entry / "cmdline").read_bytes()
            known = command + (entry / "environ").read_bytes() + os.fsencode(os.readlink(entry / "cwd"))
        except OSError:
            continue
        if condition != "Z" and mark in known:
            found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return found


async def _answers(http: httpx.AsyncClient, path: str) -> bool:
    try:
        return (await http.get(path, timeout=5)).status_code == 200
    except httpx.HTTPError:
        return False


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in held]
    for each in held:
        each.close()
    return ports
