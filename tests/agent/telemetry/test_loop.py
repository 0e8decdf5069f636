"""The watch over the event loop: what it counts, for how long it remembers, and where it is shown."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from agent.telemetry.loop import LOGGED, NOTED, SLOT, SLOTS, LoopStalls, WatchedLoop, stalls_of_running_loop
from tests.agent.built import built, settings
from tests.agent.loops import longest_turn


def work(seconds: float) -> None:
    """Use the processor for that long, whatever else the machine does."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def test_a_turn_is_counted_whole_and_waiting_is_not() -> None:
    async def waits_and_works() -> None:
        await asyncio.sleep(0.05)
        work(0.2)
        await asyncio.sleep(0.05)
        for _ in range(10):
            work(0.03)
            await asyncio.sleep(0)

    took = await asyncio.to_thread(longest_turn, waits_and_works)
    assert 0.2 <= took < 0.25


def test_a_stall_is_shown_for_five_minutes_and_the_longest_for_ever(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = 0.0
    stalls = LoopStalls(lambda: now)
    stalls.note(now, 0.3)
    stalls.note(now, LOGGED)
    assert capsys.readouterr().out.count("loop.stalled") == 1
    for _ in range(SLOTS * 3):
        now += SLOT / 3
        assert stalls.recent() == LOGGED
        stalls.note(now, NOTED)
    now += 1
    assert stalls.recent() == NOTED
    now += SLOT * SLOTS
    assert stalls.report() == {"longest_stall_seconds": LOGGED, "recent_stall_seconds": 0.0}


def test_it_is_in_status_and_metrics(tmp_path: Path) -> None:
    async def agent() -> None:
        assert stalls_of_running_loop() is stalls
        async with built(settings(tmp_path)) as made:
            stalls.note(stalls.clock(), 0.125)
            assert made.report.status()["loop"] == {
                "longest_stall_seconds": stalls.longest,
                "recent_stall_seconds": stalls.longest,
            }
            shown = made.report.problems.metrics.registry.get_sample_value("preview_agent_loop_stall_seconds")
            assert shown == stalls.longest >= 0.125

    stalls = LoopStalls()
    with asyncio.Runner(loop_factory=lambda: WatchedLoop(stalls)) as runner:
        runner.run(agent())


async def test_a_loop_that_is_not_watched_says_nothing(tmp_path: Path) -> None:
    async with built(settings(tmp_path)) as made:
        assert made.report.status()["loop"] is None
        sample = made.report.problems.metrics.registry.get_sample_value
        assert sample("preview_agent_loop_stall_seconds") is None
