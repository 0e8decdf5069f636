"""Cuts the body of PUT …/status to a size that every session API reads. Pure.

A body that is refused for its size is a missed heartbeat: the lease lapses and the session ends, because a dev server
printed ten long lines. So problems are cut to fit, measured in bytes as sent, and the body counts what it leaves out;
`/status` has all of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import orjson

MOST_BYTES: Final = 32 * 1024
"""Of the whole body as sent: half of what the orchestrator reads unless it is told otherwise (BODY_LIMIT)."""

LONGEST_DETAIL: Final = 4 * 1024
"""Bytes as sent of one problem's detail: forty lines of a terminal, and room for eight such problems."""

LONGEST_PATH: Final = 1_200
"""Bytes as sent of a path; 1,024 are the longest that is followed."""

LONGEST_RULE: Final = 100

NOTE_ROOM: Final = 50
"""Bytes for the note between what is left of a text."""

Problem = Mapping[str, str | bool | None]
"""`kind`, `rule`, `file_path`, `detail`, and `waiting` where it is tried again."""


def fitted(
    head: Mapping[str, object], problems: Sequence[Problem], most: int = MOST_BYTES
) -> dict[str, object]:
    """Return `head` with as many of `problems` as fit into `most` bytes; long ones are cut, the rest is counted.

    The first of every kind comes before the second of any, so that two hundred refused paths do not hide a refused
    token. The head is whole in any case.
    """
    body = {**head, "problems": [], "problems_left_out": len(problems)}
    room = most - len(orjson.dumps(body))
    kept: dict[int, Problem] = {}
    for place in _fairly(problems):
        short = _short(problems[place])
        size = len(orjson.dumps(short)) + 1
        if size <= room:
            kept[place] = short
            room -= size
    shown = [kept[place] for place in sorted(kept)]
    return {**head, "problems": shown, "problems_left_out": len(problems) - len(shown)}


def _fairly(problems: Sequence[Problem]) -> list[int]:
    seen: Counter[str | bool | None] = Counter()
    turns = []
    for place, problem in enumerate(problems):
        turns.append((seen[problem["kind"]], place))
        seen[problem["kind"]] += 1
    return [place for _, place in sorted(turns)]


def _short(problem: Problem) -> Problem:
    lengths = {"detail": LONGEST_DETAIL, "file_path": LONGEST_PATH}
    return {
        key: cut(text, lengths.get(key, LONGEST_RULE)) if isinstance(text, str) else text
        for key, text in problem.items()
    }


def cut(text: str, most: int) -> str:
    """Shorten `text` to at most `most` bytes of JSON, quotation marks included: its beginning, a note, its end.

    The end gets more: programs print last why they failed. Half a surrogate pair, which JSON cannot hold, is escaped.
    """
    text = text.encode("utf-8", "backslashreplace").decode()
    if (whole := _size(text)) <= most - 2:
        return text
    room = max(0, most - 2 - NOTE_ROOM)
    begins = _as_many(text, room // 4)
    backwards = _as_many(text[::-1], room - _size(begins))
    ends = backwards[::-1]
    gone = whole - _size(begins) - _size(ends)
    return f"{begins} … {gone:,} bytes left out … {ends}"


def _as_many(text: str, most: int) -> str:
    """Return the longest beginning of `text` that takes at most `most` bytes of JSON."""
    text = text[:most]
    longest = bisect_right(range(len(text) + 1), most, key=lambda end: _size(text[:end])) - 1
    return text[:longest]


def _size(text: str) -> int:
    return len(orjson.dumps(text)) - 2
