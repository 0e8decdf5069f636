"""Sessions whose machines are containers of the image, on a real engine: made, adopted, replaced, swept, ended.

The container driver's own suite (`tests/orchestrator/machines/test_container.py`) runs on the same engine with an
image of a shell; here the machine is the agent, and what says `ready` is its heartbeat.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest

from orchestrator_stub.door.store import DoorStore
from orchestrator_stub.machines.container import ContainerMachines
from tests.agent.conftest import EXAMPLE
from tests.image.engine import TAG, Engine
from tests.orchestrator.door.world import Preview, door_world, status
from tests.orchestrator.machines.driver_contract import spec_for
from tests.orchestrator.machines.test_container import LIMITS
from tests.system.plane import Plane, Project, eventually, running_plane

pytestmark = pytest.mark.image


def own_address() -> str:
    """An address of this machine that its containers reach as well. Skips where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent; the kernel only picks the way
        except OSError as error:
            pytest.skip(f"this machine has no address but its loopback: {error}")
        return str(probe.getsockname()[0])


@pytest.fixture
async def machines(engine: Engine) -> AsyncIterator[ContainerMachines]:
    """The driver; skips, saying why, where the engine cannot publish a container's ports."""
    made = ContainerMachines(TAG, cli=engine.command[0], options=LIMITS)
    probe = ["run", "--rm", "--publish", "127.0.0.1::5173", *LIMITS, "--entrypoint", "true", TAG]
    tried = engine.call(*probe, check=False)
    if tried.returncode != 0:
        pytest.skip(f"{engine.command[0]} publishes no ports here: {tried.stderr.strip()[-300:]}")
    before = {machine.id for machine in await made.list()}
    yield made
    for machine in await made.list():
        if machine.id not in before:
            await made.destroy(machine.id)


@pytest.fixture
async def edited(database: str, tmp_path: Path, machines: ContainerMachines) -> AsyncIterator[Project]:
    """The example as a project in the database, beside an orchestrator whose machines are containers."""
    files = {
        str(path.relative_to(EXAMPLE)): path.read_text()
        for path in sorted(EXAMPLE.rglob("*"))
        if path.is_file() and not {"node_modules", "dist"} & set(path.parts)
    }
    host = own_address()
    async with running_plane(database, tmp_path, machines=machines, host=host, create_wait=30) as plane:
        yield await plane.project(files)


async def shown(plane: Plane, session_id: str) -> dict[str, Any]:
    form: dict[str, Any] = (await plane.http.get(f"/v1/sessions/{session_id}")).json()
    return form


async def ready(plane: Plane, session_id: str) -> dict[str, Any]:
    """The session once its agent said that the preview is served."""

    async def is_ready() -> dict[str, Any] | None:
        form = await shown(plane, session_id)
        assert form["state"] in ("provisioning", "ready"), form
        return form if form["state"] == "ready" else None

    form: dict[str, Any] = await eventually("the agent in the container reports", is_ready, 90)
    return form


async def test_a_session_lives_its_whole_life_in_containers(
    edited: Project, machines: ContainerMachines, engine: Engine
) -> None:
    plane = edited.plane
    body = {"project_id": str(edited.id)}
    key = {"Idempotency-Key": uuid4().hex}
    first = (await plane.http.post("/v1/sessions", json=body, headers=key)).json()
    session_id = first["session_id"]
    form = await ready(plane, session_id)
    async with httpx.AsyncClient(trust_env=False) as browser:
        assert "<!doctype html>" in (await browser.get(form["preview_url"])).text.lower()
    async with door_world(plane.dsn, domain="localhost:PORT") as world:
        label = await DoorStore(world.pool).label(edited.id)
        preview = Preview(world, edited.id, UUID(session_id), label)
        page = await world.ask(preview, "/", "GET", "Accept: text/html")
        assert (status(page), b"<!doctype html>" in page.lower()) == (200, True), "through a door as well"
        assert status(await world.ask(preview, cookie=False)) == 401

    # The same request is the same container, and so it is for an orchestrator that never heard of it: the one before
    # was killed after the engine had made it and before the row said so.
    again = (await plane.http.post("/v1/sessions", json=body, headers=key)).json()
    assert again["machine"] == form["machine"]
    async with await psycopg.AsyncConnection.connect(plane.dsn, autocommit=True) as connection:
        await connection.execute(
            "update preview.sessions set machine_id = null, machine_driver = null, preview_url = null"
        )
    await plane.controller.sweep()
    adopted = await shown(plane, session_id)
    assert (adopted["machine"], adopted["preview_url"]) == (form["machine"], form["preview_url"])
    assert [m.id for m in await machines.find(UUID(session_id))] == [form["machine"]["id"]]

    # A newer generation takes its place.
    newer = (await plane.http.post("/v1/sessions", json={**body, "generation": 2}, headers=key)).json()
    assert newer["session_id"] == session_id
    replaced = await ready(plane, session_id)
    assert replaced["machine"]["id"] == form["machine"]["id"].removesuffix("1") + "2"
    assert [m.id for m in await machines.find(UUID(session_id))] == [replaced["machine"]["id"]]

    # A container of this installation that no session speaks for is swept; the session's own and another's are not.
    async with await psycopg.AsyncConnection.connect(plane.dsn) as connection:
        cursor = await connection.execute("select id from preview.installation")
        ((installation,),) = await cursor.fetchall()
    stray, anothers = await machines.create(spec_for(of=installation)), await machines.create(spec_for())
    await plane.controller.sweep()
    assert await machines.inspect(stray.id) is None
    assert await machines.inspect(anothers.id) is not None
    assert await machines.inspect(replaced["machine"]["id"]) is not None

    # A container that somebody removed by hand ends its session.
    await asyncio.to_thread(engine.call, "rm", "--force", replaced["machine"]["id"])
    await plane.controller.sweep()

    async def over() -> bool:
        return bool((await shown(plane, session_id))["state"] == "failed")

    await eventually("the session is over", over)
    assert "machine_gone" in (await shown(plane, session_id))["problem"]


async def test_an_ended_session_leaves_no_container(edited: Project, machines: ContainerMachines) -> None:
    plane = edited.plane
    session = (await plane.http.post("/v1/sessions", json={"project_id": str(edited.id)})).json()
    await ready(plane, session["session_id"])
    assert (await plane.http.delete(f"/v1/sessions/{session['session_id']}")).status_code == 202

    async def over() -> bool:
        return bool((await shown(plane, session["session_id"]))["state"] == "gone")

    await eventually("the session is over", over, 30)
    assert await machines.find(UUID(session["session_id"])) == []
