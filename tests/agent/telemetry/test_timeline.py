"""The timeline of a start: each part once, in order, told as spans."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.telemetry.timeline import PARTS, Part, StartTimeline


@given(st.lists(st.sampled_from(PARTS), max_size=20))
def test_each_part_counts_once_and_none_goes_back(marks: list[Part]) -> None:
    now = 0.0
    told: list[tuple[str, float, float]] = []
    timeline = StartTimeline(lambda: now, lambda: 1000.0 + now)
    timeline.on_part = lambda part, since, until: told.append((part, since, until))
    first: dict[Part, float] = {}
    for part in marks:
        now += 1.0
        timeline.mark(part)
        if "first_page" not in first or part == "shown":
            first.setdefault(part, now)
    assert timeline.report() == {part: first[part] for part in PARTS if part in first}
    assert [part for part, _, _ in told] == list(first)
    assert all(since == before for (_, since, _), (_, _, before) in zip(told[1:], told, strict=False))


def test_a_restart_of_the_dev_server_is_no_part_of_the_start() -> None:
    timeline = StartTimeline(lambda: 1.0)
    for part in ("hydrated", "modules", "dev_server", "first_page", "modules"):
        timeline.mark(part)  # type: ignore[arg-type]
    assert list(timeline.report()) == ["hydrated", "modules", "dev_server", "first_page"]
