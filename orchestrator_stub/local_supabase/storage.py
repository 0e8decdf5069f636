"""Serves Supabase Storage's endpoints, over rows in `storage.objects` and files in one directory.

A file is named by its row's `version`, never by its path: an overwrite is a new file and a changed row, so a
reader in the middle of a download keeps what it began with, and no path can climb out. Errors are the original's:
a JSON body whose `statusCode` says 404 or 409, behind HTTP 400 (supabase/storage `internal/errors`). So is their
moment: an upload of a stored key, or of one that the caller may not write, is answered before its body is read.

Signed URLs carry a JWT `{url, iat, exp}` of the project's secret. Uploads are raw bodies; multipart forms, which
browsers' clients send for a Blob, are refused by name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import orjson
import psycopg
from psycopg.errors import InsufficientPrivilege, UniqueViolation
from psycopg.types.json import Jsonb
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from orchestrator_stub.local_supabase.access import Claims, Pool, acting_as, read_claims
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.platform.tokens import TokenRejected

MAX_OBJECT_BYTES = 50 * 1024 * 1024
"""The hosted default of one upload; a bucket's `file_size_limit` can only lower it."""

READ_AHEAD = 128 * 1024
"""Bytes of a refused body that the original's HTTP server takes in by itself: 100 KB did no harm there, 150 KB did."""

HELD_SECONDS = 72.0
"""For which a connection with an unread body stays open: Fastify's keep-alive timeout."""


ONE_AT_A_TIME = "select pg_advisory_xact_lock(hashtextextended(%s, 0))"
LOCK = (
    "select version, metadata ->> 'eTag' from storage.objects where bucket_id = %s and name = %s for update"
)
INSERT = """
insert into storage.objects (bucket_id, name, version, metadata, owner_id)
values (%s, %s, %s, %s, %s) returning id::text
"""
UPSERT = """
insert into storage.objects (bucket_id, name, version, metadata, owner_id)
values (%s, %s, %s, %s, %s)
on conflict (bucket_id, name) do update set version = excluded.version, metadata = excluded.metadata,
  owner_id = excluded.owner_id, updated_at = now()
returning id::text
"""


class StorageError(Exception):
    """An answer in Storage's error form. `status` stands in the body; HTTP says 400, or 500 for a 500.

    `unread`: it is given before the request's body was read.
    """

    unread = False

    def __init__(self, status: int, code: str, message: str, error: str | None = None) -> None:
        self.status = status
        self.body = {"statusCode": str(status), "error": error or code, "code": code, "message": message}
        super().__init__(message)


class Unread(JSONResponse):
    """An answer before the request's body was read, which leaves the connection as the original does: open, and deaf.

    What follows a body of any size waits behind it until the client gives up. ASGI has no way to leave the body
    unread; here the answer is whole but not over, so that the next request is not begun, and the body is dropped.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        small = declared.isdecimal() and int(declared) <= READ_AHEAD
        if small or headers.get("connection", "").lower() == "close":
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(HELD_SECONDS):
                while (await receive())["type"] != "http.disconnect":
                    pass
        # Returning without the end closes the connection: a request that waited in it is not done long afterwards.


def _not_found() -> StorageError:
    return StorageError(404, "NoSuchKey", "Object not found", "not_found")


def _denied() -> StorageError:
    return StorageError(403, "AccessDenied", "new row violates row-level security policy", "Unauthorized")


def _too_large() -> StorageError:
    text = "The object exceeded the maximum allowed size"
    return StorageError(413, "EntityTooLarge", text, "Payload too large")


class Storage:
    """The `/storage/v1` endpoints. Files live in `directory`; `clock` gives Unix seconds."""

    def __init__(
        self, pool: Pool, keys: ProjectKeys, directory: Path, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._pool = pool
        self._keys = keys
        self._directory = directory
        self._clock = clock

    def open(self) -> None:
        """Make the directory, and clear uploads that a stop cut short. Raises `OSError`."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._directory.glob("*.part"):
            leftover.unlink()

    def routes(self) -> list[Route]:
        base = "/storage/v1"
        at = f"{base}/object"
        return [
            Route(f"{base}/bucket", self._answer(self._buckets), methods=["GET", "POST"]),
            Route(f"{base}/bucket/{{bucket}}", self._answer(self._bucket), methods=["GET", "DELETE"]),
            Route(f"{at}/sign/{{bucket}}/{{name:path}}", self._answer(self._sign), methods=["POST"]),
            Route(f"{at}/sign/{{bucket}}/{{name:path}}", self._answer(self._signed), methods=["GET"]),
            Route(f"{at}/list/{{bucket}}", self._answer(self._list), methods=["POST"]),
            Route(f"{at}/public/{{bucket}}/{{name:path}}", self._answer(self._public), methods=["GET"]),
            Route(f"{at}/authenticated/{{bucket}}/{{name:path}}", self._answer(self._read), methods=["GET"]),
            Route(f"{at}/{{bucket}}/{{name:path}}", self._answer(self._read), methods=["GET"]),
            Route(f"{at}/{{bucket}}/{{name:path}}", self._answer(self._upload), methods=["POST", "PUT"]),
            Route(f"{at}/{{bucket}}/{{name:path}}", self._answer(self._remove_one), methods=["DELETE"]),
            Route(f"{at}/{{bucket}}", self._answer(self._remove_many), methods=["DELETE"]),
        ]

    def _answer(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)
            except StorageError as error:
                form = Unread if error.unread else JSONResponse
                return form(error.body, 500 if error.status == 500 else 400)
            except InsufficientPrivilege:
                return JSONResponse(_denied().body, 400)
            except psycopg.OperationalError:
                # 544 is Storage's own number for this.
                text = "The connection to the database timed out"
                return JSONResponse(StorageError(544, "DatabaseTimeout", text).body, 544)

        return answer

    def _claims(self, request: Request) -> Claims:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            # Fastify's schema validation answers before Storage does.
            text = "headers must have required property 'authorization'"
            raise StorageError(400, "InvalidRequest", text, "Error")
        try:
            return read_claims(self._keys.keyring, token, now=self._clock())
        except TokenRejected as error:
            raise StorageError(403, "AccessDenied", _jwt_text(error), "Unauthorized") from None

    # --- buckets

    async def _buckets(self, request: Request) -> Response:
        claims = self._claims(request)
        if request.method == "GET":
            async with acting_as(self._pool, claims) as connection:
                rows = await connection.execute("select to_json(b) from storage.buckets b order by b.id")
                return JSONResponse([row[0] for row in await rows.fetchall()])
        body = await _body(request)
        name = body.get("name")
        if not isinstance(name, str) or not name or "/" in name:
            raise StorageError(400, "InvalidBucketName", "Bucket name invalid", "Invalid Input")
        limit = body.get("file_size_limit")
        try:
            async with acting_as(self._pool, claims) as connection:
                await connection.execute(
                    "insert into storage.buckets (id, name, public, file_size_limit) values (%s, %s, %s, %s)",
                    [body.get("id") or name, name, bool(body.get("public")), limit],
                )
        except UniqueViolation:
            text = "The resource already exists"
            raise StorageError(409, "BucketAlreadyExists", text, "Duplicate") from None
        return JSONResponse({"name": name})

    async def _bucket(self, request: Request) -> Response:
        claims, name = self._claims(request), request.path_params["bucket"]
        async with acting_as(self._pool, claims) as connection:
            if request.method == "GET":
                query = "select to_json(b) from storage.buckets b where b.id = %s"
            else:
                query = "select 1 from storage.objects where bucket_id = %s limit 1"
                if await (await connection.execute(query, [name])).fetchone():
                    text = "The bucket you tried to delete is not empty"
                    raise StorageError(409, "ResourceNotEmpty", text)
                query = "delete from storage.buckets where id = %s returning id"
            row = await (await connection.execute(query, [name])).fetchone()
        if row is None:
            raise StorageError(404, "NoSuchBucket", "Bucket not found", "Bucket not found")
        return JSONResponse(row[0] if request.method == "GET" else {"message": "Successfully deleted"})

    # --- writing

    async def _upload(self, request: Request) -> Response:
        claims, (bucket, name) = self._claims(request), _address(request)
        upsert = request.method == "PUT" or request.headers.get("x-upsert", "").lower() == "true"
        kind = request.headers.get("content-type", "application/octet-stream")
        if kind.startswith("multipart/"):
            text = "multipart uploads are not served by the local stand-in; send the bytes as the body"
            raise StorageError(415, "InvalidMimeType", text, "invalid_mime_type")
        limit = await self._limit(bucket)
        version = str(uuid4())
        await self._rehearse(claims, bucket, name, version, upsert)
        part, final = self._directory / f"{version}.part", self._directory / version
        try:
            etag, size = await _receive(request, part, limit)
            metadata = {
                "eTag": f'"{etag}"', "size": size, "mimetype": kind, "contentLength": size, "httpStatusCode": 200,
                "cacheControl": request.headers.get("cache-control", "no-cache"),
                "lastModified": formatdate(self._clock(), usegmt=True),
            }  # fmt: skip
            os.replace(part, final)
            try:
                id_, unused = await self._record(claims, bucket, name, version, metadata, upsert)
            except BaseException:
                final.unlink()
                raise
        finally:
            part.unlink(missing_ok=True)
        if unused is not None:
            self._file(unused).unlink(missing_ok=True)
        return JSONResponse({"Key": f"{bucket}/{name}", "Id": id_})

    async def _limit(self, bucket: str) -> int:
        async with self._pool.connection() as connection:
            query = "select file_size_limit from storage.buckets where id = %s"
            row = await (await connection.execute(query, [bucket])).fetchone()
        if row is None:
            raise StorageError(404, "NoSuchBucket", "Bucket not found", "Bucket not found")
        return MAX_OBJECT_BYTES if row[0] is None else min(row[0], MAX_OBJECT_BYTES)

    async def _rehearse(self, claims: Claims, bucket: str, name: str, version: str, upsert: bool) -> None:
        """Write the row and take it back: what refuses it refuses the upload before its body is read."""
        try:
            await self._record(claims, bucket, name, version, {}, upsert, rehearsal=True)
        except (InsufficientPrivilege, StorageError) as error:
            refusal = error if isinstance(error, StorageError) else _denied()
            refusal.unread = True
            raise refusal from None

    async def _record(
        self,
        claims: Claims,
        bucket: str,
        name: str,
        version: str,
        metadata: dict[str, Any],
        upsert: bool,
        *,
        rehearsal: bool = False,
    ) -> tuple[str, str | None]:
        """The row of an upload, written as the caller: its id, and the version whose file nobody needs now.

        That is the version it replaced; but bytes that are replaced by the same ones stay for those who read them.
        """
        written: tuple[Any, ...] | None = None
        unused: str | None = None
        try:
            async with acting_as(self._pool, claims) as connection:
                if upsert:
                    await connection.execute(ONE_AT_A_TIME, [f"{bucket}/{name}"])
                    before = await (await connection.execute(LOCK, [bucket, name])).fetchone()
                    if before is not None:
                        same = before[1] == metadata.get("eTag")
                        unused, version = (version, before[0]) if same else (before[0], version)
                row = await connection.execute(
                    UPSERT if upsert else INSERT,
                    [bucket, name, version, Jsonb(metadata), claims.get("sub")],
                )
                written = await row.fetchone()
                if rehearsal:
                    raise psycopg.Rollback
        except UniqueViolation:
            raise StorageError(409, "KeyAlreadyExists", "The resource already exists", "Duplicate") from None
        assert written is not None
        return written[0], unused

    async def _remove_one(self, request: Request) -> Response:
        bucket, name = _address(request)
        if not await self._delete(self._claims(request), bucket, [name]):
            raise _not_found()
        return JSONResponse({"message": "Successfully deleted"})

    async def _remove_many(self, request: Request) -> Response:
        claims, body = self._claims(request), await _body(request)
        names = body.get("prefixes")
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise StorageError(400, "InvalidRequest", "body/prefixes must be array", "Error")
        return JSONResponse(await self._delete(claims, request.path_params["bucket"], names))

    async def _delete(self, claims: Claims, bucket: str, names: list[str]) -> list[dict[str, Any]]:
        """Rows first, files after the commit: a stop in between leaves a file nobody names, not the reverse."""
        async with acting_as(self._pool, claims) as connection:
            rows = await connection.execute(
                "delete from storage.objects where bucket_id = %s and name = any(%s)"
                " returning version, to_json(objects)",
                [bucket, names],
            )
            gone = await rows.fetchall()
        for version, _ in gone:
            self._file(version).unlink(missing_ok=True)
        return [row for _, row in gone]

    # --- reading

    async def _list(self, request: Request) -> Response:
        claims, body = self._claims(request), await _body(request)
        prefix = str(body.get("prefix") or "")
        below = prefix if not prefix or prefix.endswith("/") else f"{prefix}/"
        async with acting_as(self._pool, claims) as connection:
            rows = await connection.execute(
                "select name, id::text, updated_at, created_at, last_accessed_at, metadata from storage.objects"
                " where bucket_id = %s and starts_with(name, %s) order by name",
                [request.path_params["bucket"], below],
            )
            found = await rows.fetchall()
        listed: dict[str, dict[str, Any]] = {}
        for name, id_, updated, created, accessed, metadata in found:
            head, _, deeper = name[len(below) :].partition("/")
            folder = {"name": head, "id": None, "updated_at": None, "created_at": None,
                      "last_accessed_at": None, "metadata": None}  # fmt: skip
            listed.setdefault(head, folder)
            if not deeper:
                listed[head] = {
                    "name": head, "id": id_, "updated_at": updated.isoformat(), "created_at": created.isoformat(),
                    "last_accessed_at": accessed.isoformat(), "metadata": metadata,
                }  # fmt: skip
        offset, limit = int(body.get("offset") or 0), int(body.get("limit") or 100)
        return JSONResponse(list(listed.values())[offset : offset + limit])

    async def _sign(self, request: Request) -> Response:
        claims, (bucket, name) = self._claims(request), _address(request)
        seconds = (await _body(request)).get("expiresIn")
        if type(seconds) is not int or seconds < 1:
            raise StorageError(400, "InvalidRequest", "body/expiresIn must be >= 1", "Error")
        async with acting_as(self._pool, claims) as connection:
            query = "select 1 from storage.objects where bucket_id = %s and name = %s"
            if await (await connection.execute(query, [bucket, name])).fetchone() is None:
                raise _not_found()
        now = int(self._clock())
        token = self._keys.keyring.sign({"url": f"{bucket}/{name}", "iat": now, "exp": now + seconds})
        return JSONResponse({"signedURL": f"/object/sign/{quote(f'{bucket}/{name}')}?token={token}"})

    async def _signed(self, request: Request) -> Response:
        bucket, name = _address(request)
        token = request.query_params.get("token")
        if not token:
            text = "querystring must have required property 'token'"
            raise StorageError(400, "InvalidRequest", text, "Error")
        try:
            claims = read_claims(self._keys.keyring, token, now=self._clock())
        except TokenRejected as error:
            raise StorageError(400, "InvalidJWT", _jwt_text(error)) from None
        if claims.get("url") != f"{bucket}/{name}":
            raise StorageError(400, "InvalidSignature", "Invalid signature")
        expires = formatdate(claims["exp"], usegmt=True)
        async with self._pool.connection() as connection:
            return await self._serve(request, connection, bucket, name, {"Expires": expires})

    async def _read(self, request: Request) -> Response:
        bucket, name = _address(request)
        async with acting_as(self._pool, self._claims(request)) as connection:
            return await self._serve(request, connection, bucket, name, {})

    async def _public(self, request: Request) -> Response:
        bucket, name = _address(request)
        async with self._pool.connection() as connection:
            query = "select public from storage.buckets where id = %s"
            row = await (await connection.execute(query, [bucket])).fetchone()
            if row is None or not row[0]:
                raise StorageError(404, "NoSuchBucket", "Bucket not found", "Bucket not found")
            return await self._serve(request, connection, bucket, name, {})

    async def _serve(
        self, request: Request, connection: psycopg.AsyncConnection[Any], bucket: str, name: str,
        headers: dict[str, str],
    ) -> Response:  # fmt: skip
        """The object as the connection's role may see it: whole, a range, or 304."""
        query = "select version, metadata from storage.objects where bucket_id = %s and name = %s"
        row = await (await connection.execute(query, [bucket, name])).fetchone()
        if row is None or not self._file(row[0]).exists():
            raise _not_found()
        version, metadata = row
        headers |= {
            "ETag": metadata["eTag"],
            "Cache-Control": metadata["cacheControl"],
            "Last-Modified": metadata["lastModified"],
        }
        if metadata["eTag"] in [tag.strip() for tag in request.headers.get("if-none-match", "").split(",")]:
            return Response(status_code=304, headers=headers)
        if "download" in request.query_params:
            saved_as = request.query_params["download"] or name.rpartition("/")[2]
            headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{quote(saved_as)}"
        return FileResponse(self._file(version), headers=headers, media_type=metadata["mimetype"])

    def _file(self, version: str) -> Path:
        return self._directory / version


async def _receive(request: Request, part: Path, limit: int) -> tuple[str, int]:
    """The body into `part`: its MD5, which is its ETag, and its size. Raises `StorageError` past `limit`."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise _too_large()
    digest, size = hashlib.md5(usedforsecurity=False), 0
    try:
        with part.open("xb") as file:
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    raise _too_large()
                digest.update(chunk)
                await asyncio.to_thread(file.write, chunk)
    except ClientDisconnect:
        raise StorageError(400, "Aborted", "the client went away") from None
    return digest.hexdigest(), size


async def _body(request: Request) -> dict[str, Any]:
    with suppress(orjson.JSONDecodeError):
        body = orjson.loads(await request.body() or b"{}")
        if isinstance(body, dict):
            return body
    raise StorageError(400, "InvalidRequest", "body must be object", "Error")


def _address(request: Request) -> tuple[str, str]:
    bucket, name = request.path_params["bucket"], request.path_params["name"]
    if not name or len(name.encode()) > 1024 or any(ord(c) < 32 for c in name):
        raise StorageError(400, "InvalidKey", f"Invalid key: {name!r}")
    return bucket, name


def _jwt_text(error: TokenRejected) -> str:
    """The sentence of the library the original verifies with (jose)."""
    match error.reason:
        case "expired":
            return '"exp" claim timestamp check failed'
        case "signature" | "key":
            return "signature verification failed"
        case _:
            return "Invalid Compact JWS"
