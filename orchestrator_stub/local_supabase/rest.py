"""Serves PostgREST's form of calling functions and reading views, for the exposed schema `public`.

Enough for `supabase.rpc(…)` and a plain `select` of the official clients, errors included. Arguments become JSON
records and results leave as the JSON PostgreSQL makes of them, as PostgREST does; nothing is converted on the way.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import psycopg
from psycopg import AsyncConnection, sql
from psycopg_pool import PoolTimeout
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orchestrator_stub.local_supabase.access import Claims, Pool, acting_as, read_claims
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.platform.tokens import TokenRejected

WRITING = ("POST", "PUT", "PATCH", "DELETE")

SINGULAR = "application/vnd.pgrst.object+json"

STATUS_OF_CLASS = {
    "08": 503, "09": 500, "0L": 403, "0P": 403, "23": 400, "25": 500, "28": 403, "2D": 500, "38": 500, "39": 500,
    "3B": 500, "40": 500, "53": 503, "54": 500, "55": 500, "57": 500, "58": 500, "F0": 500, "HV": 500, "P0": 500,
    "XX": 500,
}  # fmt: skip
STATUS_OF_STATE = {
    "23503": 409, "23505": 409, "25006": 405, "42883": 404, "42P01": 404, "42P17": 500, "53400": 500, "P0001": 400,
}  # fmt: skip
"""PostgREST's table from SQLSTATE to HTTP status (its documentation, "Errors"); everything else is 400."""

FUNCTIONS = """
select p.proname, p.proretset, p.prorettype = 'void'::regtype, p.provolatile <> 'v', p.pronargdefaults,
  (select t.typtype = 'c' or p.prorettype = 'record'::regtype from pg_type t where t.oid = p.prorettype),
  coalesce((select array_agg(coalesce(nullif(a.name, ''), '') order by a.n)
    from unnest(p.proargnames) with ordinality a(name, n)
    where coalesce(p.proargmodes[a.n], 'i') in ('i', 'b', 'v')), '{}'),
  coalesce((select array_agg(format_type(t.oid, null) order by t.n)
    from unnest(p.proargtypes) with ordinality t(oid, n)), '{}')
from pg_proc p join pg_namespace n on n.oid = p.pronamespace
where n.nspname = 'public' and p.proname = %s and p.prokind = 'f'
"""


class PostgrestError(Exception):
    """An answer in PostgREST's error form: `{"code", "details", "hint", "message"}`."""

    def __init__(
        self, status: int, code: str, message: str, details: str | None = None, hint: str | None = None
    ) -> None:
        self.status = status
        self.body = {"code": code, "details": details, "hint": hint, "message": message}
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Function:
    """One function of the exposed schema: how to call it, and what comes back."""

    name: str
    returns_set: bool
    returns_void: bool
    read_only: bool
    defaults: int
    returns_rows: bool
    """Of columns, which can be selected, filtered and ordered by; else of single values."""
    names: tuple[str, ...]
    types: tuple[str, ...]

    def takes(self, given: set[str]) -> bool:
        required = self.names[: len(self.names) - self.defaults]
        return set(required) <= given <= set(self.names)

    @property
    def is_table(self) -> bool:
        return self.returns_set and self.returns_rows

    def call(self, given: Sequence[str]) -> sql.Composed:
        """What a statement selects `_r` from; its one parameter is the arguments as a JSON object."""
        columns = [
            sql.SQL("{} {}").format(sql.Identifier(n), sql.SQL(t))
            for n, t in zip(self.names, self.types, strict=True)
            if n in given
        ]
        arguments = [sql.SQL("{0} := _args.{0}").format(sql.Identifier(n)) for n in self.names if n in given]
        source = (
            sql.SQL("json_to_record(%s::json) as _args({}), lateral").format(sql.SQL(", ").join(columns))
            if columns
            else sql.SQL("(select %s::json) as _args, lateral")
        )
        called = sql.SQL("{}.{}({})").format(
            sql.Identifier("public"), sql.Identifier(self.name), sql.SQL(", ").join(arguments)
        )
        return sql.SQL("{} {} as _r").format(source, called)

    def value(self, given: Sequence[str]) -> sql.Composed:
        """The statement that gives a function's value, or its single values, as JSON."""
        result = "coalesce(json_agg(_r), '[]')::text" if self.returns_set else "to_json(_r)::text"
        return sql.SQL("select {} from {}").format(sql.SQL(result), self.call(given))


class RestRoutes:
    """The `/rest/v1` endpoints. `clock` gives Unix seconds."""

    def __init__(self, pool: Pool, keys: ProjectKeys, *, clock: Callable[[], float] = time.time) -> None:
        self._pool = pool
        self._keys = keys
        self._clock = clock

    def routes(self) -> list[Route]:
        return [
            Route("/rest/v1/rpc/{function}", self._answer(self._rpc), methods=["POST", "GET"]),
            Route("/rest/v1/{relation}", self._answer(self._select), methods=["GET"]),
            Route("/rest/v1/{rest:path}", self._answer(self._rest), methods=["GET", *WRITING]),
            Route("/functions/v1/{rest:path}", self._answer(self._rest), methods=["GET", *WRITING]),
            Route("/graphql/v1", self._answer(self._rest), methods=["GET", *WRITING]),
        ]

    def _answer(self, endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def answer(request: Request) -> Response:
            try:
                response: Response = await endpoint(request)
                return response
            except PostgrestError as error:
                return _error(error)
            except PoolTimeout:
                message = "Timed out acquiring connection from connection pool."
                return _error(PostgrestError(504, "PGRST003", message))
            except psycopg.Error as error:
                return _error(_of_database(error, self._is_anonymous(request)))

        return answer

    def _token(self, request: Request) -> str:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        return token.strip() if scheme.lower() == "bearer" else request.headers.get("apikey", "")

    def _is_anonymous(self, request: Request) -> bool:
        return self._token(request) in ("", self._keys.anon_key)

    def _claims(self, request: Request) -> Claims:
        """Who asks. The gateway wants an API key, and a token where there is one beside it."""
        key = request.headers.get("apikey") or request.query_params.get("apikey", "")
        if not key and not self._token(request):
            raise PostgrestError(401, "401", "No API key found in request")
        if key and key not in (self._keys.anon_key, self._keys.service_key):
            raise PostgrestError(401, "401", "Invalid API key")
        try:
            return read_claims(self._keys.keyring, self._token(request) or key, now=self._clock())
        except TokenRejected as error:
            if error.reason == "expired":
                raise PostgrestError(401, "PGRST303", "JWT expired") from None
            raise PostgrestError(401, "PGRST301", "JWSError JWSInvalidSignature") from None

    async def _rpc(self, request: Request) -> Response:
        claims = self._claims(request)
        name = request.path_params["function"]
        query = [(k, v) for k, v in request.query_params.multi_items() if k != "apikey"]
        raw = await request.body()
        try:
            given: Any = orjson.loads(raw) if raw else {}
        except orjson.JSONDecodeError:
            raise PostgrestError(400, "PGRST102", "Empty or invalid json") from None
        if not isinstance(given, dict):
            raise PostgrestError(400, "PGRST102", "All object keys must match")
        async with acting_as(self._pool, claims, _settings(request)) as connection:
            if request.method != "POST":
                names = await _parameters(connection, name)
                given = {k: v for k, v in query if k in names}
                query = [(k, v) for k, v in query if k not in names]
            function = await _find(connection, name, set(given))
            if function.read_only:
                await connection.execute("set transaction read only")
            elif request.method != "POST":
                raise PostgrestError(405, "25006", f"cannot execute {name} in a read-only transaction")
            arguments, used = [orjson.dumps(given).decode()], sorted(given)
            if function.is_table:
                source = sql.SQL("materialized (select _r.* from {})").format(function.call(used))
                return await _page(request, connection, source, arguments, query)
            if query:
                raise PostgrestError(
                    400,
                    "PGRST100",
                    f'"{query[0][0]}" is not served for {name}, which returns no table',
                    hint="Take the answer as it is, and select in your own code.",
                )
            row = await (await connection.execute(function.value(used), arguments)).fetchone()
        if function.returns_void:
            return Response(status_code=204)
        return _json(request, None if row is None else row[0], function.returns_set)

    async def _select(self, request: Request) -> Response:
        """`?select=a,b&column=eq.value&order=a.desc&limit=n`, of one table or view."""
        claims = self._claims(request)
        table = sql.Identifier("public", request.path_params["relation"])
        source = sql.SQL("not materialized (select * from {})").format(table)
        query = [(k, v) for k, v in request.query_params.multi_items() if k != "apikey"]
        async with acting_as(self._pool, claims, _settings(request)) as connection:
            return await _page(request, connection, source, [], query)

    async def _rest(self, request: Request) -> Response:
        what = f"{request.method} {request.url.path[:200]}"
        raise PostgrestError(
            501, "PGRST000", f"{what}: not served by the local stand-in (docs/stand-in.md)",
            hint="Tables are read here; what is written goes through functions.",
        )  # fmt: skip


async def _parameters(connection: AsyncConnection[Any], name: str) -> set[str]:
    """Every parameter of the functions of that name: of a query, what is none of them is a filter."""
    return {each for row in await (await connection.execute(FUNCTIONS, [name])).fetchall() for each in row[6]}


async def _page(
    request: Request,
    connection: AsyncConnection[Any],
    source: sql.Composed,
    arguments: Sequence[Any],
    parameters: Sequence[tuple[str, str]],
) -> Response:
    """The rows of `source` that `parameters` ask for. `Prefer: count=…`: how many there are without the limit."""
    counted = "count=" in request.headers.get("prefer", "")
    query, values, offset = _query(source, parameters, counted)
    row = await (await connection.execute(query, [*arguments, *values])).fetchone()
    assert row is not None
    text, shown, total = row
    response = _json(request, text, True)
    response.headers["Content-Range"] = (
        f"{offset}-{offset + shown - 1}" if shown else "*"
    ) + f"/{total if counted else '*'}"
    if counted and 0 < shown < total and request.method != "POST":
        response.status_code = 206
    return response


async def _find(connection: AsyncConnection[Any], name: str, given: set[str]) -> Function:
    """The exposed function that takes exactly these arguments, looked up anew each time. Raises `PostgrestError`."""
    rows = await (await connection.execute(FUNCTIONS, [name])).fetchall()
    known = [Function(r[0], r[1], r[2], r[3], r[4], r[5], tuple(r[6]), tuple(r[7])) for r in rows]
    for function in sorted(known, key=lambda function: len(function.names)):
        if function.takes(given):
            return function
    wanted = ", ".join(sorted(given))
    what = f"with parameters {wanted}" if wanted else "without parameters"
    raise PostgrestError(
        404,
        "PGRST202",
        f"Could not find the function public.{name}({wanted}) in the schema cache",
        f"Searched for the function public.{name} {what} or with a single unnamed json/jsonb parameter, "
        "but no matches were found in the schema cache.",
        f"Perhaps you meant to call {_signature(known[0])}" if known else None,
    )


COMPARISONS = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "like": "like"}
_COLUMN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _query(
    source: sql.Composed, parameters: Sequence[tuple[str, str]], counted: bool
) -> tuple[sql.Composed, list[Any], int]:
    """PostgREST's horizontal and vertical filtering, the simple forms: statement, values and offset.

    Raises `PostgrestError` with the name of what is not served.
    """
    columns: sql.Composable = sql.SQL("*")
    conditions: list[sql.Composable] = []
    order: list[sql.Composable] = []
    bounds: list[sql.Composable] = []
    values: list[Any] = []
    offset = 0
    for name, value in parameters:
        if name == "select":
            if value.strip() != "*":
                columns = sql.SQL(", ").join(sql.Identifier(_column(c.strip())) for c in value.split(","))
        elif name == "order":
            for part in value.split(","):
                column, _, direction = part.partition(".")
                way = sql.SQL(" desc" if direction.startswith("desc") else " asc")
                order.append(sql.Identifier(_column(column)) + way)
        elif name in ("limit", "offset"):
            if not (value.isascii() and value.isdecimal() and len(value) <= 18):
                raise PostgrestError(400, "PGRST100", f'"failed to parse {name} ({value[:100]})"')
            bounds.append(sql.SQL(f" {name} {int(value)}"))
            offset = int(value) if name == "offset" else offset
        else:
            comparison, _, wanted = value.partition(".")
            target = sql.Identifier(_column(name))
            if comparison == "is" and wanted in ("null", "true", "false"):
                conditions.append(sql.SQL("{} is {}").format(target, sql.SQL(wanted)))
            elif comparison == "in" and wanted.startswith("(") and wanted.endswith(")"):
                conditions.append(sql.SQL("{}::text = any(%s)").format(target))
                values.append([v.strip().strip('"') for v in wanted[1:-1].split(",")])
            elif comparison in COMPARISONS:
                conditions.append(sql.SQL("{} {} %s").format(target, sql.SQL(COMPARISONS[comparison])))
                values.append(wanted)
            else:
                raise PostgrestError(400, "PGRST100", f'"failed to parse filter ({name}={value})"')
    where = sql.SQL(" where ") + sql.SQL(" and ").join(conditions) if conditions else sql.SQL("")
    ordered = sql.SQL(" order by ") + sql.SQL(", ").join(order) if order else sql.SQL("")
    statement = sql.SQL(
        "with _source as {}, _matched as (select * from _source{}), _page as (select {} from _matched{}{})"
        " select coalesce(json_agg(_page), '[]')::text, count(*), {} from _page"
    ).format(
        source, where, columns, ordered, sql.SQL("").join(bounds),
        sql.SQL("(select count(*) from _matched)" if counted else "0"),
    )  # fmt: skip
    return statement, values, offset


def _column(name: str) -> str:
    if not _COLUMN.fullmatch(name):
        raise PostgrestError(400, "PGRST100", f'"failed to parse column ({name})"')
    return name


def _settings(request: Request) -> dict[str, str]:
    """What PostgREST tells the database about the request; credentials are left out of the headers."""
    secret = ("authorization", "apikey", "cookie")
    headers = {k: v for k, v in request.headers.items() if k not in secret}
    return {
        "request.method": request.method,
        "request.path": request.url.path.removeprefix("/rest/v1"),
        "request.headers": orjson.dumps(headers).decode(),
    }


def _json(request: Request, text: str | None, is_set: bool) -> Response:
    body = "null" if text is None else text
    if SINGULAR in request.headers.get("accept", ""):
        if is_set:
            rows = orjson.loads(body)
            if len(rows) != 1:
                message = "Cannot coerce the result to a single JSON object"
                raise PostgrestError(406, "PGRST116", message, f"The result contains {len(rows)} rows")
            body = orjson.dumps(rows[0]).decode()
        return Response(body, media_type=f"{SINGULAR}; charset=utf-8")
    return Response(body, media_type="application/json; charset=utf-8")


def _of_database(error: psycopg.Error, anonymous: bool) -> PostgrestError:
    """The answer for an error that PostgreSQL raised."""
    state = error.sqlstate
    if state is None and not isinstance(error, psycopg.OperationalError):
        return PostgrestError(
            400, "22021", " ".join(str(error).split())
        )  # not even sent, such as a NUL in a text
    if state is None:
        return PostgrestError(503, "PGRST000", "Database client error. Retrying the connection.")
    if re.fullmatch(r"PT[1-5]\d\d", state):
        status = int(state[2:])
    elif state == "42501":
        status = 401 if anonymous else 403
    else:
        status = STATUS_OF_STATE.get(state) or STATUS_OF_CLASS.get(state[:2], 400)
    diag = error.diag
    return PostgrestError(status, state, diag.message_primary or "", diag.message_detail, diag.message_hint)


def _signature(function: Function) -> str:
    return f"the function public.{function.name}({', '.join(function.names)})"


def _error(error: PostgrestError) -> Response:
    headers = {"WWW-Authenticate": "Bearer"} if error.status == 401 else None
    if error.body["code"] == "401":  # the gateway's own form
        body = {"message": error.body["message"], "hint": "Double check your API key."}
        return Response(orjson.dumps(body), 401, headers, "application/json; charset=utf-8")
    return Response(orjson.dumps(error.body), error.status, headers, "application/json; charset=utf-8")
