"""Directories deeper than any stack, directories that change places with files, and files that nobody may read."""

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
from immutables import Map

from agent.core.model import Cursor, Entry, RelPath, Tree, digest_of
from agent.fs import transaction
from agent.fs.inspect import UNREAD
from agent.fs.project_dir import ProjectDir
from agent.fs.turns import at_once
from tests.agent.disks import Agent, in_staging, kinds, seen, write

DEEP = 1_500


def dig(place: Path, levels: int = DEEP) -> None:
    """Make directories so far below `place` that no path names them."""
    place.mkdir()
    at = os.open(place, os.O_RDONLY)
    for _ in range(levels):
        os.mkdir("d", dir_fd=at)
        below = os.open("d", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = below
    os.close(os.open("bottom", os.O_CREAT, dir_fd=at))
    os.close(at)


@contextmanager
def few_descriptors() -> Iterator[None]:
    """As a machine has them: fewer than there are levels."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- deep directories


@pytest.mark.parametrize("levels", [0, 1, DEEP])
def test_what_is_in_staging_is_removed_at_the_start_however_deep(tmp_path: Path, levels: int) -> None:
    staging = tmp_path / "staging"
    staging.mkdir(mode=0o700)
    dig(staging / "file-0123abcd-7", levels)
    (staging / "theirs").write_text("not of our form")
    disk = ProjectDir(tmp_path / "project", staging)
    with few_descriptors():
        disk.open()
    try:
        assert os.listdir(staging) == ["theirs"]
    finally:
        disk.close()


# --- a directory that takes a file's place between the look and the exchange


def swapped(monkeypatch: pytest.MonkeyPatch, place: Path, make: Callable[[Path], None]) -> None:
    """Let a program put a directory at `place` in the moment before the exchange."""
    real, left = transaction.exchange, 1

    def exchange(*names: str, **directories: int) -> None:
        nonlocal left
        if place.is_file() and left:
            left -= 1
            place.unlink()
            make(place)
        real(*names, **directories)

    monkeypatch.setattr(transaction, "exchange", exchange)


def a_full_one(place: Path) -> None:
    place.mkdir()
    (place / "theirs").write_text("x")


@pytest.mark.parametrize("make", [Path.mkdir, a_full_one, dig], ids=["empty", "full", "deep"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_directory_that_comes_back_from_the_exchange_goes_back(
    agent: Agent,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None],
    alone: bool,
) -> None:
    agent.put({"a": "1", "b": "1"})
    swapped(monkeypatch, root / "a", make)
    writes = [write("a", "2")] if alone else [write("a", "2"), write("b", "2")]
    result = agent.apply(*writes)
    assert kinds(result) == [("path_unusable", "a", "directory_in_the_way")]
    assert (root / "a").is_dir()
    assert (root / "b").read_text() == ("1" if alone else "2")
    assert not result.rolled_back
    assert in_staging(tmp_path / "staging") == []
    subprocess.run(["rm", "-rf", root / "a"], check=True)  # deeper than what removes this test's directory


# --- files that cannot be read


HOLD = """
import fcntl, os, signal, sys
signal.signal(signal.SIGIO, signal.SIG_IGN)
at = os.open(sys.argv[1], os.O_RDWR)
try:
    fcntl.fcntl(at, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    print("held", flush=True)
except OSError as error:
    print(error, flush=True)
sys.stdin.read()
"""


@contextmanager
def leased(place: Path) -> Iterator[None]:
    """Hold a write lease, as a Samba server does: whoever opens the file without waiting gets EAGAIN."""
    command = [sys.executable, "-c", HOLD, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        try:
            if (said := holder.stdout.readline().strip()) != "held":
                pytest.skip(f"this file system has no leases: {said}")
            yield
        finally:
            holder.stdin.close()


def touch(place: Path) -> None:
    os.utime(place, ns=(1, 1))


def test_a_leased_file_is_that_files_trouble_and_the_others_are_written(agent: Agent, root: Path) -> None:
    agent.put({"a": "1", "b": "1"})
    touch(root / "a")
    with leased(root / "a"):
        result = agent.apply(write("a", "2"), write("b", "2"))
    assert (result.rolled_back, kinds(result)) == (False, [("drift", "a", "changed")])
    assert seen(root) == {"a": "2", "b": "2"}


def test_an_audit_takes_it_for_unconfirmed(agent: Agent, root: Path) -> None:
    agent.put({"a": "1", "b": "1"})
    entries = {RelPath(p): Entry(1, digest_of(b"1"), 1) for p in ("a", "b")}
    touch(root / "a")
    touch(root / "b")
    with leased(root / "a"):
        audit = at_once(agent.disk.audit_steps(Tree(Cursor("e", 1), Map(entries)), agent.known))
    assert [(drift.path, drift.digest) for drift in audit.drifts] == [("a", UNREAD)]
    assert audit.stats.keys() == {"b"}


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EIO, errno.EPERM, errno.ETXTBSY, errno.EMFILE])
def test_so_it_is_whatever_the_system_says_of_one_file(
    agent: Agent, root: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    agent.put({"a": "1", "b": "1"})
    entries = {RelPath(p): Entry(1, digest_of(b"1"), 1) for p in ("a", "b")}
    touch(root / "a")
    real = os.open

    def refuse(name: str, *more: int, **where: int) -> int:
        if name == "a":
            raise OSError(number, os.strerror(number))
        return real(name, *more, **where)

    monkeypatch.setattr(os, "open", refuse)
    audit = at_once(agent.disk.audit_steps(Tree(Cursor("e", 1), Map(entries)), agent.known))
    monkeypatch.undo()
    assert [drift.path for drift in audit.drifts] == ["a"]


def test_what_stands_in_the_way_is_told_from_what_stood_there(agent: Agent, root: Path) -> None:
    path = RelPath("src/a")
    looks = [agent.disk.obstacle(path)]
    for step in (
        lambda: (root / "src").symlink_to("/nowhere"),
        lambda: (root / "src").unlink(),
        lambda: (root / "src").write_text("a file"),
        lambda: ((root / "src").unlink(), (root / "src" / "a").mkdir(parents=True)),
        lambda: (root / "src" / "a" / "theirs").write_text("x"),
        lambda: ((root / "src" / "a" / "theirs").unlink(), (root / "src" / "a").rmdir()),
    ):
        step()
        assert agent.disk.obstacle(path) == agent.disk.obstacle(path)
        looks.append(agent.disk.obstacle(path))
    assert all(before != after for before, after in itertools.pairwise(looks))
