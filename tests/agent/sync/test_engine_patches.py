"""Splices through the loop: the real disk, the real ledger, and an orchestrator that is asked only where it must be."""

from __future__ import annotations

import time
from typing import Any

from agent.core.patches import PatchOutcome
from agent.link.source import Received
from tests.agent.sync.world import World, _sha, joined, simulated

BIG = "".join(f"line {n} é\n" for n in range(3000))


def spliced(event: Received, before: str) -> Received:
    """The same event, with one splice for each file that was `before`."""
    files = [_spliced(item, before) for item in event.payload["files"]]
    return Received(event.event, {**event.payload, "files": files}, time.time())


def _spliced(item: dict[str, Any], before: str) -> dict[str, Any]:
    if item.get("content") is None:
        return item
    old, new = before.encode(), item["content"].encode()
    same = next((n for n in range(min(len(old), len(new))) if old[n] != new[n]), min(len(old), len(new)))
    while same and ((new + b"\n")[same] & 0xC0 == 0x80 or (old + b"\n")[same] & 0xC0 == 0x80):
        same -= 1
    splices = [[same, len(old) - same, new[same:].decode()]]
    return {**item, "content": None, "encoding": "utf-8", "base_hash": _sha(before), "splices": splices}


@simulated
async def test_typing_in_a_large_file_asks_for_nothing(world: World) -> None:
    world.database.files["a"] = BIG
    async with world.run() as run:
        before = BIG
        for n in range(30):
            after = before + f"typed {n} \N{GRINNING FACE}"
            run.send(spliced(world.database.commit({"a": after}), before))
            before = after
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
        assert run.sync.patches.outcomes == {PatchOutcome.APPLIED: 30}
        assert run.sync.patches.saved_bytes > 30 * len(BIG)
    assert world.orchestrator.asked == []
    assert world.recorded().tree.cursor.revision == 31


@simulated
async def test_a_drifted_file_and_wrong_splices_are_fetched_by_path(world: World) -> None:
    async with world.run() as run:
        (world.root / "a").write_text("2")  # another process, of the same size
        run.send(spliced(world.database.commit({"a": "1 and more"}), "1"))
        await run.until(lambda: world.on_disk == world.database.wanted)
        wrong = spliced(world.database.commit({"a": "1 and even more"}), "1 and more")
        wrong.payload["files"][0]["splices"] = [[0, 0, "?"]]
        run.send(wrong)
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
        assert run.sync.patches.outcomes == {PatchOutcome.MISMATCH: 2}
        assert not run.kinds
    assert [(q["reason"], q["paths"]) for q in world.orchestrator.asked] == [("reference", ["a"])] * 2


@simulated
async def test_an_answer_in_splices_is_taken_and_one_that_does_not_fit_is_asked_for_whole(
    world: World,
) -> None:
    def answered(question: dict[str, Any], before: str) -> dict[str, Any]:
        answer = world.database.changes(question)
        return {**answer, "changes": [_spliced(item, before) for item in answer["changes"]]}

    async with world.run() as run:
        world.database.commit({"a": "1 and more"})
        world.orchestrator.script = [lambda question: answered(question, "1")]
        run.send(joined())
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
        assert run.sync.patches.outcomes == {PatchOutcome.APPLIED: 1}
        world.database.commit({"a": "else"})
        world.orchestrator.script = [lambda question: answered(question, "never was")]
        run.send(joined())
        await run.until(lambda: world.on_disk == world.database.wanted)
        await run.at_rest()
    first, second, third = world.orchestrator.asked
    assert first["accept"] == second["accept"] == ["splices"]
    assert ("paths" in second, third["paths"]) == (False, ["a"])
