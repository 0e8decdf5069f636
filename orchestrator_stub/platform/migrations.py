"""Applies `supabase/migrations` the way the Supabase CLI does, to any PostgreSQL.

Recorded in `supabase_migrations.schema_migrations` under the file name's timestamp: a database migrated here can go on
with `supabase db push`, and the other way round. Forward only. All that is missing is applied in one transaction, so a
failure leaves the database as it was; the CLI runs one file in one.

A file may begin with a check: the statement `do $check$ … end $check$;`, which reads alone and raises with every
problem that is in the way. It runs before anything changes, with the CLI too, and `check` runs nothing else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psycopg

BOOTSTRAP = Path(__file__).parents[1] / "local_supabase" / "bootstrap.sql"

MIGRATIONS = (Path(__file__).parents[1] / "migrations_sql").resolve()
"""In a checkout this is a link to `supabase/migrations`; a wheel and an sdist carry the files."""

_NAME = re.compile(r"(?P<version>\d{14})_(?P<name>[a-z0-9_]+)\.sql")

_LOCK = 0x70726576
"""Advisory lock: two that migrate the same database wait for each other."""

_CHECK = re.compile(r"^do \$check\$\n.*?^end \$check\$;$", re.MULTILINE | re.DOTALL)

_REFUSAL = "55000"
"""SQLSTATE of a check's refusal: its message is a headline, then one line `- problem` each."""

_HAND_OVER = """
create schema if not exists preview;
alter table public.project_files set schema preview;
"""

_HISTORY = """
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (
  version text not null primary key,
  statements text[],
  name text
);
"""


class MigrationError(Exception):
    """A migration cannot be read or applied. The database is as it was before."""


class MigrationRefused(MigrationError):
    """The migrations cannot work with this database; `problems` are all that is in the way, with remedies."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.problems = message.split("\n- ")[1:]

    @property
    def by_earlier_version(self) -> bool:
        """A version before the first release migrated this database; there is no way forward from its migrations."""
        return self.problems[0].startswith("an unreleased earlier version")


@dataclass(frozen=True, slots=True)
class Migration:
    """One file: `version` is its fourteen-digit timestamp."""

    version: str
    name: str
    sql: str


def read_migrations(directory: Path) -> list[Migration]:
    """The migrations of `directory` in order.

    Raises `MigrationError` for a name that the CLI would skip, or a timestamp used twice.
    """
    found: dict[str, Migration] = {}
    for path in sorted(directory.glob("*.sql")):
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise MigrationError(f"cannot read {path.name}: the name must be YYYYMMDDHHMMSS_lower_case.sql")
        if match["version"] in found:
            raise MigrationError(f"cannot read {path.name}: {match['version']} is used twice")
        found[match["version"]] = Migration(match["version"], match["name"], path.read_text(encoding="utf-8"))
    if not found:
        raise MigrationError(f"no migrations in {directory}")
    return list(found.values())


async def migrate(
    dsn: str, directory: Path = MIGRATIONS, *, only: int | None = None, adopt_files: bool = False
) -> list[str]:
    """Apply what is missing, oldest first and in one transaction, and return the versions applied.

    `only`: at most so many, for tests of a half-migrated database. `adopt_files`: a table `public.project_files` that
    is there is handed over first. Raises `MigrationRefused` when a check finds problems, and `MigrationError`, naming
    the file, when one fails or when an older one is missing below a newer one of ours that is applied. Either leaves
    the database as it was.
    """
    wanted = read_migrations(directory)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute("select pg_advisory_lock(%s)", (_LOCK,))
        missing = (await _missing(connection, wanted))[:only]
        if not missing:
            return []
        async with connection.transaction():
            if adopt_files:
                await _hand_over(connection)
            await connection.execute(_HISTORY.encode())
            for migration in missing:
                try:
                    await connection.execute(migration.sql.encode())
                    await connection.execute(
                        "insert into supabase_migrations.schema_migrations (version, name, statements)"
                        " values (%s, %s, %s)",
                        (migration.version, migration.name, [migration.sql]),
                    )
                except psycopg.Error as error:
                    raise _failure(migration, error) from error
        return [migration.version for migration in missing]


async def check(dsn: str, directory: Path = MIGRATIONS, *, adopt_files: bool = False) -> list[str]:
    """The versions that `migrate` would apply, after the checks of each have found nothing. Changes nothing.

    Raises as `migrate` does.
    """
    wanted = read_migrations(directory)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        missing = await _missing(connection, wanted)
        async with connection.transaction(force_rollback=True):
            if missing and adopt_files:
                await _hand_over(connection)  # undone with the transaction
            else:
                await connection.execute("set transaction read only")
            for migration in missing:
                statement = _CHECK.search(migration.sql)
                try:
                    if statement is not None:
                        await connection.execute(statement[0].encode())
                except psycopg.Error as error:
                    raise _failure(migration, error) from error
        return [migration.version for migration in missing]


async def _missing(
    connection: psycopg.AsyncConnection[tuple[object, ...]], wanted: list[Migration]
) -> list[Migration]:
    """What is not applied. A product's own migrations stand in the same history, and are nothing to us."""
    there = await connection.execute(
        "select to_regclass('supabase_migrations.schema_migrations') is not null"
    )
    row = await there.fetchone()
    applied: dict[str, str | None] = {}
    if row and row[0]:
        rows = await connection.execute("select version, name from supabase_migrations.schema_migrations")
        applied = {str(version): str(name) if name else None for version, name in await rows.fetchall()}
    for migration in wanted:
        name = applied.get(migration.version)
        if name not in (None, migration.name):
            raise MigrationError(
                f"cannot apply {migration.version}_{migration.name}: the history has {migration.version}_{name}, which "
                "is not ours. Give that one another timestamp, in its file and in the history."
            )
    missing = [migration for migration in wanted if migration.version not in applied]
    newest = max((m.version for m in wanted if m.version in applied), default="")
    for migration in missing:
        if migration.version < newest:
            raise MigrationError(
                f"cannot apply {migration.version}_{migration.name}: {newest} is applied already, and "
                "migrations only go forward. Give it a newer timestamp."
            )
    return missing


async def _hand_over(connection: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
    try:
        await connection.execute("set local lock_timeout = '2s'")
        await connection.execute(_HAND_OVER.encode())
    except psycopg.Error as error:
        message = error.diag.message_primary or str(error)
        raise MigrationError(f"cannot hand public.project_files over: {message}") from error


def _failure(migration: Migration, error: psycopg.Error) -> MigrationError:
    message = error.diag.message_primary or str(error)
    if error.sqlstate == _REFUSAL and "\n- " in message:
        return MigrationRefused(message)
    return MigrationError(f"cannot apply {migration.version}_{migration.name}: {message}")


async def bootstrap(dsn: str) -> bool:
    """Give a plain PostgreSQL what Supabase's has (roles, auth, realtime, storage). False: it is Supabase's already.

    Needs a superuser. Idempotent.
    """
    async with await psycopg.AsyncConnection.connect(dsn) as connection:
        cursor = await connection.execute("select 1 from pg_roles where rolname = 'supabase_admin'")
        if await cursor.fetchone():
            return False
        await connection.execute(BOOTSTRAP.read_text(encoding="utf-8").encode())
        return True
