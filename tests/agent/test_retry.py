"""When something is tried again: spread, bounded, never sooner than asked, and not for ever."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import CredentialRejected, MalformedMessage, Unavailable
from agent.replay.simulated_clock import simulate
from agent.retry import Backoff, asked_wait, http_date, retry_after, retrying, within

BUSY = Unavailable("peer", "busy", 17.0)


@pytest.fixture(autouse=True)
def _same_dice() -> None:
    random.seed(7)


@given(
    first=st.floats(0.001, 10),
    factor=st.floats(1, 1000),
    share=st.floats(0, 1),
    failures=st.integers(1, 5000),
)
def test_a_wait_is_between_the_least_and_a_bound_that_doubles_up_to_the_most(
    first: float, factor: float, share: float, failures: int
) -> None:
    most, least = first * factor, first * share
    wait = Backoff(first, most, least).delay(failures)
    assert least <= wait <= min(most, first * 2.0 ** min(failures - 1, 60)) * (1 + 1e-9)


@pytest.mark.parametrize(("failures", "bound"), [(1, 0.5), (2, 1.0), (5, 8.0), (9, 30.0), (10_000, 30.0)])
def test_it_is_spread_over_all_of_that(failures: int, bound: float) -> None:
    backoff = Backoff(0.5, 30.0)
    waits = sorted(backoff.delay(failures) for _ in range(1000))
    for share in (0.1, 0.5, 0.9):
        assert waits[int(share * 1000)] / bound == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize(
    ("error", "asked"),
    [(BUSY, 17.0), (Unavailable("peer", "busy"), 0.0), (MalformedMessage("answer", "x"), 0.0), (None, 0.0)],
)
def test_a_peer_is_not_asked_sooner_than_it_wants(error: Exception | None, asked: float) -> None:
    assert asked_wait(error) == asked
    assert asked <= Backoff(0.25, 15.0).delay(3, error) <= max(asked, 1.0)


def test_nothing_is_waited_for_when_the_cause_is_gone() -> None:
    backoff = Backoff(5.0, 5.0, 5.0, at_once=(CredentialRejected,))
    assert backoff.delay(1, CredentialRejected("old")) == 0.0
    assert backoff.delay(1, Unavailable("peer", "away")) == 5.0


def tried(*errors: Exception, attempts: int) -> tuple[list[float], object]:
    """When a function that fails so was called, and what became of it."""
    waiting, times = list(errors), list[float]()

    async def call() -> str:
        times.append(asyncio.get_running_loop().time())
        if waiting:
            raise waiting.pop(0)
        return "done"

    async def scenario() -> object:
        backoff = Backoff(1.0, 8.0, 1.0, at_once=(CredentialRejected,))
        patiently = retrying(backoff, attempts=attempts, on=(Unavailable, CredentialRejected))
        try:
            return await patiently(call)
        except (Unavailable, CredentialRejected, MalformedMessage) as error:
            return error

    became = simulate(scenario())
    return [after - before for before, after in pairwise(times)], became


def test_a_call_is_made_again_after_the_waits() -> None:
    away = Unavailable("peer", "away")
    waits, became = tried(away, BUSY, CredentialRejected("old"), away, attempts=9)
    assert became == "done"
    assert waits[0] == pytest.approx(1.0)
    assert waits[1] == pytest.approx(17.0)
    assert waits[2] == pytest.approx(0.0)
    assert 1.0 <= waits[3] <= 8.0


def test_the_last_error_is_raised_as_it_is_and_another_one_at_once() -> None:
    waits, became = tried(BUSY, BUSY, BUSY, attempts=3)
    assert (len(waits), became) == (2, BUSY)
    unreadable = MalformedMessage("answer", "x")
    assert tried(unreadable, attempts=3) == ([], unreadable)


def test_a_deadline_that_passes_is_a_peer_that_is_away() -> None:
    async def scenario() -> None:
        now = asyncio.get_running_loop().time
        began = now()
        with pytest.raises(Unavailable, match="peer is unavailable: no answer within 5 s"):
            async with within(5, "peer", "no answer within 5 s"):
                await asyncio.sleep(60)
        assert now() - began == pytest.approx(5)
        async with within(5, "peer", "no answer within 5 s"):
            await asyncio.sleep(4)

    simulate(scenario())


def test_who_is_cancelled_within_a_deadline_is_cancelled() -> None:
    async def waits() -> None:
        async with within(5, "peer", "no answer"):
            await asyncio.sleep(60)

    async def scenario() -> None:
        task = asyncio.create_task(waits())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    simulate(scenario())


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None), ("", None), ("soon", None), ("nan", None), ("-3", 0.0), ("0.5", 0.5), ("1e9", 300.0),
        ("inf", 300.0), ("Wed, 21 Oct 2015 07:28:10 GMT", 10.0), ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0),
        ("Wed, 99 Oct 2015 07:28:10 GMT", None), ("Wed, 21 Oct 9999 07:28:10 GMT", 300.0),
    ],
)  # fmt: skip
def test_retry_after_in_both_forms(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, now=1445412480.0) == seconds


@pytest.mark.parametrize(
    ("value", "moment"),
    [("Wed, 21 Oct 2015 07:28:00 GMT", 1445412480.0), ("yesterday", None), ("", None), (None, None)],
)
def test_an_http_date_is_a_moment_or_nothing(value: str | None, moment: float | None) -> None:
    assert http_date(value) == moment
