"""The globs of write-back mean the same to the agent as to the database: both are held against one list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.core.globs import Rule

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parents[2] / "contract" / "globs.json").read_text())[
    "matching"
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["glob"]))
def test_a_glob_matches_as_in_the_database(case: dict[str, Any]) -> None:
    rule = Rule(case["glob"])
    assert [path for path in case["matches"] if not rule.matches(path)] == []
    assert [path for path in case["misses"] if rule.matches(path)] == []
