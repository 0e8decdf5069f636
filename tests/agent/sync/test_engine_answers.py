"""What the loop does with an answer: one that does not fit, none at all, and a snapshot that would delete too much."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from agent.core.errors import SessionGone, Superseded
from agent.telemetry.status import SyncPhase
from tests.agent.sync.world import (
    Answer,
    World,
    head,
    joined,
    offered,
    plain,
    refused,
    simulated,
)
from tests.fakes.zips import snapshot


@simulated
async def test_an_answer_keeps_the_spacing_of_two_writes_to_a_path(world: World) -> None:
    async with world.run() as run:
        now = asyncio.get_running_loop().time
        run.send(world.database.commit({"a": "2"}))
        await run.until(lambda: world.on_disk["a"] == "2")
        written = now()
        world.database.commit({"a": "3"})
        run.send(joined())
        await run.until(lambda: world.on_disk["a"] == "3")
        assert now() - written >= 0.07


@pytest.mark.parametrize(
    "unfit",
    [
        lambda world: lambda question: {**world.database.changes(question), "base_revision": 99, "revision": 100},
        lambda world: lambda question: {**world.database.changes(question), "epoch": "another history"},
    ],
    ids=["above what we have", "of another history"],
)  # fmt: skip
def test_an_answer_that_does_not_fit_is_asked_for_again_a_second_later(world: World, unfit: Any) -> None:
    @simulated
    async def scenario() -> None:
        world.orchestrator.script = [unfit(world)]
        async with world.run() as run:
            now = asyncio.get_running_loop().time
            world.database.commit({"a": "2"})
            run.send(joined())
            await run.until(lambda: world.orchestrator.asked)
            asked = now()
            assert world.on_disk["a"] == "1"
            await run.until(lambda: world.on_disk["a"] == "2")
            assert now() - asked > 0.99
            assert run.kinds == []
        assert len(world.orchestrator.asked) == 2

    scenario()


@simulated
async def test_a_snapshot_of_another_history_replaces_the_tree(world: World) -> None:
    async with world.run() as run:
        world.database.epoch = "restored"
        world.database.revision = 0
        world.database.commit({"a": "restored", "src/b": None})
        run.sync.hear(head(world))
        await run.until(lambda: world.on_disk == {"a": "restored"})
        assert run.sync.tree.cursor.epoch == "restored"
        tree = run.sync.tree
    assert world.recorded().tree == tree


FAILURES: dict[str, tuple[Answer, list[str]]] = {
    "away": (refused(503), ["session_api_unreachable"]),
    "too busy": (refused(429), ["session_api_unreachable"]),
    "somebody else's page": (plain(404, b"<html>"), ["session_api_unreachable"]),
    "too large": (refused(413), ["request_too_large"]),
    "not taken": (refused(422), ["request_too_large"]),
    "no connection": (httpx.ConnectError("refused"), ["session_api_unreachable"]),
    "cut": (httpx.RemoteProtocolError("cut"), ["session_api_unreachable"]),
    "silence": (httpx.ReadTimeout("silence"), ["session_api_unreachable"]),
    "no JSON": (plain(200, b"{"), ["session_api_unreachable"]),
    "no answer": ({"kind": "of tomorrow", "epoch": "e", "revision": 1}, ["session_api_unreachable"]),
    "a list": (lambda _: [], ["session_api_unreachable"]),
    "refused": (refused(401), ["session_api_refused"]),
}


@pytest.mark.parametrize(("failure", "kinds"), FAILURES.values(), ids=FAILURES)
def test_a_catch_up_that_fails_is_shown_and_made_again(
    world: World, failure: Answer, kinds: list[str]
) -> None:
    @simulated
    async def scenario() -> None:
        world.orchestrator.script = [failure] * 1000
        async with world.run() as run:
            world.database.commit({"a": "2"})
            run.send(joined())
            await run.until(lambda: run.catch_up.attempts >= 2)
            assert run.kinds == kinds
            assert world.on_disk["a"] == "1"
            run.send(world.database.commit({"src/b": "an event goes on meanwhile"}))
            await run.until(lambda: world.on_disk["src/b"] != "1")
            assert world.on_disk["a"] == "1"
            world.orchestrator.script.clear()
            await run.until(lambda: world.on_disk["a"] == "2")
            await run.at_rest()
            assert run.kinds == []
            assert run.catch_up.attempts == 0
        assert world.in_staging == []

    scenario()


@simulated
async def test_a_refused_token_is_asked_with_once_a_minute(world: World) -> None:
    world.orchestrator.script = [refused(401)] * 3
    async with world.run() as run:
        now = asyncio.get_running_loop().time
        began = now()
        run.send(joined())
        await run.until(lambda: len(world.orchestrator.asked) == 4, deadline=1000)
        assert now() - began >= 180.0


@pytest.mark.parametrize(("status", "end"), [(404, SessionGone), (410, SessionGone), (409, Superseded)])
def test_an_orchestrator_that_ends_the_session_ends_the_loop(
    world: World, status: int, end: type[Exception]
) -> None:
    @simulated
    async def scenario() -> None:
        world.orchestrator.script = [refused(status)]
        with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012 - the loop ends in the middle of it
            async with world.run() as run:
                run.send(joined())
                await run.until(lambda: False)
        assert caught.group_contains(end)
        assert world.on_disk == world.database.wanted

    scenario()


@simulated
async def test_a_catch_up_that_is_not_needed_any_more_leaves_no_problem(world: World) -> None:
    """The hole closes by itself while the orchestrator is away, and nothing is asked again."""
    world.orchestrator.script = [refused(503)] * 100
    async with world.run() as run:
        first, second = world.database.commit({"a": "2"}), world.database.commit({"src/b": "2"})
        run.send(second)
        await run.until(lambda: run.kinds == ["session_api_unreachable"])
        run.send(first)
        await run.until(lambda: run.kinds == [])
        await run.at_rest()
        assert world.on_disk == world.database.wanted
        assert run.catch_up.attempts == 0


# --- a snapshot that would delete too much


def emptied(world: World) -> None:
    world.database.commit(dict.fromkeys(world.database.files))


@simulated
async def test_a_snapshot_that_empties_the_tree_halts_until_a_second_build_says_the_same(
    world: World,
) -> None:
    world.orchestrator.script = [offered(world), offered(world)]
    async with world.run() as run:
        before = world.on_disk
        emptied(world)
        run.send(joined())
        await run.until(lambda: run.status.phase is SyncPhase.HALTED)
        assert run.kinds == ["mass_delete"]
        assert world.on_disk == before
        assert world.in_staging == []
        await run.until(lambda: world.on_disk == {})
        await run.at_rest()
        assert (run.status.phase, run.kinds) == (SyncPhase.FOLLOWING, [])
    assert world.orchestrator.reasons == ["join", "snapshot_rejected"]


@simulated
async def test_while_halted_no_event_is_applied_and_afterwards_all_are(world: World) -> None:
    world.orchestrator.script = [offered(world)]
    world.orchestrator.archives = [world.database.archive(), snapshot({})]
    async with world.run() as run:
        run.send(joined())
        await run.until(lambda: run.status.phase is SyncPhase.HALTED)
        world.orchestrator.hang = asyncio.Event()
        run.send(world.database.commit({"a": "2"}))
        await asyncio.sleep(30)
        assert world.on_disk["a"] == "1"
        assert run.sync.queue_depth == 1
        world.orchestrator.hang.set()
        await run.until(lambda: world.on_disk["a"] == "2")
        assert (run.status.phase, run.kinds) == (SyncPhase.FOLLOWING, [])


@simulated
async def test_a_second_build_that_says_something_else_again_is_doubted_again(world: World) -> None:
    world.database.commit({f"f{n}": "1" for n in range(30)})
    world.orchestrator.script = [offered(world)] * 3
    whole = world.database.archive()
    async with world.run() as run:
        emptied(world)
        world.database.commit({"f1": "1"})
        one = world.database.archive()
        world.database.commit({"f1": None, "y": "1"})
        other = world.database.archive()
        world.orchestrator.archives = [one, other, other]
        run.send(joined())
        await run.until(lambda: len(world.orchestrator.asked) == 2)
        await run.until(lambda: run.status.phase is SyncPhase.HALTED)
        assert len(world.on_disk) == 32
        await run.until(lambda: world.on_disk == {"y": "1"})
        assert run.status.phase is SyncPhase.FOLLOWING
    assert whole
    assert world.orchestrator.reasons == ["join", "snapshot_rejected", "snapshot_rejected"]


# --- a disk that fails
