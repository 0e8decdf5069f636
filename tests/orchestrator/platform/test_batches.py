"""Questions answered together: all of them, in order, and each by itself when one brings trouble."""

from __future__ import annotations

import asyncio
from collections.abc import Hashable, Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.replay.simulated_clock import simulate
from orchestrator_stub.platform.batches import MOST, PACE, Batches


class Answers:
    """Answers each (key, n) with itself, in rounds; the first waits for `go`."""

    def __init__(self, wrong: frozenset[int] = frozenset()) -> None:
        self.rounds: list[list[tuple[int, int]]] = []
        self.go = asyncio.Event()
        self._wrong = wrong

    async def __call__(self, questions: Sequence[tuple[int, int]]) -> Mapping[Hashable, tuple[int, int]]:
        self.rounds.append(list(questions))
        await self.go.wait()
        if any(key in self._wrong for key, _ in questions):
            raise ValueError("one of them is wrong")
        return {key: (key, n) for key, n in questions if key >= 0}


@given(st.lists(st.integers(-2, 6), min_size=1, max_size=40), st.frozensets(st.integers(0, 6), max_size=2))
def test_everybody_gets_their_own_answer_in_order_whatever_happens_to_the_others(
    keys: list[int], wrong: frozenset[int]
) -> None:
    async def ask() -> None:
        answers = Answers(wrong)
        batches = Batches(answers, lambda question: question[0], alone=(ValueError,))
        asked = [asyncio.create_task(batches.ask((key, n))) for n, key in enumerate(keys)]
        await asyncio.sleep(0)
        answers.go.set()
        got = await asyncio.gather(*asked, return_exceptions=True)
        for n, (key, answer) in enumerate(zip(keys, got, strict=True)):
            if key in wrong:
                assert isinstance(answer, ValueError)
            else:
                assert answer == (None if key < 0 else (key, n))
        for each in answers.rounds:
            assert len({key for key, _ in each}) == len(each), "no round has two of one key"
        order: dict[int, list[int]] = {}
        for each in answers.rounds:
            for key, n in each:
                if n not in order.setdefault(key, []):
                    order[key].append(n)
        assert all(ns == sorted(ns) for ns in order.values())

    asyncio.run(ask())


async def test_what_comes_meanwhile_is_one_round_and_the_first_waits_for_nobody() -> None:
    answers = Answers()
    batches = Batches(answers, lambda question: question[0])
    first = asyncio.create_task(batches.ask((0, 0)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert answers.rounds == [[(0, 0)]], "asked at once"
    rest = [asyncio.create_task(batches.ask((n, n))) for n in range(1, MOST + 11)]
    gone = asyncio.create_task(batches.ask((-1, -1)))
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    answers.go.set()
    await asyncio.gather(first, *rest)
    assert [len(each) for each in answers.rounds] == [1, MOST, 10], "who has gone is not asked about"


async def test_an_error_of_all_is_told_to_all_and_the_next_are_asked() -> None:
    answers = Answers(frozenset({1}))
    answers.go.set()
    batches = Batches(answers, lambda question: question[0])
    told = await asyncio.gather(*(batches.ask((n, n)) for n in range(3)), return_exceptions=True)
    assert all(isinstance(each, ValueError) for each in told)
    with pytest.raises(ValueError, match="wrong"):
        await batches.ask((1, 1))
    assert await batches.ask((2, 2)) == (2, 2)


def test_the_patient_wait_for_company_and_nobody_else_does() -> None:
    """In simulated time: rounds of patient ones begin `PACE` apart, one that is not takes all along at once."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        answers = Answers()
        answers.go.set()
        batches = Batches(answers, lambda question: question[0])

        async def after(seconds: float, key: int, *, patient: bool) -> float:
            await asyncio.sleep(seconds)
            asked = clock()
            assert await batches.ask((key, key), patient=patient) == (key, key)
            return clock() - asked

        waits = await asyncio.gather(
            after(0.0, 0, patient=True), after(0.01, 1, patient=True), after(0.02, 2, patient=True),
            after(0.06, 3, patient=True), after(0.07, 4, patient=False), after(1.0, 5, patient=True),
        )  # fmt: skip
        assert waits == pytest.approx([0.0, PACE - 0.01, PACE - 0.02, 0.01, 0.0, 0.0])
        assert [[key for key, _ in each] for each in answers.rounds] == [[0], [1, 2], [3, 4], [5]]

    simulate(main())
