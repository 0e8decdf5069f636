"""The disk on a sick or hostile machine. Each fault is made for real; what needs root says so when it is skipped."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import itertools
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from agent import batch, jail
from agent.disk import Disk
from agent.errors import RootUnusable
from agent.jail import is_twin
from agent.ledger import Ledger, LedgerState
from agent.model import Operation, RelPath, Tree, digest_of
from tests.agent.disks import Agent, kinds, mounted, opened, remove, seen, staged, write
from tests.profiles import NIGHTLY

NOBODY = 65534
IS_ROOT = os.geteuid() == 0


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Agent]:
    with opened(tmp_path / "project", tmp_path / "staging") as agent:
        yield agent
        assert not os.listdir(tmp_path / "staging"), "a batch left something in staging"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "project"


# --- file systems of their own


def test_a_full_disk_undoes_the_batch_and_the_retry_lands(mount: Callable[..., Path]) -> None:
    small = mount("size=256k")
    with opened(small / "project", small / "staging") as agent:
        agent.put({"a": "old", "b": "old"})
        (small / "ballast").write_bytes(bytes(96 * 1024))
        operations: list[Operation] = [write("a", "new"), remove("b"), write("src/big", bytes(192 * 1024))]

        outcome = agent.apply(*operations)
        assert outcome.rolled_back
        assert kinds(outcome) == [("disk_full", "src/big", "space")]
        assert (outcome.done, outcome.made, outcome.gone) == ((), (), ())
        assert seen(small / "project") == {"a": "old", "b": "old"}
        assert os.listdir(small / "staging") == []

        (small / "ballast").unlink()
        outcome = agent.apply(*operations)
        assert kinds(outcome) == []
        assert seen(small / "project") == {"a": "new", "src/big": "\0" * 192 * 1024}


@pytest.mark.parametrize("free", range(10))
def test_wherever_inodes_run_out_the_batch_lands_whole_or_not_at_all(
    mount: Callable[..., Path], free: int
) -> None:
    """Each number of free inodes stops the batch at another step: staging, the first directory, the second..."""
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

        outcome = agent.apply(*operations)
        if outcome.rolled_back:
            assert [(p.kind, p.rule) for p in outcome.problems] == [("disk_full", "inodes")]
            assert (outcome.done, outcome.made, outcome.gone) == ((), (), ())
            assert seen(small / "project") == before
            for each in taken:
                each.unlink()
            outcome = agent.apply(*operations)
        assert kinds(outcome) == []
        assert seen(small / "project") == after
        assert os.listdir(small / "staging") == []
        assert known.keys() != agent.known.keys()


def test_staged_files_survive_a_rollback_for_the_retry(mount: Callable[..., Path]) -> None:
    small = mount("nr_inodes=32")
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

        outcome = agent.apply(*writes)
        assert outcome.rolled_back
        assert seen(small / "project") == {"old": "old", "kept": "old"}
        assert len(os.listdir(small / "staging")) == 2

        for each in taken:
            each.unlink()
        outcome = agent.apply(*writes)
        assert kinds(outcome) == []
        assert seen(small / "project") == {w.path: w.path for w in writes}
        assert os.listdir(small / "staging") == []


def test_a_read_only_file_system_undoes_nothing_and_says_so(mount: Callable[..., Path]) -> None:
    small = mount("size=1m")
    with opened(small / "project", small / "staging") as agent:
        agent.put({"a": "old", "b": "old"})
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        outcome = agent.apply(remove("b"), write("a", "new"))
        assert outcome.rolled_back
        assert kinds(outcome) == [("read_only", "a", "EROFS")]
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        assert seen(small / "project") == {"a": "old", "b": "old"}
        assert kinds(agent.apply(remove("b"), write("a", "new"))) == []
        assert seen(small / "project") == {"a": "new"}


def test_staging_on_another_file_system_is_refused_at_the_start(
    mount: Callable[..., Path], tmp_path: Path
) -> None:
    disk = Disk(tmp_path / "project", mount() / "staging")
    with pytest.raises(RootUnusable, match="on another file system than the project; set STAGING_DIR"):
        disk.open()
    assert list((tmp_path / "project").iterdir()) == []


def test_a_bind_mount_of_the_same_file_system_is_refused_too(tmp_path: Path) -> None:
    """Both have the same device number; only a rename tells."""
    (tmp_path / "source").mkdir()
    mounted(tmp_path / "bound", "bind", kind="none", source=str(tmp_path / "source"))
    try:
        with pytest.raises(RootUnusable, match="on another file system"):
            Disk(tmp_path / "project", tmp_path / "bound/staging").open()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "bound")], check=True)


def test_a_mount_inside_the_project_is_one_problem_and_the_rest_lands(root: Path, agent: Agent) -> None:
    root.mkdir(exist_ok=True)
    mounted(root / "volume")
    try:
        outcome = agent.apply(write("volume/a", "1"), write("b", "1"))
    finally:
        subprocess.run(["umount", "-l", str(root / "volume")], check=True)
    assert kinds(outcome) == [("path_unusable", "volume/a", "other_file_system")]
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


@pytest.fixture(params=["exchange", "copy"])
def keeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a batch keeps what it replaces: by exchanging names, or as on a system that cannot."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if request.param == "copy":
        monkeypatch.setattr(batch, "exchange", refuse)
    return str(request.param)


@pytest.fixture(scope="module")
def failing() -> Iterator[Failing]:
    failing = Failing()
    yield failing
    failing.left = 0


@pytest.mark.usefixtures("keeping")
def test_whichever_call_fails_the_batch_lands_whole_or_not_at_all(
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
        outcome = agent.apply(*operations)
        beyond, failing.left = failing.left > 0, 0
        if outcome.rolled_back:
            assert [(p.kind, p.rule) for p in outcome.problems] == [("disk_full", "space")]
            assert (outcome.done, outcome.made, outcome.gone) == ((), (), ())
            assert seen(root) == before
            assert set(agent.disk.made) == made
            assert set(os.listdir(tmp_path / "staging")) == {flat.staged, nested[0].staged}
            assert kinds(agent.apply(*operations)) == []
        # What may be left: an empty directory, and in staging what was kept for undoing. The batch has landed.
        assert {path: content for path, content in seen(root).items() if path != "gone/"} == after
        agent.disk.clear_staging()
        if beyond:
            break
    assert number > 30


def test_a_new_directory_that_somebody_used_meanwhile_is_not_taken_back(
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
    outcome = agent.apply(*writes, write("z", "z"))
    assert outcome.rolled_back
    assert kinds(outcome) == [("disk_full", "z", "space"), ("undo_failed", "whole", None)]
    assert seen(root) == {"whole/p": "whole/p", "whole/q/r": "whole/q/r", "whole/q/theirs": "foreign"}
    assert [done.operation for done in outcome.done] == writes[1:]
    assert set(outcome.made) == set(agent.disk.made) == {"whole", "whole/q"}
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
    outcome = agent.apply(*writes)
    assert kinds(outcome) == []
    assert seen(root) == files
    assert set(outcome.made) == {"whole", "whole/q"}
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


def test_a_directory_we_may_not_write_in_undoes_the_batch(tmp_path: Path) -> None:
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

        outcome = agent.apply(*operations)
        assert outcome.rolled_back
        assert kinds(outcome) == [("permission_denied", "locked/c", "EACCES")]
        assert "cannot change locked/c: Permission denied" in outcome.problems[0].detail
        assert seen(root) == {"a": "old", "b": "old", "locked/": ""}
        assert os.listdir(staging) == []
    (root / "locked").chmod(0o777)
    with as_nobody(), opened(root, staging) as agent:
        agent.apply(*operations)
    assert seen(root) == {"a": "new", "b": "old", "locked/c": "new", "made/x": "new"}


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
        Disk(tmp_path / "project", tmp_path / "staging").open()


@pytest.mark.skipif(not IS_ROOT, reason="only root can be refused to give files away by dropping its powers")
def test_an_owner_that_files_cannot_be_given_to_is_refused_at_the_start(tmp_path: Path) -> None:
    reachable(tmp_path)
    root, staging = tmp_path / "project", tmp_path / "staging"
    root.mkdir()
    staging.mkdir()
    with as_nobody(root, staging), pytest.raises(RootUnusable, match="cannot give files to 12:34"):
        Disk(root, staging, owner=(12, 34)).open()


# --- descriptors


@pytest.mark.parametrize("spare", range(8))
def test_wherever_descriptors_run_out_the_batch_lands_whole_or_not_at_all(
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
    agent.disk._jail.forget()
    with open(os.devnull) as highest:
        limit = highest.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit + spare, hard))
    try:
        outcome = agent.apply(*operations)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if outcome.rolled_back:
        assert [(p.kind, p.rule) for p in outcome.problems] == [("too_many_open_files", "EMFILE")]
        assert seen(root) == {"a": "old", "b/c": "old"}
        outcome = agent.apply(*operations)
    assert kinds(outcome) == []
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
        agent.disk.read_digest(RelPath(f"d{n}/e/f"))
        agent.disk.read_digest(RelPath(f"d{n}"))
    assert count() - before <= 64
    agent.disk.scan()
    agent.disk.close()
    assert count() < before
    agent.disk.open()


# --- links


@pytest.fixture(params=["held", "walked"])
def revalidation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With /proc, where held directories are asked for their place, and as on a system without it."""
    if request.param == "walked":
        monkeypatch.setattr(jail, "_place_of", lambda descriptor: "")
    return str(request.param)


@pytest.mark.usefixtures("revalidation")
@pytest.mark.parametrize("depth", ["src", "src/pages"])
def test_a_directory_replaced_by_a_link_is_not_followed(
    agent: Agent, root: Path, tmp_path: Path, depth: str
) -> None:
    agent.put({"src/pages/home/a": "old", "b": "old"})
    outside = tmp_path / "outside"
    (root / depth).rename(outside)
    (root / depth).symlink_to(outside)
    before = seen(outside)

    outcome = agent.apply(
        write("src/pages/home/a", "new"), write("src/pages/home/n", "new"), write("b", "new")
    )
    assert kinds(outcome) == [
        ("path_unusable", "src/pages/home/a", "symlink"),
        ("path_unusable", "src/pages/home/n", "symlink"),
    ]
    assert [done.operation.path for done in outcome.done] == ["b"]
    assert seen(outside) == before

    outcome = agent.apply(remove("src/pages/home/a"))
    assert kinds(outcome) == [("path_unusable", "src/pages/home/a", "symlink")]
    assert seen(outside) == before

    (root / depth).unlink()
    assert kinds(agent.apply(write("src/pages/home/a", "new"))) == []
    assert (root / "src/pages/home/a").read_text() == "new"
    assert seen(outside) == before


@pytest.mark.usefixtures("revalidation")
@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_held_directory_that_is_no_longer_at_its_path_is_not_written_in(
    agent: Agent, root: Path, tmp_path: Path, how: str
) -> None:
    agent.put({"src/pages/a": "old"})
    if how == "removed":
        (root / "src/pages/a").unlink()
        (root / "src/pages").rmdir()
    else:
        (root / "src").rename(tmp_path / "away")
    if how == "replaced":
        (root / "src/pages").mkdir(parents=True)

    outcome = agent.apply(write("src/pages/b", "new"))
    assert kinds(outcome) == []
    assert (root / "src/pages/b").read_text() == "new"
    if how != "removed":
        assert seen(tmp_path / "away") == {"pages/a": "old"}


@pytest.mark.usefixtures("revalidation")
def test_a_link_planted_as_the_file_is_replaced_and_not_followed(
    agent: Agent, root: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    agent.put({"a": "ours", "b": "ours"})
    for name in ("a", "b"):
        (root / name).unlink()
        (root / name).symlink_to(victim)
    outcome = agent.apply(write("a", "new"), remove("b"))
    assert kinds(outcome) == [("drift", "a", "not_a_file"), ("drift", "b", "not_a_file")]
    assert seen(root) == {"a": "new"}
    assert victim.read_text() == "precious"


def test_a_root_that_moved_away_is_found_again_by_its_path(agent: Agent, root: Path, tmp_path: Path) -> None:
    agent.put({"src/a": "old"})
    root.rename(tmp_path / "away")
    root.mkdir()
    agent.apply(write("src/b", "new"))
    assert seen(root) == {"src/b": "new"}
    assert seen(tmp_path / "away") == {"src/a": "old"}


ATTACKER = textwrap.dedent(
    """
    import itertools, os, sys
    src, aside, outside = sys.argv[1:]
    os.write(1, b"go\\n")
    for n in itertools.count():
        try:
            os.rename(src, aside)
        except OSError:
            pass
        try:
            os.symlink(outside, src)
            os.unlink(src)
        except OSError:
            pass
        try:
            os.rename(aside, src)
        except OSError:
            # The writer made a directory of its own meanwhile: it is put away, the first comes back.
            try:
                os.rename(src, f"{aside}{n}")
                os.rename(aside, src)
            except OSError:
                pass
    """
)


@pytest.mark.usefixtures("revalidation")
def test_links_planted_while_we_write_lead_nowhere(agent: Agent, root: Path, tmp_path: Path) -> None:
    """A process swaps a directory for a link as fast as it can: whatever the timing, nothing lands behind the link."""
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    agent.put({"src/deep/a": "old"})
    attacker = subprocess.Popen(
        [sys.executable, "-c", ATTACKER, root / "src", tmp_path / "aside", outside], stdout=subprocess.PIPE
    )
    refused = landed = 0
    try:
        assert attacker.stdout is not None
        assert attacker.stdout.readline() == b"go\n"
        for n in range(500):
            outcome = agent.apply(write("src/deep/a", f"{n}"), write(f"src/deep/f{n % 7}", f"{n}"))
            refused += any(p.kind != "drift" for p in outcome.problems)
            landed += len(outcome.done) == 2
    finally:
        attacker.kill()
        attacker.communicate()
    assert seen(outside) == {"deep/": ""}
    assert landed > 10
    assert refused > 0, "the swapping never got in the way: this run proved nothing"


# --- twins


def test_composed_and_decomposed_names_are_two_files_and_theirs_is_left_alone(
    agent: Agent, root: Path
) -> None:
    ours = "caf\u00e9.ts"
    theirs = unicodedata.normalize("NFD", ours)
    (root / theirs).write_text("theirs")
    if (root / ours).exists():
        pytest.skip("this file system takes both names for one")
    agent.apply(write(ours, "ours"))
    assert seen(root) == {ours: "ours", theirs: "theirs"}
    assert set(agent.disk.scan()) == {ours}
    agent.apply(remove(ours))
    assert seen(root) == {theirs: "theirs"}


@pytest.fixture
def case_blind(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system that is blind to case."""
    if not IS_ROOT or not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("mounting a case-blind file system needs root and /dev/fuse")
    place = tmp_path / "blind"
    place.mkdir()
    server = subprocess.Popen([sys.executable, "-m", "tests.fakes.case_blind", place], stdout=subprocess.PIPE)
    assert server.stdout is not None
    if server.stdout.readline() != b"mounted\n":
        server.communicate()
        pytest.skip("this machine does not let us mount through /dev/fuse")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)
    server.communicate(timeout=10)


def test_case_twins_on_a_case_blind_file_system(case_blind: Path) -> None:
    root = case_blind / "project"
    with opened(root, case_blind / "staging") as agent:
        agent.put({"Readme.md": "first", "src/a": "1"})
        outcome = agent.apply(write("README.MD", "twin"), write("SRC/b", "twin"), write("c", "fine"))
        assert kinds(outcome) == [
            ("path_unusable", "README.MD", "case_twin"),
            ("path_unusable", "SRC/b", "case_twin"),
        ]
        assert seen(root) == {"Readme.md": "first", "src/a": "1", "c": "fine"}
        assert outcome.made == ()

        assert kinds(agent.apply(remove("Readme.md"), write("README.MD", "renamed"))) == []
        assert seen(root) == {"README.MD": "renamed", "src/a": "1", "c": "fine"}

        assert kinds(agent.apply(remove("src/a"), write("SRC/a", "moved"), write("c", "new"))) == []
        assert seen(root) == {"README.MD": "renamed", "SRC/a": "moved", "c": "new"}


def test_twins_that_arrive_together_are_one_file_and_one_problem(case_blind: Path) -> None:
    root = case_blind / "project"
    with opened(root, case_blind / "staging") as agent:
        outcome = agent.apply(
            write("a.ts", "one"), write("A.ts", "two"), write("d/x", "1"), write("D/y", "2")
        )
        assert kinds(outcome) == [
            ("path_unusable", "A.ts", "case_twin"),
            ("path_unusable", "D/y", "case_twin"),
        ]
        assert seen(root) == {"a.ts": "one", "d/x": "1"}
        assert kinds(agent.apply(remove("A.ts"))) == [("drift", "A.ts", "appeared")]
        assert seen(root) == {"a.ts": "one", "d/x": "1"}


def test_twins_that_were_staged_together_are_one_file_and_one_problem(case_blind: Path) -> None:
    root = case_blind / "project"
    with opened(root, case_blind / "staging") as agent:
        files = {"a.ts": "one", "A.ts": "two", "d/x": "1", "D/y": "2", "d/X": "3"}
        outcome = agent.apply(*(staged(agent.disk, path, text) for path, text in files.items()))
        assert kinds(outcome) == [
            ("path_unusable", "A.ts", "case_twin"),
            ("path_unusable", "D/y", "case_twin"),
            ("path_unusable", "d/X", "case_twin"),
        ]
        assert seen(root) == {"a.ts": "one", "d/x": "1"}
        assert os.listdir(case_blind / "staging") == []


def test_what_makes_a_twin(root: Path, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that sees case: two names of one file are no twins as long as both are listed."""
    agent.put({"Readme": "x"})
    os.link(root / "Readme", root / "rEADME")
    directory = os.open(root, os.O_RDONLY)
    try:
        found = (root / "rEADME").stat()
        assert not is_twin(directory, "rEADME", found)
        assert not is_twin(directory, "123", found)
        monkeypatch.setattr(os, "listdir", lambda _: ["Readme"])
        assert is_twin(directory, "rEADME", found)
    finally:
        os.close(directory)


# --- readers

READER = textwrap.dedent(
    """
    import hashlib, os, sys
    path, stop = sys.argv[1:]
    reads = torn = missing = 0
    os.write(1, b"go\\n")
    while not os.path.exists(stop):
        for _ in range(50):
            try:
                with open(path, "rb", buffering=0) as file:
                    data = file.read()
            except FileNotFoundError:
                missing += 1
                continue
            reads += 1
            torn += hashlib.sha256(data[64:]).hexdigest().encode() != data[:64]
    print(reads, torn, missing)
    """
)


def test_no_reader_ever_sees_a_torn_or_missing_file(agent: Agent, root: Path, tmp_path: Path) -> None:
    """10,000 rewrites of up to 64 KB (1,000 by day), alone and in batches, under two readers that never pause."""

    def content(n: int) -> bytes:
        body = bytes([n % 256]) * (n * 7919 % 65536)
        return hashlib.sha256(body).hexdigest().encode() + body

    contents = [content(n) for n in range(64)]
    agent.apply(write("src/a", contents[0]))
    stop = tmp_path / "stop"
    readers = [
        subprocess.Popen([sys.executable, "-c", READER, root / "src/a", stop], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    try:
        for reader in readers:
            assert reader.stdout is not None
            assert reader.stdout.readline() == b"go\n"
        for n in range(10_000 if NIGHTLY else 1_000):
            operations = [write("src/a", contents[n % 64])]
            if n % 10 == 0:
                operations.append(write("src/b", "another"))
            outcome = agent.apply(*operations)
            assert not outcome.problems
    finally:
        stop.touch()
        counts = [reader.communicate()[0].split() for reader in readers]
    for reads, torn, missing in counts:
        assert int(reads) > 200
        assert (int(torn), int(missing)) == (0, 0)


@pytest.mark.usefixtures("keeping")
def test_nothing_happens_to_a_file_before_its_new_content_is_there(agent: Agent, root: Path) -> None:
    """A watcher looks when the first event comes. Were it one of ours (a second link), it would find the old content.

    The kernel's first word on the old file must be that it is no longer at its path, or has lost its last name.
    """
    if not sys.platform.startswith("linux"):
        pytest.skip("inotify is Linux's")
    attributes, modified, deleted, moved = 0x4, 0x2, 0x400, 0x800
    agent.put({"a": "old", "b": "old"})
    libc = ctypes.CDLL(None, use_errno=True)
    watcher = libc.inotify_init1(os.O_NONBLOCK)
    try:
        mask = attributes | modified | deleted | moved
        assert libc.inotify_add_watch(watcher, os.fsencode(root / "a"), mask) >= 0
        outcome = agent.apply(write("a", "new"), write("b", "new"))
        assert len(outcome.done) == 2
        raw = os.read(watcher, 4096)
    finally:
        os.close(watcher)
    events = [struct.unpack_from("<iIII", raw, at)[1] for at in range(0, len(raw), 16)]
    assert events[0] == moved or events[:2] == [attributes, deleted]


# --- SIGKILL

WRITER = textwrap.dedent(
    """
    import os, random, signal, sys
    from pathlib import Path
    from agent.disk import Disk
    from agent.ledger import Ledger, LedgerState
    from agent.model import Cursor, Entry, RelPath, Remove, Write, digest_of

    home = Path(sys.argv[1])
    disk, ledger = Disk(home / "project", home / "staging"), Ledger(home / "state/ledger.db")
    state = ledger.load()
    disk.open(state.directories if state else ())
    disk.clear_staging()
    known = dict(state.stats) if state else {}
    entries = state.tree.entries if state else {}
    at = state.tree.cursor.revision if state else 0
    if state:
        disk.discard(state.leftovers)
    chance = random.Random(at)
    steps = int(sys.argv[2])

    def die(event, arguments):
        # Before each call that changes a name: the kill falls between any two of them.
        global steps
        if event in ("open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"):
            steps -= 1
            if not steps:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    while True:
        at += 1
        operations = {}
        for _ in range(chance.randrange(1, 6)):
            path = RelPath(chance.choice(["a", "b", "d/a", "d/e/b", "f/g"]) + str(chance.randrange(4)))
            if chance.random() < 0.3:
                operations[path] = Remove(path, Entry(at, None))
            else:
                content = f"{path} at {at}".encode()
                operations[path] = Write(path, Entry(at, digest_of(content), len(content)), content)
        batch = list(operations.values())
        ledger.intend([o.path for o in batch if isinstance(o, Write) and o.path not in known])
        outcome = disk.apply(batch, known)
        for done in outcome.done:
            known.pop(done.operation.path, None)
            if done.stat:
                known[done.operation.path] = done.stat
        ledger.record(outcome.done, Cursor("e", at), made=outcome.made, gone=outcome.gone)
    """
)


def test_a_kill_at_any_point_loses_work_but_never_truth(tmp_path: Path) -> None:
    """What a restart finds: every file is whole, and as recorded, or known to be in doubt, or known to be ours."""
    chance = Random(7)
    in_doubt = 0
    for _ in range(200 if NIGHTLY else 10):
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(chance.randrange(1, 200))]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL

        ledger = Ledger(tmp_path / "state/ledger.db")
        state = ledger.load()
        ledger.close()
        state = state or LedgerState(Tree(), {})
        with opened(tmp_path / "project", tmp_path / "staging") as agent:
            agent.disk.clear_staging()
            audit = agent.disk.audit(state.tree, state.stats)
            claimed = state.tree.files()
            doubted = {drift.path for drift in audit.drifts}
            on_disk = agent.disk.scan()
            assert on_disk.keys() <= claimed.keys() | state.intended
            assert claimed.keys() == audit.stats.keys() | doubted
            for path in on_disk:
                content = (tmp_path / "project" / path).read_bytes()
                assert content.startswith(f"{path} at ".encode())
                assert (digest_of(content) == claimed[path].digest) if path in audit.stats else True
            in_doubt += len(doubted) + len(state.intended)
    assert in_doubt > 0, "no kill ever fell between the disk and the ledger: this run proved nothing"
