"""Who may do what, from both sides: what each role can, and what it cannot."""

from __future__ import annotations

import uuid
from typing import Any

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege

from tests.database.db import (
    Project,
    acting_as,
    changes_since,
    delete,
    files,
    head,
    make_project,
    messages,
    one,
    upsert,
    user,
)

Db = psycopg.Connection[Any]

RPCS = {
    "upsert_project_file": "select public.upsert_project_file('{id}', 'x', 'x', 'text')",
    "delete_project_file": "select public.delete_project_file('{id}', 'a')",
    "apply_project_files": "select public.apply_project_files('{id}', '[]')",
    "list_current_files": "select * from public.list_current_files('{id}')",
    "create_project_snapshot": "select public.create_project_snapshot('{id}')",
    "changes_since": "select public.changes_since('{id}', '{id}', 0)",
    "project_tree_hash": "select public.project_tree_hash('{id}')",
    "rename_project_file": "select public.rename_project_file('{id}', "
    "public.upsert_project_file('{id}', 'old', gen_random_uuid()::text) ->> 'file_path', 'new' || gen_random_uuid())",
    "restore_project_file": "select public.restore_project_file('{id}', 'a', 1)",
    "restore_project": "select public.restore_project('{id}', 1)",
    "create_checkpoint": "select public.create_checkpoint('{id}', gen_random_uuid()::text)",
    "delete_checkpoint": "select public.delete_checkpoint('{id}', 'x')",
    "list_checkpoints": "select * from public.list_checkpoints('{id}')",
    "diff_project": "select public.diff_project('{id}', 1)",
    "list_commits": "select * from public.list_commits('{id}')",
    "file_version": "select public.file_version('{id}', 'a', 1)",
    "begin_turn": "select public.begin_turn('{id}')",
    "end_turn": "select public.end_turn('{id}', '{id}')",
    "abandon_turn": "select public.abandon_turn('{id}', '{id}')",
    "prune_project_history": "select public.prune_project_history('{id}', '1 day', 1)",
    "new_project_epoch": "select public.new_project_epoch('{id}')",
    "forget_author": "select public.forget_author('{id}')",
    "set_write_back": "select public.set_write_back('{id}', '[]')",
    "list_write_back": "select * from public.list_write_back('{id}')",
    "list_conflicts": "select * from public.list_conflicts('{id}')",
    "list_proposals": "select * from public.list_proposals('{id}')",
    "resolve_conflict": "select public.resolve_conflict('{id}', '{id}', 'kept')",
    "accept_proposal": "select public.accept_proposal('{id}', '{id}')",
    "reject_proposal": "select public.reject_proposal('{id}', '{id}')",
}
OF_A_TURN = {"end_turn", "abandon_turn"}
"""With a turn of their own in test_turns; here there is none of that id."""
OF_WRITE_BACK = {"resolve_conflict", "accept_proposal", "reject_proposal", "set_write_back"}
"""In test_write_back: here there is nothing to decide, and rules are the owner's alone."""
FOR_THE_SERVICE = {"prune_project_history", "new_project_epoch", "forget_author"}
READABLE = ["projects", "project_files", "project_files_current", "project_heads", "project_history"]


@pytest.fixture
def filled(db: Db, project: Project) -> Project:
    upsert(db, project.id, "a", "1")
    upsert(db, project.id, "a", "2")
    return project


GATE = "update preview.write_gate set bulk = false, changes = %s::preview.change[], project_id = %s"


def count(db: Db, table: str) -> int:
    return int(one(db, f"select count(*) from public.{table}"))


def test_every_rpc_of_ours_is_in_this_test(db: Db) -> None:
    found = db.execute("select proname from pg_proc where pronamespace = 'public'::regnamespace").fetchall()
    assert {name for (name,) in found} == set(RPCS)


@pytest.mark.parametrize("who", ["owner", "collaborator"])
def test_members_read_and_write(db: Db, filled: Project, who: str) -> None:
    me = getattr(filled, who)
    with user(db, me):
        assert all(count(db, table) >= 1 for table in READABLE)
        for name in RPCS.keys() - FOR_THE_SERVICE - OF_A_TURN - OF_WRITE_BACK:
            db.execute(RPCS[name].format(id=filled.id).encode())
    rows = db.execute("select distinct created_by from project_files where revision > 2").fetchall()
    assert rows == [(me,)]


def test_strangers_see_nothing_and_are_told_nothing(db: Db, filled: Project) -> None:
    before = files(db, filled.id), head(db, filled.id)
    for name in RPCS.keys() - FOR_THE_SERVICE - {"list_current_files", "project_tree_hash"}:
        with pytest.raises(psycopg.Error) as error, user(db, filled.stranger):
            db.execute(RPCS[name].format(id=filled.id).encode())
        unknown = error.value.diag.message_primary
        assert error.value.sqlstate == "PT404", name
        nobodys = uuid.uuid4()
        with pytest.raises(psycopg.Error) as error, user(db, filled.stranger):
            db.execute(RPCS[name].format(id=nobodys).encode())
        assert (error.value.diag.message_primary or "").replace(str(nobodys), str(filled.id)) == unknown
    with user(db, filled.stranger):
        assert [count(db, table) for table in READABLE] == [0] * len(READABLE)
        assert db.execute("select * from list_current_files(%s)", [filled.id]).fetchall() == []
        assert db.execute(GATE, ['{"(update,x,,x,,,)"}', filled.id]).rowcount == 0
        for question in ("allows(%s, 'read')", "allows(%s, 'write')", "owns(%s)", "visible(%s)"):
            assert one(db, f"select preview.{question}", [filled.id]) is False
        assert db.execute("select preview.my_projects()").fetchall() == []
    assert (files(db, filled.id), head(db, filled.id)) == before


@pytest.mark.parametrize("role", ["anon", "preview_agent"])
def test_anon_and_containers_can_call_no_rpc_and_read_no_table(db: Db, filled: Project, role: str) -> None:
    claims = {"project_id": filled.id, "session_id": uuid.uuid4(), "sub": filled.owner}
    for query in [*RPCS.values(), *(f"select * from public.{table}" for table in READABLE)]:
        with pytest.raises(InsufficientPrivilege), acting_as(db, role, **claims):
            db.execute(query.format(id=filled.id).encode())


def test_members_cannot_write_past_the_rpcs(db: Db, filled: Project) -> None:
    new = "insert into project_files (project_id, file_path, file_type, content, content_hash, created_by, revision)"
    new += f" values ('{filled.id}', 'x', 't', 'x', repeat('a', 64), '{filled.owner}', 9)"
    for role, claims in (("authenticated", {"sub": filled.owner}), ("service_role", {})):
        for query in (
            new,
            "update project_files set content = 'x'",
            "delete from project_files",
            "update project_files_current set content = 'x'",
            "update project_heads set revision = 0",
            "delete from project_heads",
            "update preview.settings set writes_per_minute = 1000000",
            "select * from preview.answers",
        ):
            with pytest.raises(InsufficientPrivilege), acting_as(db, role, **claims):
                db.execute(query.encode())


def test_the_door_itself_keeps_the_rules(db: Db, filled: Project) -> None:
    with pytest.raises(psycopg.Error) as error, user(db, filled.owner):
        db.execute(GATE, ['{"(update,../x,,x,,,)"}', filled.id])
    assert error.value.sqlstate == "PT400"
    with pytest.raises(InsufficientPrivilege), user(db, filled.stranger):
        db.execute(
            "update preview.write_gate set unrestricted = true, bulk = false, project_id = %s", [filled.id]
        )
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState), user(db, filled.owner):
        db.execute("insert into preview.write_gate (project_id) values (%s)", [filled.id])


def test_the_service_role_writes_in_the_owners_name_and_looks_after_history(db: Db, filled: Project) -> None:
    with acting_as(db, "service_role"):
        upsert(db, filled.id, "b", "by the service")
        for name in FOR_THE_SERVICE:
            db.execute(RPCS[name].format(id=filled.id).encode())
    assert one(db, "select created_by from project_files where file_path = 'b'") == filled.owner
    for name in FOR_THE_SERVICE:
        with pytest.raises(InsufficientPrivilege), user(db, filled.owner):
            db.execute(RPCS[name].format(id=filled.id).encode())


def test_projects_are_made_shared_and_left_by_their_people(db: Db, project: Project) -> None:
    newcomer = project.stranger
    share = "insert into project_collaborators (project_id, user_id, added_by) values (%s, %s, %s)"
    with pytest.raises(InsufficientPrivilege), user(db, project.collaborator):
        db.execute(share, [project.id, newcomer, project.collaborator])
    with user(db, project.owner):
        db.execute(share, [project.id, newcomer, project.owner])
        assert count(db, "project_collaborators") == 2
    with user(db, newcomer):
        assert upsert(db, project.id, "a", "hello")["version"] == 1
        assert db.execute("delete from project_collaborators").rowcount == 1
    with pytest.raises(psycopg.Error, match="no such project, or not yours"), user(db, newcomer):
        upsert(db, project.id, "a", "and gone")
    with pytest.raises(InsufficientPrivilege), user(db, newcomer):
        db.execute("insert into projects (owner_id) values (%s)", [project.owner])
    with pytest.raises(InsufficientPrivilege), user(db, newcomer):  # nobody chooses an id
        db.execute("insert into projects (id, owner_id) values (%s, %s)", [uuid.uuid4(), newcomer])
    with user(db, newcomer):
        made = one(db, "insert into projects (owner_id, name) values (%s, 'mine') returning id", [newcomer])
        assert upsert(db, made, "a", "mine")["revision"] == 1
        assert db.execute("update projects set name = 'x' where id = %s", [project.id]).rowcount == 0
        assert db.execute("delete from projects where id = %s", [project.id]).rowcount == 0
    with user(db, project.collaborator):
        assert db.execute("delete from projects where id = %s", [project.id]).rowcount == 0
    with user(db, project.owner):
        assert db.execute("delete from projects where id = %s", [project.id]).rowcount == 1


# --------------------------------------------------------------------------------------------------- realtime


def hears(db: Db, topic: str, role: str, **claims: object) -> int:
    """How many messages of `topic` a subscriber with these claims would be let to."""
    with acting_as(db, role, **claims):
        db.execute("select set_config('realtime.topic', %s, true)", [topic])
        shown = db.execute("select topic from realtime.messages").fetchall()
        assert {row[0] for row in shown} <= {topic}
        return len(shown)


def test_a_container_hears_its_own_project_only(db: Db, filled: Project) -> None:
    other = make_project(db)
    upsert(db, other.id, "a", "theirs")
    mine, theirs = f"project:{filled.id}", f"project:{other.id}"
    assert hears(db, mine, "preview_agent", project_id=filled.id) == 2
    assert hears(db, theirs, "preview_agent", project_id=filled.id) == 0
    assert hears(db, mine, "preview_agent") == 0
    db.execute("insert into realtime.messages (topic, extension) values (%s, 'presence')", [mine])
    assert hears(db, mine, "preview_agent", project_id=filled.id) == 2
    for statement in (
        "insert into realtime.messages (topic, extension) values ('x', 'broadcast')",
        "update realtime.messages set payload = '{}'",
        "delete from realtime.messages",
    ):
        with pytest.raises(InsufficientPrivilege), acting_as(db, "preview_agent", project_id=filled.id):
            db.execute(statement.encode())
    with acting_as(db, "preview_agent", project_id=filled.id):  # `send` only warns
        db.execute("select realtime.send('{}', 'file:update', %s)", [mine])
    assert len(messages(db, filled.id)) == 2


def test_members_hear_their_projects_and_send_nothing(db: Db, filled: Project) -> None:
    topic = f"project:{filled.id}"
    for member in (filled.owner, filled.collaborator):
        assert hears(db, topic, "authenticated", sub=member, session_id=uuid.uuid4()) == 2
    assert hears(db, topic, "authenticated", sub=filled.stranger) == 0
    assert hears(db, topic, "anon") == 0
    for odd in (
        "project:",
        "project:x",
        "x",
        f"project:{filled.id}0",
        "project:------------------------------------",
    ):
        assert hears(db, odd, "authenticated", sub=filled.owner) == 0
    with pytest.raises(InsufficientPrivilege), user(db, filled.owner):
        db.execute("insert into realtime.messages (topic, extension) values (%s, 'broadcast')", [topic])


def test_members_have_a_topic_of_their_own_and_containers_do_not(db: Db, filled: Project) -> None:
    topic = f"preview:{filled.id}"
    one(db, "select preview.publish(%s, 'preview:status', %s::jsonb)", [topic, '{"shown": 2}'])
    other = make_project(db)
    for member in (filled.owner, filled.collaborator):
        assert hears(db, topic, "authenticated", sub=member, session_id=uuid.uuid4()) == 1
        assert hears(db, f"preview:{other.id}", "authenticated", sub=member) == 0
    assert hears(db, topic, "authenticated", sub=filled.stranger) == 0
    assert hears(db, topic, "anon") == 0
    assert hears(db, topic, "preview_agent", project_id=filled.id) == 0
    assert hears(db, topic, "authenticated", sub=filled.owner, project_id=filled.id) == 0
    for odd in ("preview:", f"preview:{filled.id}0", f"preview:project:{filled.id}", f"xpreview:{filled.id}"):
        assert hears(db, odd, "authenticated", sub=filled.owner) == 0
    with pytest.raises(InsufficientPrivilege), user(db, filled.owner):
        db.execute("insert into realtime.messages (topic, extension) values (%s, 'broadcast')", [topic])
    with pytest.raises(InsufficientPrivilege), user(db, filled.owner):
        one(db, "select preview.publish(%s, 'preview:status', '{}')", [topic])


def test_a_containers_token_with_the_role_authenticated_gets_its_topic_and_nothing_else(
    db: Db, filled: Project
) -> None:
    claims = {"sub": filled.owner, "project_id": filled.id, "session_id": uuid.uuid4()}
    assert hears(db, f"project:{filled.id}", "authenticated", **claims) == 2
    other = make_project(db)
    upsert(db, other.id, "a", "theirs")
    assert hears(db, f"project:{other.id}", "authenticated", **claims | {"sub": other.owner}) == 0
    with acting_as(db, "authenticated", **claims):
        assert [count(db, table) for table in READABLE] == [0] * len(READABLE)
        assert one(db, "select count(*) from public.user_profiles") == 0
        assert one(db, "select count(*) from public.project_snapshots") == 0
    for name in ("upsert_project_file", "apply_project_files", "changes_since", "create_project_snapshot"):
        with pytest.raises(psycopg.Error) as error, acting_as(db, "authenticated", **claims):
            db.execute(RPCS[name].format(id=filled.id).encode())
        assert error.value.sqlstate == "PT404"


# --------------------------------------------------------------------------------------------------- storage


def test_assets_belong_to_their_project_and_snapshots_to_the_service(db: Db, project: Project) -> None:
    name, other = f"{project.id}/{'a' * 64}", f"{uuid.uuid4()}/{'a' * 64}"
    new = "insert into storage.objects (bucket_id, name) values (%s, %s)"
    with user(db, project.collaborator):
        db.execute(new, ["project-assets", name])
        assert one(db, "select count(*) from storage.objects") == 1
    for bucket, wrong in (
        ("project-assets", other),
        ("project-assets", f"{project.id}/x.png"),
        ("project-snapshots", f"{project.id}/s.zip"),
    ):
        with pytest.raises(InsufficientPrivilege), user(db, project.owner):
            db.execute(new, [bucket, wrong])
    with user(db, project.owner):
        assert db.execute("update storage.objects set metadata = '{}'").rowcount == 0
        assert db.execute("delete from storage.objects").rowcount == 0
    with acting_as(db, "service_role"):
        db.execute(new, ["project-snapshots", f"{project.id}/s.zip"])
    for someone in (project.stranger, project.owner):
        with user(db, someone):
            seen = db.execute("select name from storage.objects").fetchall()
            assert seen == ([(name,)] if someone == project.owner else [])
    buckets = db.execute("select id, public from storage.buckets order by id").fetchall()
    names = ("preview-bundles", "preview-modules", "project-assets", "project-snapshots")
    assert buckets == [(name, False) for name in names]


# --------------------------------------------------------------------------------------------------- the whole catalog


def test_nothing_of_ours_is_open_to_anon_or_containers(db: Db) -> None:
    for role in ("anon", "preview_agent"):
        relations = db.execute(
            "select c.oid::regclass::text from pg_class c where c.relkind in ('r', 'v', 'm', 'p', 'S')"
            " and c.relnamespace in ('public'::regnamespace, 'preview'::regnamespace)"
            " and (case when c.relkind = 'S' then has_sequence_privilege(%(r)s, c.oid, 'usage, select, update')"
            "      else has_table_privilege(%(r)s, c.oid,"
            "             'select, insert, update, delete, truncate, references, trigger')"
            "           or has_any_column_privilege(%(r)s, c.oid, 'select, insert, update, references') end)",
            {"r": role},
        ).fetchall()
        functions = db.execute(
            "select p.oid::regprocedure::text from pg_proc p where has_function_privilege(%(r)s, p.oid, 'execute')"
            " and p.pronamespace in ('public'::regnamespace, 'preview'::regnamespace)",
            {"r": role},
        ).fetchall()
        assert (relations, functions) == ([], []), role
        assert one(db, "select has_schema_privilege(%s, 'preview', 'usage')", [role]) is False


def test_the_definer_functions_for_users_answer_about_the_caller_alone(db: Db) -> None:
    """Policies ask them, since a product's own tables may be closed to users; the API does not expose their schema."""
    found = db.execute(
        "select p.oid::regprocedure::text from pg_proc p where p.prosecdef"
        " and p.pronamespace in ('public'::regnamespace, 'preview'::regnamespace)"
        " and (has_function_privilege('anon', p.oid, 'execute')"
        "      or has_function_privilege('authenticated', p.oid, 'execute')) order by 1"
    ).fetchall()
    assert found == [
        ("preview.allows(uuid,text)",),
        ("preview.my_projects()",),
        ("preview.owns(uuid)",),
        # The one that does not: a number of `preview.settings`, from which on changes travel as splices.
        ("preview.patches_above()",),
    ]


def test_users_reach_only_the_doors_in_the_hidden_schema_and_read_turns(db: Db) -> None:
    found = db.execute(
        "select c.relname from pg_class c where c.relnamespace = 'preview'::regnamespace and c.relkind in ('r', 'v')"
        " and (has_any_column_privilege('authenticated', c.oid, 'select, insert, update')"
        "      or has_table_privilege('authenticated', c.oid, 'delete'))"
        " order by 1"
    ).fetchall()
    readable = {"checkpoints", "kept_changes", "project_write_back", "turn_changes", "turns"}
    assert {name for (name,) in found} == readable | {
        "history_gate",
        "rename_gate",
        "turn_gate",
        "write_back_gate",
        "write_gate",
    }
    for table in readable:
        writes = "select has_any_column_privilege('authenticated', %s, 'insert, update')"
        assert one(db, writes, [f"preview.{table}"]) is False


def test_an_agent_can_be_named_by_a_token(db: Db) -> None:
    assert one(db, "select pg_has_role('authenticator', 'preview_agent', 'member')") is True
    assert one(db, "select rolcanlogin from pg_roles where rolname = 'preview_agent'") is False


def test_reading_what_became_of_a_project_is_for_members(db: Db, filled: Project) -> None:
    epoch, _ = head(db, filled.id)
    with user(db, filled.collaborator):
        assert changes_since(db, filled.id, epoch, 1)["kind"] == "changes"
        delete(db, filled.id, "a")
