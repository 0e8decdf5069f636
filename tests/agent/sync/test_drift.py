"""Drift: what something else does to our files is seen, what we do ourselves is not."""

from __future__ import annotations

import asyncio
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from immutables import Map

from agent.core.model import RelPath
from agent.fs.project_dir import ProjectDir
from agent.sync import drift
from agent.sync.drift import DriftWatch, Observed
from tests.agent.disks import Agent, remove, write
from tests.trees import open_here

DEADLINE = 60.0
"""Seconds until a condition counts as never coming; far above the 0.2 s that seeing takes."""


@pytest.fixture(autouse=True)
def no_burst_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst ends sooner: each test waits for several."""
    monkeypatch.setattr(drift, "STEP_MS", 20)
    monkeypatch.setattr(drift, "LONGEST_MS", 50)


class Watched:
    """A project with a running watch, and all that it reported."""

    def __init__(self, root: Path, agent: Agent) -> None:
        self.root = root
        self.agent = agent
        self.reports: list[Observed] = []
        self.watch = DriftWatch(agent.disk, lambda: (Map(agent.tree), agent.known), self.reports.append)

    @property
    def open(self) -> dict[str, str]:
        return {path: drift.rule for path, drift in self.watch.open.items()}

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE):
            while not condition():
                await asyncio.sleep(0.01)

    async def until_seen(self) -> None:
        """Until everything done so far has been looked at: a change made last is seen last, in a directory watched."""
        mark = self.root / "mark"
        mark.write_text(str(os.urandom(8)))
        await self.until(lambda: self.open.get("mark") == "changed")
        mark.write_text("mark")
        await self.until(lambda: "mark" not in self.open)


@asynccontextmanager
async def watching(tmp_path: Path, files: dict[str, str]) -> AsyncIterator[Watched]:
    disk = ProjectDir(tmp_path / "project", tmp_path / "staging")
    disk.open()
    agent = Agent(disk)
    agent.put({**files, "mark": "mark"})
    watched = Watched(tmp_path / "project", agent)
    task = asyncio.create_task(watched.watch.run())
    try:
        await watched.until_seen()
        watched.reports.clear()
        yield watched
        assert not task.done(), task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        disk.close()


def reported(watched: Watched) -> set[str]:
    return {str(d.path) for seen in watched.reports for d in seen.drifts} - {"mark"}


async def test_our_own_writes_are_never_drift(tmp_path: Path) -> None:
    async with watching(tmp_path, {"src/a": "0", "src/b": "0"}) as watched:
        for n in range(200):
            watched.agent.apply(write("src/a", f"{n}"), write(f"src/new{n % 20}/f", f"{n}"))
            watched.agent.apply(remove("src/b") if n % 2 else write("src/b", f"{n}"))
            if n % 10 == 0:
                await asyncio.sleep(0.02)
        await watched.until_seen()
        assert reported(watched) == set()
        assert all(not seen.touched.keys() - {"mark"} for seen in watched.reports)


async def test_changed_missing_and_replaced_files_are_reported_and_settle(tmp_path: Path) -> None:
    async with watching(tmp_path, {"a": "1", "src/b": "2", "src/deep/c": "3"}) as watched:
        (watched.root / "a").write_text("theirs")
        (watched.root / "src/b").unlink()
        (watched.root / "src/deep/c").unlink()
        (watched.root / "src/deep/c").symlink_to("../b")
        await watched.until(
            lambda: watched.open == {"a": "changed", "src/b": "missing", "src/deep/c": "not_a_file"}
        )

        watched.agent.apply(write("a", "ours again", version=2))
        (watched.root / "src/b").write_text("2")
        (watched.root / "src/deep/c").unlink()
        watched.agent.apply(remove("src/deep/c"))
        await watched.until(lambda: watched.open == {})
        settled = {path for seen in watched.reports for path in seen.settled}
        assert settled >= {"a", "src/b", "src/deep/c"}


async def test_a_directory_moved_away_takes_its_files_with_it(tmp_path: Path) -> None:
    async with watching(tmp_path, {"src/a": "1", "src/deep/b": "2", "other": "3"}) as watched:
        (watched.root / "src").rename(watched.root / "moved")
        await watched.until(lambda: watched.open == {"src/a": "missing", "src/deep/b": "missing"})
        (watched.root / "moved").rename(watched.root / "src")
        await watched.until(lambda: watched.open == {})
        (watched.root / "src/deep/b").write_text("x")
        await watched.until(lambda: watched.open == {"src/deep/b": "changed"})
        shutil.rmtree(watched.root / "src")
        await watched.until(lambda: watched.open == {"src/a": "missing", "src/deep/b": "missing"})


async def test_a_root_that_is_replaced_is_watched_again(tmp_path: Path) -> None:
    async with watching(tmp_path, {"a": "1", "src/b": "2"}) as watched:
        watched.root.rename(tmp_path / "elsewhere")
        (watched.root / "src").mkdir(parents=True)
        for path in ("mark", "src/b"):
            (watched.root / path).write_text((tmp_path / "elsewhere" / path).read_text())
        await watched.until(lambda: watched.open == {"a": "missing"})
        (watched.root / "src/b").write_text("theirs")
        await watched.until(lambda: watched.open == {"a": "missing", "src/b": "changed"})


async def test_directories_that_come_later_are_watched_too(tmp_path: Path) -> None:
    async with watching(tmp_path, {"a": "1"}) as watched:
        watched.agent.apply(write("new/deep/er/f", "1"))
        await watched.until_seen()
        (watched.root / "new/deep/er/f").write_text("theirs")
        await watched.until(lambda: watched.open == {"new/deep/er/f": "changed"})


async def test_a_touched_file_is_no_drift_but_its_look_is_told(tmp_path: Path) -> None:
    async with watching(tmp_path, {"a": "1"}) as watched:
        os.utime(watched.root / "a")
        await watched.until(lambda: any("a" in seen.touched for seen in watched.reports))
        assert reported(watched) == set()
        look = next(seen.touched[RelPath("a")] for seen in watched.reports if "a" in seen.touched)
        assert look == watched.agent.disk.stat(RelPath("a"))


async def test_what_is_not_ours_is_not_looked_at(tmp_path: Path) -> None:
    async with watching(tmp_path, {"src/a": "1"}) as watched:
        for name in ("node_modules/vite", "dist", ".git", "src/node_modules/.vite"):
            (watched.root / name).mkdir(parents=True)
            (watched.root / name / "file.js").write_text("x")
        (watched.root / "package-lock.json").write_text("{}")
        (watched.root / "src/generated.ts").write_text("x")
        await watched.until_seen()
        assert reported(watched) == set()


async def test_the_watch_spends_one_watch_a_directory_of_ours(tmp_path: Path) -> None:
    """The kernel's own account: `inotify wd:` lines of this process's descriptors."""

    def watches() -> int:
        count = 0
        for info in Path("/proc/self/fdinfo").iterdir():
            try:
                count += info.read_text().count("inotify wd:")
            except OSError:
                continue
        return count

    if not Path("/proc/self/fdinfo").is_dir():
        pytest.skip("no /proc to count watches in")
    before = watches()
    async with watching(tmp_path, {"src/a": "1", "src/pages/b": "2"}) as watched:
        for n in range(50):
            (watched.root / f"node_modules/package{n}/lib").mkdir(parents=True)
        await watched.until_seen()
        assert watches() - before == 3


async def test_without_watches_it_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr("agent.sync.drift.RustNotify", refuse)
    disk = ProjectDir(tmp_path / "project", tmp_path / "staging")
    disk.open()
    agent = Agent(disk)
    agent.put({"a": "1"})
    seen: list[Observed] = []
    watch = DriftWatch(disk, lambda: (Map(agent.tree), agent.known), seen.append, sweep_seconds=0.1)
    task = asyncio.create_task(watch.run())
    (tmp_path / "project/a").write_text("theirs")
    async with asyncio.timeout(DEADLINE):
        while not watch.open:
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    disk.close()


async def test_being_cancelled_leaves_no_thread(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    async with watching(tmp_path, {"a": "1"}):
        pass
    loop = asyncio.get_running_loop()
    await loop.shutdown_default_executor()
    assert not [t for t in threading.enumerate() if "asyncio" in t.name and t not in before]


# --- names that are not UTF-8, made by anything in the project

LATIN = b"caf\xe9"


def make_file(place: bytes) -> None:
    Path(os.fsdecode(place)).write_bytes(b"x")


def make_by_rename(place: bytes) -> None:
    Path(os.fsdecode(place) + ".part").write_bytes(b"x")
    os.rename(place + b".part", place)


def make_link(place: bytes) -> None:
    os.symlink(b"nowhere", place)


@pytest.fixture
def renewed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest between two renewals is for the processor's sake alone."""
    monkeypatch.setattr("agent.sync.drift.RENEW_SECONDS", 0.02)


@pytest.mark.parametrize("make", [make_file, os.mkdir, make_by_rename, make_link])
@pytest.mark.parametrize("below", [b"", b"src/"])
@pytest.mark.usefixtures("renewed_at_once")
async def test_a_name_that_is_not_utf_8_does_not_end_the_watch(
    tmp_path: Path, below: bytes, make: Callable[[bytes], None]
) -> None:
    async with watching(tmp_path, {"src/a": "1"}) as watched:
        for number in (1, 2):
            (watched.root / "src/a").write_text(f"changed in the same moment {number}")
            make(os.fsencode(watched.root) + b"/" + below + LATIN + b"%d" % number)
            await watched.until(lambda number=number: watched.watch.renewals >= number)  # type: ignore[misc]
            await watched.until(lambda: watched.open == {"src/a": "changed"})
            (watched.root / "src/a").write_text("1")
            await watched.until(lambda: watched.open == {})
        assert reported(watched) == {"src/a"}


async def test_names_that_are_not_utf_8_without_end_do_not_hide_what_changes(tmp_path: Path) -> None:
    """A program that writes such a file again and again; the watch is made again and again, and none stays open."""
    async with watching(tmp_path, {"src/a": "1"}) as watched:
        done = threading.Event()

        def write() -> None:
            while not done.wait(0.005):
                make_file(os.fsencode(watched.root) + b"/src/" + LATIN)

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for number in range(3):
                before = watched.watch.renewals
                (watched.root / "src/a").write_text(f"theirs {number}")
                await watched.until(lambda: watched.open == {"src/a": "changed"})
                (watched.root / "src/a").write_text("1")
                await watched.until(lambda: watched.open == {})
                await watched.until(lambda before=before: watched.watch.renewals > before)  # type: ignore[misc]
        finally:
            done.set()
            writer.join()
        await watched.until_seen()
        assert open_here().count("anon_inode:inotify") == 1
