"""The arithmetic of the capacity run: slopes and their intervals, what is called bent, what is refused."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.capacity.estimate import Refused, Size, fit_sizes, line_of, mean_of

SIZES = (500, 1000, 2000, 4000)


def noisy(dice: random.Random, cost: float, fixed: float, noise: float) -> list[tuple[float, float]]:
    return [(n, fixed + cost * n * (1 + dice.gauss(0, noise))) for n in SIZES for _ in range(5)]


@given(st.floats(1e-6, 1e6), st.floats(0, 1e6))
def test_a_straight_line_is_found_and_carried_on(cost: float, fixed: float) -> None:
    line = line_of([(n, fixed + cost * n) for n in SIZES for _ in range(3)])
    assert line.slope.value == pytest.approx(cost, rel=1e-3, abs=fixed * 1e-9)
    assert line.at(100_000).value == pytest.approx(fixed + cost * 100_000, rel=1e-3, abs=fixed * 1e-4)


def test_the_interval_has_the_truth_in_it_nineteen_times_of_twenty() -> None:
    dice = random.Random(1)
    hits = 0
    for _ in range(500):
        points = [(n, 3.0 + 0.25 * n + dice.gauss(0, 20)) for n in SIZES for _ in range(5)]
        slope = line_of(points).slope
        hits += slope.low <= 0.25 <= slope.high
    assert 0.92 <= hits / 500 <= 0.98
    hits = sum((m := mean_of([dice.gauss(7, 2) for _ in range(6)])).low <= 7 <= m.high for _ in range(500))
    assert 0.92 <= hits / 500 <= 0.98


def test_what_is_bent_is_said_and_what_only_scatters_is_not() -> None:
    dice = random.Random(2)
    assert sum(line_of(noisy(dice, 0.5, 10, 0.03)).bent is not None for _ in range(100)) <= 10
    slower = [(n, 100 * n**0.5 * (1 + dice.gauss(0, 0.01))) for n in SIZES for _ in range(5)]
    faster = [(n, n * n / 1000 * (1 + dice.gauss(0, 0.01))) for n in SIZES for _ in range(5)]
    assert line_of(slower).bent == "grows slower above 2000 sessions"
    assert line_of(faster).bent == "grows faster above 2000 sessions"


def test_a_slope_that_may_be_anything_is_refused() -> None:
    dice = random.Random(3)
    with pytest.raises(Refused, match="anywhere from"):
        line_of([(n, dice.gauss(0, 1000)) for n in SIZES for _ in range(5)])
    for few in ([], [(1, 1.0)], [(1, 1.0), (1, 2.0), (1, 3.0)], [(1, 1.0), (2, 2.0)]):
        with pytest.raises(Refused, match="least"):
            line_of(few)
    with pytest.raises(Refused, match="once"):
        mean_of([1.0])


def test_sizes_that_were_disturbed_or_too_busy_do_not_count_and_two_are_too_few() -> None:
    good = [Size(n, 0.01, {"orchestrator": 0.1 * n / 1000}) for n in SIZES]
    assert fit_sizes(good) == ([*SIZES], [])
    busy = [*good[:3], Size(4000, 0.01, {"orchestrator": 0.61, "realtime": 0.2})]
    assert fit_sizes(busy) == ([500, 1000, 2000], ["4000: orchestrator was busy for 61% of the time"])
    late = [*good[:3], Size(4000, 0.0, {}, late=0.11)]
    assert fit_sizes(late)[1] == ["4000: 11% of the work was not done in its time"]
    noisy = [good[0], good[1], Size(2000, 0.06, {}), Size(4000, 0.5, {})]
    with pytest.raises(Refused, match="2000: others took 6% of the processors; 4000: others took 50%"):
        fit_sizes(noisy)
