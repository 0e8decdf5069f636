"""SYNC_MODE=shadow beside a flow that keeps the live directory: what differs is found, nothing is touched."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from watchfiles._rust_notify import RustNotify

from tests.system.plane import Agent, Project, eventually, running_plane
from tests.system.stack import REPOSITORY
from tests.trees import contents_below

pytestmark = pytest.mark.system

FILES = {"src/a.ts": "a\n", "src/deep/b.ts": "b\n", "readme.md": "# hello\n"}
SETTLE = "1"
"""Seconds; the other flow polls every 0.2 and takes 0.05 for a file."""


@contextlib.contextmanager
def legacy_writer(live: Path, project: Project) -> Iterator[subprocess.Popen[bytes]]:
    live.mkdir(parents=True, exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.system.legacy_writer", str(live), project.plane.url,
         project.plane.keys.service_key, str(project.id), "0.2"],
        cwd=REPOSITORY,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def looks(root: Path) -> dict[str, tuple[int, ...]]:
    """How everything below `root` looks: any write, rename, chmod, link or new name moves one of these."""
    found = {}
    for path in [root, *root.rglob("*")]:
        seen = os.lstat(path)
        found[str(path.relative_to(root))] = (
            seen.st_ino, seen.st_mode, seen.st_nlink, seen.st_uid, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns,
        )  # fmt: skip
    return found


@contextlib.contextmanager
def inotify(root: Path) -> Iterator[list[Any]]:
    """What the kernel says changed below `root`, names and contents and attributes."""
    told: list[Any] = []
    stop = threading.Event()
    notify = RustNotify([str(root)], False, False, 0, True, False)

    def listen() -> None:
        while isinstance(found := notify.watch(100, 50, 0, stop), set):
            told.extend(found)

    with notify:
        thread = threading.Thread(target=listen)
        thread.start()
        try:
            yield told
        finally:
            stop.set()
            thread.join()


async def report(agent: Agent) -> dict[str, Any]:
    status = await agent.status()
    return status["shadow"] if status and status["shadow"] else {}


async def until_equal(agent: Agent, looks_from: int = 0) -> dict[str, Any]:
    async def equal() -> dict[str, Any] | None:
        seen = await report(agent)
        same = seen and seen["equal_since"] and not seen["unsettled"] and seen["looks"] > looks_from
        return seen if same else None

    found: dict[str, Any] = await eventually("both directories are equal", equal, 30)
    return found


async def shadowing(project: Project, directory: Path) -> Agent:
    return await project.session(
        directory,
        SHADOW_SETTLE_SECONDS=SETTLE,
        PROJECT_DIR=str(directory / "live"),
        STATE_DIR=str(directory / "state"),
    )


async def test_a_difference_is_found_and_cleared(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path, sync_mode="shadow") as plane:
        project = await plane.project({**FILES, "package.json": '{"scripts": {"dev": "vite"}}'})
        agent = await shadowing(project, tmp_path / "machine")
        live, shadow = agent.tree, tmp_path / "machine" / ".preview-shadow"
        with legacy_writer(live, project):
            (live / "node_modules/left-pad").mkdir(parents=True)
            (live / "node_modules/left-pad/index.js").write_text("not ours\n")
            (live / "dist").mkdir()
            (live / "dist/bundle.js").write_text("built\n")
            agent.start()
            try:
                first = await until_equal(agent)
                assert first["files"] == 4
                # Saved over and over: in flight in the other flow most of the time, and never a difference.
                for number in range(10):
                    await project.save("src/a.ts", f"{number}\n" * 50)
                    await asyncio.sleep(0.15)
                await until_equal(agent, (await report(agent))["looks"])
                # On a machine that held the other flow up for longer, a difference is what it was.
                if longest_round(live) * 2 < float(SETTLE):
                    assert "shadow_difference" not in agent.log()
                assert agent.environ["SYNC_MODE"] == "shadow", "the orchestrator hands it to its machines"

                # The other flow loses a save, a new file and a deletion; and somebody adds a file by hand.
                (live.parent / ".broken").write_text("src/a.ts src/new.ts readme.md")
                (live / "by-hand.ts").write_text("who wrote this?\n")
                await project.save("src/a.ts", "lost\n")
                await project.save("src/new.ts", "never written\n")
                await project.delete("readme.md")

                async def found() -> dict[str, Any] | None:
                    seen = await report(agent)
                    return seen if sum(seen["differences"].values()) == 4 else None

                seen = await eventually("the four differences stand", found, 30)
                assert {each["file_path"]: each["rule"] for each in seen["paths"]} == {
                    "src/a.ts": "differs", "src/new.ts": "missing", "readme.md": "extra", "by-hand.ts": "extra",
                }  # fmt: skip
                assert seen["equal_since"] is None
                status = await agent.status()
                assert status is not None
                assert (status["state"], status["ready"], status["dev_server"]["state"]) == (
                    "serving",
                    True,
                    "absent",
                )
                assert {p["file_path"] for p in status["problems"]} == {
                    each["file_path"] for each in seen["paths"]
                }
                metrics = await agent.metrics()
                assert 'preview_agent_shadow_differences{rule="extra"} 2.0' in metrics
                assert 'preview_agent_problems{kind="shadow_difference"} 4.0' in metrics
                shown = await asyncio.to_thread(
                    subprocess.run,
                    [sys.executable, "-m", "agent", "status", "--url", f"http://127.0.0.1:{agent.port}"],
                    capture_output=True, text=True, check=False, cwd=REPOSITORY,
                )  # fmt: skip
                assert shown.returncode == 0, shown.stderr
                assert "1 differs, 1 missing, 2 extra" in shown.stdout
                assert "shadow_difference, 4 times" in shown.stdout

                (live.parent / ".broken").unlink()
                (live / "by-hand.ts").unlink()
                await until_equal(agent, seen["looks"])
                after = await agent.status()
                assert after is not None
                assert after["problems"] == []
                lines = [json.loads(line) for line in agent.log().splitlines() if line.startswith("{")]
                paths = {each["file_path"] for each in seen["paths"]}
                for event in ("problem.opened", "problem.closed"):
                    assert paths <= {e["file_path"] for e in lines if e["event"] == event}
                counted = [e for e in lines if e["event"] == "shadow.compared"]
                assert (counted[0]["missing"], counted[-1]["differs"]) == (0, 0)
                assert set(contents_below(shadow)) == set(await project.files())
                assert not (tmp_path / "machine" / ".preview-modules").exists()
            finally:
                assert await agent.stop() == 0, agent.log()[-3000:]


async def test_the_live_directory_is_not_touched(database: str, tmp_path: Path) -> None:
    """Through a start, saves, a bulk, deletions, a SIGKILL, a resumed life and a stop: not one look changes."""
    async with running_plane(database, tmp_path, sync_mode="shadow") as plane:
        project = await plane.project(FILES)
        agent = await shadowing(project, tmp_path / "machine")
        live = agent.tree
        with legacy_writer(live, project):
            await eventually("the other flow has written", lambda: same(live), 30)
        (live / "node_modules").mkdir()
        (live / "link.ts").symlink_to("src/a.ts")
        before = looks(live)
        with inotify(live) as told:
            agent.start()
            await until_equal(agent)
            await project.save("src/a.ts", "another\n")
            await project.bulk({"src/deep/b.ts": None, "src/c.ts": "c\n", "new/d.ts": "d\n"})
            shadow = tmp_path / "machine" / ".preview-shadow"
            await eventually("the shadow follows", lambda: followed(shadow, project), 30)

            async def stands() -> bool:
                return sum((await report(agent))["differences"].values()) == 4

            await eventually("the differences stand", stands, 30)
            agent.kill()
            agent.start()
            await eventually("a resumed life finds them too", stands_in(agent), 30)
            assert await agent.stop() == 0, agent.log()[-3000:]
            assert '"mode":"resume"' in agent.log().replace(" ", "") or "hydrate.resumed" in agent.log()
            assert told == []
            assert looks(live) == before
            (live / "src/a.ts").chmod(0o600)
            await eventually("the watch itself was awake", lambda: heard(told))


def longest_round(live: Path) -> float:
    """Seconds between two ends of a round of the other flow: half of what a save can take there."""
    ends = [float(line) for line in (live.parent / ".rounds").read_text().splitlines()]
    return max((later - before for before, later in itertools.pairwise(ends)), default=0.0)


async def heard(told: list[Any]) -> bool:
    return bool(told)


async def same(live: Path) -> bool:
    return all((live / p).exists() and (live / p).read_text() == text for p, text in FILES.items())


async def followed(shadow: Path, project: Project) -> bool:
    return contents_below(shadow) == await project.files()


def stands_in(agent: Agent) -> Any:
    async def stands() -> bool:
        seen = await report(agent)
        return bool(seen) and sum(seen["differences"].values()) == 4

    return stands


async def test_after_the_switch_nothing_of_the_other_flow_s_is_removed(database: str, tmp_path: Path) -> None:
    """The rollout's next step: the same machine, SYNC_MODE=live. Equal files stay as they are, foreign ones stay."""
    async with running_plane(database, tmp_path, sync_mode="shadow") as plane:
        project = await plane.project(FILES)
        agent = await shadowing(project, tmp_path / "machine")
        live = agent.tree
        with legacy_writer(live, project):
            agent.start()
            await until_equal(agent)
            assert await agent.stop() == 0
        (live / "by-hand.ts").write_text("somebody's\n")
        inodes = {name: seen[0] for name, seen in looks(live).items()}
        agent.environ["SYNC_MODE"] = "live"
        await project.save("src/a.ts", "after the switch\n")
        agent.start()
        try:

            async def followed_live() -> bool:
                return (live / "src/a.ts").read_text() == "after the switch\n"

            await eventually("the live directory is followed", followed_live, 30)
            now = {name: seen[0] for name, seen in looks(live).items()}
            assert now.pop("src/a.ts") != inodes.pop("src/a.ts")
            assert now == inodes
            assert (live / "by-hand.ts").read_text() == "somebody's\n"
        finally:
            assert await agent.stop() == 0
        # And back: the other flow writes again, and the agent looks on.
        (live / "by-hand.ts").unlink()
        agent.environ["SYNC_MODE"] = "shadow"
        with legacy_writer(live, project):
            await project.save("src/b.ts", "on the way back\n")
            agent.start()
            await until_equal(agent)
            assert (live / "src/b.ts").read_text() == "on the way back\n"
            assert await agent.stop() == 0
