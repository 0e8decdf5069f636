"""Orphans and signals, as a subreaper and as PID 1 of a namespace. Each runs in a process of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

ORPHANS = """
import asyncio, os, sys
from agent.devserver.reaper import Reaper
from tests.agent.processes import until, zombies_of

async def main():
    reaper = Reaper()
    reaper.adopt()
    async def own(script):
        with reaper.hold():
            process = await asyncio.create_subprocess_exec("sh", "-c", script)
            reaper.own(process.pid)
        code = await process.wait()
        reaper.disown(process.pid)
        return code
    orphans = "for i in $(seq 20); do (setsid sh -c 'sleep 0.0$((RANDOM % 5))1' &) ; done; exit 7"
    codes = await asyncio.gather(*(own(orphans) for _ in range(10)), *(own("exit 7") for _ in range(30)))
    assert set(codes) == {7}, codes
    await until(lambda: reaper.reaped >= 200, 30)
    await until(lambda: not zombies_of(os.getpid()))
    print("reaped", reaper.reaped, "as", os.getpid())
    reaper.release()

asyncio.run(main())
"""

SIGNALS = """
import asyncio, signal, os
from agent.devserver.reaper import stop_signals

async def main():
    received = asyncio.Queue()
    with stop_signals(lambda number, count: received.put_nowait((number.name, count))):
        print("up", flush=True)
        while True:
            name, count = await received.get()
            print(name, count, flush=True)
            if count == 4:
                return

asyncio.run(main())
"""


def as_pid_1() -> list[str]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare")
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine allows no process namespaces")
    return command


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and subreapers")
@pytest.mark.parametrize("first", [False, True], ids=["subreaper", "pid-1"])
def test_200_orphans_are_reaped_and_no_child_is_stolen(first: bool) -> None:
    prefix = as_pid_1() if first else []
    done = subprocess.run(
        [*prefix, sys.executable, "-c", ORPHANS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert int(words[1]) >= 200
    assert (words[3] == "1") == first


async def test_pid_1_hears_every_signal_that_means_stop() -> None:
    """The kernel drops signals for which PID 1 has no handler; a second one means: now."""
    unshare = await asyncio.create_subprocess_exec(
        *as_pid_1(), sys.executable, "-c", SIGNALS, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert unshare.stdout is not None
    async with asyncio.timeout(20):
        assert await unshare.stdout.readline() == b"up\n"
        inner = int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text())
        for count, name in enumerate(("TERM", "INT", "HUP", "QUIT"), 1):
            os.kill(inner, signal.Signals[f"SIG{name}"])
            assert await unshare.stdout.readline() == f"SIG{name} {count}\n".encode()
        assert await unshare.wait() == 0


STARTED = """
import os, signal, sys, threading
import agent.__main__, agent.daemon, agent.config
from agent.devserver.reaper import stop_signals

async def run(settings, environ):
    os.kill(os.getpid(), signal.SIGTERM)  # of a stop that comes before anybody listens
    received = asyncio.Queue()
    with stop_signals(lambda number, count: received.put_nowait((number.name, count))):
        print(*await received.get())
    return 0

import asyncio
agent.daemon.run, agent.config.read_environment = run, dict
sys.exit(agent.__main__.main(["run"]))
"""


@pytest.mark.parametrize("first", [False, True], ids=["child", "pid-1"])
def test_a_stop_that_comes_before_the_agent_is_awake_is_kept_for_it(first: bool) -> None:
    done = subprocess.run(
        [*(as_pid_1() if first else []), sys.executable, "-c", STARTED],
        cwd=ROOT, env={"STATE_DIR": "/nonexistent"}, capture_output=True, text=True, timeout=20, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "SIGTERM 1\n"), done.stderr
