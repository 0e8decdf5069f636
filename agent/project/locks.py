"""Gives write-back the lock files that installs make in their staging directory.

An install by package.json alone decides versions; the lock file that says which stays in the stage, and the next
machine decides anew. Where the project's rules let it, that file is handed over, once for each package.json: it is
offered like any other output, and whoever takes it judges what it names (docs/write-back.md).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from agent.project import reading
from agent.project.choice import LARGEST_PACKAGE, ProjectUnreadable, read_small
from agent.project.managers import Manager
from agent.project.reading import LARGEST_LOCK, Dependencies

MADE: Mapping[Manager, str] = {
    Manager.NPM: "package-lock.json",
    Manager.PNPM: "pnpm-lock.yaml",
    Manager.YARN: "yarn.lock",
    Manager.BUN: "bun.lock",
}
"""The file that each makes where there is none."""


@dataclass(frozen=True, slots=True)
class Locks:
    """Who takes lock files: `wanted` says which paths of the project, `made` is given one."""

    wanted: Callable[[str], bool]
    made: Callable[[str, bytes], None]


class MadeLocks:
    """What the installs of one project have made. `to` None: nobody takes any, and none are made."""

    def __init__(self, to: Locks | None, top: Path) -> None:
        self._to = to
        self._top = top
        self._handed_over: str | None = None
        """The digest of the package.json whose lock file was handed over last."""
        self._same: tuple[str, str] | None = None
        """The key with the lock file that was made, and the key that it was made under: one node_modules."""

    def wanted(self, wanted: Dependencies) -> bool:
        """Return whether an install of this should make a lock file."""
        return self._to is not None and self._to.wanted(self._path(wanted))

    def _path(self, wanted: Dependencies) -> str:
        name = wanted.manager.lock or MADE[wanted.manager.name]
        return (wanted.root.relative_to(self._top) / name).as_posix()

    async def hand_over(self, wanted: Dependencies, staged: Dependencies, *, scripts: bool) -> None:
        """Hand over the lock file of a finished install, if it is another than the project's.

        Args:
            wanted: what was to be installed, in the project.
            staged: its copy, where it was installed.
            scripts: as `reading.dependencies` takes it.
        """
        content = await asyncio.to_thread(self._made, wanted, staged, scripts)
        if content is not None and self._to is not None:
            self._to.made(self._path(wanted), content)

    def _made(self, wanted: Dependencies, staged: Dependencies, scripts: bool) -> bytes | None:
        name = wanted.manager.lock or MADE[wanted.manager.name]
        content = read_small(staged.root / name, LARGEST_LOCK)
        package = read_small(staged.root / "package.json", LARGEST_PACKAGE) or b""
        digest = hashlib.sha256(package).hexdigest()
        if (
            content is None
            or digest == self._handed_over
            or content == read_small(wanted.root / name, LARGEST_LOCK)
        ):
            return None
        try:
            self._same = reading.dependencies(staged.root, scripts=scripts).key, staged.key
        except ProjectUnreadable:
            return None
        self._handed_over = digest
        return content

    def same(self, installed: str | None, wanted: str) -> bool:
        """Return whether the node_modules of one key is that of another: so a lock file that comes back installs
        nothing.
        """
        return installed == wanted or (wanted, installed) == self._same
