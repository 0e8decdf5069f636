"""Whatever breaks, the tree ends equal: the real agent, socket, disk and database; faults made for real."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest

from tests.profiles import NIGHTLY
from tests.system.plane import Agent, Plane, Project, edit_at_random, eventually, running_plane
from tests.trees import files_below

pytestmark = pytest.mark.system

FILES = {"readme.md": "# hello\n", "src/a.ts": "a\n", "src/deep/b.ts": "b\n"}


@pytest.fixture
async def plane(database: str, tmp_path: Path) -> AsyncIterator[Plane]:
    async with running_plane(database, tmp_path) as plane:
        yield plane


@pytest.fixture
async def project(plane: Plane) -> Project:
    return await plane.project(FILES)


@pytest.fixture
async def agent(project: Project, tmp_path: Path) -> AsyncIterator[Agent]:
    """A running agent whose tree is equal."""
    agent = await project.session(tmp_path / "machine")
    agent.start()
    try:
        await agent.equal()
        await live(agent)
        yield agent
    finally:
        agent.kill()


async def live(agent: Agent) -> None:
    async def is_live() -> bool:
        report = await agent.status()
        return report is not None and report["link"]["state"] == "live"

    await eventually("the link is live", is_live)


async def test_an_agent_starts_equal_follows_and_stops_clean(agent: Agent, project: Project) -> None:
    await project.save("src/new/file.ts", "made\n")
    await project.delete("src/deep/b.ts")
    await agent.equal()
    assert not (agent.tree / "src" / "deep").exists(), "a directory we made goes with its last file"
    assert await agent.stop() == 0
    assert not list((agent.tree.parent / ".preview-sync").iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
async def test_every_stop_signal_drains(project: Project, tmp_path: Path, number: signal.Signals) -> None:
    agent = await project.session(tmp_path / "machine")
    agent.start()
    await agent.equal()
    assert await agent.stop(number) == 0


@pytest.mark.parametrize("fault", ["drop", "duplicate", "reorder"])
async def test_lost_doubled_and_reordered_events_are_made_good(
    agent: Agent, project: Project, fault: str
) -> None:
    dice = random.Random(fault)
    for _ in range(6 if not NIGHTLY else 60):
        await project.faults(**{fault: dice.randrange(1, 6)})
        await edit_at_random(project, dice, 6)
    await agent.equal()


async def test_the_loss_of_the_very_last_event_heals_by_the_heartbeat(agent: Agent, project: Project) -> None:
    await project.faults(drop=1)
    await project.save("src/a.ts", "the last word\n")
    report = await agent.equal()
    assert report["link"]["state"] == "live"


ACTIONS = [
    {"action": "close", "code": 1000},
    {"action": "close", "code": 1001},
    {"action": "close", "code": 1012},
    {"action": "abort"},
    {"action": "expire_tokens"},
    {"action": "rate_limit"},
    {"action": "crash"},
]


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: "-".join(map(str, action.values())))
async def test_a_broken_channel_comes_back_with_what_was_missed(
    agent: Agent, project: Project, action: dict[str, object]
) -> None:
    before = await agent.status()
    assert before is not None
    if action["action"] == "abort":
        await project.faults(refuse=2, refuse_status=429)
    await project.faults(**action)
    await edit_at_random(project, random.Random(str(action)), 8)
    await agent.equal()

    async def joined_again() -> bool:
        report = await agent.status()
        link = report["link"] if report else {}
        return link.get("state") == "live" and link["joins"] > before["link"]["joins"]

    await eventually("a new join", joined_again)
    await project.save("src/after.ts", "after\n")
    await agent.equal()


async def test_content_by_reference_is_fetched_and_holds_up_nothing(agent: Agent, project: Project) -> None:
    big = "x" * 300_000
    await project.bulk({"big.txt": big, "small.txt": "s\n"})
    await project.save("other.txt", "o\n")
    await project.save("big2.txt", big)
    report = await agent.equal()
    assert report["files"] == len(FILES) + 4


async def test_a_restored_database_is_another_history(agent: Agent, project: Project) -> None:
    before = (await agent.equal())["epoch"]
    await project.save("src/a.ts", "will be lost in the restore\n")
    await agent.equal()
    async with await psycopg.AsyncConnection.connect(project.plane.dsn, autocommit=True) as connection:
        await connection.execute(
            "update public.project_heads set epoch = gen_random_uuid() where project_id = %s",
            (project.id,),
        )
    await project.save("src/a.ts", "after the restore\n")
    report = await agent.equal()
    assert report["epoch"] != before


async def test_a_file_changed_behind_our_back_is_seen_by_the_tree_hash(
    agent: Agent, project: Project
) -> None:
    """A wrong byte in what the *agent believes* heals too: here its ledger is told a lie between two lives."""
    await agent.stop()
    ledger = sqlite3.connect(agent.directory / "state" / "ledger.sqlite")
    ledger.execute("delete from files where path = 'src/a.ts'")
    ledger.commit()
    ledger.close()
    (agent.tree / "src" / "a.ts").unlink()
    agent.start()
    await agent.equal()


async def test_the_orchestrator_being_away_stops_nothing_that_is_live(agent: Agent, project: Project) -> None:
    url = agent.environ["SESSION_API_URL"]
    agent.kill()
    agent.environ["SESSION_API_URL"] = "http://127.0.0.1:9"
    agent.start()
    await project.save("src/a.ts", "live without catch-up\n")

    async def seen() -> bool:
        report = await agent.status()
        return report is not None and any(p["kind"] == "session_api_unreachable" for p in report["problems"])

    await eventually("the problem is shown", seen)
    agent.kill()
    agent.environ["SESSION_API_URL"] = url
    agent.start()
    await agent.equal()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


async def test_a_full_disk_undoes_the_batch_and_heals_when_there_is_space(
    project: Project, tmp_path: Path, small: Path
) -> None:
    agent = await project.session(tmp_path / "machine", PROJECT_DIR=str(small / "project"))
    try:
        agent.start()
        await agent.equal()
        await live(agent)
        filler = small / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(b"\0" * 4096):
                pass
        await project.bulk({"readme.md": None, "src/a.ts": "y" * 50_000})

        async def told() -> bool:
            report = await agent.status()
            return report is not None and any(p["kind"] == "disk_full" for p in report["problems"])

        await eventually("disk_full is shown", told)
        assert agent.files() == {path: text.encode() for path, text in FILES.items()}, "the batch was undone"
        filler.unlink()
        report = await agent.equal()
        assert not [p for p in report["problems"] if p["kind"] == "disk_full"]
    finally:
        agent.kill()


async def test_killed_at_any_point_it_comes_back_and_ends_equal(project: Project, tmp_path: Path) -> None:
    """SIGKILL at random points of starting, hydrating, following, catching up."""
    rounds = 200 if NIGHTLY else 8
    dice = random.Random(20261120)
    agent = await project.session(tmp_path / "machine")
    agent.start()
    try:
        for n in range(rounds):
            editing = asyncio.create_task(edit_at_random(project, random.Random(n), 5))
            # Not a wait for anything: the moment of the kill is the thing that is varied.
            await asyncio.sleep(dice.uniform(0, 1.2))
            agent.kill()
            await editing
            agent.start()
            if n % 8 == 7:
                report = await agent.equal()
                assert report["hydrate"]["mode"] in ("resume", "rebuild", "fresh")
        await agent.equal()
    finally:
        agent.kill()


@pytest.mark.parametrize("policy", ["report", "restore", "keep"])
async def test_drift_by_policy(project: Project, tmp_path: Path, policy: str) -> None:
    agent = await project.session(tmp_path / "machine", DRIFT_POLICY=policy)
    agent.start()
    try:
        await agent.equal()
        await live(agent)
        (agent.tree / "src" / "a.ts").write_text("changed inside the container\n")
        (agent.tree / "src" / "deep" / "b.ts").unlink()
        (agent.tree / "theirs.log").write_text("not the project's\n")

        async def drifted() -> list[str]:
            report = await agent.status()
            assert report is not None
            return sorted(p["file_path"] for p in report["problems"] if p["kind"] == "drift")

        if policy == "restore":

            async def restored() -> bool:
                return {p: c for p, c in agent.files().items() if p != "theirs.log"} == await project.files()

            await eventually("what was changed is put back", restored)
        elif policy == "report":

            async def shown() -> bool:
                return await drifted() == ["src/a.ts", "src/deep/b.ts"]

            await eventually("both are shown", shown)
        # The database's next word wins whatever the policy, and what is not ours stays.
        await project.save("src/a.ts", "the database's next word\n")
        await project.save("src/deep/b.ts", "and on the other\n")

        async def won() -> bool:
            here = agent.files()
            return here.pop("theirs.log", b"") == b"not the project's\n" and here == await project.files()

        await eventually("the database wins", won)

        async def closed() -> bool:
            return await drifted() == []

        await eventually("no drift is left", closed)
    finally:
        agent.kill()


async def test_an_optimistic_event_shows_at_once_and_is_undone_unless_confirmed(
    project: Project, tmp_path: Path
) -> None:
    agent = await project.session(tmp_path / "machine", OPTIMISTIC_EVENTS="on")
    agent.start()
    try:
        await agent.equal()
        await live(agent)
        for path, content in (
            ("src/a.ts", "typed\n"),
            ("src/new.ts", "typed\n"),
            ("src/deep/b.ts", "kept\n"),
        ):
            await project.broadcast(
                "file:update", {"file_path": path, "content": content, "sender": "editor"}
            )

        async def shown() -> bool:
            here = agent.files()
            return (
                here["src/a.ts"] == b"typed\n" and "src/new.ts" in here and here["src/deep/b.ts"] == b"kept\n"
            )

        await eventually("the optimistic writes are on disk", shown)
        await project.save("src/deep/b.ts", "kept\n")
        report = await agent.equal()
        assert agent.files()["src/deep/b.ts"] == b"kept\n"
        assert report["link"]["state"] == "live"
    finally:
        agent.kill()


async def test_by_default_an_event_without_revision_only_rings(agent: Agent, project: Project) -> None:
    await project.broadcast("file:update", {"file_path": "src/a.ts", "content": "not the database's word\n"})
    await project.save("src/after.ts", "after\n")
    await agent.equal()
    metrics = await agent.metrics()
    assert 'preview_agent_events_total{event="file:update",outcome="unrevisioned"} 1.0' in metrics


async def test_a_link_that_is_deaf_without_a_sign_is_replaced(agent: Agent, project: Project) -> None:
    """Joined, heartbeats answered, and no event ever comes: what a restarted replication slot leaves behind."""
    before = await agent.status()
    assert before is not None
    await project.faults(drop=1_000_000)
    for n in range(4):
        await project.save("src/a.ts", f"said to the deaf {n}\n")
        await agent.equal()

    async def replaced() -> bool:
        report = await agent.status()
        return report is not None and report["link"]["sockets"] > before["link"]["sockets"]

    await eventually("a new socket", replaced)


async def test_a_snapshot_that_empties_the_tree_halts_until_another_build_says_the_same(
    agent: Agent, project: Project
) -> None:
    """A restored database that holds one other file is believed, but only when it says so twice."""
    many = {f"many/{n}.ts": f"{n}\n" for n in range(20)}
    await project.bulk(many)
    await agent.equal()
    await project.faults(drop=1_000_000)
    async with await psycopg.AsyncConnection.connect(project.plane.dsn, autocommit=True) as connection:
        await connection.execute(
            "update public.project_heads set epoch = gen_random_uuid() where project_id = %s", (project.id,)
        )
    await project.bulk({**dict.fromkeys(many), **dict.fromkeys(FILES), "only.txt": "the only one\n"})

    async def halted() -> bool:
        report = await agent.status()
        return report is not None and report["state"] == "halted"

    await eventually("the brake is on", halted)
    there = len(agent.files())
    # The second build may be there by the time all have been counted, and then it may have been believed already.
    assert there == len(many) + len(FILES) or not await halted()
    report = await agent.equal()
    assert [each["kind"] for each in report["problems"]] == ["nothing_to_serve"], "it has no dev server"


async def test_the_newer_machine_of_a_session_wins(agent: Agent, project: Project) -> None:
    answer = await project.plane.http.post(
        "/v1/sessions",
        json={"project_id": str(project.id), "generation": 2},
        headers={"Idempotency-Key": agent.key},
    )
    assert answer.is_success, answer.text
    assert answer.json()["session_id"] == str(agent.session_id)
    assert agent.process is not None
    assert await asyncio.to_thread(agent.process.wait, 20) == 0, agent.log()[-2000:]


async def test_the_end_of_a_session_ends_its_agent(agent: Agent, project: Project) -> None:
    answer = await project.plane.http.delete(f"/v1/sessions/{agent.session_id}")
    assert answer.is_success, answer.text
    assert agent.process is not None
    assert await asyncio.to_thread(agent.process.wait, 20) in (0, 70), agent.log()[-2000:]


async def test_content_that_does_not_match_its_hash_never_reaches_the_disk(
    agent: Agent, project: Project
) -> None:
    report = await agent.equal()
    lie = {
        "file_path": "src/a.ts", "content": "a lie\n", "content_hash": "0" * 64, "version": 2,
        "revision": report["revision"] + 1, "epoch": report["epoch"], "timestamp": "2026-11-20T09:00:00Z",
    }  # fmt: skip
    await project.broadcast("file:update", lie)

    async def asked() -> bool:
        return 'preview_agent_resyncs_total{reason="hash_mismatch"} 1.0' in await agent.metrics()

    await eventually("the database is asked", asked)
    assert (await agent.equal())["revision"] == report["revision"]
    await project.save("src/a.ts", "the truth\n")
    await agent.equal()


async def test_hostile_paths_in_an_event_are_refused_and_the_rest_lands(
    agent: Agent, project: Project
) -> None:
    report = await agent.equal()
    outside = agent.tree.parent / "escaped"
    files = [
        {"action": "update", "file_path": path, "content": "x", "version": 1}
        for path in (
            "../escaped",
            "/etc/escaped",
            "a/../../escaped",
            "node_modules/x",
            ".git/config",
            "a\\b",
            "a\u0000b",
        )
    ]
    await project.broadcast(
        "bulk:apply",
        {"files": [f for f in files if "\0" not in str(f["file_path"])], "revision": report["revision"] + 1,
         "epoch": report["epoch"], "timestamp": "2026-11-20T09:00:00Z"},
    )  # fmt: skip

    async def shown() -> bool:
        now = await agent.status()
        return now is not None and sum(p["kind"] == "path_refused" for p in now["problems"]) == len(files) - 1

    await eventually("every refusal is shown", shown)
    assert not outside.exists()
    assert not (agent.tree / "node_modules").exists()
    await project.save("src/a.ts", "goes on\n")
    await agent.equal()


async def test_a_snapshot_offered_at_any_time_is_a_question(agent: Agent, project: Project) -> None:
    before = {path: path.stat().st_mtime_ns for path in files_below(agent.tree)}
    offer = {
        "snapshot_url": "http://127.0.0.1:9/x.zip",
        "manifest": None,
        "timestamp": "2026-11-20T09:00:00Z",
    }
    await project.broadcast("snapshot:ready", offer)

    async def asked() -> bool:
        return 'preview_agent_resyncs_total{reason="snapshot_ready"} 1.0' in await agent.metrics()

    await eventually("the database is asked", asked)
    await agent.equal()
    assert {path: path.stat().st_mtime_ns for path in files_below(agent.tree)} == before


async def test_without_a_session_api_offered_snapshots_are_the_way_to_catch_up(
    project: Project, tmp_path: Path
) -> None:
    agent = await project.session(tmp_path / "machine", SESSION_API_URL="")
    agent.start()
    try:
        await agent.equal()
        await live(agent)
        assert str((await agent.status() or {})["session_api"]).startswith("absent")
        await project.faults(drop=1)
        await project.save("src/a.ts", "missed\n")
        answer = await project.plane.http.post(f"/v1/sessions/{agent.session_id}/snapshot", json={})
        offer = {
            "snapshot_url": answer.json()["snapshot_url"],
            "manifest": None,
            "timestamp": "2026-11-20T09:00:00Z",
        }
        await project.broadcast("snapshot:ready", offer)
        await agent.equal()
    finally:
        agent.kill()
