"""A cache with a place for each session that is heard of: none of theirs is dropped, what nobody asks for is."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.platform.recent import Recent


@given(st.lists(st.tuples(st.integers(0, 30), st.floats(0, 4), st.booleans()), max_size=200))
def test_it_forgets_what_nobody_asked_for_within_its_time_and_nothing_else(
    steps: list[tuple[int, float, bool]],
) -> None:
    now = 0.0
    recent: Recent[int, int] = Recent(seconds=10, most=20, clock=lambda: now)
    used: dict[int, float] = {}
    """Known keys, the one used longest ago first."""
    for key, passed, put in steps:
        now += passed
        if put:
            recent.put(key, key * 2)
            used.pop(key, None)
            used[key] = now
            used = {k: at for k, at in [*used.items()][-20:] if at >= now - 10}
        else:
            assert recent.get(key) == (key * 2 if key in used else None)
            if key in used:
                used.pop(key)
                used[key] = now
        assert len(recent) == len(used)


def test_any_number_that_comes_in_turn_is_known_at_the_second_turn() -> None:
    """With a fixed number of places, one more than places had each forgotten just before it came again."""
    now = 0.0
    recent: Recent[int, int] = Recent(clock=lambda: now)
    many = 30_000
    for key in range(many):
        now += 30 / many
        recent.put(key, key)
    hits = 0
    for key in range(many):
        now += 30 / many
        hits += recent.get(key) is not None
    assert hits == many
    now += 301
    recent.put(-1, 0)
    assert len(recent) == 1, "those who ended are not kept for ever"
    recent.pop(-1)
    recent.pop(-1)
    recent.put(1, 1)
    recent.clear()
    assert len(recent) == 0
