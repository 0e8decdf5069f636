"""Names that lead elsewhere: links planted before and while we write, directories that move, twins."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.fs import dirfd
from agent.fs.dirfd import is_case_twin
from tests.agent.disks import Agent, in_staging, kinds, opened, remove, seen, staged, write

IS_ROOT = os.geteuid() == 0


# --- links


@pytest.fixture(params=["held", "walked"])
def revalidation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With /proc, where held directories are asked for their place, and as on a system without it."""
    if request.param == "walked":
        monkeypatch.setattr(dirfd, "path_of", lambda descriptor: "")
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

    result = agent.apply(
        write("src/pages/home/a", "new"), write("src/pages/home/n", "new"), write("b", "new")
    )
    assert kinds(result) == [
        ("path_unusable", "src/pages/home/a", "symlink"),
        ("path_unusable", "src/pages/home/n", "symlink"),
    ]
    assert [done.operation.path for done in result.done] == ["b"]
    assert seen(outside) == before

    result = agent.apply(remove("src/pages/home/a"))
    assert kinds(result) == [("path_unusable", "src/pages/home/a", "symlink")]
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

    result = agent.apply(write("src/pages/b", "new"))
    assert kinds(result) == []
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
    result = agent.apply(write("a", "new"), remove("b"))
    assert kinds(result) == [("drift", "a", "not_a_file"), ("drift", "b", "not_a_file")]
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
        # On a busy machine the swapping process may sleep for long, with the link or the directory in place.
        end = time.monotonic() + 30
        for n in itertools.count():
            if n >= 500 and ((landed > 10 and refused > 0) or time.monotonic() > end):
                break
            result = agent.apply(write("src/deep/a", f"{n}"), write(f"src/deep/f{n % 7}", f"{n}"))
            refused += any(p.kind != "drift" for p in result.problems)
            landed += len(result.done) == 2
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
        result = agent.apply(write("README.MD", "twin"), write("SRC/b", "twin"), write("c", "fine"))
        assert kinds(result) == [
            ("path_unusable", "README.MD", "case_twin"),
            ("path_unusable", "SRC/b", "case_twin"),
        ]
        assert seen(root) == {"Readme.md": "first", "src/a": "1", "c": "fine"}
        assert result.made == ()

        assert kinds(agent.apply(remove("Readme.md"), write("README.MD", "renamed"))) == []
        assert seen(root) == {"README.MD": "renamed", "src/a": "1", "c": "fine"}

        assert kinds(agent.apply(remove("src/a"), write("SRC/a", "moved"), write("c", "new"))) == []
        assert seen(root) == {"README.MD": "renamed", "SRC/a": "moved", "c": "new"}


def test_twins_that_arrive_together_are_one_file_and_one_problem(case_blind: Path) -> None:
    root = case_blind / "project"
    with opened(root, case_blind / "staging") as agent:
        result = agent.apply(write("a.ts", "one"), write("A.ts", "two"), write("d/x", "1"), write("D/y", "2"))
        assert kinds(result) == [
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
        result = agent.apply(*(staged(agent.disk, path, text) for path, text in files.items()))
        assert kinds(result) == [
            ("path_unusable", "A.ts", "case_twin"),
            ("path_unusable", "D/y", "case_twin"),
            ("path_unusable", "d/X", "case_twin"),
        ]
        assert seen(root) == {"a.ts": "one", "d/x": "1"}
        assert in_staging(case_blind / "staging") == []


def test_what_makes_a_twin(root: Path, agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that sees case: two names of one file are no twins as long as both are listed."""
    agent.put({"Readme": "x"})
    os.link(root / "Readme", root / "rEADME")
    directory = os.open(root, os.O_RDONLY)
    try:
        found = (root / "rEADME").stat()
        assert not is_case_twin(directory, "rEADME", found)
        assert not is_case_twin(directory, "123", found)
        (root / "rEADME").unlink()  # from here on found by another name, as where case is ignored
        monkeypatch.setattr(os, "stat", lambda name, **_: found)
        assert is_case_twin(directory, "rEADME", found)
    finally:
        os.close(directory)
