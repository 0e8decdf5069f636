"""Whoever reads the agent's log stalls, goes away, or has a full disk: saves, health and SIGTERM go on."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.processes import until
from tests.system.plane import Agent, eventually, running_plane

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="/dev/full and pipes are Linux's here"),
]

CHATTY = f"{sys.executable} -c \"import time\nwhile True: print('x' * 4000, flush=True); time.sleep(0.01)\""
"""A dev server that prints some hundred kilobytes a second: a pipe holds 64."""


@pytest.fixture(params=["stalled", "gone", "full"])
def log_at(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where the agent's output goes, which takes nothing, or not for long."""
    if request.param == "full":
        yield "/dev/full"
        return
    place = tmp_path / "log.pipe"
    os.mkfifo(place)
    reader = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
    if request.param == "gone":
        # The agent opens it while somebody reads, which nobody does a moment later.
        yield f"{place} # {reader}"
    else:
        yield str(place)
        os.close(reader)


async def test_saves_health_and_sigterm_go_on(database: str, tmp_path: Path, log_at: str) -> None:
    place, _, reader = log_at.partition(" # ")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" >{place} 2>&1\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    async with running_plane(database, tmp_path / "plane") as plane:
        project = await plane.project({"package.json": "{}"})
        agent: Agent = await project.session(tmp_path / "machine", DEV_COMMAND=CHATTY, LOG_LEVEL="debug")
        agent.python = str(python)
        agent.start()
        process = agent.process
        assert process is not None
        try:
            await eventually("health answers", agent.status)
            if reader:
                os.close(int(reader))

            async def lost() -> bool:
                status = await agent.status()
                return status is not None and status["log_lines_dropped"] > 0

            await eventually("lines are lost", lost, 60)
            await project.save("a.txt", "saved")
            await agent.equal()
            assert "preview_agent_log_lines_dropped_total" in await agent.metrics()
            assert await agent.stop() == 0
        finally:
            if process.poll() is None:
                agent.kill()
    await until(lambda: process.poll() is not None)
