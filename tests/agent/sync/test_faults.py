"""What a project, a peer or a disk does to the loop: it is seen, it is told, and once it is over all is right again.

The loop, its disk and its ledger are the production ones, in simulated time (`world`).
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog

from agent.core.model import Problem, RelPath
from agent.core.scheduler import Follower
from agent.fs.project_dir import ProjectDir
from agent.sync import engine, intake
from agent.sync.catchup import CatchUp
from agent.sync.ledger import Ledger
from agent.telemetry.status import SyncPhase
from tests.agent.sync.world import (
    HOST,
    REAL_DEADLINE,
    Run,
    World,
    joined,
    plain,
    refused,
    simulated,
    undone_disk,
    whole_head,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- a question that is too large


@simulated
async def test_more_files_removed_than_a_question_can_name_come_back_with_one_snapshot(
    tmp_path: Path,
) -> None:
    """Delete a directory of 2,000 files, kill the agent, start it: the question was over 64 KB, and 413 for ever."""
    many = {f"src/a directory with a name/file-{n:04}.ts": str(n) for n in range(2_000)}
    world = World(tmp_path, many | {"kept": "1"})
    async with world.run():
        pass
    for path in many:
        (world.root / path).unlink()
    async with world.run(url=None) as run:
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
        assert run.kinds == []
        assert run.source.caught_up_count == 1, "and the link is live"
    assert (len(world.orchestrator.asked), world.orchestrator.asked[0].get("paths")) == (1, None)


@pytest.mark.parametrize("status", [413, 422])
def test_a_question_that_is_refused_as_it_is_is_asked_otherwise(world: World, status: int) -> None:
    @simulated
    async def scenario() -> None:
        async with world.run():
            pass
        (world.root / "a").write_text("another process's")
        world.orchestrator.script = [refused(status)]
        async with world.run(url=None) as run:
            await run.until(lambda: world.on_disk == world.database.wanted)
            await run.at_rest()
            assert run.kinds == []
        first, second = world.orchestrator.asked
        assert first["paths"] == ["a"]
        assert (second["epoch"], second.get("paths")) == (None, None)

    scenario()


@simulated
async def test_where_nothing_is_read_the_least_question_is_asked_once_a_minute_and_it_is_shown(
    world: World,
) -> None:
    world.orchestrator.limit = 10
    async with world.run() as run:
        world.database.commit({"a": "2"})
        run.send(joined())
        await asyncio.sleep(200)
        assert len(world.orchestrator.asked) <= 6
        assert run.kinds == ["request_too_large"]
        world.orchestrator.limit = 1000
        await run.until(lambda: world.on_disk["a"] == "2")
        await run.at_rest()
        assert run.kinds == []


@simulated
async def test_an_answer_that_cannot_be_read_twice_is_asked_for_as_a_snapshot(world: World) -> None:
    broken = {
        "kind": "changes",
        "epoch": world.database.epoch,
        "revision": 2,
        "base_revision": 1,
        "changes": 7,
    }
    world.orchestrator.script = [lambda _: broken] * 2
    async with world.run() as run:
        world.database.commit({"a": "2"})
        run.send(joined())
        await run.until(lambda: world.on_disk["a"] == "2")
        await run.at_rest()
    assert [question["epoch"] is None for question in world.orchestrator.asked] == [False, False, True]


# --- a database that forgot commits


@simulated
async def test_a_database_that_forgot_commits_is_followed_back_and_said(world: World) -> None:
    async with world.run() as run:
        run.send(world.database.commit({"a": "2"}), world.database.commit({"src/b": None, "c": "1"}))
        await run.until(lambda: world.on_disk == {"a": "2", "c": "1"})
        world.database.forget(2)
        world.orchestrator.hang = asyncio.Event()
        run.sync.hear(whole_head(world), run.sync.tree.cursor)
        assert run.kinds == ["head_behind"]
        world.orchestrator.hang.set()
        await run.until(lambda: world.on_disk == {"a": "1", "src/b": "1"})
        await run.at_rest()
        assert (run.kinds, run.sync.tree.cursor.revision, run.sync.head_revision) == ([], 1, 1)
        for _ in range(5):
            run.sync.hear(whole_head(world), run.sync.tree.cursor)
            await asyncio.sleep(30)
        run.send(world.database.commit({"a": "of the new time"}))
        await run.until(lambda: world.on_disk["a"] == "of the new time")
        assert run.source.suspected == []
    assert (len(world.orchestrator.asked), world.orchestrator.fetched) == (1, 2)


@simulated
async def test_so_it_is_when_it_is_found_at_a_join(world: World) -> None:
    async with world.run() as run:
        run.send(world.database.commit({"a": "2"}))
        await run.until(lambda: world.on_disk["a"] == "2")
    world.database.forget(1)
    async with world.run(url=None) as run:
        await run.until(lambda: world.on_disk["a"] == "1")
        await run.at_rest()
        assert run.sync.tree.cursor.revision == 1


# --- what was offered, and what is not there


@simulated
async def test_an_offered_snapshot_that_fails_once_is_fetched_again(world: World) -> None:
    world.orchestrator.archives = [world.database.archive(), plain(503, b""), plain(503, b"")]
    async with world.run(api=False) as run:
        world.database.commit({"a": "2"})
        run.catch_up.offered = f"{HOST}/offered.zip"
        run.sync.hurry()
        await run.until(lambda: run.kinds == ["snapshot_unavailable"])
        await run.until(lambda: world.on_disk["a"] == "2")
        await run.at_rest()
        assert (run.kinds, run.catch_up.offered) == ([], None)


@simulated
async def test_one_whose_url_is_over_is_not(world: World) -> None:
    world.orchestrator.archives = [world.database.archive(), plain(403, b"expired")]
    async with world.run(api=False) as run:
        run.catch_up.offered = f"{HOST}/offered.zip"
        run.sync.hurry()
        await run.until(lambda: run.kinds == ["snapshot_expired"])
        await run.at_rest()
        assert run.catch_up.offered is None


@simulated
async def test_a_storage_that_is_away_is_not_the_session_api(world: World) -> None:
    world.orchestrator.script = [lambda _: world.database.offer()] * 2
    world.orchestrator.archives = [world.database.archive(), plain(503, b"")]
    async with world.run() as run:
        world.database.commit({"a": "2"})
        run.send(joined())
        await run.until(lambda: run.kinds == ["snapshot_unavailable"])
        await run.until(lambda: world.on_disk["a"] == "2")
        await run.at_rest()
        assert run.kinds == []


@simulated
async def test_nor_is_a_staging_directory_that_is_full(world: World) -> None:
    class Full(ProjectDir):
        left = 0

        def stage_whole(self, content: bytes, path: RelPath | None = None) -> str:
            if type(self).left:
                type(self).left -= 1
                raise OSError(28, "No space left on device")
            return super().stage_whole(content, path)

    world.orchestrator.script = [lambda _: world.database.offer()] * 2
    async with world.run(disk=Full) as run:
        Full.left = 1
        world.database.commit({"a": "2"})
        run.send(joined())
        await run.until(lambda: run.kinds == ["disk_full"])
        await run.until(lambda: world.on_disk["a"] == "2")
        await run.at_rest()
        assert run.kinds == []


# --- a disk that is worse than full


@simulated
async def test_what_could_not_be_undone_is_shown_until_the_database_was_asked(world: World) -> None:
    class Stuck(undone_disk(0, done=["a"])):  # type: ignore[misc]
        def apply(self, operations: Any, known: Any, **options: Any) -> Any:
            before = self.left
            result = super().apply(operations, known, **options)
            if not before:
                return result
            told = (*result.problems, Problem("undo_failed", "cannot undo the change of a", "a"))
            return type(result)(result.done, told, rolled_back=True)

    async with world.run(disk=Stuck) as run:
        Stuck.left = 1
        world.orchestrator.hang = asyncio.Event()
        run.send(world.database.commit({"a": "2", "src/b": "2"}))
        await run.until(lambda: world.on_disk["a"] == "2")
        await asyncio.sleep(60)
        assert run.kinds == ["disk_full", "undo_failed"]
        world.orchestrator.hang.set()
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
        assert run.kinds == []


def locked(world: World) -> sqlite3.Connection:
    other = sqlite3.connect(world.place / "ledger.sqlite", isolation_level=None)
    other.execute("pragma locking_mode = exclusive")
    other.execute("begin exclusive")
    return other


def failing(run: Run, error: sqlite3.Error, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the ledger's file fail until what is returned is called."""
    broken = True
    real = Ledger._settle

    def settle(self: Ledger, *args: Any) -> None:
        if broken:
            raise error
        real(self, *args)

    def mend() -> None:
        nonlocal broken
        broken = False

    monkeypatch.setattr(Ledger, "_settle", settle)
    return mend


def sqlite_error(code: int) -> sqlite3.Error:
    error = sqlite3.OperationalError("the test says so")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_FULL, "disk_full"),
        (sqlite3.SQLITE_READONLY, "read_only"),
        (sqlite3.SQLITE_IOERR, "io_error"),
        (sqlite3.SQLITE_CORRUPT, "io_error"),
    ],
)
def test_a_ledger_that_cannot_be_written_is_named_and_written_later_by_itself(
    world: World, monkeypatch: pytest.MonkeyPatch, code: int, kind: str
) -> None:
    @simulated
    async def scenario() -> None:
        async with world.run() as run:
            run.send(world.database.commit({"a": "2"}))
            await run.at_rest()
            await asyncio.sleep(1)
            mend = failing(run, sqlite_error(code), monkeypatch)
            run.send(world.database.commit({"a": "3"}))
            await run.until(lambda: run.kinds == [kind])
            run.send(world.database.commit({"src/b": "3"}))
            await run.until(lambda: world.on_disk == world.database.wanted)
            assert run.kinds == [kind], "a transaction that is done says nothing of the ledger"
            mend()
            await run.until(lambda: run.kinds == [])
            run.workspace.close = lambda cursor: None  # type: ignore[method-assign]
            tree = run.sync.tree
        assert world.recorded().tree == tree, "and nobody had to save, or to stop the agent"

    scenario()


# --- the brake


@simulated
async def test_saves_that_go_on_do_not_keep_the_brake_on(world: World) -> None:
    world.database.commit({f"f{n}": "1" for n in range(30)})
    async with world.run() as run:
        before = world.database.revision
        world.database.commit(dict.fromkeys(f"f{n}" for n in range(30)))
        answers = world.orchestrator.script
        answers += [lambda _: world.database.offer()] * 40
        run.send(joined())
        await run.until(lambda: run.status.phase is SyncPhase.HALTED)
        for n in range(100):
            world.database.commit({"a": str(n)})
            await asyncio.sleep(0.1)
            if run.status.phase is SyncPhase.FOLLOWING:
                break
        assert run.status.phase is SyncPhase.FOLLOWING
        answers.clear()
        run.send(joined())
        await run.until(lambda: world.on_disk == world.database.wanted)
        assert before < run.sync.tree.cursor.revision
    assert len(world.orchestrator.asked) <= 4


# --- a ledger that is lost


async def test_what_was_deleted_meanwhile_goes_and_what_nobody_knows_is_shown(world: World) -> None:
    async with world.run():
        pass
    (world.place / "ledger.sqlite").unlink()
    (world.root / "theirs").write_text("nobody's")
    world.database.commit({"src/b": None, "c": "new"})
    async with world.run(drift_policy="report") as run:
        await run.until(lambda: run.kinds == ["drift"], REAL_DEADLINE)
        assert world.on_disk == {"a": "1", "c": "new", "src/": "", "theirs": "nobody's"}
        assert [(p.path, p.rule) for p in run.problems.open.values()] == [("theirs", "appeared")]
        (world.root / "theirs").unlink()
        await run.until(lambda: run.kinds == [], REAL_DEADLINE)


async def test_nothing_that_nobody_knows_is_restored_away(world: World) -> None:
    async with world.run():
        pass
    (world.place / "ledger.sqlite").unlink()
    (world.root / "theirs").write_text("nobody's")
    async with world.run(drift_policy="restore") as run:
        await run.until(lambda: run.kinds == ["drift"], REAL_DEADLINE)
        assert world.on_disk["theirs"] == "nobody's"


# --- a bug of ours


def once(monkeypatch: pytest.MonkeyPatch, where: object, name: str, times: int = 1) -> None:
    """Have a function fail with a bug's exception, so many times."""
    real, left = getattr(where, name), times

    def fails(*args: Any, **more: Any) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise KeyError("a bug")
        return real(*args, **more)

    monkeypatch.setattr(where, name, fails)


BUGS: dict[str, tuple[object, str, str]] = {
    "reading an event": (intake, "read_event", "event"),
    "what an answer means": (engine, "catch_up", "catch-up"),
    "when to apply it": (Follower, "ready", "sync"),
    "a transaction": (ProjectDir, "apply", "apply"),
    "the ledger": (Ledger, "record", "record"),
    "the question": (CatchUp, "ask", "catch-up"),
}


@pytest.mark.parametrize(("where", "name", "part"), BUGS.values(), ids=BUGS)
def test_a_bug_is_that_events_alone_and_all_is_right_in_the_end(
    world: World, monkeypatch: pytest.MonkeyPatch, where: object, name: str, part: str
) -> None:
    @simulated
    async def scenario() -> None:
        async with world.run() as run:
            with structlog.testing.capture_logs() as lines:
                once(monkeypatch, where, name, times=2)
                run.send(world.database.commit({"a": "2"}))
                world.database.commit({"src/b": "2"})
                run.send(world.database.commit({"c": "1"}), joined())
                await run.until(lambda: world.on_disk == world.database.wanted)
                await run.at_rest()
                await asyncio.sleep(5)
            assert run.problems.errors.counts == {part: 2}
            counted = run.problems.metrics.registry.get_sample_value(
                "preview_agent_agent_errors_total", {"part": part}
            )
            assert counted == 2
            bugs = [line for line in lines if line["event"] == "agent.bug"]
            assert [(line["part"], repr(line["exc_info"])) for line in bugs] == [
                (part, "KeyError('a bug')")
            ] * 2
            assert run.kinds == []
            tree = run.sync.tree
        recorded = world.recorded().tree
        assert (recorded.cursor, recorded.hash()) == (tree.cursor, tree.hash())

    scenario()


@simulated
async def test_a_bug_that_stays_does_not_spin(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async with world.run() as run:
        once(monkeypatch, engine.Sync, "_plan_of", times=1000)
        world.database.commit({"a": "2"})
        run.send(joined())
        await asyncio.sleep(120)
        assert 5 < run.problems.errors.counts["catch-up"] < 60
        run.send(world.database.commit({"src/b": "an event goes on meanwhile"}))
        await run.until(lambda: world.on_disk["src/b"] != "1")
