"""A large file that is typed in: the agent asks for nothing, and one from before splices follows as ever."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from agent.replay.runner import replay
from tests.system.plane import Agent, Project, eventually, running_plane
from tests.system.test_record import recording

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[2]
BEFORE_SPLICES = "c7ca429"
"""The last commit whose agent knows none."""

LARGE = "".join(
    f'    "node_modules/p{n}": {{"version": "1.{n}.0", "é": "{n * 7919}"}},\n' for n in range(6000)
)
"""388 KB: above what one message may carry."""


@pytest.fixture
async def project(database: str, tmp_path: Path) -> AsyncIterator[Project]:
    async with running_plane(database, tmp_path / "plane") as plane:
        yield await plane.project({"package-lock.json.txt": LARGE, "src/a.ts": "a\n"})


async def follow(project: Project, *agents: Agent) -> list[str]:
    """Twenty keys typed in the large file, a bulk, and back; each agent's metrics then, all being equal."""
    try:
        for agent in agents:
            agent.start()
        for agent in agents:
            await agent.equal()
        content = LARGE
        for n in range(20):
            content = content.replace(
                '"node_modules/p3000": ', f'"node_modules/p3000": {n}\N{GRINNING FACE}', 1
            )
            await project.save("package-lock.json.txt", content)
        await project.bulk({"package-lock.json.txt": content + "// end\n", "src/a.ts": None})
        for agent in agents:
            await agent.equal()
        # All of it undone by one commit, which is a bulk like any other.
        await project.rpc("restore_project", revision=1)
        assert (await project.files())["src/a.ts"] == b"a\n"
        found = []
        for agent in agents:
            report = await agent.equal()
            assert not [problem for problem in report["problems"] if problem["kind"] != "nothing_to_serve"]
            found.append(await agent.metrics())
            assert await agent.stop() == 0
        return found
    finally:
        for agent in agents:
            if agent.process is not None and agent.process.poll() is None:
                agent.kill()


def value(metrics: str, name: str) -> float:
    found = re.search(rf"^preview_agent_{re.escape(name)} (\S+)$", metrics, re.MULTILINE)
    return float(found[1]) if found else 0.0


def of_then(directory: Path) -> Path:
    """The agent from before splices, unpacked."""
    known = subprocess.run(
        ["git", "cat-file", "-e", f"{BEFORE_SPLICES}^{{commit}}"], cwd=ROOT, capture_output=True
    )
    if known.returncode != 0:
        pytest.skip(
            f"this clone has no commit {BEFORE_SPLICES}: fetch the whole history to run an agent of then"
        )
    directory.mkdir()
    archive = subprocess.run(
        ["git", "archive", BEFORE_SPLICES, "agent"], cwd=ROOT, capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(directory)], input=archive.stdout, check=True)
    return directory


def fetches_nothing(metrics: str) -> None:
    """Every save was made from splices; one may come twice, as an event and in the answer to a heartbeat's question.

    Only an answer that comes when its base is written over already has none, and then its path is asked for.
    """
    assert value(metrics, 'patches_total{outcome="applied"}') >= 22
    assert value(metrics, 'patches_total{outcome="mismatch"}') == 0
    late = value(metrics, 'patches_total{outcome="no_base"}')
    assert value(metrics, 'resyncs_total{reason="reference"}') <= late
    assert value(metrics, "patches_saved_bytes_total") > 20 * len(LARGE)


@pytest.mark.nightly
async def test_typing_in_a_large_file_fetches_nothing(project: Project, tmp_path: Path) -> None:
    [metrics] = await follow(project, await project.session(tmp_path / "machine"))
    fetches_nothing(metrics)


async def test_beside_an_agent_from_before_splices_which_follows_without_an_error(
    project: Project, tmp_path: Path
) -> None:
    old = await project.session(tmp_path / "old-machine", PYTHONPATH=str(of_then(tmp_path / "then")))
    now, then = await follow(project, await project.session(tmp_path / "machine"), old)
    fetches_nothing(now)
    assert "patches_total" not in then, "the agent is the one of then"
    assert value(then, 'resyncs_total{reason="reference"}') > 0
    assert value(then, 'events_total{event="file:update",outcome="malformed"}') == 0
    assert '"level": "error"' not in old.log()
    assert "Traceback" not in old.log()


@pytest.mark.nightly
async def test_a_recording_of_splices_replays(project: Project, tmp_path: Path) -> None:
    machine = await project.session(tmp_path / "machine")
    async with recording(machine, tmp_path / "typed.jsonl") as recorder:
        await recorder.joined(project)
        content = LARGE
        for n in range(5):
            content = content.replace("1.3000.0", f"1.3000.0-{n}", 1)
            await project.save("package-lock.json.txt", content)
        answer = await project.save("src/last.ts", "last\n")

        async def heard() -> bool:
            return (
                any(f'"revision":{answer["revision"]}' in line.replace(" ", "") for line in recorder.heard)
                or recorder.count("file:update") >= 7
            )

        await eventually("the last save is recorded", heard)
        assert await recorder.stop() == 0
    steps = [line for line in recorder.lines() if "splices" in str(line)]
    assert len(steps) == 5
    assert not any(line.get("bytes") for line in steps), "what splices make is not fetched"
    result = await asyncio.to_thread(replay, tmp_path / "typed.jsonl", tmp_path / "replayed")
    assert result.differences == ()
