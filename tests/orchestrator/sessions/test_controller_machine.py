"""The control plane as a hypothesis state machine: everything that can go wrong, in any order, any number of times.

Each rule is done by an orchestrator of its own, which may be killed at any of its steps: before or after any call to
the database or to the platform. There are two databases, so two installations, on one platform, and machines of nobody.
What must hold: never two live machines for a session, never a machine without an owner after the sweep, never a session
stuck in between past its deadline, and no machine ended but by the installation that made it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any
from uuid import UUID

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from orchestrator_stub.machines.driver import Machine, MachineError, MachineState, owner_of
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.lifecycle import ENDED, State
from orchestrator_stub.sessions.rollout import Rollout, Stopped
from tests.fakes.machines import FakeMachines, Platform
from tests.orchestrator.sessions.control_world import World, control_world
from tests.profiles import examples

IMAGES = ("image:1", "image:2")
KEYS = ["a", "b", None]


class Killed(BaseException):
    """The orchestrator is no more. Not an `Exception`: nothing in it can catch this and go on."""


class Mortal:
    """A part of an orchestrator that dies after so many steps; a step is the way into or out of a call."""

    def __init__(self, part: Any, fuse: list[int]) -> None:
        self._part = part
        self._fuse = fuse

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        if not asyncio.iscoroutinefunction(value):
            return value

        async def call(*args: Any, **kwargs: Any) -> Any:
            self._burn()
            answer = await value(*args, **kwargs)
            self._burn()
            return answer

        return call

    def _burn(self) -> None:
        self._fuse[0] -= 1
        if self._fuse[0] == 0:
            raise Killed


class Watched(FakeMachines):
    """A driver of one installation; `wrongs` gets each machine of somebody else that it was told to end."""

    def __init__(self, platform: Platform, mark: str, wrongs: list[str]) -> None:
        super().__init__(platform)
        self._mark = mark
        self._wrongs = wrongs

    async def destroy(self, machine_id: str) -> None:
        machine = self.platform.machines.get(machine_id)
        owner = owner_of(machine.name) if machine else None
        if machine is not None and (owner is None or owner.mark != self._mark):
            self._wrongs.append(machine.name)
        await super().destroy(machine_id)


NOBODYS = ("preview-" + "0" * 32 + "-g1", "somebody-s-own")
"""From before machines carried a mark, of a session that no database knows; and a name that says nothing."""


class ControlMachine(RuleBasedStateMachine):
    """Sessions of two projects in each of two installations, under every fault."""

    databases: tuple[str, str] = ("", "")
    runner: asyncio.Runner

    def run(self, step: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(step)

    @initialize()
    def begin(self) -> None:
        self.platform = Platform()
        self.wrongs: list[str] = []
        self.contexts = [control_world(dsn, platform=self.platform) for dsn in self.databases]
        self.worlds: list[World] = [self.run(context.__aenter__()) for context in self.contexts]
        for n, name in enumerate(NOBODYS):
            self.platform.machines[f"nobody-{n}"] = Machine(
                "fake", f"nobody-{n}", name, MachineState.STOPPED, 0.0
            )
        self.projects = []
        for world in self.worlds:
            # Each example has the table to itself; the platform is a new one anyway.
            self.run(world.sql("truncate preview.sessions, preview.rollout"))
            self.projects.append([self.run(world.project()) for _ in range(2)])
        for which in range(2):
            self.create(which, "a", None, 0)
            self.create(which, "b", None, 0)

    def teardown(self) -> None:
        if not hasattr(self, "worlds"):
            return
        try:
            self.settle()
        finally:
            for context in self.contexts:
                self.run(context.__aexit__(None, None, None))

    async def by_somebody(
        self, world: World, fuse: int, act: Callable[[SessionController], Awaitable[Any]]
    ) -> None:
        """`act` in an orchestrator of its own, with all it started, killed at its `fuse`th step (0: never)."""
        steps = [fuse]
        driver = Watched(self.platform, world.installation.mark, self.wrongs)
        controller = world.controller_of(Mortal(driver, steps), Mortal(world.store, steps))
        try:
            await act(controller)
            while controller._tasks:
                await asyncio.wait(list(controller._tasks.values()))
        except Killed:
            pass
        finally:
            await controller.drop()

    which = st.integers(0, 1)
    fuses = st.just(0) | st.integers(1, 14)

    @rule(which=which, key=st.sampled_from(KEYS), generation=st.none() | st.integers(1, 3), fuse=fuses)
    def create(self, which: int, key: str | None, generation: int | None, fuse: int) -> None:
        project = self.projects[which][key == "b"]

        async def act(controller: SessionController) -> None:
            await controller.request(project, key=key, generation=generation, ttl=600)

        self.run(self.by_somebody(self.worlds[which], fuse, act))

    @rule(which=which, fuse=fuses)
    def sweep(self, which: int, fuse: int) -> None:
        async def act(controller: SessionController) -> None:
            try:
                await controller.sweep()
            except Exception:
                assert self.platform.down, "a sweep fails only while the platform is away"

        self.run(self.by_somebody(self.worlds[which], fuse, act))

    @rule(which=which, nth=st.integers(0, 3), fuse=fuses)
    def delete(self, which: int, nth: int, fuse: int) -> None:
        sessions = self.rows(self.worlds[which])
        session_id = sessions[nth % len(sessions)][0]
        self.run(self.by_somebody(self.worlds[which], fuse, lambda controller: controller.end(session_id)))

    @rule(nth=st.integers(0, 3), state=st.sampled_from(["installing", "serving"]))
    def heartbeat(self, nth: int, state: str) -> None:
        """A machine that runs says so, and obeys."""
        platform = self.platform
        running = [m for m in platform.machines.values() if m.state is MachineState.RUNNING]
        if not running:
            return
        machine = running[nth % len(running)]
        spec = platform.specs[machine.id]
        (world,) = [world for world in self.worlds if world.installation.id == spec.installation]

        async def beat() -> int:
            answer = await world.http.put(
                f"/v1/sessions/{spec.session_id}/status",
                json={"state": state, "revision": 0},
                headers={"Authorization": f"Bearer {spec.env['REALTIME_TOKEN']}"},
            )
            if answer.status_code == 200 and answer.json().get("action") == "stop":
                platform.stop(machine.id)
            if answer.status_code in (404, 410):
                platform.stop(machine.id)
            return answer.status_code

        assert self.run(beat()) in (200, 404, 410)

    @rule(nth=st.integers(0, 3))
    def machine_vanishes(self, nth: int) -> None:
        machines = [machine_id for machine_id in self.platform.machines if machine_id in self.platform.specs]
        if machines:
            del self.platform.machines[machines[nth % len(machines)]]

    @rule(which=which, seconds=st.sampled_from([1, 30, 90, 150, 320, 700]))
    def time_passes(self, which: int, seconds: int) -> None:
        self.run(self.worlds[which].pass_time(seconds))

    @rule(which=which, what=st.sampled_from(["lost reply", "platform", "storage", "all is well"]))
    def trouble(self, which: int, what: str) -> None:
        self.platform.down = what == "platform"
        self.platform.lose_replies = int(what == "lost reply")
        self.worlds[which].snapshots.broken = what == "storage"

    @rule(which=which, nth=st.integers(0, 3), wake=st.booleans(), fuse=fuses)
    def sleep(self, which: int, nth: int, wake: bool, fuse: int) -> None:
        sessions = self.rows(self.worlds[which])
        session_id = sessions[nth % len(sessions)][0]

        async def act(controller: SessionController) -> None:
            with suppress(MachineError):
                await (controller.sleep.wake(session_id) if wake else controller.sleep.suspend(session_id))

        self.run(self.by_somebody(self.worlds[which], fuse, act))

    @rule(nth=st.integers(0, 3))
    def machine_ends_in_its_sleep(self, nth: int) -> None:
        asleep = [m for m in self.platform.machines.values() if m.state is MachineState.SUSPENDED]
        if asleep:
            self.platform.stop(asleep[nth % len(asleep)].id)

    @rule(which=which, image=st.sampled_from(IMAGES), share=st.sampled_from([0.3, 1.0]))
    def roll_out(self, which: int, image: str, share: float) -> None:
        """One step of the command, which is then killed."""
        world = self.worlds[which]
        rollout = Rollout(world.pool, image, lambda line: None)

        async def act() -> None:
            await rollout.begin(share)
            with suppress(Stopped):
                await rollout.step(share, idle=0, at_once=2)

        self.run(act())

    @rule(image=st.sampled_from([None, *IMAGES]))
    def image_is_bad(self, image: str | None) -> None:
        self.platform.refuse_image = image

    @invariant()
    def nobody_ends_what_is_not_theirs(self) -> None:
        if hasattr(self, "worlds"):
            assert self.wrongs == []
            assert {f"nobody-{n}" for n in range(len(NOBODYS))} <= set(self.platform.machines)

    @invariant()
    def never_two_live_machines_for_a_session(self) -> None:
        if not hasattr(self, "worlds"):
            return
        owners = [
            (owner_of(machine.name) or (None,))[0]
            for machine in self.platform.machines.values()
            if machine.state in (MachineState.RUNNING, MachineState.SUSPENDED)
        ]
        assert len(owners) == len(set(owners))

    @invariant()
    def what_is_over_has_no_machine(self) -> None:
        if not hasattr(self, "worlds"):
            return
        for world in self.worlds:
            for session_id, state, _ in self.rows(world):
                if state in ENDED:
                    assert not self.platform.live(session_id)

    def rows(self, world: World) -> list[tuple[UUID, str, str | None]]:
        rows: list[tuple[UUID, str, str | None]] = self.run(
            world.sql("select id, state, machine_id from preview.sessions order by created_at, id")
        )
        return rows

    def settle(self) -> None:
        """The faults end, claims lapse, one orchestrator of each sweeps: everything must come out right."""
        self.platform.down, self.platform.lose_replies = False, 0
        self.platform.refuse_image = None
        for world in self.worlds:
            world.snapshots.broken = False
        for world in self.worlds:
            self.come_right(world)
        for world in self.worlds:
            self.come_to_an_end(world)
        self.nobody_ends_what_is_not_theirs()
        assert len(self.platform.machines) == len(NOBODYS)

    def come_right(self, world: World) -> None:
        self.run(world.pass_time(world.settings.claim_seconds + 1))
        self.run(self.by_somebody(world, 0, sweep_thrice))
        rows = {row[0]: row for row in self.rows(world)}
        for machine in self.platform.machines.values():
            owner = owner_of(machine.name)
            if owner is None or owner.mark != world.installation.mark:
                continue
            assert owner.session_id in rows, f"{machine.name} is nobody's"
            assert rows[owner.session_id][1] not in ENDED, f"{machine.name} outlives its session"
            assert rows[owner.session_id][2] == machine.id, f"{machine.name} is not the one its session knows"
        for session_id, state, machine_id in rows.values():
            assert state not in (State.REQUESTED, State.DRAINING), f"{session_id} is stuck in {state}"
            if state not in (*ENDED, State.SUSPENDED):
                assert machine_id in self.platform.machines, f"{session_id} has no machine"

    def come_to_an_end(self, world: World) -> None:
        for _ in range(2):  # the second time for the former image of one whose new one did not become ready
            self.run(world.pass_time(world.settings.provision_seconds + 1))
            self.run(self.by_somebody(world, 0, sweep_thrice))
        assert {row[1] for row in self.rows(world)} <= {*ENDED, State.READY, State.SUSPENDED}
        self.run(world.pass_time(10_000))
        self.run(self.by_somebody(world, 0, sweep_thrice))
        assert {row[1] for row in self.rows(world)} <= {str(state) for state in ENDED}


async def sweep_thrice(controller: SessionController) -> None:
    for _ in range(3):
        await controller.sweep()
        while controller._tasks:
            await asyncio.wait(list(controller._tasks.values()))


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_control_plane_survives_everything(
    database: str, other_database: str, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator_stub.sessions.sleep.CLAIM_WAIT", 0.05)
    with asyncio.Runner() as runner:
        given = {"databases": (database, other_database), "runner": runner}
        machine = type("Machine", (ControlMachine,), given)
        # A failure is shown as found: each step is a round of real queries, and shrinking takes minutes of them.
        phases = (Phase.explicit, Phase.reuse, Phase.generate)
        number = examples(1000, 1000) if long else examples(16, 16)
        profile = settings(number, stateful_step_count=40, phases=phases)
        run_state_machine_as_test(machine, settings=profile)
