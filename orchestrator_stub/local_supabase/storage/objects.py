"""Objects: read, signed, moved, copied, described, removed, with the caller's rights.

Signed URLs carry a JWT `{url, scope, iat, exp}` of the project's secret.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from email.utils import formatdate
from typing import Annotated, Any
from urllib.parse import quote
from uuid import uuid4

import psycopg
from psycopg.errors import UniqueViolation
from psycopg.types.json import Jsonb
from pydantic import BaseModel, Field, StringConstraints
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from orchestrator_stub.local_supabase.access import Claims, acting_as
from orchestrator_stub.local_supabase.storage.errors import exists_already, no_bucket, no_object, not_served
from orchestrator_stub.local_supabase.storage.store import Store, address, key, read_body

Name = Annotated[str, StringConstraints(min_length=1)]

INFO = """
jsonb_build_object('id', id, 'name', name, 'version', version, 'bucket_id', bucket_id, 'size', metadata -> 'size',
  'content_type', metadata -> 'mimetype', 'cache_control', metadata -> 'cacheControl', 'etag', metadata -> 'eTag',
  'metadata', user_metadata, 'last_modified', updated_at, 'created_at', created_at)
"""
ONE = "from storage.objects where bucket_id = %s and name = %s"
COPY = """
insert into storage.objects (bucket_id, name, version, metadata, owner_id, user_metadata)
select %(to_bucket)s, %(to)s, %(version)s, metadata, %(owner)s, case when %(keep)s then user_metadata else %(said)s end
from storage.objects where bucket_id = %(bucket)s and name = %(from)s
"""
REPLACE = """
on conflict (bucket_id, name) do update set version = excluded.version, metadata = excluded.metadata,
  owner_id = excluded.owner_id, user_metadata = excluded.user_metadata, updated_at = now()
"""


class Sign(BaseModel):
    """`POST /object/sign/{bucket}/{name}`."""

    expiresIn: Annotated[int, Field(ge=1)]
    transform: dict[str, Any] | None = None
    versionId: str | None = None


class SignMany(Sign):
    """`POST /object/sign/{bucket}`."""

    paths: Annotated[list[str], Field(min_length=1, max_length=10_000)]


class Move(BaseModel):
    """`POST /object/move` and `/object/copy`."""

    bucketId: Name
    sourceKey: Name
    destinationKey: Name
    destinationBucket: str | None = None
    sourceVersionId: str | None = None
    copyMetadata: bool = True
    metadata: dict[str, Any] | None = None

    @property
    def bucket_to(self) -> str:
        return self.destinationBucket or self.bucketId


class Prefixes(BaseModel):
    """`DELETE /object/{bucket}`."""

    prefixes: Annotated[list[str], Field(min_length=1)]


class Objects:
    def __init__(self, store: Store) -> None:
        self._store = store

    # --- removing

    async def remove_one(self, request: Request) -> Response:
        bucket, name = address(request)
        if not await self._delete(self._store.claims(request), bucket, [name]):
            raise no_object()
        return JSONResponse({"message": "Successfully deleted"})

    async def remove_many(self, request: Request) -> Response:
        claims, body = self._store.claims(request), await read_body(request, Prefixes)
        return JSONResponse(await self._delete(claims, request.path_params["bucket"], body.prefixes))

    async def _delete(self, claims: Claims, bucket: str, names: list[str]) -> list[dict[str, Any]]:
        """Rows first, files after the commit: a stop in between leaves a file nobody names, not the reverse."""
        async with acting_as(self._store.pool, claims) as connection:
            rows = await connection.execute(
                "delete from storage.objects where bucket_id = %s and name = any(%s)"
                " returning version, to_json(objects)",
                [bucket, names],
            )
            gone = await rows.fetchall()
        for version, _ in gone:
            self._store.file(version).unlink(missing_ok=True)
        return [row for _, row in gone]

    # --- moving

    async def move(self, request: Request) -> Response:
        claims, body = self._store.claims(request), await self._moving(request)
        try:
            async with acting_as(self._store.pool, claims) as connection:
                query = f"update storage.objects set bucket_id = %s, name = %s, updated_at = now() where id = (select id {ONE}) returning id::text"  # noqa: S608, E501
                values = [body.bucket_to, body.destinationKey, body.bucketId, body.sourceKey]
                row = await (await connection.execute(query.encode(), values)).fetchone()
        except UniqueViolation:
            raise exists_already("KeyAlreadyExists") from None
        if row is None:
            raise no_object()
        at = f"{body.bucket_to}/{body.destinationKey}"
        return JSONResponse({"message": "Successfully moved", "Id": row[0], "Key": at})

    async def copy(self, request: Request) -> Response:
        """Files are never changed, so the copy is another name of the same bytes."""
        claims, body = self._store.claims(request), await self._moving(request)
        upsert = request.headers.get("x-upsert", "").lower() == "true"
        version = str(uuid4())
        values = {
            "bucket": body.bucketId, "from": body.sourceKey, "to_bucket": body.bucket_to, "to": body.destinationKey,
            "version": version, "owner": claims.get("sub"), "keep": body.copyMetadata,
            "said": None if body.metadata is None else Jsonb(body.metadata),
        }  # fmt: skip
        try:
            async with acting_as(self._store.pool, claims) as connection:
                source = await self._version(connection, body.bucketId, body.sourceKey)
                replaced = await self._version(connection, body.bucket_to, body.destinationKey)
                query = COPY + (REPLACE if upsert else "") + " returning id::text, to_jsonb(objects)"
                row = await (await connection.execute(query.encode(), values)).fetchone()
                if source is None or row is None:
                    raise no_object()
                os.link(self._store.file(source), self._store.file(version))
        except UniqueViolation:
            raise exists_already("KeyAlreadyExists") from None
        except FileNotFoundError:
            raise no_object() from None
        if replaced is not None:
            self._store.file(replaced).unlink(missing_ok=True)
        return JSONResponse({**row[1], "Id": row[0], "Key": f"{body.bucket_to}/{body.destinationKey}"})

    async def _moving(self, request: Request) -> Move:
        body = await read_body(request, Move)
        if body.sourceVersionId is not None:
            raise not_served("versions of objects")
        key(body.destinationKey)
        await self._store.limits(body.bucket_to)  # there is such a bucket
        return body

    async def _version(self, connection: psycopg.AsyncConnection[Any], bucket: str, name: str) -> str | None:
        query = f"select version {ONE} for update"
        row = await (await connection.execute(query.encode(), [bucket, name])).fetchone()
        return None if row is None else str(row[0])

    # --- signing

    async def sign(self, request: Request) -> Response:
        claims, (bucket, name) = self._store.claims(request), address(request)
        body = self._signing(await read_body(request, Sign))
        async with acting_as(self._store.pool, claims) as connection:
            if (
                await (await connection.execute(f"select 1 {ONE}".encode(), [bucket, name])).fetchone()
                is None
            ):
                raise no_object()
        return JSONResponse({"signedURL": self._url(bucket, name, body.expiresIn)})

    async def sign_many(self, request: Request) -> Response:
        claims, bucket = self._store.claims(request), request.path_params["bucket"]
        body = await read_body(request, SignMany)
        self._signing(body)
        async with acting_as(self._store.pool, claims) as connection:
            query = "select name from storage.objects where bucket_id = %s and name = any(%s)"
            there = {
                row[0] for row in await (await connection.execute(query, [bucket, body.paths])).fetchall()
            }
        missing = "Either the object does not exist or you do not have access to it"
        return JSONResponse([
            {"error": None, "path": path, "signedURL": self._url(bucket, path, body.expiresIn)}
            if path in there else {"error": missing, "path": path, "signedURL": None}
            for path in body.paths
        ])  # fmt: skip

    def _signing(self, body: Sign) -> Sign:
        if body.transform:
            raise not_served("image transformation")
        if body.versionId is not None:
            raise not_served("versions of objects")
        return body

    def _url(self, bucket: str, name: str, seconds: int) -> str:
        """With the name as it is: the official clients encode it."""
        at = f"{bucket}/{name}"
        return f"/object/sign/{at}?token={self._store.sign('download', at, seconds)}"

    # --- reading

    async def signed(self, request: Request) -> Response:
        claims = self._store.signature(request, "download")
        expires = formatdate(claims["exp"], usegmt=True)
        async with self._store.pool.connection() as connection:
            return await self._serve(request, connection, {"Expires": expires})

    async def read(self, request: Request) -> Response:
        async with acting_as(self._store.pool, self._store.claims(request)) as connection:
            return await self._serve(request, connection, {})

    async def public(self, request: Request) -> Response:
        async with self._store.pool.connection() as connection:
            await self._must_be_public(connection, request.path_params["bucket"])
            return await self._serve(request, connection, {})

    async def info(self, request: Request) -> Response:
        async with acting_as(self._store.pool, self._store.claims(request)) as connection:
            return await self._describe(request, connection)

    async def public_info(self, request: Request) -> Response:
        async with self._store.pool.connection() as connection:
            await self._must_be_public(connection, request.path_params["bucket"])
            return await self._describe(request, connection)

    async def _must_be_public(self, connection: psycopg.AsyncConnection[Any], bucket: str) -> None:
        query = "select public from storage.buckets where id = %s"
        row = await (await connection.execute(query, [bucket])).fetchone()
        if row is None or not row[0]:
            raise no_bucket()

    async def _describe(self, request: Request, connection: psycopg.AsyncConnection[Any]) -> Response:
        query = f"select {INFO} {ONE}"
        row = await (await connection.execute(query.encode(), address(request))).fetchone()
        if row is None:
            raise no_object()
        return JSONResponse(row[0])

    async def _serve(
        self, request: Request, connection: psycopg.AsyncConnection[Any], further: Mapping[str, str]
    ) -> Response:
        """The object as the connection's role may see it: whole, a range, or 304."""
        bucket, name = address(request)
        query = f"select version, metadata {ONE}"
        row = await (await connection.execute(query.encode(), [bucket, name])).fetchone()
        if row is None or not self._store.file(row[0]).exists():
            raise no_object()
        version, metadata = row
        headers = {
            **further,
            "ETag": metadata["eTag"],
            "Cache-Control": metadata["cacheControl"],
            "Last-Modified": metadata["lastModified"],
        }
        if metadata["eTag"] in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        if "download" in request.query_params:
            saved_as = request.query_params["download"] or name.rpartition("/")[2]
            headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(saved_as)}"
        return FileResponse(self._store.file(version), headers=headers, media_type=metadata["mimetype"])
