"""The contestants' file systems: new each time, and gone with the process that made them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.harness.scratch_fs import MEMORY, Ground

REPOSITORY = Path(__file__).parents[2]
SIZE = 64 << 20

CHILD = """
import sys
from pathlib import Path
from bench.harness.scratch_fs import Ground
ground = Ground(64 << 20)
for turn in range(2):
    with ground.fresh() as place:
        lines = Path("/proc/mounts").read_text().splitlines()
        mounted = next(line.split() for line in lines if str(place.parent) in line)
        print(mounted[0], mounted[2], place.parent, len(list(place.iterdir())), flush=True)
        (place / "left.txt").write_text("x")
        if turn:
            sys.stdin.read()
"""


def _needs_a_file_system() -> None:
    # Asked in a process of its own: the answer takes a mount namespace for good.
    ask = "from bench.harness.scratch_fs import Ground; print(Ground(64 << 20).lack or '')"
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    if done.stdout.strip():
        pytest.skip(f"no file system can be made here: {done.stdout.strip()}")


def test_each_turn_gets_a_new_file_system_and_a_killed_run_leaves_none_behind() -> None:
    _needs_a_file_system()
    images = set(os.listdir(MEMORY))
    command = [sys.executable, "-c", CHILD]
    child = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        for _ in range(2):
            device, kind, place, files = child.stdout.readline().split()
            assert (kind, files) == ("ext4", "0")
        assert place not in Path("/proc/mounts").read_text(), "seen by others"
        assert set(os.listdir(MEMORY)) <= images, "the image has a name"
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.communicate()
    shutil.rmtree(place)
    deadline = time.monotonic() + 10
    while device in _attached() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert device not in _attached()


def _attached() -> list[str]:
    command = ["losetup", "--list", "--noheadings", "--output", "NAME"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_where_none_can_be_made_it_is_a_directory_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    ground = Ground(SIZE)
    with ground.fresh() as place:
        assert list(place.iterdir()) == []
    assert not place.exists()
    assert ground.note == "on this disk, since only root can mount another"


def test_too_little_memory_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: f"/sbin/{program}")
    assert "GB free" in Ground(1 << 60).note
