"""A path that may not be written is that path's problem: what else the transaction has lands, and nothing is half done.

Immutable and append-only files and directories are made with chattr, by root, on a real file system.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.fs import transaction
from agent.fs.project_dir import ProjectDir
from tests.agent.disks import Agent, attribute, in_staging, kinds, opened, remove, seen, staged, write


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "project"


@pytest.fixture
def agent(root: Path, tmp_path: Path) -> Iterator[Agent]:
    root.mkdir()
    with opened(root, tmp_path / "staging") as agent:
        yield agent


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("flag", ["i", "a"])
def test_of_a_file_the_others_are_written_and_it_is_once_it_may_be(
    agent: Agent, root: Path, tmp_path: Path, flag: str, exchanges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cannot(*names: str, **where: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    if not exchanges:
        monkeypatch.setattr(transaction, "exchange", cannot)
    agent.put({"a": "1", "b": "1", "src/c": "1"})
    operations = [write("b", "2"), write("a", "2"), write("src/d", "2"), remove("src/c")]
    with attribute(flag, root / "a"):
        result = agent.apply(*operations)
        assert not result.rolled_back
        assert kinds(result) == [("path_unusable", "a", "not_permitted")]
        assert result.problems[0].waiting
        assert [done.operation.path for done in result.done] == ["b", "src/d", "src/c"]
        assert seen(root) == {"a": "1", "b": "2", "src/d": "2"}
        assert in_staging(tmp_path / "staging") == []
    assert kinds(agent.apply(write("a", "2"))) == []
    assert seen(root) == {"a": "2", "b": "2", "src/d": "2"}


def test_one_that_cannot_be_removed_is_not_taken_for_removed(agent: Agent, root: Path) -> None:
    agent.put({"a": "1", "b": "1"})
    for operations in ([remove("a"), remove("b")], [remove("a")]):
        with attribute("i", root / "a"):
            result = agent.apply(*operations)
        assert (result.rolled_back, kinds(result)) == (False, [("path_unusable", "a", "not_permitted")])
        assert "a" not in [done.operation.path for done in result.done]
        assert seen(root) == {"a": "1"}
    assert kinds(agent.apply(remove("a"))) == []
    assert seen(root) == {}


def test_of_a_directory_all_that_is_in_it_waits(agent: Agent, root: Path, tmp_path: Path) -> None:
    agent.put({"src/a": "1", "b": "1"})
    operations = [
        write("src/a", "2"), write("src/new", "2"), staged(agent.disk, "src/x/y", "2"),
        staged(agent.disk, "z/w", "2"), write("b", "2"),
    ]  # fmt: skip
    with attribute("i", root / "src"):
        result = agent.apply(*operations)
        assert not result.rolled_back
        assert {(p.kind, p.path, p.rule) for p in result.problems} == {
            ("path_unusable", path, "not_permitted") for path in ("src/a", "src/new", "src/x/y")
        }
        assert seen(root) == {"src/a": "1", "b": "2", "z/w": "2"}
        assert in_staging(tmp_path / "staging") == []


def test_a_directory_that_has_to_go_stays_and_nothing_else_is_undone(agent: Agent, root: Path) -> None:
    """Its last file goes and a file is to stand in its place, but the directory above may not be changed."""
    agent.put({"src/a/one": "1", "b": "1"})
    with attribute("i", root / "src"):
        result = agent.apply(remove("src/a/one"), write("src/a", "2"), write("b", "2"))
        assert (result.rolled_back, kinds(result)) == (False, [("path_unusable", "src/a", "not_permitted")])
        assert seen(root) == {"src/a/": "", "b": "2"}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOENT, errno.ETXTBSY, errno.EAGAIN])
def test_so_it_is_whatever_the_system_says_of_one_path(
    agent: Agent, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Also where the file had been moved away already: it is put back."""
    agent.put({"a": "1", "b": "1"})
    real = os.rename

    def refuse(source: str, target: str, **where: int) -> None:
        if target == "a" and source.startswith("file-") and moved:
            moved.clear()
            raise OSError(number, os.strerror(number))
        real(source, target, **where)

    def cannot(*names: str, **where: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    moved = [1]
    (root / "a").unlink()
    (root / "a").symlink_to("b")  # what is no file is moved to staging, not copied
    monkeypatch.setattr(transaction, "exchange", cannot)
    monkeypatch.setattr(os, "rename", refuse)
    result = agent.apply(write("a", "2"), write("b", "2"))
    monkeypatch.undo()
    assert not result.rolled_back
    assert kinds(result)[-1][:2] == ("path_unusable", "a")
    assert seen(root) == {"a": "-> b", "b": "2"}
    assert in_staging(tmp_path / "staging") == []


def test_a_first_tree_beside_such_a_file_lands_but_for_it(tmp_path: Path, root: Path) -> None:
    root.mkdir()
    (root / "a").write_text("theirs")
    disk = ProjectDir(root, tmp_path / "staging")
    disk.open()
    with attribute("i", root / "a"):
        result = disk.apply([staged(disk, "a", "1"), staged(disk, "src/b", "1")], {})
        assert not result.rolled_back
        assert seen(root) == {"a": "theirs", "src/b": "1"}
    disk.close()
