"""What comes at the same time: one request fifty times over, an end during a beginning, two sweeps, lost connections.

Two orchestrators share the database and the platform, as two processes would; everything takes its time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest

from orchestrator_stub.machines.driver import Machine, MachineSpec
from orchestrator_stub.platform.tokens import read_session
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.lifecycle import ENDED, State
from tests.fakes.machines import FakeMachines
from tests.orchestrator.sessions.control_world import World, control_world
from tests.orchestrator.sessions.test_two_orchestrators import SlowMachines, settle


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


@pytest.fixture
async def both(world: World) -> AsyncIterator[list[SessionController]]:
    """Two orchestrators."""
    made = [world.controller_of(SlowMachines(world.platform)) for _ in range(2)]
    yield made
    for controller in made:
        await controller.close()


async def idle(*controllers: SessionController) -> None:
    """Wait until none of them is doing anything."""
    while tasks := [task for controller in controllers for task in controller._tasks.values()]:
        await asyncio.wait(tasks)


async def test_fifty_times_the_same_key_with_every_generation_is_one_machine_of_the_newest(
    world: World, both: list[SessionController]
) -> None:
    project = await world.project()
    generations = [1 + n % 5 for n in range(50)]
    random.shuffle(generations)
    answers = await asyncio.gather(
        *(
            both[n % 2].request(project, key="k", generation=generation, ttl=600)
            for n, generation in enumerate(generations)
        )
    )
    assert len({session.id for session, _ in answers}) == 1
    assert sum(new for _, new in answers) == 1
    # The newest is made by whoever is at it, not at the next sweep.
    await idle(*both)
    session = await world.store.get(answers[0][0].id)
    assert session is not None
    assert (session.generation, session.state) == (5, State.PROVISIONING)
    assert [m.name for m in world.platform.machines.values()] == [world.name_of(session.id, 5)]
    assert session.machine_id in world.platform.machines


async def test_a_generation_asked_for_while_the_one_before_is_made_waits_for_no_sweep(world: World) -> None:
    asked, go_on = asyncio.Event(), asyncio.Event()

    class Slow(FakeMachines):
        async def create(self, spec: MachineSpec) -> Machine:
            asked.set()
            await go_on.wait()
            return await super().create(spec)

    controller = world.controller_of(Slow(world.platform))
    project = await world.project()
    session, _ = await controller.request(project, key="k", generation=1, ttl=600)
    await asked.wait()
    await controller.request(project, key="k", generation=2, ttl=600)
    go_on.set()
    await idle(controller)
    assert [m.name for m in world.platform.machines.values()] == [world.name_of(session.id, 2)]
    kept = await world.store.get(session.id)
    assert kept is not None
    assert kept.machine_id in world.platform.machines
    await controller.close()


async def test_ended_at_any_moment_of_its_beginning_it_leaves_nothing(
    world: World, both: list[SessionController]
) -> None:
    project = await world.project()

    async def begin_and_end(n: int) -> UUID:
        session, _ = await both[n % 2].request(project, key=None, generation=None, ttl=600)
        await asyncio.sleep(random.uniform(0, 0.05))
        await asyncio.gather(*(controller.end(session.id) for controller in both))
        return session.id

    ids = await asyncio.gather(*(begin_and_end(n) for n in range(40)))
    await idle(*both)
    await settle(world)
    assert not world.platform.machines
    sessions = [await world.store.get(session_id) for session_id in ids]
    assert {session.state for session in sessions if session} == {State.GONE}


async def test_two_sweeps_at_once_do_everything_once(world: World, both: list[SessionController]) -> None:
    project = await world.project()
    for n in range(20):
        await world.store.create(project, key=f"waits-{n}", generation=1, ttl=600)
        await world.store.create(project, key=f"expired-{n}", generation=1, ttl=-1)
    stray = MachineSpec(world.name_of(uuid4()), world.installation.id, project, uuid4(), 1, {})
    await FakeMachines(world.platform).create(stray)
    for _ in range(3):
        await asyncio.gather(*(controller.sweep() for controller in both))
        await idle(*both)
    rows = await world.sql("select state, machine_id, idempotency_key from preview.sessions")
    waiting = {machine_id for state, machine_id, key in rows if key.startswith("waits")}
    assert waiting == set(world.platform.machines)
    assert len(waiting) == 20
    assert {state for state, _, key in rows if key.startswith("expired")} == {"gone"}
    assert len(world.platform.born) == 21, "none was made twice, none for a session that was over"


async def test_connections_that_are_killed_in_the_middle_cost_time_and_nothing_else(
    world: World, both: list[SessionController]
) -> None:
    """`pg_terminate_backend` again and again, in whatever statement a connection happens to be."""
    projects = [await world.project() for _ in range(3)]
    stop = asyncio.Event()
    refused = 0

    async def killing() -> None:
        async with await psycopg.AsyncConnection.connect(
            world.settings.database_url.get_secret_value(), autocommit=True
        ) as killer:
            while not stop.is_set():
                await killer.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where datname = current_database() and pid <> pg_backend_pid() and random() < 0.2"
                )
                await asyncio.sleep(random.uniform(0, 0.04))

    async def tried(step: Callable[[], Awaitable[Any]]) -> Any:
        """As a caller does that is answered 503: once more."""
        nonlocal refused
        async with asyncio.timeout(60):
            while True:
                try:
                    return await step()
                except psycopg.OperationalError:
                    refused += 1
                    await asyncio.sleep(random.uniform(0, 0.02))

    async def client(n: int) -> None:
        for turn in range(8):
            key, controller = f"key-{n}-{turn % 4}", both[(n + turn) % 2]
            request = partial(controller.request, projects[n % 3], key=key, generation=1 + turn // 4, ttl=600)
            session, _ = await tried(request)
            if turn % 4 == 3:
                await tried(partial(controller.end, session.id))
            await tried(controller.sweep)

    kill = asyncio.create_task(killing())
    await asyncio.gather(*(client(n) for n in range(4)))
    stop.set()
    await kill
    await idle(*both)
    await tried(partial(settle, world))

    assert refused > 0, "nothing was killed in the middle of anything"
    rows = await world.sql("select id, state, generation, machine_id from preview.sessions")
    assert len(rows) == 16
    names = {machine.id: machine.name for machine in world.platform.machines.values()}
    wanted = {m: world.name_of(i, generation) for i, state, generation, m in rows if state not in ENDED}
    assert names == wanted
    assert {state for _, state, *_ in rows} <= {"provisioning", "gone"}


async def test_one_session_s_bug_does_not_keep_the_others_from_their_machines(world: World) -> None:
    class Buggy(FakeMachines):
        async def create(self, spec: MachineSpec) -> Machine:
            if spec.session_id == poisoned.id:
                raise KeyError("a field that is not there")
            return await super().create(spec)

    controller = world.controller_of(Buggy(world.platform))
    project = await world.project()
    poisoned, _ = await world.store.create(project, key="poisoned", generation=1, ttl=600)
    others = [await world.store.create(project, key=f"{n}", generation=1, ttl=600) for n in range(5)]
    await controller.sweep()
    assert len(world.platform.machines) == len(others)
    await world.pass_time(world.settings.provision_seconds + 1)
    await controller.sweep()
    await idle(controller)
    session = await world.store.get(poisoned.id)
    assert session is not None
    assert (session.state, (session.problem or "").split(":")[0]) == (State.FAILED, "provision_timeout")
    await controller.close()


@pytest.mark.parametrize("skew", [-3600.0, -60.0, 60.0, 3600.0])
async def test_an_orchestrator_whose_clock_is_wrong_still_gives_tokens_that_last(
    world: World, skew: float
) -> None:
    """Its tokens are made by its own clock, and the session's end is the database's."""
    session, _ = await world.store.create(await world.project(), key=None, generation=1, ttl=600)
    now = time.time() + skew
    wrong = SessionController(
        world.settings, world.store, world.snapshots, FakeMachines(world.platform), world.keys,
        runs=world.runs, installation=world.installation, clock=lambda: now,
    )  # fmt: skip
    token, expires_at = wrong.token_for(session)
    assert expires_at - now >= world.settings.sweep_seconds
    if skew > 0:
        # Another orchestrator, whose clock is right, believes it: `iat` lies in the future, and does not matter.
        assert read_session(world.keys, token).session_id == session.id
