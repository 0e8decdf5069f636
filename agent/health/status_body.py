"""The body of PUT …/status, never larger than a session API reads. Pure.

A body that is refused for its size is a heartbeat that did not come: the lease lapses and the session is ended, because
a dev server said ten long lines. So what is wrong is cut to fit, measured in bytes as they are sent, and the body says
how much it leaves out; `/status` has all of it.
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

Problem = Mapping[str, str | None]
"""`kind`, `rule`, `file_path`, `detail`."""


def fitted(
    head: Mapping[str, object], problems: Sequence[Problem], most: int = MOST_BYTES
) -> dict[str, object]:
    """`head` with as many of `problems` as fit into `most` bytes, those cut that are long; the rest is counted.

    The first of every kind comes before the second of any, so that the two hundredth refused path does not hide that
    the token is refused. The head is said in any case.
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
    told = [kept[place] for place in sorted(kept)]
    return {**head, "problems": told, "problems_left_out": len(problems) - len(told)}


def _fairly(problems: Sequence[Problem]) -> list[int]:
    seen: Counter[str | None] = Counter()
    turns = []
    for place, problem in enumerate(problems):
        turns.append((seen[problem["kind"]], place))
        seen[problem["kind"]] += 1
    return [place for _, place in sorted(turns)]


def _short(problem: Problem) -> Problem:
    lengths = {"detail": LONGEST_DETAIL, "file_path": LONGEST_PATH}
    return {
        key: None if text is None else cut(text, lengths.get(key, LONGEST_RULE))
        for key, text in problem.items()
    }


def cut(text: str, most: int) -> str:
    """`text` in at most `most` bytes of JSON, quotation marks included: its beginning, what is left out, its end.

    The end gets more: programs say last what they died of. Half a surrogate pair, which JSON cannot hold, is spelled
    out.
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
    """The longest beginning of `text` that JSON spells in at most `most` bytes."""
    text = text[:most]
    longest = bisect_right(range(len(text) + 1), most, key=lambda end: _size(text[:end])) - 1
    return text[:longest]


def _size(text: str) -> int:
    return len(orjson.dumps(text)) - 2
