"""A machine platform in memory, with the faults of a real one: no room, no answer, an answer that was lost.

`Platform` is the world outside and outlives every orchestrator; `FakeMachines` is one orchestrator's driver for it.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field, replace
from uuid import UUID

from orchestrator_stub.machines.driver import (
    Machine,
    MachineRefused,
    MachineSpec,
    MachineState,
    MachineUnavailable,
    owner_of,
)


@dataclass
class Platform:
    """Every machine that exists, by id; `born` keeps every one that ever did."""

    machines: dict[str, Machine] = field(default_factory=dict)
    specs: dict[str, MachineSpec] = field(default_factory=dict)
    born: list[str] = field(default_factory=list)
    down: bool = False
    """Nothing is answered."""
    lose_replies: int = 0
    """So many calls are carried out and then not answered."""
    refuse: str | None = None
    """Why every creation is turned away for good."""
    refuse_image: str | None = None
    """No machine can be made of this image."""

    def live(self, session_id: UUID) -> list[Machine]:
        """The session's machines that run."""
        return [
            machine
            for machine in self.machines.values()
            if machine.state is MachineState.RUNNING and (owner_of(machine.name) or (None,))[0] == session_id
        ]

    def stop(self, machine_id: str) -> None:
        """The machine ends by itself, unless somebody was quicker and has destroyed it."""
        if machine_id in self.machines:
            self.change(machine_id, MachineState.STOPPED)

    def change(self, machine_id: str, state: MachineState) -> None:
        """The machine is in another state now."""
        self.machines[machine_id] = replace(self.machines[machine_id], state=state)


class FakeMachines:
    """The driver of one orchestrator for `platform`."""

    kind = "fake"

    def __init__(self, platform: Platform) -> None:
        self.platform = platform

    async def create(self, spec: MachineSpec) -> Machine:
        self._answer_or_not()
        if self.platform.refuse is not None:
            raise MachineRefused(self.platform.refuse)
        if spec.image is not None and spec.image == self.platform.refuse_image:
            raise MachineRefused(f"no such image: {spec.image}")
        known = [m for m in self.platform.machines.values() if m.name == spec.name]
        if known:
            return known[0]
        machine_id = f"m{len(self.platform.born)}"
        machine = Machine(
            "fake", machine_id, spec.name, MachineState.RUNNING, 0.0, "here", f"http://{machine_id}.invalid"
        )
        self.platform.machines[machine_id] = machine
        self.platform.specs[machine_id] = spec
        self.platform.born.append(machine_id)
        self._lose_reply_or_not()
        return machine

    async def inspect(self, machine_id: str) -> Machine | None:
        self._answer_or_not()
        return self.platform.machines.get(machine_id)

    async def find(self, session_id: UUID) -> builtins.list[Machine]:
        return [m for m in await self.list() if (owner_of(m.name) or (None,))[0] == session_id]

    async def list(self) -> builtins.list[Machine]:
        self._answer_or_not()
        return [*self.platform.machines.values()]

    async def suspend(self, machine_id: str) -> None:
        self._answer_or_not()
        if self._state(machine_id) is MachineState.RUNNING:
            self.platform.change(machine_id, MachineState.SUSPENDED)
        self._lose_reply_or_not()

    async def resume(self, machine_id: str) -> bool:
        self._answer_or_not()
        if self._state(machine_id) is MachineState.SUSPENDED:
            self.platform.change(machine_id, MachineState.RUNNING)
        self._lose_reply_or_not()
        return self._state(machine_id) is MachineState.RUNNING

    def _state(self, machine_id: str) -> MachineState:
        machine = self.platform.machines.get(machine_id)
        return machine.state if machine else MachineState.GONE

    async def retire(self, machine_id: str) -> None:
        await self.destroy(machine_id)

    async def destroy(self, machine_id: str) -> None:
        self._answer_or_not()
        self.platform.machines.pop(machine_id, None)
        self._lose_reply_or_not()

    async def close(self) -> None:
        pass

    def _answer_or_not(self) -> None:
        if self.platform.down:
            raise MachineUnavailable("the platform does not answer")

    def _lose_reply_or_not(self) -> None:
        if self.platform.lose_replies > 0:
            self.platform.lose_replies -= 1
            raise MachineUnavailable("the reply was lost")
