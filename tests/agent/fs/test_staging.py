"""Opening a project and its staging directory: whose they are, what is refused, and what is cleared."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from agent.core.errors import RootUnusable
from agent.fs.project_dir import ProjectDir
from tests.agent.disks import Agent, in_staging, staged


def test_root_and_staging_are_made_and_locked(tmp_path: Path) -> None:
    first = ProjectDir(tmp_path / "deep/project", tmp_path / "deep/staging")
    first.open()
    second = ProjectDir(tmp_path / "deep/project", tmp_path / "deep/staging")
    with pytest.raises(RootUnusable, match="in use by another agent"):
        second.open()
    first.close()
    second.open()
    second.close()
    assert stat.S_IMODE((tmp_path / "deep/staging").stat().st_mode) == 0o700


@pytest.mark.parametrize(("root", "staging"), [("p", "p/s"), ("s/p", "s"), ("p", "p")])
def test_staging_and_root_may_not_contain_each_other(tmp_path: Path, root: str, staging: str) -> None:
    with pytest.raises(RootUnusable, match="must not contain each other"):
        ProjectDir(tmp_path / root, tmp_path / staging).open()


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "project").write_text("")
    with pytest.raises(RootUnusable, match="cannot use the project directory"):
        ProjectDir(tmp_path / "project", tmp_path / "staging").open()


def test_a_staging_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "staging").write_text("")
    with pytest.raises(RootUnusable, match="cannot use the staging directory"):
        ProjectDir(tmp_path / "project", tmp_path / "staging").open()


def test_a_staging_directory_that_others_could_write_in_is_made_private(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    (tmp_path / "staging").chmod(0o777)
    disk = ProjectDir(tmp_path / "project", tmp_path / "staging")
    disk.open()
    disk.close()
    assert stat.S_IMODE((tmp_path / "staging").stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a directory that is not its own")
def test_a_staging_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "staging").mkdir()
    os.chown(tmp_path / "staging", 12345, 12345)
    with pytest.raises(RootUnusable, match=r"belongs to another user \(uid 12345\)"):
        ProjectDir(tmp_path / "project", tmp_path / "staging").open()


def test_clearing_staging_takes_our_names_only(tmp_path: Path) -> None:
    disk = ProjectDir(tmp_path / "project", tmp_path / "staging")
    disk.open()
    disk.stage().write(b"left by a kill")
    (tmp_path / "staging/precious").write_text("a user's")
    assert disk.clear_staging() == 1
    assert in_staging(tmp_path / "staging") == ["precious"]
    disk.close()


def test_a_run_that_ends_well_leaves_staging_empty(tmp_path: Path) -> None:
    for _ in range(2):
        disk = ProjectDir(tmp_path / "project", tmp_path / "staging")
        disk.open()
        Agent(disk).put({"a": "1"})
        disk.close()
        assert os.listdir(tmp_path / "staging") == []


def test_what_an_earlier_run_left_in_staging_goes_and_no_other_names(tmp_path: Path) -> None:
    staging = tmp_path / "staging"
    first = ProjectDir(tmp_path / "project", staging)
    first.open()
    first.stage().write(b"left by a kill")
    staged(first, "a/b", "left by a kill")
    first.close()
    (tmp_path / "precious").write_text("a user's")
    (staging / "tree-00000000-0").symlink_to(tmp_path)
    (staging / "file-00000000-1").mkdir()  # what took a file's place as it was replaced
    (staging / "tree-of-another-kind").mkdir()
    second = ProjectDir(tmp_path / "project", staging)
    second.open()
    second.close()
    assert os.listdir(staging) == ["tree-of-another-kind"]
    assert (tmp_path / "precious").exists()
