"""Upkeep by schedule: history is forgotten, objects that nothing names are found, and nobody can name them again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import psycopg
import pytest

from tests.database.db import Project, apply, begin, connect, delete, end, files, make_project, one, upsert
from tests.database.test_history import age
from tests.database.test_lock_order import until_waiting

Db = psycopg.Connection[Any]


def upload(db: Db, project: Project, content: bytes, *, days: float = 3) -> str:
    """An object in project-assets, as Storage would have it after so many days; its hash."""
    digest = sha256(content).hexdigest()
    db.execute(
        "insert into storage.objects (bucket_id, name, metadata, created_at)"
        " values ('project-assets', %s, '{\"size\": 1}', now() - %s * interval '1 day')",
        [f"{project.id}/{digest}", days],
    )
    return digest


def binary(path: str, digest: str) -> dict[str, str]:
    return {"action": "update", "file_path": path, "content_hash": digest, "encoding": "base64"}


def due(db: Db) -> None:
    db.execute("update project_heads set kept_up_at = '-infinity'")


def keep_up(db: Db, most: int = 500) -> dict[str, Any] | None:
    done: dict[str, Any] | None = one(db, "select preview.keep_up(%s)", [most])
    return done


def unused(db: Db, project: Project) -> set[str]:
    rows = db.execute("select content_hash from preview.unused_assets where project_id = %s", [project.id])
    return {digest for (digest,) in rows}


def test_history_goes_by_the_settings_and_a_project_is_kept_up_once_a_day(db: Db, project: Project) -> None:
    for number in range(6):
        upsert(db, project.id, "a", str(number))
    delete(db, project.id, "a")
    upsert(db, project.id, "b", "1")
    age(db, 24 * 91)
    db.execute("update preview.settings set versions_kept = 2")
    assert keep_up(db) is None, "a new project is not due"
    due(db)
    assert keep_up(db) == {
        "project_id": str(project.id), "versions": 6, "tombstones": 1, "unused": 0, "sessions": 0, "requests": 0,
        "archives": [],
    }  # fmt: skip
    assert keep_up(db) is None
    assert set(files(db, project.id)) == {"b"}
    assert one(db, "select pruned_revision from project_heads") == 7


def test_what_the_settings_keep_is_kept(db: Db, project: Project) -> None:
    for number in range(4):
        upsert(db, project.id, "a", str(number))
    age(db, 24 * 89)
    due(db)
    db.execute("update preview.settings set versions_kept = 0")
    assert (keep_up(db) or {})["versions"] == 0, "they are not old enough"
    age(db, 24 * 1000)
    due(db)
    db.execute("update preview.settings set history_kept = null")
    assert (keep_up(db) or {})["versions"] == 0, "nothing is ever forgotten"


def test_no_step_does_more_than_it_may_and_the_project_stays_due(db: Db, project: Project) -> None:
    for number in range(6):
        upsert(db, project.id, "a", str(number))
    age(db, 24 * 91)
    db.execute("update preview.settings set versions_kept = 0")
    due(db)
    assert [(keep_up(db, 2) or {})["versions"] for _ in range(3)] == [2, 2, 1]
    assert keep_up(db, 2) is None


def test_a_project_that_somebody_writes_to_is_passed_by(db: Db, database: str, project: Project) -> None:
    other = make_project(db)
    upsert(db, project.id, "a", "1")
    upsert(db, other.id, "a", "1")
    due(db)
    db.execute(
        "update project_heads set kept_up_at = now() - interval '2 days' where project_id = %s", [other.id]
    )
    with connect(database) as writer, writer.transaction():
        upsert(writer, project.id, "a", "2")
        assert (keep_up(db) or {})["project_id"] == str(other.id)
        assert keep_up(db) is None
    assert (keep_up(db) or {})["project_id"] == str(project.id)


def test_what_nothing_names_is_found_and_what_something_names_is_not(db: Db, project: Project) -> None:
    current, old, staged, forgotten, fresh = (upload(db, project, name.encode()) for name in "cosfn")
    db.execute("update storage.objects set created_at = now() where name like %s", [f"%{fresh}"])
    apply(db, project.id, [binary("c", old)])
    apply(db, project.id, [binary("c", current)])
    turn = begin(db, project.id)
    apply(db, project.id, [binary("s", staged)], turn=turn)
    due(db)
    assert (keep_up(db) or {})["unused"] == 1
    assert unused(db, project) == {forgotten}
    due(db)
    assert (keep_up(db) or {})["unused"] == 0, "it is found once"
    # Forgotten history and abandoned turns name nothing any more.
    one(db, "select abandon_turn(%s, %s)", [project.id, turn])
    age(db, 24 * 91)
    db.execute("update preview.settings set versions_kept = 0")
    due(db)
    assert (keep_up(db) or {})["unused"] == 2
    assert unused(db, project) == {forgotten, staged, old}
    db.execute("update preview.settings set unused_assets_kept = null")
    db.execute("update storage.objects set created_at = now() - interval '9 years'")
    due(db)
    assert (keep_up(db) or {})["unused"] == 0


def test_nobody_names_an_object_that_is_on_its_way_out(db: Db, database: str, project: Project) -> None:
    digest = upload(db, project, b"x")
    turn = begin(db, project.id)
    with connect(database) as writer, connect(database) as holder, ThreadPoolExecutor(1) as threads:
        with holder.transaction():
            upsert(holder, project.id, "a", "1")
            # It has seen the object, and waits for the head.
            late = threads.submit(apply, writer, project.id, [binary("x", digest)])
            until_waiting(db, writer.info.backend_pid)
            holder.execute("insert into preview.unused_assets values (%s, %s)", [project.id, digest])
        with pytest.raises(psycopg.Error) as error:
            late.result(30)
    assert error.value.sqlstate == "PT503"
    with pytest.raises(psycopg.Error) as error:
        apply(db, project.id, [binary("x", digest)], turn=turn)
    assert error.value.sqlstate == "PT503"
    upsert(db, project.id, "x", "text is not concerned")
    other = make_project(db)
    upload(db, other, b"x")
    apply(db, other.id, [binary("x", digest)])
    # The bytes are gone, and come again.
    db.execute("delete from preview.unused_assets")
    apply(db, project.id, [binary("y", digest)], turn=turn)
    assert end(db, project.id, turn)["changed"] == 1


def test_a_deleted_project_waits_from_its_deletion_on(db: Db, project: Project) -> None:
    db.execute("delete from projects")
    assert one(
        db,
        "select queued_at = deleted_at and queued_at > now() - interval '1 minute' from preview.deleted_projects",
    )
