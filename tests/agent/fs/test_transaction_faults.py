"""Transactions on a sick or hostile machine. Each fault is real; what needs root says so when it is skipped."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.core.errors import RootUnusable
from agent.core.model import Operation, RelPath
from agent.fs.project_dir import ProjectDir
from agent.fs.turns import at_once
from tests.agent.disks import Agent, in_staging, kinds, mounted, opened, remove, seen, staged, write

NOBODY = 65534
IS_ROOT = os.geteuid() == 0


# --- file systems of their own


def test_a_full_disk_undoes_the_transaction_and_the_retry_lands(mount: Callable[..., Path]) -> None:
    small = mount("size=256k")
    with opened(small / "project", small / "staging") as agent:
        agent.put({"a": "old", "b": "old"})
        (small / "ballast").write_bytes(bytes(96 * 1024))
        operations: list[Operation] = [write("a", "new"), remove("b"), write("src/big", bytes(192 * 1024))]

        result = agent.apply(*operations)
        assert result.rolled_back
        assert kinds(result) == [("disk_full", "src/big", "space")]
        assert (result.done, result.made, result.gone) == ((), (), ())
        assert seen(small / "project") == {"a": "old", "b": "old"}
        assert in_staging(small / "staging") == []

        (small / "ballast").unlink()
        result = agent.apply(*operations)
        assert kinds(result) == []
        assert seen(small / "project") == {"a": "new", "src/big": "\0" * 192 * 1024}


@pytest.mark.parametrize("free", range(10))
def test_wherever_inodes_run_out_the_transaction_lands_whole_or_not_at_all(
    mount: Callable[..., Path], free: int
) -> None:
    """Each number of free inodes stops the transaction at another step: staging, the first directory, the second..."""
    small = mount("nr_inodes=64")
    before = {"a": "old", "b": "old", "dir/c": "old"}
    after = {"a": "new", "dir": "file now", "x/one": "1", "y/z/two": "2"}
    operations: list[Operation] = [
        write("a", "new"),
        remove("b"),
        remove("dir/c"),
        write("dir", "file now"),
        write("x/one", "1"),
        write("y/z/two", "2"),
    ]
    with opened(small / "project", small / "staging") as agent:
        agent.put(before)
        known = dict(agent.known)
        taken: list[Path] = []
        while os.statvfs(small).f_ffree > free:
            taken.append(small / f"ballast{len(taken)}")
            taken[-1].touch()

        result = agent.apply(*operations)
        if result.rolled_back:
            assert [(p.kind, p.rule) for p in result.problems] == [("disk_full", "inodes")]
            assert (result.done, result.made, result.gone) == ((), (), ())
            assert seen(small / "project") == before
            for each in taken:
                each.unlink()
            result = agent.apply(*operations)
        assert kinds(result) == []
        assert seen(small / "project") == after
        assert in_staging(small / "staging") == []
        assert known.keys() != agent.known.keys()


def test_staged_files_survive_a_rollback_for_the_retry(mount: Callable[..., Path]) -> None:
    small = mount("nr_inodes=48")
    with opened(small / "project", small / "staging") as agent:
        agent.put({"old": "old", "kept": "old"})
        writes = []
        for path in ("whole/a", "whole/b/c", "old", "new", "kept"):
            writes.append(staged(agent.disk, path, path, version=2))
        writes.append(staged(agent.disk, "needs/a/directory", "needs/a/directory", nested=False))
        taken: list[Path] = []
        while os.statvfs(small).f_ffree > 1:
            taken.append(small / f"ballast{len(taken)}")
            taken[-1].touch()

        result = agent.apply(*writes)
        assert result.rolled_back
        assert seen(small / "project") == {"old": "old", "kept": "old"}
        assert len(in_staging(small / "staging")) == 2

        for each in taken:
            each.unlink()
        result = agent.apply(*writes)
        assert kinds(result) == []
        assert seen(small / "project") == {w.path: w.path for w in writes}
        assert in_staging(small / "staging") == []


def test_a_read_only_file_system_undoes_nothing_and_says_so(mount: Callable[..., Path]) -> None:
    small = mount("size=1m")
    with opened(small / "project", small / "staging") as agent:
        agent.put({"a": "old", "b": "old"})
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        result = agent.apply(remove("b"), write("a", "new"))
        assert result.rolled_back
        assert kinds(result) == [("read_only", "a", "EROFS")]
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        assert seen(small / "project") == {"a": "old", "b": "old"}
        assert kinds(agent.apply(remove("b"), write("a", "new"))) == []
        assert seen(small / "project") == {"a": "new"}


def test_what_was_replaced_makes_room_when_room_is_lacking(mount: Callable[..., Path]) -> None:
    small = mount("nr_inodes=40")
    with opened(small / "project", small / "staging") as agent:
        agent.put({"a": "1", "b": "1"})
        free = os.statvfs(small).f_ffree
        for number in range(2, 3 * free):
            result = agent.apply(write("a", f"{number}"), write("b", f"{number}"), sweep=False)
            assert (result.rolled_back, kinds(result)) == (False, [])
        assert seen(small / "project") == dict.fromkeys("ab", f"{number}")
        assert 0 < len(in_staging(small / "staging")) <= free
        agent.disk.sweep()
        assert in_staging(small / "staging") == []
        for number in range(os.statvfs(small).f_ffree):
            (small / f"ballast{number}").touch()
        assert agent.apply(write("a", "x"), write("b", "x"), sweep=False).rolled_back
        assert in_staging(small / "staging") == []


def test_what_a_killed_run_left_makes_room_for_the_next(mount: Callable[..., Path]) -> None:
    """Nothing else would ever remove it: the agent could not start again."""
    small = mount("nr_inodes=40")
    killed = ProjectDir(small / "project", small / "staging")
    killed.open()
    for _ in range(os.statvfs(small).f_ffree):
        killed.stage_whole(b"x")
    killed.close()
    assert os.statvfs(small).f_ffree == 0
    with opened(small / "project", small / "staging") as agent:
        agent.put({"a": "1"})
        assert in_staging(small / "staging") == []
    assert os.listdir(small / "staging") == []


def test_without_room_for_a_file_the_start_says_so_and_leaves_nothing(mount: Callable[..., Path]) -> None:
    small = mount("nr_inodes=40")
    (small / "project").mkdir()
    (small / "staging").mkdir()
    for number in range(os.statvfs(small).f_ffree):
        (small / f"ballast{number}").touch()
    disk = ProjectDir(small / "project", small / "staging")
    with pytest.raises(RootUnusable, match=r"cannot use the staging directory .*: No space left on device"):
        disk.open()
    assert os.listdir(small / "staging") == []
    for each in small.glob("ballast*"):
        each.unlink()
    with opened(small / "project", small / "staging") as agent:
        agent.put({"a": "1"})


def test_staging_on_another_file_system_is_refused_at_the_start(
    mount: Callable[..., Path], tmp_path: Path
) -> None:
    disk = ProjectDir(tmp_path / "project", mount() / "staging")
    with pytest.raises(RootUnusable, match="on another file system than the project; set STAGING_DIR"):
        disk.open()
    assert list((tmp_path / "project").iterdir()) == []


def test_a_bind_mount_of_the_same_file_system_is_refused_too(tmp_path: Path) -> None:
    """Both have the same device number; only a rename tells."""
    (tmp_path / "source").mkdir()
    mounted(tmp_path / "bound", "bind", kind="none", source=str(tmp_path / "source"))
    try:
        with pytest.raises(RootUnusable, match="on another file system"):
            ProjectDir(tmp_path / "project", tmp_path / "bound/staging").open()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "bound")], check=True)


def test_a_mount_inside_the_project_is_one_problem_and_the_rest_lands(root: Path, agent: Agent) -> None:
    root.mkdir(exist_ok=True)
    mounted(root / "volume")
    try:
        result = agent.apply(write("volume/a", "1"), write("b", "1"))
    finally:
        subprocess.run(["umount", "-l", str(root / "volume")], check=True)
    assert kinds(result) == [("path_unusable", "volume/a", "other_file_system")]
    assert seen(root) == {"b": "1", "volume/": ""}


# --- the disk fails at the Nth call, whichever it is


class Failing:
    """Python asks its audit hooks before each of these calls; ours refuses one of them, as a full disk would."""

    CALLS = frozenset({"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"})

    def __init__(self) -> None:
        self.left = 0
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: object) -> None:
        if self.left and event in self.CALLS:
            self.left -= 1
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def failing() -> Iterator[Failing]:
    failing = Failing()
    yield failing
    failing.left = 0


@pytest.mark.usefixtures("keeping")
def test_whichever_call_fails_the_transaction_lands_whole_or_not_at_all(
    agent: Agent, root: Path, tmp_path: Path, failing: Failing
) -> None:
    before = {"a": "old", "b": "old", "dir/deep/c": "old", "file": "old", "gone/x": "old"}
    after = {"a": "new", "dir": "a file now", "file/is/a/directory": "new", "new/y": "new", "z": "staged"}
    after |= {"whole/p": "1", "whole/q/r": "2", "x": "nested"}
    for number in itertools.count(1):
        agent.apply(*(remove(path) for path in agent.known))
        agent.put(before)
        assert seen(root) == before
        made = set(agent.disk.made)
        flat = staged(agent.disk, "z", "staged", nested=False)
        nested = [staged(agent.disk, path, after[path]) for path in ("whole/p", "whole/q/r", "x")]
        operations: list[Operation] = [
            write("a", "new"),
            remove("b"),
            remove("dir/deep/c"),
            write("dir", "a file now"),
            remove("file"),
            write("file/is/a/directory", "new"),
            remove("gone/x"),
            flat,
            nested[0],
            nested[1],
            write("new/y", "new"),
            nested[2],
        ]
        failing.left = number
        result = agent.apply(*operations)
        beyond, failing.left = failing.left > 0, 0
        if result.rolled_back:
            assert [(p.kind, p.rule) for p in result.problems] == [("disk_full", "space")]
            assert (result.done, result.made, result.gone) == ((), (), ())
            assert seen(root) == before
            assert set(agent.disk.made) == made
            assert set(in_staging(tmp_path / "staging")) == {flat.staged, nested[0].staged}
            assert kinds(agent.apply(*operations)) == []
        # What may be left: an empty directory, and in staging what was kept for undoing. The transaction has landed.
        assert {path: content for path, content in seen(root).items() if path != "gone/"} == after
        agent.disk.clear_staging()
        if beyond:
            break
    assert number > 30


def test_a_new_directory_that_another_process_used_meanwhile_is_not_taken_back(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def interfering(source: str, target: str, **places: int) -> None:
        if target == "z":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, target, **places)
        if target == "whole":
            (root / "whole/q/theirs").write_text("foreign")

    writes = [staged(agent.disk, path, path) for path in ("other/o", "whole/p", "whole/q/r")]
    monkeypatch.setattr(os, "rename", interfering)
    result = agent.apply(*writes, write("z", "z"))
    assert result.rolled_back
    assert kinds(result) == [("disk_full", "z", "space"), ("undo_failed", "whole", None)]
    assert seen(root) == {"whole/p": "whole/p", "whole/q/r": "whole/q/r", "whole/q/theirs": "foreign"}
    assert [done.operation for done in result.done] == writes[1:]
    assert set(result.made) == set(agent.disk.made) == {"whole", "whole/q"}
    agent.disk.clear_staging()


@pytest.mark.parametrize("rule", [errno.EXDEV, errno.EINVAL, errno.ENOTEMPTY])
def test_where_a_directory_cannot_be_renamed_its_files_are(
    rule: int, agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an overlay that knows no redirection, or something that appeared this moment."""
    rename = os.rename

    def refusing(source: str, target: str, **places: int) -> None:
        if target in ("whole", "q"):
            raise OSError(rule, os.strerror(rule))
        rename(source, target, **places)

    files = {"whole/p": "1", "whole/q/r": "2"}
    writes = [staged(agent.disk, path, text) for path, text in files.items()]
    monkeypatch.setattr(os, "rename", refusing)
    result = agent.apply(*writes)
    assert kinds(result) == []
    assert seen(root) == files
    assert set(result.made) == {"whole", "whole/q"}
    assert agent.disk.scan() == agent.known


# --- not being root


@contextmanager
def as_nobody(*owned: Path) -> Iterator[None]:
    """Without root's powers: the kernel checks permissions by the effective user."""
    if not IS_ROOT:
        yield
        return
    for path in owned:
        os.chown(path, NOBODY, NOBODY)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def reachable(path: Path) -> None:
    """pytest's directories are closed to others; the way to this one is opened."""
    for above in [path, *path.parents]:
        if above.stat().st_uid == os.geteuid() and above != Path("/"):
            above.chmod(above.stat().st_mode | 0o011)


def test_a_directory_we_may_not_write_in_holds_up_its_own_files_alone(tmp_path: Path) -> None:
    reachable(tmp_path)
    root, staging = tmp_path / "project", tmp_path / "staging"
    for path in (root, root / "locked", staging):
        path.mkdir()
    with as_nobody(root, staging), opened(root, staging) as agent:
        agent.put({"a": "old", "b": "old"})
        if not IS_ROOT:
            (root / "locked").chmod(0o555)
        operations: list[Operation] = [
            write("a", "new"),
            write("made/x", "new"),
            write("locked/c", "new"),
            remove("b"),
        ]

        result = agent.apply(*operations)
        assert not result.rolled_back
        assert kinds(result) == [("path_unusable", "locked/c", "not_permitted")]
        assert "cannot use locked/c: not permitted, Permission denied" in result.problems[0].detail
        assert seen(root) == {"a": "new", "locked/": "", "made/x": "new"}
        assert in_staging(staging) == []
        seen_before = agent.disk.obstacle(RelPath("locked/c"))
    (root / "locked").chmod(0o777)
    with as_nobody(), opened(root, staging) as agent:
        assert agent.disk.obstacle(RelPath("locked/c")) != seen_before, "it is tried again at once"
        agent.apply(*operations)
    assert seen(root) == {"a": "new", "locked/c": "new", "made/x": "new"}


def test_a_file_we_may_not_read_is_replaced_nevertheless(tmp_path: Path) -> None:
    reachable(tmp_path)
    root, staging = tmp_path / "project", tmp_path / "staging"
    root.mkdir()
    staging.mkdir()
    (root / "a").write_text("theirs")
    (root / "a").chmod(0)
    with as_nobody(root, staging), opened(root, staging) as agent:
        assert kinds(agent.apply(write("a", "new"))) == [("drift", "a", "appeared")]
        assert seen(root) == {"a": "new"}


@pytest.mark.skipif(not IS_ROOT, reason="only root can make a directory that is not its own")
def test_a_root_we_may_not_write_in_is_refused_at_the_start(tmp_path: Path) -> None:
    reachable(tmp_path)
    (tmp_path / "project").mkdir()
    with (
        as_nobody(),
        pytest.raises(RootUnusable, match=r"cannot write in the project directory .*permission denied"),
    ):
        ProjectDir(tmp_path / "project", tmp_path / "staging").open()


@pytest.mark.skipif(not IS_ROOT, reason="only root can be refused to give files away by dropping its powers")
def test_an_owner_that_files_cannot_be_given_to_is_refused_at_the_start(tmp_path: Path) -> None:
    reachable(tmp_path)
    root, staging = tmp_path / "project", tmp_path / "staging"
    root.mkdir()
    staging.mkdir()
    with as_nobody(root, staging), pytest.raises(RootUnusable, match="cannot give files to 12:34"):
        ProjectDir(root, staging, owner=(12, 34)).open()


# --- descriptors


@pytest.mark.parametrize("spare", range(8))
def test_wherever_descriptors_run_out_the_transaction_lands_whole_or_not_at_all(
    agent: Agent, root: Path, spare: int
) -> None:
    agent.put({"a": "old", "b/c": "old"})
    operations: list[Operation] = [
        write("a", "new"),
        write("x/y/z/one", "1"),
        remove("b/c"),
        write("w/v/two", "2"),
    ]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    agent.disk._directories.close()
    with open(os.devnull) as highest:
        limit = highest.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + spare, hard))
    try:
        result = agent.apply(*operations)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if result.rolled_back:
        assert [(p.kind, p.rule) for p in result.problems] == [("too_many_open_files", "EMFILE")]
        assert seen(root) == {"a": "old", "b/c": "old"}
        result = agent.apply(*operations)
    assert kinds(result) == []
    assert seen(root) == {"a": "new", "x/y/z/one": "1", "w/v/two": "2"}


def test_descriptors_do_not_pile_up(agent: Agent) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc to count descriptors in")
    before = count()
    for n in range(300):
        agent.apply(write(f"d{n}/e/f", "x"), write("same", f"{n}"))
        agent.apply(write(f"same/{n}", "blocked"))
        at_once(agent.disk.digest_steps(RelPath(f"d{n}/e/f"), 1))
        at_once(agent.disk.digest_steps(RelPath(f"d{n}"), 1))
        abandoned = agent.disk.check_steps(RelPath(f"d{n}/e/f"), None, agent.tree[RelPath(f"d{n}/e/f")])
        next(abandoned, None)
        abandoned.close()
    assert count() - before <= 64
    agent.disk.scan()
    agent.disk.close()
    assert count() < before
    agent.disk.open()
