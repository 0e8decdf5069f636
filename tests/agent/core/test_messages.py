"""What travels, read: junk raises one kind of error, a bad path spoils only itself, a wrong hash is never applied."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.clock_skew import ClockSkew, Moment
from agent.core.errors import MalformedMessage, PathRefused
from agent.core.messages import (
    COMMIT_EVENTS,
    decode_manifest,
    read_event,
    read_head,
    read_manifest,
    read_sync_answer,
)
from agent.core.model import Commit, Cursor, RelPath, Tree, digest_of
from agent.core.reconcile import step
from agent.fs.inspect import FileStat
from agent.fs.transaction import Done
from agent.sync.ledger import Ledger

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats(allow_nan=False) | st.text(max_size=8),
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
        update(content="é", encoding="base64"),
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


MOST = 2**63 - 1
"""What a bigint of the database holds, and a column of the ledger."""

NUMBERS = {
    "event revision": lambda n: read("file:update", update(revision=n, epoch="e")),
    "event version": lambda n: read("file:update", update(version=n)),
    "reference size": lambda n: read("file:update", update(content=None, content_hash="0" * 64, size=n)),
    "delete version": lambda n: read("file:delete", {"file_path": "a", "version": n}),
    "bulk version": lambda n: read(
        "bulk:apply", {"files": [{"action": "delete", "file_path": "a", "version": n}]}
    ),
    "manifest revision": lambda n: both({**MANIFEST, "revision": n}),
    "manifest base_revision": lambda n: both({**MANIFEST, "base_revision": n}),
    "manifest size": lambda n: both({**MANIFEST, "files": [{**LISTED, "size": n}]}),
    "manifest version": lambda n: both({**MANIFEST, "files": [{**LISTED, "version": n}]}),
    "manifest deleted": lambda n: both({**MANIFEST, "deleted": [{"file_path": "b", "version": n}]}),
    "current revision": lambda n: read_sync_answer({"kind": "current", "epoch": "e", "revision": n}),
    "changes revision": lambda n: read_sync_answer(
        {"kind": "changes", "epoch": "e", "revision": n, "base_revision": 0}
    ),
    "changes base_revision": lambda n: read_sync_answer(
        {"kind": "changes", "epoch": "e", "revision": 0, "base_revision": n}
    ),
    "head revision": lambda n: read_head({"epoch": "e", "revision": n}),
}  # fmt: skip


def both(manifest: dict[str, Any]) -> None:
    """From what it says, and from JSON."""
    read_manifest(manifest)
    decode_manifest(json.dumps(manifest).encode())


@pytest.mark.parametrize("what", NUMBERS)
def test_a_number_is_one_that_the_database_and_the_ledger_can_hold(what: str) -> None:
    for good in (0, 1, 2**53, MOST):
        NUMBERS[what](good)
    for bad in (MOST + 1, 2**64 - 1, 2**64, 10**400, 1e19, 7.5, -1, "7", True, [7]):
        with pytest.raises(MalformedMessage):
            NUMBERS[what](bad)


def test_the_greatest_numbers_are_recorded_and_loaded(tmp_path: Path) -> None:
    fields = {"version": MOST, "revision": MOST, "epoch": "e" * 255}
    plan = step(Tree(Cursor("e" * 255, MOST - 1)), read("file:update", update(**fields)))
    stat = FileStat(1, 2, 3, 4)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.record((Done(each, stat) for each in plan.operations), plan.tree.cursor)
    ledger.close()
    loaded = Ledger(tmp_path / "ledger.sqlite").load()
    assert loaded is not None
    assert loaded.tree == plan.tree
    assert (loaded.tree.cursor.revision, loaded.tree.entries[RelPath("a.ts")].version) == (MOST, MOST)


@pytest.mark.parametrize(
    "moment", ["0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59", "1970-01-01T00:00:00Z"]
)
def test_every_time_that_can_be_written_is_one(moment: str) -> None:
    timestamp = read("file:update", update(timestamp=moment)).timestamp
    assert timestamp is not None
    assert ClockSkew().since(timestamp, Moment(1.8e9, 0.0)) >= 0


@pytest.mark.parametrize("epoch", ["", "e" * 256, "é" * 256, 7, ["e"]])
def test_an_epoch_is_a_name_and_no_book(epoch: object) -> None:
    """It travels with every question and every heartbeat, whose bodies are bounded."""
    reads = (
        lambda: read("file:update", update(revision=1, epoch=epoch)),
        lambda: both({**MANIFEST, "epoch": epoch}),
        lambda: read_sync_answer({"kind": "current", "epoch": epoch, "revision": 1}),
        lambda: read_head({"epoch": epoch, "revision": 1}),
    )
    for each in reads:
        with pytest.raises(MalformedMessage):
            each()


def test_what_is_nested_without_end_is_malformed_or_refused() -> None:
    """orjson reads up to 1,024 levels, which is more than Python can write again."""
    deep: Any = orjson.loads(b"[" * 1024 + b"]" * 1024)
    reads = (
        lambda: read("file:update", update(file_path=deep)),
        lambda: read("bulk:apply", {"files": [{"action": deep, "file_path": "a"}]}),
        lambda: read("file:update", update(encoding=deep)),
        lambda: read("file:update", update(version=deep)),
        lambda: read_sync_answer({"kind": deep, "epoch": "e", "revision": 1}),
        lambda: read_manifest({**MANIFEST, "format": deep}),
        lambda: read_manifest({**MANIFEST, "files": deep}),
        lambda: read_manifest({**MANIFEST, "of_tomorrow": deep}),
        lambda: decode_manifest(
            orjson.dumps(MANIFEST)[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
        ),
        lambda: decode_manifest(b'{"format":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    )
    for each in reads:
        with contextlib.suppress(MalformedMessage, PathRefused):
            each()
    (problem,) = read("file:update", update(file_path=deep)).problems
    assert (problem.kind, problem.rule) == ("path_refused", "not_text")
