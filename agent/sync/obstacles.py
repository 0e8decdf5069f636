"""Tells when what stands in the way of a path has moved, so that the path is tried again at once.

A path that could not be written (a directory or a link is there, a file where a directory is needed) is possible again
when somebody removes that. The drift watch does not see it, since it watches only the directories that hold our files;
so those few paths are looked at by name, once a second, on every file system and without a watch of the kernel's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Sequence

from agent.core.model import RelPath
from agent.fs.project_dir import ProjectDir

LOOK_EVERY = 1.0
"""Seconds between two looks."""

MOST = 100
"""Paths that are looked at, in their order: 2 ms of stats. Further ones are tried again at growing intervals alone."""


async def watch(
    disk: ProjectDir, paths: Callable[[], Collection[RelPath]], on_moved: Callable[[Sequence[RelPath]], None]
) -> None:
    """Look at what stands at `paths` until cancelled; call `on_moved` with those where it is not what it was."""
    seen: dict[RelPath, object] = {}
    while True:
        await asyncio.sleep(LOOK_EVERY)
        here = {path: disk.obstacle(path) for path in sorted(paths())[:MOST]}
        moved = [path for path, found in here.items() if path in seen and seen[path] != found]
        seen = here
        if moved:
            on_moved(moved)
