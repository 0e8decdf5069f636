"""What is on a disk and in /proc while others write there.

`Path.rglob` and a list of pids followed by a read both raise when a directory or a process goes between the two steps.
A test that waits for a state asks again and again while programs run, so it asks here: what goes meanwhile is gone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def files_below(root: Path, *, but: tuple[str, ...] = ()) -> Iterator[Path]:
    """Every regular file below `root`, without following links; directories and files named in `but` left out."""
    for directory, names, files in os.walk(root):
        names[:] = [name for name in names if name not in but]
        for name in files:
            path = Path(directory, name)
            if name not in but and path.is_file() and not path.is_symlink():
                yield path


def contents_below(root: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """What the regular files below `root` hold, by their path from there."""
    found = {}
    for path in files_below(root, but=but):
        with contextlib.suppress(FileNotFoundError):
            found[path.relative_to(root).as_posix()] = path.read_bytes()
    return found


def command_of(pid: int) -> bytes:
    """A process's command line, its words ended by NUL; empty for one that is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def descendants_of(pid: int) -> list[int]:
    """A process's descendants, all generations."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                found += [int(child), *descendants_of(int(child))]
    return found


def open_here() -> list[str]:
    """What this process's descriptors stand for."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return found
