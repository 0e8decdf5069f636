"""The queue between the socket and the consumer: in order, bounded, and never silent about what it dropped."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.link.source import Received, Resync, SignalQueue

MOST_EVENTS, MOST_BYTES = 5, 100


def event(number: int) -> Received:
    return Received("file:update", {"n": number}, 0.0)


def taken(queue: SignalQueue) -> Any:
    """What `get` gives when something is there, without a loop."""
    try:
        queue.get().send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the queue was empty")


steps = st.lists(
    st.tuples(st.just("put"), st.integers(0, 60)) | st.just(("resync", 0)) | st.just(("get", 0)), max_size=60
)


@given(steps)
def test_nothing_is_lost_without_a_resync_after_it(script: list[tuple[str, int]]) -> None:
    """A consumer that forgets what it lacks at each `Resync` lacks nothing in the end."""
    queue = SignalQueue(MOST_EVENTS, MOST_BYTES)
    lacking: set[int] = set()
    put = 0

    def consume() -> None:
        signal = taken(queue)
        if isinstance(signal, Resync):
            # Whatever was committed so far comes with the catch-up.
            lacking.difference_update(range(put + 1))
        else:
            lacking.discard(signal.payload["n"])

    for step, size in script:
        if step == "put":
            put += 1
            lacking.add(put)
            queue.put(event(put), size)
        elif step == "resync":
            queue.resync("joined")
        elif len(queue):
            consume()
        assert len(queue) <= MOST_EVENTS + 1
    while len(queue):
        consume()
    assert not lacking
    assert queue.resyncs_waiting == 0


@given(st.lists(st.integers(0, 200), max_size=30))
def test_bytes_are_bounded_whatever_the_sizes(sizes: list[int]) -> None:
    queue = SignalQueue(1_000, MOST_BYTES)
    held: list[int] = []
    for number, size in enumerate(sizes):
        if queue.put(event(number), size):
            held.append(size)
        else:
            held.clear()
        assert sum(held) <= MOST_BYTES


def test_resyncs_in_a_row_are_one() -> None:
    queue = SignalQueue(MOST_EVENTS, MOST_BYTES)
    for _ in range(10_000):
        queue.resync("joined")
    assert len(queue) == 1
    queue.put(event(1), 1)
    queue.resync("replication_ready")
    assert [taken(queue), taken(queue), taken(queue)] == [
        Resync("joined"),
        event(1),
        Resync("replication_ready"),
    ]


async def test_a_waiting_consumer_is_woken() -> None:
    queue = SignalQueue(MOST_EVENTS, MOST_BYTES)
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.put(event(1), 1)
    assert await asyncio.wait_for(waiting, 30) == event(1)
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.resync("joined")
    assert await asyncio.wait_for(waiting, 30) == Resync("joined")
