"""What glibc keeps and what it returns, in processes that `entrypoint.sh` starts: it reads its variables once."""

from __future__ import annotations

import asyncio
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from agent import memory
from agent.replay.simulated_clock import simulate
from orchestrator_stub.machines.local import ALLOCATOR

ROOT = Path(__file__).parents[2]

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
from agent.memory import trim
me = psutil.Process()
before = me.memory_info().rss
burst = [b"x" * 100_000 for _ in range(300)]
del burst
kept = me.memory_info().rss - before
trim()
print(kept / 1e6, (me.memory_info().rss - before) / 1e6)
"""


def started(directory: Path, *command: str, **environ: str) -> list[str]:
    """The words that `command` prints where `entrypoint.sh` finds it in the place of the agent."""
    agent = directory / "preview-agent"
    agent.write_text('#!/bin/sh\n[ "$*" = run ] && exec "$PROGRAM" ${SOURCE:+-c "$SOURCE"}\n')
    agent.chmod(0o755)
    program, source = (*command, "")[:2]
    given = {"PATH": f"{directory}:/usr/bin:/bin", "PROGRAM": program, "SOURCE": source, **environ}
    done = subprocess.run(
        ["sh", ROOT / "entrypoint.sh"], cwd=ROOT, env=given, check=True, capture_output=True, text=True
    )
    return done.stdout.split()


@on_glibc
def test_an_event_of_100_kb_gets_no_new_pages(tmp_path: Path) -> None:
    plain = subprocess.run([sys.executable, "-c", EVENTS], check=True, capture_output=True, text=True)
    assert float(plain.stdout) > 20, (
        "glibc no longer returns every event's memory: its variables are not needed"
    )
    (settled,) = started(tmp_path, sys.executable, EVENTS)
    assert float(settled) < 1


@on_glibc
def test_what_a_burst_took_goes_back_when_asked_for(tmp_path: Path) -> None:
    kept, left = map(float, started(tmp_path, sys.executable, BURST))
    assert kept > 25
    assert left < 3


def test_what_is_set_already_stays_and_the_local_driver_sets_the_same(tmp_path: Path) -> None:
    def of_glibc(words: list[str]) -> dict[str, str]:
        return dict(word.split("=", 1) for word in words if word.startswith("MALLOC_"))

    assert of_glibc(started(tmp_path, "/usr/bin/env")) == ALLOCATOR
    assert of_glibc(started(tmp_path, "/usr/bin/env", MALLOC_ARENA_MAX="2")) == {
        **ALLOCATOR, "MALLOC_ARENA_MAX": "2"
    }  # fmt: skip


def test_it_is_asked_for_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[float] = []

    async def for_a_while() -> None:
        monkeypatch.setattr(memory, "trim", lambda: at.append(asyncio.get_running_loop().time()))
        began = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100):
                await memory.trim_every(30)
        at[:] = [round(moment - began) for moment in at]

    simulate(for_a_while())
    assert at == [30, 60, 90]
