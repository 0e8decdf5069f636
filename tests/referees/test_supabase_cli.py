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

from orchestrator_stub.platform.migrations import MIGRATIONS, migrate, read_migrations
from tests.database.db import connect, shape
from tests.database.products import dump, everything, make
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


def run(command: list[str], home: Path) -> tuple[int, str]:
    environ = {"PATH": os.environ["PATH"], "HOME": str(home), "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        command, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout + done.stderr


def said(command: list[str], home: Path) -> str:
    code, answer = run(command, home)
    assert code == 0, answer
    return answer


def refused(command: list[str], home: Path) -> str:
    code, answer = run(command, home)
    assert code != 0, answer
    return answer


def history(dsn: str) -> list[tuple[str, str]]:
    with connect(dsn) as db:
        query = "select version, name from supabase_migrations.schema_migrations order by version"
        return db.execute(query).fetchall()


def applying(count: int) -> str:
    return f"Apply {count} migration{'s' if count > 1 else ''}"


def test_db_push_makes_what_our_migrate_makes(
    push: list[str], blank: str, database: str, tmp_path: Path
) -> None:
    assert applying(len(ALL)) in said(push, tmp_path)
    assert shape(blank) == shape(database)
    assert history(blank) == history(database)
    assert asyncio.run(migrate(blank)) == []


def test_db_push_goes_on_where_our_migrate_stopped(push: list[str], blank: str, tmp_path: Path) -> None:
    asyncio.run(migrate(blank))
    assert "up to date" in said(push, tmp_path)
    later = tmp_path / "checkout" / "supabase" / "migrations" / "20990101000000_later.sql"
    later.write_text("create table preview.later (id uuid primary key);")
    assert applying(1) in said(push, tmp_path)
    assert asyncio.run(migrate(blank, later.parent)) == []


def test_db_push_onto_a_product_that_is_refused_changes_nothing(
    push: list[str], blank: str, tmp_path: Path
) -> None:
    """The check is the migration's first statement, so the CLI says what our `migrate` says."""
    make(blank, "bigint")
    before = everything(blank, "supabase_migrations")  # which the CLI makes before it begins
    answer = refused(push, tmp_path)
    assert "public.projects.id is bigint, and must be uuid" in answer
    assert everything(blank, "supabase_migrations") == before


def test_db_push_onto_a_product_leaves_its_tables_alone(push: list[str], blank: str, tmp_path: Path) -> None:
    relations = make(blank, "user_id")
    before = dump(blank, relations)
    said(push, tmp_path)
    assert dump(blank, relations) == before


def test_the_seed_is_a_user_with_a_project(push: list[str], blank: str, tmp_path: Path) -> None:
    said([*push, "--include-seed"], tmp_path)
    with connect(blank) as db:
        owners = db.execute("select count(*) from projects join auth.users u on u.id = owner_id").fetchone()
    assert owners == (1,)
