"""The heartbeat's body: whatever is wrong, it is no larger than a session API reads, and counts what it leaves out."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.health.status_body import (
    LONGEST_DETAIL,
    MOST_BYTES,
    MOST_ERRORS,
    cut,
    fitted,
    fitted_errors,
)

HEAD = {
    "state": "degraded", "revision": 2**63 - 1, "epoch": "e" * 255, "tree_hash": "0" * 64, "dev_server": "backoff",
    "agent_version": "1.2.3",
}  # fmt: skip


def problem(kind: str, detail: str = "", path: str | None = None, rule: str | None = None) -> dict[str, Any]:
    return {"kind": kind, "rule": rule, "file_path": path, "detail": detail}


def kinds(body: dict[str, Any]) -> list[str]:
    return [each["kind"] for each in body["problems"]]


def size(value: object) -> int:
    return len(orjson.dumps(value))


ANY_TEXT = st.text(max_size=30) | st.builds(
    lambda c, n: c * n, st.characters(), st.integers(0, 40_000)
)  # surrogates and control characters included


@given(
    st.lists(
        st.builds(problem, st.sampled_from("abcd"), ANY_TEXT, st.none() | ANY_TEXT, st.none() | ANY_TEXT),
        max_size=30,
    )
)
def test_it_fits_whatever_is_wrong(problems: list[dict[str, Any]]) -> None:
    body = fitted(HEAD, problems)
    assert size(body) <= MOST_BYTES
    assert len(body["problems"]) + body["problems_left_out"] == len(problems)
    assert {**body, "problems": 0, "problems_left_out": 0} == {**HEAD, "problems": 0, "problems_left_out": 0}


def test_what_fits_is_said_as_it_is() -> None:
    problems = [
        problem("drift", "changed by something else", 'src/é "a".ts'),
        problem("port_taken", "a\nb", rule="x"),
    ]
    assert fitted(HEAD, problems) == {**HEAD, "problems": problems, "problems_left_out": 0}


@pytest.mark.parametrize("character", ["é", "x", "\x01", '"', "🐌", "\ud800", "\\"])
def test_a_dev_server_s_last_lines_keep_their_beginning_and_their_end(character: str) -> None:
    lines = ["the first line", *[character * 4_090] * 10, "the last line"]
    body = fitted(HEAD, [problem("dev_server_backoff", "\n".join(lines), rule="exit")])
    assert size(body) <= MOST_BYTES
    assert body["problems_left_out"] == 0
    detail = body["problems"][0]["detail"]
    assert detail.startswith("the first line\n")
    assert detail.endswith("\nthe last line")
    assert " bytes left out … " in detail
    assert LONGEST_DETAIL - 100 < size(detail) <= LONGEST_DETAIL


def test_of_two_hundred_problems_some_of_each_kind_are_told() -> None:
    """The last to come may be the one that counts."""
    long = "d/" * 500 + "é.ts"
    problems = [problem("path_refused", f"cannot use path {long}", long, "too_long") for _ in range(150)]
    problems += [problem("drift", "changed", long) for _ in range(49)]
    problems += [problem("token_refused", "the session is over")]
    body = fitted(HEAD, problems)
    assert size(body) <= MOST_BYTES
    assert set(kinds(body)) == {"path_refused", "drift", "token_refused"}
    assert abs(kinds(body).count("drift") - kinds(body).count("path_refused")) <= 1
    assert body["problems_left_out"] == 200 - len(body["problems"]) > 0


def test_without_room_there_is_the_head_alone() -> None:
    body = fitted(HEAD, [problem("drift", "x")], most=0)
    assert body == {**HEAD, "problems": [], "problems_left_out": 1}
    assert size(body) < 1024


@given(ANY_TEXT, st.integers(60, 5_000))
def test_what_is_cut_is_no_longer_than_allowed_and_says_what_is_gone(text: str, most: int) -> None:
    short = cut(text, most)
    assert size(short) <= most
    clean = text.encode("utf-8", "backslashreplace").decode()
    if size(clean) <= most:
        assert short == clean
    else:
        before, _, after = short.partition(" … ")
        after = after.partition(" … ")[2]
        assert clean.startswith(before)
        assert clean.endswith(after)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["kind", "message", "file", "frame", "stack", "line"]),
            st.one_of(st.none(), st.integers(0, 2**53), st.text(max_size=5000)),
        ),
        max_size=60,
    )
)
def test_errors_of_the_preview_are_cut_and_counted(errors: list[dict[str, object]]) -> None:
    body = fitted_errors(errors, 8000)
    kept = body["errors"]
    assert isinstance(kept, list)
    assert len(kept) <= MOST_ERRORS
    assert body["errors_truncated"] == len(errors) - len(kept)
    assert len(orjson.dumps(kept)) <= 8002
