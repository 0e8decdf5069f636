"""Each wrong argument: a SQLSTATE that PostgREST turns into the right status, a sentence that names the argument, and
nothing written, no revision spent."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import PathRefused
from agent.core.model import parse_path
from tests.database.db import Project, apply, delete, files, head, messages, one, upsert

Db = psycopg.Connection[Any]

HASH = "a" * 64


def call(function: str, *arguments: object) -> Callable[[Db, uuid.UUID], object]:
    """A call whose first argument is the project, the others as given."""
    marks = ", ".join(["%s"] * (len(arguments) + 1))
    return lambda db, project: db.execute(
        f"select public.{function}({marks})".encode(), [project, *arguments]
    )


def bulk(*changes: object) -> Callable[[Db, uuid.UUID], object]:
    return lambda db, project: apply(db, project, list(changes))


CASES: dict[str, tuple[Callable[[Db, uuid.UUID], object], str, str]] = {
    "no project": (lambda db, _: upsert(db, None, "a", ""), "PT400", "project_uuid"),  # type: ignore[arg-type]
    "unknown project": (lambda db, _: upsert(db, uuid.uuid4(), "a", ""), "PT404", "project_uuid"),
    "no path": (call("upsert_project_file", None, "x", "t"), "PT400", "p_file_path"),
    "no path to delete": (call("delete_project_file", None), "PT400", "p_file_path"),
    "no content": (call("upsert_project_file", "a", None, "t"), "PT400", "p_content"),
    "empty type": (call("upsert_project_file", "a", "", ""), "PT400", "p_file_type"),
    "long type": (call("upsert_project_file", "a", "", "t" * 101), "PT400", "p_file_type"),
    "negative version": (call("upsert_project_file", "a", "", "t", -1), "PT400", "expected_version"),
    "negative version of a delete": (call("delete_project_file", "a", -1), "PT400", "expected_version"),
    "empty correlation": (call("upsert_project_file", "a", "", "t", None, ""), "PT400", "p_correlation_id"),
    "long correlation": (call("apply_project_files", "[]", "c" * 201), "PT400", "p_correlation_id"),
    "delete of what never was": (call("delete_project_file", "nope"), "PT404", "p_file_path"),
    "changes null": (call("apply_project_files", None), "PT400", "changes"),
    "changes an object": (call("apply_project_files", "{}"), "PT400", "changes"),
    "changes of text": (bulk("a"), "PT400", "changes[0] must be an object"),
    "change without a path": (bulk({"content": ""}), "PT400", "changes[0].file_path"),
    "change with a number for a path": (
        bulk({"file_path": 1, "content": ""}),
        "PT400",
        "changes[0].file_path",
    ),
    "change with an unknown action": (
        bulk({"action": "move", "file_path": "a"}),
        "PT400",
        "changes[0].action",
    ),
    "change without content": (
        bulk({"file_path": "a", "content": ""}, {"file_path": "b"}),
        "PT400",
        "changes[1] must have content",
    ),
    "change with a number for content": (
        bulk({"file_path": "a", "content": 1}),
        "PT400",
        "changes[0].content",
    ),
    "change with an object for a type": (
        bulk({"file_path": "a", "content": "", "file_type": {}}),
        "PT400",
        "changes[0].file_type",
    ),
    "change with a word for executable": (
        bulk({"file_path": "a", "content": "", "executable": "yes"}),
        "PT400",
        "changes[0].executable",
    ),
    "change with half a version": (
        bulk({"file_path": "a", "content": "", "expected_version": 1.5}),
        "PT400",
        "changes[0].expected_version",
    ),
    "change with a huge version": (
        bulk({"file_path": "a", "content": "", "expected_version": 10**12}),
        "PT400",
        "changes[0].expected_version",
    ),
    "change with a wrong encoding": (
        bulk({"file_path": "a", "content": "", "encoding": "latin-1"}),
        "PT400",
        "changes[0].encoding",
    ),
    "change with a hash that is none": (
        bulk({"file_path": "a", "content": None, "content_hash": "x"}),
        "PT400",
        "changes[0].content_hash",
    ),
    "change with another content's hash": (
        bulk({"file_path": "a", "content": "", "content_hash": HASH}),
        "PT400",
        "changes[0].content_hash",
    ),
    "text by its hash": (
        bulk({"file_path": "a", "content": None, "content_hash": HASH, "encoding": "utf-8"}),
        "PT400",
        "changes[0].content",
    ),
    "binary inline": (
        bulk({"file_path": "a", "content": "AA==", "encoding": "base64"}),
        "PT400",
        "changes[0].content",
    ),
    "binary that was not uploaded": (
        bulk({"file_path": "a", "content": None, "content_hash": HASH, "encoding": "base64"}),
        "PT400",
        "content of a",
    ),
    "a path twice": (
        bulk({"file_path": "a", "content": ""}, {"action": "delete", "file_path": "a"}),
        "PT400",
        "changes",
    ),
    "a hostile path in a bulk": (
        bulk({"file_path": "fine", "content": ""}, {"file_path": "../etc/passwd", "content": ""}),
        "PT400",
        "file_path",
    ),
    "too large": (call("upsert_project_file", "a", "x" * 1001, "t"), "PT413", "content of a"),
    "too large altogether": (
        bulk(*({"file_path": f"f{i}", "content": "x" * 900} for i in range(4))),
        "PT413",
        "changes",
    ),
    "too many": (bulk(*({"file_path": f"f{i}", "content": ""} for i in range(6))), "PT413", "changes"),
    "a negative revision": (call("changes_since", "e", -1), "PT400", "revision"),
    "no revision": (call("changes_since", "e", None), "PT400", "revision"),
    "too many paths": (call("changes_since", "e", 0, ["a"] * 5001), "PT413", "p_paths"),
    "restore of no version": (call("restore_project_file", "kept", None), "PT400", "p_version"),
    "restore of no path": (call("restore_project_file", None, 1), "PT400", "p_file_path"),
    "restore of an unknown version": (call("restore_project_file", "kept", 9), "PT404", "p_version"),
    "restore of a deletion": (call("restore_project_file", "gone", 2), "PT400", "p_version"),
    "restore on a moved head": (call("restore_project_file", "kept", 1, 7), "PT409", "expected_version"),
    "snapshot of nothing": (
        lambda db, _: one(db, "select create_project_snapshot(%s)", [uuid.uuid4()]),
        "PT404",
        "project_uuid",
    ),
    "prune without an age": (call("prune_project_history", None, 1), "PT400", "keep"),
    "prune with a negative age": (call("prune_project_history", "-1 day", 1), "PT400", "keep"),
    "prune without a number": (call("prune_project_history", "1 day", None), "PT400", "keep_versions"),
}


@pytest.fixture
def kept(db: Db, project: Project) -> Project:
    upsert(db, project.id, "kept", "1")
    upsert(db, project.id, "gone", "1")
    delete(db, project.id, "gone")
    db.execute("update preview.settings set max_file_bytes = 1000, max_bulk_bytes = 3000, max_bulk_files = 5")
    return project


def test_each_is_refused_by_name_and_nothing_is_left_of_it(db: Db, kept: Project) -> None:
    before = (
        files(db, kept.id),
        head(db, kept.id),
        messages(db, kept.id),
        one(db, "select count(*) from project_files"),
    )
    for name, (attempt, sqlstate, names) in CASES.items():
        with pytest.raises(psycopg.Error) as error:
            attempt(db, kept.id)
        assert error.value.sqlstate == sqlstate, name
        assert names in (error.value.diag.message_primary or ""), name
    after = (
        files(db, kept.id),
        head(db, kept.id),
        messages(db, kept.id),
        one(db, "select count(*) from project_files"),
    )
    assert after == before


HOSTILE = {
    "empty": "",
    "too_long": "a/" * 512 + "b",
    "control": "a\nb",
    "backslash": "a\\b",
    "absolute": "/etc/passwd",
    "empty_segment": "a//b",
    "dot_segment": "a/../../b",
    "segment_too_long": "é" * 128,
    "protected": "a/node_modules/b",
    "too_deep": "d/" * 64 + "x",
    "not_nfc": "e\u0301",
}
MORE_HOSTILE = [
    *(
        "a/",
        ".",
        "..",
        "./a",
        "a/.",
        "a/..",
        "../a",
        "\x7f",
        "\x85",
        "a\tb",
        "C:\\x",
        ".git",
        ".git/config",
        "x/.git/y",
    ),
    *(".preview-sync/manifest.json", "node_modules", "\u212b", "a" * 1025, "a" * 256, "/"),
]
GOOD = [
    *(
        "a",
        "dir/b/c.tsx",
        ".env",
        ".gitignore",
        "node_modules.txt",
        "my-node_modules/x",
        "...",
        "..a",
        "a..",
        ".github/x",
    ),
    *(
        "ž/ů.ts",
        "a b",
        "日本語.md",
        "😀",
        "a" * 255,
        "é" * 127,
        ("d/" * 63) + "xx",
        "a:b*?\"<>|'",
        "%2e%2e/a",
    ),
]


def test_hostile_paths_are_refused_with_the_agents_words(db: Db, project: Project) -> None:
    for rule, path in HOSTILE.items():
        with pytest.raises(psycopg.Error) as error:
            upsert(db, project.id, path, "x")
        assert error.value.sqlstate == "PT400"
        assert json.loads(error.value.diag.message_detail or "")["rule"] == rule
        with pytest.raises(psycopg.Error, match="not a path"):
            delete(db, project.id, path)
    for path in MORE_HOSTILE:
        with pytest.raises(psycopg.Error, match="not a path"):
            upsert(db, project.id, path, "x")
    assert head(db, project.id)[1] == 0


def test_the_table_itself_refuses_them(db: Db, project: Project) -> None:
    for path in [*HOSTILE.values(), *MORE_HOSTILE]:
        with pytest.raises(psycopg.errors.CheckViolation) as error:
            db.execute(
                "insert into project_files"
                " (project_id, file_path, file_type, content, content_hash, created_by, revision)"
                " values (%s, %s, 't', '', %s, %s, 1)",
                [project.id, path, HASH, project.owner],
            )
        assert error.value.diag.constraint_name == "project_files_path"


def test_good_paths_are_taken(db: Db, project: Project) -> None:
    for path in GOOD:
        upsert(db, project.id, path, path)
    assert set(files(db, project.id)) == set(GOOD)


def rule_of(path: str) -> str | None:
    try:
        parse_path(path)
    except PathRefused as refusal:
        return refusal.rule
    return None


pieces = st.one_of(
    st.sampled_from(
        ["", ".", "..", "node_modules", ".git", ".preview-sync", "a", "é", "e\u0301", "a" * 256, "\\", "\n"]
    ),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)


deep = st.integers(60, 70).flatmap(
    lambda n: st.lists(st.sampled_from(["a", "é", "bc"]), min_size=n, max_size=n)
)
paths = st.one_of(st.lists(pieces, min_size=1, max_size=6), deep).map("/".join)


def test_the_database_and_the_agent_agree_on_every_path(db: Db) -> None:
    @given(st.lists(paths, min_size=1, max_size=50))
    def agree(paths: list[str]) -> None:
        rows = db.execute(
            "select path, preview.path_problem(path) from unnest(%s::text[]) path", [paths]
        ).fetchall()
        refused_here = {path for path, problem in rows if problem is not None}
        assert refused_here == {path for path in paths if rule_of(path) is not None}

    agree()


def test_no_file_is_a_directory_of_another(db: Db, project: Project) -> None:
    upsert(db, project.id, "a/b/c", "1")
    upsert(db, project.id, "a-", "not below a")
    upsert(db, project.id, "a.", "nor this")
    before = files(db, project.id), head(db, project.id)
    for path in ("a", "a/b", "a/b/c/d", "a/b/c/d/e"):
        with pytest.raises(psycopg.Error) as error:
            upsert(db, project.id, path, "2")
        assert error.value.sqlstate == "PT409"
        assert "file_path" in (error.value.diag.message_primary or "")
    with pytest.raises(psycopg.Error, match="would be a directory"):
        apply(db, project.id, [{"file_path": "x", "content": ""}, {"file_path": "x/y", "content": ""}])
    assert (files(db, project.id), head(db, project.id)) == before
    # A bulk may turn one into the other, whatever the order of its changes.
    apply(db, project.id, [{"file_path": "a", "content": ""}, {"action": "delete", "file_path": "a/b/c"}])
    apply(db, project.id, [{"file_path": "a/b", "content": ""}, {"action": "delete", "file_path": "a"}])
    delete(db, project.id, "a/b")
    upsert(db, project.id, "a/b/c", "again")
    assert set(files(db, project.id)) == {"a-", "a.", "a/b/c"}
