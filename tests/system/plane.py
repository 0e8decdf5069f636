"""The real other side of an agent, without a dev server: PostgreSQL, stand-in and control plane in the test's own loop.

Agents are processes, as on a machine, started with exactly the environment that the control plane gives a machine. A
project without package.json has no dev server, so an agent is up in half a second and can be killed two hundred times.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import uvicorn

from agent.core.model import RelPath, digest_of, tree_hash
from orchestrator_stub.config import Settings
from orchestrator_stub.http.application import application
from orchestrator_stub.http.operations import Measured
from orchestrator_stub.local_supabase.app import stand_in
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.realtime.socket import uvicorn_options
from orchestrator_stub.machines.driver import Machine, MachineDriver, MachineSpec, MachineState
from orchestrator_stub.machines.local import ALLOCATOR
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.process import Server
from orchestrator_stub.server.control_plane import control_plane, door_of
from orchestrator_stub.sessions.controller import SessionController
from tests.ports import free_port
from tests.trees import contents_below


async def eventually(what: str, condition: Callable[[], Awaitable[object]], seconds: float = 60.0) -> Any:
    """The condition's first true value. Fails with `what` after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = await condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        await asyncio.sleep(0.01)


@dataclass
class Specs:
    """A machine driver that makes nothing and remembers what it was asked for: the test is the platform."""

    kind: str = "test"
    made: dict[str, MachineSpec] = field(default_factory=dict)

    async def create(self, spec: MachineSpec) -> Machine:
        self.made[spec.name] = spec
        return Machine("test", spec.name, spec.name, MachineState.RUNNING, time.time())

    async def inspect(self, machine_id: str) -> Machine | None:
        if machine_id not in self.made:
            return None
        return Machine("test", machine_id, machine_id, MachineState.RUNNING, time.time())

    async def find(self, session_id: UUID) -> list[Machine]:
        return [m for m in await self.list() if self.made[m.id].session_id == session_id]

    async def list(self) -> list[Machine]:
        return [Machine("test", name, name, MachineState.RUNNING, time.time()) for name in self.made]

    async def suspend(self, machine_id: str) -> None:
        return None

    async def resume(self, machine_id: str) -> bool:
        return machine_id in self.made

    async def retire(self, machine_id: str) -> None:
        self.made.pop(machine_id, None)

    async def destroy(self, machine_id: str) -> None:
        self.made.pop(machine_id, None)

    async def close(self) -> None:
        return None


@dataclass
class Plane:
    """A running other side. `http` speaks as the product's backend."""

    url: str
    dsn: str
    keys: ProjectKeys
    http: httpx.AsyncClient
    driver: Specs
    """What made the machines, unless the test brought a driver of its own."""
    controller: SessionController

    async def project(self, files: Mapping[str, str], id: UUID | None = None) -> Project:
        """A project of a user of its own, holding `files`; `id` where the test has one."""
        user, project_id = uuid4(), id or uuid4()
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            await connection.execute(
                "insert into auth.users (id, email) values (%s, %s)", (user, f"{user}@x.invalid")
            )
            await connection.execute(
                "insert into public.user_profiles (id, display_name) values (%s, 'u')", (user,)
            )
            await connection.execute(
                "insert into public.projects (id, owner_id, name) values (%s, %s, 'p')", (project_id, user)
            )
        project = Project(self, project_id)
        await project.bulk(dict(files))
        return project


@dataclass
class Project:
    """One project, seen by its editor."""

    plane: Plane
    id: UUID

    async def rpc(self, name: str, **arguments: object) -> Any:
        """Call an RPC with the service key. Raises for a refusal."""
        answer = await self.plane.http.post(
            f"/rest/v1/rpc/{name}", json={"project_uuid": str(self.id), **arguments}
        )
        assert answer.is_success, f"{name}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    async def save(self, path: str, content: str) -> Any:
        return await self.rpc("upsert_project_file", p_file_path=path, p_content=content)

    async def delete(self, path: str) -> Any:
        return await self.rpc("delete_project_file", p_file_path=path)

    async def bulk(self, files: Mapping[str, str | None]) -> Any:
        """One transaction; None deletes."""
        changes = [
            {"action": "delete", "file_path": path} if content is None
            else {"action": "update", "file_path": path, "content": content}
            for path, content in files.items()
        ]  # fmt: skip
        return await self.rpc("apply_project_files", changes=changes)

    async def files(self) -> dict[str, bytes]:
        """The database's current tree; text files only."""
        return {row["file_path"]: row["content"].encode() for row in await self.rpc("list_current_files")}

    async def broadcast(self, event: str, payload: Mapping[str, object]) -> None:
        """Say something on the project's channel that the database did not say."""
        message = {"topic": f"project:{self.id}", "event": event, "payload": payload, "private": True}
        answer = await self.plane.http.post("/realtime/v1/api/broadcast", json={"messages": [message]})
        assert answer.is_success, answer.text

    async def faults(self, **faults: object) -> None:
        """Let the realtime server misbehave."""
        answer = await self.plane.http.post("/realtime/v1/faults", json=faults)
        assert answer.is_success, answer.text

    async def session(self, directory: Path, **environ: str) -> Agent:
        """A session whose machine is a process below `directory`."""
        key = uuid4().hex
        answer = await self.plane.http.post(
            "/v1/sessions", json={"project_id": str(self.id)}, headers={"Idempotency-Key": key}
        )
        assert answer.is_success, answer.text
        spec = self.plane.driver.made[answer.json()["machine"]["id"]]
        directory.mkdir(parents=True, exist_ok=True)
        return Agent(self, UUID(answer.json()["session_id"]), directory, {**spec.env, **environ}, key=key)


@dataclass
class Agent:
    """One agent's machine: its directories, and the process that runs now."""

    project: Project
    session_id: UUID
    directory: Path
    environ: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    port: int = 0
    key: str = ""
    """The Idempotency-Key its session was made with."""
    python: str = sys.executable
    """The interpreter that runs it."""

    @property
    def tree(self) -> Path:
        """PROJECT_DIR."""
        return Path(self.environ.get("PROJECT_DIR", self.directory / "project"))

    def start(self) -> None:
        """Start it; the ports are free ones."""
        self.port, dev_port = free_port(), free_port()
        environ = {
            "PATH": os.environ["PATH"],
            **ALLOCATOR,
            "PROJECT_DIR": str(self.directory / "project"),
            "STATE_DIR": str(self.directory / "state"),
            "HEALTH_HOST": "127.0.0.1",
            "HEALTH_PORT": str(self.port),
            "DEV_PORT": str(dev_port),
            "DEV_HOST": "127.0.0.1",
            "HEARTBEAT_SECONDS": "0.5",
            **self.environ,
        }
        with (self.directory / "agent.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", "agent", "run"],
                env=environ,
                stdout=log,
                stderr=log,
                cwd=self.directory,
            )

    def kill(self) -> None:
        """SIGKILL, whatever it is doing."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop; the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 20)

    def log(self) -> str:
        return (self.directory / "agent.log").read_text()

    async def status(self) -> dict[str, Any] | None:
        """Its own report; None while it does not answer."""
        try:
            async with httpx.AsyncClient(trust_env=False) as http:
                report: dict[str, Any] = (
                    await http.get(f"http://127.0.0.1:{self.port}/status", timeout=5)
                ).json()
                return report
        except httpx.HTTPError:
            return None

    async def metrics(self) -> str:
        """Its metrics, as a scraper sees them."""
        async with httpx.AsyncClient(trust_env=False) as http:
            return (await http.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30)).text

    def files(self) -> dict[str, bytes]:
        """What is on disk; a file that goes while this looks is gone."""
        return contents_below(self.tree, but=("node_modules",))

    async def equal(self, seconds: float = 60.0) -> dict[str, Any]:
        """Wait until disk, agent and database say the same; the agent's report then."""

        async def same() -> dict[str, Any] | None:
            assert self.process is not None
            assert self.process.poll() is None, self.log()[-3000:]
            wanted = await self.project.files()
            if self.files() != wanted:
                return None
            report = await self.status()
            if report is None or report["catch_up"] or report["islands"]:
                return None
            head = await self.project.rpc("changes_since", epoch="none", revision=0)
            return (
                report if (report["epoch"], report["revision"]) == (head["epoch"], head["revision"]) else None
            )

        try:
            report: dict[str, Any] = await eventually("disk, agent and database are equal", same, seconds)
        except AssertionError as error:
            wanted, here = await self.project.files(), self.files()
            differ = sorted(p for p in wanted.keys() | here.keys() if wanted.get(p) != here.get(p))
            raise AssertionError(
                f"{error}; differing: {differ[:10]}; {await self.status()}\n{self.log()[-4000:]}"
            ) from None
        assert tree_hash(
            {RelPath(p): digest_of(c) for p, c in self.files().items()}
        ) == await self.project.rpc("project_tree_hash")
        return report


@contextlib.asynccontextmanager
async def running_plane(
    dsn: str,
    directory: Path,
    *,
    machines: MachineDriver | None = None,
    host: str = "127.0.0.1",
    **settings: Any,
) -> AsyncIterator[Plane]:
    """Everything up on a free port of the address `host`; everything down at the end.

    `machines` makes the machines instead of `Plane.driver`. `settings` are the control plane's.
    """
    keys = Keyring.from_secret("a secret for the tests alone, " * 2)
    project_keys = ProjectKeys.of(keys)
    # The protocol named, as in production: asyncio then sets TCP_NODELAY on what is accepted.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind((host, 0))
        listener.listen(1024)
        url = f"http://{host}:{listener.getsockname()[1]}"
        driver = Specs()
        values = Settings.of(
            {
                "database_url": dsn,
                "supabase_url": url,
                "public_url": url,
                "supabase_anon_key": project_keys.anon_key,
                "supabase_service_role_key": project_keys.service_key,
                "template_dir": None,
                "create_wait": 5,
                "run_settings_keys": f"k1:{b64encode(bytes(32)).decode()}",
                "preview_domain": "localhost:1",
                "door_keys": f"d1:{b64encode(bytes(32)).decode()}",
                **settings,
            }
        )
        async with control_plane(values, keys, machines or driver) as service:
            door_of(values, service.pool, service.metrics.registry)  # it counts, and lets nobody in
            local = stand_in(dsn, project_keys, directory / "storage", faults=True)
            app = application([*service.routes, *local.routes], lifespan=local.lifespan)
            server = Server(
                uvicorn.Config(
                    Measured(app, service.metrics), log_config=None, access_log=False, **uvicorn_options()
                )
            )
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                while not server.started:
                    assert not serving.done(), serving
                    await asyncio.sleep(0.005)
                headers = {
                    "apikey": project_keys.service_key,
                    "authorization": f"Bearer {project_keys.service_key}",
                }
                async with httpx.AsyncClient(
                    base_url=url, headers=headers, timeout=30, trust_env=False
                ) as http:
                    yield Plane(url, dsn, project_keys, http, driver, service.controller)
            finally:
                server.should_exit = True
                await asyncio.wait([serving], timeout=10)


async def edit_at_random(project: Project, dice: random.Random, edits: int) -> None:
    """Saves, deletes, bulks and moves on a few paths that get in each other's way."""
    names = ["a.ts", "b.ts", "c/d.ts", "c/e.ts", "f/g/h.ts"]
    for _ in range(edits):
        name = dice.choice(names)
        match dice.randrange(5):
            case 0 | 1:
                await project.save(name, f"{dice.random()}\n" * dice.choice([1, 50]))
            case 2 if name in await project.files():
                await project.delete(name)
            case 3:
                picked = dice.sample(names, 3)
                there = await project.files()
                await project.bulk(
                    {n: None if n in there and dice.random() < 0.4 else f"{dice.random()}\n" for n in picked}
                )
            case _:
                await project.save(name, "" if dice.random() < 0.2 else f"{dice.randrange(3)}\n")
