"""A rename: one revision, one message, a history that goes on; and everything that is in its way."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.database.db import (
    Json,
    Project,
    acting_as,
    apply,
    changes_since,
    delete,
    files,
    hash_of,
    head,
    messages,
    one,
    upsert,
    user,
)
from tests.database.test_writing import refused, sha

Db = psycopg.Connection[Any]


def rename(
    db: Db,
    project: uuid.UUID,
    old: str | None,
    new: str | None,
    expected: int | None = None,
    correlation: str | None = None,
) -> Json:
    query = "select public.rename_project_file(%s, %s, %s, %s, %s)"
    answer: Json = one(db, query, [project, old, new, expected, correlation])
    return answer


def test_a_rename_is_one_revision_and_one_message(db: Db, project: Project) -> None:
    with user(db, project.owner):
        upsert(db, project.id, "src/a.js", "1")
        last = upsert(db, project.id, "src/a.js", "2")
    before = head(db, project.id)
    with user(db, project.collaborator):
        answer = rename(db, project.id, "src/a.js", "src/b.ts", last["version"])
    assert (answer["revision"], answer["changed"], answer["renamed_from"]) == (3, 2, last["id"])
    assert [(f["action"], f["file_path"], f["version"]) for f in answer["files"]] == [
        ("delete", "src/a.js", 3),
        ("update", "src/b.ts", 1),
    ]
    assert files(db, project.id) == {"src/b.ts": sha("2")}
    event, payload = messages(db, project.id)[-1]
    assert (event, payload["revision"], len(messages(db, project.id))) == ("bulk:apply", 3, 3)
    assert [(f["action"], f["file_path"]) for f in payload["files"]] == [
        ("delete", "src/a.js"),
        ("update", "src/b.ts"),
    ]
    assert payload["sender"] == str(project.collaborator)
    rows = db.execute(
        "select file_path, version, renamed_from::text, file_type, created_by from project_files"
        " where revision = 3 order by 1"
    ).fetchall()
    assert rows == [
        ("src/a.js", 3, None, "javascript", project.collaborator),
        ("src/b.ts", 1, last["id"], "typescript", project.collaborator),
    ]
    caught = changes_since(db, project.id, before[0], before[1])
    assert [c["file_path"] for c in caught["changes"]] == ["src/a.js", "src/b.ts"], (
        "what was missed is told as ever"
    )
    assert one(db, "select public.project_tree_hash(%s)", [project.id]) == hash_of(files(db, project.id))


def test_a_history_is_followed_across_names(db: Db, project: Project) -> None:
    ids = [upsert(db, project.id, "a", text)["id"] for text in "12"]
    rename(db, project.id, "a", "b")
    ids.append(upsert(db, project.id, "b", "3")["id"])
    rename(db, project.id, "b", "a")
    ids.append(upsert(db, project.id, "a", "4")["id"])
    followed = db.execute(
        """with recursive history as (
             select f.* from project_files f where f.project_id = %s and f.file_path = 'a' and f.is_current_version
             union all
             select f.* from history h join project_files f on f.id = coalesce(h.renamed_from, h.parent_version_id)
           ) select id::text, file_path, content from history""",
        [project.id],
    ).fetchall()
    assert [(path, content) for _, path, content in followed] == [
        ("a", "4"), ("a", "3"), ("b", "3"), ("b", "2"), ("a", "2"), ("a", "1"),
    ]  # fmt: skip
    assert [row[0] for row in followed if row[0] in ids] == ids[::-1]


def test_what_a_file_is_goes_with_it(db: Db, project: Project) -> None:
    digest = "ab" * 32
    db.execute(
        "insert into storage.objects (bucket_id, name, metadata) values ('project-assets', %s, '{\"size\": 7}')",
        [f"{project.id}/{digest}"],
    )
    apply(
        db,
        project.id,
        [
            {"file_path": "logo.png", "content": None, "content_hash": digest, "encoding": "base64"},
            {"file_path": "run", "content": "x", "executable": True, "file_type": "mine"},
            {"file_path": "empty", "content": ""},
        ],
    )
    for name in ("logo.png", "run", "empty"):
        rename(db, project.id, name, f"to/{name}.txt")
    rows = db.execute(
        "select file_path, content_hash, size_bytes, encoding, executable, file_type from project_files_current"
        " where project_id = %s order by 1",
        [project.id],
    ).fetchall()
    assert rows == [
        ("to/empty.txt", sha(""), 0, "utf-8", False, "text"),
        ("to/logo.png.txt", digest, 7, "base64", False, "binary"),
        ("to/run.txt", sha("x"), 1, "utf-8", True, "mine"),
    ]


@pytest.mark.parametrize(
    ("old", "new"), [("a", "A"), ("a", "a/b"), ("a/b", "a"), ("a", "\N{SNOWMAN} und mehr")]
)
def test_odd_names(db: Db, project: Project, old: str, new: str) -> None:
    upsert(db, project.id, old, "x")
    rename(db, project.id, old, new)
    assert files(db, project.id) == {new: sha("x")}


def test_a_name_that_was_deleted_is_free_and_its_versions_go_on(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "x")
    upsert(db, project.id, "b", "y", file_type="mine")
    delete(db, project.id, "b")
    answer = rename(db, project.id, "a", "b")
    assert [(f["file_path"], f["version"], f["file_type"]) for f in answer["files"]][1] == ("b", 3, "text")
    # The same bytes as before the deletion are a version all the same.
    assert answer["changed"] == 2


def test_somebody_was_there_before(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "1")
    upsert(db, project.id, "a", "2")
    upsert(db, project.id, "b", "other")
    before = files(db, project.id), head(db, project.id)
    with pytest.raises(psycopg.Error) as error:
        rename(db, project.id, "a", "c", 1)
    detail = refused(error, "PT409", "a is at version 2")
    assert (detail["file_path"], detail["version"], detail["revision"]) == ("a", 2, 3)
    assert [c["file_path"] for c in detail["conflicts"]] == ["a"]
    with pytest.raises(psycopg.Error) as error:
        rename(db, project.id, "a", "b", 2)
    detail = refused(error, "PT409", "b is at version 1")
    assert [(c["file_path"], c["expected_version"]) for c in detail["conflicts"]] == [("b", 0)]
    with pytest.raises(psycopg.Error) as error:
        rename(db, project.id, "a", "b/c")
    refused(error, "PT409", "would be a directory")
    assert (files(db, project.id), head(db, project.id)) == before, "and no revision is spent"
    delete(db, project.id, "a")
    with pytest.raises(psycopg.Error) as error:
        rename(db, project.id, "a", "c", 2)
    assert refused(error, "PT409", "a is at version 3")["is_deleted"] is True


@pytest.mark.parametrize(
    ("call", "state", "names"),
    [
        (lambda db, p: rename(db, p.id, None, "b"), "PT400", "p_from"),
        (lambda db, p: rename(db, p.id, "a", None), "PT400", "p_to"),
        (lambda db, p: rename(db, p.id, "a", "a"), "PT400", "p_to"),
        (lambda db, p: rename(db, p.id, "a", "../b"), "PT400", "file_path"),
        (lambda db, p: rename(db, p.id, "a", ""), "PT400", "file_path"),
        (lambda db, p: rename(db, p.id, "a", "b", 0), "PT400", "expected_version"),
        (lambda db, p: rename(db, p.id, "a", "b", None, ""), "PT400", "p_correlation_id"),
        (lambda db, p: rename(db, p.id, "never", "b"), "PT404", "p_from"),
        (lambda db, p: rename(db, p.id, "never", "b", 3), "PT404", "p_from"),
        (lambda db, p: rename(db, p.id, "gone", "b"), "PT404", "p_from"),
        (lambda db, p: rename(db, uuid.uuid4(), "a", "b"), "PT404", "project_uuid"),
    ],
)  # fmt: skip
def test_bad_arguments(
    db: Db, project: Project, call: Callable[[Db, Project], Json], state: str, names: str
) -> None:
    upsert(db, project.id, "a", "x")
    upsert(db, project.id, "gone", "x")
    delete(db, project.id, "gone")
    before = head(db, project.id)
    with pytest.raises(psycopg.Error) as error:
        call(db, project)
    refused(error, state, names)
    assert head(db, project.id) == before


def test_a_lost_answer_is_asked_for_again(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "x")
    first = rename(db, project.id, "a", "b", 1, "one")
    assert rename(db, project.id, "a", "b", 1, "one") == first
    assert head(db, project.id)[1] == 2
    with pytest.raises(psycopg.Error) as error:
        rename(db, project.id, "b", "c", None, "one")
    refused(error, "PT422", "p_correlation_id")


def test_a_rename_is_a_write_of_the_project_s_rate(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "x")
    db.execute("update preview.settings set writes_per_minute = 1")
    with pytest.raises(psycopg.Error) as error:
        rename(db, project.id, "a", "b")
    assert error.value.sqlstate == "PT429"
    assert files(db, project.id) == {"a": sha("x")}


def test_nobody_renames_another_s_file(db: Db, project: Project) -> None:
    """Through the function and through the gate below it; the table itself is not to be written."""
    upsert(db, project.id, "a", "x")
    gate = "update preview.rename_gate set project_id = %s, from_path = 'a', to_path = 'b' returning answer"
    with user(db, project.stranger):
        assert db.execute(gate, [project.id]).fetchall() == []
    for role, claims in (
        ("authenticated", {"sub": project.stranger}),
        ("authenticated", {"sub": project.owner, "project_id": project.id}),
        ("authenticated", {}),
        ("preview_agent", {"sub": project.owner, "project_id": project.id}),
        ("anon", {}),
    ):
        with pytest.raises(psycopg.Error) as error, acting_as(db, role, **claims):
            rename(db, project.id, "a", "b")
        assert error.value.sqlstate == ("PT404" if role == "authenticated" else "42501")
    for query in (
        "update project_files set renamed_from = gen_random_uuid()",
        "select preview.rename_file(null, 'a', 'b', null, null)",
        "update preview.rename_gate set answer = '{}'",
        "update preview.rename_gate set unrestricted = true",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege), user(db, project.owner):
            db.execute(query.encode())
    assert files(db, project.id) == {"a": sha("x")}
    with acting_as(db, "service_role"):
        rename(db, project.id, "a", "b")
    assert one(db, "select created_by from project_files_current") == project.owner


def test_a_deleted_project_is_gone(db: Db, project: Project) -> None:
    upsert(db, project.id, "a", "x")
    db.execute("delete from projects where id = %s", [project.id])
    with pytest.raises(psycopg.Error) as error:
        rename(db, project.id, "a", "b")
    refused(error, "PT410", "deleted")
