"""Examines the database: reached, new enough, migrated, and with the sessions, rights and time that `serve` needs."""

from __future__ import annotations

import time
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict

from orchestrator_stub.doctor.findings import Report
from orchestrator_stub.platform.database import POOL_SIZE, pool_of
from orchestrator_stub.platform.limits import differences, limits_of
from orchestrator_stub.platform.migrations import MigrationError, MigrationRefused, check

BUCKETS: Final = ("project-snapshots", "project-assets", "preview-modules")
"""Where projects' files are: private, all of them."""

CONNECT_SECONDS: Final = 8

POOLER_QUESTIONS: Final = 4
"""How often each of two connections is asked for its server process."""

VERSION: Final = 150000
"""PostgreSQL 15: `security_invoker` on views, which the migrations use."""

STATEMENT_SECONDS: Final = 30.0
"""A bulk of 60 MB takes 8 to 11 s, the sweep and a snapshot's read less."""

CLOCK_SECONDS: Final = 5.0
"""Of difference: what verifiers forgive a token that is from the future (`tokens.LEEWAY`)."""

CONNECTIONS_LEFT: Final = 2 * POOL_SIZE
"""For a second orchestrator during an update."""

Row = tuple[Any, ...]


async def examine_database(dsn: str, report: Report) -> None:
    """Examine the database at `dsn`, of which nothing but host, port and user is said."""
    parts = conninfo_to_dict(dsn)
    where = f"{parts.get('host', 'the local socket')}:{parts.get('port', 5432)}"
    try:
        connection = await psycopg.AsyncConnection.connect(
            dsn, autocommit=True, connect_timeout=CONNECT_SECONDS
        )
    except psycopg.OperationalError as error:
        said = " ".join(str(error).split())
        report.bad(f"{where} cannot be reached: {said}", _remedy_of(said))
        return
    async with connection:
        await _server(connection, where, report)
        await _pooler(connection, dsn, report)
        await _clock(connection, report)
        await _timeout(connection, report)
        await _connections(connection, report)
    await _migrations(dsn, report)


MAY_BECOME_WRITER: Final = """
select coalesce(bool_or(pg_has_role(
  r.oid, case when current_setting('server_version_num')::int < 160000 then 'member' else 'set' end)), false)
from pg_roles r where r.rolname = 'preview_writer'
"""
"""Whether offers of write-back can be taken: from PostgreSQL 16 on to have a role and to become it are two rights."""


async def _one(connection: psycopg.AsyncConnection[Row], query: str) -> Row:
    row = await (await connection.execute(query.encode())).fetchone()
    assert row is not None, query
    return row


async def _server(connection: psycopg.AsyncConnection[Row], where: str, report: Report) -> None:
    version = connection.info.server_version
    if version < VERSION:
        report.bad(f"{where} is PostgreSQL {version // 10000}", "upgrade it to 15 or newer")
        return
    user, read_only = await _one(
        connection,
        "select current_user, pg_is_in_recovery() or current_setting('transaction_read_only')::bool",
    )
    if read_only:
        report.bad(f"{where} takes no writes", "name the primary in DATABASE_URL, not a replica")
        return
    report.ok(f"{where} is PostgreSQL {version // 10000}, as {user}")


async def _pooler(connection: psycopg.AsyncConnection[Row], dsn: str, report: Report) -> None:
    """Two clients that meet the same server process share it by the transaction: LISTEN and advisory locks are lost.

    Other clients of the pooler may have that process between two questions, so each asks more than once: where a
    client has a session of its own, its process never changes.
    """
    here, there = set(), set()
    async with await psycopg.AsyncConnection.connect(
        dsn, autocommit=True, connect_timeout=CONNECT_SECONDS
    ) as second:
        for _ in range(POOLER_QUESTIONS):
            here.add((await _one(connection, "select pg_backend_pid()"))[0])
            there.add((await _one(second, "select pg_backend_pid()"))[0])
    if here & there or len(here) > 1 or len(there) > 1:
        report.bad(
            "a pooler in transaction mode stands before the database: LISTEN and advisory locks are lost in it",
            "use the direct or the session-mode connection string (Supabase: port 5432, not 6543)",
        )
    else:
        report.ok("each connection has a session of its own")


async def _clock(connection: psycopg.AsyncConnection[Row], report: Report) -> None:
    asked = time.time()
    theirs = float((await _one(connection, "select extract(epoch from clock_timestamp())"))[0])
    answered = time.time()
    off = max(theirs - answered, asked - theirs, 0.0)
    if off > CLOCK_SECONDS:
        report.bad(
            f"this machine's clock and the database's are {off:.0f} s apart: tokens are refused",
            "set the clocks by NTP",
        )
    else:
        report.ok("its clock is ours")


async def _timeout(connection: psycopg.AsyncConnection[Row], report: Report) -> None:
    milliseconds = (
        await _one(connection, "select setting::bigint from pg_settings where name = 'statement_timeout'")
    )[0]
    if 0 < milliseconds < STATEMENT_SECONDS * 1000:
        report.warn(
            f"a statement of this role is cut after {milliseconds / 1000:g} s",
            "alter role … set statement_timeout = '60s': the sweep and large snapshots take their time",
        )
    else:
        report.ok("its statements have time")


async def _connections(connection: psycopg.AsyncConnection[Row], report: Report) -> None:
    most, used = await _one(
        connection,
        "select current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,"
        " count(*) from pg_stat_activity where backend_type = 'client backend'",
    )
    if most - used < CONNECTIONS_LEFT:
        report.warn(
            f"{used} of {most} connections are taken; one orchestrator takes up to {POOL_SIZE + 2}",
            "raise max_connections, or end what does not need its connection",
        )
    else:
        report.ok(f"{used} of {most} connections are taken")


async def _migrations(dsn: str, report: Report) -> None:
    try:
        missing = await check(dsn)
    except MigrationRefused as error:
        for problem in error.problems:
            report.bad(problem, "put it right, then: preview-orchestrator migrate")
    except (MigrationError, psycopg.Error) as error:
        report.bad(f"its migrations: {' '.join(str(error).split())}", "see docs/rollout.md, the schema")
    else:
        if missing:
            report.bad(
                f"{len(missing)} migrations are missing, from {missing[0]} on", "preview-orchestrator migrate"
            )
        else:
            report.ok("every migration is applied")
            await _rights(dsn, report)
            await _limits(dsn, report)


async def _limits(dsn: str, report: Report) -> None:
    async with pool_of(dsn, size=1) as pool:
        sentences = differences(await limits_of(pool))
    for sentence in sentences:
        report.warn(
            sentence, "a release and its migrations belong together; see preview.settings and the buckets"
        )
    if not sentences:
        report.ok("what a project may hold is what this release takes")


async def _rights(dsn: str, report: Report) -> None:
    """As who `serve` works: the owner of what the migrations made, or somebody with its rights."""
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        user, table, role, realtime = await _one(
            connection,
            "select current_user, has_table_privilege('preview.sessions', 'insert'),"
            " exists (select from pg_roles where rolname = 'preview_agent'),"
            " (select bool_or(pg_has_role(r.oid, 'preview_agent', 'member')) from pg_roles r"
            "  where r.rolname in ('supabase_realtime_admin', 'authenticator'))",
        )
        buckets = await (
            await connection.execute(
                "select id, public from storage.buckets where id = any(%s)", [[*BUCKETS]]
            )
        ).fetchall()
        [writer] = await _one(connection, MAY_BECOME_WRITER)
    if not writer:
        report.bad(
            f"{user} may not become preview_writer: no offer of write-back is taken",
            f"grant preview_writer to {user}",
        )
    found: dict[str, bool] = {row[0]: row[1] for row in buckets}
    if not table:
        report.bad(f"{user} may not write preview.sessions", "connect as the role that ran the migrations")
    if not role or not realtime:
        report.bad(
            "Realtime may not take the role preview_agent",
            "grant preview_agent to authenticator; or TOKEN_ROLE=authenticated",
        )
    for wanted in BUCKETS:
        public = found.get(wanted)
        if public is None:
            report.bad(f"there is no bucket {wanted}", "insert it again as the migration does, private")
        elif public:
            report.bad(
                f"the bucket {wanted} is public: everybody reads the projects' files",
                f"make it private: update storage.buckets set public = false where id = '{wanted}'",  # noqa: S608 - shown
            )
    if table and role and realtime:
        report.ok("rights and roles are as they have to be")


def _remedy_of(said: str) -> str:
    """What to do about a connection that failed, by what libpq says."""
    lower = said.lower()
    if "password" in lower or "authentication" in lower or "tenant or user" in lower:
        return "see user and password in DATABASE_URL; percent-encode @ : / and # in the password"
    if "does not exist" in lower:
        return "see the database's name and the user's in DATABASE_URL"
    if "translate host" in lower or "name or service" in lower or "resolve" in lower:
        return "see the host in DATABASE_URL; Supabase's direct address has IPv6 only, its session pooler IPv4 too"
    if "ssl" in lower:
        return "sslmode in DATABASE_URL and what the server asks for do not fit"
    return "see host and port in DATABASE_URL, and whether the database lets this network in"
