"""Projects to install, an installer to watch, and a package manager that is one line of shell."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from uuid import UUID

import pytest

from agent.config import Settings
from agent.devserver.install import Installer, InstallResult
from agent.devserver.sandbox import Rights
from agent.project.locks import Locks
from agent.project.reading import Dependencies, dependencies

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
DEPENDENCY = {"name": "dep", "version": "1.0.0", "main": "index.js"}


def write(root: Path, **package: object) -> Dependencies:
    root.mkdir(parents=True, exist_ok=True)
    (root / "package.json").write_text(json.dumps({"name": "p", "version": "1.0.0", **package}))
    return dependencies(root)


def with_dependency(root: Path, **package: object) -> Dependencies:
    """A project that npm can install without a network: its dependency lies beside it."""
    (root / "dep").mkdir(parents=True, exist_ok=True)
    (root / "dep" / "package.json").write_text(json.dumps(DEPENDENCY))
    (root / "dep" / "index.js").write_text("module.exports = 1\n")
    return write(root, dependencies={"dep": "file:./dep"}, **package)


class Bench:
    """An installer, its settings and what it said."""

    def __init__(
        self,
        tmp_path: Path,
        rights: Rights | None = None,
        environ: dict[str, str] | None = None,
        locks: Locks | None = None,
        **settings: object,
    ) -> None:
        self.root = tmp_path / "project"
        self.lines: list[str] = []
        given: dict[str, object] = {"project_id": UUID(int=1), "session_id": UUID(int=1), **settings}
        self.settings = Settings(project_dir=self.root, **given)  # type: ignore[arg-type]
        self.installer = Installer(
            self.settings, environ=environ or os.environ, rights=rights or Rights(), on_line=self.lines.append,
            locks=locks,
        )  # fmt: skip

    async def install(self, wanted: Dependencies) -> InstallResult:
        await self.installer.open()
        return await self.installer.install(wanted)

    @property
    def leftovers(self) -> list[str]:
        """What an install has left beside what is kept: installs, and package managers that were fetched."""
        kept = ("cache", "managers")
        return [path.name for path in self.settings.modules.iterdir() if path.name not in kept]


FAKE = 'mkdir -p node_modules/thing && echo "$RANDOM $$" >node_modules/thing/made && echo done'


def fake(script: str = FAKE) -> tuple[str, ...]:
    return ("sh", "-c", script)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
