"""A deleted project's id stays known and is not used again, however the project went."""

from __future__ import annotations

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from tests.database.db import Project, acting_as, connect, make_user, one, upsert, user

Db = psycopg.Connection[Any]


def gone(db: Db) -> list[uuid.UUID]:
    rows = db.execute("select project_id from preview.deleted_projects where cleaned_at is null").fetchall()
    return [project for (project,) in rows]


@pytest.mark.parametrize(
    "way",
    [
        "delete from public.projects",
        "delete from auth.users",
        "truncate public.projects cascade",
        "delete from public.project_heads",
    ],
)
def test_a_deletion_is_remembered_whichever_way_it_came(db: Db, project: Project, way: str) -> None:
    upsert(db, project.id, "a", "x")
    db.execute(way.encode())
    assert gone(db) == [project.id]
    assert one(db, "select count(*) from public.project_files") == 0


def test_a_deletion_that_is_rolled_back_is_not_remembered(db: Db, project: Project) -> None:
    with db.transaction(force_rollback=True):
        db.execute("delete from public.projects")
    assert gone(db) == []
    assert upsert(db, project.id, "a", "x")["revision"] == 1


def test_nobody_uses_the_id_again(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "x")
    db.execute("delete from public.projects")
    other = make_user(db)
    with (
        pytest.raises(InsufficientPrivilege),
        user(db, other),
    ):  # where the table is ours, nobody chooses an id
        db.execute("insert into public.projects (id, owner_id) values (%s, %s)", [project.id, other])
    db.execute("insert into public.projects (id, owner_id) values (%s, %s)", [project.id, other])
    assert one(db, "select count(*) from public.project_heads") == 0
    for statement, code in {
        "select public.upsert_project_file(%s, 'a', 'y')": "PT410",
        "select public.apply_project_files(%s, '[]')": "PT410",
        "select public.create_project_snapshot(%s)": "PT410",
        "select public.changes_since(%s, 'x', 0)": "PT404",
    }.items():
        with pytest.raises(psycopg.Error) as error, user(db, other):
            db.execute(statement.encode(), [project.id])
        assert error.value.sqlstate == code
        with pytest.raises(psycopg.Error) as error, acting_as(db, "service_role"):
            db.execute(statement.encode(), [project.id])
        assert error.value.sqlstate == code
        with pytest.raises(psycopg.Error) as error, user(db, project.owner):
            db.execute(statement.encode(), [project.id])
        assert error.value.sqlstate == "PT404"
    with user(db, other):
        assert db.execute("select preview.my_projects()").fetchall() == []


def test_a_writer_and_the_deletion_of_its_project_do_not_wait_for_each_other_in_a_circle(
    db: Db, database: str, project: Project
) -> None:
    """The deletion comes while a writer holds the head and has yet to insert."""
    upsert(db, project.id, "a", "1")
    with connect(database) as writer, connect(database) as deleter, ThreadPoolExecutor(2) as threads:
        with connect(database) as obstacle, obstacle.transaction():
            obstacle.execute("select from public.project_files for update")
            write = threads.submit(upsert, writer, project.id, "a", "2")
            until_waiting(db, writer)
            deletion = threads.submit(deleter.execute, b"delete from public.projects")
            until_waiting(db, deleter)
        assert write.result(30)["revision"] == 2
        deletion.result(30)
    assert gone(db) == [project.id]
    with pytest.raises(psycopg.Error) as error:
        upsert(db, project.id, "a", "3")
    assert error.value.sqlstate == "PT410"


def until_waiting(db: Db, connection: Db) -> None:
    """Return once the connection waits for a lock."""
    deadline = time.monotonic() + 30
    waiting = "select count(*) from pg_stat_activity where pid = %s and wait_event_type = 'Lock'"
    while not one(db, waiting, [connection.info.backend_pid]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
