"""Paths that are let in and paths that are not, cursors, and the tree's hash."""

from __future__ import annotations

import hashlib
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import PathRefused
from agent.core.model import Cursor, Digest, RelPath, parents, parse_path, tree_hash

HOSTILE = [
    ("", "empty"),
    (None, "not_text"),
    (7, "not_text"),
    ("/etc/passwd", "absolute"),
    ("../x", "dot_segment"),
    ("a/../../x", "dot_segment"),
    ("a/./b", "dot_segment"),
    ("a//b", "empty_segment"),
    ("a/", "empty_segment"),
    ("a\\b", "backslash"),
    ("a\0b", "control"),
    ("a\nb", "control"),
    ("a\x7fb", "control"),
    ("a\x85b", "control"),
    ("node_modules/x", "protected"),
    ("packages/web/node_modules/x", "protected"),
    (".git/config", "protected"),
    (".preview-sync/manifest.json", "protected"),
    ("cafe\u0301.ts", "not_nfc"),
    ("\ud800.ts", "not_utf8"),
    ("x" * 256, "segment_too_long"),
    ("é" * 128, "segment_too_long"),
    ("a/" * 512 + "b", "too_long"),
    ("a/" * 64 + "b", "too_deep"),
    ("a/" * 511 + "b", "too_deep"),
]


@pytest.mark.parametrize(("raw", "rule"), HOSTILE)
def test_hostile_paths_are_refused_by_rule(raw: object, rule: str) -> None:
    with pytest.raises(PathRefused) as refused:
        parse_path(raw)
    assert refused.value.rule == rule
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    "raw",
    [
        "a",
        "src/App.tsx",
        ".env",
        "..a",
        "a..",
        "...",
        ".gitignore",
        "caf\u00e9.ts",
        "日本/語.md",
        "x" * 255,
        "a b",
    ],
)
def test_ordinary_paths_are_admitted_as_they_are(raw: str) -> None:
    assert parse_path(raw) == raw


@given(st.text(max_size=80))
def test_what_is_admitted_cannot_leave_the_root(raw: str) -> None:
    try:
        path = parse_path(raw)
    except PathRefused:
        return
    assert not path.startswith("/")
    assert all(part not in ("", ".", "..") for part in path.split("/"))
    assert unicodedata.is_normalized("NFC", path)
    assert len(path.encode()) <= 1024
    assert "\0" not in path
    assert parse_path(path) == path


def test_parents_are_given_from_the_root_down() -> None:
    assert list(parents(RelPath("a/b/c.ts"))) == ["a", "a/b"]
    assert list(parents(RelPath("c.ts"))) == []


@given(st.permutations(range(1, 9)))
def test_a_cursor_ends_the_same_in_whatever_order_revisions_come(order: list[int]) -> None:
    cursor = Cursor("e", 0)
    seen: set[int] = set()
    for revision in order:
        cursor = cursor.with_revision(revision)
        seen.add(revision)
        contiguous = next(n for n in range(10) if n + 1 not in seen)
        assert cursor.revision == contiguous
        assert cursor.islands == {r for r in seen if r > contiguous}
    assert cursor == Cursor("e", 8)


@given(st.integers(0, 9), st.frozensets(st.integers(1, 9)))
def test_catching_up_swallows_islands_and_never_goes_back(to: int, seen: frozenset[int]) -> None:
    cursor = Cursor("e", 0)
    for revision in sorted(seen):
        cursor = cursor.with_revision(revision)
    after = cursor.at_least(to)
    assert after.revision >= max(to, cursor.revision)
    assert all(island > after.revision + 1 for island in after.islands)


def test_the_tree_hash_is_the_protocol_s() -> None:
    a, b = Digest("a" * 64), Digest("b" * 64)
    lines = f"é.ts\0{a}\n".encode()
    assert tree_hash({}) == hashlib.sha256(b"").hexdigest()
    assert tree_hash({RelPath("é.ts"): a}) == hashlib.sha256(lines).hexdigest()
    # Sorted by UTF-8 bytes: 'z' (7a) before 'é' (c3 a9) before U+FFxx (ef) before an astral character (f0).
    order = ["z", "é", "\uff21", "\U0001f600"]
    whole = b"".join(f"{p}\0{b}\n".encode() for p in order)
    assert tree_hash({RelPath(p): b for p in reversed(order)}) == hashlib.sha256(whole).hexdigest()
