"""`migrate --check`, which `migrate` runs first: every problem at once, with its remedy, and nothing changed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.platform.migrations import (
    MIGRATIONS,
    MigrationError,
    MigrationRefused,
    bootstrap,
    check,
    migrate,
    read_migrations,
)
from tests.database.db import connect, one, user
from tests.database.products import everything, make

ALL = [migration.version for migration in read_migrations(MIGRATIONS)]
PROJECT = uuid.UUID("00000000-0000-4000-8000-0000000000a1")
OWNER = uuid.UUID("00000000-0000-4000-8000-000000000001")


def problems(dsn: str) -> list[str]:
    """What both ways say, and that neither changed anything."""
    before = everything(dsn)
    told = []
    for way in (check, migrate):
        with pytest.raises(MigrationRefused) as refused:
            asyncio.run(way(dsn))
        told.append(refused.value.problems)
        assert everything(dsn) == before
    assert told[0] == told[1]
    return told[0]


def execute(dsn: str, *statements: str) -> None:
    with connect(dsn) as db:
        for statement in statements:
            db.execute(statement.encode())


def test_where_nothing_is_in_the_way_a_check_says_what_would_be_applied(blank: str) -> None:
    before = everything(blank)
    assert asyncio.run(check(blank)) == ALL
    assert everything(blank) == before
    assert asyncio.run(migrate(blank)) == ALL
    assert asyncio.run(check(blank)) == []


def test_every_problem_is_said_at_once_with_a_remedy_that_works(blank: str) -> None:
    execute(
        blank,
        "create table public.projects (org int, id uuid, user_id uuid, primary key (org, id))",
        "create table public.project_files (project_id uuid, path text, content text)",
        "create table public.project_collaborators (a int)",
        "create view public.project_history as select 1 as one",
        "create function public.list_current_files(text) returns int language sql as 'select 1'",
        "create schema preview",
        "create function preview.owner_of(text) returns uuid language sql as 'select null::uuid'",
        "insert into storage.buckets (id, name, public) values ('project-assets', 'project-assets', true)",
        'create policy "members add assets" on storage.objects for insert to anon with check (false)',
    )
    told = problems(blank)
    beginnings = [
        "public.projects.id is not unique by itself: alter table public.projects add unique (id);",
        "preview.owner_of(text) is not what is asked: make it preview.owner_of(uuid) returning uuid",
        "public.project_files is there already, and is not altered: `preview-orchestrator migrate --adopt-files`",
        "public.project_collaborators is there already: say who may do what, with preview.may_access(",
        "public.project_history is there already",
        'the policy "members add assets" on storage.objects is there already',
        "list_current_files(text) is there already",
        "the bucket project-assets is public, and will hold the files of projects: update storage.buckets",
    ]
    assert len(told) == len(beginnings), told
    assert [line[: len(start)] for line, start in zip(told, beginnings, strict=True)] == beginnings
    execute(
        blank,
        "alter table public.projects add unique (id);",
        "drop function preview.owner_of(text)",
        "alter table public.project_files set schema preview",
        "create function preview.may_access(project uuid, who uuid, what text) returns boolean"
        " language sql as 'select true'",
        "alter view public.project_history rename to history",
        'alter policy "members add assets" on storage.objects rename to ours',
        "alter function public.list_current_files(text) rename to list_files",
        "update storage.buckets set public = false where id = 'project-assets';",
    )
    assert asyncio.run(check(blank)) == ALL
    assert asyncio.run(migrate(blank)) == ALL


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            "create table public.projects (name text primary key)",
            "public.projects has no column id: it must have one",
        ),
        (
            "create table public.projects (id text primary key)",
            "public.projects.id is text, and must be uuid: ",
        ),
        (
            "create view public.projects as select gen_random_uuid() as id",
            "public.projects is not a table, and ",
        ),
        (
            "create table public.projects (id uuid); create unique index on public.projects (id) where id is not null",
            "public.projects.id is not unique by itself: ",
        ),
        (
            "create schema preview; create table preview.project_files (body text)",
            "preview.project_files has no column project_id: ",
        ),
        (
            "create table public.mine (a int); create index project_files_project_id_idx on public.mine (a)",
            "the index public.project_files_project_id_idx is there already",
        ),
    ],
    ids=["no id", "text id", "view", "partly unique", "not files", "index"],
)
def test_a_strangers_shape_is_refused(blank: str, table: str, problem: str) -> None:
    execute(blank, table)
    assert problems(blank)[0].startswith(problem)


def test_a_plain_postgresql_is_told_of_bootstrap(postgres_dsn: str) -> None:
    name = f"preview_plain_{uuid.uuid4().hex[:8]}"
    execute(postgres_dsn, f"create database {name}")
    try:
        (problem,) = problems(make_conninfo(postgres_dsn, dbname=name))
    finally:
        execute(postgres_dsn, f"drop database {name} with (force)")
    assert problem.startswith("this is not Supabase's database, auth.users, realtime.messages,")
    assert problem.endswith("run `preview-orchestrator migrate --bootstrap`")


@pytest.fixture
def nobody(postgres_dsn: str) -> Iterator[str]:
    """A role that may do nothing. (It outlives `blank`, on which its privileges hang.)"""
    role = f"nobody_{uuid.uuid4().hex[:8]}"
    execute(postgres_dsn, f"create role {role} login")
    yield role
    execute(postgres_dsn, f"drop role {role}")


def test_a_role_without_rights_is_told_which_it_lacks(nobody: str, blank: str) -> None:
    make(blank, "user_id")
    execute(blank, f"grant select on public.projects to {nobody}")
    dsn = make_conninfo(blank, user=nobody)
    with pytest.raises(MigrationRefused) as refused:
        asyncio.run(check(dsn))
    assert len(refused.value.problems) == 3
    for schema, problem in zip(("auth", "realtime", "storage"), refused.value.problems, strict=True):
        assert problem.startswith(f"{nobody} may not use the schema {schema}: ")
        execute(blank, problem.partition(": ")[2])
    with pytest.raises(MigrationRefused) as refused:
        asyncio.run(check(dsn))
    told = "\n".join(refused.value.problems)
    for lack in (
        "may not refer to public.projects: grant references on public.projects to",
        "row level security hides public.projects from",
        "may not refer to auth.users: grant references on auth.users to",
        "may not make buckets: grant select, insert on storage.buckets to",
        "may not make a schema: grant create on database",
        "may not make anything in the schema public: grant create on schema public to",
    ):
        assert lack in told


def test_a_failure_that_no_check_foresaw_leaves_the_database_as_it_was(blank: str) -> None:
    make(blank, "user_id")
    execute(
        blank,
        "create function public.no_views() returns event_trigger language plpgsql as"
        " $$ begin if tg_tag = 'CREATE VIEW' then raise exception 'no views here'; end if; end $$",
        "create event trigger no_views on ddl_command_end execute function public.no_views()",
    )
    before = everything(blank)
    with pytest.raises(MigrationError, match="preview_sync: no views here"):
        asyncio.run(migrate(blank))
    assert everything(blank) == before
    execute(blank, "drop event trigger no_views")
    assert asyncio.run(migrate(blank)) == ALL


def test_a_products_own_migrations_in_the_same_history_are_nothing_to_us(blank: str) -> None:
    make(blank, "seed")
    execute(
        blank,
        "create schema supabase_migrations",
        "create table supabase_migrations.schema_migrations (version text primary key, statements text[], name text)",
        "insert into supabase_migrations.schema_migrations (version, name) values ('20250101000000', 'theirs'),"
        " ('20990101000000', 'also_theirs')",
    )
    assert asyncio.run(check(blank)) == ALL
    assert asyncio.run(migrate(blank)) == ALL
    execute(
        blank,
        "update supabase_migrations.schema_migrations set name = 'theirs' where version = '" + ALL[0] + "'",
    )
    with pytest.raises(MigrationError, match="which is not ours"):
        asyncio.run(migrate(blank))


def test_what_an_earlier_version_did_is_put_back_by_the_statements_that_are_said(blank: str) -> None:
    make(blank, "earlier")
    (problem,) = problems(blank)
    sentence, *statements = problem.splitlines()
    assert "a local state starts anew" in sentence
    execute(blank, *statements)
    with connect(blank) as db:
        columns = (
            "select attname from pg_attribute where attrelid = 'public.projects'::regclass and attnum > 0"
        )
        assert [name for (name,) in db.execute(columns.encode())] == ["id", "user_id", "name", "published"]
        assert one(db, "select count(*) from pg_trigger where tgname = 'give_head'") == 0
        assert one(db, "select count(*) from pg_policy where polrelid = 'public.projects'::regclass") == 0
        for role in ("anon", "authenticated", "service_role"):
            for right in ("select", "insert", "update", "delete"):
                assert one(db, "select has_table_privilege(%s, 'public.projects', %s)", [role, right])
    assert asyncio.run(migrate(blank)) == ALL
    with connect(blank) as db:
        kept: list[tuple[Any, ...]] = db.execute(
            "select right(id::text, 2), file_path, version, revision, content, is_current_version, is_deleted,"
            " right(parent_version_id::text, 2) from public.project_files order by revision"
        ).fetchall()
        assert kept == [
            ("f1", "src/a.ts", 1, 1, "one", False, False, None),
            ("f3", "b", 1, 2, "B", False, False, None),
            ("f2", "src/a.ts", 2, 3, "two", True, False, "f1"),
            ("f4", "b", 2, 4, None, True, True, "f3"),
        ]
        assert one(db, "select revision from public.project_heads") == 4
        assert one(db, "select count(*) from preview.legacy_rejects") == 0
        with user(db, OWNER):
            assert one(db, "select public.rename_project(%s, 'again')", [PROJECT]) == "again"
            answer = one(db, "select public.upsert_project_file(%s, 'src/a.ts', 'three')", [PROJECT])
            assert (answer["version"], answer["revision"]) == (3, 5)


def test_the_command_says_one_line_for_each_problem(blank: str) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "orchestrator_stub", "migrate", "--database-url", blank, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))

    execute(
        blank,
        "create table public.projects (id bigint primary key)",
        "create table public.project_files (project_id bigint, path text, content text)",
    )
    for arguments in (["--check"], []):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (1, "")
        lines = done.stderr.splitlines()
        assert [line[:64] for line in lines] == [
            "preview-orchestrator: public.projects.id is bigint, and must be ",
            "preview-orchestrator: public.project_files is there already, and",
        ]
    execute(blank, "drop table public.projects")
    done = run("--check", "--adopt-files")
    free = "".join(f"nothing is in the way of {version}\n" for version in ALL)
    assert (done.returncode, done.stdout) == (0, free), done.stderr
    assert run("--adopt-files").stdout == "".join(f"applied {version}\n" for version in ALL)
    assert run("--check").stdout == "nothing to apply\n"


def test_a_check_reads_alone(blank: str) -> None:
    """Its transaction is read-only: a check that wrote would fail here, not on somebody's product."""
    statements = [m.sql for m in read_migrations(MIGRATIONS) if "do $check$" in m.sql]
    assert statements, "no migration has a check"
    with psycopg.connect(blank) as db:
        db.execute("set transaction read only")
        end = statements[0].index("end $check$;") + len("end $check$;")
        db.execute(statements[0][statements[0].index("do $check$") : end].encode())


async def test_a_local_state_of_an_earlier_version_is_told_to_start_anew(tmp_path: Path) -> None:
    state, app = tmp_path / "state", tmp_path / "app"
    app.mkdir()
    (app / "package.json").write_text("{}")
    state.mkdir()
    async with EmbeddedPostgres(state / "postgres") as dsn:
        await bootstrap(dsn)
        make(dsn, "earlier")
    command = [
        sys.executable,
        "-m",
        "orchestrator_stub",
        "dev",
        str(app),
        "--state",
        str(state),
        "--port",
        "0",
    ]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("preview-orchestrator: ")]
    assert (
        line
        == f"preview-orchestrator: {state} is of a version before the first release: delete it, and start anew"
    )
