"""The machines' disk is full, or without inodes, for real; and gives both back."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from soak.disk import MachinesDisk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[MachinesDisk]:
    disk = MachinesDisk(tmp_path / "machines")
    disk.mount()
    if not disk.mounted:
        pytest.skip("a disk of the machines' own needs root")
    yield disk
    disk.unmount()


def fails_to_write(place: Path) -> bool:
    try:
        (place / "new").write_bytes(b"x" * 100_000)
    except OSError as error:
        return error.errno == errno.ENOSPC
    return False


def test_there_is_no_room_until_it_is_cleared(disk: MachinesDisk) -> None:
    (disk.place / "before").write_bytes(b"x" * 1_000_000)
    for use_up in (disk.fill, disk.use_up_inodes):
        assert use_up() is None
        assert fails_to_write(disk.place)
        disk.clear()
        assert not fails_to_write(disk.place)
        (disk.place / "new").unlink()
    assert (disk.place / "before").stat().st_size == 1_000_000


def test_without_a_disk_of_their_own_it_says_so(tmp_path: Path) -> None:
    disk = MachinesDisk(tmp_path / "machines")
    assert disk.fill() == "the machines have no disk of their own: that needs root"
    disk.clear()
    disk.unmount()
