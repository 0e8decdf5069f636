"""The migrations: from nothing, from halfway, from an older product's tables; and the runner's refusals."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from orchestrator_stub.platform.migrations import (
    MIGRATIONS,
    MigrationError,
    MigrationRefused,
    bootstrap,
    migrate,
    read_migrations,
)
from tests.database.db import (
    acting_as,
    changes_since,
    connect,
    files,
    head,
    make_project,
    messages,
    one,
    shape,
    upsert,
    user,
)
from tests.database.products import make

Db = psycopg.Connection[Any]


LEGACY = """
create table public.user_profiles (id uuid primary key references auth.users (id) on delete cascade,
  created_at timestamptz not null default now());
create table public.projects (id uuid primary key default gen_random_uuid(),
  {owner} uuid not null references public.user_profiles (id) on delete cascade,
  name text not null default 'untitled', created_at timestamptz not null default now());
insert into auth.users (id) values ('00000000-0000-4000-8000-000000000001'), ('00000000-0000-4000-8000-000000000002');
insert into public.user_profiles (id) select id from auth.users;
insert into public.projects (id, {owner}, name) values
  ('00000000-0000-4000-8000-0000000000a1', '00000000-0000-4000-8000-000000000001', 'one'),
  ('00000000-0000-4000-8000-0000000000a2', '00000000-0000-4000-8000-000000000001', 'empty');
create table public.project_files (id serial primary key, project_id {reference}, {path} text, {content} text,
  {kind} text, created_by uuid, updated_at timestamptz default '2026-01-01');
create index project_files_project_id_idx on public.project_files (project_id);
alter table public.project_files enable row level security;
create policy "anybody" on public.project_files for all using (true);
insert into public.project_files (project_id, {path}, {content}, {kind}, created_by) values
  ('00000000-0000-4000-8000-0000000000a1', 'src/App.tsx', 'app', 'typescript', '00000000-0000-4000-8000-000000000002'),
  ('00000000-0000-4000-8000-0000000000a1', '/index.html', '<html>', null, null),
  ('00000000-0000-4000-8000-0000000000a1', './a\\b.css', 'a {{}}', 'css', null),
  ('00000000-0000-4000-8000-0000000000a1', '../../etc/passwd', 'root', 'text', null),
  ('00000000-0000-4000-8000-0000000000a1', 'node_modules/x.js', 'x', 'javascript', null),
  ('00000000-0000-4000-8000-0000000000a1', 'nothing', null, 'text', null),
  ('00000000-0000-4000-8000-0000000000a1', 'src', 'a file where a directory is', 'text', null),
  ('00000000-0000-4000-8000-0000000000a1', 'twice', 'older', 'text', null);
insert into public.project_files (project_id, {path}, {content}, {kind}, updated_at) values
  ('00000000-0000-4000-8000-0000000000a1', '/twice', 'newer', 'text', '2026-02-02');
"""
ONE = uuid.UUID("00000000-0000-4000-8000-0000000000a1")
VARIANTS = {
    "path, content, type": {"owner": "owner_id", "path": "path", "content": "content", "kind": "type"},
    "file_path, content, file_type": {
        "owner": "user_id",
        "path": "file_path",
        "content": "content",
        "kind": "file_type",
    },
    "name, code, language": {"owner": "user_id", "path": "name", "content": "code", "kind": "language"},
}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("reference", ["uuid references public.projects (id)", "text"], ids=["uuid", "text"])
def test_legacy_rows_become_version_one_of_the_same_schema(
    blank: str, variant: dict[str, str], reference: str
) -> None:
    with connect(blank) as db:
        db.execute(LEGACY.format(reference=reference, **variant).encode())
    with pytest.raises(MigrationRefused) as refused:
        asyncio.run(migrate(blank))
    (problem,) = refused.value.problems
    assert "--adopt-files" in problem
    assert "alter table public.project_files set schema preview;" in problem
    applied = asyncio.run(migrate(blank, adopt_files=True))
    assert applied == [migration.version for migration in read_migrations(MIGRATIONS)]
    with connect(blank) as db:
        assert one(db, "select count(*) from preview.project_files") == 9
        rows = db.execute(
            "select file_path, file_type, content, version, revision, created_by::text, updated_at::date::text"
            " from project_files_current where project_id = %s order by file_path",
            [ONE],
        ).fetchall()
        owner, other = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"
        assert rows == [
            ("a/b.css", "css", "a {}", 1, 1, owner, "2026-01-01"),
            ("index.html", "html", "<html>", 1, 1, owner, "2026-01-01"),
            ("src/App.tsx", "typescript", "app", 1, 1, other, "2026-01-01"),
            ("twice", "text", "newer", 1, 1, owner, "2026-02-02"),
        ]
        rejects = db.execute("select reason from preview.legacy_rejects order by reason").fetchall()
        assert [reason for (reason,) in rejects] == [
            "a file of that name would be a directory of another",
            "a newer row has the same path",
            "it has no content",
            "its path cannot be used: dot_segment",
            "its path cannot be used: protected",
        ]
        heads = db.execute("select revision from project_heads order by revision").fetchall()
        assert heads == [(1,)]  # the empty project's is made when it is first needed
        epoch, _ = head(db, ONE)
        assert len(changes_since(db, ONE, epoch, 0)["changes"]) == 4
        assert upsert(db, ONE, "twice", "newest")["version"] == 2
        assert len(files(db, ONE)) == 4


def test_the_designs_own_table_is_adopted_with_all_of_its_history(blank: str, database: str) -> None:
    make(blank, "seed_files")
    assert asyncio.run(migrate(blank, adopt_files=True)) == [m.version for m in read_migrations(MIGRATIONS)]
    with connect(blank) as db:
        rows = db.execute(
            "select right(id::text, 2), file_path, version, content, is_current_version, is_deleted, revision,"
            " right(parent_version_id::text, 2), right(created_by::text, 1), size_bytes from public.project_files"
            " where id::text like '00000000%' order by revision"
        ).fetchall()
        assert rows == [
            ("b1", "src/a.ts", 1, "one", False, False, 1, None, "1", 3),
            ("b3", "gone", 1, "was", False, False, 2, None, "1", 3),
            ("b2", "src/a.ts", 2, "two", True, False, 3, "b1", "2", 3),
            ("b4", "gone", 2, None, True, True, 4, "b3", "1", 0),
            ("b5", "unmarked", 3, "was", False, False, 5, None, "1", 3),
            ("b6", "rolled/back", 1, "good", False, False, 6, None, "1", 4),
            ("b7", "rolled/back", 2, "bad", False, False, 7, "b6", "1", 3),
            ("b8", "logo.png", 1, None, True, False, 8, None, "1", 7),
        ]
        # One version more says which is current, where the last of a path was not.
        added = db.execute(
            "select file_path, version, content, is_deleted from public.project_files"
            " where id::text not like '00000000%' order by file_path"
        ).fetchall()
        assert added == [("rolled/back", 3, "good", False), ("unmarked", 4, None, True)]
        assert [
            path for (path,) in db.execute("select file_path from public.project_files_current order by 1")
        ] == [
            "logo.png",
            "rolled/back",
            "src/a.ts",
        ]
        assert db.execute("select reason, legacy ->> 'file_path' from preview.legacy_rejects").fetchall() == [
            ("its bytes are not in project-assets", "lost.png")
        ]
        assert one(db, "select count(*) from preview.project_files") == 9
        for path, version in {
            "src/a.ts": 3,
            "gone": 3,
            "unmarked": 5,
            "rolled/back": 4,
            "logo.png": 2,
        }.items():
            assert upsert(db, ONE, path, "later")["version"] == version
        wrong = "select file_path from project_files"
        wrong += " where content_hash <> encode(sha256(convert_to(content, 'UTF8')), 'hex')"
        assert db.execute(wrong.encode()).fetchall() == []
        columns = "select attname, format_type(atttypid, atttypmod), attnotnull from pg_attribute"
        columns += " where attrelid = 'public.project_files'::regclass and attnum > 0 order by attnum"
        here = db.execute(columns.encode()).fetchall()
    with connect(database) as db:
        assert db.execute(columns.encode()).fetchall() == here


def test_each_step_alone_ends_where_all_at_once_do(blank: str, database: str) -> None:
    for migration in read_migrations(MIGRATIONS):
        assert asyncio.run(migrate(blank, only=1)) == [migration.version]
    assert asyncio.run(migrate(blank)) == []
    assert shape(blank) == shape(database)


def test_two_that_start_together_apply_each_once(blank: str) -> None:
    async def both() -> list[list[str]]:
        return list(await asyncio.gather(migrate(blank), migrate(blank)))

    first, second = sorted(asyncio.run(both()), key=len)
    assert first == []
    assert second == [migration.version for migration in read_migrations(MIGRATIONS)]


def test_applied_migrations_are_recorded_as_the_cli_does(database: str) -> None:
    with connect(database) as db:
        rows = db.execute(
            "select version, name from supabase_migrations.schema_migrations order by version"
        ).fetchall()
    assert rows == [(m.version, m.name) for m in read_migrations(MIGRATIONS)]


def test_a_failing_migration_leaves_nothing(blank: str, tmp_path: Path) -> None:
    (tmp_path / "20260101000000_fine.sql").write_text("create table public.fine (id int primary key);")
    (tmp_path / "20260102000000_broken.sql").write_text("create table public.half (id int); select 1/0;")
    with pytest.raises(MigrationError, match="20260102000000_broken: division by zero"):
        asyncio.run(migrate(blank, tmp_path))
    with connect(blank) as db:
        for made in ("public.fine", "public.half", "supabase_migrations.schema_migrations"):
            assert one(db, "select to_regclass(%s)", [made]) is None
    (tmp_path / "20260102000000_broken.sql").write_text("create table public.half (id int);")
    assert asyncio.run(migrate(blank, tmp_path)) == ["20260101000000", "20260102000000"]


def test_names_and_order_are_checked(blank: str, tmp_path: Path) -> None:
    with pytest.raises(MigrationError, match="no migrations in"):
        asyncio.run(migrate(blank, tmp_path))
    (tmp_path / "2026_short.sql").write_text("")
    with pytest.raises(MigrationError, match="the name must be"):
        asyncio.run(migrate(blank, tmp_path))
    (tmp_path / "2026_short.sql").rename(tmp_path / "20260301000000_a.sql")
    (tmp_path / "20260301000000_b.sql").write_text("")
    with pytest.raises(MigrationError, match="used twice"):
        asyncio.run(migrate(blank, tmp_path))
    (tmp_path / "20260301000000_b.sql").unlink()
    assert asyncio.run(migrate(blank, tmp_path)) == ["20260301000000"]
    (tmp_path / "20260201000000_late.sql").write_text("")
    with pytest.raises(MigrationError, match="only go forward"):
        asyncio.run(migrate(blank, tmp_path))


def test_the_stand_in_for_supabase_can_be_laid_again(database: str) -> None:
    before = shape(database)
    assert asyncio.run(bootstrap(database))
    assert shape(database) == before


def test_supabases_own_database_is_left_alone(blank: str) -> None:
    with connect(blank) as db:
        db.execute("create role supabase_admin")
        try:
            assert asyncio.run(bootstrap(blank)) is False
        finally:
            db.execute("drop role supabase_admin")


PLATFORM_ROLES = "anon, authenticated, service_role, preview_agent, authenticator, supabase_realtime_admin"


@pytest.fixture
def hosted_role(postgres_dsn: str, template_database: str) -> Iterator[str]:
    """A role like the hosted service's `postgres`. (It outlives `blank`, on which its privileges hang.)"""
    role = f"hosted_{uuid.uuid4().hex[:8]}"
    with connect(postgres_dsn) as server:
        server.execute(f"create role {role} login createrole bypassrls".encode())
        server.execute(f"grant {PLATFORM_ROLES} to {role} with admin option".encode())
        yield role
        server.execute(f"revoke {PLATFORM_ROLES} from {role} cascade".encode())
        server.execute(f"drop role {role}".encode())


@pytest.fixture
def hosted(hosted_role: str, blank: str) -> str:
    """`blank`, seen by one who is no superuser, and to whom the platform's tables do not belong.

    Policies on them it may make all the same (there by an extension of the server, here as a member of the owners).
    """
    with connect(blank) as db:
        db.execute(
            f"""
            grant create on database {db.info.dbname} to {hosted_role};
            grant all on schema public to {hosted_role};
            grant usage on schema auth, storage to {hosted_role};
            grant usage on schema realtime to {hosted_role} with grant option;
            grant all on auth.users, storage.buckets to {hosted_role};
            alter table storage.objects owner to {hosted_role};
            grant all on realtime.messages to {hosted_role} with grant option;
            alter default privileges for role {hosted_role} in schema public
              grant all on tables to anon, authenticated, service_role;
            alter default privileges for role {hosted_role} in schema public
              grant all on functions to anon, authenticated, service_role;
            """.encode()
        )
    return make_conninfo(blank, user=hosted_role)


def test_no_superuser_is_needed(hosted: str, blank: str) -> None:
    assert len(asyncio.run(migrate(hosted))) == len(read_migrations(MIGRATIONS))
    with connect(blank) as db:
        project = make_project(db)
        with user(db, project.owner):
            assert upsert(db, project.id, "a", "x")["revision"] == 1
        assert len(messages(db, project.id)) == 1
        with pytest.raises(psycopg.Error) as error, user(db, project.stranger):
            upsert(db, project.id, "a", "y")
        assert error.value.sqlstate == "PT404"
        with acting_as(db, "preview_agent", project_id=project.id):
            db.execute("select set_config('realtime.topic', %s, true)", [f"project:{project.id}"])
            assert one(db, "select count(*) from realtime.messages") == 1
        with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(db, "anon"):
            db.execute("select * from public.projects")


def test_the_layout_is_the_clis() -> None:
    config = tomllib.loads((MIGRATIONS.parent / "config.toml").read_text())
    assert config["api"]["schemas"] == ["public"]
    assert [(MIGRATIONS.parent / path).is_file() for path in config["db"]["seed"]["sql_paths"]] == [True]
    assert all(re.fullmatch(r"\d{14}_\w+\.sql", path.name) for path in MIGRATIONS.iterdir())


def test_the_seed_is_a_project_that_can_be_shown_twice(database: str) -> None:
    seed = (MIGRATIONS.parent / "seed.sql").read_bytes()
    with connect(database) as db:
        db.execute(seed)
        db.execute(seed)
        assert len(files(db, ONE)) == 3


@pytest.mark.parametrize(
    "work", ["select count(*) from public.project_files", "update public.projects set name = 'x'"]
)
def test_a_live_table_is_not_waited_for_for_ever(blank: str, work: str) -> None:
    """A long transaction on a table of the product's: the migration gives up, changes nothing, and can be run again."""
    with connect(blank) as db:
        db.execute(LEGACY.format(reference="text", **VARIANTS["path, content, type"]).encode())
        with db.transaction():
            db.execute(work.encode())
            with pytest.raises(MigrationError, match="canceling statement due to lock timeout"):
                asyncio.run(migrate(blank, adopt_files=True))
        assert one(db, "select to_regnamespace('preview')") is None
        assert one(db, "select count(*) from public.project_files") == 9
    assert len(asyncio.run(migrate(blank, adopt_files=True))) == len(read_migrations(MIGRATIONS))


DEBIAN = Path("/usr/lib/postgresql")


@pytest.mark.skipif(
    not shutil.which("runuser") or not list(DEBIAN.glob("*/bin/initdb")) or os.geteuid() != 0,
    reason="needs Debian's PostgreSQL and root",
)
@pytest.mark.nightly
def test_a_stock_postgresql_does_as_well() -> None:
    """The same tests on the distribution's server, by PREVIEW_TEST_DATABASE_URL."""
    binaries = sorted(DEBIAN.glob("*/bin"))[-1]
    data = Path(f"/tmp/preview-stock-{uuid.uuid4().hex[:8]}")
    data.mkdir()
    shutil.chown(data, "postgres", "postgres")

    def run(*command: str | Path) -> None:
        subprocess.run(
            ["runuser", "-u", "postgres", "--", *command], check=True, capture_output=True, cwd="/"
        )

    try:
        cluster: list[str | Path] = ["-D", data / "d"]
        run(
            binaries / "initdb",
            *cluster,
            "-U",
            "postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
        )
        options = f"-k {data} -c listen_addresses= -F"
        run(binaries / "pg_ctl", *cluster, "-w", "-l", data / "log", "-o", options, "start")
        try:
            url = f"postgresql://postgres@/postgres?host={data}"
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-q", "-m", "not nightly", "tests/database"],
                cwd=MIGRATIONS.parents[1],
                env=os.environ | {"PREVIEW_TEST_DATABASE_URL": url},
                check=False,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stdout[-3000:]
        finally:
            run(binaries / "pg_ctl", *cluster, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(data)
