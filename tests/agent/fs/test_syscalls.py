"""Two names exchanged in one step, and every byte written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.fs.syscalls import NO_EXCHANGE, exchange, path_of, write_all
from tests.agent.disks import seen


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    """An open directory."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_two_names_exchange_what_they_stand_for(tmp_path: Path, directory: int) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").symlink_to("nowhere")
    inode = (tmp_path / "a").stat().st_ino
    exchange("a", "b", src_dir_fd=directory, dst_dir_fd=directory)
    assert seen(tmp_path) == {"a": "-> nowhere", "b": "1"}
    assert (tmp_path / "b").stat().st_ino == inode


@pytest.mark.parametrize("there", ["a", "b"])
def test_a_name_that_is_not_there_changes_nothing(tmp_path: Path, directory: int, there: str) -> None:
    (tmp_path / there).write_text("1")
    with pytest.raises(FileNotFoundError):
        exchange("a", "b", src_dir_fd=directory, dst_dir_fd=directory)
    assert seen(tmp_path) == {there: "1"}


def test_a_system_without_the_call_says_so(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("1")
    monkeypatch.setattr("agent.fs.syscalls._LIBC", object())
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)) as refused:
        exchange("a", "a", src_dir_fd=directory, dst_dir_fd=directory)
    assert refused.value.errno in NO_EXCHANGE


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview])
def test_what_one_write_cuts_short_is_written_by_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: type
) -> None:
    real, content = os.write, bytes(range(256)) * 3
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:100])))
    with (tmp_path / "file").open("wb", buffering=0) as file:
        write_all(file.fileno(), form(content))
    assert (tmp_path / "file").read_bytes() == content


def test_a_directory_is_seen_where_it_was_moved(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    descriptor = os.open(tmp_path / "before", os.O_RDONLY)
    try:
        assert path_of(descriptor) == str(tmp_path / "before")
        (tmp_path / "before").rename(tmp_path / "after")
        assert path_of(descriptor) == str(tmp_path / "after")
    finally:
        os.close(descriptor)
    assert path_of(descriptor) == ""
