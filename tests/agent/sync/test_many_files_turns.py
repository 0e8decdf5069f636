"""Many files: how long the event loop is kept by a first tree, and by what is left in staging afterwards."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core.model import RelPath
from agent.fs.project_dir import ProjectDir
from agent.fs.turns import in_turns
from tests.agent.disks import in_staging, seen
from tests.agent.loops import STALL, longest_turn
from tests.agent.sync.world import World

MANY = 8_000
NAMES = [f"src/d{number // 50}/f{number}.ts" for number in range(MANY)]


def into_a_new_directory(world: World) -> None:
    """Whole directories appear by one rename each."""


def over_files_that_differ(world: World) -> None:
    """Each file is exchanged, and what stood there is left in staging."""
    for name in NAMES:
        path = world.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("another")


def after_a_run_that_was_killed(world: World) -> None:
    """It left as many files in staging."""
    left = world.place / "staging" / "tree-00000000-1"
    left.mkdir(parents=True)
    for number in range(MANY):
        (left / str(number)).touch()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """In memory, where that is possible: the time of a disk is not what is measured."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@pytest.mark.parametrize("found", [into_a_new_directory, over_files_that_differ, after_a_run_that_was_killed])
def test_a_first_tree_of_many_files_keeps_the_loop_for_a_moment(
    place: Path, found: Callable[[World], None]
) -> None:
    world = World(place, dict.fromkeys(NAMES, "1"))
    found(world)
    archive = world.database.archive()
    world.orchestrator.archives = [archive]

    async def start() -> None:
        async with world.run() as run:
            await run.until(run.hydrated.is_set, 60)
            await run.until(lambda: not run.disk._staging.waste, 60)

    assert longest_turn(start) < STALL
    assert in_staging(place / "staging") == []
    assert len(seen(world.root)) == MANY
    assert len(world.recorded().stats) == MANY


def test_a_stop_in_the_middle_of_it_waits_for_the_disk(place: Path) -> None:
    """What is written is written whole: nothing is closed under the thread that does it."""
    world = World(place, dict.fromkeys(NAMES[:3_000], "1"))
    began = asyncio.Event()

    class Slow(ProjectDir):
        def apply(self, *operations: object, **options: object) -> object:  # type: ignore[override]
            loop.call_soon_threadsafe(began.set)
            return super().apply(*operations, **options)  # type: ignore[arg-type]

    async def scenario() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        async with world.run(disk=Slow):
            await began.wait()

    loop: asyncio.AbstractEventLoop
    asyncio.run(scenario())
    assert len(seen(world.root)) == 3_000


def test_what_is_left_in_staging_is_removed_in_turns(place: Path) -> None:
    disk = ProjectDir(place / "project", place / "staging")
    disk.open()
    for number in range(MANY):
        disk.stage_whole(b"x", RelPath(NAMES[number]) if number % 2 else None)

    async def clear() -> None:
        disk.drop_staged()
        await in_turns(disk.removal())

    assert longest_turn(clear) < STALL
    assert in_staging(place / "staging") == []
    disk.close()
