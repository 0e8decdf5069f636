"""What a sweep asks the database, held against `lifecycle.judge` and `inventory.wanted`, which say the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from orchestrator_stub.config import Timing
from orchestrator_stub.machines.driver import Machine, MachineState, machine_name, owner_of
from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.sessions.due import Due
from orchestrator_stub.sessions.inventory import wanted
from orchestrator_stub.sessions.lifecycle import ENDED, LIVE, Action, Session, State, judge
from orchestrator_stub.sessions.store import SELECT, SessionStore, session_of
from tests.agent.loops import longest_turn
from tests.fakes.machines import FakeMachines
from tests.orchestrator.sessions.control_world import World, control_world

pytestmark = pytest.mark.asyncio(loop_scope="module")

TIMING = Timing()
SIDES = (0.0, 20.0, 120.0, 180.0, 300.0, 20 * 3600.0)
"""The deadlines of `Timing`, in seconds."""

INSERT = """
insert into preview.sessions (project_id, state, generation, expires_at, state_since, claimed_until, lease_until,
  machine_id, image_next, rolled_at, woken_at, trial)
values (%s, %s, %s, now() - %s * interval '1 s', now() - %s * interval '1 s', now() - %s * interval '1 s',
  now() - %s * interval '1 s', %s, %s, now() - %s * interval '1 s', now() - %s * interval '1 s', %s)
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(module_database: str) -> AsyncIterator[World]:
    async with control_world(module_database) as running:
        yield running


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def empty(world: World) -> None:
    await world.sql("truncate preview.sessions cascade")


async def random_sessions(world: World, dice: random.Random, count: int) -> list[Session]:
    """Sessions of every kind, on both sides of every deadline."""
    project = await world.project()

    def ago() -> float:
        return dice.choice(SIDES) + dice.choice((-10.0, 10.0, -5000.0, 5000.0))

    rows = [
        (
            project, dice.choice(list(State)).value, dice.randint(1, 3), ago() - 5000, ago(),
            dice.choice((None, ago())), dice.choice((None, ago())), dice.choice((None, f"m{n % 50}", f"m{n % 50}")),
            dice.choice((None, None, "image:2")), dice.choice((None, 1.0)), dice.choice((None, 1.0)),
            dice.random() < 0.3,
        )
        for n in range(count)
    ]  # fmt: skip
    async with world.pool.connection() as connection:
        await connection.cursor().executemany(INSERT, rows)
    return [session_of(row) for row in await world.store.found(SELECT, {})]


async def database_now(world: World) -> float:
    [[now]] = await world.sql("select extract(epoch from now())::float8")
    return float(now)


async def test_what_comes_back_is_what_the_pure_judgement_finds_something_to_do_about(world: World) -> None:
    sessions = await random_sessions(world, random.Random(1), 3_000)
    before = await database_now(world)
    found = {session.id: found for session, *found in await Due(world.store, TIMING, "0" * 12).sessions()}
    after = await database_now(world)
    seen = set()
    for session in sessions:
        judgement = judge(session, before, TIMING)
        stuck = session.state is State.DRAINING and session.state_since + TIMING.drain < before
        if judgement != judge(session, after, TIMING):
            continue  # a deadline passed at this moment
        seen.add((session.state, judgement.action))
        if judgement.action is Action.LEAVE and not stuck:
            assert session.id not in found, session
        else:
            assert found[session.id] == [judgement, stuck], session
    assert {action for _, action in seen} == set(Action)
    assert len(seen) >= 15


async def test_the_listing_is_joined_as_the_pure_words_have_it(world: World) -> None:
    dice = random.Random(2)
    sessions = await random_sessions(world, dice, 1_500)
    mark, other = world.installation.mark, "f" * 12
    machines = []
    for n in range(1_500):
        session_id = dice.choice(sessions).id if dice.random() < 0.8 else uuid4()
        name = machine_name(dice.choice((mark, mark, other, None)), session_id, dice.randint(1, 3))
        state = dice.choice(list(MachineState))
        machines.append(Machine("fake", f"m{n % 40}" if n < 40 else f"x{n}", name, state, 0.0))
    machines.append(Machine("fake", "somebody's", "somebody-s-own", MachineState.RUNNING, 0.0))
    now = await database_now(world)
    found = await Due(world.store, TIMING, mark).machines(machines)
    ours = [m for m in machines if (o := owner_of(m.name)) is not None and o.mark in (None, mark)]
    unended = {session.id: session for session in sessions if session.state not in ENDED}
    known = {session.id for session in sessions}
    unwanted = sorted(machine.id for machine in ours if not wanted(machine, unended, known))
    assert sorted(each.machine for each in found if each.what == "unwanted") == unwanted
    listed = {machine.id for machine in ours}
    run = {machine.id for machine in ours if machine.state is MachineState.RUNNING}
    left = [s for s in sessions if judge(s, now, TIMING).action is Action.LEAVE and s.machine_id is not None]
    lost = {s.id for s in left if s.state in LIVE and not s.waking and s.machine_id not in listed}
    assert {each.id for each in found if each.what == "lost"} == lost
    awake = {s.id for s in left if s.state is State.SUSPENDED and s.machine_id in run}
    assert {each.id for each in found if each.what == "awake"} == awake
    assert min(len(unwanted), len(lost), len(awake)) > 0


async def test_one_of_many_orchestrators_lists_the_machines(world: World) -> None:
    listings = 0

    class Counted(FakeMachines):
        async def list(self) -> list[Machine]:
            nonlocal listings
            listings += 1
            await release.wait()
            return await super().list()

    release = asyncio.Event()
    sweeps = [asyncio.create_task(world.controller_of(Counted(world.platform)).sweep()) for _ in range(4)]
    _, sweeping = await asyncio.wait(sweeps, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    while len(sweeping) > 1:
        _, sweeping = await asyncio.wait(sweeping, timeout=10, return_when=asyncio.FIRST_COMPLETED)
    release.set()
    await asyncio.wait(sweeps)
    assert listings == 1


async def test_a_platform_that_never_answers_keeps_the_lock_from_nobody(world: World) -> None:
    class Silent(FakeMachines):
        async def list(self) -> list[Machine]:
            await asyncio.Event().wait()
            raise AssertionError

    with pytest.raises(TimeoutError):
        await world.controller_of(Silent(world.platform), lease_seconds=0.05).sweep()
    other = world.controller_of()
    await other.sweep()
    assert other.swept_at > 0


MANY = 100_000

FILL = """
with project as (select id from public.projects limit 1)
insert into preview.sessions (id, project_id, state, expires_at, machine_id, machine_driver, lease_until, status)
select lpad(to_hex(n), 32, '0')::uuid, project.id, 'ready', now() + interval '8h', 'm' || n, 'fly',
  now() + interval '20 min', '{"state": "serving"}'
from project, generate_series(1, %(many)s) n
"""


@pytest.mark.nightly
async def test_a_hundred_thousand_sessions_hold_the_loop_for_twenty_milliseconds_at_most(
    world: World, module_database: str
) -> None:
    await world.project()
    await world.sql(FILL.replace("%(many)s", str(MANY)))
    await world.sql("update preview.sessions set lease_until = now() where id = %s", UUID(int=7))
    await world.sql("analyze preview.sessions")
    mark = world.installation.mark
    machines = [
        Machine("fly", f"m{n}", machine_name(mark, UUID(int=n), 1), MachineState.RUNNING, 0.0)
        for n in range(2, MANY + 2)
    ]
    found: list[object] = []

    async def sweep() -> None:
        async with pool_of(module_database, size=2) as pool:
            due = Due(SessionStore(pool), TIMING, mark)
            found.extend(each.what for each in await due.machines(machines))
            found.extend(judgement.action for _, judgement, _ in await due.sessions())

    held = await asyncio.to_thread(longest_turn, sweep)
    assert found == ["lost", "unwanted", Action.DRAIN]
    print(f"loop held for {held * 1000:.1f} ms at most")
    assert held <= 0.020
