"""docs/security.md: every threat is tried by a test, and every test it names exists."""

from __future__ import annotations

import re

from tests.docs.reading import ROOT

DOC = (ROOT / "docs" / "security.md").read_text()


def test_every_test_that_is_named_exists() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    known = set(re.findall(r"def (test_\w+)\(", tests))
    named = re.findall(r"`(test_\w+)`", DOC)
    assert len(set(named)) > 50
    assert sorted({name for name in named if name not in known}) == []


def test_every_threat_is_numbered_in_order_and_tried() -> None:
    rows = re.findall(r"(?m)^\| T(\d+) (.*)$", DOC)
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    for number, row in rows:
        cells = [cell.strip() for cell in row.strip("| ").split("|")]
        assert len(cells) == 3, number
        assert re.search(r"`test_\w+`", cells[2]), f"T{number} is tried by nothing"
