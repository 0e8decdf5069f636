"""A path that the disk cannot hold, or may not change: it waits, the others do not, and in the end it is right.

The loop, its disk and its ledger are the production ones, in simulated time (`world`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.agent.disks import attribute
from tests.agent.sync.world import HOST, World, joined, simulated, whole_head


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def a_directory(place: Path) -> Callable[[], None]:
    place.mkdir(parents=True)
    (place / "theirs").write_text("x")

    def gone() -> None:
        (place / "theirs").unlink()
        place.rmdir()

    return gone


def a_link(place: Path) -> Callable[[], None]:
    place.parent.symlink_to("/nowhere")
    return place.parent.unlink


def a_file_above(place: Path) -> Callable[[], None]:
    place.parent.write_text("theirs")
    return place.parent.unlink


def an_immutable_file(place: Path) -> Callable[[], None]:
    place.parent.mkdir()
    place.write_text("theirs")
    kept = ExitStack()
    kept.enter_context(attribute("i", place))
    return kept.close


@pytest.mark.parametrize("obstacle", [a_directory, a_link, a_file_above, an_immutable_file])
def test_a_path_is_written_by_itself_once_its_obstacle_is_gone(
    world: World, obstacle: Callable[[Path], Callable[[], None]]
) -> None:
    @simulated
    async def scenario() -> None:
        async with world.run() as run:
            remove = obstacle(world.root / "new" / "file")
            run.send(world.database.commit({"new/file": "1", "a": "2"}))
            await run.until(lambda: world.on_disk.get("a") == "2")
            assert [(p.kind, p.path, p.waiting) for p in run.problems.open.values()] == [
                ("path_unusable", "new/file", True)
            ]
            await asyncio.sleep(2)
            remove()
            gone = asyncio.get_running_loop().time()
            await run.until(lambda: world.on_disk == world.database.wanted)
            assert asyncio.get_running_loop().time() - gone < 2.5
            assert run.kinds == []
            assert run.source.suspected == []
        assert world.orchestrator.fetched == 1, "the first snapshot was enough"

    scenario()


@simulated
async def test_a_path_that_stays_impossible_makes_no_snapshots_whatever_is_saved(world: World) -> None:
    async with world.run() as run:
        a_directory(world.root / "new")
        run.send(world.database.commit({"new": "1"}))
        for n in range(20):
            await asyncio.sleep(30)
            run.send(world.database.commit({"a": str(n)}))
            await run.until(lambda n=n: world.on_disk["a"] == str(n))
            run.sync.hear(whole_head(world), run.sync.tree.cursor)
        assert run.kinds == ["path_unusable"]
        assert set(run.sync.waiting_paths) == {"new"}
    assert world.orchestrator.fetched == 1
    assert len(world.orchestrator.asked) <= 8, "ten minutes of a growing wait"


@simulated
async def test_where_nobody_can_be_asked_it_is_remembered_until_a_snapshot_comes(world: World) -> None:
    async with world.run(api=False) as run:
        remove = a_directory(world.root / "new")
        run.send(world.database.commit({"new": "1"}))
        await run.until(lambda: run.kinds == ["path_unusable"])
        await asyncio.sleep(600)
        remove()
        await asyncio.sleep(600)
        assert (run.kinds, set(run.sync.waiting_paths)) == (["path_unusable"], {"new"})
        run.catch_up.offered = f"{HOST}/offered.zip"
        run.sync.hurry()
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
        assert run.kinds == []


@simulated
async def test_one_that_is_deleted_is_no_problem_any_more(world: World) -> None:
    async with world.run() as run:
        a_directory(world.root / "new")
        run.send(world.database.commit({"new": "1"}))
        await run.until(lambda: run.kinds == ["path_unusable"])
        run.send(world.database.commit({"new": None}))
        await run.until(lambda: run.kinds == [])
        assert set(run.sync.waiting_paths) == set()


@simulated
async def test_a_file_that_may_not_be_removed_goes_once_it_may(world: World) -> None:
    async with world.run() as run:
        with attribute("i", world.root / "a"):
            run.send(world.database.commit({"a": None, "new": "1"}))
            await run.until(lambda: "new" in world.on_disk)
            assert [(p.kind, p.path, p.rule) for p in run.problems.open.values()] == [
                ("path_unusable", "a", "not_permitted")
            ]
            await asyncio.sleep(2)
            assert "a" in world.on_disk
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
        assert run.kinds == []
    assert world.orchestrator.fetched == 1


@simulated
async def test_so_it_is_where_another_history_has_no_such_file(world: World) -> None:
    """The heartbeat tells: a question about that path alone has no answer in a history that never knew it."""
    async with world.run() as run:
        for n in range(5):
            run.send(world.database.commit({"a": str(n)}))
            await run.until(lambda n=n: world.on_disk["a"] == str(n))
        with attribute("i", world.root / "a"):
            world.database.begin_anew({"b": "2"})
            run.send(joined())
            await run.until(lambda: world.on_disk.get("b") == "2")
            assert "path_unusable" in run.kinds
        await asyncio.sleep(10)
        run.sync.hear(whole_head(world), run.sync.tree.cursor)
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
        assert run.kinds == []
