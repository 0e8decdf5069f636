"""The same seed is the same soak, and a soak meets everything."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from soak.schedule import (
    DECK,
    EARLY,
    ENDS_A_SERVER,
    ENDS_AN_AGENT,
    Kind,
    Settings,
    draw,
    project_of,
    projects,
)


def test_a_seed_is_a_schedule() -> None:
    one, same, other = (list(islice(draw(Settings(seed)), 100)) for seed in (1, 1, 2))
    assert one == same != other


def test_one_deck_holds_every_kind_by_its_weight() -> None:
    assert set(DECK) == set(Kind)
    size = sum(DECK.values())
    assert Counter(fault.kind for fault in islice(draw(Settings(7)), size)) == DECK


@given(st.integers(0, 2**63))
def test_seven_minutes_of_work_meet_every_kind_whatever_the_seed(seed: int) -> None:
    faults = list(islice(draw(Settings(seed)), len(DECK)))
    assert {fault.kind for fault in faults} == set(Kind)
    assert faults[-1].at <= 7 * 60
    assert {fault.kind for fault in faults[:EARLY]} >= ENDS_A_SERVER


def test_faults_come_in_order_and_as_often_as_asked() -> None:
    times = [fault.at for fault in islice(draw(Settings(3, fault_every=5.0)), 2000)]
    assert times == sorted(times)
    assert 4.5 < times[-1] / 2000 < 5.5


def test_half_of_the_agents_are_never_ended() -> None:
    ended = {fault.agent for fault in islice(draw(Settings(5)), 1000) if fault.kind in ENDS_AN_AGENT}
    assert ended == {n for n in range(20) if n % 2}


def test_some_agents_share_a_project() -> None:
    assert len(projects(Settings(0))) == 16
    assert project_of(9) == 8
    assert all(project_of(n) in projects(Settings(0)) for n in range(20))
    assert projects(Settings(0, agents=1)) == [0]
