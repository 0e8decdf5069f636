"""The control plane as a hypothesis state machine: everything that can go wrong, in any order, any number of times.

Each rule is done by an orchestrator of its own, which may be killed at any of its steps: before or after any call to
the database or to the platform. What must hold is the issue's sentence: never two live machines for a session, never
a machine without an owner after the sweep, never a session stuck in between past its deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
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

from orchestrator_stub.control import Control
from orchestrator_stub.machines import MachineState
from orchestrator_stub.sessions import ENDED, State, owner_of
from tests.fakes.machines import FakeMachines, Platform
from tests.orchestrator.control_world import World, control_world
from tests.profiles import examples

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


class ControlMachine(RuleBasedStateMachine):
    """Sessions of two projects, under every fault."""

    database = ""
    runner: asyncio.Runner

    def run(self, step: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(step)

    @initialize()
    def begin(self) -> None:
        self.context = control_world(self.database)
        self.world: World = self.run(self.context.__aenter__())
        # Each example has the table to itself; the platform is a new one anyway.
        self.run(self.world.sql("truncate preview.sessions"))
        self.projects = [self.run(self.world.project()) for _ in range(2)]
        self.create("a", None, 0)
        self.create("b", None, 0)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        try:
            self.settle()
        finally:
            self.run(self.context.__aexit__(None, None, None))

    async def by_somebody(self, fuse: int, act: Callable[[Control], Awaitable[Any]]) -> None:
        """`act` in an orchestrator of its own, with all it started, killed at its `fuse`th step (0: never)."""
        steps = [fuse]
        control = self.world.control_of(
            Mortal(FakeMachines(self.world.platform), steps), Mortal(self.world.store, steps)
        )
        try:
            await act(control)
            while control._tasks:
                await asyncio.wait(list(control._tasks.values()))
        except Killed:
            pass
        finally:
            await control.drop()

    fuses = st.just(0) | st.integers(1, 14)

    @rule(key=st.sampled_from(KEYS), generation=st.none() | st.integers(1, 3), fuse=fuses)
    def create(self, key: str | None, generation: int | None, fuse: int) -> None:
        project = self.projects[key == "b"]

        async def act(control: Control) -> None:
            await control.request(project, key=key, generation=generation, ttl=600)

        self.run(self.by_somebody(fuse, act))

    @rule(fuse=fuses)
    def sweep(self, fuse: int) -> None:
        async def act(control: Control) -> None:
            try:
                await control.sweep()
            except Exception:
                assert self.world.platform.down, "a sweep fails only while the platform is away"

        self.run(self.by_somebody(fuse, act))

    @rule(nth=st.integers(0, 3), fuse=fuses)
    def delete(self, nth: int, fuse: int) -> None:
        sessions = self.rows()
        session_id = sessions[nth % len(sessions)][0]
        self.run(self.by_somebody(fuse, lambda control: control.end(session_id)))

    @rule(nth=st.integers(0, 3), state=st.sampled_from(["installing", "serving"]))
    def heartbeat(self, nth: int, state: str) -> None:
        """A machine that runs says so, and obeys."""
        platform = self.world.platform
        running = [m for m in platform.machines.values() if m.state is MachineState.RUNNING]
        if not running:
            return
        machine = running[nth % len(running)]
        spec = platform.specs[machine.id]

        async def beat() -> int:
            answer = await self.world.http.put(
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
        machines = list(self.world.platform.machines)
        if machines:
            del self.world.platform.machines[machines[nth % len(machines)]]

    @rule(seconds=st.sampled_from([1, 30, 90, 150, 320, 700]))
    def time_passes(self, seconds: int) -> None:
        self.run(self.world.pass_time(seconds))

    @rule(what=st.sampled_from(["lost reply", "platform", "storage", "all is well"]))
    def trouble(self, what: str) -> None:
        platform = self.world.platform
        platform.down = what == "platform"
        platform.lose_replies = int(what == "lost reply")
        self.world.snapshots.broken = what == "storage"

    @invariant()
    def never_two_live_machines_for_a_session(self) -> None:
        if not hasattr(self, "world"):
            return
        owners = [
            (owner_of(machine.name) or (None,))[0]
            for machine in self.world.platform.machines.values()
            if machine.state is MachineState.RUNNING
        ]
        assert len(owners) == len(set(owners))

    @invariant()
    def what_is_over_has_no_machine(self) -> None:
        if not hasattr(self, "world"):
            return
        for session_id, state, _ in self.rows():
            if state in ENDED:
                assert not self.world.platform.live(session_id)

    def rows(self) -> list[tuple[UUID, str, str | None]]:
        rows: list[tuple[UUID, str, str | None]] = self.run(
            self.world.sql("select id, state, machine_id from preview.sessions order by created_at, id")
        )
        return rows

    def settle(self) -> None:
        """The faults end, claims lapse, one orchestrator sweeps: everything must come out right."""
        platform: Platform = self.world.platform
        platform.down, platform.lose_replies, self.world.snapshots.broken = False, 0, False
        self.run(self.world.pass_time(self.world.settings.claim_seconds + 1))

        async def act(control: Control) -> None:
            for _ in range(3):
                await control.sweep()
                while control._tasks:
                    await asyncio.wait(list(control._tasks.values()))

        self.run(self.by_somebody(0, act))
        rows = {row[0]: row for row in self.rows()}
        for machine in platform.machines.values():
            owner = owner_of(machine.name)
            assert owner is not None
            assert owner[0] in rows, f"{machine.name} is nobody's"
            assert rows[owner[0]][1] not in ENDED, f"{machine.name} outlives its session"
            assert rows[owner[0]][2] == machine.id, f"{machine.name} is not the one its session knows"
        for session_id, state, machine_id in rows.values():
            assert state not in (State.REQUESTED, State.DRAINING), f"{session_id} is stuck in {state}"
            if state not in ENDED:
                assert machine_id in platform.machines, f"{session_id} has no machine"

        self.run(self.world.pass_time(self.world.settings.provision_seconds + 1))
        self.run(self.by_somebody(0, act))
        assert {row[1] for row in self.rows()} <= {*ENDED, State.READY}
        self.run(self.world.pass_time(10_000))
        self.run(self.by_somebody(0, act))
        assert {row[1] for row in self.rows()} <= {str(state) for state in ENDED}
        assert not platform.machines


@pytest.mark.parametrize("long", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_the_control_plane_survives_everything(postgres_dsn: str, database: str, long: bool) -> None:
    with asyncio.Runner() as runner:
        machine = type("Machine", (ControlMachine,), {"database": database, "runner": runner})
        # A failure is shown as found: each step is a round of real queries, and shrinking takes minutes of them.
        phases = (Phase.explicit, Phase.reuse, Phase.generate)
        number = examples(1000, 1000) if long else examples(30, 30)
        profile = settings(number, stateful_step_count=40, phases=phases)
        run_state_machine_as_test(machine, settings=profile)
