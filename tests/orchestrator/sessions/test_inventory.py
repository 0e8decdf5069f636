"""`preview-orchestrator machines`: every machine there is, and whose it is."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from orchestrator_stub.machines.driver import machine_name
from orchestrator_stub.machines.local import LocalMachines
from orchestrator_stub.sessions.inventory import age_of
from orchestrator_stub.sessions.lifecycle import State
from tests.orchestrator.machines.driver_contract import ANOTHER, spec_for
from tests.orchestrator.sessions.control_world import World, control_world
from tests.orchestrator.test_serve import run, settings

SLEEPS = (sys.executable, "-c", "import time; time.sleep(600)")


async def begin(world: World, driver: LocalMachines) -> UUID:
    controller = world.controller_of(driver)
    session, _ = await controller.request(await world.project(), key=None, generation=None, ttl=600)
    await controller.settled(session.id, 10)
    await controller.close()
    return session.id


async def test_it_says_whose_every_machine_is(database: str, tmp_path: Path) -> None:
    driver = LocalMachines(tmp_path / "machines", environment={}, command=SLEEPS)
    environ = settings(database, MACHINES_DIR=str(tmp_path / "machines"))

    async def said(*options: str) -> list[str]:
        ended = await asyncio.to_thread(run, "machines", *options, **environ)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout.splitlines()

    assert await said() == ["no machines"]
    async with control_world(database) as world:
        ready, over, before = [await begin(world, driver) for _ in range(3)]
        await world.sql("update preview.sessions set state = 'ready' where id = %s", ready)
        await world.sql("update preview.sessions set state = 'gone', machine_id = null where id = %s", over)
        mine = {"of": world.installation.id}
        lost = await driver.create(spec_for(**mine))
        others = await driver.create(spec_for(of=ANOTHER))
        old = machine_name(None, before, 1)
        await world.sql("update preview.sessions set machine_id = %s where id = %s", old, before)
        for session_id in (before, uuid4()):
            await driver.retire(world.name_of(session_id))
            await driver.create(replace(spec_for(session_id, **mine), name=machine_name(None, session_id, 1)))
    try:
        found: dict[str, dict[str, Any]] = {}
        for line in await said("--json"):
            row = json.loads(line)
            found[row["name"]] = row
        (nobodys,) = set(found) - {
            world.name_of(ready), world.name_of(over), old, lost.name, others.name,
        }  # fmt: skip
        whose = {name: row["whose"] for name, row in found.items()}
        assert whose == {
            world.name_of(ready): "ours", old: "ours", world.name_of(over): "over",
            lost.name: "over", others.name: "another's", nobodys: "nobody's",
        }  # fmt: skip
        assert found[world.name_of(ready)]["session_id"] == str(ready)
        assert found[world.name_of(ready)]["session_state"] == State.READY
        assert found[world.name_of(ready)]["machine_id"] == world.name_of(ready)
        assert found[others.name]["installation"] == ANOTHER.hex[:12]
        assert all(0 < row["age_seconds"] < 600 for row in found.values())
        lines = await said()
        assert len(lines) == len(found)
        for name in found:
            (line,) = [line for line in lines if line.startswith(f"{name} ")]
            assert f" {whose[name]} " in line
            assert re.search(r"  \d+ (s|min)  ", line)
    finally:
        for machine in await driver.list():
            await driver.destroy(machine.id)
        await driver.close()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0, "0 s"), (119, "119 s"), (120, "2 min"), (7199, "120 min"), (7200, "2 h"), (1e6, "12 d")],
)
def test_an_age_is_in_the_largest_unit_that_it_has_two_of(seconds: float, said: str) -> None:
    assert age_of(seconds) == said


def test_what_cannot_be_asked_is_one_clear_line(database: str, tmp_path: Path) -> None:
    """A database that is not there, an engine that fails, or is not there, settings that are missing."""
    engines = [{"MACHINE_DRIVER": "container", "CONTAINER_CLI": cli} for cli in ("false", "no-such-engine")]
    broken = [settings("postgresql://127.0.0.1:1/x"), *(settings(database, **engine) for engine in engines)]
    for environ in broken:
        ended = run("machines", **environ)
        assert ended.returncode == 1
        (line,) = ended.stderr.splitlines()
        assert line.startswith("preview-orchestrator: cannot list the machines: ")
    assert run("machines").returncode == 64
