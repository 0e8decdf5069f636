"""What a container offers: judged, written, kept or refused in the database, whatever the orchestrator let pass."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from orchestrator_stub.doctor.database import MAY_BECOME_WRITER
from tests.contract.golden import DIRECTORY
from tests.database.db import (
    Json,
    Project,
    acting_as,
    apply,
    connect,
    delete,
    files,
    head,
    make_project,
    messages,
    one,
    upsert,
    user,
)
from tests.database.test_writing import refused, sha

Db = psycopg.Connection[Any]

GLOBS = json.loads((Path(DIRECTORY).parent / "globs.json").read_text())
RULES = [
    {"glob": "package-lock.json", "mode": "generated"},
    {"glob": "gen/**", "mode": "generated", "max_bytes": 100, "deletes": True},
    {"glob": "src/**", "mode": "authored"},
]


@pytest.fixture
def on(db: Db, project: Project) -> Project:
    """A project with rules."""
    with user(db, project.owner):
        one(db, "select set_write_back(%s, %s::jsonb)", [project.id, json.dumps(RULES)])
    return project


def session_of(db: Db, project: Project, state: str = "ready") -> uuid.UUID:
    found: uuid.UUID = one(
        db,
        "insert into preview.sessions (project_id, state, expires_at) values (%s, %s, now() + interval '1 hour')"
        " returning id",
        [project.id, state],
    )
    return found


@contextmanager
def writer(db: Db) -> Iterator[None]:
    """The orchestrator's role for offers, and for nothing else."""
    with db.transaction():
        db.execute("set local role preview_writer")
        yield


def change(path: str, content: str | None, base: int = 0, **more: object) -> Json:
    action = "delete" if content is None else "upsert"
    return {"action": action, "file_path": path, "content": content, "base_version": base, **more}


def offer(
    db: Db, session: uuid.UUID, *changes: Json, epoch: str | None = None, generation: int = 1, id: str = ""
) -> Json:
    if epoch is None:
        epoch = one(
            db,
            "select epoch::text from project_heads join preview.sessions using (project_id) where id = %s",
            [session],
        )
    with writer(db):
        answer: Json = one(
            db,
            "select preview.write_back(%s, %s, %s, %s, %s::jsonb)",
            [session, generation, id or str(uuid.uuid4()), epoch, json.dumps(changes)],
        )
    return answer


def outcomes(answer: Json) -> list[tuple[str, str | None]]:
    return [(r["outcome"], r.get("rule")) for r in answer["results"]]


@pytest.mark.parametrize("case", GLOBS["matching"], ids=lambda case: str(case["glob"]))
def test_globs_match_what_both_sides_agreed_on(db: Db, case: dict[str, Any]) -> None:
    matches = "select p ~ preview.glob_pattern(%s) from unnest(%s::text[]) with ordinality u(p, n) order by n"
    for paths, expected in ((case["matches"], True), (case["misses"], False)):
        found = [row[0] for row in db.execute(matches, [case["glob"], paths]).fetchall()]
        assert dict(zip(paths, found, strict=True)) == dict.fromkeys(paths, expected)
    assert one(db, "select preview.glob_problem(%s)", [case["glob"]]) is None


@pytest.mark.parametrize("glob", GLOBS["refused"])
def test_what_is_no_glob_is_refused_by_name(db: Db, project: Project, glob: str) -> None:
    rules = json.dumps([{"glob": "a", "mode": "generated"}, {"glob": glob, "mode": "generated"}])
    with pytest.raises(psycopg.Error) as error, user(db, project.owner):
        one(db, "select set_write_back(%s, %s::jsonb)", [project.id, rules])
    refused(error, "PT400", "p_rules[1].glob")


@pytest.mark.parametrize(
    "rules",
    [
        "null", "{}", '["a"]', '[{"mode": "generated"}]', '[{"glob": "a"}]', '[{"glob": "a", "mode": "x"}]',
        '[{"glob": "a", "mode": "generated", "max_bytes": 0}]',
        '[{"glob": "a", "mode": "generated", "max_bytes": 1048577}]',
        '[{"glob": "a", "mode": "generated", "max_bytes": "1"}]',
        '[{"glob": "a", "mode": "generated", "deletes": 1}]',
        '[{"glob": "a", "mode": "generated"}, {"glob": "a", "mode": "authored"}]',
        json.dumps([{"glob": f"a{n}", "mode": "generated"} for n in range(51)]),
    ],
)  # fmt: skip
def test_rules_that_are_none_change_nothing(db: Db, on: Project, rules: str) -> None:
    with pytest.raises(psycopg.Error) as error, user(db, on.owner):
        one(db, "select set_write_back(%s, %s::jsonb)", [on.id, rules])
    refused(error, "PT400", "p_rules")
    assert one(db, "select count(*) from preview.project_write_back") == len(RULES)


def test_off_is_the_default_and_the_kill_switch(db: Db, project: Project) -> None:
    session = session_of(db, project)
    made = change("package-lock.json", "{}")
    assert outcomes(offer(db, session, made)) == [("refused", "off")]
    with user(db, project.owner):
        one(db, "select set_write_back(%s, %s::jsonb)", [project.id, json.dumps(RULES)])
        assert [row[0] for row in db.execute("select glob from list_write_back(%s)", [project.id])] == [
            rule["glob"] for rule in RULES
        ]
    plain = "select revision, plain from preview.run_settings"
    assert db.execute(plain.encode()).fetchall() == [(1, {"write_back": True})]
    db.execute('update preview.sessions set run = \'{"plain": {"write_back": false}, "sealed": {}}\'')
    assert outcomes(offer(db, session, made)) == [("refused", "off")], "a session's own setting wins"
    db.execute("update preview.sessions set run = null")
    assert outcomes(offer(db, session, made)) == [("applied", None)]
    with user(db, project.owner):
        one(db, "select set_write_back(%s, '[]'::jsonb)", [project.id])
    assert db.execute(plain.encode()).fetchall() == [(2, {"write_back": False})]
    assert outcomes(offer(db, session, change("package-lock.json", "{ }", 1))) == [("refused", "off")]


def test_an_offer_becomes_one_commit_that_says_where_it_came_from(db: Db, on: Project) -> None:
    session = session_of(db, on)
    upsert(db, on.id, "gen/a", "1")
    answer = offer(
        db, session, change("gen/a", "2", 1), change("gen/b", "new", executable=True), change("gen/c", None)
    )
    assert outcomes(answer) == [("applied", None), ("applied", None), ("same", None)]
    assert [(r.get("version"), r.get("revision")) for r in answer["results"]] == [(2, 2), (1, 2), (0, 0)]
    assert (answer["epoch"], answer["revision"]) == head(db, on.id)
    assert files(db, on.id) == {"gen/a": sha("2"), "gen/b": sha("new")}
    event, payload = messages(db, on.id)[-1]
    assert (event, payload["sender"]) == ("bulk:apply", f"container:{session}")
    rows = db.execute(
        "select origin, session_id, executable from project_files where revision = 2 order by file_path"
    )
    assert rows.fetchall() == [("container", session, False), ("container", session, True)]
    offer(db, session, change("gen/a", None, 2))
    event, payload = messages(db, on.id)[-1]
    assert (event, payload["sender"]) == ("file:delete", f"container:{session}")
    # What the container has already is nothing new.
    again = offer(db, session, change("gen/b", "new", 1))
    assert again["results"] == [{"file_path": "gen/b", "outcome": "same", "version": 1, "revision": 2}]
    assert head(db, on.id)[1] == 3


def test_what_rules_do_not_say_is_refused_by_name(db: Db, on: Project) -> None:
    session = session_of(db, on)
    upsert(db, on.id, "package-lock.json", "1")
    answer = offer(
        db, session, change("index.html", "x"), change("../x", "x"), change("node_modules/a", "x"),
        change("gen/large", "x" * 101), change("package-lock.json", None, 1), change("gen/fits", "x" * 100),
    )  # fmt: skip
    assert outcomes(answer) == [
        ("refused", "glob"), ("refused", "path"), ("refused", "path"), ("refused", "size"),
        ("refused", "deletes"), ("applied", None),
    ]  # fmt: skip
    assert set(files(db, on.id)) == {"package-lock.json", "gen/fits"}


def test_a_person_is_never_overwritten_and_the_tools_output_is_kept(db: Db, on: Project) -> None:
    session = session_of(db, on)
    upsert(db, on.id, "gen/a", "1")
    with user(db, on.owner):
        upsert(db, on.id, "gen/a", "by a person")
    answer = offer(db, session, change("gen/a", "by a tool", 1))
    assert outcomes(answer) == [("conflict", None)]
    kept = answer["results"][0]["kept_id"]
    assert files(db, on.id) == {"gen/a": sha("by a person")}
    assert offer(db, session, change("gen/a", "by a tool", 1))["results"][0]["kept_id"] == kept, "kept once"
    assert "kept_id" not in offer(db, session, change("gen/a", "1", 0))["results"][0], (
        "that is in the history"
    )
    assert outcomes(offer(db, session, change("gen/a", None, 1))) == [("refused", "base")]
    with user(db, on.collaborator):
        listed = (
            "select kept_id::text, file_path, content, base_version, current_version from list_conflicts(%s)"
        )
        assert db.execute(listed.encode(), [on.id]).fetchall() == [(kept, "gen/a", None, 1, 2)]
        whole = "select content from list_conflicts(%s, %s)"
        assert one(db, whole, [on.id, kept]) == "by a tool"
        answer = one(db, "select resolve_conflict(%s, %s, 'kept')", [on.id, kept])
    assert (answer["state"], answer["version"]) == ("taken", 3)
    assert files(db, on.id) == {"gen/a": sha("by a tool")}
    row = db.execute("select origin, session_id, created_by from project_files where version = 3").fetchone()
    assert row == ("user", session, on.collaborator)
    with pytest.raises(psycopg.Error) as error, user(db, on.owner):
        one(db, "select resolve_conflict(%s, %s, 'current')", [on.id, kept])
    refused(error, "PT410", "decided already")


def test_the_current_side_of_a_conflict_can_be_taken(db: Db, on: Project) -> None:
    session = session_of(db, on)
    upsert(db, on.id, "gen/a", "1")
    kept = offer(db, session, change("gen/a", "2", 0))["results"][0]["kept_id"]
    with user(db, on.owner):
        assert one(db, "select resolve_conflict(%s, %s, 'current')", [on.id, kept])["state"] == "dropped"
        assert one(db, "select count(*) from list_conflicts(%s)", [on.id]) == 0
    assert files(db, on.id) == {"gen/a": sha("1")}
    assert one(db, "select content from preview.kept_changes") is None


def test_what_people_write_is_proposed_and_they_decide(db: Db, on: Project) -> None:
    session = session_of(db, on)
    upsert(db, on.id, "src/a.ts", "1")
    answer = offer(db, session, change("src/a.ts", "2", 1), change("src/new.ts", "new"))
    assert outcomes(answer) == [("proposed", None)] * 2
    first, second = (r["kept_id"] for r in answer["results"])
    assert head(db, on.id)[1] == 1, "nothing is written"
    # The tool goes on: what it proposed before gives way.
    newer = offer(db, session, change("src/a.ts", "3", 1))["results"][0]["kept_id"]
    with user(db, on.collaborator):
        assert {str(row[0]) for row in db.execute("select kept_id from list_proposals(%s)", [on.id])} == {
            newer, second,
        }  # fmt: skip
        assert one(db, "select accept_proposal(%s, %s)", [on.id, newer])["version"] == 2
        assert one(db, "select reject_proposal(%s, %s)", [on.id, second])["state"] == "dropped"
    with pytest.raises(psycopg.Error) as error, user(db, on.owner):
        one(db, "select accept_proposal(%s, %s)", [on.id, first])
    refused(error, "PT410", "replaced")
    assert files(db, on.id) == {"src/a.ts": sha("3")}
    assert messages(db, on.id)[-1][1]["sender"] == str(on.collaborator)
    assert outcomes(offer(db, session, change("src/new.ts", "new"))) == [("refused", "rejected")]


def told(db: Db, project: Project) -> list[Json]:
    """What members heard of what waits for them, oldest first."""
    rows = db.execute(
        "select payload - 'id' from realtime.messages where topic = %s and event = 'write_back:kept' and private"
        " order by inserted_at",
        [f"preview:{project.id}"],
    ).fetchall()
    return [payload for (payload,) in rows]


def test_members_hear_that_something_waits_and_that_it_was_decided(db: Db, on: Project) -> None:
    """Once a transaction, whatever is in it; nothing of an offer that keeps nothing."""
    session = session_of(db, on)
    answer = offer(db, session, *(change(f"src/{n}.ts", "new") for n in range(3)))
    assert told(db, on) == [{"proposals": 3, "conflicts": 0}]
    offer(db, session, change("src/0.ts", "new"))
    offer(db, session, change("gen/a", "1"))
    assert len(told(db, on)) == 1, "kept already, and written"
    upsert(db, on.id, "gen/a", "by a person")
    offer(db, session, change("gen/a", "by a tool", 1))
    assert told(db, on)[1:] == [{"proposals": 3, "conflicts": 1}]
    with user(db, on.owner):
        one(db, "select reject_proposal(%s, %s)", [on.id, answer["results"][0]["kept_id"]])
    assert told(db, on)[2:] == [{"proposals": 2, "conflicts": 1}]
    assert not [event for event, _ in messages(db, on.id) if event == "write_back:kept"], (
        "containers hear none of it"
    )


def test_a_proposal_whose_file_changed_is_accepted_by_force_alone(db: Db, on: Project) -> None:
    session = session_of(db, on)
    upsert(db, on.id, "src/a.ts", "1")
    kept = offer(db, session, change("src/a.ts", "2", 1))["results"][0]["kept_id"]
    upsert(db, on.id, "src/a.ts", "meanwhile")
    with pytest.raises(psycopg.Error) as error, user(db, on.owner):
        one(db, "select accept_proposal(%s, %s)", [on.id, kept])
    refused(error, "PT409", "expected_version")
    with user(db, on.owner):
        one(db, "select accept_proposal(%s, %s, true)", [on.id, kept])
    assert files(db, on.id) == {"src/a.ts": sha("2")}


def test_a_deletion_can_be_proposed(db: Db, project: Project) -> None:
    rules = json.dumps([{"glob": "src/**", "mode": "authored", "deletes": True}])
    one(db, "select set_write_back(%s, %s::jsonb)", [project.id, rules])
    session = session_of(db, project)
    upsert(db, project.id, "src/a.ts", "1")
    kept = offer(db, session, change("src/a.ts", None, 1))["results"][0]["kept_id"]
    with user(db, project.owner):
        one(db, "select accept_proposal(%s, %s)", [project.id, kept])
    assert files(db, project.id) == {}


def test_the_same_offer_again_is_the_same_answer(db: Db, on: Project) -> None:
    session, other = session_of(db, on), session_of(db, on)
    first = offer(db, session, change("gen/a", "1"), id="x")
    upsert(db, on.id, "gen/a", "2")
    assert offer(db, session, change("gen/a", "1"), id="x") == first
    assert head(db, on.id)[1] == 2
    with pytest.raises(psycopg.Error) as error:
        offer(db, session, change("gen/a", "another"), id="x")
    refused(error, "PT422", "another request")
    assert outcomes(offer(db, other, change("gen/b", "1"), id="x")) == [("applied", None)], "its own ids"


def test_another_generation_or_history_writes_nothing(db: Db, on: Project) -> None:
    session = session_of(db, on)
    made = change("gen/a", "1")
    epoch = one(db, "select epoch::text from project_heads where project_id = %s", [on.id])
    assert outcomes(offer(db, session, made, epoch=epoch, generation=2)) == [("refused", "generation")]
    assert outcomes(offer(db, session, made, epoch=str(uuid.uuid4()))) == [("refused", "epoch")]
    for over in ("draining", "gone", "failed"):
        with pytest.raises(psycopg.Error) as error:
            offer(db, session_of(db, on, over), made, epoch=epoch)
        refused(error, "PT410", "over")
    with pytest.raises(psycopg.Error) as error:
        offer(db, uuid.uuid4(), made, epoch=epoch)
    refused(error, "PT410", "over")


def test_what_a_path_held_may_come_back_after_a_person_wrote(db: Db, on: Project) -> None:
    """A route is added and taken away again: the generated tree is what it was."""
    session = session_of(db, on)
    for version, (route, tree) in enumerate((("/", "1"), ("/ /a", "2"), ("/", "1"))):
        upsert(db, on.id, "src/routes.ts", route)
        assert outcomes(offer(db, session, change("gen/tree", tree, version))) == [("applied", None)]
        assert outcomes(offer(db, session, change("gen/tree", "0", version + 1))) == [("applied", None)]
        assert outcomes(offer(db, session, change("gen/tree", tree, version + 2))) == [
            ("refused", "came_before")
        ]
        upsert(db, on.id, "gen/tree", tree)
        db.execute("delete from project_files where file_path = 'gen/tree' and not is_current_version")
        db.execute("update project_files set version = %s where file_path = 'gen/tree'", [version + 1])


def test_offers_have_a_rate_of_their_own(db: Db, on: Project) -> None:
    db.execute("update preview.settings set offers_per_minute = 3, writes_per_minute = 2")
    session = session_of(db, on)
    for n in range(3):
        assert outcomes(offer(db, session, change("gen/a", str(n), n))) == [("applied", None)]
    with pytest.raises(psycopg.Error) as error:
        offer(db, session_of(db, on), change("gen/a", "x", 3))
    refused(error, "PT429", "offers in a minute")
    assert 15 <= json.loads(error.value.diag.message_detail or "")["retry_after"] <= 20
    upsert(db, on.id, "gen/a", "a person goes on")
    db.execute("update preview.write_back_state set refilled_at = refilled_at - interval '20 seconds'")
    assert outcomes(offer(db, session, change("gen/b", "x"))) == [("applied", None)]


def test_what_is_kept_is_bounded_and_forgotten(db: Db, on: Project) -> None:
    db.execute("update preview.settings set max_kept_changes = 2")
    session = session_of(db, on)
    answer = offer(db, session, *(change(f"src/{n}", "x") for n in range(3)))
    assert outcomes(answer) == [("proposed", None), ("proposed", None), ("refused", "full")]
    db.execute("update preview.settings set max_kept_changes = 200, max_kept_bytes = 10")
    assert outcomes(offer(db, session, change("src/3", "x" * 9))) == [("refused", "full")]
    assert outcomes(offer(db, session, change("src/3", "x" * 8))) == [("proposed", None)]
    assert one(db, "select preview.forget_kept()") == 0
    db.execute("update preview.kept_changes set created_at = created_at - interval '31 days'")
    assert one(db, "select preview.forget_kept(2)") == 2
    assert one(db, "select preview.forget_kept(2)") == 1
    offer(db, session, change("src/4", "x"))
    db.execute("delete from public.projects where id = %s", [on.id])
    for table in ("kept_changes", "project_write_back", "write_back_state"):
        assert one(db, f"select count(*) from preview.{table}") == 0


def test_one_file_in_the_way_does_not_keep_the_others_from_being_taken(db: Db, on: Project) -> None:
    session = session_of(db, on)
    upsert(db, on.id, "gen/file", "1")
    answer = offer(db, session, change("gen/file/below", "x"), change("gen/b", "x"), change("gen/c", "x"))
    assert outcomes(answer) == [("refused", "path"), ("applied", None), ("applied", None)]
    db.execute("update preview.settings set max_project_files = 3")
    assert outcomes(offer(db, session, change("gen/d", "x"))) == [("refused", "project_full")]


def test_many_deletions_at_once_are_an_accident(db: Db, on: Project) -> None:
    session = session_of(db, on)
    apply(db, on.id, [{"file_path": f"gen/{n}", "content": str(n)} for n in range(10)])
    all_at_once = [change(f"gen/{n}", None, 1) for n in range(4)]
    assert outcomes(offer(db, session, *all_at_once)) == [("refused", "deletes")] * 4
    assert outcomes(offer(db, session, *all_at_once[:2])) == [("applied", None)] * 2


def test_an_offer_is_no_larger_than_agreed(db: Db, on: Project) -> None:
    with pytest.raises(psycopg.Error) as error:
        offer(db, session_of(db, on), *(change(f"gen/{n}", "x") for n in range(51)))
    refused(error, "PT413", "50 files")


# --------------------------------------------------------------------------------------------------- who may


def test_the_writers_role_may_execute_one_function_and_nothing_else(db: Db) -> None:
    functions = db.execute(
        "select oid::regprocedure::text from pg_proc where has_function_privilege('preview_writer', oid, 'execute')"
        " and pronamespace in ('public'::regnamespace, 'preview'::regnamespace)"
    ).fetchall()
    assert functions == [("preview.write_back(uuid,integer,text,text,jsonb)",)]
    relations = db.execute(
        "select oid::regclass::text from pg_class where relkind in ('r', 'v', 'm', 'p')"
        " and relnamespace in ('public'::regnamespace, 'preview'::regnamespace)"
        " and (has_table_privilege('preview_writer', oid, 'select, insert, update, delete, truncate')"
        "      or has_any_column_privilege('preview_writer', oid, 'select, insert, update'))"
    ).fetchall()
    assert relations == []
    for role in ("anon", "authenticated", "service_role", "preview_agent"):
        assert (
            one(
                db,
                "select has_function_privilege(%s, oid, 'execute') from pg_proc where proname = 'write_back'",
                [role],
            )
            is False
        )
    with pytest.raises(psycopg.errors.InsufficientPrivilege), acting_as(db, "preview_writer"):
        pass  # no token can name it
    flags = db.execute(
        "select rolcanlogin, rolsuper, rolbypassrls, rolcreaterole from pg_roles where rolname = 'preview_writer'"
    ).fetchone()
    assert flags == (False,) * 4


def test_the_doctor_knows_who_may_become_the_writer(db: Db) -> None:
    assert one(db, MAY_BECOME_WRITER) is True
    for role in ("authenticated", "service_role"):
        with acting_as(db, role):
            assert one(db, MAY_BECOME_WRITER) is False


def test_rules_are_the_owners_and_the_services(db: Db, on: Project) -> None:
    none = "select set_write_back(%s, '[]'::jsonb)"
    with pytest.raises(psycopg.Error) as error, user(db, on.collaborator):
        one(db, none, [on.id])
    refused(error, "PT403", "only its owner")
    for claims in ({"sub": on.stranger}, {"sub": on.owner, "project_id": on.id}, {}):
        with pytest.raises(psycopg.Error) as error, acting_as(db, "authenticated", **claims):
            one(db, none, [on.id])
        refused(error, "PT404", "project_uuid")
    assert one(db, "select count(*) from preview.project_write_back") == len(RULES)
    with acting_as(db, "service_role"):
        one(db, none, [on.id])
    assert one(db, "select count(*) from preview.project_write_back") == 0
    with pytest.raises(psycopg.Error) as error, acting_as(db, "service_role"):
        one(db, none, [uuid.uuid4()])
    refused(error, "PT404", "no such project")


def test_strangers_and_containers_see_and_decide_nothing(db: Db, on: Project) -> None:
    session = session_of(db, on)
    upsert(db, on.id, "gen/a", "1")
    answer = offer(db, session, change("gen/a", "2"), change("src/a", "2"))
    conflict, proposal = (r["kept_id"] for r in answer["results"])
    decisions: list[Callable[[], Any]] = [
        lambda: one(db, "select resolve_conflict(%s, %s, 'kept')", [on.id, conflict]),
        lambda: one(db, "select accept_proposal(%s, %s)", [on.id, proposal]),
        lambda: one(db, "select reject_proposal(%s, %s)", [on.id, proposal]),
        lambda: one(db, "select count(*) from list_conflicts(%s)", [on.id]),
        lambda: one(db, "select count(*) from list_proposals(%s)", [on.id]),
        lambda: one(db, "select count(*) from list_write_back(%s)", [on.id]),
    ]
    for claims in ({"sub": on.stranger}, {"sub": on.owner, "project_id": on.id}, {}):
        for decide in decisions:
            with pytest.raises(psycopg.Error) as error, acting_as(db, "authenticated", **claims):
                decide()
            refused(error, "PT404", "project_uuid")
        for table in ("kept_changes", "project_write_back"):
            with acting_as(db, "authenticated", **claims):
                assert one(db, f"select count(*) from preview.{table}") == 0
    other = make_project(db)
    with pytest.raises(psycopg.Error) as error, user(db, other.owner):
        one(db, "select resolve_conflict(%s, %s, 'kept')", [other.id, conflict])
    refused(error, "PT404", "kept_id")
    with pytest.raises(psycopg.Error) as error, user(db, on.owner):
        one(db, "select accept_proposal(%s, %s)", [on.id, conflict])
    refused(error, "PT404", "kept_id")
    for statement in (
        "delete from preview.kept_changes",
        "insert into preview.project_write_back values (null, 'a', 1, 'generated', 1, false)",
        "update preview.write_back_state set tokens = 9",
        "update preview.write_back_gate set answer = '{}'",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), user(db, on.owner):
            db.execute(statement.encode())
    assert files(db, on.id) == {"gen/a": sha("1")}


def test_bad_arguments_are_named(db: Db, on: Project) -> None:
    for call, names in {
        "set_write_back(null, '[]')": "project_uuid",
        f"resolve_conflict('{on.id}', null, 'kept')": "kept_id",
        f"resolve_conflict('{on.id}', gen_random_uuid(), 'mine')": "p_take",
        f"resolve_conflict('{on.id}', gen_random_uuid(), null)": "p_take",
        f"accept_proposal('{on.id}', null)": "kept_id",
    }.items():
        with pytest.raises(psycopg.Error) as error, user(db, on.owner):
            one(db, f"select {call}")
        refused(error, "PT400", names)


def test_a_tombstone_may_be_written_again(db: Db, on: Project) -> None:
    session = session_of(db, on)
    upsert(db, on.id, "gen/a", "1")
    delete(db, on.id, "gen/a")
    assert outcomes(offer(db, session, change("gen/a", "2", 0))) == [("applied", None)]
    delete(db, on.id, "gen/a")
    assert outcomes(offer(db, session, change("gen/a", "3", 4))) == [("applied", None)]


def test_two_offers_at_once_are_one_after_the_other(database: str, db: Db, on: Project) -> None:
    """The head's lock decides; the later one finds another version than its base."""
    sessions = [session_of(db, on), session_of(db, on)]
    epoch = head(db, on.id)[0]
    with connect(database) as other, other.transaction():
        other.execute("select from project_heads where project_id = %s for no key update", [on.id])
        with db.transaction():
            db.execute("set local lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable), db.transaction():
                offer(db, sessions[0], change("gen/a", "x"), epoch=epoch)
    answers = [offer(db, session, change("gen/a", str(n), 0)) for n, session in enumerate(sessions)]
    assert [outcomes(answer)[0][0] for answer in answers] == ["applied", "conflict"]
