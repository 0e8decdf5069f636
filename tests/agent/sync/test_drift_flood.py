"""A program that makes new names beside our files as fast as it can: the loop has its turns, memory stays, and what
happens to our files is seen nevertheless.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from agent.sync import drift
from tests.agent.loops import STALL, longest_turn
from tests.agent.sync.test_drift import watching

FLOOD = """
import itertools, os, sys
os.chdir(sys.argv[1])
for number in itertools.count():
    os.close(os.open(f"flood-of-new-names-{number}", os.O_CREAT | os.O_WRONLY))
    os.unlink(f"flood-of-new-names-{number}")
"""

MEMORY = 40 << 20
"""Bytes that the watch may take meanwhile. Without a bound it is a kilobyte a name."""


@contextmanager
def flood(root: Path) -> Iterator[None]:
    with subprocess.Popen([sys.executable, "-c", FLOOD, str(root)]) as program:
        try:
            yield
            assert program.poll() is None
        finally:
            program.kill()


def test_saves_and_drift_go_on(tmp_path: Path) -> None:
    async def work() -> None:
        async with watching(tmp_path, {f"src/{number}": "x" for number in range(200)}) as watched:
            await watched.until_seen()
            before = psutil.Process().memory_info().rss
            with flood(watched.root):
                await watched.until(lambda: watched.watch.renewals >= 3)
                (watched.root / "src" / "7").write_text("changed")
                await watched.until(lambda: watched.open.get("src/7") == "changed")
                (watched.root / "mark").unlink()  # in the directory that is flooded
                await watched.until(lambda: watched.open.get("mark") == "missing")
            assert psutil.Process().memory_info().rss - before < MEMORY
            (watched.root / "src" / "7").write_text("x")
            await watched.until(lambda: "src/7" not in watched.open)

    assert longest_turn(work) < STALL


def test_as_many_names_as_are_followed_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "MOST_NAMES", 50)
    monkeypatch.setattr(drift, "RENEW_SECONDS", 0.02)

    async def work() -> None:
        async with watching(tmp_path, {"a": "x"}) as watched:
            await watched.until_seen()
            for number in range(20):
                (watched.root / f"{number}").touch()
            await watched.until_seen()
            assert watched.watch.renewals == 0
            for number in range(100):
                (watched.root / f"more-{number}").touch()
            (watched.root / "a").write_text("changed")
            await watched.until(lambda: watched.open.get("a") == "changed")
            await watched.until(lambda: watched.watch.renewals == 1)

    with asyncio.Runner() as runner:
        runner.run(work())
