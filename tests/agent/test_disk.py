"""The disk on a healthy machine: what lands, in what order, with what mode, and what is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from agent.disk import Disk, FileStat, Outcome
from agent.errors import RootUnusable
from agent.model import Cursor, Entry, Operation, RelPath, Tree, Write, digest_of, parents
from agent.order import in_order
from tests.agent.disks import Agent, in_staging, kinds, remove, seen, staged, write
from tests.profiles import examples


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "project"


@pytest.fixture
def disk(tmp_path: Path, root: Path) -> Iterator[Disk]:
    disk = Disk(root, tmp_path / "staging")
    disk.open()
    yield disk
    assert not in_staging(tmp_path / "staging"), "a batch left something in staging"
    disk.close()


@pytest.fixture
def agent(disk: Disk) -> Agent:
    return Agent(disk)


def test_a_write_lands_with_its_parents_and_says_how_it_looks(agent: Agent, root: Path) -> None:
    outcome = agent.apply(write("src/pages/Home.tsx", "hello"))

    assert seen(root) == {"src/pages/Home.tsx": "hello"}
    (done,) = outcome.done
    assert done.stat == FileStat.of((root / "src/pages/Home.tsx").lstat())
    assert outcome.problems == ()
    assert not outcome.rolled_back
    assert set(outcome.made) == {"src", "src/pages"}


def test_a_batch_lands_whole_and_answers_in_its_order(agent: Agent, root: Path) -> None:
    agent.put({"a": "1", "b": "2"})

    outcome = agent.apply(remove("a"), write("c", "3"), write("b", "4", version=2))

    assert [done.operation.path for done in outcome.done] == ["a", "c", "b"]
    assert [done.stat is None for done in outcome.done] == [True, False, False]
    assert seen(root) == {"b": "4", "c": "3"}
    assert all(agent.known[RelPath(p)] == FileStat.of((root / p).lstat()) for p in ("b", "c"))


def test_every_rewrite_is_a_new_file_so_an_open_reader_keeps_the_old_one(agent: Agent, root: Path) -> None:
    agent.put({"a": "old"})
    with (root / "a").open() as reader:
        agent.apply(write("a", "new, and longer"))
        assert reader.read() == "old"
    assert (root / "a").read_text() == "new, and longer"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        disk = Disk(tmp_path / "project", tmp_path / "staging", file_mode=0o640, dir_mode=0o750)
        disk.open()
        stage = disk.stage()
        stage.write(b"#!")
        script = stage.finish()
        disk.apply(
            [
                write("src/plain", "x"),
                write("src/run", "x", executable=True),
                Write(RelPath("bin/run"), Entry(1, script.digest, 2, executable=True), staged=script.name),
            ],
            {},
        )
        disk.close()
    finally:
        os.umask(before)

    modes = {
        p: stat.S_IMODE((tmp_path / "project" / p).stat().st_mode) for p in ("src", "src/plain", "src/run")
    }
    assert modes == {"src": 0o750, "src/plain": 0o640, "src/run": 0o750}
    assert stat.S_IMODE((tmp_path / "project/bin/run").stat().st_mode) == 0o750


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_files_and_directories_belong_to_the_configured_owner(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "project", tmp_path / "staging", owner=(12345, 23456))
    disk.open()
    disk.apply([write("src/a", "x"), write("src/b", "y", executable=True)], {})
    disk.apply([write("src/a", "z")], {})
    disk.close()

    for path in ("", "src", "src/a", "src/b"):
        found = (tmp_path / "project" / path).stat()
        assert (found.st_uid, found.st_gid) == (12345, 23456), path
    assert (tmp_path / "staging").stat().st_uid == 0


def test_staged_files_are_promoted(disk: Disk, agent: Agent, root: Path) -> None:
    stage = disk.stage()
    stage.write(b"one ")
    stage.write(b"two")
    whole = stage.finish()

    assert (whole.digest, whole.size) == (digest_of(b"one two"), 7)
    outcome = agent.apply(
        Write(RelPath("d/f"), Entry(1, whole.digest, 7), staged=whole.name), write("g", "x")
    )
    assert seen(root) == {"d/f": "one two", "g": "x"}
    assert outcome.done[0].stat == FileStat.of((root / "d/f").lstat())


def test_an_aborted_stage_leaves_nothing(disk: Disk) -> None:
    for path in (None, RelPath("d/never")):
        stage = disk.stage(path)
        stage.write(b"never")
        stage.abort()
    assert disk.clear_staging() == 1


class Renames:
    """The targets of all renames, as Python's audit hooks tell of them."""

    def __init__(self) -> None:
        self.targets: list[str] | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.targets is not None and event == "os.rename":
            self.targets.append(str(arguments[1]))


RENAMES = Renames()


def renames(agent: Agent, *operations: Operation) -> tuple[list[str], Outcome]:
    """What was renamed to, in order, while a batch was done."""
    RENAMES.targets = []
    try:
        outcome = agent.apply(*operations)
        return RENAMES.targets, outcome
    finally:
        RENAMES.targets = None


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_a_new_directory_appears_with_all_that_is_in_it(tmp_path: Path, umask: int) -> None:
    files = {"a.ts": "1", "bin/run": "2", "src/b.ts": "3", "src/c/d/e.ts": "4", "src/c/f.ts": "5"}
    old = os.umask(umask)
    try:
        disk = Disk(tmp_path / "project", tmp_path / "staging", file_mode=0o640, dir_mode=0o750)
        disk.open()
        agent = Agent(disk)
        writes = [staged(disk, path, text, executable=path == "bin/run") for path, text in files.items()]
        targets, outcome = renames(agent, *writes)
    finally:
        os.umask(old)
    assert sorted(targets) == ["a.ts", "bin", "src"]
    assert kinds(outcome) == []
    assert [done.operation for done in outcome.done] == writes
    assert seen(disk.root) == files
    assert disk.scan() == agent.known
    assert set(outcome.made) == set(disk.made) == {"bin", "src", "src/c", "src/c/d"}
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in disk.root.rglob("*")}
    assert {modes[name] for name in ("bin", "src", "c", "d")} == {0o750}
    assert (modes["run"], modes["e.ts"]) == (0o750, 0o640)
    assert in_staging(tmp_path / "staging") == []
    assert agent.apply(*(remove(path) for path in files)).gone
    assert seen(disk.root) == {}
    disk.close()


def test_what_is_there_already_is_joined_file_by_file(disk: Disk, agent: Agent, root: Path) -> None:
    agent.put({"src/old.ts": "old"})
    (root / "public").mkdir()
    (root / "public/theirs").write_text("foreign")
    writes = [staged(disk, path, "new") for path in ("public/x", "src/new.ts", "src/whole/a", "src/whole/b")]
    targets, outcome = renames(agent, *writes)
    assert sorted(targets) == ["new.ts", "whole", "x"]
    assert kinds(outcome) == []
    assert set(outcome.made) == {"src/whole"}
    assert disk.scan().keys() - agent.known.keys() == {"public/theirs"}


def test_a_directory_of_which_not_all_is_wanted_does_not_appear_whole(
    disk: Disk, agent: Agent, root: Path
) -> None:
    wanted = [staged(disk, "src/a", "1"), staged(disk, "src/c/d", "2"), staged(disk, "lib/e", "3")]
    staged(disk, "src/c/unwanted", "0")
    targets, _ = renames(agent, *wanted, write("lib/f", "4"))
    assert targets == ["a", "d", "lib", "f"]
    assert seen(root) == {"src/a": "1", "src/c/d": "2", "lib/e": "3", "lib/f": "4"}
    assert disk.scan() == agent.known


def test_a_directory_somebody_removed_comes_back_and_is_reported(
    disk: Disk, agent: Agent, root: Path
) -> None:
    agent.put({"src/a": "1", "src/b": "2"})
    shutil.rmtree(root / "src")
    outcome = agent.apply(*(staged(disk, path, "3") for path in ("src/a", "src/b", "src/c")))
    assert kinds(outcome) == [("drift", "src/a", "missing"), ("drift", "src/b", "missing")]
    assert seen(root) == {"src/a": "3", "src/b": "3", "src/c": "3"}


def test_a_tree_that_was_left_in_staging_is_cleared(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "project", tmp_path / "staging")
    disk.open()
    staged(disk, "a/b/c", "left by a kill")
    disk.close()
    disk = Disk(tmp_path / "project", tmp_path / "staging")
    disk.open()
    assert disk.clear_staging() == 1
    assert in_staging(tmp_path / "staging") == []
    disk.close()


def test_a_write_without_bytes_is_the_planners_bug(agent: Agent) -> None:
    with pytest.raises(ValueError, match="neither content nor a staged file"):
        agent.apply(Write(RelPath("a"), Entry(1, digest_of(b""), 0)))


def test_of_several_operations_on_a_path_the_last_counts(agent: Agent, root: Path) -> None:
    outcome = agent.apply(write("a", "1"), write("a", "2"), write("b", "1"), remove("b"))
    assert seen(root) == {"a": "2"}
    assert [done.operation.path for done in outcome.done] == ["a", "b"]


# --- directories


def test_directories_we_made_go_with_their_last_file(agent: Agent, root: Path) -> None:
    (root / "theirs").mkdir()
    agent.put({"a/b/c/one": "1", "a/b/two": "2", "theirs/three": "3"})

    outcome = agent.apply(remove("a/b/c/one"))
    assert seen(root) == {"a/b/two": "2", "theirs/three": "3"}
    assert outcome.gone == ("a/b/c",)

    outcome = agent.apply(remove("a/b/two"), remove("theirs/three"))
    assert seen(root) == {"theirs/": ""}
    assert set(outcome.gone) == {"a", "a/b"}


def test_directories_of_an_earlier_life_are_ours_when_the_ledger_says_so(tmp_path: Path) -> None:
    first = Disk(tmp_path / "project", tmp_path / "staging")
    first.open()
    outcome = first.apply([write("a/b/c", "1")], {})
    first.close()
    second = Disk(tmp_path / "project", tmp_path / "staging")
    second.open(outcome.made)
    second.apply([remove("a/b/c")], {RelPath("a/b/c"): outcome.done[0].stat or pytest.fail("no stat")})
    second.close()
    assert seen(tmp_path / "project") == {}


def test_a_directory_with_something_foreign_in_it_stays(agent: Agent, root: Path) -> None:
    agent.put({"a/ours": "1"})
    (root / "a/theirs").write_text("2")
    agent.apply(remove("a/ours"))
    assert seen(root) == {"a/theirs": "2"}


@pytest.mark.parametrize("backwards", [False, True])
def test_a_file_becomes_a_directory_within_one_batch(agent: Agent, root: Path, backwards: bool) -> None:
    agent.put({"a": "file", "z": "1"})
    operations = [remove("a"), write("a/b/c", "deep"), write("z", "2")]
    outcome = agent.apply(*(reversed(operations) if backwards else operations))
    assert kinds(outcome) == []
    assert seen(root) == {"a/b/c": "deep", "z": "2"}


@pytest.mark.parametrize("backwards", [False, True])
def test_a_directory_becomes_a_file_within_one_batch(agent: Agent, root: Path, backwards: bool) -> None:
    agent.put({"a/b/c": "deep", "a/d": "1", "z": "1"})
    operations = [remove("a/b/c"), remove("a/d"), write("a", "file"), remove("z")]
    outcome = agent.apply(*(reversed(operations) if backwards else operations))
    assert kinds(outcome) == []
    assert seen(root) == {"a": "file"}


def test_a_renamed_file_is_there_before_the_old_one_goes(agent: Agent) -> None:
    operations: list[Operation] = [remove("old"), write("new", "x"), write("index", "import new")]
    assert [o.path for o in in_order(operations)] == ["new", "index", "old"]


def test_a_hydration_goes_directory_by_directory_and_answers_in_its_order(agent: Agent, root: Path) -> None:
    operations = [write(f"d{n % 100}/f{n}", str(n)) for n in range(1000)]
    outcome = agent.apply(*operations)
    assert [done.operation for done in outcome.done] == operations
    assert agent.disk.scan() == agent.known
    directories = [operation.path.partition("/")[0] for operation in in_order(operations)]
    assert sum(a != b for a, b in pairwise(directories)) == 99

    outcome = agent.apply(*(remove(operation.path) for operation in operations))
    assert len(outcome.done) == 1000
    assert len(outcome.gone) == 100
    assert seen(root) == {}


def test_an_empty_directory_gives_way_to_a_file(agent: Agent, root: Path) -> None:
    (root / "a").mkdir()
    assert kinds(agent.apply(write("a", "file"))) == []
    assert seen(root) == {"a": "file"}


def test_empty_directories_give_way_however_deep_and_come_back_when_the_batch_does_not_land(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a life that was killed made and did not record."""
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
    outcome = agent.apply(remove("src/a"))
    assert kinds(outcome) == [("drift", "src/a", "missing")]
    outcome = agent.apply(write("b", "2"), write("src/c", "3"))
    assert kinds(outcome) == [("drift", "b", "missing")]
    assert seen(root) == {"b": "2", "src/c": "3"}
    assert set(outcome.made) == {"src"}


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
def test_from_any_tree_to_any_other_in_one_batch(wanted: list[dict[str, str]], chance: Random) -> None:
    """In whatever order the operations come, the disk ends at exactly the wanted tree, without a problem or a trace."""
    with tempfile.TemporaryDirectory() as home:
        disk = Disk(Path(home, "project"), Path(home, "staging"))
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
            outcome = agent.apply(*operations)
            assert kinds(outcome) == []
            assert [done.operation for done in outcome.done] == operations
            assert seen(disk.root) == tree
            assert disk.scan() == agent.known
            assert set(disk.made) == {str(p) for path in tree for p in parents(RelPath(path))}
            assert in_staging(Path(home, "staging")) == []
            have = tree
        disk.close()


# --- paths that are unusable here


def test_a_file_where_a_directory_is_needed_is_one_problem_and_the_rest_lands(
    agent: Agent, root: Path
) -> None:
    (root / "a").write_text("in the way")
    outcome = agent.apply(write("a/b", "1"), write("c/d", "2"))
    assert kinds(outcome) == [("path_unusable", "a/b", "not_a_directory")]
    assert [done.operation.path for done in outcome.done] == ["c/d"]
    assert not outcome.rolled_back
    assert seen(root) == {"a": "in the way", "c/d": "2"}


def test_a_full_directory_where_a_file_is_needed_stays(agent: Agent, root: Path) -> None:
    (root / "a").mkdir()
    (root / "a/theirs").write_text("2")
    outcome = agent.apply(write("a", "file"), write("b", "1"))
    assert kinds(outcome) == [("path_unusable", "a", "directory_in_the_way")]
    assert seen(root) == {"a/theirs": "2", "b": "1"}


def test_a_name_too_long_for_the_file_system_is_one_problem_and_leaves_no_directory(
    agent: Agent, root: Path
) -> None:
    outcome = agent.apply(write(f"new/{'x' * 300}", "1"), write("b", "1"))
    assert [(p.kind, p.rule) for p in outcome.problems] == [("path_unusable", "name_too_long")]
    assert seen(root) == {"b": "1"}


# --- what something else did to our files


def test_a_file_changed_behind_our_back_is_reported_and_the_database_wins(agent: Agent, root: Path) -> None:
    agent.put({"a": "ours", "b": "ours"})
    (root / "a").write_text("theirs")
    outcome = agent.apply(write("a", "newer"), write("b", "newer"))
    assert kinds(outcome) == [("drift", "a", "changed")]
    assert seen(root) == {"a": "newer", "b": "newer"}


def test_drift_is_kept_when_the_caller_says_so(agent: Agent, root: Path) -> None:
    agent.put({"a": "ours", "b": "ours", "c": "ours", "d": "ours"})
    (root / "a").write_text("theirs")
    (root / "b").write_text("theirs")
    (root / "c").unlink()
    outcome = agent.apply(
        write("a", "new"), remove("b"), write("c", "new"), write("d", "new"), overwrite_drift=False
    )
    assert kinds(outcome) == [("drift", "a", "changed"), ("drift", "c", "missing"), ("drift", "b", "changed")]
    assert [done.operation.path for done in outcome.done] == ["d"]
    assert seen(root) == {"a": "theirs", "b": "theirs", "d": "new"}


def test_a_same_size_change_with_its_time_set_back_is_seen(agent: Agent, root: Path) -> None:
    agent.put({"a": "ours"})
    before = (root / "a").stat()
    (root / "a").write_text("OURS")
    os.utime(root / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kinds(agent.apply(write("a", "newer"))) == [("drift", "a", "changed")]


def test_a_touched_file_is_not_drift(agent: Agent, root: Path) -> None:
    agent.put({"a": "ours"})
    os.utime(root / "a")
    (root / "a").chmod(0o600)
    assert kinds(agent.apply(write("a", "newer"))) == []


def test_a_removed_file_is_reported_and_comes_back(agent: Agent, root: Path) -> None:
    agent.put({"a": "ours", "b": "ours"})
    (root / "a").unlink()
    (root / "b").unlink()
    outcome = agent.apply(write("a", "new"), remove("b"))
    assert kinds(outcome) == [("drift", "a", "missing"), ("drift", "b", "missing")]
    assert len(outcome.done) == 2
    assert seen(root) == {"a": "new"}


def test_a_file_we_did_not_write_is_replaced_but_never_removed(agent: Agent, root: Path) -> None:
    (root / "a").write_text("theirs")
    (root / "b").write_text("theirs")
    outcome = agent.apply(write("a", "new"), remove("b"))
    assert kinds(outcome) == [("drift", "a", "appeared"), ("drift", "b", "appeared")]
    assert seen(root) == {"a": "new", "b": "theirs"}


def test_a_file_that_is_already_right_is_not_written_again(agent: Agent, root: Path) -> None:
    (root / "a").write_text("same")
    before = (root / "a").stat()
    outcome = agent.apply(write("a", "same"), write("b", "new"))
    assert kinds(outcome) == []
    assert outcome.done[0].stat == FileStat.of((root / "a").lstat())
    assert (root / "a").stat().st_ino == before.st_ino
    assert (root / "a").stat().st_mtime_ns == before.st_mtime_ns


def test_right_content_with_the_wrong_mode_is_written(agent: Agent, root: Path) -> None:
    (root / "a").write_text("same")
    agent.apply(write("a", "same", executable=True))
    assert os.access(root / "a", os.X_OK)


def test_a_thing_that_is_no_file_is_replaced_and_never_read(agent: Agent, root: Path) -> None:
    agent.put({"pipe": "ours", "gone": "ours"})
    for name in ("pipe", "gone"):
        (root / name).unlink()
        os.mkfifo(root / name)
    outcome = agent.apply(write("pipe", "new"), remove("gone"))
    assert kinds(outcome) == [("drift", "pipe", "not_a_file"), ("drift", "gone", "not_a_file")]
    assert seen(root) == {"pipe": "new"}


# --- opening


def test_root_and_staging_are_made_and_locked(tmp_path: Path) -> None:
    first = Disk(tmp_path / "deep/project", tmp_path / "deep/staging")
    first.open()
    second = Disk(tmp_path / "deep/project", tmp_path / "deep/staging")
    with pytest.raises(RootUnusable, match="in use by another agent"):
        second.open()
    first.close()
    second.open()
    second.close()
    assert stat.S_IMODE((tmp_path / "deep/staging").stat().st_mode) == 0o700


@pytest.mark.parametrize(("root", "staging"), [("p", "p/s"), ("s/p", "s"), ("p", "p")])
def test_staging_and_root_may_not_contain_each_other(tmp_path: Path, root: str, staging: str) -> None:
    with pytest.raises(RootUnusable, match="must not contain each other"):
        Disk(tmp_path / root, tmp_path / staging).open()


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "project").write_text("")
    with pytest.raises(RootUnusable, match="cannot use the project directory"):
        Disk(tmp_path / "project", tmp_path / "staging").open()


def test_a_staging_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("")
    with pytest.raises(RootUnusable, match="cannot use the staging directory"):
        Disk(tmp_path / "project", tmp_path / "staging").open()


def test_a_staging_directory_that_others_could_write_in_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging").chmod(0o777)
    disk = Disk(tmp_path / "project", tmp_path / "staging")
    disk.open()
    disk.close()
    assert stat.S_IMODE((tmp_path / "staging").stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that is not its own")
def test_a_staging_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    (tmp_path / "staging").symlink_to(theirs)
    with pytest.raises(RootUnusable, match=r"belongs to another user \(uid 12345\)"):
        Disk(tmp_path / "project", tmp_path / "staging").open()


def test_clearing_staging_takes_our_names_only(tmp_path: Path) -> None:
    disk = Disk(tmp_path / "project", tmp_path / "staging")
    disk.open()
    disk.stage().write(b"left by a kill")
    (life,) = (tmp_path / "staging").iterdir()
    for place in (tmp_path / "staging", life):
        (place / "precious").write_text("a user's")
    assert disk.clear_staging() == 1
    assert in_staging(tmp_path / "staging") == ["precious", "precious"]
    disk.close()
    assert (life / "precious").exists()


def test_a_life_that_ends_well_leaves_staging_empty(tmp_path: Path) -> None:
    for _ in range(2):
        disk = Disk(tmp_path / "project", tmp_path / "staging")
        disk.open()
        Agent(disk).put({"a": "1"})
        disk.close()
        assert os.listdir(tmp_path / "staging") == []


def test_what_an_earlier_life_left_in_staging_goes_and_nobody_elses(tmp_path: Path) -> None:
    first = Disk(tmp_path / "project", tmp_path / "staging")
    first.open()
    first.stage().write(b"left by a kill")
    staged(first, "a/b", "left by a kill")
    first.close()
    (tmp_path / "precious").write_text("a user's")
    (tmp_path / "staging/life-00000000").symlink_to(tmp_path)
    (tmp_path / "staging/life-of-another-kind").mkdir()
    second = Disk(tmp_path / "project", tmp_path / "staging")
    second.open()
    second.clear_staging()
    second.close()
    assert sorted(os.listdir(tmp_path / "staging")) == ["life-00000000", "life-of-another-kind"]
    assert (tmp_path / "precious").exists()


# --- reading


def test_reading_and_scanning_follow_no_link_and_skip_what_is_protected(
    disk: Disk, agent: Agent, root: Path
) -> None:
    agent.put({"src/a": "1", "b": "2"})
    (root / "node_modules/x").mkdir(parents=True)
    (root / "node_modules/x/index.js").write_text("")
    (root / "link").symlink_to("src")
    (root / "leaf").symlink_to("b")

    assert disk.read_digest(RelPath("src/a")) == (digest_of(b"1"), agent.known[RelPath("src/a")])
    for path in ("link/a", "leaf", "nothing", "b/under", "src"):
        assert disk.read_digest(RelPath(path)) is None
        assert disk.look(RelPath(path)) is None
    assert disk.scan() == agent.known


def test_an_audit_tells_touched_changed_missing_and_right(disk: Disk, agent: Agent, root: Path) -> None:
    agent.put({"right": "1", "touched": "2", "changed": "3", "missing": "4", "dir/in": "5", "link": "6"})
    os.utime(root / "touched")
    (root / "changed").write_text("x")
    (root / "missing").unlink()
    (root / "link").unlink()
    (root / "link").symlink_to("right")

    audit = disk.audit(Tree(Cursor("e", 1), Map(agent.tree)), agent.known)
    assert {d.path: d.rule for d in audit.drifts} == {
        "changed": "changed",
        "missing": "missing",
        "link": "not_a_file",
    }
    assert audit.stats == {p: disk.look(RelPath(p)) for p in ("right", "touched", "dir/in")}


def test_leftovers_of_a_killed_batch_are_discarded(disk: Disk, root: Path) -> None:
    (root / "left").write_text("behind")
    (root / "theirs").write_text("not ours")
    disk.discard([RelPath("left"), RelPath("never"), RelPath("no/where")])
    assert seen(root) == {"theirs": "not ours"}
