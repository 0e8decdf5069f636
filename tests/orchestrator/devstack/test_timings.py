"""The bars of `dev --timeline`: one for each part, from where the one before ended."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.devstack.timings import BAR, PARTS, bars, start_of
from tests.fakes.origin import Answer, origin


def test_bars_follow_one_another() -> None:
    drawn = bars({"machine": 1.0, "hydrated": 2.0, "modules": 4.0}).splitlines()
    starts = [line.index("█") for line in drawn[:3]]
    lengths = [line.count("█") for line in drawn[:3]]
    assert lengths == [BAR // 4, BAR // 4, BAR // 2]
    assert [starts[1] - starts[0], starts[2] - starts[1]] == lengths[:2]
    assert drawn[2].split() == [*PARTS["modules"].split(), "█" * (BAR // 2), "2.00", "s"]
    assert drawn[3].split() == ["together", "4.00", "s"]


@given(st.dictionaries(st.sampled_from([*PARTS, "another"]), st.floats(0, 1e4)))
def test_any_figures_are_drawn(ends: dict[str, float]) -> None:
    assert len(bars(ends).rstrip().splitlines()) == len(ends) + 1


async def test_an_agent_that_does_not_say_is_no_failure() -> None:
    async with origin(Answer(b"[]")) as there:
        assert await start_of(there.url.partition("/storage")[0], 1.0) == {}
    assert await start_of("http://127.0.0.1:9", 1.0) == {}
