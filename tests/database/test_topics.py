"""The topics of projects are the database's, beside whatever policies the product has of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from tests.database.db import Project, acting_as, make_project, messages, one, upsert
from tests.database.test_access import hears

Db = psycopg.Connection[Any]

PRODUCT = """
create policy "anybody may do anything" on realtime.messages for all to public using (true) with check (true);
grant insert, update, delete on realtime.messages to anon, authenticated, preview_agent, product_editor;
grant select on realtime.messages to product_editor;
grant usage on schema realtime to product_editor;
"""


@pytest.fixture
def open_product(db: Db) -> Iterator[None]:
    """A product whose own policies open the channels to everybody, as many a tutorial does."""
    if not one(db, "select exists (select from pg_roles where rolname = 'product_editor')"):
        db.execute("create role product_editor nologin noinherit; grant product_editor to authenticator")
    db.execute(PRODUCT.encode())
    yield
    db.execute('drop policy "anybody may do anything" on realtime.messages')
    db.execute("revoke insert, update, delete on realtime.messages from anon, authenticated, preview_agent")
    db.execute(
        "revoke all on realtime.messages from product_editor; revoke all on schema realtime from product_editor"
    )
    db.execute("drop role product_editor")


def callers(project: Project) -> list[tuple[str, dict[str, object]]]:
    return [
        ("anon", {}),
        ("authenticated", {"sub": project.owner, "session_id": uuid.uuid4()}),
        ("authenticated", {"sub": project.stranger}),
        ("authenticated", {"sub": project.owner, "project_id": project.id}),
        ("preview_agent", {"project_id": project.id}),
        ("product_editor", {"sub": project.owner}),
    ]


def speak(db: Db, topic: str, row: str, extension: str) -> None:
    """As Realtime asks whether somebody may: with the topic in a setting, by inserting a row."""
    db.execute("select set_config('realtime.topic', %s, true)", [topic])
    db.execute("insert into realtime.messages (topic, extension) values (%s, %s)", [row, extension])


@pytest.mark.usefixtures("open_product")
@pytest.mark.parametrize("extension", ["broadcast", "presence"])
def test_nobody_speaks_on_a_projects_topics(db: Db, project: Project, extension: str) -> None:
    upsert(db, project.id, "a", "1")
    for topic in (f"project:{project.id}", f"preview:{project.id}", "project:", "preview:x"):
        for role, claims in callers(project):
            for row in (topic, "room"):
                with pytest.raises(InsufficientPrivilege), acting_as(db, role, **claims):
                    speak(db, topic, row, extension)
            with acting_as(db, role, **claims):
                for change in (
                    "update realtime.messages set payload = '{}'",
                    "delete from realtime.messages",
                ):
                    assert db.execute(change.encode()).rowcount == 0
    with acting_as(db, "authenticated", sub=project.owner):  # `send` only warns
        db.execute("select realtime.send('{}', 'file:update', %s)", [f"project:{project.id}"])
    assert len(messages(db, project.id)) == 1


@pytest.mark.usefixtures("open_product")
def test_only_members_and_the_own_container_hear(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    one(db, "select preview.publish(%s, 'preview:status', '{}')", [f"preview:{project.id}"])
    other = make_project(db)
    upsert(db, other.id, "a", "1")
    heard = {
        (kind, role, *sorted(claims)): hears(db, f"{kind}:{project.id}", role, **claims)
        for kind in ("project", "preview")
        for role, claims in callers(project)
    }
    assert {caller for caller, number in heard.items() if number} == {
        ("project", "authenticated", "session_id", "sub"),
        ("project", "authenticated", "project_id", "sub"),
        ("project", "preview_agent", "project_id"),
        ("preview", "authenticated", "session_id", "sub"),
    }
    for role, claims in callers(project):
        assert hears(db, f"project:{other.id}", role, **claims) == 0


@pytest.mark.usefixtures("open_product")
def test_the_products_own_topics_are_as_they_were(db: Db, project: Project) -> None:
    for role, claims in callers(project):
        for topic in ("room", "projects", f"chat:project:{project.id}"):
            with acting_as(db, role, **claims):
                db.execute("select set_config('realtime.topic', %s, true)", [topic])
                db.execute(
                    "insert into realtime.messages (topic, extension) values (%s, 'broadcast')", [topic]
                )
                assert one(db, "select count(*) from realtime.messages where topic = %s", [topic]) > 0
                assert db.execute("delete from realtime.messages where topic = %s", [topic]).rowcount == 1
