"""The `fly` driver: a machine is a Fly Machine in one app, made by the Machines API.

Its name follows from installation, session and generation, and names are unique in an app: so a creation whose reply
was lost is found again by its 409, and adopted. Fly's own restarts (`on-failure`, ten times) are kept; a machine that
ends in order is destroyed by Fly itself (`auto_destroy`).
"""

from __future__ import annotations

import asyncio
import builtins
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import httpx

from orchestrator_stub.machines.driver import (
    Machine,
    MachineRefused,
    MachineSpec,
    MachineState,
    MachineUnavailable,
    owner_of,
)
from orchestrator_stub.machines.fly_api import Conflict, FlyApi, NotThere, duration

DEV_PORT: Final = 5173
HEALTH_PORT: Final = 9464
"""The agent's defaults (protocol: environment of the container)."""

STOP_TIMEOUT: Final = 5.0
"""Seconds, Fly's default and above the agent's own STOP_GRACE of 4 s."""

SUSPEND_SECONDS: Final = 10
"""For a machine that is on its way to sleep to get there: it writes its memory down."""

SLICE: Final = 500
"""Machines of a listing that are read without a pause: some 5 ms."""

METADATA: Final = "preview_session"
INSTALLATION: Final = "preview_installation"
"""Say whose a machine is, for a person in Fly's dashboard; the control plane itself goes by the name, which nobody can
change."""

STATES: Final = {
    "created": MachineState.STARTING,
    "starting": MachineState.STARTING,
    "restarting": MachineState.STARTING,
    "replacing": MachineState.STARTING,
    "updating": MachineState.STARTING,
    "started": MachineState.RUNNING,
    "stopping": MachineState.RUNNING,
    "suspending": MachineState.RUNNING,
    "stopped": MachineState.STOPPED,
    "suspended": MachineState.SUSPENDED,
    "failed": MachineState.STOPPED,
    "launch_failed": MachineState.STOPPED,
    "destroying": MachineState.GONE,
    "destroyed": MachineState.GONE,
    "replaced": MachineState.GONE,
}
"""Fly's states, folded. One that is not listed counts as starting: the session's deadline judges it."""


@dataclass(frozen=True, slots=True)
class FlyShape:
    """What every machine is made of. `preview_url` may use `{machine_id}` and `{app}`; memory in megabytes.

    `services`: Fly's own proxy reaches the dev server. Without, nothing does but the private network, so that nobody
    walks past the door.
    """

    app: str
    image: str
    cpus: int = 1
    memory_mb: int = 1024
    preview_url: str = "http://{machine_id}.vm.{app}.internal:5173"
    services: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """An app's machines that a control plane made and that are not gone, and the same by session."""

    machines: list[Machine] = field(default_factory=list)
    of: dict[UUID, list[Machine]] = field(default_factory=dict)


class FlyMachines:
    """Runs machines in one Fly app."""

    kind = "fly"

    def __init__(self, api: FlyApi, shape: FlyShape, http: httpx.AsyncClient | None = None) -> None:
        self._api = api
        self._shape = shape
        self._http = http
        self._listing: asyncio.Task[Listing] | None = None
        self._next_listing: asyncio.Task[Listing] | None = None

    async def create(self, spec: MachineSpec) -> Machine:
        try:
            return self._machine(await self._api.create(machine_request(spec, self._shape)))
        except NotThere as error:
            raise MachineRefused(f"the Fly app {self._shape.app!r} is not there: {error}") from None
        except Conflict as conflict:
            return await self._adopt(spec, conflict)

    async def inspect(self, machine_id: str) -> Machine | None:
        found = await self._api.get(machine_id)
        machine = self._machine(found) if found is not None else None
        return None if machine is None or machine.state is MachineState.GONE else machine

    async def find(self, session_id: UUID) -> builtins.list[Machine]:
        return [*(await self._shared_listing()).of.get(session_id, ())]

    async def list(self) -> builtins.list[Machine]:
        return (await self._shared_listing()).machines

    async def suspend(self, machine_id: str) -> None:
        machine = await self.inspect(machine_id)
        if machine is None or machine.state is not MachineState.RUNNING:
            return
        try:
            await self._api.suspend(machine_id)
        except NotThere:
            return
        except Conflict as conflict:
            raise MachineUnavailable(str(conflict)) from None

    async def resume(self, machine_id: str) -> bool:
        # What is on its way to sleep cannot be started before it is there.
        found = await self._api.get(machine_id)
        if found is not None and found.get("state") == "suspending":
            await self._api.wait(machine_id, "suspended", timeout=SUSPEND_SECONDS)
            found = await self._api.get(machine_id)
        if found is None:
            return False
        if found.get("state") != "suspended":
            return self._machine(found).state is MachineState.RUNNING
        try:
            await self._api.start(machine_id)
        except NotThere:
            return False
        except Conflict as conflict:
            raise MachineUnavailable(str(conflict)) from None
        return True

    async def retire(self, machine_id: str) -> None:
        await self.destroy(machine_id)

    async def destroy(self, machine_id: str) -> None:
        try:
            await self._api.destroy(machine_id)
        except Conflict as conflict:
            # Somebody holds a lease on it: it ends by itself, and the sweeper comes again.
            raise MachineUnavailable(str(conflict)) from None

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()

    async def _adopt(self, spec: MachineSpec, conflict: Conflict) -> Machine:
        """The machine that has this name already; started, should it stand still."""
        for machine in await self.find(spec.session_id):
            if machine.name == spec.name:
                if machine.state in (MachineState.STOPPED, MachineState.SUSPENDED):
                    await self._api.start(machine.id)
                return machine
        # The name is held by a machine that is on its way out.
        raise MachineUnavailable(f"{conflict}; the machine of that name is not to be seen yet")

    async def _shared_listing(self) -> Listing:
        """A listing that began after this call did. Those who ask while one is under way share the next."""
        if self._listing is None:
            self._listing = asyncio.create_task(self._list_once(), name="fly list")
            return await asyncio.shield(self._listing)
        if self._next_listing is None:
            self._next_listing = asyncio.create_task(self._list_after(self._listing), name="fly list")
        return await asyncio.shield(self._next_listing)

    async def _list_once(self) -> Listing:
        try:
            listing = Listing()
            for place, found in enumerate(await self._api.list(), 1):
                machine = self._machine(found)
                owner = owner_of(machine.name)
                if owner is not None and machine.state is not MachineState.GONE:
                    listing.machines.append(machine)
                    listing.of.setdefault(owner.session_id, []).append(machine)
                if place % SLICE == 0:
                    await asyncio.sleep(0)
            return listing
        finally:
            self._listing = None

    async def _list_after(self, before: asyncio.Task[Any]) -> Listing:
        await asyncio.wait([before])
        self._listing, self._next_listing = self._next_listing, None
        return await self._list_once()

    def _machine(self, found: dict[str, Any]) -> Machine:
        machine_id = str(found["id"])
        return Machine(
            driver=self.kind,
            id=machine_id,
            name=str(found.get("name", "")),
            state=STATES.get(str(found.get("state")), MachineState.STARTING),
            created_at=_moment(found.get("created_at")),
            region=str(found["region"]) if found.get("region") else None,
            preview_url=self._shape.preview_url.format(machine_id=machine_id, app=self._shape.app),
            health_url=f"http://{machine_id}.vm.{self._shape.app}.internal:{HEALTH_PORT}",
        )


def machine_request(spec: MachineSpec, shape: FlyShape) -> dict[str, Any]:
    """The body of `POST …/machines`. Durations are text with a unit: a bare number would be nanoseconds."""
    request: dict[str, Any] = {
        "name": spec.name,
        "config": {
            "image": spec.image or shape.image,
            "env": dict(spec.env),
            "guest": {"cpu_kind": "shared", "cpus": shape.cpus, "memory_mb": shape.memory_mb},
            "auto_destroy": True,
            "restart": {"policy": "on-failure", "max_retries": 10},
            "stop_config": {"signal": "SIGTERM", "timeout": duration(STOP_TIMEOUT)},
            "metadata": {METADATA: str(spec.session_id), INSTALLATION: str(spec.installation)},
            "metrics": {"port": HEALTH_PORT, "path": "/metrics"},
            "checks": {
                "ready": {
                    "type": "http",
                    "port": HEALTH_PORT,
                    "method": "GET",
                    "path": "/readyz",
                    "interval": duration(15),
                    "timeout": duration(5),
                    "grace_period": duration(60),
                }
            },
        },
    }
    if shape.services:
        request["config"]["services"] = [
            {
                "protocol": "tcp",
                "internal_port": DEV_PORT,
                "autostart": False,
                "autostop": "off",
                "ports": [
                    {"port": 80, "handlers": ["http"], "force_https": True},
                    {"port": 443, "handlers": ["http", "tls"]},
                ],
            }
        ]
    if spec.region is not None:
        request["region"] = spec.region
    return request


def _moment(text: object) -> float:
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0
