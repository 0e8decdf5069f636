"""A file of ours that something in the container made huge: nothing waits for it, and it is put right."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.system.plane import Agent, eventually, running_plane
from tests.system.test_shadow_mode import legacy_writer, report, shadowing, until_equal

pytestmark = pytest.mark.system

HUGE = 2**40
"""Bytes, and not a block of the disk: `truncate -s 1T`. Hashing them takes half an hour."""


def truncate(path: Path) -> None:
    try:
        os.truncate(path, HUGE)
    except OSError as error:
        pytest.skip(f"no file of 1 TB can be made in {path.parent}: {error.strerror}")


@pytest.fixture
async def agent(database: str, tmp_path: Path) -> AsyncIterator[Agent]:
    """Up, on a project without a dev server."""
    async with running_plane(database, tmp_path / "plane") as plane:
        project = await plane.project({"src/a.ts": "a\n", "src/b.ts": "b\n"})
        made = await project.session(tmp_path / "machine")
        made.start()
        try:
            await made.equal()
            yield made
        finally:
            if made.process is not None and made.process.poll() is None:
                made.kill()


async def shows_drift(agent: Agent) -> bool:
    status = await agent.status()
    return status is not None and ("drift", "src/a.ts") in [
        (problem["kind"], problem["file_path"]) for problem in status["problems"]
    ]


async def put_right(agent: Agent) -> None:
    """Equal; not asked before the file is small again, because asking reads it."""

    async def small() -> bool:
        return (agent.tree / "src/a.ts").stat().st_size < HUGE

    await eventually("the file is small again", small)
    await agent.equal()


async def test_it_is_seen_saves_go_on_and_the_next_one_of_it_lands(agent: Agent) -> None:
    truncate(agent.tree / "src/a.ts")
    await eventually("the drift is shown", lambda: shows_drift(agent))
    await agent.project.bulk({"src/b.ts": "b, again\n", "src/a.ts": "a, again\n", "src/c.ts": "c\n"})
    await put_right(agent)
    truncate(agent.tree / "src/a.ts")
    await eventually("the drift is shown again", lambda: shows_drift(agent))
    await agent.project.save("src/a.ts", "a, the third time\n")
    await put_right(agent)


async def test_sigterm_ends_the_agent_and_the_next_start_puts_it_right(agent: Agent) -> None:
    truncate(agent.tree / "src/a.ts")
    await eventually("the drift is shown", lambda: shows_drift(agent))
    assert await agent.stop() == 0
    agent.start()
    await eventually("health answers", agent.status)
    await put_right(agent)


async def test_a_start_that_finds_one_can_be_stopped_and_goes_on(agent: Agent) -> None:
    agent.kill()
    truncate(agent.tree / "src/a.ts")
    agent.start()
    await eventually("health answers", agent.status)
    assert await agent.stop() == 0
    agent.start()
    await put_right(agent)


async def test_shadow_mode_tells_it_apart_without_reading_it(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path, sync_mode="shadow") as plane:
        project = await plane.project({"src/a.ts": "a\n", "src/b.ts": "b\n"})
        agent = await shadowing(project, tmp_path / "machine")
        try:
            with legacy_writer(agent.tree, project):
                agent.start()
                await until_equal(agent)
            truncate(agent.tree / "src/a.ts")

            async def differs() -> bool:
                seen = await report(agent)
                found = [(each["file_path"], each["rule"]) for each in seen["paths"]]
                return found == [("src/a.ts", "differs")]

            await eventually("the difference stands", differs, 30)
            assert await agent.stop() == 0
        finally:
            if agent.process is not None and agent.process.poll() is None:
                agent.kill()
