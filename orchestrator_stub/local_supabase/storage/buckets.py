"""Buckets: made, described, changed, emptied, removed, with the caller's rights."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from psycopg import sql
from psycopg.errors import UniqueViolation
from pydantic import BaseModel, Field, StringConstraints
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orchestrator_stub.local_supabase.access import acting_as
from orchestrator_stub.local_supabase.storage.errors import (
    StorageError,
    bad_type,
    exists_already,
    malformed,
    no_bucket,
    not_served,
    too_large,
)
from orchestrator_stub.local_supabase.storage.store import MAX_OBJECT_BYTES, Store, read_body

DESCRIBED = """
jsonb_build_object('id', id, 'name', name, 'owner', coalesce(owner::text, ''), 'public', public, 'type', 'STANDARD',
  'file_size_limit', file_size_limit, 'allowed_mime_types', allowed_mime_types,
  'created_at', created_at, 'updated_at', updated_at)
"""
"""As the original's schema renders it: no owner is the empty string."""

NAME = re.compile(r"[\w!\-.*'() &$@=;:+,?]{1,63}", re.ASCII)
MIME_TYPE = re.compile(r"[\w.+-]+/([\w.+-]+|\*)(;.*)?|\*/\*", re.ASCII)
SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)(gb|mb|kb|b)", re.ASCII | re.IGNORECASE)
UNITS = {"gb": 1e9, "mb": 1e6, "kb": 1e3, "b": 1.0}


class Options(BaseModel):
    """`POST /bucket`, `PUT /bucket/{id}`. What an update does not say stays."""

    public: bool | None = None
    file_size_limit: Annotated[int, Field(ge=0)] | str | None = None
    allowed_mime_types: list[str] | None = None

    def columns(self) -> dict[str, Any]:
        """What was said, as the columns' values. Raises `StorageError`."""
        said: dict[str, Any] = {}
        if self.public is not None:
            said["public"] = self.public
        if "file_size_limit" in self.model_fields_set:
            said["file_size_limit"] = size_of(self.file_size_limit)
        if "allowed_mime_types" in self.model_fields_set:
            for kind in self.allowed_mime_types or []:
                if not MIME_TYPE.fullmatch(kind):
                    raise bad_type(kind)
            said["allowed_mime_types"] = self.allowed_mime_types
        return said


class NewBucket(Options):
    """`POST /bucket`."""

    name: Annotated[str, StringConstraints(min_length=1)]
    id: str | None = None
    type: str | None = None


class Page(BaseModel):
    """The query of `GET /bucket`."""

    limit: Annotated[int, Field(ge=1)] = 1000
    offset: Annotated[int, Field(ge=0)] = 0
    search: str = ""
    sortColumn: Literal["id", "name", "created_at", "updated_at"] = "id"
    sortOrder: Literal["asc", "desc"] = "asc"


def size_of(limit: int | str | None) -> int | None:
    """A limit in bytes: a number, or `20MB`. Raises `StorageError`."""
    if isinstance(limit, str):
        found = SIZE.fullmatch(limit)
        if found is None:
            text = "the requested file_size_limit uses an invalid format, use 20GB / 20MB / 30KB / 3B"
            raise StorageError(422, "InvalidRequest", text, "file_size_limit")
        limit = int(float(found[1]) * UNITS[found[2].lower()])
    if limit is not None and limit > MAX_OBJECT_BYTES:
        raise too_large()
    return limit or None


class Buckets:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def list_all(self, request: Request) -> Response:
        claims = self._store.claims(request)
        try:
            page = Page.model_validate(dict(request.query_params))
        except ValueError:
            raise malformed("querystring must be limit, offset, search, sortColumn, sortOrder") from None
        query = sql.SQL(
            "select {} from storage.buckets where strpos(lower(name), lower(%s)) > 0 order by {} {} limit %s offset %s"
        ).format(sql.SQL(DESCRIBED), sql.Identifier(page.sortColumn), sql.SQL(page.sortOrder))
        async with acting_as(self._store.pool, claims) as connection:
            # Everything contains the empty string, at 1.
            rows = await connection.execute(query, [page.search, page.limit, page.offset])
            return JSONResponse([row[0] for row in await rows.fetchall()])

    async def create(self, request: Request) -> Response:
        claims, body = self._store.claims(request), await read_body(request, NewBucket)
        if body.type not in (None, "STANDARD"):
            raise not_served(f"buckets of type {body.type[:40]}")
        name = body.id or body.name
        for each in (name, body.name):
            if not NAME.fullmatch(each):
                raise StorageError(400, "InvalidBucketName", "Bucket name invalid", "Invalid Input")
        columns = {
            "id": name,
            "name": body.name,
            "public": False,
            "owner_id": claims.get("sub"),
            **body.columns(),
        }
        query = sql.SQL("insert into storage.buckets ({}) values ({})").format(
            sql.SQL(", ").join(map(sql.Identifier, columns)),
            sql.SQL(", ").join(sql.Placeholder() * len(columns)),
        )
        try:
            async with acting_as(self._store.pool, claims) as connection:
                await connection.execute(query, list(columns.values()))
        except UniqueViolation:
            raise exists_already("BucketAlreadyExists") from None
        return JSONResponse({"name": name})

    async def get(self, request: Request) -> Response:
        return JSONResponse(
            await self._one(request, f"select {DESCRIBED} from storage.buckets where id = %s")  # noqa: S608
        )

    async def update(self, request: Request) -> Response:
        self._store.claims(request)
        columns = (await read_body(request, Options)).columns()
        changes = [sql.SQL("{} = {}").format(sql.Identifier(c), sql.Literal(v)) for c, v in columns.items()]
        query = sql.SQL("update storage.buckets set {} where id = %s returning to_jsonb(id)").format(
            sql.SQL(", ").join([*changes, sql.SQL("updated_at = now()")])
        )
        await self._one(request, query)
        return JSONResponse({"message": "Successfully updated"})

    async def delete(self, request: Request) -> Response:
        self._store.claims(request)
        async with self._store.pool.connection() as connection:
            query = "select 1 from storage.objects where bucket_id = %s limit 1"
            if await (await connection.execute(query, [request.path_params["bucket"]])).fetchone():
                raise StorageError(409, "ResourceNotEmpty", "The bucket you tried to delete is not empty")
        await self._one(request, "delete from storage.buckets where id = %s returning to_jsonb(id)")
        return JSONResponse({"message": "Successfully deleted"})

    async def empty(self, request: Request) -> Response:
        """At once; the original puts it into a queue."""
        await self._one(request, "select to_jsonb(id) from storage.buckets where id = %s")
        async with acting_as(self._store.pool, self._store.claims(request)) as connection:
            query = "delete from storage.objects where bucket_id = %s returning version"
            gone = await (await connection.execute(query, [request.path_params["bucket"]])).fetchall()
        for (version,) in gone:
            self._store.file(version).unlink(missing_ok=True)
        return JSONResponse({"message": "Empty bucket has been queued. Completion may take up to an hour."})

    async def _one(self, request: Request, query: str | sql.Composed) -> Any:
        """What `query` says of the bucket of the URL. Raises `StorageError` where there is none."""
        claims = self._store.claims(request)
        statement = sql.SQL(query) if isinstance(query, str) else query
        async with acting_as(self._store.pool, claims) as connection:
            row = await (await connection.execute(statement, [request.path_params["bucket"]])).fetchone()
        if row is None:
            raise no_bucket()
        return row[0]
