"""Applies `supabase/migrations` the way the Supabase CLI does, to any PostgreSQL.

One file, one transaction, recorded in `supabase_migrations.schema_migrations` under the file name's timestamp: a
database migrated here can go on with `supabase db push`, and the other way round. Forward only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import psycopg

BOOTSTRAP = Path(__file__).parent / "local" / "bootstrap.sql"

MIGRATIONS = (Path(__file__).parent / "migrations_sql").resolve()
"""In a checkout this is a link to `supabase/migrations`; a wheel and an sdist carry the files."""

_NAME = re.compile(r"(?P<version>\d{14})_(?P<name>[a-z0-9_]+)\.sql")

_LOCK = 0x70726576
"""Advisory lock: two that migrate the same database wait for each other."""

_HISTORY = """
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (
  version text not null primary key,
  statements text[],
  name text
);
"""


class MigrationError(Exception):
    """A migration cannot be read or applied. The database is as it was after the one before."""


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


async def migrate(dsn: str, directory: Path = MIGRATIONS, *, only: int | None = None) -> list[str]:
    """Apply what is missing, oldest first, and return the versions applied.

    `only`: at most so many, for tests of a half-migrated database. Raises `MigrationError`, naming the file, when one
    fails (it is rolled back whole) or when an older one is missing below a newer one that is applied.
    """
    wanted = read_migrations(directory)
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        await connection.execute("select pg_advisory_lock(%s)", (_LOCK,))
        await connection.execute(_HISTORY.encode())
        rows = await (
            await connection.execute("select version from supabase_migrations.schema_migrations")
        ).fetchall()
        applied = {str(row[0]) for row in rows}
        missing = [migration for migration in wanted if migration.version not in applied]
        newest = max(applied, default="")
        for migration in missing:
            if migration.version < newest:
                raise MigrationError(
                    f"cannot apply {migration.version}_{migration.name}: {newest} is applied already, and "
                    "migrations only go forward. Give it a newer timestamp."
                )
        for migration in missing[:only]:
            try:
                async with connection.transaction():
                    await connection.execute(migration.sql.encode())
                    await connection.execute(
                        "insert into supabase_migrations.schema_migrations (version, name, statements)"
                        " values (%s, %s, %s)",
                        (migration.version, migration.name, [migration.sql]),
                    )
            except psycopg.Error as error:
                raise MigrationError(f"cannot apply {migration.version}_{migration.name}: {error}") from error
        return [migration.version for migration in missing[:only]]


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
