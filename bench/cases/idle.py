"""Measures what the agent costs while nothing happens: its memory, and its share of a core. There is no peer.

The whole agent, hydrated and live on a real channel, with its default heartbeats, in an environment made from
`requirements/agent.lock`: what the image has, no more. Its project has no dev server, whose needs are its own.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from bench.harness.results import Row, Unmeasurable
from tests.system.over_nats import over_nats
from tests.system.plane import Agent, eventually, running_plane

REPOSITORY = Path(__file__).parents[2]


async def _measure(seconds: float, directory: Path) -> list[tuple[float, float]]:
    """Resident MB and share of a core over `seconds`, after the agent has come to rest: on Realtime, then on NATS."""
    from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
    from orchestrator_stub.platform.migrations import bootstrap, migrate

    server = EmbeddedPostgres(directory / "pg", options={"fsync": "off"})
    dsn = await server.start()
    try:
        await bootstrap(dsn)
        await migrate(dsn)
        python = str(environment(directory / "venv"))
        async with running_plane(dsn, directory / "plane") as plane:
            project = await plane.project({f"src/file{n}.ts": f"export const n = {n}\n" for n in range(500)})
            agents = [
                await project.session(directory / name, HEARTBEAT_SECONDS="30", PYTHONPATH=str(REPOSITORY))
                for name in ("realtime", "nats")
            ]
            found = [await _at_rest(agents[0], python, seconds)]
            async with over_nats(dsn, directory, agents[1]) as told:
                agents[1].environ |= told
                return [*found, await _at_rest(agents[1], python, seconds)]
    finally:
        await server.stop()


async def _at_rest(agent: Agent, python: str, seconds: float) -> tuple[float, float]:
    """Start one agent, measure it, stop it."""

    async def live() -> bool:
        report = await agent.status()
        return report is not None and report["link"]["state"] == "live" and report["files"] == 500

    agent.python = python
    agent.start()
    try:
        await eventually("the agent is live", live, 60)
        await asyncio.sleep(5)  # what a start leaves to do is done
        assert agent.process is not None
        before = _processor_seconds(agent.process.pid)
        await asyncio.sleep(seconds)
        share = (_processor_seconds(agent.process.pid) - before) / seconds
        return _resident(agent.process.pid), share
    finally:
        await agent.stop()


def environment(place: Path) -> Path:
    """The interpreter of a fresh environment with the agent's locked dependencies."""
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    lock = REPOSITORY / "requirements" / "agent.lock"
    done = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", lock],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Unmeasurable(f"the agent's dependencies cannot be installed: {done.stderr[-200:]}")
    return python


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"no memory figure for process {pid}")


def run(quick: bool = False) -> Sequence[Row]:
    """Memory and processor of an idle agent."""
    seconds = 15.0 if quick else 90.0
    with tempfile.TemporaryDirectory(prefix="bench-idle-") as name:
        (memory, share), (with_nats, share_nats) = asyncio.run(_measure(seconds, Path(name)))
    note = f"500 files, live, {seconds:.0f} s"
    return [
        Row("whole agent at rest, resident", memory, "MB", sense="memory", at_most=60, samples=1, note=note),
        Row("whole agent at rest, processor", share * 100, "% of a core", at_most=0.2, samples=1, note=note),
        Row(
            "the same over NATS, resident", with_nats, "MB", sense="memory", at_most=64, samples=1, note=note
        ),
        Row(
            "the same over NATS, processor",
            share_nats * 100,
            "% of a core",
            at_most=0.2,
            samples=1,
            note=note,
        ),
    ]
