"""What the disk's tests share: operations from text, and the tree as a reader sees it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.core.model import Entry, Operation, RelPath, Remove, Write, digest_of
from agent.fs.inspect import FileStat
from agent.fs.project_dir import ProjectDir
from agent.fs.transaction import TransactionResult
from agent.snapshot.download import StagedSnapshot


def write(path: str, content: bytes | str, *, version: int = 1, executable: bool = False) -> Write:
    data = content.encode() if isinstance(content, str) else content
    return Write(RelPath(path), Entry(version, digest_of(data), len(data), executable), content=data)


def staged(
    disk: ProjectDir,
    path: str,
    content: str,
    *,
    version: int = 1,
    executable: bool = False,
    nested: bool = True,
) -> Write:
    """A write whose bytes wait in staging already: in the tree, or under a name of their own."""
    stage = disk.stage(RelPath(path) if nested else None)
    stage.write(content.encode())
    done = stage.finish()
    return Write(RelPath(path), Entry(version, done.digest, done.size, executable), staged=done.name)


def remove(path: str, *, version: int = 2) -> Remove:
    return Remove(RelPath(path), Entry(version, None))


def seen(root: Path) -> dict[str, str]:
    """Every file below `root` as a reader finds it; empty directories as `name/`."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_text()
        elif not any(path.iterdir()):
            found[name + "/"] = ""
    return found


def in_staging(staging: Path) -> list[str]:
    """The names that wait in staging."""
    return os.listdir(staging)


def kinds(result: TransactionResult) -> list[tuple[str, str | None, str | None]]:
    return [(p.kind, p.path, p.rule) for p in result.problems]


class Agent:
    """A disk and what an agent would remember of it."""

    def __init__(self, disk: ProjectDir) -> None:
        self.disk = disk
        self.known: dict[RelPath, FileStat] = {}
        self.tree: dict[RelPath, Entry] = {}

    def apply(
        self, *operations: Operation, overwrite_drift: bool = True, sweep: bool = True
    ) -> TransactionResult:
        result = self.disk.apply(
            operations, self.known, tree=self.tree, overwrite_drift=overwrite_drift, sweep=sweep
        )
        for done in result.done:
            path = done.operation.path
            self.tree[path] = done.operation.entry
            self.known.pop(path, None)
            if done.stat is not None:
                self.known[path] = done.stat
        return result

    def put(self, files: Mapping[str, str]) -> None:
        result = self.apply(*(write(path, content) for path, content in files.items()))
        assert not result.problems, result


@contextmanager
def opened(root: Path, staging: Path) -> Iterator[Agent]:
    """An agent's disk for as long as the block lasts."""
    disk = ProjectDir(root, staging)
    disk.open()
    try:
        yield Agent(disk)
    finally:
        disk.close()


def mounted(place: Path, *options: str, kind: str = "tmpfs", source: str = "tmpfs") -> None:
    """Mount a file system of its own; skips, with the reason, where that cannot be done."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", kind, *(["-o", ",".join(options)] if options else []), source, str(place)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f"this machine cannot {' '.join(command)}: {run.stderr.strip()}")


@contextmanager
def attribute(flag: str, path: Path) -> Iterator[None]:
    """`path` with a file attribute; skips where that cannot be."""
    run = subprocess.run(["chattr", f"+{flag}", path], capture_output=True, text=True, check=False)
    if run.returncode:
        pytest.skip(f"chattr +{flag} is not possible here: {run.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["chattr", f"-{flag}", path], check=True)


def staged_files(snapshot: StagedSnapshot, directory: Path) -> dict[str, bytes]:
    """What is staged, by path."""
    places = {path: directory / "staging" / name for path, name in snapshot.staged.items()}
    return {path: (at / path if at.is_dir() else at).read_bytes() for path, at in places.items()}
