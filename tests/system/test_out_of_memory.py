"""When memory runs out, the project's programs go and the agent stays: it is what starts them again, and says so."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from agent.devserver.guard import AGENT_OOM_SCORE, descendants
from tests.agent.processes import until
from tests.system.plane import Agent, eventually, running_plane
from tests.trees import command_of

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="who goes first is a matter of Linux's /proc"),
]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

SERVER = Path(__file__).parents[1] / "agent" / "devserver" / "dev_server.py"
LIMIT = 256 << 20
"""Bytes for the agent and all it starts; the agent takes 50 MB, the project would like 900."""

HUNGRY = """
import os, time
for n in range(60):
    if os.fork() == 0:
        taken = b"x" * 15_000_000
        time.sleep(3600)
print("all sixty were started", flush=True)
time.sleep(3600)
"""


def score(pid: int) -> int:
    """Higher goes earlier, from -1000 to 1000."""
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def may_stay() -> bool:
    """Whether a process here may ask to be taken later."""
    lower = f"echo {score(os.getpid()) - 1} 2>/dev/null >/proc/self/oom_score_adj"
    return os.system(lower) == 0


@asynccontextmanager
async def machine(database: str, directory: Path, command: str, **environ: str) -> AsyncIterator[Agent]:
    """A session whose dev server is `command`, not started yet."""
    async with running_plane(database, directory / "plane") as plane:
        project = await plane.project({"package.json": "{}"})
        agent = await project.session(directory / "machine", DEV_COMMAND=command, **environ)
        try:
            yield agent
        finally:
            if agent.process is not None and agent.process.poll() is None:
                await agent.stop()


async def programs_of(agent: Agent) -> tuple[int, set[int]]:
    """The guard of the running dev server, and everything below it, once all three of its sleepers are there."""

    async def up() -> tuple[int, set[int]] | None:
        status = await agent.status()
        guard = status and status["dev_server"]["pid"]
        below = descendants(guard) if guard else set()
        sleeping = [pid for pid in below if command_of(pid).startswith(b"sleep\0")]
        return (guard, below) if len(sleeping) == 3 else None

    found: tuple[int, set[int]] = await eventually("the dev server has all its children", up)
    return found


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that other users may look into."""
    with tempfile.TemporaryDirectory(prefix="preview-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


SLEEPERS = "sh -c 'sleep 3600 & (sleep 3600 &) ; setsid -f sleep 3600; exec {then}'"


@pytest.mark.parametrize(
    "user",
    [pytest.param("nobody", marks=needs_root), None],
    ids=["own-user", "same-user"],
)  # fmt: skip
async def test_the_projects_programs_are_the_first_to_go(
    database: str, open_directory: Path, user: str | None
) -> None:
    command = SLEEPERS.format(then="cat /dev/zero >/dev/null")
    environ = {"DEV_USER": user} if user else {}
    async with machine(database, open_directory, command, **environ) as agent:
        agent.start()
        guard, below = await programs_of(agent)
        assert agent.process is not None
        assert {score(pid) for pid in below} == {1000}
        assert (
            score(guard)
            == score(agent.process.pid)
            == (AGENT_OOM_SCORE if may_stay() else score(os.getpid()))
        )


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An interpreter whose processes have `LIMIT` bytes of memory, and the file where the kernel counts kills."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (v1 if v1.is_dir() else v2) / f"preview-test-{uuid4().hex[:8]}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    try:
        (group / ("memory.limit_in_bytes" if v1.is_dir() else "memory.max")).write_text(str(LIMIT))
        if (swap := group / "memory.swap.max").exists():
            swap.write_text("0")
    except OSError as error:
        group.rmdir()
        pytest.skip(f"no memory can be limited here: {error}")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho $$ >{group}/cgroup.procs && exec {sys.executable} "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    try:
        yield python, group / ("memory.oom_control" if v1.is_dir() else "memory.events")
    finally:
        group.rmdir()


def killed_for_memory(counts: Path) -> int:
    found = dict(line.split() for line in counts.read_text().splitlines())
    return int(found["oom_kill"])


async def test_a_project_that_takes_all_memory_does_not_take_the_agent(
    database: str, tmp_path: Path, limited: tuple[Path, Path]
) -> None:
    python, counts = limited
    hungry = tmp_path / "hungry.py"
    hungry.write_text(HUNGRY)
    async with machine(database, tmp_path, f"{sys.executable} {hungry}") as agent:
        agent.python = str(python)
        agent.start()
        assert agent.process is not None
        process = agent.process
        await until(lambda: process.poll() is not None or "all sixty were started" in agent.log(), 120)
        assert killed_for_memory(counts) > 0, "it never ran out of memory"
        assert process.poll() is None, "the kernel took the agent"
        await agent.project.save("after.txt", "still here")
        await agent.equal()
