"""The globs of write-back mean the same to the agent as to the database: both are held against one list."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.globs import Rule

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "contract" / "globs.json").read_text())[
    "matching"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["glob"]))
def test_a_glob_matches_as_in_the_database(case: dict[str, Any]) -> None:
    rule = Rule(case["glob"])
    assert [path for path in case["matches"] if not rule.matches(path)] == []
    assert [path for path in case["misses"] if rule.matches(path)] == []


SEGMENTS = st.lists(st.sampled_from(["**", *"ab*?", "*a", "a*", "*a*b*", "?*"]), min_size=1, max_size=5)
PATHS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=6)


def fits(glob: list[str], path: list[str]) -> bool:
    """What a glob says, by its definition."""
    if not glob or not path:
        return not glob and not path
    if glob[0] == "**":
        rest = range(1, len(path) + 1) if len(glob) == 1 else range(len(path) + 1)
        return any(fits(glob[1:], path[n:]) for n in rest)
    return letters(glob[0], path[0]) and fits(glob[1:], path[1:])


def letters(glob: str, text: str) -> bool:
    if not glob:
        return not text
    if glob[0] == "*":
        return any(letters(glob[1:], text[n:]) for n in range(len(text) + 1))
    return bool(text) and glob[0] in ("?", text[0]) and letters(glob[1:], text[1:])


@given(SEGMENTS, PATHS)
def test_a_glob_matches_what_it_says(glob: list[str], path: list[str]) -> None:
    assert Rule("/".join(glob)).matches("/".join(path)) == fits(glob, path)


@pytest.mark.parametrize(
    "glob", ["**/" * 40 + "x", "**/a*/" * 40 + "x", "*a" * 100 + "b", "**/" + "*a" * 60 + "b"]
)
def test_no_path_makes_a_glob_slow(glob: str) -> None:
    """Before, the first of these took minutes, and the agent with it."""
    began = time.process_time()
    for path in ("/".join(["a"] * 500) + "/y", "a" * 1_000, "/".join(["aaaa"] * 200)):
        assert not Rule(glob).matches(path)
    assert time.process_time() - began < 1
