"""`traceparent` as W3C Trace Context has it; whatever is wrong with one, the event is worth as much."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.messages import read_event
from agent.core.model import Commit, TraceParent, read_traceparent

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@given(trace=st.integers(1, 2**128 - 1), span=st.integers(1, 2**64 - 1), flags=st.integers(0, 255))
def test_what_is_written_is_read(trace: int, span: int, flags: int) -> None:
    parent = TraceParent(f"{trace:032x}", f"{span:016x}", f"{flags:02x}")
    assert read_traceparent(str(parent)) == parent


def test_a_later_version_is_read_as_far_as_it_is_known() -> None:
    assert read_traceparent(f"cc-{TRACE}-{SPAN}-01-what-the-future-holds") == TraceParent(TRACE, SPAN, "01")


@pytest.mark.parametrize(
    "wrong",
    [
        None, 7, "", "00", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-more", f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01\n",
        f" 00-{TRACE}-{SPAN}-01", f"00-{TRACE[1:]}-{SPAN}-01",
    ],
)  # fmt: skip
def test_a_wrong_one_is_none_and_the_event_stands(wrong: object) -> None:
    assert read_traceparent(wrong) is None
    read = read_event("file:delete", {"file_path": "a", "version": 2, "traceparent": wrong})
    assert isinstance(read, Commit)
    assert read.trace is None
    assert len(read.changes) == 1


@given(st.text())
def test_no_text_breaks_it(text: str) -> None:
    assert read_traceparent(text) is None
