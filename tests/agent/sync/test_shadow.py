"""Shadow mode's look at somebody else's directory: what it finds, what it reads again, and that it leaves no trace."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from agent.config import read_environment
from agent.core.divergence import Comparison
from agent.core.errors import SettingsError
from agent.core.model import Entry, RelPath, digest_of
from agent.fs.inspect import DirectoryView
from agent.sync import shadow as module
from agent.sync.shadow import MOST_SHOWN, Shadow
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems
from tests.agent.test_config import GOOD, problems


def shadow_of(live: Path, files: dict[str, str], settle: float = 10.0) -> Shadow:
    wanted = {RelPath(path): Entry(1, digest_of(text.encode()), len(text)) for path, text in files.items()}
    return Shadow(DirectoryView(live), Comparison(settle), Problems(Metrics()), lambda: wanted)


def look(shadow: Shadow) -> None:
    shadow.compare(shadow.wanted(), shadow.read(shadow.wanted()))


def put(live: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (live / path).parent.mkdir(parents=True, exist_ok=True)
        (live / path).write_text(text)


def test_what_is_found_and_what_is_never_looked_at(tmp_path: Path) -> None:
    put(tmp_path, {"a.ts": "a", "src/b.ts": "b", "node_modules/x/index.js": "x", ".git/HEAD": "h"})
    (tmp_path / "link.ts").symlink_to("a.ts")
    (tmp_path / "out").symlink_to("/etc")
    os.mkfifo(tmp_path / "pipe")
    shadow = shadow_of(tmp_path, {"a.ts": "a", "link.ts": "a", "node_modules/x/index.js": "x"})
    assert shadow.read(shadow.wanted()) == {"a.ts": digest_of(b"a"), "src/b.ts": None}


def test_a_directory_that_is_not_there_is_every_file_missing(tmp_path: Path) -> None:
    shadow = shadow_of(tmp_path / "nowhere", {"a": "a"}, settle=0.0)
    look(shadow)
    assert shadow.comparison.counts()["missing"] == 1
    assert not (tmp_path / "nowhere").exists()


def test_only_what_looks_different_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, {"a": "a", "b": "b", "c": "c", "extra": "not wanted, so not read"})
    monkeypatch.setattr(module, "RACY_NS", -(2**62))  # the clock is not what this is about
    shadow = shadow_of(tmp_path, {"a": "a", "b": "b", "c": "c"})
    read: list[str] = []
    reading = DirectoryView.digest_steps

    def counted(self: DirectoryView, path: RelPath, size: int):  # type: ignore[no-untyped-def]
        read.append(path)
        return reading(self, path, size)

    monkeypatch.setattr(DirectoryView, "digest_steps", counted)
    shadow.read(shadow.wanted())
    assert sorted(read) == ["a", "b", "c"]
    (tmp_path / "b").write_text("B")
    (tmp_path / "c").unlink()
    read.clear()
    assert shadow.read(shadow.wanted()) == {"a": digest_of(b"a"), "b": digest_of(b"B"), "extra": None}
    assert read == ["b"]


def test_a_file_written_a_moment_ago_is_read_again(tmp_path: Path) -> None:
    """Two writes within the clock's tick look the same: the first one's hash may not be kept."""
    put(tmp_path, {"a": "1"})
    shadow = shadow_of(tmp_path, {"a": "1"})
    before = os.stat(tmp_path / "a")
    assert shadow.read(shadow.wanted()) == {"a": digest_of(b"1")}
    (tmp_path / "a").write_text("2")
    os.utime(tmp_path / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert shadow.read(shadow.wanted()) == {"a": digest_of(b"2")}


def test_differences_are_shown_counted_and_cleared(tmp_path: Path) -> None:
    files = {f"f{number:03}": "x" for number in range(MOST_SHOWN + 30)}
    put(tmp_path, {"f000": "other"})
    shadow = shadow_of(tmp_path, files, settle=0.0)
    look(shadow)
    assert shadow.comparison.counts() == {
        "differs": 1,
        "missing": MOST_SHOWN + 29,
        "extra": 0,
        "unreadable": 0,
    }
    assert len(shadow.problems.open) == MOST_SHOWN
    assert shadow.problems.open["shadow_difference", "f000"].rule == "differs"
    assert shadow.equal_since is None
    samples = [s for metric in shadow.collect() for s in metric.samples]
    assert {s.labels["rule"]: s.value for s in samples if s.labels} == shadow.comparison.counts()
    put(tmp_path, files)
    look(shadow)
    assert shadow.problems.open == {}
    report = shadow.report()
    assert (report["paths"], report["files"], report["looks"]) == ([], MOST_SHOWN + 30, 2)
    assert report["equal_since"] is not None


async def test_a_live_directory_that_fails_is_a_problem_until_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shadow = shadow_of(tmp_path, {})
    with monkeypatch.context() as broken:
        broken.setattr(
            DirectoryView, "scan", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error"))
        )
        await shadow._turn()
    assert [kind for kind, _ in shadow.problems.open] == ["live_unreadable"]
    await shadow._turn()
    assert (shadow.problems.open, shadow.looks) == ({}, 1)


async def test_it_waits_for_the_first_tree_and_ends_at_once(tmp_path: Path) -> None:
    shadow = shadow_of(tmp_path, {})
    task = asyncio.create_task(shadow.run())
    await asyncio.sleep(0)
    assert shadow.looks == 0
    shadow.hydrated()
    async with asyncio.timeout(10):
        while not shadow.looks:
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


def test_nothing_of_ours_may_stand_in_the_live_directory() -> None:
    live = {**GOOD, "PROJECT_DIR": "/srv/app", "SYNC_MODE": "shadow"}
    settings = read_environment(live)
    assert (str(settings.tree_dir), str(settings.staging)) == ("/srv/.preview-shadow", "/srv/.preview-sync")
    assert settings.ledger.name == "shadow.sqlite"
    said = problems(
        {**live, "SHADOW_DIR": "/srv/app/x", "STATE_DIR": "/srv/app/y", "STAGING_DIR": "/srv/app"}
    )
    assert [line.partition(":")[0] for line in said] == ["SHADOW_DIR", "STAGING_DIR", "STATE_DIR"]
    assert len(problems({**live, "SHADOW_DIR": "/srv"})) == 1
    with pytest.raises(SettingsError, match="SYNC_MODE"):
        read_environment({**GOOD, "SYNC_MODE": "shade"})
    # Without the mode the same directories are nobody's business here.
    read_environment({**GOOD, "PROJECT_DIR": "/srv/app", "STATE_DIR": "/srv/app/y"})
