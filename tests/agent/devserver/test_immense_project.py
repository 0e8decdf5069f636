"""Projects whose package.json files are immense, many or deep: reading them is bounded, and is not the event loop's."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.project import reading
from agent.project.choice import NothingToServe, ProjectUnreadable, choose
from agent.project.reading import MOST_PACKAGE_BYTES, dependencies
from tests.agent.built import built, settings
from tests.agent.devserver.installs import write
from tests.agent.loops import STALL, longest_turn
from tests.agent.processes import until

BIG = 64 * 2**20
MEMORY = 8 * MOST_PACKAGE_BYTES
"""Bytes that reading may take at most, for a moment: JSON as Python's objects."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Takes at most so many seconds of processor time, and `MEMORY`."""
    tracemalloc.start()
    began = time.process_time()
    try:
        yield
        took, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert took < seconds
    assert peak < MEMORY


def test_an_immense_package_json_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "package.json").write_bytes(b'{"a": [' + b"[],\n" * (BIG // 4 - 100) + b"[]]}")
    with bounded(0.5), pytest.raises(ProjectUnreadable, match="too large"):
        dependencies(tmp_path)


def holes(package: Path) -> None:
    package.touch()
    os.truncate(package, BIG)


def full(package: Path) -> None:
    package.write_bytes(b'{"name": "' + b"x" * 1_000_000 + b'"}')


@pytest.mark.parametrize("make", [holes, full])
def test_many_immense_packages_of_a_workspace_are_read_up_to_a_bound(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    write(tmp_path, workspaces=["packages/*"])
    for number in range(200):
        (tmp_path / "packages" / f"p{number}").mkdir(parents=True)
        make(tmp_path / "packages" / f"p{number}" / "package.json")
    with bounded(5.0):  # of processor time under tracemalloc; 1,000 holes took minutes
        first = dependencies(tmp_path)
    assert first == dependencies(tmp_path)


def test_the_walk_for_packages_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, workspaces=["**"])
    for number in range(60):
        (tmp_path / f"d{number:02}").mkdir()
    (tmp_path / "d00" / "package.json").write_text('{"name": "first"}')
    (tmp_path / "d59" / "package.json").write_text('{"name": "last"}')
    monkeypatch.setattr(reading, "MOST_WALKED", 50)
    assert reading._packages(tmp_path).keys() == {"d00"}


def test_a_directory_full_of_directories_is_asked_in_no_time(tmp_path: Path) -> None:
    for number in range(8_000):
        (tmp_path / f"d{number}").mkdir()

    async def ask() -> None:
        with pytest.raises(NothingToServe):
            choose(tmp_path)

    assert longest_turn(ask) < STALL


def test_immense_packages_below_are_chosen_from_in_no_time(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}" / "package.json").write_bytes(b'{"a": [' + b"[],\n" * 250_000 + b"[]]}")

    async def ask() -> None:
        with pytest.raises((NothingToServe, ProjectUnreadable)):
            choose(tmp_path)

    assert longest_turn(ask) < STALL


def test_the_event_loop_reads_no_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB of a lock file are read and hashed; the loop has its turns meanwhile."""
    read_by: set[int] = set()
    real = reading.read_small

    def read(path: Path, most: int) -> bytes | None:
        if path.name == "package-lock.json":
            read_by.add(threading.get_ident())
        return real(path, most)

    monkeypatch.setattr(reading, "read_small", read)
    place = tmp_path / "project"
    write(place, scripts={"dev": "exit 1"}, dependencies={"a": "1"})
    (place / "package-lock.json").touch()
    os.truncate(place / "package-lock.json", BIG)
    read_by.clear()

    async def start() -> None:
        async with built(settings(tmp_path, INSTALL_COMMAND="false")) as agent:
            agent.supervisor.project_ready()
            task = asyncio.create_task(agent.supervisor.run())
            await until(lambda: agent.supervisor.problems())
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    assert longest_turn(start) < STALL
    assert read_by
    assert threading.get_ident() not in read_by
