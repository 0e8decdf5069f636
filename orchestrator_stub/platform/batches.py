"""Collects queries that arrive while one is running, and answers them with one query.

A question that comes when nothing is asked is asked at once, and what comes meanwhile is asked in the next round: so
rounds grow with the load, and each answer is of a moment after its question. A patient one waits until `PACE` after the
last round began, unless another cannot: on a quiet day it waits for nothing either.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from typing import Final, Generic, TypeVar

MOST: Final = 500
"""Questions of one round."""

PACE: Final = 0.05
"""Seconds: of 130 heartbeats a second, those of 4,000 agents, six or seven are one commit."""

Question = TypeVar("Question")
Answer = TypeVar("Answer")


class Batches(Generic[Question, Answer]):
    """One kind of question.

    Args:
        answer: Answers a round of questions, by their keys. One that it leaves out has the answer None.
        key: What a question is about. No round has two of one key, and they are asked in the order in which they came.
        alone: Errors that one question may bring on the others of its round: each is asked alone then.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Awaitable[Mapping[Hashable, Answer]]],
        key: Callable[[Question], Hashable],
        *,
        alone: tuple[type[Exception], ...] = (),
    ) -> None:
        self._answer = answer
        self._key = key
        self._alone = alone
        self._waiting: list[tuple[Question, asyncio.Future[Answer | None]]] = []
        self._answering: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._began = float("-inf")

    async def ask(self, question: Question, *, patient: bool = False) -> Answer | None:
        """The answer to one question. Raises what answering it raises."""
        if not patient:
            self._hurry.set()
        answer: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if self._answering is None:
            self._answering = asyncio.create_task(self._go_on(), name="batches")
        return await answer

    async def _go_on(self) -> None:
        clock = asyncio.get_running_loop().time
        while self._waiting:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(self._began + PACE):
                    await self._hurry.wait()
            self._began = clock()
            taken = self._taken()
            if not self._waiting:
                self._hurry.clear()
            await self._round(taken)
        self._answering = None

    def _taken(self) -> Mapping[Hashable, tuple[Question, asyncio.Future[Answer | None]]]:
        """The next round, by key; who has gone meanwhile is not asked about."""
        taken: dict[Hashable, tuple[Question, asyncio.Future[Answer | None]]] = {}
        left = []
        for question, answer in self._waiting:
            key = self._key(question)
            if answer.done():
                continue
            if key in taken or len(taken) >= MOST:
                left.append((question, answer))
            else:
                taken[key] = question, answer
        self._waiting = left
        return taken

    async def _round(self, taken: Mapping[Hashable, tuple[Question, asyncio.Future[Answer | None]]]) -> None:
        if not taken:
            return
        try:
            found = await self._answer([question for question, _ in taken.values()])
        except Exception as error:  # whoever asked is told, and this goes on with the next
            if isinstance(error, self._alone) and len(taken) > 1:
                for key, one in taken.items():
                    await self._round({key: one})
                return
            for _, answer in taken.values():
                if not answer.done():
                    answer.set_exception(error)
            return
        for key, (_, answer) in taken.items():
            if not answer.done():
                answer.set_result(found.get(key))
