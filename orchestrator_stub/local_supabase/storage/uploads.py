"""Uploads: what may be stored, the body into a file, and the row that names it.

Whoever may not store it, and a key that is stored already, are refused before the body is read; so is a MIME type that
the bucket does not take, where a header says it.
"""

from __future__ import annotations

import os
from email.utils import formatdate
from typing import Any
from uuid import uuid4

import psycopg
from psycopg.errors import InsufficientPrivilege, UniqueViolation
from psycopg.types.json import Jsonb
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orchestrator_stub.local_supabase.access import Claims, acting_as
from orchestrator_stub.local_supabase.storage.errors import StorageError, denied, exists_already
from orchestrator_stub.local_supabase.storage.incoming import Incoming, receive, refuse_type
from orchestrator_stub.local_supabase.storage.store import Store, address

UPLOAD_URL_SECONDS = 2 * 3600
"""For which a signed upload URL is good: the hosted service's."""

ONE_AT_A_TIME = "select pg_advisory_xact_lock(hashtextextended(%s, 0))"
LOCK = (
    "select version, metadata ->> 'eTag' from storage.objects where bucket_id = %s and name = %s for update"
)
INSERT = """
insert into storage.objects (bucket_id, name, version, metadata, owner_id, user_metadata)
values (%s, %s, %s, %s, %s, %s) returning id::text
"""
UPSERT = """
insert into storage.objects (bucket_id, name, version, metadata, owner_id, user_metadata)
values (%s, %s, %s, %s, %s, %s)
on conflict (bucket_id, name) do update set version = excluded.version, metadata = excluded.metadata,
  owner_id = excluded.owner_id, user_metadata = excluded.user_metadata, updated_at = now()
returning id::text
"""
SERVICE: Claims = {"role": "service_role"}
"""Whose rights a signed upload has: whoever signed it had the caller's looked at."""


class Uploads:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def upload(self, request: Request) -> Response:
        upsert = request.method == "PUT" or _upserts(request)
        claims = self._store.claims(request)
        id_, at = await self._store_object(request, claims, claims.get("sub"), upsert)
        return JSONResponse({"Key": at, "Id": id_})

    async def sign(self, request: Request) -> Response:
        """A URL that stores this object, for whoever has it."""
        claims, (bucket, name) = self._store.claims(request), address(request)
        await self._store.limits(bucket)
        upsert = _upserts(request)
        await self._record(claims, claims.get("sub"), bucket, name, str(uuid4()), None, upsert)
        at = f"{bucket}/{name}"
        token = self._store.sign("upload", at, UPLOAD_URL_SECONDS, owner=claims.get("sub"), upsert=upsert)
        return JSONResponse({"url": f"/object/upload/sign/{at}?token={token}", "token": token})

    async def signed(self, request: Request) -> Response:
        claims = self._store.signature(request, "upload")
        _, at = await self._store_object(request, SERVICE, claims.get("owner"), bool(claims.get("upsert")))
        return JSONResponse({"Key": at})

    async def _store_object(
        self, request: Request, claims: Claims, owner: str | None, upsert: bool
    ) -> tuple[str, str]:
        bucket, name = address(request)
        limit, types = await self._store.limits(bucket)
        version = str(uuid4())
        await self._rehearse(request, claims, owner, bucket, name, version, upsert, types)
        part, final = self._store.file(f"{version}.part"), self._store.file(version)
        try:
            incoming = await receive(request, part, limit, types)
            os.replace(part, final)
            try:
                id_, unused = await self._record(claims, owner, bucket, name, version, incoming, upsert)
            except BaseException:
                final.unlink()
                raise
        finally:
            part.unlink(missing_ok=True)
        if unused is not None:
            self._store.file(unused).unlink(missing_ok=True)
        return id_, f"{bucket}/{name}"

    async def _rehearse(
        self, request: Request, claims: Claims, owner: str | None, bucket: str, name: str, version: str,
        upsert: bool, types: Any,
    ) -> None:  # fmt: skip
        """Write the row and take it back: what refuses it refuses the upload before its body is read."""
        try:
            await self._record(claims, owner, bucket, name, version, None, upsert)
            refuse_type(request.headers.get("content-type"), types)
        except (InsufficientPrivilege, StorageError) as error:
            refusal = error if isinstance(error, StorageError) else denied()
            refusal.unread = True
            raise refusal from None

    async def _record(
        self,
        claims: Claims,
        owner: str | None,
        bucket: str,
        name: str,
        version: str,
        incoming: Incoming | None,
        upsert: bool,
    ) -> tuple[str, str | None]:
        """The row of an upload, written as the caller: its id, and the version whose file nobody needs now.

        That is the version it replaced; but bytes that are replaced by the same ones stay for those who read them.
        `incoming` None: a rehearsal, which is taken back.
        """
        written: tuple[Any, ...] | None = None
        unused: str | None = None
        try:
            async with acting_as(self._store.pool, claims) as connection:
                if upsert:
                    await connection.execute(ONE_AT_A_TIME, [f"{bucket}/{name}"])
                    before = await (await connection.execute(LOCK, [bucket, name])).fetchone()
                    if before is not None and incoming is not None:
                        same = before[1] == f'"{incoming.md5}"'
                        unused, version = (version, before[0]) if same else (before[0], version)
                said = None if incoming is None or incoming.metadata is None else Jsonb(incoming.metadata)
                row = await connection.execute(
                    UPSERT if upsert else INSERT,
                    [bucket, name, version, Jsonb(self._metadata(incoming)), owner, said],
                )
                written = await row.fetchone()
                if incoming is None:
                    raise psycopg.Rollback
        except UniqueViolation:
            raise exists_already("KeyAlreadyExists") from None
        assert written is not None
        return written[0], unused

    def _metadata(self, incoming: Incoming | None) -> dict[str, Any]:
        if incoming is None:
            return {}
        return {
            "eTag": f'"{incoming.md5}"', "size": incoming.size, "mimetype": incoming.kind,
            "contentLength": incoming.size, "httpStatusCode": 200, "cacheControl": incoming.cache_control,
            "lastModified": formatdate(self._store.clock(), usegmt=True),
        }  # fmt: skip


def _upserts(request: Request) -> bool:
    return request.headers.get("x-upsert", "").lower() == "true"
