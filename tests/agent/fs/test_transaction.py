"""Transactions on a healthy machine: what lands, in what order, with what mode, and what is left behind."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from immutables import Map

from agent.core.model import Cursor, Entry, RelPath, Tree, Write, digest_of
from agent.fs.inspect import FileStat
from agent.fs.project_dir import ProjectDir
from agent.fs.turns import at_once
from tests.agent.disks import Agent, kinds, remove, seen, write


def test_a_write_lands_with_its_parents_and_says_how_it_looks(agent: Agent, root: Path) -> None:
    result = agent.apply(write("src/pages/Home.tsx", "hello"))

    assert seen(root) == {"src/pages/Home.tsx": "hello"}
    (done,) = result.done
    assert done.stat == FileStat.of((root / "src/pages/Home.tsx").lstat())
    assert result.problems == ()
    assert not result.rolled_back
    assert set(result.made) == {"src", "src/pages"}


def test_a_transaction_lands_whole_and_answers_in_its_order(agent: Agent, root: Path) -> None:
    agent.put({"a": "1", "b": "2"})

    result = agent.apply(remove("a"), write("c", "3"), write("b", "4", version=2))

    assert [done.operation.path for done in result.done] == ["a", "c", "b"]
    assert [done.stat is None for done in result.done] == [True, False, False]
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
        disk = ProjectDir(tmp_path / "project", tmp_path / "staging", file_mode=0o640, dir_mode=0o750)
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
    disk = ProjectDir(tmp_path / "project", tmp_path / "staging", owner=(12345, 23456))
    disk.open()
    disk.apply([write("src/a", "x"), write("src/b", "y", executable=True)], {})
    disk.apply([write("src/a", "z")], {})
    disk.close()

    for path in ("", "src", "src/a", "src/b"):
        found = (tmp_path / "project" / path).stat()
        assert (found.st_uid, found.st_gid) == (12345, 23456), path
    assert (tmp_path / "staging").stat().st_uid == 0


def test_staged_files_are_promoted(disk: ProjectDir, agent: Agent, root: Path) -> None:
    stage = disk.stage()
    stage.write(b"one ")
    stage.write(b"two")
    whole = stage.finish()

    assert (whole.digest, whole.size) == (digest_of(b"one two"), 7)
    result = agent.apply(Write(RelPath("d/f"), Entry(1, whole.digest, 7), staged=whole.name), write("g", "x"))
    assert seen(root) == {"d/f": "one two", "g": "x"}
    assert result.done[0].stat == FileStat.of((root / "d/f").lstat())


def test_an_aborted_stage_leaves_nothing(disk: ProjectDir) -> None:
    for path in (None, RelPath("d/never")):
        stage = disk.stage(path)
        stage.write(b"never")
        stage.abort()
    assert disk.clear_staging() == 1


def test_a_write_without_bytes_is_the_planners_bug(agent: Agent) -> None:
    with pytest.raises(ValueError, match="neither content nor a staged file"):
        agent.apply(Write(RelPath("a"), Entry(1, digest_of(b""), 0)))


def test_of_several_operations_on_a_path_the_last_counts(agent: Agent, root: Path) -> None:
    result = agent.apply(write("a", "1"), write("a", "2"), write("b", "1"), remove("b"))
    assert seen(root) == {"a": "2"}
    assert [done.operation.path for done in result.done] == ["a", "b"]


# --- paths that are unusable here


def test_a_file_where_a_directory_is_needed_is_one_problem_and_the_rest_lands(
    agent: Agent, root: Path
) -> None:
    (root / "a").write_text("in the way")
    result = agent.apply(write("a/b", "1"), write("c/d", "2"))
    assert kinds(result) == [("path_unusable", "a/b", "not_a_directory")]
    assert [done.operation.path for done in result.done] == ["c/d"]
    assert not result.rolled_back
    assert seen(root) == {"a": "in the way", "c/d": "2"}


def test_a_full_directory_where_a_file_is_needed_stays(agent: Agent, root: Path) -> None:
    (root / "a").mkdir()
    (root / "a/theirs").write_text("2")
    result = agent.apply(write("a", "file"), write("b", "1"))
    assert kinds(result) == [("path_unusable", "a", "directory_in_the_way")]
    assert seen(root) == {"a/theirs": "2", "b": "1"}


def test_a_name_too_long_for_the_file_system_is_one_problem_and_leaves_no_directory(
    agent: Agent, root: Path
) -> None:
    result = agent.apply(write(f"new/{'x' * 300}", "1"), write("b", "1"))
    assert [(p.kind, p.rule) for p in result.problems] == [("path_unusable", "name_too_long")]
    assert seen(root) == {"b": "1"}


# --- what something else did to our files


def test_a_file_changed_behind_our_back_is_reported_and_the_database_wins(agent: Agent, root: Path) -> None:
    agent.put({"a": "ours", "b": "ours"})
    (root / "a").write_text("theirs")
    result = agent.apply(write("a", "newer"), write("b", "newer"))
    assert kinds(result) == [("drift", "a", "changed")]
    assert seen(root) == {"a": "newer", "b": "newer"}


def test_drift_is_kept_when_the_caller_says_so(agent: Agent, root: Path) -> None:
    agent.put({"a": "ours", "b": "ours", "c": "ours", "d": "ours"})
    (root / "a").write_text("theirs")
    (root / "b").write_text("theirs")
    (root / "c").unlink()
    result = agent.apply(
        write("a", "new"), remove("b"), write("c", "new"), write("d", "new"), overwrite_drift=False
    )
    assert kinds(result) == [("drift", "a", "changed"), ("drift", "c", "missing"), ("drift", "b", "changed")]
    assert [done.operation.path for done in result.done] == ["d"]
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
    result = agent.apply(write("a", "new"), remove("b"))
    assert kinds(result) == [("drift", "a", "missing"), ("drift", "b", "missing")]
    assert len(result.done) == 2
    assert seen(root) == {"a": "new"}


def test_a_file_we_did_not_write_is_replaced_but_never_removed(agent: Agent, root: Path) -> None:
    (root / "a").write_text("theirs")
    (root / "b").write_text("theirs")
    result = agent.apply(write("a", "new"), remove("b"))
    assert kinds(result) == [("drift", "a", "appeared"), ("drift", "b", "appeared")]
    assert seen(root) == {"a": "new", "b": "theirs"}


def test_a_file_that_is_already_right_is_not_written_again(agent: Agent, root: Path) -> None:
    (root / "a").write_text("same")
    before = (root / "a").stat()
    result = agent.apply(write("a", "same"), write("b", "new"))
    assert kinds(result) == []
    assert result.done[0].stat == FileStat.of((root / "a").lstat())
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
    result = agent.apply(write("pipe", "new"), remove("gone"))
    assert kinds(result) == [("drift", "pipe", "not_a_file"), ("drift", "gone", "not_a_file")]
    assert seen(root) == {"pipe": "new"}


# --- reading


def test_reading_and_scanning_follow_no_link_and_skip_what_is_protected(
    disk: ProjectDir, agent: Agent, root: Path
) -> None:
    agent.put({"src/a": "1", "b": "2"})
    (root / "node_modules/x").mkdir(parents=True)
    (root / "node_modules/x/index.js").write_text("")
    (root / "link").symlink_to("src")
    (root / "leaf").symlink_to("b")

    assert at_once(disk.digest_steps(RelPath("src/a"), 1)) == (digest_of(b"1"), agent.known[RelPath("src/a")])
    for path in ("link/a", "leaf", "nothing", "b/under", "src"):
        assert at_once(disk.digest_steps(RelPath(path), 1)) is None
        assert disk.stat(RelPath(path)) is None
    assert disk.scan() == agent.known


def test_an_audit_tells_touched_changed_missing_and_right(disk: ProjectDir, agent: Agent, root: Path) -> None:
    agent.put({"right": "1", "touched": "2", "changed": "3", "missing": "4", "dir/in": "5", "link": "6"})
    os.utime(root / "touched")
    (root / "changed").write_text("x")
    (root / "missing").unlink()
    (root / "link").unlink()
    (root / "link").symlink_to("right")

    audit = at_once(disk.audit_steps(Tree(Cursor("e", 1), Map(agent.tree)), agent.known))
    assert {d.path: d.rule for d in audit.drifts} == {
        "changed": "changed",
        "missing": "missing",
        "link": "not_a_file",
    }
    assert audit.stats == {p: disk.stat(RelPath(p)) for p in ("right", "touched", "dir/in")}


def test_leftovers_of_a_killed_transaction_are_discarded(disk: ProjectDir, root: Path) -> None:
    (root / "left").write_text("behind")
    (root / "theirs").write_text("not ours")
    disk.discard([RelPath("left"), RelPath("never"), RelPath("no/where")])
    assert seen(root) == {"theirs": "not ours"}
