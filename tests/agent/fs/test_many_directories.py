"""Directories that the project made by the thousand where the agent has to work: the event loop does not pay."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent.core.model import RelPath
from agent.fs import transaction
from agent.fs.directory_changes import MOST_CLEARED
from agent.fs.dirfd import MOST_LISTED, DirectoryCache, is_case_twin
from agent.fs.project_dir import ProjectDir
from tests.agent.disks import Agent, in_staging, kinds, seen, write
from tests.agent.loops import STALL, longest_turn


@pytest.fixture
def staging(root: Path) -> Path:
    return root.parent / "staging"


@pytest.fixture(autouse=True)
def cleared(root: Path, staging: Path) -> Iterator[None]:
    """Nothing is left that `shutil.rmtree` could not remove."""
    yield
    subprocess.run(["rm", "-rf", root, staging], check=True)


IN_THE_WAY = ("path_unusable", "a", "directory_in_the_way")


def nest(at: Path, depth: int, name: str = "d") -> None:
    """Make so many directories, each in the one before; the kernel is never given the whole path."""
    at.mkdir()
    above = os.open(at, os.O_RDONLY)
    for _ in range(depth - 1):
        os.mkdir(name, dir_fd=above)
        below = os.open(name, os.O_RDONLY, dir_fd=above)
        os.close(above)
        above = below
    os.close(above)


def fan(at: Path, count: int) -> None:
    at.mkdir()
    for number in range(count):
        (at / f"{number}").mkdir()


def tree(at: Path, name: str) -> None:
    """Long names: no path of the deeper ones can be asked of the kernel."""
    nest(at, 40, name * 200)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda at: nest(at, 1_000), id="nested"),
        pytest.param(lambda at: fan(at, 1_000), id="side-by-side"),
        pytest.param(lambda at: tree(at, "n"), id="long-names"),
    ],
)
def test_a_save_in_their_place_is_one_problem_and_takes_no_time(
    agent: Agent, root: Path, make: Callable[[Path], None]
) -> None:
    make(root / "a")

    async def save() -> None:
        result = agent.apply(write("a", "1"), write("b", "1"))
        assert kinds(result) == [IN_THE_WAY]

    assert longest_turn(save) < STALL
    assert (root / "a").is_dir()
    assert (root / "b").read_text() == "1"


def test_many_saves_in_their_place_share_one_bound(agent: Agent, root: Path) -> None:
    places = [f"p{number}" for number in range(20)]
    for place in places:
        nest(root / place, 20)

    async def save() -> None:
        result = agent.apply(*(write(place, "1") for place in places))
        assert 0 < len(result.problems) < len(places)

    assert longest_turn(save) < STALL
    assert sum((root / place).is_file() for place in places) == MOST_CLEARED // 20


def test_what_an_earlier_run_left_still_gives_way(agent: Agent, root: Path) -> None:
    """No path of ours is deeper."""
    nest(root / "a", 63)
    assert kinds(agent.apply(write("a", "1"))) == []
    assert seen(root) == {"a": "1"}


def test_one_file_among_many_entries_is_enough_to_know(agent: Agent, root: Path) -> None:
    (root / "a").mkdir()
    for number in range(10_000):
        (root / "a" / f"{number}").touch()

    async def save() -> None:
        assert kinds(agent.apply(*(write("a", "1", version=n) for n in range(1, 2)))) == [IN_THE_WAY]

    assert longest_turn(save) < STALL / 10


def test_a_hard_link_that_poses_as_a_case_twin_costs_one_bounded_listing(root: Path) -> None:
    """`a` and `A` are the same file; whether that is the file system's doing only a listing tells."""
    root.mkdir()
    (root / "A").touch()
    (root / "a").hardlink_to(root / "A")
    for number in range(3 * MOST_LISTED):
        (root / f"{number}").touch()
    directories = DirectoryCache(root, None)
    found = (root / "a").stat()

    async def ask() -> None:
        is_case_twin(directories.open(""), "a", found)

    assert longest_turn(ask) < STALL / 2
    directories.close()


@pytest.mark.parametrize("keep", [False, True], ids=["last", "among-others"])
@pytest.mark.parametrize("known", [False, True], ids=["foreign", "ours"])
def test_a_directory_that_took_a_files_place_this_moment_is_given_back(
    agent: Agent, disk: ProjectDir, root: Path, staging: Path, monkeypatch: pytest.MonkeyPatch,
    keep: bool, known: bool,
) -> None:  # fmt: skip
    """RACE: it came between the stat and the exchange. 1,500 deep, in staging it would be the agent's to remove."""
    if known:
        agent.put({"a": "0"})
    else:
        (root / "a").write_text("0")
    real = transaction.exchange

    def raced(source: str, target: str, **at: int) -> None:
        if target == "a":
            monkeypatch.setattr(transaction, "exchange", real)
            (root / "a").unlink()
            nest(root / "a", 1_100)
        real(source, target, **at)

    monkeypatch.setattr(transaction, "exchange", raced)
    others = [write("b", "1")] if keep else []
    result = agent.apply(write("a", "1", version=2), *others)
    assert [each for each in kinds(result) if each[0] != "drift"] == [IN_THE_WAY]
    assert (root / "a").is_dir()
    assert in_staging(staging) == []
    assert [done.operation.path for done in result.done] == [RelPath("b")] * keep


def test_whatever_is_in_staging_is_removed_however_deep(
    disk: ProjectDir, agent: Agent, staging: Path
) -> None:
    nest(staging / "tree-00000000-0", 1_100)
    nest(staging / "file-00000000-1", 1_100)
    (staging / "theirs").mkdir()
    disk.clear_staging()
    assert in_staging(staging) == ["theirs"]
    (staging / "theirs").rmdir()
