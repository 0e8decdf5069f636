"""A session sleeps and wakes: when, in which order, and what becomes of a machine that does not go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest

from orchestrator_stub.config import Timing
from orchestrator_stub.door.store import DoorStore
from orchestrator_stub.machines.driver import MachineRefused, MachineState, MachineUnavailable
from orchestrator_stub.sessions.rollout import Rollout
from tests.fakes.machines import FakeMachines
from tests.orchestrator.sessions.control_world import (
    SERVICE_KEY,
    World,
    assert_problem,
    bearer,
    control_world,
    report,
)

SERVICE = bearer(SERVICE_KEY)
PAGES = {"revision": 0, "pages": {"visible": 0, "hidden": 1, "behind": 0}}


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


async def ready_session(world: World, **said: Any) -> dict[str, Any]:
    session = await world.session()
    answer = await report(world, session, world.token(session), **said)
    assert answer.json().get("action") != "stop"
    return session


async def ask(world: World, session: dict[str, Any], what: str) -> Any:
    return await world.http.post(f"/v1/sessions/{session['session_id']}/{what}", headers=SERVICE)


async def asleep(world: World, **said: Any) -> dict[str, Any]:
    session = await ready_session(world, **said)
    answer = await ask(world, session, "suspend")
    assert (answer.status_code, answer.json()["state"]) == (200, "suspended")
    return session


async def state(world: World, session: dict[str, Any]) -> tuple[Any, ...]:
    """State, generation, and the state of its machine."""
    while world.controller._tasks:
        await asyncio.wait(list(world.controller._tasks.values()))
    [(state, generation, machine_id)] = await world.sql(
        "select state, generation, machine_id from preview.sessions where id = %s",
        UUID(session["session_id"]),
    )
    machine = world.platform.machines.get(machine_id)
    return state, generation, machine.state if machine else None


async def head(world: World, session: dict[str, Any]) -> dict[str, Any]:
    [(epoch, revision)] = await world.sql(
        "select epoch::text, revision from public.project_heads where project_id = %s",
        UUID(session["project_id"]),
    )
    return {"epoch": epoch, "revision": revision}


async def test_it_sleeps_without_a_lease_and_is_ready_again_when_it_has_what_was_saved(world: World) -> None:
    session = await asleep(world)
    assert await state(world, session) == ("suspended", 1, MachineState.SUSPENDED)
    await world.pass_time(world.settings.lease_seconds + world.settings.provision_seconds)
    await world.controller.sweep()
    assert await state(world, session) == ("suspended", 1, MachineState.SUSPENDED)
    saved = await world.write(UUID(session["project_id"]), "a.ts", "while it slept")

    answer = await ask(world, session, "wake")
    assert (answer.status_code, answer.json()["state"]) == (202, "provisioning")
    assert await state(world, session) == ("provisioning", 1, MachineState.RUNNING)
    now = await head(world, session)
    behind = await report(world, session, world.token(session), epoch=now["epoch"], revision=saved - 1)
    assert behind.json()["action"] == "sync"
    assert (await state(world, session))[0] == "provisioning", "its page is of before"
    await report(world, session, world.token(session), **now)
    assert await state(world, session) == ("ready", 1, MachineState.RUNNING)
    assert (await ask(world, session, "wake")).status_code == 200
    assert len(world.platform.born) == 1


async def test_what_its_agent_says_just_before_it_sleeps_ends_nothing(world: World) -> None:
    session = await asleep(world)
    answer = await report(world, session, world.token(session))
    assert "action" not in answer.json() or answer.json()["action"] == "sync"
    token = await world.http.post(
        f"/v1/sessions/{session['session_id']}/token", headers=bearer(world.token(session))
    )
    assert token.status_code == 200
    assert (await state(world, session))[0] == "suspended"


@pytest.mark.parametrize("why", ["gone", "ended", "refuses", "began anew", "silent"])
async def test_a_machine_that_does_not_go_on_is_followed_by_the_next_generation(
    world: World, why: str
) -> None:
    session = await asleep(world)
    [machine_id] = world.platform.machines
    if why == "gone":
        del world.platform.machines[machine_id]
    elif why == "ended":
        world.platform.stop(machine_id)
    elif why == "refuses":
        world.platform.lose_replies = 1
    await ask(world, session, "wake")
    if why == "began anew":
        answer = await report(world, session, world.token(session), state="hydrating")
        assert answer.json()["action"] == "stop"
    elif why == "silent":
        await world.pass_time(Timing().wake + 1)
        await world.controller.sweep()
    assert await state(world, session) == ("provisioning", 2, MachineState.RUNNING)
    assert len(world.platform.machines) == 1
    session["generation"] = 2
    await report(world, session, world.token(session), **await head(world, session))
    assert (await state(world, session))[:2] == ("ready", 2)


async def test_one_that_slept_for_twenty_hours_has_no_machine_and_wakes_with_another(world: World) -> None:
    session = await asleep(world)
    await world.sql("update preview.sessions set expires_at = now() + interval '23 hours'")
    await world.pass_time(20 * 3600 - 60)
    await world.controller.sweep()
    assert (await state(world, session))[2] is MachineState.SUSPENDED
    await world.pass_time(120)
    await world.controller.sweep()
    assert await state(world, session) == ("suspended", 1, None)
    assert not world.platform.machines
    await ask(world, session, "wake")
    assert await state(world, session) == ("provisioning", 2, MachineState.RUNNING)


async def test_an_unloading_that_outlasts_its_claim_does_not_end_a_machine_that_was_woken(
    world: World,
) -> None:
    session = await asleep(world)
    session_id = UUID(session["session_id"])
    begun, go_on = asyncio.Event(), asyncio.Event()

    class Slow(FakeMachines):
        async def destroy(self, machine_id: str) -> None:
            begun.set()
            await go_on.wait()
            await super().destroy(machine_id)

    other = world.controller_of(Slow(world.platform), claim_seconds=0.3)
    unloading = asyncio.create_task(other.sleep.unload(session_id))
    await begun.wait()
    woken = await world.controller.sleep.wake(session_id)
    assert woken is not None
    assert woken.state == "provisioning"
    go_on.set()
    await asyncio.gather(unloading, return_exceptions=True)
    assert await state(world, session) == ("provisioning", 1, MachineState.RUNNING)


async def test_its_own_end_comes_in_its_sleep(world: World) -> None:
    session = await asleep(world)
    await world.pass_time(world.settings.session_ttl + 1)
    await world.controller.sweep()
    assert (await state(world, session))[0] == "gone"
    assert not world.platform.machines
    assert_problem(await ask(world, session, "wake"), 410, "session_over")


async def test_one_whose_orchestrator_was_killed_before_it_froze_the_machine_is_frozen_by_a_sweep(
    world: World,
) -> None:
    session = await ready_session(world)

    class Killed(FakeMachines):
        async def suspend(self, machine_id: str) -> None:
            raise MachineUnavailable("killed")

    with pytest.raises(MachineUnavailable):
        await world.controller_of(Killed(world.platform)).sleep.suspend(UUID(session["session_id"]))
    assert await state(world, session) == ("suspended", 1, MachineState.RUNNING)
    await world.controller.sweep()
    assert await state(world, session) == ("suspended", 1, MachineState.SUSPENDED)


async def test_of_many_wakes_one_resumes_and_none_overtakes_the_suspension(world: World) -> None:
    session = await ready_session(world)
    session_id = UUID(session["session_id"])
    order: list[str] = []
    frozen, go_on = asyncio.Event(), asyncio.Event()

    class Slow(FakeMachines):
        async def suspend(self, machine_id: str) -> None:
            frozen.set()
            await go_on.wait()
            order.append("suspend")
            await super().suspend(machine_id)

        async def resume(self, machine_id: str) -> bool:
            order.append("resume")
            return await super().resume(machine_id)

    sleeping = asyncio.create_task(world.controller_of(Slow(world.platform)).sleep.suspend(session_id))
    await frozen.wait()
    wakes = [
        asyncio.create_task(world.controller_of(Slow(world.platform)).sleep.wake(session_id))
        for _ in range(4)
    ]
    await asyncio.wait(wakes, timeout=0.2)
    go_on.set()
    await sleeping
    await asyncio.gather(*wakes)
    assert order == ["suspend", "resume"]
    assert await state(world, session) == ("provisioning", 1, MachineState.RUNNING)


async def test_only_a_ready_one_can_sleep(world: World) -> None:
    session = await world.session()
    assert_problem(await ask(world, session, "suspend"), 409, "session_not_ready")
    assert (await ask(world, session, "wake")).status_code == 202
    await world.http.delete(f"/v1/sessions/{session['session_id']}", headers=SERVICE)
    assert_problem(await ask(world, session, "suspend"), 410, "session_over")
    assert_problem(await ask(world, session, "wake"), 410, "session_over")


async def test_one_whose_platform_refuses_is_ready_as_before(world: World) -> None:
    session = await ready_session(world)
    session_id = UUID(session["session_id"])

    class Refuses(FakeMachines):
        async def suspend(self, machine_id: str) -> None:
            raise MachineRefused("only machines of 2 GB and less can be suspended")

    with pytest.raises(MachineRefused):
        await world.controller_of(Refuses(world.platform)).sleep.suspend(session_id)
    await world.controller.sweep()
    assert await state(world, session) == ("ready", 1, MachineState.RUNNING)
    assert (await ask(world, session, "suspend")).status_code == 200, "nobody holds it"


async def test_a_sleeping_one_is_ended_with_its_machine(world: World) -> None:
    session = await asleep(world)
    await world.http.delete(f"/v1/sessions/{session['session_id']}", headers=SERVICE)
    assert (await state(world, session))[0] == "gone"
    assert not world.platform.machines


async def test_a_sleeping_one_counts_against_its_user_s_bound(database: str) -> None:
    async with control_world(database, user_sessions=1) as world:
        owner = await world.user()
        project = await world.project(owner)
        user = bearer(world.user_token(owner))
        made = await world.http.post("/v1/sessions", json={"project_id": str(project)}, headers=user)
        await report(world, made.json(), world.token(made.json()))
        assert (await ask(world, made.json(), "suspend")).status_code == 200
        again = await world.http.post("/v1/sessions", json={"project_id": str(project)}, headers=user)
        assert again.status_code == 429


async def test_who_sleeps_by_itself(database: str) -> None:
    """Observed, nobody looks, nothing was saved, and it has been so for a while."""
    async with control_world(database, idle_suspend_seconds=60) as world:
        looked_at = await ready_session(world, observed=True, shown=PAGES)
        unobserved = await ready_session(world, observed=False)
        saved = await ready_session(world, observed=True, shown=None)
        idle = await ready_session(world, observed=True, shown=None)
        await world.controller.sweep()
        assert (await state(world, idle))[0] == "ready", "not yet"
        await world.pass_time(61)
        await world.sql("update public.project_heads set updated_at = updated_at - interval '61 seconds'")
        await world.write(UUID(saved["project_id"]), "a.ts", "a")
        await report(world, looked_at, world.token(looked_at), observed=True, shown=PAGES)
        await world.controller.sweep()
        states = [(await state(world, each))[0] for each in (looked_at, unobserved, saved, idle)]
        assert states == ["ready", "ready", "ready", "suspended"]
        # The page is closed, and is forgotten after the same time.
        await report(world, looked_at, world.token(looked_at), observed=True, shown=None)
        await world.controller.sweep()
        assert (await state(world, looked_at))[0] == "ready"
        await world.pass_time(61)
        await world.controller.sweep()
        assert (await state(world, looked_at))[0] == "suspended"


@pytest.mark.parametrize("on_save", [True, False])
async def test_a_save_wakes_where_that_is_set(database: str, on_save: bool) -> None:
    async with control_world(database, wake_on_save=on_save) as world:
        one, other = await asleep(world), await asleep(world)
        await world.write(UUID(one["project_id"]), "a.ts", "a")
        await world.controller.sweep()
        assert (await state(world, one))[0] == ("provisioning" if on_save else "suspended")
        assert (await state(world, other))[0] == "suspended"


async def test_a_door_that_runs_alone_has_it_woken_by_the_next_sweep(world: World) -> None:
    one, other = await asleep(world), await asleep(world)
    door = DoorStore(world.pool)
    await door.want_awake(UUID(one["session_id"]))
    await world.controller.sweep()
    assert (await state(world, one))[0] == "provisioning"
    assert (await state(world, other))[0] == "suspended"
    await report(world, one, world.token(one), **await head(world, one))
    # What was wanted then is done: it may sleep again.
    await ask(world, one, "suspend")
    await door.want_awake(UUID(other["session_id"]))
    await world.controller.sweep()
    assert (await state(world, one))[0] == "suspended"
    assert (await state(world, other))[0] == "provisioning"


async def test_what_was_rolled_out_while_it_slept_it_has_when_it_wakes(world: World) -> None:
    session = await asleep(world)
    await world.sql("update preview.sessions set image = 'preview-agent:latest'")
    rollout = Rollout(world.pool, "preview-agent:2", lambda line: None)
    await rollout.begin(1.0)
    for _ in range(3):
        await rollout.step(1.0, idle=0, at_once=1)
    assert (await state(world, session))[2] is MachineState.SUSPENDED
    await ask(world, session, "wake")
    assert await state(world, session) == ("provisioning", 2, MachineState.RUNNING)
    assert [world.platform.specs[machine].image for machine in world.platform.machines] == ["preview-agent:2"]
