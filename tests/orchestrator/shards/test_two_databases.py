"""Two databases, each with its orchestrator, one Fly app for both and one address in front: as docs/scale has it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from orchestrator_stub.config import Settings
from orchestrator_stub.doctor.findings import Mark, Report
from orchestrator_stub.doctor.shards import examine_shards
from orchestrator_stub.platform.migrations import bootstrap
from orchestrator_stub.shards.placement import id_of_shard, shard_of
from tests.docs.reading import ROOT, blocks
from tests.fakes.fly import Fly
from tests.orchestrator.door.test_in_front import running
from tests.orchestrator.sessions.control_world import bearer, status_report
from tests.orchestrator.shards.front import front
from tests.orchestrator.test_two_processes import Orchestrator, fly_served, is_ready, settings_of
from tests.ports import free_port
from tests.system.plane import Plane, eventually, running_plane

DOC = ROOT / "docs" / "scale" / "README.md"


@dataclass
class World:
    """Both of everything, and what stands in front. `http` speaks to the front as the product's backend."""

    planes: list[Plane]
    orchestrators: list[Orchestrator]
    fly: Fly
    http: httpx.AsyncClient

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{each.port}" for each in self.orchestrators]


@pytest.fixture
async def world(database: str, other_database: str, tmp_path: Path) -> AsyncIterator[World]:
    async with two_databases([database, other_database], tmp_path) as made:
        yield made


@asynccontextmanager
async def two_databases(dsns: list[str], tmp_path: Path) -> AsyncIterator[World]:
    fly = Fly(per_second=1000, burst=1000)
    ports = [free_port(), free_port()]
    async with AsyncExitStack() as stack:
        fly_url = await stack.enter_async_context(fly_served(fly))
        planes, orchestrators = [], []
        for dsn, port in zip(dsns, ports, strict=True):
            plane = await stack.enter_async_context(running_plane(dsn, tmp_path / f"plane-{port}"))
            environ = {
                **settings_of(plane, fly_url), "PUBLIC_URL": f"http://127.0.0.1:{port}", "CREATE_WAIT": "20",
                "SHARDS": " ".join(f"http://127.0.0.1:{each}" for each in ports),
            }  # fmt: skip
            planes.append(plane)
            orchestrators.append(Orchestrator(port, environ, tmp_path / f"{port}.log"))
            await orchestrators[-1].start()
            stack.push_async_callback(_ended, orchestrators[-1])
        here = free_port()
        await stack.enter_async_context(running(front(tmp_path, here, ports), here, tmp_path))
        http = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{here}", headers=bearer(planes[0].keys.service_key), timeout=30,
                trust_env=False,
            )
        )  # fmt: skip
        for port in ports:
            await eventually("it serves", partial(is_ready, http, port), 60)
        yield World(planes, orchestrators, fly, http)


async def _ended(orchestrator: Orchestrator) -> None:
    if orchestrator.process is not None and orchestrator.process.returncode is None:
        await orchestrator.kill()


async def test_each_project_is_served_by_the_database_that_its_id_says(world: World) -> None:
    files = {"a.ts": "a"}
    projects = [
        (await world.planes[0].project(files)).id,
        (await world.planes[1].project(files, id_of_shard(1, uuid4()))).id,
    ]
    machines, sessions = [], []
    for shard, project in enumerate(projects):
        made = await world.http.post(f"/v1/sessions?project_id={project}", json={"project_id": str(project)})
        assert made.status_code == 201, made.text
        session = made.json()["session_id"]
        assert shard_of(UUID(session)) == shard, "a session's id says the same as its project's"
        machine = world.fly.machines[made.json()["machine"]["id"]]
        assert machine["config"]["env"]["SESSION_API_URL"] == world.urls[shard]
        # One address: the agent's heartbeat finds its way by the session's id, as what the backend asks does.
        token = machine["config"]["env"]["REALTIME_TOKEN"]
        beat = await world.http.put(
            f"/v1/sessions/{session}/status", json=status_report({"revision": 1, "epoch": "e"}), headers=bearer(token)
        )  # fmt: skip
        assert beat.status_code == 200, beat.text
        assert (await world.http.get(f"/v1/sessions/{session}")).json()["state"] == "ready"
        listed = (await world.http.get(f"/v1/sessions?project_id={project}")).json()["sessions"]
        assert [each["session_id"] for each in listed] == [session]
        # Past the front, at the wrong one.
        wrong = world.urls[1 - shard]
        for answer in (
            await world.http.post(f"{wrong}/v1/sessions", json={"project_id": str(project)}),
            await world.http.get(f"{wrong}/v1/sessions/{session}", headers={"authorization": "none"}),
            await world.http.get(f"{wrong}/v1/projects/{project}/shown"),
        ):
            assert (answer.status_code, answer.json()["url"]) == (421, world.urls[shard])
        machines.append(machine["id"])
        sessions.append(session)
    assert (await world.http.post("/v1/sessions", json={"project_id": str(projects[0])})).status_code == 400
    assert (await world.http.get("/v1/sessions")).status_code == 400
    # Both sweep the one app, again and again, and neither ends what is the other's.
    swept = [kind for kind, _ in world.fly.asked].count("list") + 6

    async def sweeps() -> bool:
        return [kind for kind, _ in world.fly.asked].count("list") >= swept

    await eventually("both have swept", sweeps, 30)
    assert {each["id"] for each in world.fly.live()} == set(machines)
    # One of them away is its own projects' matter.
    await world.orchestrators[0].kill()
    assert (await world.http.get(f"/v1/sessions/{sessions[0]}")).status_code == 502
    assert (await world.http.delete(f"/v1/sessions/{sessions[1]}")).status_code in (200, 202)

    async def only_the_first() -> bool:
        return [each["id"] for each in world.fly.live()] == machines[:1]

    await eventually("the machine that was ended is gone, and no other", only_the_first)
    await _doctor_says(world)


async def _doctor_says(world: World) -> None:
    """The doctor of database 1, with the other away, back, and of another opinion; and a project that is nobody's."""
    environ = world.orchestrators[1].environ
    settings = Settings.of({name.lower(): value for name, value in environ.items()})

    async def found(settings: Settings = settings) -> dict[Mark, list[str]]:
        report = Report("shards")
        async with httpx.AsyncClient(trust_env=False) as http:
            await examine_shards(settings, http, report)
        return {mark: [each.what for each in report.findings if each.mark is mark] for mark in Mark}

    [away] = (await found())[Mark.BAD]
    assert away.startswith(f"{world.urls[0]} does not answer")
    await world.orchestrators[0].start()
    async with httpx.AsyncClient(trust_env=False) as http:
        await eventually("it serves", partial(is_ready, http, world.orchestrators[0].port), 60)
    well = await found()
    assert (well[Mark.BAD], len(well[Mark.OK])) == ([], 2)
    swapped = settings.model_copy(update={"shards": tuple(reversed(settings.shards))})
    assert [each for each in (await found(swapped))[Mark.BAD] if "is not database 1" in each]
    elsewhere = settings.model_copy(update={"shards": ("http://a", "http://b")})
    assert "PUBLIC_URL" in (await found(elsewhere))[Mark.BAD][0]
    strange = (await world.planes[1].project({})).id
    [misplaced] = (await found())[Mark.BAD]
    assert str(strange) in misplaced


async def test_what_cannot_be_meant_keeps_it_from_serving(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path / "plane") as plane:
        environ = settings_of(plane, "http://127.0.0.1:9/v1")
        one = Orchestrator(0, {**environ, "SHARDS": "http://a http://b"}, tmp_path / "log")
        await one.start()
        assert one.process is not None
        assert await one.process.wait() == 1
        assert "PUBLIC_URL must be one of SHARDS" in one.log.read_text().splitlines()[-1]


@pytest.mark.nightly
async def test_one_line_migrates_and_examines_them_all(postgres_dsn: str, tmp_path: Path) -> None:
    """The shell lines of the page, over two databases of which one is then broken."""
    lines = [
        line for block in blocks(DOC) if "shards/*.env" in block.text for line in block.text.splitlines()
    ]
    assert len(lines) == 2
    names = [f"shard_{n}_{os.getpid()}" for n in range(2)]
    (tmp_path / "shards").mkdir()
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        try:
            for name in names:
                server.execute(f"create database {name}".encode())
                dsn = make_conninfo(postgres_dsn, dbname=name)
                await bootstrap(dsn)
                (tmp_path / "shards" / f"{name}.env").write_text(f"DATABASE_URL='{dsn}'\n")
            first = _shell(lines[0], tmp_path)
            assert first.returncode == 0, first.stderr
            assert first.stdout.count("applied 20261210300000") == 2
            assert _shell(lines[0], tmp_path).stdout == "nothing to apply\n" * 2
            examined = _shell(lines[1], tmp_path)
            assert examined.stdout.count("to put right before") == 2, "of both, whatever the first one has"
        finally:
            for name in names:
                server.execute(f"drop database if exists {name} with (force)".encode())
    # The first that fails ends it: no further one is changed.
    failed = _shell(lines[0], tmp_path)
    assert failed.stderr.count("preview-orchestrator:") == 1


def _shell(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", line], cwd=directory, env={"PATH": path}, capture_output=True, text=True, timeout=300
    )
