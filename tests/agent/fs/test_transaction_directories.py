"""Directories: made and gone with their files, whole when they are new, and in any order of operations."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.model import Operation, RelPath, parents
from agent.fs.project_dir import ProjectDir
from agent.fs.transaction import TransactionResult, in_order
from tests.agent.disks import Agent, in_staging, kinds, remove, seen, staged, write
from tests.profiles import examples


class Renames:
    """The targets of all renames, as Python's audit hooks tell of them."""

    def __init__(self) -> None:
        self.targets: list[str] | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.targets is not None and event == "os.rename":
            self.targets.append(str(arguments[1]))


RENAMES = Renames()


def renames(agent: Agent, *operations: Operation) -> tuple[list[str], TransactionResult]:
    """What was renamed to, in order, while a transaction was done."""
    RENAMES.targets = []
    try:
        result = agent.apply(*operations)
        # What is left of the staged tree is lifted while it is removed, and that is nobody's business.
        return [target for target in RENAMES.targets if not target.startswith("tree-")], result
    finally:
        RENAMES.targets = None


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_new_directory_appears_with_all_that_is_in_it(tmp_path: Path, umask: int) -> None:
    files = {"a.ts": "1", "bin/run": "2", "src/b.ts": "3", "src/c/d/e.ts": "4", "src/c/f.ts": "5"}
    old = os.umask(umask)
    try:
        disk = ProjectDir(tmp_path / "project", tmp_path / "staging", file_mode=0o640, dir_mode=0o750)
        disk.open()
        agent = Agent(disk)
        writes = [staged(disk, path, text, executable=path == "bin/run") for path, text in files.items()]
        targets, result = renames(agent, *writes)
    finally:
        os.umask(old)
    assert sorted(targets) == ["a.ts", "bin", "src"]
    assert kinds(result) == []
    assert [done.operation for done in result.done] == writes
    assert seen(disk.root) == files
    assert disk.scan() == agent.known
    assert set(result.made) == set(disk.made) == {"bin", "src", "src/c", "src/c/d"}
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in disk.root.rglob("*")}
    assert {modes[name] for name in ("bin", "src", "c", "d")} == {0o750}
    assert (modes["run"], modes["e.ts"]) == (0o750, 0o640)
    assert in_staging(tmp_path / "staging") == []
    assert agent.apply(*(remove(path) for path in files)).gone
    assert seen(disk.root) == {}
    disk.close()


def test_what_is_there_already_is_joined_file_by_file(disk: ProjectDir, agent: Agent, root: Path) -> None:
    agent.put({"src/old.ts": "old"})
    (root / "public").mkdir()
    (root / "public/theirs").write_text("foreign")
    writes = [staged(disk, path, "new") for path in ("public/x", "src/new.ts", "src/whole/a", "src/whole/b")]
    targets, result = renames(agent, *writes)
    assert sorted(targets) == ["new.ts", "whole", "x"]
    assert kinds(result) == []
    assert set(result.made) == {"src/whole"}
    assert disk.scan().keys() - agent.known.keys() == {"public/theirs"}


def test_a_directory_of_which_not_all_is_wanted_does_not_appear_whole(
    disk: ProjectDir, agent: Agent, root: Path
) -> None:
    wanted = [staged(disk, "src/a", "1"), staged(disk, "src/c/d", "2"), staged(disk, "lib/e", "3")]
    staged(disk, "src/c/unwanted", "0")
    targets, _ = renames(agent, *wanted, write("lib/f", "4"))
    assert targets == ["a", "d", "lib", "f"]
    assert seen(root) == {"src/a": "1", "src/c/d": "2", "lib/e": "3", "lib/f": "4"}
    assert disk.scan() == agent.known


def test_a_directory_that_was_removed_comes_back_and_is_reported(
    disk: ProjectDir, agent: Agent, root: Path
) -> None:
    agent.put({"src/a": "1", "src/b": "2"})
    shutil.rmtree(root / "src")
    result = agent.apply(*(staged(disk, path, "3") for path in ("src/a", "src/b", "src/c")))
    assert kinds(result) == [("drift", "src/a", "missing"), ("drift", "src/b", "missing")]
    assert seen(root) == {"src/a": "3", "src/b": "3", "src/c": "3"}


def test_a_tree_that_was_left_in_staging_is_cleared(tmp_path: Path) -> None:
    disk = ProjectDir(tmp_path / "project", tmp_path / "staging")
    disk.open()
    staged(disk, "a/b/c", "left by a kill")
    disk.close()
    assert in_staging(tmp_path / "staging") != []
    disk.open()
    assert in_staging(tmp_path / "staging") == []
    staged(disk, "a/b/c", "left by a failure")
    assert disk.clear_staging() == 1
    assert in_staging(tmp_path / "staging") == []
    disk.close()


def test_directories_the_agent_made_go_with_their_last_file(agent: Agent, root: Path) -> None:
    (root / "theirs").mkdir()
    agent.put({"a/b/c/one": "1", "a/b/two": "2", "theirs/three": "3"})

    result = agent.apply(remove("a/b/c/one"))
    assert seen(root) == {"a/b/two": "2", "theirs/three": "3"}
    assert result.gone == ("a/b/c",)

    result = agent.apply(remove("a/b/two"), remove("theirs/three"))
    assert seen(root) == {"theirs/": ""}
    assert set(result.gone) == {"a", "a/b"}


def test_directories_of_an_earlier_life_are_ours_when_the_ledger_says_so(tmp_path: Path) -> None:
    first = ProjectDir(tmp_path / "project", tmp_path / "staging")
    first.open()
    result = first.apply([write("a/b/c", "1")], {})
    first.close()
    second = ProjectDir(tmp_path / "project", tmp_path / "staging")
    second.open(result.made)
    second.apply([remove("a/b/c")], {RelPath("a/b/c"): result.done[0].stat or pytest.fail("no stat")})
    second.close()
    assert seen(tmp_path / "project") == {}


def test_a_directory_with_something_foreign_in_it_stays(agent: Agent, root: Path) -> None:
    agent.put({"a/ours": "1"})
    (root / "a/theirs").write_text("2")
    agent.apply(remove("a/ours"))
    assert seen(root) == {"a/theirs": "2"}


@pytest.mark.parametrize("backwards", [False, True])
def test_a_file_becomes_a_directory_within_one_transaction(agent: Agent, root: Path, backwards: bool) -> None:
    agent.put({"a": "file", "z": "1"})
    operations = [remove("a"), write("a/b/c", "deep"), write("z", "2")]
    result = agent.apply(*(reversed(operations) if backwards else operations))
    assert kinds(result) == []
    assert seen(root) == {"a/b/c": "deep", "z": "2"}


@pytest.mark.parametrize("backwards", [False, True])
def test_a_directory_becomes_a_file_within_one_transaction(agent: Agent, root: Path, backwards: bool) -> None:
    agent.put({"a/b/c": "deep", "a/d": "1", "z": "1"})
    operations = [remove("a/b/c"), remove("a/d"), write("a", "file"), remove("z")]
    result = agent.apply(*(reversed(operations) if backwards else operations))
    assert kinds(result) == []
    assert seen(root) == {"a": "file"}


def test_a_renamed_file_is_there_before_the_old_one_goes(agent: Agent) -> None:
    operations: list[Operation] = [remove("old"), write("new", "x"), write("index", "import new")]
    assert [o.path for o in in_order(operations)] == ["new", "index", "old"]


def test_a_hydration_goes_directory_by_directory_and_answers_in_its_order(agent: Agent, root: Path) -> None:
    operations = [write(f"d{n % 100}/f{n}", str(n)) for n in range(1000)]
    result = agent.apply(*operations)
    assert [done.operation for done in result.done] == operations
    assert agent.disk.scan() == agent.known
    directories = [operation.path.partition("/")[0] for operation in in_order(operations)]
    assert sum(a != b for a, b in pairwise(directories)) == 99

    result = agent.apply(*(remove(operation.path) for operation in operations))
    assert len(result.done) == 1000
    assert len(result.gone) == 100
    assert seen(root) == {}


def test_an_empty_directory_gives_way_to_a_file(agent: Agent, root: Path) -> None:
    (root / "a").mkdir()
    assert kinds(agent.apply(write("a", "file"))) == []
    assert seen(root) == {"a": "file"}


def test_empty_directories_give_way_however_deep_and_come_back_when_the_transaction_does_not_land(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run that was killed made and did not record."""
    (root / "a/b/c").mkdir(parents=True)
    (root / "a/d").mkdir()
    real = os.rename

    def full(source: str, name: str, **at: int) -> None:
        if name == "z":
            raise OSError(errno.ENOSPC, "no space")
        real(source, name, **at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        assert agent.apply(write("a", "file"), write("z", "1")).rolled_back
    assert sorted(str(path.relative_to(root)) for path in root.rglob("*")) == ["a", "a/b", "a/b/c", "a/d"]
    assert kinds(agent.apply(write("a", "file"))) == []
    assert seen(root) == {"a": "file"}


@pytest.mark.parametrize(("old", "new"), [("d/a", "d/A"), ("d/e/a", "d/e/A"), ("d/e/a", "D/e/a")])
def test_a_directory_that_went_and_came_whole_holds_after_a_rollback_what_it_held(
    disk: ProjectDir, agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    agent.put({old: "old"})
    real = os.rename

    def full(source: str, name: str, **at: int) -> None:
        if name == "z":
            raise OSError(errno.ENOSPC, "no space")
        real(source, name, **at)

    operations = [remove(old), staged(disk, new, "new"), write("z", "1")]
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", full)
        assert kinds(agent.apply(*operations)) == [("disk_full", "z", "space")]
    assert seen(root) == {old: "old"}
    assert kinds(agent.apply(*operations)) == []
    assert seen(root) == {new: "new", "z": "1"}


@pytest.mark.parametrize("theirs", ["b/file", "b/node_modules/"])
def test_directories_with_anything_else_in_them_stay_whole(agent: Agent, root: Path, theirs: str) -> None:
    (root / "a/empty").mkdir(parents=True)
    (root / "a/b").mkdir()
    if theirs.endswith("/"):
        (root / "a" / theirs).mkdir()
    else:
        (root / "a" / theirs).symlink_to("nowhere")
    before = sorted(root.rglob("*"))
    assert kinds(agent.apply(write("a", "file"))) == [("path_unusable", "a", "directory_in_the_way")]
    assert sorted(root.rglob("*")) == before


def test_a_root_that_was_removed_is_made_again(agent: Agent, root: Path) -> None:
    agent.put({"src/a": "1", "b": "1"})
    shutil.rmtree(root)
    result = agent.apply(remove("src/a"))
    assert kinds(result) == [("drift", "src/a", "missing")]
    result = agent.apply(write("b", "2"), write("src/c", "3"))
    assert kinds(result) == [("drift", "b", "missing")]
    assert seen(root) == {"b": "2", "src/c": "3"}
    assert set(result.made) == {"src"}


SEGMENTS = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(SEGMENTS, min_size=1, max_size=4).map("/".join)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, str]:
    """What a database can hold: no current path is a directory of another."""
    tree: dict[str, str] = {}
    for path, content in draw(st.dictionaries(PATHS, st.text("xyz", max_size=2), max_size=8)).items():
        if not any(path.startswith(f"{other}/") or other.startswith(f"{path}/") for other in tree):
            tree[path] = content
    return tree


@examples(40, 2_000)
@given(st.lists(trees(), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_from_any_tree_to_any_other_in_one_transaction(wanted: list[dict[str, str]], chance: Random) -> None:
    """In whatever order the operations come, the disk ends at exactly the wanted tree, without a problem or a trace."""
    with tempfile.TemporaryDirectory() as home:
        disk = ProjectDir(Path(home, "project"), Path(home, "staging"))
        disk.open()
        agent = Agent(disk)
        have: dict[str, str] = {}
        for tree in wanted:
            operations: list[Operation] = [remove(path) for path in have if path not in tree]
            for path in tree:
                if have.get(path) == tree[path]:
                    continue
                if chance.random() < 0.3:
                    operations.append(write(path, tree[path]))
                else:
                    operations.append(staged(disk, path, tree[path], nested=chance.random() < 0.8))
            chance.shuffle(operations)
            result = agent.apply(*operations)
            assert kinds(result) == []
            assert [done.operation for done in result.done] == operations
            assert seen(disk.root) == tree
            assert disk.scan() == agent.known
            assert set(disk.made) == {str(p) for path in tree for p in parents(RelPath(path))}
            assert in_staging(Path(home, "staging")) == []
            have = tree
        disk.close()
