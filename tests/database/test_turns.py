"""Turns: what is written in one appears at its end, as one commit, or not at all."""

from __future__ import annotations

from typing import Any

import psycopg
import pytest

from tests.database.db import (
    Json,
    Project,
    abandon,
    apply,
    begin,
    changes_since,
    delete,
    end,
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


def shown(db: Db, project: Project, turn: str) -> dict[str, tuple[str | None, int]]:
    """The tree as the turn's writers see it: path → content and version."""
    rows = db.execute(
        "select file_path, content, version from public.list_current_files(%s, %s)", [project.id, turn]
    )
    return {path: (content, version) for path, content, version in rows.fetchall()}


def state(db: Db, turn: str) -> str | None:
    row = db.execute("select state from preview.turns where id = %s", [turn]).fetchone()
    return row[0] if row else None


# -------------------------------------------------------------------------------- the way it goes


def test_nothing_is_seen_before_the_end_and_then_all_of_it(db: Db, project: Project) -> None:
    upsert(db, project.id, "old", "x")
    upsert(db, project.id, "kept", "k")
    before = files(db, project.id), head(db, project.id), messages(db, project.id)
    with user(db, project.owner):
        turn = begin(db, project.id, "a landing page")
        answer = upsert(db, project.id, "src/page.tsx", "page", turn=turn)
        assert answer.pop("expires_at") > answer.pop("turn_id")[:0]
        assert answer == {"staged": True, "file_path": "src/page.tsx", "base_version": 0}
        assert delete(db, project.id, "old", turn=turn)["base_version"] == 1
        bulk = apply(
            db,
            project.id,
            [
                {"file_path": "run.sh", "content": "#!", "executable": True},
                {"file_path": "kept", "content": "2"},
            ],
            turn=turn,
        )
        assert {f["file_path"]: f["base_version"] for f in bulk["files"]} == {"run.sh": 0, "kept": 1}
        assert shown(db, project, turn) == {
            "src/page.tsx": ("page", 0),
            "run.sh": ("#!", 0),
            "kept": ("2", 1),
        }
    assert (files(db, project.id), head(db, project.id), messages(db, project.id)) == before
    with user(db, project.owner):
        answer = end(db, project.id, turn)
    assert (answer["revision"], answer["changed"]) == (3, 4)
    assert files(db, project.id) == {
        path: sha(t) for path, t in [("src/page.tsx", "page"), ("run.sh", "#!"), ("kept", "2")]
    }
    event, payload = messages(db, project.id)[-1]
    assert (event, payload["turn"], payload["label"], payload["revision"]) == (
        "bulk:apply",
        turn,
        "a landing page",
        3,
    )
    assert payload["sender"] == str(project.owner)
    assert [(f["action"], f["file_path"]) for f in payload["files"]] == [
        ("update", "kept"),
        ("delete", "old"),
        ("update", "run.sh"),
        ("update", "src/page.tsx"),
    ]
    assert len(messages(db, project.id)) == 3
    assert one(db, "select count(*) from preview.turn_changes") == 0


def test_an_end_answers_as_apply_project_files_does(db: Db, project: Project) -> None:
    other = make_project(db)
    changes: list[Json] = [{"file_path": "a.ts", "content": "1"}, {"action": "delete", "file_path": "never"}]
    plain = apply(db, other.id, changes)
    turn = begin(db, project.id)
    for change in changes:
        apply(db, project.id, [change], turn=turn)
    staged = end(db, project.id, turn)
    for answer in (plain, staged):
        for name in ("project_id", "epoch"):
            answer.pop(name)
        for file in answer["files"]:
            file.pop("id")
    assert staged == plain
    assert "label" not in messages(db, project.id)[0][1]
    assert "turn" not in messages(db, other.id)[0][1]


def test_ending_again_is_answered_again(db: Db, project: Project) -> None:
    """The answer was lost on its way; meanwhile others wrote."""
    turn = begin(db, project.id)
    upsert(db, project.id, "a", "1", turn=turn)
    first = end(db, project.id, turn, correlation="end-1")
    upsert(db, project.id, "a", "2")
    assert end(db, project.id, turn, correlation="end-1") == first
    assert end(db, project.id, turn, correlation="end-2") == first
    assert end(db, project.id, turn, force=True) == first
    assert (files(db, project.id), head(db, project.id)[1]) == ({"a": sha("2")}, 2)
    other = begin(db, project.id)
    with pytest.raises(psycopg.Error) as error:
        end(db, project.id, other, correlation="end-1")
    refused(error, "PT422", "p_correlation_id")
    assert state(db, other) == "open"


def test_an_empty_turn_and_one_that_changes_nothing_spend_no_revision(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    assert end(db, project.id, begin(db, project.id))["changed"] == 0
    turn = begin(db, project.id)
    upsert(db, project.id, "a", "1", turn=turn)
    upsert(db, project.id, "b", "x", turn=turn)
    delete(db, project.id, "b", turn=turn)
    assert end(db, project.id, turn)["changed"] == 0
    assert (head(db, project.id)[1], len(messages(db, project.id))) == (1, 1)


def test_an_abandoned_turn_leaves_nothing(db: Db, project: Project) -> None:
    turn = begin(db, project.id)
    upsert(db, project.id, "a", "1", turn=turn)
    assert (
        abandon(db, project.id, turn)
        == abandon(db, project.id, turn)
        == {"turn_id": turn, "state": "abandoned"}
    )
    assert files(db, project.id) == {}
    assert one(db, "select count(*) from preview.turn_changes") == 0


def test_the_executable_bit_goes_as_it_would_write_by_write(db: Db, project: Project) -> None:
    apply(db, project.id, [{"file_path": p, "content": "1", "executable": True} for p in ("a", "b")])
    turn = begin(db, project.id)
    upsert(db, project.id, "a", "2", turn=turn)
    delete(db, project.id, "b", turn=turn)
    upsert(db, project.id, "b", "2", turn=turn)
    apply(db, project.id, [{"file_path": "c", "content": "1", "executable": True}], turn=turn)
    upsert(db, project.id, "c", "2", turn=turn)
    rows = db.execute("select file_path, executable from list_current_files(%s, %s)", [project.id, turn])
    expected = {"a": True, "b": False, "c": True}
    assert {f["file_path"]: f["executable"] for f in end(db, project.id, turn)["files"]} == expected
    assert dict(rows.fetchall())["c"] is True


# -------------------------------------------------------------------------------- conflicts


def test_a_conflict_names_every_path_and_the_turn_stays_open(db: Db, project: Project) -> None:
    for path in ("a", "b", "c", "gone"):
        upsert(db, project.id, path, "1")
    turn = begin(db, project.id)
    for path in ("a", "b", "c", "new", "gone"):
        upsert(db, project.id, path, "turn", turn=turn)
    with user(db, project.collaborator):
        upsert(db, project.id, "a", "person")
        upsert(db, project.id, "new", "person")
        delete(db, project.id, "gone")
    with pytest.raises(psycopg.Error) as error:
        end(db, project.id, turn)
    detail = refused(error, "PT409", "expected_version 1: a is at version 2, and 2 more of these files")
    epoch, revision = head(db, project.id)
    assert (detail["turn_id"], detail["epoch"], detail["revision"]) == (turn, epoch, revision)
    assert detail["conflicts"] == [
        {
            "file_path": "a",
            "expected_version": 1,
            "version": 2,
            "content_hash": sha("person"),
            "is_deleted": False,
        },
        {"file_path": "gone", "expected_version": 1, "version": 2, "content_hash": None, "is_deleted": True},
        {
            "file_path": "new",
            "expected_version": 0,
            "version": 1,
            "content_hash": sha("person"),
            "is_deleted": False,
        },
    ]
    assert (files(db, project.id)["b"], state(db, turn)) == (sha("1"), "open")

    # Merged and staged again with the version that was merged into, it ends.
    upsert(db, project.id, "a", "both", expected=2, turn=turn)
    upsert(db, project.id, "new", "both", expected=1, turn=turn)
    delete(db, project.id, "gone", expected=2, turn=turn)
    assert end(db, project.id, turn)["revision"] == revision + 1
    assert files(db, project.id) == {
        p: sha(t) for p, t in [("a", "both"), ("b", "turn"), ("c", "turn"), ("new", "both")]
    }


def test_force_writes_over_what_moved(db: Db, project: Project) -> None:
    turn = begin(db, project.id)
    upsert(db, project.id, "a", "turn", turn=turn)
    upsert(db, project.id, "a", "person")
    assert end(db, project.id, turn, force=True)["revision"] == 2
    assert files(db, project.id) == {"a": sha("turn")}


def test_an_expected_version_is_checked_now_and_becomes_the_base(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    turn = begin(db, project.id)
    with pytest.raises(psycopg.Error) as error:
        upsert(db, project.id, "a", "x", expected=7, turn=turn)
    detail = refused(error, "PT409", "expected_version 7: a is at version 1")
    assert (detail["version"], detail["turn_id"]) == (1, turn)
    assert one(db, "select count(*) from preview.turn_changes") == 0
    with pytest.raises(psycopg.Error) as error:
        apply(
            db,
            project.id,
            [{"file_path": p, "content": "x", "expected_version": 3} for p in ("a", "b")],
            turn=turn,
        )
    assert [c["file_path"] for c in refused(error, "PT409", "and 1 more")["conflicts"]] == ["a", "b"]
    assert upsert(db, project.id, "a", "x", expected=1, turn=turn)["base_version"] == 1
    upsert(db, project.id, "a", "2")
    assert upsert(db, project.id, "a", "y", turn=turn)["base_version"] == 1, "the base is the first write's"
    assert upsert(db, project.id, "a", "y", expected=2, turn=turn)["base_version"] == 2
    assert end(db, project.id, turn)["revision"] == 3


def test_a_conflict_of_any_bulk_names_every_path(db: Db, project: Project) -> None:
    apply(db, project.id, [{"file_path": p, "content": "1"} for p in "abc"])
    with pytest.raises(psycopg.Error) as error:
        apply(db, project.id, [{"file_path": p, "content": "2", "expected_version": 9} for p in "cab"])
    detail = refused(error, "PT409", "expected_version 9: a is at version 1, and 2 more")
    assert [(c["file_path"], c["version"]) for c in detail["conflicts"]] == [("a", 1), ("b", 1), ("c", 1)]
    assert (detail["file_path"], detail["content_hash"]) == ("a", sha("1"))


def test_history_pruned_between_base_and_end(db: Db, project: Project) -> None:
    """Nothing is left of a deleted file, not even its numbers: absent is still absent, another file is a conflict."""
    db.execute("update preview.settings set longest_session = '1 hour'")
    for path in ("absent", "back", "live"):
        upsert(db, project.id, path, "1")
    delete(db, project.id, "absent")
    turn = begin(db, project.id)
    for path in ("absent", "back", "live"):
        upsert(db, project.id, path, "turn", turn=turn)
    delete(db, project.id, "back")
    db.execute(
        "update project_files set created_at = created_at - interval '2 hours', updated_at = now() - interval '2 hours'"
    )
    assert one(db, "select prune_project_history(%s, '0', 0)", [project.id])["tombstones"] == 2
    assert upsert(db, project.id, "back", "another file")["version"] == 1
    with pytest.raises(psycopg.Error) as error:
        end(db, project.id, turn)
    conflicts = refused(error, "PT409", "back")["conflicts"]
    assert [(c["file_path"], c["expected_version"], c["version"]) for c in conflicts] == [("back", 1, 1)]
    upsert(db, project.id, "back", "turn", expected=1, turn=turn)
    end(db, project.id, turn)
    assert set(files(db, project.id).values()) == {sha("turn")}


# -------------------------------------------------------------------------------- the message


def test_every_event_leaves_by_one_function(db: Db) -> None:
    callers = db.execute(
        "select p.oid::regprocedure::text from pg_proc p where p.prosrc ~ 'realtime\\.send'"
        " and p.pronamespace in ('public'::regnamespace, 'preview'::regnamespace)"
    ).fetchall()
    assert callers == [("preview.publish(text,text,jsonb)",)]


def test_a_label_and_a_turn_stay_on_a_doorbell(db: Db, project: Project) -> None:
    db.execute("update preview.settings set broadcast_limit_bytes = 2000")
    turn = begin(db, project.id, "many")
    apply(db, project.id, [{"file_path": f"f/{n}", "content": f"{n}"} for n in range(100)], turn=turn)
    end(db, project.id, turn)
    payload = messages(db, project.id)[0][1]
    assert (payload["files"], payload["complete"], payload["turn"], payload["label"]) == (
        [],
        False,
        turn,
        "many",
    )
    assert len(changes_since(db, project.id, head(db, project.id)[0], 0)["changes"]) == 100
