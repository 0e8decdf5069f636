"""The bodies that come in, as the routes read them and as OpenAPI describes them."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from orchestrator_stub.sessions.run_settings import RunBody

NO_NUL = r"^[^\x00]*$"
"""PostgreSQL's text holds every character but this one."""

Text = Annotated[str, StringConstraints(min_length=1, max_length=255, strict=True, pattern=NO_NUL)]


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
"""JSON has one kind of number: 7.0 is a whole one, "7" and true are none."""

Revision = Annotated[int, Field(strict=True, ge=0, le=2**63 - 1), WHOLE]


class CreateBody(BaseModel):
    """`POST /v1/sessions`."""

    model_config = ConfigDict(extra="forbid")
    project_id: UUID
    generation: Annotated[int, Field(strict=True, ge=1, le=1_000_000), WHOLE] | None = None
    ttl_seconds: float | None = Field(None, ge=60, strict=True)
    run: RunBody | None = None


class SnapshotBody(BaseModel):
    """`POST /v1/sessions/{id}/snapshot`."""

    model_config = ConfigDict(extra="forbid")
    rebuild: Annotated[bool, Field(strict=True)] = False


class DoorBody(BaseModel):
    """`POST /v1/sessions/{id}/door`. `path`: where in the preview it leads; not `//`, which is another host."""

    model_config = ConfigDict(extra="forbid")
    path: Annotated[
        str, StringConstraints(max_length=2048, strict=True, pattern=r"^/([!-.0-\[\]-~][!-\[\]-~]*)?$")
    ] = "/"


class RevokeBody(BaseModel):
    """`POST /v1/sessions/{id}/door/revoke`: nothing."""

    model_config = ConfigDict(extra="forbid")


class SyncBody(BaseModel):
    """`POST …/sync`. Unknown fields are ignored: a newer agent may say more."""

    epoch: Text | None = None
    revision: Revision
    reason: Text
    paths: (
        Annotated[
            list[Annotated[str, StringConstraints(max_length=1024, strict=True, pattern=NO_NUL)]],
            Field(max_length=5000),
        ]
        | None
    ) = None
    accept: Annotated[list[Text], Field(max_length=20)] | None = None
    """What the agent reads besides whole contents: `splices`. What is not known here is passed over."""


class StatusBody(BaseModel):
    """`PUT …/status`. The whole is kept as it came; these fields are acted on."""

    model_config = ConfigDict(extra="allow")
    state: Literal[
        "starting", "hydrating", "installing", "serving", "degraded", "draining", "stopped", "halted"
    ]
    revision: Revision
    epoch: Text | None = None
    tree_hash: Text | None = None


Key = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9a-f]{40}$")]


Sha256 = Annotated[str, StringConstraints(strict=True, pattern=r"^[0-9a-f]{64}$")]


class ModulesBody(BaseModel):
    """`POST …/modules`.

    `refused`: the hash of the first part of what was answered before, and is no good. `ahead`: whether the project's
    next machine is told of this layer when it is made. `send`: whether it is to be said where to send one.
    """

    model_config = ConfigDict(extra="forbid")
    key: Key
    refused: Sha256 | None = None
    ahead: Annotated[bool, Field(strict=True)] = True
    send: Annotated[bool, Field(strict=True)] = True


class ModulesPart(BaseModel):
    """One object of a layer."""

    model_config = ConfigDict(extra="forbid")
    sha256: Sha256
    size: Annotated[int, Field(strict=True, ge=1, le=2**30), WHOLE]


class ModulesSentBody(BaseModel):
    """`PUT …/modules`. No path and no project is in it: both follow from who asks."""

    model_config = ConfigDict(extra="forbid")
    key: Key
    parts: Annotated[list[ModulesPart], Field(min_length=1, max_length=24)]
    ahead: Annotated[bool, Field(strict=True)] = True


class RoomBody(BaseModel):
    """`POST /v1/projects/{id}/rooms`: which file."""

    model_config = ConfigDict(extra="forbid")
    path: Annotated[str, StringConstraints(min_length=1, max_length=1024, strict=True, pattern=NO_NUL)]


class OfferedChange(BaseModel):
    """One file. Unknown fields are ignored: a newer agent may say more."""

    action: Literal["upsert", "delete"]
    file_path: Annotated[str, StringConstraints(max_length=1024, strict=True, pattern=NO_NUL)]
    content: Annotated[str, StringConstraints(strict=True)] | None = None
    executable: Annotated[bool, Field(strict=True)] | None = None
    base_version: Annotated[int, Field(strict=True, ge=0, le=2**31 - 1), WHOLE]


class ChangesBody(BaseModel):
    """`POST /v1/sessions/{id}/changes`."""

    offer_id: Annotated[str, StringConstraints(min_length=1, max_length=64, strict=True, pattern=NO_NUL)]
    epoch: Text
    generation: Annotated[int, Field(strict=True, ge=1, le=2**31 - 1), WHOLE]
    changes: Annotated[list[OfferedChange], Field(min_length=1)]
