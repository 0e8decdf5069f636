"""A leak is found, and noise, steps and bursts are not taken for one."""

from __future__ import annotations

import random

import pytest

from soak.growth import DESCRIPTORS, MEMORY, WARM_UP, Trend, bins, judge, trend

MB = 1e6


def life(seconds: float, per_hour: float, seed: int = 0) -> list[tuple[float, float]]:
    """Memory as interpreters have it: a start that fills caches, bursts of work, and a trend."""
    dice = random.Random(seed)
    samples = []
    for n in range(int(seconds / 5)):
        at = 100 + n * 5.0
        begun = 5 * MB * min(n * 5, WARM_UP) / WARM_UP
        burst = dice.choice([0, 0, 0, 0, 4 * MB]) + dice.uniform(0, 0.2 * MB)
        samples.append((at, 45 * MB + begun + burst + per_hour * n * 5 / 3600))
    return samples


@pytest.mark.parametrize("seed", range(20))
def test_a_steady_process_does_not_grow_however_it_bursts(seed: int) -> None:
    found = trend(life(700, 0, seed))
    assert found is not None
    assert abs(found.slope) < MEMORY.role / 2


@pytest.mark.parametrize("per_hour", [15 * MB, 60 * MB])
def test_a_leak_is_measured_as_what_it_is(per_hour: float) -> None:
    found = trend(life(700, per_hour))
    assert found is not None
    assert found.slope == pytest.approx(per_hour, rel=0.15)
    assert judge([found], MEMORY).grows


def test_one_step_of_the_interpreter_is_no_growth() -> None:
    samples = [(at, value + (1 * MB if at > 300 else 0)) for at, value in life(700, 0)]
    found = trend(samples)
    assert found is not None
    assert not judge([found] * 3, MEMORY).grows


def test_a_descriptor_lost_by_every_reconnect_is_found() -> None:
    """Twenty reconnects in ten minutes."""
    found = trend([(n * 5.0, 20.0 + n * 5 // 30) for n in range(140)])
    assert found is not None
    assert judge([found], DESCRIPTORS).grows


def test_a_life_that_was_too_short_is_not_judged() -> None:
    assert trend(life(WARM_UP + 60, 500 * MB)) is None
    assert trend([]) is None
    judgement = judge([None, None], MEMORY)
    assert (judgement.judged, judgement.median, judgement.grows) == (0, None, False)


def slope(per_hour: float) -> Trend:
    return Trend(per_hour, 600, 0, 0)


def test_one_more_connection_in_three_minutes_is_no_leak() -> None:
    assert not judge([Trend(40, 180, 20, 22)], DESCRIPTORS).grows
    assert not judge([Trend(80, 255, 27, 37)], DESCRIPTORS).grows, "directories that are open again"
    assert judge([Trend(80, 600, 20, 33)], DESCRIPTORS).grows


def test_a_small_leak_of_all_and_a_large_one_of_one_are_both_found() -> None:
    fleet = [slope(1 * MB)] * 19
    assert not judge([*fleet, slope(30 * MB)], MEMORY).grows
    assert judge([*fleet, slope(40 * MB)], MEMORY).grows
    assert judge([slope(14 * MB)] * 20, MEMORY).grows


def test_a_bin_is_its_least_value() -> None:
    assert bins([(0, 9), (1, 3), (2, 7), (11, 5)], begin=0, width=10) == [(5, 3), (15, 5)]
