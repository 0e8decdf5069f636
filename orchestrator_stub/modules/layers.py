"""Finds layers for sessions, and takes in those that they send.

A layer of a project is written from a machine of that project, for that project alone: the session's token says which
it is, and no request names another, or a path. A shared one is written by `modules build` only. So a project can spoil
its own layers and nobody else's.

    asked for     a row that is whole: its parts are signed; else a row without parts, and signed URLs to upload to
    told          every part is there in the size that was told: the row becomes whole, unless another one was first
    refused       a machine of the project found it no good: the project's own is whole no more, a shared one stays
    dropped       the row goes, or is whole no more; objects that no row names follow (`modules.upkeep`)

Storage takes nothing twice at a signed upload URL, and the name of each object has the row's id in it: what is whole is
never written again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import orjson
import psycopg
import structlog
from psycopg.types.json import Jsonb

from orchestrator_stub.platform.database import Pool, fetch_one
from orchestrator_stub.platform.storage import StorageClient, StorageFailure

log = structlog.get_logger("modules")

BUCKET: Final = "preview-modules"
SHARED: Final = "shared"
"""In place of a project's id."""
PART_BYTES: Final = 45 * 2**20
"""Of one object, below Storage's default limit of 50 MB. The agent cuts by the same number."""
SENDING: Final = 3
"""Layers of one project that may be on their way at a time; their URLs are good for two hours."""
A_DAY: Final = 50
"""Layers that one project may have sent in a day: more than anybody changes dependencies, and each is an upload. What
did not become whole, or made room, counts for as long as its objects are kept."""
SIGN_SECONDS: Final = 2.0
"""For the layer of a new machine to be signed; without, the machine asks itself."""

FIND: Final = """
select id, project_id, parts from preview.modules
where key = %(key)s and parts is not null and (project_id = %(project)s or project_id is null)
order by project_id nulls first limit 1
"""
"""A shared one first: every project that reads it reads the same objects."""

LAST: Final = """
select m.id, m.project_id, m.parts, m.key from preview.project_modules l join preview.modules m on m.id = l.module_id
where l.project_id = %(project)s and m.parts is not null
"""

USED: Final = """
update preview.modules set used_at = now() where id = %(id)s and used_at < now() - interval '1 hour'
"""

AHEAD: Final = """
insert into preview.project_modules (project_id, module_id)
select %(project)s, m.id from preview.modules m where m.id = %(id)s
on conflict (project_id) do update set module_id = excluded.module_id
where project_modules.module_id <> excluded.module_id
"""

AGAIN: Final = """
update preview.modules set session_id = null
where session_id = %(session)s and key = %(key)s and parts is null
"""
"""What was begun before is nobody's to tell any more, and counts: its URLs are good, and its objects there."""

ONE_BY_ONE: Final = (
    "select pg_advisory_xact_lock(hashtextextended('preview.modules ' || %(project)s::text, 0))"
)

SEND: Final = """
insert into preview.modules (project_id, key, session_id)
select %(project)s, %(key)s, %(session)s from (
  select count(*) filter (where parts is null and session_id is not null and created_at > now() - interval '2 hours')
           as sending,
         count(*) filter (where created_at > now() - interval '1 day') as a_day
  from preview.modules where project_id = %(project)s
) past
where sending < %(most)s and a_day < %(a_day)s
on conflict do nothing returning id
"""

SENDS: Final = """
select id from preview.modules
where project_id = %(project)s and session_id = %(session)s and key = %(key)s and parts is null
"""

STORED: Final = """
select coalesce(jsonb_object_agg(name, (metadata ->> 'size')::bigint), '{}') from storage.objects
where bucket_id = %s and name = any(%s)
"""

WHOLE: Final = """
update preview.modules set parts = %(parts)s, size_bytes = %(size)s, used_at = now()
where id = %(id)s and parts is null returning id
"""

REFUSE: Final = """
update preview.modules set parts = null, session_id = null, size_bytes = 0
where project_id = %(project)s and key = %(key)s and parts -> 0 ->> 'sha256' = %(sha256)s returning id
"""
"""As in SHRINK, it counts for the day: that bounds how often a project may have one made again."""

FORGET: Final = "delete from preview.modules where id = %(id)s returning id"

SHRINK: Final = """
update preview.modules set parts = null, session_id = null, size_bytes = 0 where id in (
  select id from (
    select id, sum(size_bytes) over (order by used_at desc, id) as total
    from preview.modules where project_id = %(project)s and parts is not null
  ) kept where total > %(most)s)
"""
"""They count for the day, as their objects are there for hours: upkeep drops what is not whole."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What is kept. `layer`, `project`, `total`: bytes, compressed; `keep`: seconds since it was used last."""

    layer: int
    project: int
    total: int
    keep: float


class NotSent(Exception):
    """What was told is not what is stored, or nobody asked where to send it."""


class ModuleLayers:
    """The layers of all projects. `url_ttl`: seconds that a signed URL is good."""

    def __init__(self, pool: Pool, storage: StorageClient, limits: Limits, *, url_ttl: int) -> None:
        self._pool = pool
        self._storage = storage
        self._limits = limits
        self._url_ttl = url_ttl

    async def find(
        self, project_id: UUID, session_id: UUID, key: str, *, ahead: bool = True, send: bool = True
    ) -> dict[str, Any]:
        """Answer `POST …/modules`: the layer, or where to send it.

        `ahead`: the project's next machine is told of it when it is made. `send`: one that is missing may be sent.

        Raises `StorageFailure`, `psycopg.OperationalError`.
        """
        given = {"project": project_id, "session": session_id, "key": key}
        found = await fetch_one(self._pool, FIND, given)
        if found is not None and (parts := await self._signed(found[0], found[1], key, found[2])) is not None:
            await self._used(found[0], project_id, ahead=ahead)
            return {"kind": "layer", "parts": parts}
        answer: dict[str, Any] = {"kind": "missing", "max_bytes": self._limits.layer}
        if not self._limits.layer or not send:
            return answer
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(ONE_BY_ONE, given)
            await connection.execute(AGAIN, given)
            made = await connection.execute(SEND, {**given, "most": SENDING, "a_day": A_DAY})
            row = await made.fetchone()
        if row is not None:
            count = -(-self._limits.layer // PART_BYTES)
            names = [_name(project_id, key, row[0], number) for number in range(count)]
            answer["upload_urls"] = await asyncio.gather(
                *(self._storage.sign_upload(BUCKET, name) for name in names)
            )
        return answer

    async def refuse(self, project_id: UUID, session_id: UUID, key: str, sha256: str) -> None:
        """Drop the project's own layer of a key, whose first part has that hash: one of its machines refused it.

        A shared layer stays, whatever one machine says of it: the log has who said it, and the operator drops it.

        Raises `psycopg.OperationalError`.
        """
        row = await fetch_one(self._pool, REFUSE, {"project": project_id, "key": key, "sha256": sha256})
        said = {"project_id": str(project_id), "session_id": str(session_id), "key": key}
        log.warning("modules.refused", dropped=row is not None, **said)

    async def add(
        self,
        project_id: UUID,
        session_id: UUID,
        key: str,
        parts: Sequence[Mapping[str, Any]],
        *,
        ahead: bool = True,
    ) -> None:
        """Take in what a session has sent. One that is there already stays as it is.

        Raises `NotSent`, `psycopg.OperationalError`.
        """
        given = {"project": project_id, "session": session_id, "key": key}
        row = await fetch_one(self._pool, SENDS, given)
        if row is None:
            if await fetch_one(self._pool, FIND, given) is not None:
                return
            raise NotSent("ask for the layer first: the answer says where to send it")
        module = row[0]
        names = [_name(project_id, key, module, number) for number in range(len(parts))]
        found = await fetch_one(self._pool, STORED, (BUCKET, names))
        stored = found[0] if found else {}
        for number, (name, part) in enumerate(zip(names, parts, strict=True)):
            size = stored.get(name)
            if size != part["size"]:
                raise NotSent(f"part {number + 1} has {part['size']} bytes, and {size or 0} are stored")
        size = sum(part["size"] for part in parts)
        if size > self._limits.layer:
            raise NotSent(f"{size} bytes, and at most {self._limits.layer} are taken")
        kept = [{"sha256": part["sha256"], "size": part["size"]} for part in parts]
        try:
            await fetch_one(self._pool, WHOLE, {"id": module, "parts": Jsonb(kept), "size": size})
        except psycopg.errors.UniqueViolation:  # another machine of the project was first
            await self._run(FORGET, {"id": module})
            return
        await self._used(module, project_id, ahead=ahead)
        await self._run(SHRINK, {"project": project_id, "most": self._limits.project})
        log.info("modules.added", project_id=str(project_id), bytes=size)

    async def environment(self, project_id: UUID) -> dict[str, str]:
        """Return what a new machine of the project is told of its last layer; nothing, where that cannot be had."""
        try:
            async with asyncio.timeout(SIGN_SECONDS):
                last = await fetch_one(self._pool, LAST, {"project": project_id})
                if last is None:
                    return {}
                module, owner, parts, key = last
                signed = await self._signed(module, owner, key, parts)
        except (StorageFailure, OSError, psycopg.OperationalError) as error:
            log.warning("modules.not_named", project_id=str(project_id), reason=str(error))
            return {}
        if signed is None:
            return {}
        return {"MODULES_KEY": key, "MODULES_PARTS": orjson.dumps(signed).decode()}

    async def _signed(
        self, module: UUID, owner: UUID | None, key: str, parts: list[dict[str, Any]]
    ) -> list[dict[str, Any]] | None:
        """Return the parts with their URLs; None, and the layer is forgotten, when one is not there any more."""
        names = [_name(owner, key, module, number) for number in range(len(parts))]
        try:
            urls = await asyncio.gather(*(self._storage.sign(BUCKET, name, self._url_ttl) for name in names))
        except StorageFailure as failure:
            if not failure.missing:
                raise
            await self._run(FORGET, {"id": module})
            return None
        return [{"url": url, **part} for url, part in zip(urls, parts, strict=True)]

    async def _used(self, module: UUID, project_id: UUID, *, ahead: bool) -> None:
        for query in (USED, AHEAD) if ahead else (USED,):
            await self._run(query, {"id": module, "project": project_id})

    async def _run(self, query: str, values: Mapping[str, object]) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(query.encode(), values)


def _name(project_id: UUID | None, key: str, module: UUID, number: int) -> str:
    return f"{project_id or SHARED}/{key}/{module}.{number}"
