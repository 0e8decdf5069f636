"""Keeps run settings: how a project is started, its variables and its registry's credentials.

A project has some, a session may bring its own, and the session's win. `env` and `npmrc` are secrets: encrypted at
rest, given to the session's agent alone, shown to no person, and never part of a machine's environment, which
whoever holds the platform's token can read. What is no secret is in that environment at the start.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Literal
from uuid import UUID

import structlog
from psycopg.types.json import Jsonb
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from orchestrator_stub.door.store import Access
from orchestrator_stub.platform.database import Pool, fetch_one
from orchestrator_stub.platform.sealing import SealingKeys
from orchestrator_stub.platform.source_files import path_problem

log = structlog.get_logger("run_settings")

PROTECTED: Final = frozenset({"", ".", "..", "node_modules", ".git", ".preview-sync"})
OURS: Final = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "PORT", "HOST")
"""What the agent itself gives the project's programs."""
LOADS_CODE: Final = ("GCONV_PATH", "LOCPATH", "GLIBC_TUNABLES")
"""What the C library of every program obeys, as `LD_*` and `DYLD_*` do."""
ENV_NAME: Final = rf"^(?!(?:{'|'.join((*OURS, *LOADS_CODE))})$|LD_|DYLD_)[A-Z][A-Z0-9_]{{0,127}}$"
MOST_SECRETS: Final = 100
MOST_SECRET_BYTES: Final = 65_536
"""Of a project's secrets together, as text. Linux takes 128 KB for one variable, and an answer stays one packet run."""
NO_NUL: Final = r"^[^\x00]*$"


def _root(path: str) -> str:
    if path_problem(path) or PROTECTED & set(path.split("/")):
        raise ValueError("is no directory that a project may have")
    return path


def _words(text: str) -> str:
    try:
        if shlex.split(text):
            return text
    except ValueError:
        pass
    raise ValueError("must be words as in a shell; no shell runs them")


Root = Annotated[str, StringConstraints(min_length=1, max_length=1024, strict=True), AfterValidator(_root)]
Words = Annotated[
    str,
    StringConstraints(min_length=1, max_length=4096, strict=True, pattern=NO_NUL),
    AfterValidator(_words),
]
Host = Annotated[
    str,
    StringConstraints(
        max_length=253, strict=True, pattern=r"^\.?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$"
    ),
]  # fmt: skip
Ancestor = Annotated[
    str,
    StringConstraints(
        max_length=253, strict=True,
        pattern=r"^('self'|'none'|https?://(\*\.)?[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]{1,5})?)$",
    ),
]  # fmt: skip
"""Of `frame-ancestors`: a source as a policy has it."""
Name = Annotated[str, Field(json_schema_extra={"pattern": ENV_NAME})]
Secret = Annotated[str, StringConstraints(max_length=32_768, strict=True, pattern=NO_NUL)]


def _names(env: dict[str, str | None]) -> dict[str, str | None]:
    if (bad := next((name for name in env if not re.fullmatch(ENV_NAME, name)), None)) is not None:
        raise ValueError(
            f"{bad[:40]!r}: a name is A-Z, 0-9 and _, and not PATH, LD_* or another that is set here"
        )
    return env


class RunBody(BaseModel):
    """`PUT /v1/projects/{id}/run`, and `run` of `POST /v1/sessions`. Left out: kept as it is; null: taken away."""

    model_config = ConfigDict(extra="forbid")
    root: Root | None = None
    dev_command: Words | None = None
    dev_port: Annotated[int, Field(strict=True, ge=1, le=65535)] | None = None
    install_command: Words | None = None
    allowed_hosts: Annotated[list[Host], Field(max_length=10)] | None = None
    env: (
        Annotated[dict[Name, Secret | None], Field(max_length=MOST_SECRETS), AfterValidator(_names)] | None
    ) = None
    npmrc: Annotated[str, StringConstraints(max_length=16_384, strict=True, pattern=NO_NUL)] | None = None
    public: Annotated[bool, Field(strict=True)] | None = None
    frame_ancestors: Annotated[list[Ancestor], Field(max_length=20)] | None = None
    coep: Literal["unsafe-none", "require-corp", "credentialless"] | None = None
    corp: Literal["same-origin", "same-site", "cross-origin"] | None = None
    transport: Literal["realtime", "nats"] | None = None
    write_back: Annotated[bool, Field(strict=True)] | None = None

    def secrets(self) -> list[str]:
        """Every secret value that it brings."""
        return [value for value in (*(self.env or {}).values(), self.npmrc) if value]


SECRETS: Final = frozenset({"env", "npmrc"})
OWNERS: Final = SECRETS | {"public", "write_back", "frame_ancestors", "coep", "corp"}
"""What only the project's owner and the service may set: it gives away secrets, or says who may see the preview."""
PLAIN: Final = tuple(name for name in RunBody.model_fields if name not in SECRETS)
ENVIRONMENT: Final = {
    "root": "DEV_ROOT", "dev_command": "DEV_COMMAND", "dev_port": "DEV_SERVER_PORT",
    "install_command": "INSTALL_COMMAND", "allowed_hosts": "PREVIEW_HOST",
}  # fmt: skip
"""Under which names of its environment a machine is told, at its start, what is no secret."""


class TooManySecrets(Exception):
    """With this change the project would have more variables, or larger ones, than are kept."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Run settings as they are stored. `sealed` by `env:NAME` and `npmrc`."""

    revision: int = 0
    plain: Mapping[str, Any] = field(default_factory=dict)
    sealed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, revision: int | None, plain: Mapping[str, Any] | None, sealed: Mapping[str, str] | None
    ) -> Stored:
        return cls(revision or 0, plain or {}, sealed or {})

    def with_session(self, own: Mapping[str, Any] | None) -> Stored:
        """These with a session's own on top. The revision moves when the project's does."""
        if own is None:
            return self
        return Stored(self.revision + 1, {**self.plain, **own["plain"]}, {**self.sealed, **own["sealed"]})

    def shown(self) -> dict[str, Any]:
        """The form for people: which secrets there are, and nothing of what they are."""
        return {
            "run_revision": self.revision,
            **{name: self.plain.get(name) for name in PLAIN},
            "env_names": sorted(name.removeprefix("env:") for name in self.sealed if name != "npmrc"),
            "has_npmrc": "npmrc" in self.sealed,
        }

    def environment(self) -> dict[str, str]:
        """What a machine is told in its environment."""
        given = {ENVIRONMENT[name]: value for name, value in self.plain.items() if name in ENVIRONMENT}
        told = {
            name: " ".join(value) if isinstance(value, list) else str(value)
            for name, value in given.items()
            if value
        }
        names = {"RUN_NAMES": " ".join(sorted(told))} if told else {}
        return {"RUN_REVISION": str(self.revision), **told, **names}


class RunSettings:
    """`preview.run_settings`, and the `run` of sessions, through `pool`."""

    def __init__(self, pool: Pool, keys: SealingKeys, door: Access | None = None) -> None:
        self._pool = pool
        self._keys = keys
        self._door = door

    async def of_project(self, project_id: UUID) -> Stored:
        """Those of a project; empty when it has none."""
        row = await fetch_one(
            self._pool,
            "select revision, plain, sealed from preview.run_settings where project_id = %s",
            (project_id,),
        )
        return Stored.of(*row) if row else Stored()

    async def of_session(self, session_id: UUID) -> Stored:
        """Those of a session: its project's, with its own on top."""
        row = await fetch_one(
            self._pool,
            "select r.revision, r.plain, r.sealed, s.run, s.project_id from preview.sessions s"
            " left join preview.run_settings r on r.project_id = s.project_id where s.id = %s",
            (session_id,),
        )
        if row is None:
            return Stored()
        stored = Stored.of(*row[:3]).with_session(row[3])
        host = await self._door.host(row[4]) if self._door else None
        if host is None:
            return stored
        # Whatever else is allowed, browsers come by the door.
        hosts = [host, *(stored.plain.get("allowed_hosts") or ())]
        return replace(stored, plain={**stored.plain, "allowed_hosts": hosts})

    async def change(self, project_id: UUID, body: RunBody) -> Stored | None:
        """Take a change of a project's. None: there is no such project.

        Raises `CannotSeal`, `TooManySecrets`.
        """
        fresh = self.sealed(project_id, body)
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(
                "insert into preview.run_settings (project_id) select %(id)s where preview.give_head(%(id)s)"
                " on conflict do nothing",
                {"id": project_id},
            )
            cursor = await connection.execute(
                "select revision, plain, sealed from preview.run_settings where project_id = %s for update",
                (project_id,),
            )
            row = await cursor.fetchone()
            if row is None:
                return None
            stored = Stored.of(*row)
            plain = {**stored.plain, **{n: getattr(body, n) for n in PLAIN if n in body.model_fields_set}}
            sealed = {**stored.sealed, **fresh}
            changed = Stored(
                stored.revision + 1,
                {name: value for name, value in plain.items() if value is not None},
                {name: value for name, value in sealed.items() if value is not None},
            )
            _check_size(changed)
            await connection.execute(
                "update preview.run_settings set revision = %s, plain = %s, sealed = %s, updated_at = now()"
                " where project_id = %s",
                (changed.revision, Jsonb(changed.plain), Jsonb(changed.sealed), project_id),
            )
        log.info(
            "run_settings.changed", project_id=str(project_id), revision=changed.revision,
            fields=sorted(body.model_fields_set),
        )  # fmt: skip
        return changed

    def own(self, project_id: UUID, body: RunBody | None) -> dict[str, Any] | None:
        """What a new session keeps of its own. Raises `CannotSeal`, `TooManySecrets`."""
        if body is None or not body.model_fields_set:
            return None
        plain = {name: getattr(body, name) for name in PLAIN if getattr(body, name) is not None}
        sealed = {name: value for name, value in self.sealed(project_id, body).items() if value is not None}
        _check_size(Stored(0, plain, sealed))
        return {"plain": plain, "sealed": sealed}

    def sealed(self, project_id: UUID, body: RunBody) -> dict[str, str | None]:
        """The secrets of a change, encrypted; None takes one away. Raises `CannotSeal`."""
        values = {f"env:{name}": value for name, value in (body.env or {}).items()}
        if "npmrc" in body.model_fields_set:
            values["npmrc"] = body.npmrc or None
        return {
            name: None if value is None else self._keys.seal(project_id, name, value)
            for name, value in values.items()
        }

    async def write_back(self, session_id: UUID, project_id: UUID) -> list[dict[str, Any]]:
        """Which paths a session's container may give back, in the order in which they are asked; none: it is off."""
        query = (
            "select coalesce(s.run -> 'plain' ->> 'write_back', r.plain ->> 'write_back') from preview.sessions s"
            " left join preview.run_settings r on r.project_id = s.project_id where s.id = %s"
        )
        row = await fetch_one(self._pool, query, (session_id,))
        return await self._rules(project_id) if row and row[0] == "true" else []

    async def _rules(self, project_id: UUID) -> list[dict[str, Any]]:
        query = (
            "select jsonb_agg(jsonb_build_object('glob', glob, 'mode', mode, 'max_bytes', max_bytes,"
            " 'deletes', deletes) order by position) from preview.project_write_back where project_id = %s"
        )
        row = await fetch_one(self._pool, query, (project_id,))
        return (row[0] if row else None) or []

    async def for_agent(self, session_id: UUID, project_id: UUID) -> dict[str, Any]:
        """The form for the session's agent, secrets and all. Raises `CannotOpen`."""
        stored = await self.of_session(session_id)
        opened = {name: self._keys.open(project_id, name, value) for name, value in stored.sealed.items()}
        npmrc = opened.pop("npmrc", None)
        return {
            "run_revision": stored.revision,
            **{name: stored.plain.get(name) for name in PLAIN},
            "write_back": await self._rules(project_id) if stored.plain.get("write_back") else [],
            "env": {name.removeprefix("env:"): value for name, value in opened.items()},
            "npmrc": npmrc,
        }


def _check_size(stored: Stored) -> None:
    variables = len(stored.sealed.keys() - {"npmrc"})
    # Base64 is four characters for three bytes.
    if variables > MOST_SECRETS or sum(map(len, stored.sealed.values())) * 3 // 4 > MOST_SECRET_BYTES:
        raise TooManySecrets(
            f"A project has at most {MOST_SECRETS} variables, and {MOST_SECRET_BYTES} bytes of secrets in all."
        )
