"""The loop, branch by branch: on a real disk and a real ledger, with an orchestrator that fails in every way."""

from __future__ import annotations

import asyncio
import base64
import time
from typing import Any, Literal

import httpx
import pytest

from agent.core.errors import HydrationImpossible, RootUnusable
from agent.link.source import Received, Resync
from agent.sync.ledger import Ledger
from agent.telemetry.status import SyncPhase
from tests.agent.sync.world import (
    HOST,
    REAL_DEADLINE,
    World,
    head,
    joined,
    offered,
    paths,
    plain,
    refused,
    simulated,
    undone_disk,
)
from tests.fakes.zips import Member, archive


def ring(**payload: Any) -> Received:
    return Received("file:update", payload, time.time())


# --- the first tree


@simulated
async def test_a_fresh_start_takes_the_snapshot_and_follows(world: World) -> None:
    async with world.run() as run:
        assert (run.status.mode, run.status.phase) == ("fresh", SyncPhase.FOLLOWING)
        assert world.on_disk == world.database.wanted
        assert run.sync.tree.cursor.revision == 1
        assert run.changed == [{"a", "src/b"}]
        run.send(world.database.commit({"a": "2", "new/c": "1", "src/b": None}))
        await run.until(lambda: world.on_disk == {"a": "2", "new/c": "1"})
        assert run.changed[1:] == [{"a", "new/c", "src/b"}]
        await run.at_rest()
    assert world.orchestrator.asked == []
    assert world.recorded().tree.cursor.revision == 2
    assert set(world.recorded().tree.files()) == {"a", "new/c"}


@simulated
async def test_without_a_url_the_session_api_is_asked_for_the_first_tree(world: World) -> None:
    world.orchestrator.script = [lambda _: world.database.offer()]
    async with world.run(url=None):
        assert world.on_disk == world.database.wanted
    assert [question["epoch"] for question in world.orchestrator.asked] == [None]


@simulated
async def test_a_directory_with_files_and_no_ledger_is_rebuilt_and_what_is_not_ours_stays(
    world: World,
) -> None:
    world.root.mkdir()
    (world.root / "a").write_text("another process's")
    (world.root / "notes").write_text("not ours")
    async with world.run() as run:
        assert run.status.mode == "rebuild"
        assert world.on_disk == {**world.database.wanted, "notes": "not ours"}


@pytest.mark.parametrize("ledger", [b"", b"this is no database", b"SQLite format 3\0" + bytes(5000)])
def test_a_ledger_that_cannot_be_believed_is_a_rebuild(world: World, ledger: bytes) -> None:
    @simulated
    async def scenario() -> None:
        async with world.run():
            pass
        (world.place / "ledger.sqlite").write_bytes(ledger)
        world.database.commit({"a": "2", "src/b": None})
        async with world.run() as run:
            assert run.status.mode == "rebuild"
            assert world.on_disk["a"] == "2"
        assert world.recorded().tree.cursor.revision == 2

    scenario()


@simulated
async def test_a_first_snapshot_that_cannot_be_put_in_place_ends_the_agent(world: World) -> None:
    with pytest.raises(RootUnusable, match=r"could not be put in place: the test says so"):
        async with world.run(disk=undone_disk(1), wait=False) as run:
            await run.until(lambda: False)
    assert world.on_disk == {}
    async with world.run():
        assert world.on_disk == world.database.wanted


@simulated
async def test_a_first_snapshot_that_cannot_be_had_ends_the_agent(world: World) -> None:
    world.orchestrator.archives = [plain(503, b"")] * 50
    world.orchestrator.script = [refused(503)] * 50
    with pytest.raises(HydrationImpossible):
        async with world.run(wait=False) as run:
            await run.until(lambda: False)
    assert world.on_disk == {}


@simulated
async def test_a_plain_archive_starts_without_a_cursor_and_the_join_asks(world: World) -> None:
    world.orchestrator.archives = [archive([Member(b"a", b"1"), Member(b"src/b", b"1")])]
    async with world.run() as run:
        assert run.sync.tree.cursor.epoch is None
        run.send(joined())
        await run.until(lambda: run.sync.tree.cursor.epoch == world.database.epoch)
        assert world.on_disk == world.database.wanted


# --- resuming


@simulated
async def test_a_restart_resumes_and_asks_what_it_missed(world: World) -> None:
    async with world.run() as run:
        run.send(world.database.commit({"a": "2"}))
        await run.until(lambda: world.on_disk["a"] == "2")
    world.database.commit({"src/b": "3"})
    async with world.run() as run:
        assert run.status.mode == "resume"
        await run.until(lambda: world.on_disk == {"a": "2", "src/b": "3"})
    assert world.orchestrator.fetched == 1
    assert [(q["reason"], q["revision"]) for q in world.orchestrator.asked] == [("join", 2)]


@simulated
async def test_what_changed_while_nobody_looked_is_asked_for_at_a_restart(world: World) -> None:
    async with world.run():
        pass
    (world.root / "a").write_text("another process's")
    (world.root / "src/b").unlink()
    async with world.run() as run:
        assert run.status.mode == "resume"
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
    assert sorted(world.orchestrator.asked[0]["paths"]) == ["a", "src/b"]


@simulated
async def test_a_file_announced_and_never_recorded_is_removed_at_a_restart(world: World) -> None:
    async with world.run():
        pass
    ledger = Ledger(world.place / "ledger.sqlite")
    ledger.load()
    ledger.intend(paths("half"))
    ledger.close()
    (world.root / "half").write_text("written, then the kill")
    async with world.run() as run:
        assert run.status.mode == "resume"
        assert world.on_disk == world.database.wanted


# --- events


@simulated
async def test_an_event_that_cannot_be_read_rings_and_the_database_tells_what_it_was(world: World) -> None:
    async with world.run() as run:
        world.database.commit({"a": "2"})
        run.send(ring(file_path="a", content=7), ring(), Received("of-tomorrow", {}, 0.0))
        await run.until(lambda: world.on_disk["a"] == "2")
    assert world.orchestrator.reasons == ["doorbell"]


@simulated
async def test_content_that_is_not_what_its_hash_says_is_fetched_and_the_problem_closes(world: World) -> None:
    world.orchestrator.hang = asyncio.Event()
    async with world.run() as run:
        event = world.database.commit({"a": "2"})
        event.payload["files"][0]["content"] = "damaged"  # type: ignore[index]
        run.send(event)
        await run.until(lambda: run.kinds == ["hash_mismatch"])
        assert world.on_disk["a"] == "1"
        world.orchestrator.hang.set()
        await run.until(lambda: world.on_disk["a"] == "2")
        await run.until(lambda: run.kinds == [])


@simulated
async def test_damaged_content_of_a_file_that_is_already_right_is_no_problem_for_ever(world: World) -> None:
    async with world.run() as run:
        event = world.database.commit({"a": "1"})
        event.payload["files"][0]["content"] = "damaged"  # type: ignore[index]
        run.send(event, joined())
        await run.until(lambda: run.source.caught_up_count)
        await run.at_rest()
        assert run.kinds == []


@simulated
async def test_a_refused_path_is_shown_and_the_rest_of_its_commit_stands(world: World) -> None:
    async with world.run() as run:
        event = world.database.commit({"a": "2"})
        event.payload["files"].append({"file_path": "../x", "action": "delete", "version": 1})  # type: ignore[attr-defined]
        run.send(event)
        await run.until(lambda: world.on_disk["a"] == "2")
        assert run.kinds == ["path_refused"]


@simulated
async def test_a_hole_that_stays_is_asked_for_and_one_that_closes_is_not(world: World) -> None:
    async with world.run() as run:
        first, second = world.database.commit({"a": "2"}), world.database.commit({"src/b": "2"})
        run.send(second)
        await run.until(lambda: world.on_disk["src/b"] == "2")
        run.send(first)
        await run.until(lambda: world.on_disk["a"] == "2")
        await asyncio.sleep(5)
        assert world.orchestrator.asked == []
        world.database.commit({"a": "3"})
        run.send(world.database.commit({"src/b": "3"}))
        await run.until(lambda: world.on_disk["a"] == "3")
        assert world.orchestrator.reasons == ["gap"]


@simulated
async def test_the_heartbeats_head_and_an_order_of_the_orchestrator_are_catch_ups(world: World) -> None:
    async with world.run() as run:
        world.database.commit({"a": "2"})
        run.sync.hear(head(world))
        await run.until(lambda: world.on_disk["a"] == "2")
        run.sync.hurry()
        await run.until(lambda: len(world.orchestrator.asked) == 2)
        await run.at_rest()
        run.sync.hear(head(world, tree_hash="0" * 64))
        await run.until(lambda: len(world.orchestrator.asked) == 3)
    assert world.orchestrator.reasons == ["head", "head", "tree_hash"]


@simulated
async def test_a_link_whose_events_are_missing_twice_in_a_row_is_suspected(world: World) -> None:
    async with world.run() as run:

        async def missed() -> None:
            world.database.commit({"a": str(world.database.revision)})
            run.sync.hear(head(world))
            await run.until(lambda: world.on_disk == world.database.wanted)
            await run.at_rest()

        await missed()
        assert run.source.suspected == []
        run.send(world.database.commit({"src/b": "an event that came"}))
        await run.at_rest()
        await missed()
        assert run.source.suspected == []
        await missed()
        assert len(run.source.suspected) == 1


# --- what the link asks for


@simulated
async def test_the_link_is_told_once_its_order_is_answered(world: World) -> None:
    world.orchestrator.script = [refused(503)]
    async with world.run() as run:
        world.database.commit({"a": "2"})
        run.send(joined())
        await run.until(lambda: world.orchestrator.asked)
        assert run.source.caught_up_count == 0
        await run.until(lambda: world.on_disk["a"] == "2")
        assert run.source.caught_up_count == 1
        run.send(Resync("overflow"))
        await run.until(lambda: run.source.caught_up_count == 2)
    assert world.orchestrator.reasons == ["join", "join", "overflow"]


@simulated
async def test_an_order_that_comes_during_a_question_is_answered_by_the_next(world: World) -> None:
    world.orchestrator.hang = asyncio.Event()
    async with world.run() as run:
        run.send(joined())
        await run.until(lambda: world.orchestrator.asked)
        run.send(joined())
        await asyncio.sleep(1)
        world.orchestrator.hang.set()
        await run.until(lambda: len(world.orchestrator.asked) == 2)
        await run.until(lambda: run.source.caught_up_count)
        await asyncio.sleep(60)
        assert run.source.caught_up_count == 1


@simulated
async def test_without_a_session_api_a_join_is_answered_at_once_and_snapshots_are_taken(world: World) -> None:
    async with world.run(api=False) as run:
        run.send(joined())
        await run.until(lambda: run.source.caught_up_count == 1)
        world.database.commit({"a": "2"})
        run.send(Received("snapshot:ready", {"snapshot_url": f"{HOST}/snapshot.zip"}, 0.0))
        await run.until(lambda: world.on_disk["a"] == "2")
    assert world.orchestrator.asked == []


# --- answers


@simulated
async def test_a_commit_that_the_disk_undoes_is_fetched_and_done_again(world: World) -> None:
    async with world.run(disk=(disk := undone_disk(0))) as run:
        disk.left = 1  # type: ignore[attr-defined]
        run.send(world.database.commit({"a": "2", "src/b": "2"}))
        await run.until(lambda: run.kinds == ["disk_full"])
        assert world.on_disk == {"a": "1", "src/b": "1"}
        assert run.sync.tree.cursor.revision == 1
        await run.until(lambda: world.on_disk == {"a": "2", "src/b": "2"})
        assert run.kinds == []
    assert world.orchestrator.reasons == ["disk"]


@simulated
async def test_an_answer_that_the_disk_undoes_is_asked_for_again(world: World) -> None:
    async with world.run(disk=(disk := undone_disk(0))) as run:
        disk.left = 3  # type: ignore[attr-defined]
        world.database.commit({"a": "2"})
        run.send(joined())
        await run.until(lambda: run.kinds == ["disk_full"])
        assert run.source.caught_up_count == 0
        await run.until(lambda: world.on_disk["a"] == "2")
        await run.at_rest()
        assert run.kinds == []
        assert run.source.caught_up_count == 1
    assert len(world.orchestrator.asked) == 4
    assert world.in_staging == []


@simulated
async def test_where_not_even_the_undoing_is_possible_the_tree_says_what_stands_there(world: World) -> None:
    async with world.run(disk=(disk := undone_disk(0, done=["a"]))) as run:
        disk.left = 1  # type: ignore[attr-defined]
        world.orchestrator.hang = asyncio.Event()
        run.send(world.database.commit({"a": "2", "src/b": "2"}))
        await run.until(lambda: world.on_disk["a"] == "2")
        assert world.on_disk["src/b"] == "1"
        entries = run.sync.tree.entries
        assert [entries[path].version for path in sorted(paths("a", "src/b"))] == [2, 1]
        assert run.sync.tree.cursor.revision == 1
        world.orchestrator.hang.set()
        await run.until(lambda: world.on_disk == world.database.wanted)


@simulated
async def test_a_path_that_this_disk_cannot_hold_is_a_problem_and_the_rest_goes_on(world: World) -> None:
    async with world.run() as run:
        run.send(world.database.commit({"a/below": "1", "src/b": "2"}))
        await run.until(lambda: world.on_disk["src/b"] == "2")
        assert run.kinds == ["path_unusable"]
        assert run.sync.tree.cursor.revision == 2
        run.send(world.database.commit({"a": None, "a/below": "2"}))
        await run.until(lambda: world.on_disk == {"a/below": "2", "src/b": "2"})
        assert run.kinds == []


# --- drift: the watch is a thread of its own, so this is in real time


@pytest.mark.parametrize("policy", ["report", "restore", "keep"])
async def test_a_file_that_another_process_changed_goes_by_the_policy(
    world: World, policy: Literal["report", "restore", "keep"]
) -> None:
    async with world.run(drift_policy=policy) as run:
        await run.until(lambda: run.changed, REAL_DEADLINE)
        world.orchestrator.hang = asyncio.Event()
        (world.root / "a").write_text("another process's")
        if policy == "restore":
            await run.until(lambda: world.orchestrator.asked, REAL_DEADLINE)
            assert world.orchestrator.asked[0]["paths"] == ["a"]
            world.orchestrator.hang.set()
            await run.until(lambda: world.on_disk["a"] == "1", REAL_DEADLINE)
            await run.until(lambda: run.kinds == [], REAL_DEADLINE)
        else:
            await run.until(lambda: run.sync.drifted, REAL_DEADLINE)
            assert run.kinds == (["drift"] if policy == "report" else [])
            assert world.on_disk["a"] == "another process's"
            (world.root / "a").write_text("1")
            await run.until(lambda: not run.sync.drifted, REAL_DEADLINE)
            assert run.kinds == []
            (world.root / "a").write_text("another process's again")
            await run.until(lambda: run.sync.drifted, REAL_DEADLINE)
            run.send(world.database.commit({"a": "the database's word"}))
            await run.until(lambda: world.on_disk["a"] == "the database's word", REAL_DEADLINE)
            assert run.kinds == []


# --- the end


@simulated
async def test_an_end_in_the_middle_of_a_question_leaves_everything_recorded(world: World) -> None:
    async with world.run() as run:
        world.orchestrator.hang = asyncio.Event()
        run.send(world.database.commit({"a": "2"}), joined())
        await run.until(lambda: world.on_disk["a"] == "2" and world.orchestrator.asked)
    assert [task for task in asyncio.all_tasks() if task.get_name() == "catch-up"] == []
    assert world.recorded().tree.cursor.revision == 2
    assert world.in_staging == []


@simulated
async def test_an_end_in_the_middle_of_a_snapshot_leaves_nothing_in_staging(world: World) -> None:
    async with world.run() as run:
        endless = asyncio.Event()

        async def body() -> Any:
            yield world.database.archive()[:200]
            await endless.wait()

        world.orchestrator.script = [offered(world)]
        world.orchestrator.archives = [lambda _: httpx.Response(200, content=body())]
        run.send(joined())
        await run.until(lambda: world.orchestrator.fetched == 2)
        await asyncio.sleep(1)
    assert world.in_staging == []
    assert world.recorded().tree.cursor.revision == 1


@simulated
async def test_an_end_before_there_is_a_tree_leaves_nothing(world: World) -> None:
    world.orchestrator.hang = asyncio.Event()
    async with world.run(url=None, wait=False) as run:
        await run.until(lambda: world.orchestrator.asked)
    assert world.on_disk == {}
    async with world.run():
        assert world.on_disk == world.database.wanted


@simulated
async def test_binary_content_and_many_signals_at_once_are_all_applied(world: World) -> None:
    """More than one turn's worth of signals, which are planned together."""
    async with world.run() as run:
        events = [world.database.commit({f"f{n % 150}": str(n)}) for n in range(300)]
        encoded = events[0].payload["files"][0]  # type: ignore[index]
        encoded["content"], encoded["encoding"] = base64.b64encode(b"0").decode(), "base64"
        run.send(*events)
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
    assert world.orchestrator.asked == []
