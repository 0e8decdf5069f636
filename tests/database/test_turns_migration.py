"""The migration of turns onto a database in use: nothing in it changes, and callers by name and position go on."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import psycopg
import pytest

from orchestrator_stub.platform.migrations import MIGRATIONS, MigrationError, migrate, read_migrations
from tests.database.db import Project, begin, connect, end, files, head, make_project, messages, one, user

Db = psycopg.Connection[Any]

ALL = [migration.version for migration in read_migrations(MIGRATIONS)]
BEFORE = ALL.index("20261201000000")


def in_use(dsn: str) -> Project:
    """The schema before turns, with two files, an answer, a role of the product's and a function of it that saves."""
    asyncio.run(migrate(dsn, only=BEFORE))
    with connect(dsn) as db:
        project = make_project(db)
        with user(db, project.owner):
            one(db, "select upsert_project_file(%s, 'a', '1', null, null, 'save-1')", [project.id])
            one(db, "select delete_project_file(%s, 'a')", [project.id])
            changes = [{"file_path": "b", "content": "2"}]
            one(db, "select apply_project_files(%s, %s::jsonb)", [project.id, json.dumps(changes)])
        db.execute("update preview.settings set writes_per_minute = 77")
        db.execute(
            "create function public.save(project uuid, path text) returns jsonb language sql as"
            " $$ select public.upsert_project_file(project, path, 'by the product', expected_version => 0) $$"
        )
    return project


def rows(db: Db) -> list[Any]:
    return [
        db.execute(query.encode()).fetchall()
        for query in (
            "select to_jsonb(f) - '{renamed_from,origin,contributors,session_id,splices}'::text[]"
            " from public.project_files f order by revision",
            "select project_id, epoch, revision, pruned_revision, window_start, window_writes, updated_at"
            " from public.project_heads",
            "select * from realtime.messages order by inserted_at",
            "select project_id, correlation_id, answer, created_at from preview.answers",
            "select writes_per_minute, broadcast_limit_bytes, max_file_bytes from preview.settings",
        )
    ]


def test_a_database_in_use_keeps_all_it_has(blank: str) -> None:
    project = in_use(blank)
    with connect(blank) as db:
        before = rows(db)
        assert asyncio.run(migrate(blank)) == ALL[BEFORE:]
        assert rows(db) == before
        with user(db, project.owner):
            again = one(db, "select upsert_project_file(%s, 'a', '1', null, null, 'save-1')", [project.id])
        assert again["revision"] == 1, "an answer from before is given again"
        assert one(db, "select public.save(%s, 'c')", [project.id])["version"] == 1
        turn = begin(db, project.id)
        one(db, "select upsert_project_file(%s, 'd', 'x', p_turn_id => %s)", [project.id, turn])
        assert (
            end(db, project.id, turn)["revision"]
            == head(db, project.id)[1]
            == len(messages(db, project.id))
            == 5
        )
        assert set(files(db, project.id)) == {"b", "c", "d"}


def test_whoever_was_granted_an_rpc_keeps_it(blank: str) -> None:
    in_use(blank)
    with connect(blank) as db, db.transaction(force_rollback=True):
        db.execute("create role editor_bot")
        db.execute(
            "grant execute on function public.upsert_project_file to editor_bot with grant option;"
            "revoke execute on function public.delete_project_file from service_role"
        )
        granted = "select has_function_privilege('{}', oid, '{}') from pg_proc where proname = '{}'"
        db.execute(read_migrations(MIGRATIONS)[BEFORE].sql.encode())
        for role, right, name, expected in (
            ("editor_bot", "execute with grant option", "upsert_project_file", True),
            ("editor_bot", "execute", "apply_project_files", False),
            ("authenticated", "execute", "upsert_project_file", True),
            ("service_role", "execute", "delete_project_file", False),
            ("anon", "execute", "list_current_files", False),
        ):
            assert one(db, granted.format(role, right, name)) is expected, (role, name)


def test_a_view_of_the_products_on_an_rpc_is_not_dropped_with_it(blank: str) -> None:
    project = in_use(blank)
    with connect(blank) as db:
        db.execute(
            f"create view public.mine as select * from public.list_current_files('{project.id}')".encode()
        )
        before = rows(db)
        with pytest.raises(MigrationError, match="other objects depend on it"):
            asyncio.run(migrate(blank))
        assert rows(db) == before
        assert one(db, "select count(*) from public.mine") == 1
        assert one(db, "select to_regclass('preview.turns')") is None


def test_a_transaction_that_reads_messages_is_not_waited_for_for_ever(blank: str) -> None:
    in_use(blank)
    with connect(blank) as reader, reader.transaction():
        reader.execute("select count(*) from realtime.messages")
        with pytest.raises(MigrationError, match="canceling statement due to lock timeout"):
            asyncio.run(migrate(blank))
    assert asyncio.run(migrate(blank)) == ALL[BEFORE:]
