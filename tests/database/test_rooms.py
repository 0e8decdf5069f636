"""Rooms in the database: who has one, who may come in, and who says and hears which file is open."""

from __future__ import annotations

import uuid
from typing import Any

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from tests.database.db import Project, acting_as, connect, make_project, one, upsert
from tests.database.test_access import hears
from tests.database.test_topics import callers, open_product, speak

Db = psycopg.Connection[Any]
__all__ = ["open_product"]

HERE, THERE = uuid.uuid4(), uuid.uuid4()


def claim(db: Db, project: Project, server: uuid.UUID, seconds: float = 60) -> tuple[int, uuid.UUID]:
    row = db.execute(
        "select generation, server from preview.claim_room(%s, 'a', %s, 'http://x', %s)",
        [project.id, server, seconds],
    ).fetchone()
    assert row is not None
    return row[0], row[1]


def save(db: Db, project: Project, generation: int, text: str, version: int, *users: uuid.UUID) -> Any:
    return one(
        db, "select preview.save_room(%s, 'a', %s, %s, %s, %s, %s)",
        [project.id, generation, text, version, list(users), str(uuid.uuid4())],
    )  # fmt: skip


def test_one_has_the_room_until_its_lease_is_over(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    first, server = claim(db, project, HERE)
    assert server == HERE
    assert claim(db, project, THERE) == (first, HERE)
    assert db.execute("select preview.renew_rooms(%s, %s, -1)", [HERE, [first]]).fetchall() == [(first,)]
    second, server = claim(db, project, THERE)
    assert (server, second > first) == (THERE, True)
    assert db.execute("select preview.renew_rooms(%s, %s, 60)", [HERE, [first]]).fetchall() == []
    # The older one's save is fenced inside its transaction; the newer one's is not.
    assert save(db, project, first, "late", 1, project.owner) == {"fenced": True}
    assert save(db, project, second, "2", 1, project.owner)["version"] == 2
    nobody = db.execute(
        "select generation from preview.claim_room(%s, 'a', %s, 'http://x', 60)", [uuid.uuid4(), HERE]
    ).fetchone()
    assert nobody == (None,)


def test_a_save_is_of_who_typed_last_and_still_may(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    generation, _ = claim(db, project, HERE)
    save(db, project, generation, "2", 1, project.owner, project.collaborator, project.stranger)
    row = db.execute(
        "select created_by, contributors, origin from public.project_files where project_id = %s"
        " and is_current_version", [project.id],
    ).fetchone()  # fmt: skip
    assert row == (project.collaborator, [project.owner, project.collaborator], "room")
    assert save(db, project, generation, "3", 2, project.stranger) == {"nobody": True}
    with pytest.raises(psycopg.Error) as refused:
        save(db, project, generation, "3", 1, project.owner)
    assert refused.value.sqlstate == "PT409"
    assert one(db, "select current_setting('role')") == "none"  # of that transaction alone


def test_rooms_hear_of_saves_where_there_are_rooms(db: Db, database: str, project: Project) -> None:
    with connect(database) as listener:
        listener.execute("listen preview_rooms")
        upsert(db, project.id, "a", "1")
        claim(db, project, HERE)
        upsert(db, project.id, "a", "2")
        upsert(db, project.id, "a", "2")  # changes nothing
        upsert(db, project.id, "b", "1")
        listener.execute("select 1")
        heard = [notice.payload for notice in listener.notifies(timeout=30, stop_after=2)]
        assert heard == [str(project.id)] * 2
        assert list(listener.notifies(timeout=0.05)) == []


def test_a_code_is_used_once_by_what_it_is_for_and_there_are_not_too_many(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    other = make_project(db)
    upsert(db, other.id, "a", "1")

    def give(number: int, seconds: int = 60, to: uuid.UUID | None = None) -> bool:
        return bool(one(
            db, "select preview.give_room_code(%s, %s, 'a', %s, %s, 3)",
            [bytes([number]) * 32, to or project.id, project.owner, seconds],
        ))  # fmt: skip

    def take(number: int, at: uuid.UUID, path: str = "a") -> Any:
        return one(db, "select preview.take_room_code(%s, %s, %s)", [bytes([number]) * 32, at, path])

    assert give(1)
    assert take(1, project.id) == project.owner
    assert take(1, project.id) is None
    assert give(2)
    assert take(2, other.id) is None
    assert take(2, project.id) is None
    assert give(3)
    assert take(3, project.id, "b") is None
    assert give(4, -1)
    assert take(4, project.id) is None
    assert [give(number) for number in range(10, 14)] == [True, True, True, False]
    assert not give(20, to=uuid.uuid4())
    db.execute("delete from public.projects where id = %s", [project.id])
    assert one(db, "select count(*) from preview.room_codes where project_id = %s", [project.id]) == 0


@pytest.mark.usefixtures("open_product")
def test_members_alone_say_and_hear_who_has_a_file_open(db: Db, project: Project) -> None:
    """Beside a product whose own policies open every channel to everybody; and nothing but presence."""
    topic = f"open:{project.id}"
    for role, claims in callers(project):
        member = (
            role == "authenticated" and "project_id" not in claims and claims["sub"] == project.owner
            if claims
            else False
        )
        for row, extension in ((topic, "presence"), (topic, "broadcast"), ("room", "presence")):
            may = member and (row, extension) == (topic, "presence")
            with acting_as(db, role, **claims):
                if may:
                    speak(db, topic, row, extension)
                else:
                    with pytest.raises(InsufficientPrivilege), db.transaction():
                        speak(db, topic, row, extension)
    db.execute(
        "insert into realtime.messages (topic, extension) values (%s, 'presence'), (%s, 'broadcast')",
        [topic] * 2,
    )
    heard = {(role, *sorted(claims)): hears(db, topic, role, **claims) for role, claims in callers(project)}
    assert [caller for caller, number in heard.items() if number] == [("authenticated", "session_id", "sub")]
    stranger = {"sub": project.stranger}
    assert hears(db, topic, "authenticated", **stranger) == 0
    for name in ("open:", "open:x", f"open:{uuid.uuid4()}"):
        with pytest.raises(InsufficientPrivilege), acting_as(db, "authenticated", sub=project.owner):
            speak(db, name, name, "presence")
