"""Spreads machines over several Fly apps: Fly limits creations by app, and so does what one app may hold.

Which app a session's machine is made in follows from its id alone (rendezvous hashing): making it again finds the first
one, and an app more takes its share from each of the others, and from nobody else. A machine is asked for where it was
seen last, in whichever app that is; one that was never seen, in all of them.
"""

from __future__ import annotations

import asyncio
import builtins
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final
from uuid import UUID

from orchestrator_stub.machines.driver import Machine, MachineSpec
from orchestrator_stub.machines.fly import FlyMachines

REMEMBERED: Final = 250_000
"""Machines whose app is known; of another one all apps are asked."""


def app_of(session_id: UUID, apps: Sequence[str]) -> str:
    """The app that a session's machines are made in. PURE."""
    return max(apps, key=lambda app: hashlib.sha256(f"{app} {session_id.hex}".encode()).digest())


class FlyApps:
    """The machines of several apps, by the apps' names."""

    kind = FlyMachines.kind

    def __init__(self, apps: Mapping[str, FlyMachines]) -> None:
        self._apps = apps
        self._seen: OrderedDict[str, str] = OrderedDict()
        """In which app a machine was seen last, by its id."""

    async def create(self, spec: MachineSpec) -> Machine:
        name = app_of(spec.session_id, [*self._apps])
        machine = await self._apps[name].create(spec)
        self._note(machine.id, name)
        return machine

    async def inspect(self, machine_id: str) -> Machine | None:
        return await (await self._with(machine_id)).inspect(machine_id)

    async def find(self, session_id: UUID) -> builtins.list[Machine]:
        found = await asyncio.gather(*(app.find(session_id) for app in self._apps.values()))
        return [machine for machines in found for machine in machines]

    async def list(self) -> builtins.list[Machine]:
        # All or nothing: what is not listed is taken for gone.
        listed = await asyncio.gather(*(app.list() for app in self._apps.values()))
        for name, machines in zip(self._apps, listed, strict=True):
            for machine in machines:
                self._note(machine.id, name)
            await asyncio.sleep(0)
        return [machine for machines in listed for machine in machines]

    async def suspend(self, machine_id: str) -> None:
        await (await self._with(machine_id)).suspend(machine_id)

    async def resume(self, machine_id: str) -> bool:
        return await (await self._with(machine_id)).resume(machine_id)

    async def retire(self, machine_id: str) -> None:
        await self.destroy(machine_id)

    async def destroy(self, machine_id: str) -> None:
        await (await self._with(machine_id)).destroy(machine_id)

    async def close(self) -> None:
        for app in self._apps.values():
            await app.close()

    async def _with(self, machine_id: str) -> FlyMachines:
        """The app that has a machine; any of them when none has."""
        if (seen := self._seen.get(machine_id)) is not None:
            return self._apps[seen]
        found = await asyncio.gather(*(app.inspect(machine_id) for app in self._apps.values()))
        for (name, app), machine in zip(self._apps.items(), found, strict=True):
            if machine is not None:
                self._note(machine_id, name)
                return app
        return next(iter(self._apps.values()))

    def _note(self, machine_id: str, name: str) -> None:
        self._seen[machine_id] = name
        self._seen.move_to_end(machine_id)
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
