"""The agent as root with the capabilities that the documents name, and no other: it does all of its work."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from agent.cli.check import CAPABILITIES
from tests.agent.processes import until
from tests.system.plane import Agent, eventually, running_plane

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to lose"),
    pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed"),
]

DOCUMENT = Path(__file__).parents[2] / "docs" / "dev-server.md"
DEV = "sh -c 'umask 077; mkdir -p theirs; echo $$ >theirs/pid; trap \"\" TERM; while :; do sleep 0.1; done'"


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A directory that other users may look into."""
    with tempfile.TemporaryDirectory(prefix="preview-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@asynccontextmanager
async def machine(database: str, directory: Path, names: list[str]) -> AsyncIterator[Agent]:
    """An agent whose root has these capabilities alone, with a dev server of another user."""
    python = directory / "python"
    bounding = ",".join(("-all", *(f"+{name.lower()}" for name in names)))
    python.write_text(
        f'#!/bin/sh\nexec setpriv --bounding-set={bounding} --inh-caps=-all {sys.executable} "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    async with running_plane(database, directory / "plane") as plane:
        project = await plane.project({"package.json": "{}", "src/a.ts": "a\n"})
        agent = await project.session(
            directory / "machine", DEV_COMMAND=DEV, DEV_USER="nobody", DEV_STOP_SECONDS="0.3"
        )
        agent.python = str(python)
        try:
            yield agent
        finally:
            if agent.process is not None and agent.process.poll() is None:
                agent.kill()


def test_the_document_and_the_check_name_the_same() -> None:
    (sentence,) = re.findall(r"The container needs ([^.]*)\.", DOCUMENT.read_text())
    assert set(re.findall(r"`([A-Z_]+)`", sentence)) == CAPABILITIES.keys()


async def test_they_are_enough(database: str, open_path: Path) -> None:
    async with machine(database, open_path, list(CAPABILITIES)) as agent:
        agent.start()
        pid = agent.tree / "theirs" / "pid"
        await eventually("the dev server runs", _written(pid))
        shutil.chown(agent.tree / "src", "nobody")
        (agent.tree / "src").chmod(0o700)
        (agent.tree / "src/a.ts").write_text("theirs\n")
        shutil.chown(agent.tree / "src/a.ts", "nobody")
        (agent.tree / "src/a.ts").chmod(0o600)
        await agent.project.save("src/a.ts", "ours again\n")
        await agent.project.save("theirs/ours", "in a directory that is closed to others\n")
        await eventually("both are there", _both(agent))
        assert (agent.tree / "src/a.ts").stat().st_uid == pwd.getpwnam("nobody").pw_uid
        victim = int(pid.read_text())
        assert await agent.stop() == 0
        await until(lambda: not Path(f"/proc/{victim}").exists())


def _written(file: Path) -> Callable[[], Awaitable[bool]]:
    async def written() -> bool:
        return file.exists() and file.read_text().endswith("\n")

    return written


def _both(agent: Agent) -> Callable[[], Awaitable[bool]]:
    async def both() -> bool:
        ours = agent.tree / "theirs/ours"
        return (agent.tree / "src/a.ts").read_text() == "ours again\n" and ours.exists()

    return both


async def test_without_the_right_to_write_where_root_is_not_the_owner_it_says_so(
    database: str, open_path: Path
) -> None:
    names = [name for name in CAPABILITIES if name != "DAC_OVERRIDE"]
    async with machine(database, open_path, names) as agent:
        agent.tree.mkdir()
        shutil.chown(agent.tree, "nobody")
        agent.start()
        process = agent.process
        assert process is not None
        await until(lambda: process.poll() is not None)
        assert process.returncode == 71
        assert "permission denied" in agent.log()
