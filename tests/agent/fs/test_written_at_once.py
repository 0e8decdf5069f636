"""A program that writes a file in the moment between the agent's rename and its stat: that stat is the program's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from agent.core.model import Write
from agent.fs import transaction
from agent.fs.project_dir import ProjectDir
from tests.agent.disks import Agent, kinds, staged, write

Then = Callable[[Path], object]


def rewrite(path: Path) -> None:
    """As `echo … > FILE` does: the inode stays."""
    path.write_text("theirs, and longer")


def same_size(path: Path) -> None:
    before = path.stat().st_mtime_ns
    path.write_text("TWO")
    while path.stat().st_mtime_ns == before:  # the clock of some file systems ticks every few milliseconds
        path.write_text("TWO")


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write("!")
    os.utime(path, ns=(0, 0))


@pytest.fixture
def then(monkeypatch: pytest.MonkeyPatch, root: Path) -> Callable[[Then], None]:
    """Have something done to `a` right after the next rename or exchange that puts a file there."""

    def arrange(do: Then) -> None:
        def after(real: Callable[..., None]) -> Callable[..., None]:
            def call(source: str, target: str, **at: int) -> None:
                real(source, target, **at)
                if target == "a":
                    do(root / "a")

            return call

        monkeypatch.setattr(transaction, "exchange", after(transaction.exchange))
        monkeypatch.setattr(os, "rename", after(os.rename))

    return arrange


@pytest.mark.parametrize("do", [rewrite, same_size, append])
@pytest.mark.parametrize("before", [{}, {"a": "one"}], ids=["new", "replaced"])
@pytest.mark.parametrize("nested", [None, False, True], ids=["content", "staged", "staged-tree"])
def test_it_is_reported_and_what_stands_there_is_not_taken_for_ours(
    agent: Agent, disk: ProjectDir, root: Path, then: Callable[[Then], None], do: Then,
    before: dict[str, str], nested: bool | None,
) -> None:  # fmt: skip
    (root / "other").touch()  # the root is not promoted whole
    agent.put(before)
    then(do)
    prepare = partial(staged, disk, nested=nested) if nested is not None else write
    operation: Write = prepare("a", "two", version=2)
    result = agent.apply(operation)
    assert kinds(result) == [("drift", "a", "changed")]
    (done,) = result.done
    assert done.stat is None
    assert (root / "a").read_text() != "two"


def test_what_nobody_writes_is_ours(agent: Agent, disk: ProjectDir, root: Path) -> None:
    for version, operation in enumerate((write("a", "1"), write("a", "22", version=2)), 1):
        result = agent.apply(operation)
        assert (kinds(result), result.done[0].stat is not None) == ([], True), version
    result = agent.apply(staged(disk, "b/c", "3"), staged(disk, "a", "333", version=3))
    assert kinds(result) == []
    assert all(done.stat is not None for done in result.done)


WRITER = """
import os, sys
seen = None
print("up", flush=True)
while True:
    try:
        descriptor = os.open(sys.argv[1], os.O_WRONLY)
    except FileNotFoundError:
        continue
    inode = os.fstat(descriptor).st_ino
    if inode != seen:
        seen = inode
        os.write(descriptor, b"theirs, and longer than ours")
    os.close(descriptor)
"""


def test_a_real_program_that_writes_as_fast_as_it_can_is_never_taken_for_us(agent: Agent, root: Path) -> None:
    """It owns the file at some time; whenever the agent says that what stands there is its own, it is."""
    agent.put({"a": "0"})
    with subprocess.Popen([sys.executable, "-c", WRITER, str(root / "a")], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            wrong = 0
            for version in range(2, 600):
                operation = write("a", f"{version}", version=version)
                (done,) = agent.apply(operation).done
                found = (root / "a").stat()
                if done.stat is not None and done.stat.matches(found):
                    # Nobody has touched it since, so it must hold what we wrote.
                    wrong += (root / "a").read_bytes() != operation.content and done.stat.matches(
                        (root / "a").stat()
                    )
            assert wrong == 0
        finally:
            writer.kill()
