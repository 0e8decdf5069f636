"""The official CLI on our migrations: it applies them as our runner does, and each goes on where the other stopped."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from psycopg.conninfo import conninfo_to_dict

from orchestrator_stub.migrations import MIGRATIONS, migrate, read_migrations
from tests.database.db import connect, shape
from tests.referees.clients import NODE

CLI = NODE / "node_modules" / "@supabase" / "cli-linux-x64" / "bin" / "supabase"
ALL = [migration.version for migration in read_migrations(MIGRATIONS)]


def url_of(dsn: str) -> str:
    """The connection string as the CLI takes it; a directory of a socket goes into the query."""
    parts = {key: str(value) for key, value in conninfo_to_dict(dsn).items() if value is not None}
    host = parts.get("host", "localhost")
    query = {"sslmode": parts.get("sslmode", "disable")} | ({"host": host} if host.startswith("/") else {})
    server = "localhost" if host.startswith("/") else host
    who = f"{quote(parts.get('user', 'postgres'))}:{quote(parts.get('password', 'unused'), safe='')}"
    return f"postgresql://{who}@{server}:{parts.get('port', '5432')}/{parts['dbname']}?{urlencode(query)}"


@pytest.fixture
def push(blank: str, packages: None, tmp_path: Path) -> list[str]:
    """`supabase db push` of a copy of our directory onto the blank database, as a command line."""
    if not CLI.exists():
        pytest.skip("the Supabase CLI is locked for x86-64 Linux alone")
    shutil.copytree(MIGRATIONS.parent, tmp_path / "checkout" / "supabase")
    return [
        str(CLI),
        "db",
        "push",
        "--yes",
        f"--remote={url_of(blank)}",
        "--workdir",
        str(tmp_path / "checkout"),
    ]


def said(command: list[str], home: Path) -> str:
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def history(dsn: str) -> list[tuple[str, str]]:
    with connect(dsn) as db:
        query = "select version, name from supabase_migrations.schema_migrations order by version"
        return db.execute(query).fetchall()


def test_db_push_makes_what_our_migrate_makes(
    push: list[str], blank: str, database: str, tmp_path: Path
) -> None:
    assert f"Apply {len(ALL)} migrations" in said(push, tmp_path)
    assert shape(blank) == shape(database)
    assert history(blank) == history(database)
    assert asyncio.run(migrate(blank)) == []


def test_db_push_goes_on_where_our_migrate_stopped(
    push: list[str], blank: str, database: str, tmp_path: Path
) -> None:
    asyncio.run(migrate(blank, only=4))
    assert f"Apply {len(ALL) - 4} migrations" in said(push, tmp_path)
    assert shape(blank) == shape(database)
    assert "up to date" in said(push, tmp_path)


def test_the_seed_is_a_user_with_a_project(push: list[str], blank: str, tmp_path: Path) -> None:
    said([*push, "--include-seed"], tmp_path)
    with connect(blank) as db:
        owners = db.execute("select count(*) from projects join auth.users u on u.id = owner_id").fetchone()
    assert owners == (1,)
