"""Files whose times, inode or size no ledger would expect. Anything in the project can set a file's times."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from agent.core.model import Cursor, RelPath, Tree, digest_of
from agent.fs.inspect import FileStat
from agent.fs.turns import at_once
from agent.sync.drift import DriftWatch, Observed
from agent.sync.ledger import Ledger
from tests.agent.disks import kinds, opened, write
from tests.agent.processes import until
from tests.agent.sync.test_shadow import shadow_of

YEAR_2300 = 10_413_792_000
YEARS = pytest.mark.parametrize(
    "seconds",
    [YEAR_2300, 2**62, -1, -12_000_000_000, -(2**62)],
    ids=["2300", "the last", "1969", "1589", "the first"],
)
"""Seconds of the epoch. Nanoseconds in 64 bits go from 1677 to 2262; tmpfs takes any."""


def touch(path: Path, seconds: int) -> None:
    """`touch -d`, and proof that this file system keeps it."""
    nanoseconds = seconds * 10**9 + 5
    os.utime(path, ns=(nanoseconds, nanoseconds))
    assert path.stat().st_mtime_ns == nanoseconds


@YEARS
async def test_the_watch_takes_any_time(mount: Callable[..., Path], seconds: int) -> None:
    small = mount("size=1m")
    with opened(small / "project", small / "staging") as agent:
        agent.put({"touched": "x", "changed": "x"})
        seen: list[Observed] = []
        watch = DriftWatch(agent.disk, lambda: (Map(agent.tree), agent.known), seen.append)
        task = asyncio.create_task(watch.run())
        touch(small / "project/touched", seconds)
        (small / "project/changed").write_text("y")
        touch(small / "project/changed", seconds)
        await until(lambda: (watch.open and any("touched" in each.touched for each in seen)) or task.done())
        assert not task.done(), task
        assert {path: drift.rule for path, drift in watch.open.items()} == {"changed": "changed"}
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@YEARS
def test_a_start_and_a_transaction_take_any_time(mount: Callable[..., Path], seconds: int) -> None:
    """Also what the ledger keeps of it: a stat that was recorded is the stat that is found again."""
    small = mount("size=1m")
    tree, ledger = small / "project", Ledger(small / "ledger.sqlite")
    with opened(tree, small / "staging") as agent:
        agent.put({"touched": "x", "changed": "x"})
        (tree / "foreign").write_text("y")
        (tree / "changed").write_text("y")
        for each in tree.iterdir():
            touch(each, seconds)
        recorded = Tree(Cursor("e", 1), Map(agent.tree))
        audit = at_once(agent.disk.audit_steps(recorded, agent.known))
        assert [(drift.path, drift.rule) for drift in audit.drifts] == [("changed", "changed")]
        ledger.replace(recorded, audit.stats)
        ledger.close()
        loaded = ledger.load()
        ledger.close()
        assert loaded is not None
        assert loaded.stats == audit.stats
        assert loaded.stats[RelPath("touched")].matches((tree / "touched").stat())
        assert agent.disk.scan().keys() == {"touched", "changed", "foreign"}
        result = agent.apply(write("touched", "new"), write("changed", "new"), write("foreign", "new"))
        assert kinds(result) == [("drift", "changed", "changed"), ("drift", "foreign", "appeared")]
        assert {each.read_text() for each in tree.iterdir()} == {"new"}


@YEARS
def test_shadow_mode_takes_any_time(mount: Callable[..., Path], seconds: int) -> None:
    small = mount("size=1m")
    for name in ("a", "extra"):
        (small / name).write_text("x")
        touch(small / name, seconds)
    shadow = shadow_of(small, {"a": "x"})
    assert shadow.read(shadow.wanted()) == {"a": digest_of(b"x"), "extra": None}


@given(*[st.integers(-(2**80), 2**80)] * 4)
def test_whatever_a_file_system_says_can_be_kept(inode: int, size: int, mtime: int, ctime: int) -> None:
    stat = FileStat(inode, size, mtime, ctime)
    assert FileStat.from_columns(stat.columns) == stat
    assert all(-(2**63) <= column < 2**63 for column in stat.columns)
    assert "FileStat(" in repr(stat)
    assert stat != FileStat(inode, size, mtime + 1, ctime)
    assert stat != FileStat(inode + 1, size, mtime, ctime)
