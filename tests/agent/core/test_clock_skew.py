"""The other clock's lead, from whole seconds: always within the bounds, narrower by answers, forgotten at a jump."""

from __future__ import annotations

import math

import httpx
import pytest
import respx
from hypothesis import given
from hypothesis import strategies as st

from agent.core.clock_skew import DRIFT, JUMP, ClockSkew, Moment
from agent.session_api import SessionApi
from agent.tokens import Tokens
from tests.agent.test_session_api import BASE, SESSION, TOKEN, URL

START = 1_800_000_000.0

seconds = st.floats(0.0, 120.0)
exchanges = st.lists(
    st.tuples(seconds, st.floats(0.0, 2.0), st.floats(0.0, 2.0)), min_size=1, max_size=40
).map(lambda each: [(pause + 0.001, out, back) for pause, out, back in each])
"""Pause before the question, its way there, the answer's way back; in seconds of true time."""


@given(offset=st.floats(-1e5, 1e5), rate=st.floats(-DRIFT, DRIFT), exchanges=exchanges, after=seconds)
def test_the_true_skew_is_always_within_the_bounds(
    offset: float, rate: float, exchanges: list[tuple[float, float, float]], after: float
) -> None:
    skew = ClockSkew()
    now = 0.0

    def ours() -> Moment:
        return Moment(START + now, now)

    def theirs() -> float:
        return START + now + offset + rate * now

    for pause, out, back in exchanges:
        now += pause
        sent = ours()
        now += out
        date = math.floor(theirs())
        now += back
        skew.answered(date, sent, ours())
        known = skew.bounds(ours())
        assert known is not None
        assert known.low - 1e-6 <= theirs() - ours().wall <= known.high + 1e-6
    now += after
    known = skew.bounds(ours())
    assert known is not None
    true = theirs() - ours().wall
    assert known.low - 1e-6 <= true <= known.high + 1e-6
    assert abs(known.estimate - true) <= known.uncertainty + 1e-6
    assert (skew.resets, known.answers) == (0, len(exchanges))


@given(offset=st.floats(-100, 100), phases=st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_each_answer_narrows_or_leaves_it(offset: float, phases: list[float]) -> None:
    skew, width = ClockSkew(), math.inf
    for n, phase in enumerate(phases):
        at = Moment(START + n + phase, n + phase)
        skew.answered(math.floor(at.wall + offset), at, at)
        known = skew.bounds(at)
        assert known is not None
        assert known.high - known.low <= width + 2 * DRIFT * 2 + 1e-6, "by drift alone, in at most 2 s"
        width = known.high - known.low
    assert width <= 1.0 + 1e-6


def test_a_hundred_answers_at_any_phase_tell_it_to_some_hundredths() -> None:
    skew = ClockSkew()
    for n in range(100):
        at = Moment(START + n * 30 * 0.618034, n * 30 * 0.618034)
        skew.answered(math.floor(at.wall + 7.25), at, at)
    known = skew.bounds(at)
    assert known is not None
    assert abs(known.estimate - 7.25) <= known.uncertainty < 0.1


@given(step=st.one_of(st.floats(-1e4, -JUMP * 1.1), st.floats(JUMP * 1.1, 1e4)), offset=st.floats(-50, 50))
def test_a_step_of_our_clock_forgets_everything(step: float, offset: float) -> None:
    skew = ClockSkew()
    at = Moment(START, 10.0)
    skew.answered(math.floor(at.wall + offset), at, at)
    later = Moment(START + 30 + step, 40.0)
    assert skew.bounds(later) is None
    assert skew.resets == 1
    skew.answered(math.floor(START + 30 + offset), later, later)
    known = skew.bounds(later)
    assert known is not None
    assert known.low - 1e-6 <= offset - step <= known.high + 1e-6


@given(step=st.one_of(st.floats(-1e4, -2.1), st.floats(2.1, 1e4)))
def test_a_step_of_the_other_clock_is_a_contradiction_and_the_new_answer_stands(step: float) -> None:
    skew = ClockSkew()
    for n, lead in ((0, 0.0), (1, step)):
        at = Moment(START + 0.5 + n, n)
        skew.answered(math.floor(at.wall + lead), at, at)
    known = skew.bounds(at)
    assert known is not None
    assert (known.answers, skew.resets) == (1, 1)
    assert known.low <= step <= known.high


def test_a_clock_set_while_a_question_was_under_way_teaches_nothing() -> None:
    skew = ClockSkew()
    skew.answered(START, Moment(START, 1.0), Moment(START + 3600, 1.1))
    assert skew.bounds(Moment(START + 3600, 1.1)) is None


@given(lead=st.floats(-1e4, 1e4), lag=st.floats(0, 100))
def test_the_lag_is_corrected_when_there_is_evidence_and_never_negative(lead: float, lag: float) -> None:
    skew = ClockSkew()
    now = Moment(START + 0.5, 1.0)
    committed = now.wall + lead - lag
    assert skew.since(committed, now) == max(0.0, now.wall - committed)
    skew.answered(math.floor(now.wall + lead), now, now)
    known = skew.bounds(now)
    assert known is not None
    said = skew.since(committed, now)
    assert said >= 0
    assert abs(said - lag) <= known.uncertainty + 1e-5
    if known.low <= 0 <= known.high:
        assert known.estimate == 0


@respx.mock
@pytest.mark.parametrize("status", [200, 401, 503])
async def test_every_answer_with_a_date_teaches_whatever_it_says(status: int) -> None:
    skew = ClockSkew()
    answer = httpx.Response(
        status,
        json={"epoch": "e", "revision": 1},
        headers={"date": "Fri, 15 Jan 2027 08:05:00 GMT"},  # START + 300 s
    )
    respx.put(f"{URL}/status").mock(return_value=answer)
    async with httpx.AsyncClient() as http:
        api = SessionApi(BASE, SESSION, Tokens(TOKEN), http, clock=lambda: Moment(START, 1.0), skew=skew)
        try:
            await api.report_status({})
        except Exception:
            assert status != 200
    known = skew._bounds
    assert known is not None
    assert known.low == pytest.approx(300, abs=0.01)
    assert known.high == pytest.approx(301, abs=0.01)


@respx.mock
@pytest.mark.parametrize("date", [None, "", "yesterday", "Fri, 99 Jan 2027 08:05:00 GMT"])
async def test_an_answer_without_a_readable_date_teaches_nothing(date: str | None) -> None:
    skew = ClockSkew()
    headers = {} if date is None else {"date": date}
    respx.put(f"{URL}/status").mock(
        return_value=httpx.Response(200, json={"epoch": "e", "revision": 1}, headers=headers)
    )
    async with httpx.AsyncClient() as http:
        await SessionApi(BASE, SESSION, Tokens(TOKEN), http, skew=skew).report_status({})
    assert skew._bounds is None
