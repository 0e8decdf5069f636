"""Two installations, each with a database of its own, on one platform: neither touches the other's machines."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import pytest

from orchestrator_stub.machines.container import ContainerMachines
from orchestrator_stub.machines.driver import Machine, MachineDriver, MachineState, machine_name
from orchestrator_stub.machines.fly import FlyMachines, FlyShape
from orchestrator_stub.machines.fly_api import FlyApi, Rate
from orchestrator_stub.machines.local import LocalMachines
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.lifecycle import Session, State
from tests.fakes import engine as fake_engine
from tests.fakes.fly import APP, TOKEN, Fly
from tests.fakes.machines import FakeMachines, Platform
from tests.orchestrator.sessions.control_world import World, control_world

DRIVERS = ["memory", "local", "container", "fly"]


@pytest.fixture
async def worlds(database: str, other_database: str) -> AsyncIterator[tuple[World, World]]:
    platform = Platform()
    async with (
        control_world(database, platform=platform) as one,
        control_world(other_database, platform=platform) as other,
    ):
        yield one, other


@pytest.fixture
async def driver_for(
    request: pytest.FixtureRequest, tmp_path: Path, worlds: tuple[World, World]
) -> AsyncIterator[Callable[[], MachineDriver]]:
    """Makes drivers, each another orchestrator's, for one platform of the kind of the parameter."""
    made: list[MachineDriver] = []
    fly = Fly(per_second=1000, burst=1000)
    cli = fake_engine.install(tmp_path)

    def driver() -> MachineDriver:
        match request.param:
            case "local":
                command = (sys.executable, "-c", "import time; time.sleep(600)")
                made.append(LocalMachines(tmp_path / "machines", environment={}, command=command))
            case "container":
                made.append(ContainerMachines("image", cli=cli))
            case "fly":
                http = httpx.AsyncClient(transport=fly.transport())
                api = FlyApi("http://fly.invalid/v1", APP, TOKEN, http, writes=Rate(1000, 1000))
                made.append(FlyMachines(api, FlyShape(APP, "image"), http))
            case _:
                made.append(FakeMachines(worlds[0].platform))
        return made[-1]

    yield driver
    for machine in await made[0].list():
        await made[0].destroy(machine.id)
    for each in made:
        await each.close()
    assert fly.invalid == []


async def idle(*controllers: SessionController) -> None:
    for controller in controllers:
        while controller._tasks:
            await asyncio.wait(list(controller._tasks.values()))


async def begin(world: World, controller: SessionController, key: str | None = None) -> Session:
    """A session, with its machine made."""
    session, _ = await controller.request(await world.project(), key=key, generation=None, ttl=600)
    await idle(controller)
    made = await world.store.get(session.id)
    assert made is not None
    assert made.machine_id is not None
    return made


async def alive(driver: MachineDriver, session: Session) -> bool:
    assert session.machine_id is not None
    machine = await driver.inspect(session.machine_id)
    return machine is not None and machine.state in (MachineState.RUNNING, MachineState.STARTING)


@pytest.mark.parametrize("driver_for", DRIVERS, indirect=True)
async def test_sweeps_and_ends_leave_the_other_installation_s_machines(
    worlds: tuple[World, World], driver_for: Callable[[], MachineDriver]
) -> None:
    drivers = [driver_for(), driver_for()]
    controllers = [world.controller_of(driver) for world, driver in zip(worlds, drivers, strict=True)]
    sessions = [await begin(world, controller) for world, controller in zip(worlds, controllers, strict=True)]
    for _ in range(2):
        for controller in controllers:
            await controller.sweep()
        await idle(*controllers)
    assert [await alive(drivers[0], session) for session in sessions] == [True, True]
    await controllers[0].end(sessions[0].id)
    await idle(*controllers)
    for controller in reversed(controllers):
        await controller.sweep()
    await idle(*controllers)
    assert [await alive(drivers[1], session) for session in sessions] == [False, True]
    for controller in controllers:
        await controller.close()


@pytest.mark.parametrize("driver_for", DRIVERS, indirect=True)
async def test_a_copied_database_leaves_the_machines_of_the_sessions_it_was_copied_with(
    worlds: tuple[World, World], driver_for: Callable[[], MachineDriver]
) -> None:
    """Staging made from a dump of production: the same sessions, an id of its own."""
    original, copy = worlds
    drivers = [driver_for(), driver_for()]
    first, second = (world.controller_of(driver) for world, driver in zip(worlds, drivers, strict=True))
    session = await begin(original, first, key="k")
    rows = [await begin(original, first) for _ in range(2)]
    await copy_sessions(original, copy)
    await second.sweep()
    await second.end(rows[0].id)
    await second.request(session.project_id, key="k", generation=2, ttl=600)
    await idle(second)
    await copy.pass_time(10_000)
    for _ in range(3):
        await second.sweep()
        await idle(second)
    assert [await alive(drivers[0], each) for each in (session, *rows)] == [True, True, True]
    for controller in (first, second):
        await controller.close()


async def copy_sessions(original: World, copy: World) -> None:
    """Every project and session of the one, in the other."""
    owner = await copy.user()
    for row in await original.sql("select id from public.projects"):
        await copy.sql("insert into public.projects (id, owner_id) values (%s, %s)", row[0], owner)
    columns = "id, project_id, state, generation, idempotency_key, expires_at, machine_driver, machine_id"
    for row in await original.sql(f"select {columns} from preview.sessions"):
        places = ", ".join(["%s"] * len(row))
        await copy.sql(f"insert into preview.sessions ({columns}) values ({places})", *row)


async def test_a_local_machine_s_directory_is_not_taken_over(
    worlds: tuple[World, World], tmp_path: Path
) -> None:
    """The directory is the session's, and a copied database knows the session too."""
    original, copy = worlds
    command = (sys.executable, "-c", "import time; time.sleep(600)")
    drivers = [LocalMachines(tmp_path, environment={}, command=command) for _ in range(2)]
    first, second = (world.controller_of(driver) for world, driver in zip(worlds, drivers, strict=True))
    session = await begin(original, first, key="k")
    await copy_sessions(original, copy)
    await second.request(session.project_id, key="k", generation=2, ttl=600)
    await idle(second)
    refused = await copy.store.get(session.id)
    assert refused is not None
    assert refused.state is State.FAILED
    assert refused.problem is not None
    assert "another installation" in refused.problem
    assert await alive(drivers[0], session)
    await first.end(session.id)
    for controller in (first, second):
        await idle(controller)
        await controller.close()


# --- machines from before they carried a mark


def unmarked(platform: Platform, session_id: UUID, generation: int = 1) -> Machine:
    """A machine that an orchestrator of before made."""
    name = machine_name(None, session_id, generation)
    machine = Machine("fake", f"old-{len(platform.machines)}", name, MachineState.RUNNING, 0.0)
    platform.machines[machine.id] = machine
    return machine


async def upgraded(world: World) -> SessionController:
    """An orchestrator whose installation got its id just now: the sessions there are from before."""
    await world.sql("update preview.installation set since = now() + interval '1 second'")
    world.installation = await world.store.installation()
    return world.controller_of()


async def test_a_machine_of_before_is_kept_by_who_has_its_session_and_by_nobody_else(
    worlds: tuple[World, World],
) -> None:
    platform = worlds[0].platform
    session = await begin(worlds[0], worlds[0].controller)
    platform.machines.clear()
    old = unmarked(platform, session.id)
    await worlds[0].sql("update preview.sessions set machine_id = %s", old.id)
    nobodys = unmarked(platform, uuid4())
    controllers = [await upgraded(world) for world in worlds]
    for _ in range(2):
        for controller in controllers:
            await controller.sweep()
        await idle(*controllers)
    assert set(platform.machines) == {old.id, nobodys.id}
    await controllers[0].end(session.id)
    await idle(*controllers)
    assert set(platform.machines) == {nobodys.id}


async def test_a_machine_of_before_whose_reply_was_lost_is_adopted(worlds: tuple[World, World]) -> None:
    world, platform = worlds[0], worlds[0].platform
    session, _ = await world.store.create(await world.project(), key=None, generation=1, ttl=600)
    old = unmarked(platform, session.id)
    controller = await upgraded(world)
    await controller.sweep()
    await idle(controller)
    adopted = await world.store.get(session.id)
    assert adopted is not None
    assert adopted.machine_id == old.id
    assert set(platform.machines) == {old.id}


async def test_a_machine_of_before_that_is_left_of_a_session_that_is_over_is_destroyed(
    worlds: tuple[World, World],
) -> None:
    world, platform = worlds[0], worlds[0].platform
    session = await begin(world, world.controller)
    await world.controller.end(session.id)
    await idle(world.controller)
    unmarked(platform, session.id)
    await (await upgraded(world)).sweep()
    assert not platform.machines


async def test_a_next_generation_ends_the_machine_of_before(worlds: tuple[World, World]) -> None:
    world, platform = worlds[0], worlds[0].platform
    session = await begin(world, world.controller, key="k")
    platform.machines.clear()
    unmarked(platform, session.id)
    controller = await upgraded(world)
    await controller.request(session.project_id, key="k", generation=2, ttl=600)
    await idle(controller)
    assert [machine.name for machine in platform.machines.values()] == [world.name_of(session.id, 2)]


async def test_of_two_of_one_generation_the_one_that_is_written_down_stays(
    worlds: tuple[World, World],
) -> None:
    """RACE: an orchestrator of before makes one, and its reply is lost, while ours runs already."""
    world, platform = worlds[0], worlds[0].platform
    session = await begin(world, world.controller)
    unmarked(platform, session.id)
    await world.controller.sweep()
    assert set(platform.machines) == {session.machine_id}


# --- the id


async def test_a_database_has_one_id_and_keeps_it(worlds: tuple[World, World]) -> None:
    ids = {(await world.store.installation()).id for world in worlds for _ in range(2)}
    assert ids == {world.installation.id for world in worlds}
    assert len(ids) == 2
    await worlds[0].sql("delete from preview.installation")
    again = await asyncio.gather(*(worlds[0].store.installation() for _ in range(4)))
    assert len({installation.id for installation in again}) == 1
    assert again[0].id not in ids
    with pytest.raises(Exception, match=r"installation_pkey|only_row"):
        await worlds[0].sql("insert into preview.installation (only_row) values (false)")
    assert again[0].id.hex.startswith(again[0].mark)
