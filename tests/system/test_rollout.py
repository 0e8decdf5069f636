"""`preview-orchestrator rollout`, as a process, over real machines: there, back, and stopped by a bad image."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import psycopg
import pytest

from orchestrator_stub.machines.driver import Machine
from orchestrator_stub.machines.local import LocalMachines
from tests.system.plane import Plane, Project, eventually, running_plane

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]

FLAWED = """
import os, sys
if os.environ["SESSION_ID"] in open({fails!r}).read():
    sys.exit(64)
os.environ["PYTHONPATH"] = {real!r}
os.execv(sys.executable, [sys.executable, "-P", "-m", "agent", "run"])
"""
"""An agent that ends at once in the sessions that a file names."""


@dataclass
class Fleet:
    """Two sessions of two projects, their machines, and what rolls out."""

    plane: Plane
    driver: LocalMachines
    place: Path
    exits: list[Machine]
    projects: list[Project]
    sessions: list[dict[str, Any]]

    def image(self, name: str) -> str:
        """A directory with today's agent under a name of its own."""
        (self.place / name).mkdir(exist_ok=True)
        if not (self.place / name / "agent").exists():
            (self.place / name / "agent").symlink_to(ROOT / "agent")
        return str(self.place / name)

    async def rollout(self, *words: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orchestrator_stub", "rollout", *words, cwd=ROOT,
            env={"PATH": os.environ["PATH"], "DATABASE_URL": self.plane.dsn},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip

    async def rolled(self, *words: str) -> tuple[int | None, str]:
        """Its exit code, and what it said."""
        process = await self.rollout(*words)
        async with asyncio.timeout(90):
            said, _ = await process.communicate()
        return process.returncode, said.decode()

    async def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        async with await psycopg.AsyncConnection.connect(self.plane.dsn, autocommit=True) as connection:
            cursor = await connection.execute(query.encode(), values)
            return await cursor.fetchall() if cursor.description else []

    async def state(self, n: int) -> dict[str, Any]:
        form: dict[str, Any] = (
            await self.plane.http.get(f"/v1/sessions/{self.sessions[n]['session_id']}")
        ).json()
        return form

    async def ready(self, n: int) -> dict[str, Any]:
        async def is_ready() -> dict[str, Any] | None:
            form = await self.state(n)
            return form if form["state"] == "ready" else None

        form: dict[str, Any] = await eventually(f"session {n} is ready", is_ready, 40)
        return form

    async def image_of(self, n: int) -> str | None:
        """What the agent's process was really started with."""
        found = await self.driver.find(UUID(self.sessions[n]["session_id"]))
        assert len(found) == 1, found
        directory = self.driver.project_dir(UUID(self.sessions[n]["session_id"])).parent
        for process in psutil.process_iter(["cmdline", "cwd"]):
            if process.info["cwd"] == str(directory) and "agent" in (process.info["cmdline"] or ()):
                return process.environ().get("PYTHONPATH")
        raise AssertionError("no agent runs")

    async def follows(self, n: int, text: str) -> None:
        """The session's tree has what is saved now."""
        await self.projects[n].save("a.ts", text)
        file = self.driver.project_dir(UUID(self.sessions[n]["session_id"])) / "a.ts"

        async def there() -> bool:
            return file.exists() and file.read_text() == text

        await eventually(f"{text!r} arrived", there, 40)


@asynccontextmanager
async def running_fleet(dsn: str, place: Path) -> AsyncIterator[Fleet]:
    exits: list[Machine] = []
    driver = LocalMachines(
        place / "machines", environment=os.environ, on_exit=lambda machine, code: exits.append(machine)
    )
    async with running_plane(dsn, place / "plane", machines=driver, sweep_seconds=0.2) as plane:
        sweeping = asyncio.create_task(plane.controller.run())
        projects = [await plane.project({"a.ts": f"{n}\n"}) for n in range(2)]
        fleet = Fleet(plane, driver, place, exits, projects, [])
        try:
            for project in projects:
                answer = await plane.http.post("/v1/sessions", json={"project_id": str(project.id)})
                fleet.sessions.append(answer.json())
            for n in range(2):
                await fleet.ready(n)
            yield fleet
        finally:
            sweeping.cancel()
            for machine in await driver.list():
                await driver.destroy(machine.id)


@pytest.mark.nightly
async def test_there_and_back_and_stopped_by_a_bad_image(database: str, tmp_path: Path) -> None:
    async with running_fleet(database, tmp_path) as fleet:
        # There: interrupted while it tries, and gone on with by the same command.
        new = fleet.image("v2")
        begun = await fleet.rollout(new, "--idle", "0")
        assert begun.stdout is not None
        while b"trying it in session" not in await begun.stdout.readline():
            assert begun.returncode is None
        begun.send_signal(signal.SIGINT)
        said = (await begun.stdout.read()).decode()
        assert await begun.wait() == 130, said
        assert "the same command goes on" in said
        code, said = await fleet.rolled(new, "--idle", "0")
        assert code == 0, said
        assert said.splitlines()[-1] == f"done: 2 sessions run {new}, and new ones get it"
        for n in range(2):
            assert await fleet.image_of(n) == new
            assert (await fleet.state(n))["generation"] == 2
            await fleet.follows(n, f"after the update {n}\n")

        # Back: the same command with the former image.
        [(former,)] = await fleet.sql("select former from preview.rollout")
        code, said = await fleet.rolled(former, "--idle", "0")
        assert code == 0, said
        assert "trying" not in said
        for n in range(2):
            assert await fleet.image_of(n) is None
            await fleet.follows(n, f"back again {n}\n")

        # An image that one session cannot run: it has the former one back, the other never loses its machine.
        fails = tmp_path / "fails"
        fails.write_text(fleet.sessions[0]["session_id"])
        bad = tmp_path / "bad"
        (bad / "agent").mkdir(parents=True)
        (bad / "agent" / "__init__.py").touch()
        (bad / "agent" / "__main__.py").write_text(FLAWED.format(fails=str(fails), real=str(ROOT)))
        before = await fleet.state(1)
        await fleet.projects[1].save("a.ts", "the last save of all\n")  # so that the other's turn comes first
        rolling = asyncio.create_task(fleet.rolled(str(bad), "--idle", "0", "--at-once", "1"))
        fleet.exits.clear()

        async def ended() -> bool:
            return any(fleet.sessions[0]["session_id"].replace("-", "") in each.name for each in fleet.exits)

        await eventually("the agent of the bad image has ended", ended, 40)
        await fleet.sql(
            "update preview.sessions set state_since = state_since - interval '1 hour' where rolled_at is not null"
        )
        code, said = await rolling
        assert code == 1, said
        assert f"the rollout stopped: session {fleet.sessions[0]['session_id']} of project" in said
        assert "provision_timeout" in said
        await fleet.ready(0)
        assert await fleet.image_of(0) is None
        await fleet.follows(0, "still here\n")
        assert await fleet.state(1) == before | {"applied": (await fleet.state(1))["applied"]}
        code, said = await fleet.rolled()
        assert said.startswith(f"{bad}: stopped, for 100% of the sessions")
