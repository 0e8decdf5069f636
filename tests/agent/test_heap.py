"""What glibc keeps and what it returns, in processes of their own: the settings cannot be taken back."""

from __future__ import annotations

import asyncio
import platform
import subprocess
import sys

import pytest

from agent import heap
from agent.simulated import simulate

on_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc has these settings; nothing happens elsewhere"
)

EVENTS = """
import resource
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def event():
    return [b"x" * 100_000 for _ in range(4)]
for _ in range(20):
    event()
before = faults()
for _ in range(200):
    event()
print((faults() - before) / 200)
"""

BURST = """
import psutil
me = psutil.Process()
before = me.memory_info().rss
burst = [b"x" * 100_000 for _ in range(300)]
del burst
kept = me.memory_info().rss - before
trim()
print(kept / 1e6, (me.memory_info().rss - before) / 1e6)
"""


def printed(program: str) -> list[float]:
    code = f"from agent.heap import settle, trim\n{program}"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


@on_glibc
def test_an_event_of_100_kb_gets_no_new_pages() -> None:
    (unsettled,) = printed(EVENTS)
    (settled,) = printed(f"settle()\n{EVENTS}")
    assert unsettled > 20, "glibc no longer returns every event's memory: `settle` has nothing left to do"
    assert settled < 1


@on_glibc
def test_what_a_burst_took_goes_back_when_asked_for() -> None:
    kept, left = printed(f"settle()\n{BURST}")
    assert kept > 25
    assert left < 3


def test_it_is_asked_for_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[float] = []

    async def for_a_while() -> None:
        monkeypatch.setattr(heap, "trim", lambda: at.append(asyncio.get_running_loop().time()))
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await heap.trim_every(30)
        at[:] = [round(moment - began) for moment in at]

    simulate(for_a_while())
    assert at == [30, 60, 90]
