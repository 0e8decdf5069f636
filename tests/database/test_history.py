"""History: the audit trail, bringing a version back, forgetting, snapshot requests, a new epoch."""

from __future__ import annotations

import uuid
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from tests.database.db import (
    Project,
    acting_as,
    apply,
    begin,
    changes_since,
    connect,
    delete,
    files,
    head,
    messages,
    one,
    upsert,
    user,
)

Db = psycopg.Connection[Any]


def prune(db: Db, project: uuid.UUID, keep: timedelta, keep_versions: int) -> dict[str, int]:
    answer: dict[str, int] = one(
        db, "select prune_project_history(%s, %s, %s)", [project, keep, keep_versions]
    )
    return answer


def age(db: Db, hours: float) -> None:
    """Make all that has happened so far happen earlier."""
    db.execute(
        "update project_files set created_at = created_at - %(h)s, updated_at = updated_at - %(h)s",
        {"h": timedelta(hours=hours)},
    )
    db.execute("update preview.answers set created_at = created_at - %s", [timedelta(hours=hours)])


def test_the_audit_trail_says_who_changed_what_when(db: Db, project: Project) -> None:
    with user(db, project.owner):
        upsert(db, project.id, "a", "1")
    with user(db, project.collaborator):
        upsert(db, project.id, "a", "22")
        delete(db, project.id, "a")
    with user(db, project.owner):
        rows = db.execute(
            "select revision, action, file_path, version, size_bytes, changed_by,"
            " changed_at <= now(), is_current_version from project_history where project_id = %s order by revision",
            [project.id],
        ).fetchall()
    assert rows == [
        (1, "create", "a", 1, 1, project.owner, True, False),
        (2, "update", "a", 2, 2, project.collaborator, True, False),
        (3, "delete", "a", 3, 0, project.collaborator, True, True),
    ]
    superseded = one(db, "select last_modified_by from project_files where version = 1")
    assert superseded == project.collaborator


def test_an_earlier_version_comes_back_as_a_new_one(db: Db, project: Project) -> None:
    apply(db, project.id, [{"file_path": "a", "content": "first", "file_type": "prose", "executable": True}])
    apply(db, project.id, [{"file_path": "a", "content": "second", "executable": False}])
    delete(db, project.id, "a")
    with user(db, project.collaborator):
        back = one(db, "select restore_project_file(%s, 'a', 1, 3)", [project.id])
    assert (back["version"], back["revision"], back["file_type"], back["executable"]) == (4, 4, "prose", True)
    event, payload = messages(db, project.id)[-1]
    assert (event, payload["content"], payload["version"]) == ("file:update", "first", 4)
    again = one(db, "select restore_project_file(%s, 'a', 4)", [project.id])
    assert (again["changed"], again["version"]) == (False, 4)


def test_forgetting_keeps_what_is_current_and_what_was_asked(db: Db, project: Project) -> None:
    for i in range(6):
        upsert(db, project.id, "a", str(i))
    upsert(db, project.id, "b", "once")
    tree, (epoch, revision) = files(db, project.id), head(db, project.id)
    assert prune(db, project.id, timedelta(hours=1), 0) == {"versions": 0, "tombstones": 0}
    assert prune(db, project.id, timedelta(0), 2) == {"versions": 3, "tombstones": 0}
    versions = db.execute("select version from project_files where file_path = 'a' order by 1").fetchall()
    assert [v for (v,) in versions] == [4, 5, 6]
    age(db, 1000)
    assert prune(db, project.id, timedelta(0), 0) == {"versions": 2, "tombstones": 0}
    assert files(db, project.id) == tree
    assert (
        changes_since(db, project.id, epoch, 0)["kind"] == "changes"
    )  # the latest of each path is still told
    assert head(db, project.id) == (epoch, revision)
    assert upsert(db, project.id, "a", "next")["version"] == 7


def test_a_tombstone_lives_as_long_as_the_longest_session(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    delete(db, project.id, "a")
    upsert(db, project.id, "b", "1")
    epoch, _ = head(db, project.id)
    age(db, 23)
    assert prune(db, project.id, timedelta(0), 0) == {"versions": 1, "tombstones": 0}
    assert [c["file_path"] for c in changes_since(db, project.id, epoch, 1)["changes"]] == ["a", "b"]
    age(db, 2)
    assert prune(db, project.id, timedelta(0), 0) == {"versions": 0, "tombstones": 1}
    too_old = {"kind": "snapshot", "epoch": epoch, "revision": 3, "reason": "too_old"}
    assert changes_since(db, project.id, epoch, 1) == too_old
    assert changes_since(db, project.id, epoch, 0) == too_old
    assert [c["file_path"] for c in changes_since(db, project.id, epoch, 2)["changes"]] == ["b"]
    # `keep` above the longest session counts too, and another project is not touched.
    assert upsert(db, project.id, "a", "new life")["version"] == 1


def test_a_tombstone_goes_with_everything_before_it(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    upsert(db, project.id, "a", "2")
    delete(db, project.id, "a")
    age(db, 100)
    assert prune(db, project.id, timedelta(0), 10) == {"versions": 2, "tombstones": 1}
    assert one(db, "select count(*) from project_files") == 0


def test_forgetting_waits_for_a_writer_and_forgets_old_answers(
    db: Db, database: str, project: Project
) -> None:
    first = upsert(db, project.id, "a", "1", correlation="old")
    age(db, 100)
    with connect(database) as writer, writer.transaction():
        upsert(writer, project.id, "b", "1")
        db.execute("set lock_timeout = '200ms'")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            prune(db, project.id, timedelta(0), 0)
    db.execute("reset lock_timeout")
    prune(db, project.id, timedelta(0), 0)
    assert one(db, "select count(*) from preview.answers") == 0
    assert upsert(db, project.id, "a", "1", correlation="old") | {"revision": 1} == first | {"changed": False}


def test_a_snapshot_request_is_recorded_told_and_not_doubled(db: Db, database: str, project: Project) -> None:
    with connect(database) as builder:
        builder.execute("listen snapshot_requests")
        with user(db, project.collaborator):
            request = one(db, "select create_project_snapshot(%s)", [project.id])
        with acting_as(db, "service_role"):
            assert one(db, "select create_project_snapshot(%s)", [project.id]) == request
        heard = [n.payload for n in builder.notifies(timeout=30, stop_after=1)]
    assert heard == [request["snapshot_id"]]
    assert (request["state"], request["project_id"]) == ("requested", str(project.id))
    row = db.execute("select requested_by, state from project_snapshots").fetchall()
    assert row == [(project.collaborator, "requested")]
    with acting_as(db, "service_role"):
        db.execute("update project_snapshots set state = 'building'")
    with user(db, project.owner):
        assert (
            one(db, "select create_project_snapshot(%s)", [project.id])["snapshot_id"]
            != request["snapshot_id"]
        )
        with pytest.raises(psycopg.errors.InsufficientPrivilege), db.transaction():
            db.execute("update project_snapshots set state = 'ready'")


def test_a_new_epoch_is_another_history(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    old, revision = head(db, project.id)
    assert one(db, "select new_project_epoch(%s)", [project.id]) == 1
    new, same = head(db, project.id)
    assert (new != old, same) == (True, revision)
    assert changes_since(db, project.id, old, revision)["reason"] == "epoch"
    assert one(db, "select new_project_epoch()") == 1


def test_a_deleted_project_takes_everything_along(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1", correlation="x")
    one(db, "select create_project_snapshot(%s)", [project.id])
    with user(db, project.owner):
        db.execute("delete from projects where id = %s", [project.id])
    for table in ("project_files", "project_heads", "project_snapshots", "project_collaborators"):
        assert one(db, f"select count(*) from {table}") == 0
    assert one(db, "select count(*) from preview.answers") == 0


def forget(db: Db, who: uuid.UUID, most: int = 1000) -> int:
    with acting_as(db, "service_role"):
        return int(one(db, "select forget_author(%s, %s)", [who, most]))


def test_a_person_goes_and_what_they_wrote_for_others_stays(db: Db, project: Project) -> None:
    for number in range(3):
        with user(db, project.collaborator):
            upsert(db, project.id, "a", f"theirs {number}")
    with user(db, project.owner):
        upsert(db, project.id, "a", "mine")
    with user(db, project.collaborator):
        begin(db, project.id)
        own = one(db, "insert into projects (owner_id) values (%s) returning id", [project.collaborator])
        upsert(db, own, "b", "1")
    # In steps, each whole by itself: it goes on where it was killed.
    assert [forget(db, project.collaborator, 2) for _ in range(3)] == [2, 1, 0]
    authors = db.execute(
        "select distinct created_by, last_modified_by from project_files where project_id = %s", [project.id]
    )
    assert authors.fetchall() == [(project.owner, project.owner)]
    assert one(db, "select count(*) from project_files where created_by = %s", [project.collaborator]) == 1
    db.execute("delete from auth.users where id = %s", [project.collaborator])
    assert one(db, "select count(*) from projects") == 1
    assert len(files(db, project.id)) == 1
    for table, column in (
        ("project_files", "created_by"),
        ("project_files", "last_modified_by"),
        ("project_snapshots", "requested_by"),
        ("project_collaborators", "user_id"),
        ("preview.turns", "begun_by"),
        ("preview.sessions", "requested_by"),
    ):
        left = one(db, f"select count(*) from {table} where {column}::text = %s", [str(project.collaborator)])
        assert left == 0, table
    with user(db, project.owner):
        upsert(db, project.id, "a", "mine again")


def test_a_person_goes_with_their_projects_but_history_keeps_who_wrote(db: Db, project: Project) -> None:
    with user(db, project.collaborator):
        upsert(db, project.id, "a", "theirs")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        db.execute("delete from auth.users where id = %s", [project.collaborator])
    with user(db, project.owner):
        upsert(db, project.id, "a", "mine")
    db.execute("delete from auth.users where id = %s", [project.owner])
    assert one(db, "select count(*) from projects") == 0
    assert one(db, "select count(*) from project_files") == 0
