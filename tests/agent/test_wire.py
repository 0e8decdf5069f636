"""What travels, read: junk raises one kind of error, a bad path spoils only itself, a wrong hash is never applied."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import MalformedMessage, PathRefused
from agent.model import Commit, digest_of
from agent.wire import COMMIT_EVENTS, decode_manifest, read_event, read_head, read_manifest, read_sync_answer

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ("file_path", "content", "content_hash", "version", "timestamp", "revision", "epoch", "files", "encoding",
          "action", "manifest", "snapshot_url", "complete", "kind", "changes", "format", "deleted", "size")  # fmt: skip
PAYLOAD = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=8)


def update(**fields: object) -> dict[str, Any]:
    return {"file_path": "a.ts", "content": "x", "version": 1, **fields}


def read(event: str, payload: dict[str, Any]) -> Commit:
    commit = read_event(event, payload)
    assert isinstance(commit, Commit)
    return commit


@given(st.sampled_from([*sorted(COMMIT_EVENTS), "snapshot:ready", "tomorrow:event"]), PAYLOAD)
def test_junk_is_understood_or_malformed_and_nothing_else(event: str, payload: dict[str, Any]) -> None:
    with contextlib.suppress(MalformedMessage, PathRefused):
        read_event(event, payload)


@given(PAYLOAD | JSON)
def test_junk_answers_are_malformed_and_nothing_else(answer: object) -> None:
    for reader in (read_manifest, read_sync_answer, read_head):
        with contextlib.suppress(MalformedMessage, PathRefused):
            reader(answer)


@given(st.text(), st.binary(max_size=200))
def test_content_comes_out_byte_for_byte(text: str, raw: bytes) -> None:
    try:
        expected = text.encode()
    except UnicodeEncodeError:
        expected = None
    if expected is not None:
        (change,) = read("file:update", update(content=text, content_hash=digest_of(expected))).changes
        assert change.content == expected
    coded = base64.b64encode(raw).decode()
    (change,) = read(
        "file:update", update(content=coded, encoding="base64", content_hash=digest_of(raw))
    ).changes
    assert change.content == raw


def test_a_wrong_hash_makes_it_a_reference_and_a_problem() -> None:
    truth = digest_of(b"the truth")
    commit = read("file:update", update(content="a lie", content_hash=truth))
    assert commit.changes[0].by_reference
    assert commit.changes[0].digest == truth
    assert [problem.kind for problem in commit.problems] == ["hash_mismatch"]


def test_a_hostile_path_spoils_only_itself() -> None:
    commit = read("bulk:apply", {"files": [
        {"action": "update", "file_path": "../../etc/passwd", "content": "x"},
        {"action": "update", "file_path": "ok.ts", "content": "x"},
    ]})  # fmt: skip
    assert [change.path for change in commit.changes] == ["ok.ts"]
    assert [(problem.kind, problem.rule) for problem in commit.problems] == [("path_refused", "dot_segment")]


def test_of_several_changes_to_a_path_the_last_stands() -> None:
    files = [{"action": "update", "file_path": "a", "content": c} for c in "123"]
    files.append({"action": "delete", "file_path": "b"})
    commit = read("bulk:apply", {"files": files})
    assert [(c.path, c.content) for c in commit.changes] == [("a", b"3"), ("b", None)]


@pytest.mark.parametrize(
    "payload",
    [
        update(content=7),
        update(content="é", encoding="latin-1"),
        update(content="!", encoding="base64"),
        update(content=None),
        update(version=-1),
        update(version=True),
        update(content_hash="ABC"),
        update(timestamp="yesterday"),
        update(timestamp="2026-11-20T09:00:00"),
        update(revision="7"),
        update(content="\ud800"),
    ],
)
def test_malformed_updates_say_what_is_wrong(payload: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessage) as error:
        read_event("file:update", payload)
    assert str(error.value).startswith("cannot read file:update: ")


MANIFEST = {"format": 1, "project_id": "p", "epoch": "e", "revision": 1}
LISTED = {"file_path": "a", "content_hash": "0" * 64, "size": 1, "version": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": 2}, "format is 2; this agent reads 1"),
        ({"format": None}, "format is None"),
        ({"project_id": ""}, "project_id"),
        ({"epoch": None}, "epoch"),
        ({"revision": -1}, "revision"),
        ({"base_revision": "7"}, "base_revision"),
        ({"files": {}}, "files"),
        ({"files": [{**LISTED, "content_hash": "A" * 64}]}, "content_hash"),
        ({"files": [{**LISTED, "content_hash": "0" * 64 + "\n"}]}, "content_hash"),
        ({"files": [{**LISTED, "size": -1}]}, "size"),
        ({"files": [{**LISTED, "version": True}]}, "version"),
        ({"files": [{**LISTED, "executable": "yes"}]}, "executable"),
        ({"files": [{"file_path": "a", "size": 1, "version": 1}]}, "content_hash"),
        ({"files": [LISTED, LISTED]}, "listed twice"),
        ({"deleted": [{"file_path": "b"}]}, "version"),
    ],
)
def test_a_malformed_manifest_says_what_is_wrong(change: dict[str, Any], told: str) -> None:
    wrong = {**MANIFEST, "files": [LISTED], **change}
    for read in (lambda: read_manifest(wrong), lambda: decode_manifest(json.dumps(wrong).encode())):
        with pytest.raises(MalformedMessage, match=told):
            read()


def test_a_manifest_is_the_same_from_json_and_from_what_it_says() -> None:
    manifest = {**MANIFEST, "files": [{**LISTED, "executable": True, "of_tomorrow": {}}], "of_tomorrow": 1}
    assert decode_manifest(json.dumps(manifest).encode()) == read_manifest(manifest)
    for junk in (b"", b"{", b"[]", b"null", b'{"format": 1, "project_id": "\xff"}'):
        with pytest.raises(MalformedMessage):
            decode_manifest(junk)


def test_a_manifest_with_one_hostile_path_is_refused_whole() -> None:
    manifest = {"format": 1, "project_id": "p", "epoch": "e", "revision": 1, "files": [
        {"file_path": "ok", "content_hash": "0" * 64, "size": 1, "version": 1},
        {"file_path": "a/../b", "content_hash": "0" * 64, "size": 1, "version": 1},
    ]}  # fmt: skip
    with pytest.raises(PathRefused):
        read_manifest(manifest)
