"""A process whose first thread has ended while another goes on: `Z` in /proc/PID/stat, and alive."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.devserver import guard
from agent.devserver.process import Child
from agent.devserver.sandbox import Launch, Rights
from tests.agent.processes import until, zombies_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc, and calls Linux by number")

LEADERLESS = """
import ctypes, os, platform, signal, sys, threading, time
def others():
    if len(sys.argv) > 2:
        os.fork()
    while True:
        with open(sys.argv[1], "a") as file:
            file.write(f"{os.getpid()}\\n")
        time.sleep(0.02)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
threading.Thread(target=others).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)  # exit(2): of this thread alone
"""


@pytest.fixture
def says(tmp_path: Path) -> Iterator[Path]:
    """Where the processes without a leader write their pids; none of them outlives the test."""
    file = tmp_path / "pids"
    file.touch()
    yield file
    for pid in pids(file):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def pids(file: Path) -> set[int]:
    return {int(line) for line in file.read_text().split("\n")[:-1]}


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def leaderless(file: Path, *more: str) -> tuple[str, ...]:
    return (sys.executable, "-c", LEADERLESS, str(file), *more)


async def start(*argv: str) -> Child:
    env = {"PATH": os.environ["PATH"]}
    return await Child.start(Launch(argv, "/", env, Rights()), on_line=lambda line: None)


async def up(says: Path, count: int = 1) -> set[int]:
    await until(lambda: len(pids(says)) == count)
    leader = min(pids(says))
    await until(lambda: state(leader) == "Z")
    return pids(says)


@pytest.mark.parametrize("fork", [(), ("fork",)], ids=["alone", "with-a-child"])
async def test_it_goes_with_the_stop(says: Path, fork: tuple[str, ...]) -> None:
    program = await start("sh", "-c", 'setsid -f "$@"; exec sleep 3600', "sh", *leaderless(says, *fork))
    found = await up(says, 1 + len(fork))
    assert found <= guard.descendants(program.pid)
    await program.stop(0.1)
    assert not any(map(alive, found))


async def test_it_does_not_outlive_a_program_that_ends_by_itself(says: Path, tmp_path: Path) -> None:
    ends = f'setsid -f "$@"; until test -e {tmp_path}/end; do sleep 0.02; done; exit 5'
    program = await start("sh", "-c", ends, "sh", *leaderless(says))
    (found,) = await up(says)
    (tmp_path / "end").touch()
    assert await program.wait() == 5
    assert not alive(found)


async def test_the_program_itself_may_be_one(says: Path) -> None:
    program = await start(*leaderless(says))
    (found,) = await up(says)
    await program.stop(0.1)
    assert not alive(found)


def test_the_dead_are_not_taken_for_it() -> None:
    """A child that ended and was not waited for."""
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert child in zombies_of(os.getpid())
    assert child not in guard.descendants(os.getpid())
    assert (child, os.getpid(), True) in list(guard.processes())
    os.waitpid(child, 0)


def test_a_guard_that_waits_for_what_cannot_be_killed_rests() -> None:
    """What is in the kernel's hands (a network disk that hangs) may never end: that must not cost a core."""
    pauses = [guard.pause_after(rounds) for rounds in range(200)]
    assert pauses[0] == 0.005
    assert pauses[-1] == guard.LONGEST_PAUSE
    assert sum(pauses[:20]) > 0.5
