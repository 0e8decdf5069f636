"""Two orchestrators on one database, under load at the same time, killed in turn."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from uuid import UUID

from orchestrator_stub.machines.driver import Machine, MachineSpec, owner_of
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.lifecycle import ENDED
from tests.fakes.machines import FakeMachines
from tests.orchestrator.sessions.control_world import World, control_world


class SlowMachines(FakeMachines):
    """A platform that takes its time, so that everything overlaps."""

    async def create(self, spec: MachineSpec) -> Machine:
        await asyncio.sleep(random.uniform(0, 0.02))
        machine = await super().create(spec)
        await asyncio.sleep(random.uniform(0, 0.02))
        return machine

    async def destroy(self, machine_id: str) -> None:
        await asyncio.sleep(random.uniform(0, 0.01))
        await super().destroy(machine_id)


async def settle(world: World) -> None:
    await world.pass_time(world.settings.claim_seconds + 1)
    last = world.controller_of(SlowMachines(world.platform))
    for _ in range(3):
        await last.sweep()
        while last._tasks:
            await asyncio.wait(list(last._tasks.values()))
    await last.close()


async def test_killed_in_turn_under_load(database: str) -> None:
    async with control_world(database) as world:
        projects = [await world.project() for _ in range(4)]
        orchestrators: dict[int, SessionController] = {}
        stop = asyncio.Event()

        def reborn(n: int) -> None:
            orchestrators[n] = world.controller_of(SlowMachines(world.platform))

        async def client(n: int) -> None:
            """Asks both for the same sessions, and ends some of them."""
            for turn in range(12):
                controller = orchestrators[(n + turn) % 2]
                key = f"key-{(n * 5 + turn) % 16}"
                project = projects[int(key[4:]) % 4]
                session, _ = await controller.request(project, key=key, generation=None, ttl=600)
                if (n + turn) % 5 == 0:
                    await orchestrators[(n + turn + 1) % 2].end(session.id)
                await asyncio.sleep(random.uniform(0, 0.02))

        async def sweeping() -> None:
            while not stop.is_set():
                await asyncio.gather(*(controller.sweep() for controller in [*orchestrators.values()]))
                await asyncio.sleep(0.05)

        async def killing() -> None:
            n = 0
            while not stop.is_set():
                await asyncio.sleep(0.15)
                victim, n = orchestrators[n % 2], n + 1
                reborn((n - 1) % 2)
                await victim.drop()

        reborn(0)
        reborn(1)
        others = [asyncio.create_task(sweeping()), asyncio.create_task(killing())]
        await asyncio.gather(*(client(n) for n in range(6)))
        stop.set()
        await asyncio.gather(*others)
        for controller in orchestrators.values():
            await controller.close()
        await settle(world)

        rows = await world.sql("select id, state, machine_id, idempotency_key from preview.sessions")
        assert len(rows) == len({key for *_, key in rows}) == 16
        wanted = {machine_id for _, state, machine_id, _ in rows if state not in ENDED}
        assert set(world.platform.machines) == wanted
        assert {state for _, state, *_ in rows} <= {"provisioning", "gone"}
        live = Counter(owner_of(machine.name) for machine in world.platform.machines.values())
        assert all(count == 1 for count in live.values())


async def test_a_session_that_ends_while_its_machine_is_made_keeps_none(database: str) -> None:
    async with control_world(database) as world:
        made, go_on = asyncio.Event(), asyncio.Event()

        class Slow(FakeMachines):
            async def create(self, spec: MachineSpec) -> Machine:
                machine = await super().create(spec)
                made.set()
                await go_on.wait()
                return machine

        controller = world.controller_of(Slow(world.platform))
        session, _ = await controller.request(await world.project(), key=None, generation=None, ttl=600)
        await made.wait()
        other = world.controller_of()
        await other.end(session.id)
        await until_over(world, session.id)
        go_on.set()
        while controller._tasks:
            await asyncio.wait(list(controller._tasks.values()))
        assert not world.platform.machines
        await controller.close()
        await other.close()


async def test_a_slow_maker_whose_turn_passed_leaves_no_machine_behind(database: str) -> None:
    """RACE: the reply to the creation comes after another orchestrator ended the session."""
    async with control_world(database) as world:
        asked, go_on = asyncio.Event(), asyncio.Event()

        class Late(FakeMachines):
            async def create(self, spec: MachineSpec) -> Machine:
                asked.set()
                await go_on.wait()
                return await super().create(spec)

        controller = world.controller_of(Late(world.platform))
        session, _ = await controller.request(await world.project(), key=None, generation=None, ttl=600)
        await asked.wait()
        other = world.controller_of()
        await other.end(session.id)
        await until_over(world, session.id)
        go_on.set()
        while controller._tasks:
            await asyncio.wait(list(controller._tasks.values()))
        assert not world.platform.machines
        await controller.close()
        await other.close()


async def test_only_one_sweeps_at_a_time(database: str) -> None:
    async with control_world(database) as world, world.store.sweeping() as mine:
        assert mine
        other = world.controller_of()
        assert await other.sweep() == 0
        async with world.store.sweeping() as second:
            assert not second
        await other.close()


async def test_an_orchestrator_that_stops_in_order_leaves_its_work_to_the_next_at_once(database: str) -> None:
    async with control_world(database) as world:
        asked = asyncio.Event()

        class Stuck(FakeMachines):
            async def create(self, spec: MachineSpec) -> Machine:
                asked.set()
                await asyncio.Event().wait()
                raise AssertionError

        killed, stopped = (world.controller_of(Stuck(world.platform)) for _ in range(2))
        for controller in (killed, stopped):
            asked.clear()
            await controller.request(await world.project(), key=None, generation=None, ttl=600)
            await asked.wait()
        await killed.drop()
        await stopped.close()
        other = world.controller_of()
        await other.sweep()
        assert len(world.platform.born) == 1, "the claim of the killed one still stands"
        await world.pass_time(world.settings.claim_seconds + 1)
        await other.sweep()
        assert len(world.platform.born) == 2
        await other.close()


async def until_over(world: World, session_id: UUID) -> None:
    async with asyncio.timeout(10):
        while True:
            session = await world.store.get(session_id)
            assert session is not None
            if session.state in ENDED:
                return
            await asyncio.sleep(0.01)
