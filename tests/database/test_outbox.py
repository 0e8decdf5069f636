"""Which way a project's events leave the database, as `preview.settings.transport` says."""

from __future__ import annotations

import json
from typing import Any

import psycopg
import pytest
from psycopg.errors import CheckViolation, InsufficientPrivilege

from tests.database.db import Project, acting_as, apply, delete, head, messages, one, upsert

Db = psycopg.Connection[Any]


def waiting(db: Db) -> list[tuple[Any, ...]]:
    """The outbox, in order."""
    return db.execute(
        "select project_id, event, message_id, payload from preview.outbox order by id"
    ).fetchall()


def save_thrice(db: Db, project: Project) -> None:
    with acting_as(db, "authenticated", sub=project.owner):
        upsert(db, project.id, "a", "one")
        apply(db, project.id, [{"file_path": "b", "content": "two"}])
        delete(db, project.id, "a")


EVENTS = ["file:update", "bulk:apply", "file:delete"]


@pytest.fixture(autouse=True)
def _emptied(db: Db) -> Any:
    yield
    db.execute("delete from preview.outbox")


def test_by_default_nothing_goes_through_the_outbox(db: Db, project: Project) -> None:
    save_thrice(db, project)
    assert waiting(db) == []
    assert [event for event, _ in messages(db, project.id)] == EVENTS


@pytest.mark.parametrize(("transport", "by_realtime"), [("both", EVENTS), ("nats", [])])
def test_every_event_is_in_the_outbox_once_and_in_order(
    db: Db, project: Project, transport: str, by_realtime: list[str]
) -> None:
    db.execute("update preview.settings set transport = %s", [transport])
    save_thrice(db, project)
    epoch, revision = head(db, project.id)
    rows = waiting(db)
    assert [(row[0], row[1]) for row in rows] == [(project.id, event) for event in EVENTS]
    assert [row[2] for row in rows] == [
        f"{project.id}:{epoch}:{n}" for n in range(revision - 2, revision + 1)
    ]
    told = messages(db, project.id)
    assert [event for event, _ in told] == by_realtime
    if by_realtime:
        assert [json.loads(row[3])["revision"] for row in rows] == [each["revision"] for _, each in told]


def test_a_save_that_is_undone_leaves_nothing(db: Db, project: Project) -> None:
    db.execute("update preview.settings set transport = 'nats'")
    with db.transaction(force_rollback=True), acting_as(db, "authenticated", sub=project.owner):
        upsert(db, project.id, "a", "one")
    assert waiting(db) == []


def test_what_is_for_members_goes_to_browsers_whatever_the_transport(db: Db, project: Project) -> None:
    db.execute("update preview.settings set transport = 'nats'")
    db.execute(
        """select preview.publish('preview:' || %s, 'preview:status', '{"applied": 1}')""", [project.id]
    )
    assert waiting(db) == []
    assert one(db, "select count(*) from realtime.messages where event = 'preview:status'") == 1


def test_the_bucket_is_the_last_digit_of_the_project_s_id(db: Db, project: Project) -> None:
    db.execute("update preview.settings set transport = 'nats'")
    save_thrice(db, project)
    assert one(db, "select distinct bucket from preview.outbox") == int(str(project.id)[-1], 16)


def test_there_are_three_transports(db: Db) -> None:
    with pytest.raises(CheckViolation):
        db.execute("update preview.settings set transport = 'pigeon'")


@pytest.mark.parametrize("role", ["anon", "authenticated", "service_role", "preview_agent"])
def test_nobody_but_the_owner_reads_or_writes_it(db: Db, project: Project, role: str) -> None:
    for query in (
        "select * from preview.outbox",
        "delete from preview.outbox",
        "insert into preview.outbox (project_id, event, message_id, payload) values (gen_random_uuid(), '', '', '')",
        "select preview.publish('project:x', 'file:update', '{}')",
    ):
        with pytest.raises(InsufficientPrivilege), acting_as(db, role, sub=project.owner):
            db.execute(query.encode())
