"""How the whole agent ends: asked once, asked twice, killed; and what is left of its dev server each time."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.agent.processes import running, until
from tests.system.plane import Agent, eventually, running_plane

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="processes are asked about by /proc"),
]


@pytest.fixture
async def agent(database: str, tmp_path: Path) -> AsyncIterator[Agent]:
    """Up, with a dev server that ignores TERM and has sent a daemon away."""
    word = tmp_path.name
    daemon = f"(setsid -f sh -c 'trap : TERM HUP; exec <&- >&- 2>&-; while :; do sleep 0.1; done # {word}') &"
    script = f"{daemon} trap '' TERM; while :; do sleep 0.1; done # {word}"
    async with running_plane(database, tmp_path / "plane") as plane:
        project = await plane.project({"package.json": json.dumps({"scripts": {"dev": script}})})
        made = await project.session(tmp_path / "machine", STOP_GRACE="40", DEV_STOP_SECONDS="30")
        made.start()
        try:
            await eventually("the dev server and its daemon are up", lambda: _up(made, word))
            yield made
        finally:
            if made.process is not None and made.process.poll() is None:
                made.kill()
            await until(lambda: running(word) == [])


async def _up(agent: Agent, word: str) -> bool:
    status = await agent.status()
    return status is not None and status["dev_server"]["pid"] and len(running(f"done # {word}")) >= 2


async def test_a_second_signal_means_now(agent: Agent) -> None:
    process = agent.process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    await until(lambda: "agent.draining" in agent.log())
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    code = await asyncio.to_thread(process.wait, 25)
    assert code == 0, agent.log()[-2000:]
    assert time.monotonic() - began < 15, "it waited for the grace"
    assert running(f"done # {agent.directory.parent.name}") == []


async def test_a_killed_agent_leaves_nothing_and_the_next_goes_on(agent: Agent) -> None:
    word = agent.directory.parent.name
    agent.kill()
    await until(lambda: running(f"done # {word}") == [])
    agent.start()
    await eventually("it is up again", lambda: _up(agent, word))


async def test_a_health_port_that_something_else_has_ends_the_start(database: str, tmp_path: Path) -> None:
    """Also something of the project's, which an earlier run left: the agent says so, ends, and leaves nothing."""
    word = tmp_path.name
    script = f"trap '' TERM; while :; do sleep 0.1; done # {word}"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with running_plane(database, tmp_path / "plane") as plane:
            project = await plane.project({"package.json": json.dumps({"scripts": {"dev": script}})})
            port = taken.getsockname()[1]
            made = await project.session(tmp_path / "machine", HEALTH_PORT=str(port))
            made.start()
            assert made.process is not None
            try:
                assert await asyncio.to_thread(made.process.wait, 30) == 64
            finally:
                if made.process.poll() is None:
                    made.kill()
            assert f"cannot listen on 127.0.0.1 port {port}" in made.log()
            await until(lambda: running(f"done # {word}") == [])
