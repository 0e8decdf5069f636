"""`migrate` on the database of a product that is there: nothing of the product's is changed, and ours works on it."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.platform.migrations import MIGRATIONS, MigrationRefused, migrate, read_migrations
from orchestrator_stub.sessions.store import ProjectUnknown, SessionStore
from tests.database.db import acting_as, apply, changes_since, connect, files, one, upsert, user
from tests.database.products import dump, everything, make

Db = psycopg.Connection[Any]

OWNER = uuid.UUID("00000000-0000-4000-8000-000000000001")
STRANGER = uuid.UUID("00000000-0000-4000-8000-000000000002")
READER = uuid.UUID("00000000-0000-4000-8000-000000000003")
PROJECT = uuid.UUID("00000000-0000-4000-8000-0000000000a1")

MAY_ACCESS = (
    (MIGRATIONS.parent / "README.md")
    .read_text(encoding="utf-8")
    .partition("```pgsql\n")[2]
    .partition("```")[0]
)
"""What the document tells a product to say, word by word."""

SHAPES = {"seed": "", "user_id": "", "created_by": "", "members": MAY_ACCESS}
"""Each product that we can work with, and what it says to us before `migrate`."""

TABLE_RIGHTS = ("select", "insert", "update", "delete", "truncate", "references", "trigger")
COLUMN_RIGHTS = ("select", "insert", "update", "references")


def rights(db: Db, relations: Sequence[str]) -> dict[tuple[str, ...], bool]:
    """Each role's rights on each table and on each of its columns."""
    answer: dict[tuple[str, ...], bool] = {}
    for right in TABLE_RIGHTS:
        rows = db.execute(
            "select r.rolname, c.relname, has_table_privilege(r.oid, c.oid, %s) from pg_roles r, pg_class c"
            " where c.relnamespace = 'public'::regnamespace and c.relname = any(%s) and r.rolname <> 'preview_agent'",
            [right, list(relations)],
        ).fetchall()
        answer |= {(role, table, right): may for role, table, may in rows}
    for right in COLUMN_RIGHTS:
        rows = db.execute(
            "select r.rolname, c.relname, a.attname, has_column_privilege(r.oid, c.oid, a.attnum, %s)"
            " from pg_roles r, pg_class c join pg_attribute a on a.attrelid = c.oid and a.attnum > 0"
            " where c.relnamespace = 'public'::regnamespace and c.relname = any(%s) and r.rolname <> 'preview_agent'",
            [right, list(relations)],
        ).fetchall()
        answer |= {(role, table, column, right): may for role, table, column, may in rows}
    return answer


def functions(db: Db, names: Sequence[str] | None = None) -> dict[str, str]:
    """The functions of `public`, or those of these names: definition, owner and grants."""
    rows = db.execute(
        "select proname, pg_get_functiondef(oid) || proowner || coalesce(proacl::text, '') from pg_proc"
        " where pronamespace = 'public'::regnamespace and prokind = 'f'"
    ).fetchall()
    return {name: text for name, text in rows if names is None or name in names}


def rename(db: Db, name: str) -> Any:
    with user(db, OWNER):
        return one(db, "select public.rename_project(%s, %s)", [PROJECT, name])


@pytest.mark.parametrize("name", SHAPES)
def test_nothing_of_the_products_is_changed(blank: str, name: str) -> None:
    relations = make(blank, name)
    before = dump(blank, relations)
    with connect(blank) as db:
        db.execute(SHAPES[name].encode())
        could, did = rights(db, relations), functions(db)
        assert rename(db, "before") == "before"
        published = one(db, "select count(*) from pg_policies where schemaname = 'public'")
    assert asyncio.run(migrate(blank)) == [migration.version for migration in read_migrations(MIGRATIONS)]
    assert dump(blank, relations) == before
    with connect(blank) as db:
        assert rights(db, relations) == could
        assert functions(db, list(did)) == did
        assert rename(db, "after") == "after"
        assert published == one(
            db,
            "select count(*) from pg_policies where schemaname = 'public' and tablename = any(%s)",
            [relations],
        )
    with connect(blank) as db:
        db.execute("select public.upsert_project_file(%s, 'a', 'x')", [PROJECT])
        assert rename(db, "with files") == "with files"
    assert dump(blank, relations) == before


@pytest.mark.parametrize("name", SHAPES)
def test_our_rpcs_work_for_the_owner_and_strangers_are_told_nothing(blank: str, name: str) -> None:
    make(blank, name)
    with connect(blank) as db:
        db.execute(SHAPES[name].encode())
    asyncio.run(migrate(blank))
    asset = f"{PROJECT}/{'a' * 64}"
    with connect(blank) as db:
        with user(db, OWNER):
            assert changes_since(db, PROJECT, "none", 0)["reason"] == "epoch"
            assert one(db, "select create_project_snapshot(%s)", [PROJECT])["state"] == "requested"
            assert upsert(db, PROJECT, "src/a.ts", "one")["revision"] == 1
            answer = apply(
                db, PROJECT, [{"file_path": "b", "content": "B"}, {"file_path": "c", "content": "C"}]
            )
            assert (answer["revision"], answer["changed"]) == (2, 2)
            one(db, "select delete_project_file(%s, 'c')", [PROJECT])
            one(db, "select restore_project_file(%s, 'b', 1)", [PROJECT])
            assert [row[0] for row in db.execute("select * from list_current_files(%s)", [PROJECT])] == [
                "b",
                "src/a.ts",
            ]
            assert changes_since(db, PROJECT, answer["epoch"], 2)["kind"] == "changes"
            assert one(db, "select count(*) from project_history") == 4
            assert one(db, "select count(*) from project_heads") == 1
            assert one(db, "select count(*) from project_snapshots") == 1
            db.execute("insert into storage.objects (bucket_id, name) values ('project-assets', %s)", [asset])
            assert one(db, "select count(*) from storage.objects") == 1
            db.execute("select set_config('realtime.topic', %s, true)", [f"project:{PROJECT}"])
            assert one(db, "select count(*) from realtime.messages") == 3
        with acting_as(db, "service_role"):
            assert upsert(db, PROJECT, "by/the/service", "x")["revision"] == 4
            assert one(db, "select create_project_snapshot(%s)", [PROJECT])["state"] == "requested"
        assert one(db, "select count(*) from project_files where created_by = %s", [OWNER]) >= 4
        tree = files(db, PROJECT)
        with user(db, STRANGER):
            for table in ("project_files", "project_heads", "project_history", "project_snapshots"):
                assert one(db, f"select count(*) from public.{table}") == 0
            assert one(db, "select count(*) from storage.objects") == 0
            assert db.execute("select * from list_current_files(%s)", [PROJECT]).fetchall() == []
            db.execute("select set_config('realtime.topic', %s, true)", [f"project:{PROJECT}"])
            assert one(db, "select count(*) from realtime.messages") == 0
        for rpc in (
            "upsert_project_file('{id}', 'src/a.ts', 'mine')",
            "delete_project_file('{id}', 'src/a.ts')",
            "apply_project_files('{id}', '[]')",
            "restore_project_file('{id}', 'src/a.ts', 1)",
            "create_project_snapshot('{id}')",
            "changes_since('{id}', 'none', 0)",
        ):
            told = []
            for project in (PROJECT, uuid.uuid4()):
                with pytest.raises(psycopg.Error) as error, user(db, STRANGER):
                    db.execute(f"select public.{rpc.format(id=project)}".encode())
                assert error.value.sqlstate == "PT404", rpc
                told.append(str(error.value.diag.message_primary).replace(str(project), "id"))
            assert told[0] == told[1]
        for role in ("anon", "preview_agent"):
            with pytest.raises(InsufficientPrivilege), acting_as(db, role, sub=OWNER):
                upsert(db, PROJECT, "src/a.ts", "x")
        assert files(db, PROJECT) == tree


def test_a_products_own_word_tells_readers_from_writers(blank: str) -> None:
    make(blank, "members")
    with connect(blank) as db:
        db.execute(MAY_ACCESS.encode())
    asyncio.run(migrate(blank))
    with connect(blank) as db:
        upsert(db, PROJECT, "a", "x")
        with user(db, READER):
            assert one(db, "select count(*) from project_files") == 1
            assert one(db, "select create_project_snapshot(%s)", [PROJECT])["state"] == "requested"
        with pytest.raises(psycopg.Error) as error, user(db, READER):
            upsert(db, PROJECT, "a", "y")
        assert error.value.sqlstate == "PT404"
        with pytest.raises(InsufficientPrivilege), user(db, READER):
            db.execute(
                "insert into storage.objects (bucket_id, name) values ('project-assets', %s)",
                [f"{PROJECT}/{'a' * 64}"],
            )


def test_without_an_owner_and_without_a_word_only_the_service_comes_in(blank: str) -> None:
    make(blank, "members")
    asyncio.run(migrate(blank))
    with connect(blank) as db:
        with acting_as(db, "service_role"):
            assert upsert(db, PROJECT, "a", "x")["revision"] == 1
        assert one(db, "select created_by from project_files") is None
        for somebody in (OWNER, STRANGER):
            with pytest.raises(psycopg.Error) as error, user(db, somebody):
                upsert(db, PROJECT, "a", "y")
            assert error.value.sqlstate == "PT404"
            with user(db, somebody):
                assert one(db, "select count(*) from project_files") == 0


def test_numbered_projects_are_refused_and_nothing_is_changed(blank: str) -> None:
    relations = make(blank, "bigint")
    before = everything(blank)
    with pytest.raises(MigrationRefused) as refused:
        asyncio.run(migrate(blank))
    assert refused.value.problems == [
        "public.projects.id is bigint, and must be uuid: "
        "preview-sync names projects by uuid in tokens, topics and paths"
    ]
    assert everything(blank) == before
    assert relations == ["projects"]


@pytest.mark.parametrize("name", SHAPES)
async def test_the_orchestrator_opens_a_project_that_was_made_after_us(blank: str, name: str) -> None:
    """No trigger tells us of it: its head is made by the first session."""
    make(blank, name)
    columns = {"seed": "owner_id, name", "user_id": "user_id, name", "created_by": "created_by, title"}
    with connect(blank) as db:
        db.execute(SHAPES[name].encode())
    await migrate(blank)
    project = uuid.uuid4()
    with connect(blank) as db:
        if name == "members":
            db.execute("insert into public.projects (id) values (%s)", [project])
            db.execute("insert into public.members values (%s, %s, 'editor')", [project, OWNER])
        else:
            new = f"insert into public.projects (id, {columns[name]}) values (%s, %s, 'new')"
            db.execute(new.encode(), [project, OWNER])
    async with pool_of(blank) as pool:
        store = SessionStore(pool)
        assert await store.may({"role": "authenticated", "sub": str(OWNER)}, project, "read")
        assert not await store.may({"role": "authenticated", "sub": str(STRANGER)}, project, "read")
        session, is_new = await store.create(project, key="k", generation=1, ttl=60)
        assert is_new
        assert (await store.create(project, key="k", generation=1, ttl=60))[0].id == session.id
        found = await store.standing(session.id)
        assert found is not None
        assert found[1].revision == 0
        with pytest.raises(ProjectUnknown):
            await store.create(uuid.uuid4(), key=None, generation=1, ttl=60)
    with connect(blank) as db:
        db.execute("delete from public.projects where id = %s", [project])
        assert one(db, "select count(*) from preview.sessions") == 0
        assert one(db, "select project_id from preview.deleted_projects") == project
