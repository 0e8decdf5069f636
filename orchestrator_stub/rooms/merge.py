"""Computes the difference of two texts word by word, so that a merge keeps what is typed beside a change. Pure."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Final

MOST_LINES: Final = 4_000
"""Of the part that differs; a longer one is replaced whole. Comparing takes their square at worst."""
MOST_CHARACTERS: Final = 4_000
"""Of replaced lines that are compared by the word."""
WORDS: Final = re.compile(r"\w+|\s+|[^\w\s]")

Splice = tuple[int, int, str]
"""At a byte of the text of before: so many bytes go, and this comes."""


def splices_of(before: str, after: str) -> list[Splice]:
    """What makes `after` of `before`: ascending, not overlapping, offsets and lengths in UTF-8 bytes of `before`."""
    start = _common(before, after)
    most = min(len(before), len(after)) - start
    end = _common(before[len(before) - most :][::-1], after[len(after) - most :][::-1])
    old, new = before[start : len(before) - end], after[start : len(after) - end]
    at = len(before[:start].encode())
    found: list[Splice] = []
    for gone, come in _blocks(old, new):
        size = len(gone.encode())
        if gone != come:
            found.append((at, size, come))
        at += size
    return found


def _common(a: str, b: str) -> int:
    """How many characters both begin with: by halves, so that the comparing is not ours."""
    low, high = 0, min(len(a), len(b)) + 1
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _blocks(old: str, new: str) -> list[tuple[str, str]]:
    """Both texts in pieces that belong together, equal or not."""
    if len(old) <= MOST_CHARACTERS and len(new) <= MOST_CHARACTERS:
        return _matched(WORDS.findall(old), WORDS.findall(new))
    lines, others = old.splitlines(keepends=True), new.splitlines(keepends=True)
    if max(len(lines), len(others)) > MOST_LINES:
        return [(old, new)]
    found: list[tuple[str, str]] = []
    for gone, come in _matched(lines, others):
        fine = gone != come and max(len(gone), len(come)) <= MOST_CHARACTERS
        found += _matched(WORDS.findall(gone), WORDS.findall(come)) if fine else [(gone, come)]
    return found


def _matched(old: list[str], new: list[str]) -> list[tuple[str, str]]:
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    return [("".join(old[a:b]), "".join(new[c:d])) for _, a, b, c, d in matcher.get_opcodes()]
