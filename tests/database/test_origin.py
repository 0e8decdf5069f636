"""Where a version came from is said by the database, and chosen by nobody who saves."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.database.db import (
    Project,
    acting_as,
    apply,
    begin,
    delete,
    end,
    head,
    messages,
    one,
    upsert,
    user,
)

Db = psycopg.Connection[Any]
Where = tuple[str, Any, Any]

CHOSEN = (
    "select set_config('preview.origin', %s, true), set_config('preview.contributors', %s, true),"
    " set_config('preview.session', %s, true)"
)


def origins(db: Db, project: uuid.UUID) -> list[Where]:
    return db.execute(
        "select origin, contributors, session_id from project_files where project_id = %s order by revision, file_path",
        [project],
    ).fetchall()  # type: ignore[return-value]


def choose(db: Db, origin: str, contributors: list[uuid.UUID] | None = None, session: object = "") -> None:
    people = "" if contributors is None else "{" + ",".join(map(str, contributors)) + "}"
    db.execute(CHOSEN, [origin, people, str(session)])


def test_a_person_and_a_program_with_the_service_key_are_told_apart(db: Db, project: Project) -> None:
    with user(db, project.owner):
        upsert(db, project.id, "a", "1")
    with acting_as(db, "service_role"):
        upsert(db, project.id, "a", "2")
    upsert(db, project.id, "a", "3")
    with acting_as(db, "service_role", sub=project.owner):
        delete(db, project.id, "a")
    assert origins(db, project.id) == [(who, None, None) for who in ("user", "api", "api", "user")]


def test_every_way_of_a_person_says_user(db: Db, project: Project) -> None:
    with user(db, project.collaborator):
        apply(db, project.id, [{"file_path": "a", "content": "1"}])
        one(db, "select rename_project_file(%s, 'a', 'b')", [project.id])
        turn = begin(db, project.id)
        upsert(db, project.id, "c", "1", turn=turn)
        end(db, project.id, turn)
        one(db, "select restore_project_file(%s, 'b', 1)", [project.id])
    assert {where for where, _, _ in origins(db, project.id)} == {"user"}


def test_a_restored_project_says_so(db: Db, project: Project) -> None:
    with user(db, project.owner):
        upsert(db, project.id, "a", "1")
        upsert(db, project.id, "a", "2")
        one(db, "select restore_project(%s, 1)", [project.id])
        upsert(db, project.id, "a", "4")
    assert [where for where, _, _ in origins(db, project.id)] == ["user", "user", "restore", "user"]


@pytest.mark.parametrize("role", ["authenticated", "service_role"])
def test_no_client_chooses_where_its_save_came_from(db: Db, project: Project, role: str) -> None:
    """By a setting, through every function that writes with higher rights, and by the gate's columns."""
    upsert(db, project.id, "a", "1")
    ways: dict[str, Callable[[], Any]] = {
        "upsert": lambda: upsert(db, project.id, "a", "2"),
        "bulk": lambda: apply(db, project.id, [{"file_path": "b", "content": "1"}]),
        "rename": lambda: one(db, "select rename_project_file(%s, 'b', 'c')", [project.id]),
        "turn": lambda: end(db, project.id, in_a_turn()),
        "delete": lambda: delete(db, project.id, "c"),
    }

    def in_a_turn() -> str:
        turn = begin(db, project.id)
        upsert(db, project.id, "d", "1", turn=turn)
        return turn

    for name, way in ways.items():
        with acting_as(db, role, sub=project.owner):
            choose(db, "container", [project.stranger], uuid.uuid4())
            way()
        assert origins(db, project.id)[-1] == ("user", None, None), name
        assert messages(db, project.id)[-1][1]["sender"] == str(project.owner), name
    with acting_as(db, role, sub=project.owner):
        choose(db, "room")
        one(db, "select restore_project(%s, 1)", [project.id])
    assert origins(db, project.id)[-1][0] == "restore"
    for column, value in (("origin", "'container'"), ("contributors", "'{}'"), ("session_id", "null")):
        forged = f"update preview.write_gate set project_id = %s, changes = '{{}}', {column} = {value}"
        with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(db, role, sub=project.owner):
            db.execute(forged.encode(), [project.id])


def test_the_orchestrators_own_connection_says_it(db: Db, project: Project) -> None:
    people = [project.owner, project.collaborator]
    session = uuid.uuid4()
    with db.transaction():
        choose(db, "room", people)
        # As a member, whose right is asked as ever; and the connection is still the owner's.
        db.execute("select set_config('role', 'authenticated', true)")
        db.execute("select set_config('request.jwt.claims', %s, true)", [f'{{"sub": "{project.owner}"}}'])
        upsert(db, project.id, "a", "1")
    with db.transaction():
        choose(db, "container", None, session)
        upsert(db, project.id, "a", "2")
    upsert(db, project.id, "a", "3")
    assert origins(db, project.id) == [
        ("room", people, None),
        ("container", None, session),
        ("api", None, None),
    ]
    assert [m["sender"] for _, m in messages(db, project.id)][:2] == [
        str(project.owner),
        f"container:{session}",
    ]
    trail = "select origin, contributors, session_id from project_history order by revision"
    with user(db, project.collaborator):
        assert db.execute(trail.encode()).fetchall() == origins(db, project.id)


def test_an_origin_that_is_none_is_refused(db: Db, project: Project) -> None:
    def save_from_elsewhere() -> None:
        with db.transaction():
            choose(db, "elsewhere")
            upsert(db, project.id, "a", "1")

    with pytest.raises(psycopg.errors.CheckViolation):
        save_from_elsewhere()
    assert origins(db, project.id) == []


def test_a_containers_writes_are_not_counted_as_peoples(db: Db, project: Project) -> None:
    db.execute("update preview.settings set writes_per_minute = 2")
    upsert(db, project.id, "a", "1")
    for n in range(3):
        with db.transaction():
            choose(db, "container", None, uuid.uuid4())
            upsert(db, project.id, "gen", str(n))
    window = "select window_writes from project_heads where project_id = %s"
    assert one(db, window, [project.id]) in (0, 1)  # 0: a new minute began
    assert head(db, project.id)[1] == 4
