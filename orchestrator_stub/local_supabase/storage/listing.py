"""Lists the objects of a bucket: one folder (`list`), or everything that begins with a prefix (`list-v2`)."""

from __future__ import annotations

import base64
import binascii
from contextlib import suppress
from typing import Annotated, Any, Literal

from psycopg import sql
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from orchestrator_stub.local_supabase.access import acting_as
from orchestrator_stub.local_supabase.storage.errors import StorageError
from orchestrator_stub.local_supabase.storage.store import Store, read_body

MOST = 1000
"""Entries of one page of `list-v2`."""

FOLDER = """
with found as materialized (
  select substr(name, length(%(below)s) + 1) as rest, id, updated_at, created_at, last_accessed_at, metadata
  from storage.objects where bucket_id = %(bucket)s and starts_with(name, %(below)s)
), entries as (
  select split_part(rest, '/', 1) as name, null::uuid as id, null::timestamptz as updated_at,
         null::timestamptz as created_at, null::timestamptz as last_accessed_at, null::jsonb as metadata
  from found where strpos(rest, '/') > 0 group by 1
  union all
  select rest, id, updated_at, created_at, last_accessed_at, metadata from found where strpos(rest, '/') = 0
)
select to_jsonb(e) from entries e where starts_with(lower(e.name), lower(%(search)s))
order by e.{column} {order} nulls first, e.name collate "C" limit %(limit)s offset %(offset)s
"""

BELOW = """
with found as materialized (
  select name, substr(name, length(%(below)s) + 1) as rest, id, updated_at, created_at, last_accessed_at, metadata
  from storage.objects where bucket_id = %(bucket)s and starts_with(name, %(below)s)
), entries as (
  select %(below)s || split_part(rest, '/', 1) || '/' as name, null::uuid as id, null::timestamptz as updated_at,
         null::timestamptz as created_at, null::timestamptz as last_accessed_at, null::jsonb as metadata
  from found where %(folders)s and strpos(rest, '/') > 0 group by 1
  union all
  select name, id, updated_at, created_at, last_accessed_at, metadata from found
  where not %(folders)s or strpos(rest, '/') = 0
)
select to_jsonb(e) from entries e cross join lateral (select coalesce({column}, '-infinity'::timestamptz)) k(moment)
where %(after)s::text is null or (k.moment, e.name collate "C") {beyond} (%(moment)s::timestamptz, %(after)s::text)
order by k.moment {order}, e.name collate "C" {order} limit %(limit)s
"""
"""By name the moment is the same for all."""


class Sort(BaseModel):
    column: Literal["name", "updated_at", "created_at", "last_accessed_at"] = "name"
    order: Literal["asc", "desc"] = "asc"


class Search(BaseModel):
    """`POST /object/list/{bucket}`."""

    prefix: str = ""
    limit: Annotated[int, Field(ge=1, le=2**31)] = 100
    offset: Annotated[int, Field(ge=0, le=2**31)] = 0
    search: str = ""
    sortBy: Sort = Sort()


class SearchV2(BaseModel):
    """`POST /object/list-v2/{bucket}`."""

    prefix: str = ""
    limit: Annotated[int, Field(ge=1)] = MOST
    cursor: str = ""
    with_delimiter: bool = False
    sortBy: Sort = Sort()


class Listing:
    def __init__(self, store: Store) -> None:
        self._store = store

    async def list_folder(self, request: Request) -> Response:
        body = await read_body(request, Search)
        below = body.prefix if not body.prefix or body.prefix.endswith("/") else f"{body.prefix}/"
        values = {"below": below, "search": body.search, "limit": body.limit, "offset": body.offset}
        return JSONResponse(await self._entries(request, FOLDER, body.sortBy, values))

    async def list_v2(self, request: Request) -> Response:
        body = await read_body(request, SearchV2)
        limit = min(body.limit, MOST)
        after, moment = _cursor(body.cursor)
        place = {"below": body.prefix, "folders": body.with_delimiter, "after": after, "moment": moment}
        by_name = body.sortBy.column == "name"
        entries = await self._entries(
            request, BELOW, body.sortBy, {**place, "limit": limit + 1}, by_name=by_name
        )
        page, more = entries[:limit], len(entries) > limit
        if body.with_delimiter:
            for entry in page:
                entry["key"] = entry["name"].rstrip("/").rpartition("/")[2]
        answer: dict[str, Any] = {
            "hasNext": more,
            "folders": [e for e in page if e["id"] is None],
            "objects": [e for e in page if e["id"] is not None],
        }
        if more:
            last = page[-1]
            told = f"l:{last['name']}\na:{(not by_name and last[body.sortBy.column]) or '-infinity'}"
            answer["nextCursor"] = base64.b64encode(told.encode()).decode()
        return JSONResponse(answer)

    async def _entries(
        self, request: Request, query: str, sort: Sort, values: dict[str, Any], *, by_name: bool = False
    ) -> list[dict[str, Any]]:
        claims = self._store.claims(request)
        statement = sql.SQL(query).format(
            column=sql.SQL("null") if by_name else sql.Identifier(sort.column),
            order=sql.SQL(sort.order),
            beyond=sql.SQL(">" if sort.order == "asc" else "<"),
        )
        async with acting_as(self._store.pool, claims) as connection:
            rows = await connection.execute(statement, {"bucket": request.path_params["bucket"], **values})
            return [row[0] for row in await rows.fetchall()]


def _cursor(token: str) -> tuple[str | None, str]:
    """The name and the moment of the last entry of the page before. Raises `StorageError`."""
    if not token:
        return None, "-infinity"
    with suppress(binascii.Error, UnicodeDecodeError):
        name, _, moment = base64.b64decode(token, validate=True).decode().rpartition("\n")
        if name.startswith("l:") and moment.startswith("a:"):
            return name[2:], moment[2:]
    raise StorageError(400, "InvalidParameter", "Invalid Parameter continuation token")
