"""What tools make goes back to the project, through the real loop, disk, watches and record; the other end is a fake.

The same against the real orchestrator is in `tests/system/test_write_back.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from agent.core.globs import Rule
from agent.core.model import RelPath
from agent.sync.preview import Unseen, What
from agent.write_back import pace, states, watch
from tests.agent.sync.world import REAL_DEADLINE, Run, World, refused, whole_head
from tests.agent.write_back.writing import Writer

RULES = (Rule("lock"), Rule("gen/**", deletes=True), Rule("src/*.gen.ts", max_bytes=1_000))
FILES = {"lock": "1", "src/app.ts": "1", "gen/a": "1", "gen/b": "1", "gen/old": "1"}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is quiet for a tenth of the time is read."""
    monkeypatch.setattr(states, "QUIET", 0.03)
    monkeypatch.setattr(watch, "STEP_MS", 10)
    monkeypatch.setattr(watch, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(watch, "RENEW_REST", 1)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, FILES)


def real(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[World], None]:
    def run(world: World) -> None:
        asyncio.run(test(world, Writer(world)))

    return run


def put(world: World, path: str, content: str | bytes) -> None:
    place = world.root / path
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content if isinstance(content, bytes) else content.encode())


async def given(run: Run, world: World, path: str, content: str | None) -> None:
    await run.until(lambda: world.database.files.get(path) == content, REAL_DEADLINE)


async def clean(run: Run) -> None:
    assert run.write_back is not None
    waiting = run.write_back.states
    await run.until(lambda: not waiting.paths and not waiting.outputs, REAL_DEADLINE)


def state_of(run: Run, path: str) -> tuple[str, str | None] | None:
    assert run.write_back is not None
    found = run.write_back.states.paths.get(RelPath(path))
    return found and (found.phase.value, found.rule)


async def watched(run: Run) -> None:
    """Until the watch has compared everything once."""
    assert run.write_back is not None
    await run.until(lambda: run.write_back._watch is not None and run.write_back._watch._swept, REAL_DEADLINE)  # type: ignore[union-attr]


@real
async def test_new_changed_and_deleted_files_go_back_and_their_echo_touches_nothing(
    world: World, writer: Writer
) -> None:
    world.database.commit({"gen/gone": "1"})
    world.database.commit({"gen/gone": None})
    async with world.run(rules=RULES, drift_policy="restore") as run:
        await watched(run)
        put(world, "lock", "2")
        put(world, "gen/new", "n")
        put(world, "gen/deep/er/still", "d")  # in directories that were not there
        put(world, "gen/gone", "again")  # at a tombstone
        (world.root / "gen/old").unlink()
        for path, content in {"lock": "2", "gen/new": "n", "gen/gone": "again", "gen/old": None}.items():
            await given(run, world, path, content)
        await given(run, world, "gen/deep/er/still", "d")
        assert {offer["generation"] for offer in writer.offers} == {3}
        stats = {path: os.stat(world.root / path) for path in ("lock", "gen/new", "gen/deep/er/still")}
        run.send(*writer.events)  # the echo comes after the answers
        await run.until(lambda: run.sync.tree.cursor.revision == world.database.revision, REAL_DEADLINE)
        await clean(run)
        assert run.sync.tree.hash() == head_hash(world)
        assert {path: os.stat(world.root / path) for path in stats} == stats
        assert len(writer.paths) == len(set(writer.paths)), "one output, one offer"
        assert run.kinds == []
    recorded = world.recorded()
    assert recorded.tree.entries[RelPath("gen/new")].version == 1, "what went back is ours from now on"
    assert RelPath("gen/deep/er/still") in recorded.stats


def head_hash(world: World) -> str:
    return whole_head(world).tree_hash or ""


@real
async def test_what_was_taken_is_applied_without_its_event_and_an_old_head_is_no_loss(
    world: World, writer: Writer
) -> None:
    async with world.run(rules=RULES) as run:
        await watched(run)
        old, asked_at = whole_head(world), run.sync.tree.cursor
        put(world, "lock", "2")
        await given(run, world, "lock", "2")
        await clean(run)
        assert run.sync.tree.cursor.revision == world.database.revision
        run.sync.hear(old, asked_at)  # what a heartbeat was answered before
        run.send(*writer.events)
        run.send(world.database.commit({"src/app.ts": "2"}))
        await run.until(lambda: world.on_disk["src/app.ts"] == "2", REAL_DEADLINE)
        run.sync.hear(whole_head(world))
        await run.at_rest()
        assert world.orchestrator.reasons == []
        assert world.orchestrator.fetched == 1


class Shown(Unseen):
    """A preview that notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Mapping[RelPath, What]] = []

    def commit(self, revision: int, changes: Mapping[RelPath, What]) -> None:
        self.told += [changes] if changes else []


@real
async def test_the_preview_is_told_of_what_was_taken(world: World, writer: Writer) -> None:
    """A watcher does not hear a tool within 50 ms of a save: six pages of sixteen showed what was before."""
    async with world.run(rules=RULES) as run:
        await watched(run)
        run.sync._preview = shown = Shown()
        put(world, "lock", "2")
        put(world, "gen/new", "1")
        (world.root / "gen/old").unlink()
        await clean_after(run, world, {"lock": "2", "gen/new": "1", "gen/old": None})
        assert {path: what for each in shown.told for path, what in each.items()} == {
            "lock": "change",
            "gen/new": "add",
        }


async def clean_after(run: Run, world: World, files: dict[str, str | None]) -> None:
    for path, content in files.items():
        await given(run, world, path, content)
    await clean(run)


@real
async def test_a_save_on_a_changed_path_lands_at_once_and_the_tools_bytes_are_kept(
    world: World, writer: Writer
) -> None:
    async with world.run(rules=RULES) as run:
        await watched(run)
        writer.script = [refused(503)(None)] * 2  # nothing goes out in time
        put(world, "lock", "tool")
        run.send(world.database.commit({"lock": "person"}))
        await run.until(lambda: world.on_disk["lock"] == "person", REAL_DEADLINE)
        assert run.write_back is not None
        assert [each.kept for each in run.write_back.states.outputs.values()] == [True]
        await run.until(lambda: writer.kept == ["tool"], REAL_DEADLINE)
        await clean(run)
        assert (world.on_disk["lock"], world.database.files["lock"]) == ("person", "person")
        assert run.kinds == ["write_back_conflict"]
        run.send(world.database.commit({"lock": "taken"}))
        await run.until(lambda: run.kinds == [], REAL_DEADLINE)


@real
async def test_our_own_output_that_comes_back_does_not_replace_what_the_tool_made_since(
    world: World, writer: Writer
) -> None:
    async with world.run(rules=RULES) as run:
        await watched(run)

        def meanwhile(body: dict[str, Any]) -> Any:
            put(world, "lock", "tool 2")
            writer.take(body)
            run.send(*writer.events)
            writer.events.clear()
            return refused(503)(None)  # the answer is lost

        writer.script = [meanwhile]
        put(world, "lock", "tool 1")
        await given(run, world, "lock", "tool 1")
        await given(run, world, "lock", "tool 2")
        await clean(run)
        assert [offer["offer_id"] for offer in writer.offers][:2] == [writer.offers[0]["offer_id"]] * 2
        assert world.database.versions["lock"] == 3, "one version each"
        assert world.on_disk["lock"] == "tool 2"


@real
async def test_what_is_offered_is_on_record_before_and_a_start_offers_the_same_again(
    world: World, writer: Writer
) -> None:
    record: list[tuple[Any, ...]] = []

    def look(body: dict[str, Any]) -> Any:
        copy = world.place / "copy.sqlite"
        for suffix in ("", "-wal"):
            Path(f"{copy}{suffix}").write_bytes((world.place / f"write-back.sqlite{suffix}").read_bytes())
        sql = sqlite3.connect(copy)
        record.extend(sql.execute("select path, offer, content from outputs").fetchall())
        sql.close()
        return writer.lose_the_answer(body)

    async with world.run(rules=RULES) as run:
        await watched(run)
        writer.script = [look, *([refused(503)(None)] * 50)]
        put(world, "lock", "tool")
        await run.until(lambda: record, REAL_DEADLINE)
    first = writer.offers[0]
    assert record == [("lock", first["offer_id"], b"tool")]
    writer.script = []
    put(world, "src/x.gen.ts", "made while nobody looked")
    async with world.run(rules=RULES, drift_policy="restore", url=None) as run:
        await given(run, world, "src/x.gen.ts", "made while nobody looked")
        await clean(run)
        again = [offer for offer in writer.offers if offer["offer_id"] == first["offer_id"]]
        assert all(offer == first for offer in again)
        assert len(again) > 1
        assert (world.database.versions["lock"], world.on_disk["lock"]) == (2, "tool")
        assert run.sync.tree.entries[RelPath("lock")].version == 2


async def bad(world: World, make: Callable[[Path], object]) -> Path:
    place = world.root / "gen" / "bad"
    await asyncio.to_thread(make, place)
    return place


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link": (lambda place: place.symlink_to("/etc/passwd"), "not_a_file"),
    "another's file by a hard link": (lambda place: os.link(secret(place), place), "linked"),
    "a FIFO": (os.mkfifo, "not_a_file"),
    "another user's": (lambda place: (place.write_text("x"), os.chown(place, 12345, 12345)), "owner"),
    "no text": (lambda place: place.write_bytes(b"\xff\x00"), "text"),
    "a megabyte and more": (lambda place: place.write_bytes(b"x" * (2**20 + 1)), "size"),
}


def secret(place: Path) -> Path:
    file = place.parent.parent.parent / "secret"
    file.write_text("another's")
    return file


def test_what_is_not_a_tools_own_text_is_refused_by_rule_counted_and_shown(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        BAD.pop("another user's")
        print("not root: nothing can be given to another user")

    async def each() -> None:
        for number, (what, (make, rule)) in enumerate(BAD.items()):
            place = tmp_path / str(number)
            place.mkdir()
            world = World(place, FILES)
            writer = Writer(world)
            async with world.run(rules=RULES) as run:
                await watched(run)
                await bad(world, make)
                put(world, "src/other.ts", "outside the rules")
                await run.until(lambda: state_of(run, "gen/bad") == ("refused", rule), REAL_DEADLINE)  # noqa: B023
                put(world, "gen/good", "goes on")
                await given(run, world, "gen/good", "goes on")
                assert set(writer.paths) == {"gen/good"}, what
                assert run.write_back is not None
                report = run.write_back.report()
                assert report is not None
                assert {"file_path": "gen/bad", "state": "refused", "rule": rule} in report["paths"]  # type: ignore[operator]
                assert run.write_back.outcomes["refused"] == 1

    asyncio.run(each())


@real
async def test_a_conflict_is_shown_until_a_later_version_comes(world: World, writer: Writer) -> None:
    async with world.run(rules=RULES) as run:
        await watched(run)
        saved = world.database.commit({"lock": "person"})  # its event is late
        put(world, "lock", "tool")
        await run.until(lambda: run.kinds == ["write_back_conflict"], REAL_DEADLINE)
        run.send(saved)
        await run.until(lambda: world.on_disk["lock"] == "person", REAL_DEADLINE)
        await clean(run)
        assert (writer.kept, run.kinds) == (["tool"], ["write_back_conflict"])
        assert run.write_back is not None
        assert run.write_back.outcomes["kept"] == 0, "the project has it"
        run.send(world.database.commit({"lock": "taken"}))
        await run.until(lambda: run.kinds == [], REAL_DEADLINE)


@real
async def test_a_directory_that_is_a_link_leads_nowhere(world: World, writer: Writer) -> None:
    outside = world.place / "outside"
    outside.mkdir()
    (outside / "secret").write_text("another's")
    async with world.run(rules=RULES) as run:
        await watched(run)
        (world.root / "gen/link").symlink_to(outside)
        put(world, "gen/good", "g")
        await given(run, world, "gen/good", "g")
        assert run.write_back is not None
        run.write_back._touched(RelPath("gen/link/secret"), 1)
        await run.until(lambda: state_of(run, "gen/link/secret") == ("refused", "not_a_file"), REAL_DEADLINE)
        assert "gen/link/secret" not in writer.paths


@real
async def test_a_refusal_is_not_offered_again_and_the_next_save_lands(world: World, writer: Writer) -> None:
    writer.refuses["lock"] = "came_before"
    async with world.run(rules=RULES) as run:
        await watched(run)
        put(world, "lock", "what it was")
        await run.until(lambda: state_of(run, "lock") == ("refused", "came_before"), REAL_DEADLINE)
        put(world, "lock", "what it was")
        put(world, "gen/next", "n")
        await given(run, world, "gen/next", "n")
        assert writer.paths.count("lock") == 1
        run.send(world.database.commit({"lock": "person"}))
        await run.until(lambda: world.on_disk["lock"] == "person", REAL_DEADLINE)
        assert run.write_back is not None
        assert run.write_back.outcomes["kept"] == 0, "the history has it"


@real
async def test_no_answer_ends_the_session_and_what_is_too_large_goes_in_parts(
    world: World, writer: Writer
) -> None:
    def too_large(body: dict[str, Any]) -> Any:
        return refused(413)(body) if len(body["changes"]) > 1 else writer.take(body)

    async with world.run(rules=RULES) as run:
        await watched(run)
        waits = pytest.MonkeyPatch()
        waits.setattr(pace, "GONE_RETRY", 0.05)
        writer.script = [refused(401)(None), refused(410)(None), refused(409)(None), refused(422)(None)]
        put(world, "lock", "2")
        await run.until(lambda: len(writer.offers) == 4, REAL_DEADLINE)
        waits.undo()
        assert writer.tokens >= 2, "a refused token is asked for anew"
        writer.script = [too_large] * 20
        for name in "abcd":
            put(world, f"gen/n{name}", name)
        for name in "abcd":
            await given(run, world, f"gen/n{name}", name)
        assert not run.task.done()


@real
async def test_without_rules_there_is_nothing_and_they_are_followed_while_it_runs(
    world: World, writer: Writer
) -> None:
    async with world.run(rules=()) as run:
        put(world, "lock", "2")
        assert run.write_back is not None
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert not any(name.startswith("write-back") for name in names)
        assert not (world.place / "write-back.sqlite").exists()
        assert (writer.offers, writer.tokens, run.write_back.report()) == ([], 0, None)
        run.write_back.configure(RULES)
        await given(run, world, "lock", "2")
        await clean(run)
        run.write_back.configure(())
        await run.until(
            lambda: not any(task.get_name().startswith("write-back") for task in asyncio.all_tasks()),
            REAL_DEADLINE,
        )
        offers = len(writer.offers)
        put(world, "lock", "3")
        run.send(world.database.commit({"lock": "person"}))
        await run.until(lambda: world.on_disk["lock"] == "person", REAL_DEADLINE)
        assert len(writer.offers) == offers


@real
async def test_a_record_that_another_has_open_is_left_as_it_is(world: World, writer: Writer) -> None:
    """It was taken for damaged, and what was on record was offered by nobody."""
    place = world.place / "write-back.sqlite"
    async with world.run(rules=RULES) as run:
        await watched(run)
        assert run.write_back is not None
        run.write_back._pace.wait(1_000)
        put(world, "lock", "2")
        await run.until(lambda: bool(run.write_back and run.write_back.states.outputs), REAL_DEADLINE)
    with contextlib.closing(sqlite3.connect(place, isolation_level=None)) as other:
        other.execute("pragma locking_mode = exclusive")
        other.execute("begin exclusive")
        async with world.run(rules=RULES) as run:
            await watched(run)
            put(world, "gen/a", "2")
            await run.until(lambda: state_of(run, "gen/a") is not None, REAL_DEADLINE)
            report = run.write_back.report() if run.write_back else None
            assert report is not None
            assert "cannot be read" in report["failure"]
            assert writer.offers == []
    async with world.run(rules=RULES) as run:
        await given(run, world, "lock", "2")
        await given(run, world, "gen/a", "2")


@real
async def test_what_other_rules_do_not_speak_of_is_not_offered_and_is_drift(
    world: World, writer: Writer
) -> None:
    """Outputs that wait when the rules are changed, one of them replaced by a save already; then rules taken away."""
    async with world.run(rules=RULES, drift_policy="restore") as run:
        await watched(run)
        back = run.write_back
        assert back is not None
        back._pace.wait(1_000)
        put(world, "lock", "a tool's")
        put(world, "src/x.gen.ts", "a tool's")
        await run.until(lambda: len(back.states.outputs) == 2, REAL_DEADLINE)
        run.send(world.database.commit({"src/x.gen.ts": "a person's"}))
        await run.until(lambda: world.on_disk.get("src/x.gen.ts") == "a person's", REAL_DEADLINE)
        back.configure((Rule("gen/**"),))
        back._pace._not_before = 0.0
        put(world, "gen/a", "2")
        await given(run, world, "gen/a", "2")
        await clean(run)
        assert writer.paths == ["gen/a"]
        report = back.report()
        assert report is not None
        assert report["kept_refused"] == 1, "nobody else has what the save replaced"
        await run.until(lambda: world.on_disk["lock"] == "1", REAL_DEADLINE)
        back._pace.wait(1_000)
        put(world, "gen/b", "2")
        await run.until(lambda: len(back.states.outputs) == 1, REAL_DEADLINE)
        back.configure(())
        await run.until(lambda: world.on_disk["gen/b"] == "1", REAL_DEADLINE)
        back._pace._not_before = 0.0
        back.configure(RULES)
        put(world, "gen/a", "3")
        await given(run, world, "gen/a", "3")
        assert [path for path in writer.paths if path != "gen/a"] == []


@real
async def test_when_much_vanishes_nothing_is_offered_until_it_is_back(world: World, writer: Writer) -> None:
    world.database.commit({f"gen/{n}": "1" for n in range(6)})
    async with world.run(rules=RULES) as run:
        await watched(run)
        for n in range(5):
            (world.root / f"gen/{n}").unlink()
        put(world, "lock", "checkout")
        assert run.write_back is not None
        states_ = run.write_back.states
        await run.until(
            lambda: len(states_.vanished) == 5 and state_of(run, "lock") is not None, REAL_DEADLINE
        )
        assert states_.halted
        assert writer.offers == []
        for n in range(3):
            put(world, f"gen/{n}", "1")
        await given(run, world, "lock", "checkout")
        await given(run, world, "gen/4", None)
        assert not {"gen/0", "gen/1", "gen/2"} & set(writer.paths)


@pytest.mark.nightly
@real
async def test_ten_thousand_files_go_in_bounded_offers_and_a_save_does_not_wait(
    world: World, writer: Writer
) -> None:
    def make() -> None:
        (world.root / "gen/many").mkdir(parents=True)
        for n in range(10_000):
            (world.root / f"gen/many/{n}").write_bytes(b"%d" % n)

    async with world.run(rules=RULES) as run:
        await watched(run)
        await asyncio.to_thread(make)
        assert run.write_back is not None
        await run.until(lambda: len(writer.offers) >= 5, REAL_DEADLINE)
        began = asyncio.get_running_loop().time()
        run.send(world.database.commit({"src/app.ts": "saved"}))
        await run.until(lambda: world.on_disk.get("src/app.ts") == "saved", REAL_DEADLINE)
        assert asyncio.get_running_loop().time() - began < 5.0
        await run.until(lambda: len(writer.offers) == 30, REAL_DEADLINE)
        assert all(len(offer["changes"]) <= 50 for offer in writer.offers)
        assert len(run.write_back.states.paths) <= states.MOST_PATHS
        assert len(run.write_back.states.outputs) <= 1_000
