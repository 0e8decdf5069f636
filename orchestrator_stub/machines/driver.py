"""Defines the protocol that every machine driver keeps, and its nouns.

A machine's name is made from its installation, session and generation (`machine_name`), so making the same
one twice is a conflict that the driver answers by *adopting* the machine that is there. That is what makes creation
exactly-once in effect, even when the reply to a creation was lost. A platform may be shared: drivers show the machines
of every installation, and the control plane touches only those whose name has its own mark.

    MachineError
    ├── MachineRefused        asking again with the same input cannot help (bad image, no such app, forbidden)
    └── MachineUnavailable    the platform did not answer, has no room, or asked us to wait     (transient)
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol
from uuid import UUID

import jwt


class MachineError(Exception):
    """Root of what a driver raises on purpose."""


class MachineRefused(MachineError):
    """The platform understood and said no; asking again with the same input cannot help."""


class MachineUnavailable(MachineError):
    """The platform did not answer, has no room, or asked us to wait `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        self.retry_after = retry_after
        super().__init__(message)


class MachineState(StrEnum):
    """What the platform says of a machine, folded to what the control plane can act on."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPED = "stopped"
    """Not running, and could be started again (stopped, crashed for good)."""
    SUSPENDED = "suspended"
    """Asleep, with its memory."""
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """One machine to make. `env` is exactly what the agent is given (protocol: environment of the container)."""

    name: str
    installation: UUID
    project_id: UUID
    session_id: UUID
    generation: int
    env: Mapping[str, str] = field(repr=False)
    region: str | None = None
    image: str | None = None
    """What it is made of; None: what the driver was set up with."""

    def __post_init__(self) -> None:
        """Raises `ValueError` for an environment with a key that may do everything: no machine is given one."""
        for name, value in self.env.items():
            if "SERVICE_ROLE" in name.upper() or value.startswith("sb_secret_") or _is_service_token(value):
                raise ValueError(f"{name} would give a machine a service-role key")


def _is_service_token(value: str) -> bool:
    """Whether a value is a JWT whose role is `service_role`. Read, not verified: it is ours either way."""
    if value.count(".") != 2:
        return False
    try:
        return jwt.decode(value, options={"verify_signature": False}).get("role") == "service_role"
    except jwt.InvalidTokenError:
        return False


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine that exists. `id` is the platform's; `created_at` in Unix seconds."""

    driver: str
    id: str
    name: str
    state: MachineState
    created_at: float
    region: str | None = None
    preview_url: str | None = None
    health_url: str | None = None


class MachineDriver(Protocol):
    """A place that runs machines. Every call is safe to repeat."""

    @property
    def kind(self) -> str:
        """`local`, `container` or `fly`: what a session says its machine's driver is."""
        ...

    async def create(self, spec: MachineSpec) -> Machine:
        """Make and start the machine, or adopt the one of that name. Raises `MachineError`."""
        ...

    async def inspect(self, machine_id: str) -> Machine | None:
        """The machine, or None when it is gone. Raises `MachineError`."""
        ...

    async def find(self, session_id: UUID) -> builtins.list[Machine]:
        """The session's machines, of whatever generation, that are not gone. Raises `MachineError`."""
        ...

    async def list(self) -> builtins.list[Machine]:
        """Every machine that a control plane made, ours or another's, and that is not gone. Raises `MachineError`."""
        ...

    async def suspend(self, machine_id: str) -> None:
        """Put the machine to sleep with its memory; one that is gone or sleeps is no error. Raises `MachineError`."""
        ...

    async def resume(self, machine_id: str) -> bool:
        """Let a sleeping machine go on; whether it runs. False: it is gone, or did not sleep but end.

        Raises `MachineError`.
        """
        ...

    async def retire(self, machine_id: str) -> None:
        """End the machine because its session's next one follows; what the session keeps (a directory, a volume)
        stays. One that is gone already is no error. Raises `MachineError`."""
        ...

    async def destroy(self, machine_id: str) -> None:
        """Stop and remove the machine; one that is gone already is no error. Raises `MachineError`."""
        ...

    async def close(self) -> None:
        """Let go of the driver's own resources. Machines live on."""
        ...


@dataclass(frozen=True, slots=True)
class Installation:
    """All the orchestrators on one database. `since` in Unix seconds: machines of older sessions carry no mark."""

    id: UUID
    since: float

    @property
    def mark(self) -> str:
        """What a machine's name says of it: 48 bits, which with session and generation fit into a DNS label."""
        return mark_of(self.id)


class Owner(NamedTuple):
    """Whose a machine is, as its name says. `mark` None: from before machines carried one."""

    session_id: UUID
    generation: int
    mark: str | None


_NAME = re.compile(
    r"preview-(?:(?P<mark>[0-9a-f]{12})-)?(?P<session>[0-9a-f]{32})-g(?P<generation>[0-9]{1,10})"
)


def mark_of(installation: UUID) -> str:
    return installation.hex[:12]


def machine_name(mark: str | None, session_id: UUID, generation: int) -> str:
    """The one name this machine can have: making it twice is a conflict, not a twin."""
    return (
        f"preview-{mark}-{session_id.hex}-g{generation}"
        if mark
        else f"preview-{session_id.hex}-g{generation}"
    )


def owner_of(name: str) -> Owner | None:
    """Whose machine a name speaks of; None when no control plane of ours made it."""
    match = _NAME.fullmatch(name)
    return Owner(UUID(hex=match["session"]), int(match["generation"]), match["mark"]) if match else None
