"""Counts that a document gives in words are counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.reading import DOCUMENTS, ROOT

TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ONES = ["", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def in_words(number: int) -> str:
    """From twenty to ninety-nine, as one writes it."""
    return "-".join(filter(None, [TENS[number // 10], ONES[number % 10]]))


NUMBER = "|".join(sorted(map(in_words, range(20, 100)), key=len, reverse=True))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_scenarios_are_counted(path: Path) -> None:
    there = in_words(len(list((ROOT / "tests" / "scenarios").glob("*.jsonl"))))
    said = re.findall(rf"\b({NUMBER}) scenarios", path.read_text())
    said += re.findall(rf"\[tests/scenarios\]\S* has ({NUMBER})\b", path.read_text())
    assert [number for number in said if number != there] == []
