"""What every machine driver keeps to, as tests. A test class for a driver inherits these and gives `driver`."""

from __future__ import annotations

from uuid import UUID, uuid4

from orchestrator_stub.machines.driver import MachineDriver, MachineSpec, MachineState, machine_name, mark_of

INSTALLATION, ANOTHER = uuid4(), uuid4()


def spec_for(
    session_id: UUID | None = None, generation: int = 1, *, of: UUID = INSTALLATION, **env: str
) -> MachineSpec:
    """A machine to be made, of the installation `of`."""
    session_id = session_id or uuid4()
    return MachineSpec(
        name=machine_name(mark_of(of), session_id, generation),
        installation=of,
        project_id=uuid4(),
        session_id=session_id,
        generation=generation,
        env={"PROJECT_ID": "p", "SESSION_ID": str(session_id), **env},
    )


class DriverContract:
    """The suite. `driver` is a fixture of the class that inherits it."""

    async def test_a_machine_is_made_found_and_destroyed(self, driver: MachineDriver) -> None:
        spec = spec_for()
        machine = await driver.create(spec)
        assert (machine.name, machine.driver) == (spec.name, driver.kind)
        assert machine.state in (MachineState.STARTING, MachineState.RUNNING)
        assert machine.preview_url is not None
        seen = await driver.inspect(machine.id)
        assert seen is not None
        assert (seen.id, seen.name) == (machine.id, machine.name)
        assert [m.id for m in await driver.find(spec.session_id)] == [machine.id]
        assert machine.id in {m.id for m in await driver.list()}
        await driver.destroy(machine.id)
        assert await driver.inspect(machine.id) is None
        assert await driver.find(spec.session_id) == []
        assert machine.id not in {m.id for m in await driver.list()}

    async def test_making_it_again_is_adopting_it(self, driver: MachineDriver) -> None:
        spec = spec_for()
        first, second = await driver.create(spec), await driver.create(spec)
        assert first.id == second.id
        assert len(await driver.find(spec.session_id)) == 1
        await driver.destroy(first.id)

    async def test_destroying_what_is_gone_is_no_error(self, driver: MachineDriver) -> None:
        machine = await driver.create(spec_for())
        await driver.destroy(machine.id)
        await driver.destroy(machine.id)
        await driver.retire(machine.id)

    async def test_the_next_generation_follows_a_retired_one(self, driver: MachineDriver) -> None:
        session_id = uuid4()
        first = await driver.create(spec_for(session_id, 1))
        await driver.retire(first.id)
        second = await driver.create(spec_for(session_id, 2))
        assert [m.name for m in await driver.find(session_id)] == [spec_for(session_id, 2).name]
        await driver.destroy(second.id)
        assert await driver.find(session_id) == []

    async def test_sessions_do_not_see_each_other_s_machines(self, driver: MachineDriver) -> None:
        one, other = spec_for(), spec_for()
        first, second = await driver.create(one), await driver.create(other)
        assert [m.id for m in await driver.find(one.session_id)] == [first.id]
        await driver.destroy(first.id)
        assert [m.id for m in await driver.find(other.session_id)] == [second.id]
        await driver.destroy(second.id)

    async def test_a_machine_sleeps_and_wakes(self, driver: MachineDriver) -> None:
        machine = await driver.create(spec_for())
        for _ in range(2):  # twice is once
            await driver.suspend(machine.id)
            asleep = await driver.inspect(machine.id)
            assert asleep is not None
            assert asleep.state is MachineState.SUSPENDED
        assert machine.id in {m.id for m in await driver.list()}
        for _ in range(2):
            assert await driver.resume(machine.id)
            awake = await driver.inspect(machine.id)
            assert awake is not None
            assert awake.state is MachineState.RUNNING
        await driver.destroy(machine.id)
        await driver.suspend(machine.id)
        assert not await driver.resume(machine.id)

    async def test_a_sleeping_machine_is_adopted_and_destroyed_like_another(
        self, driver: MachineDriver
    ) -> None:
        spec = spec_for()
        machine = await driver.create(spec)
        await driver.suspend(machine.id)
        again = await driver.create(spec)
        assert again.id == machine.id
        running = await driver.inspect(machine.id)
        assert running is not None
        assert running.state in (MachineState.STARTING, MachineState.RUNNING)
        await driver.suspend(machine.id)
        await driver.destroy(machine.id)
        assert await driver.inspect(machine.id) is None
