"""A layer of what pnpm, yarn and bun install: their links, their hard links, their workspaces."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from agent.devserver.install import InstallOutcome
from agent.project.reading import Dependencies, dependencies
from tests.agent.devserver.installs import Bench, needs_npm, write
from tests.agent.devserver.test_package_managers import MANAGERS, by_hand
from tests.agent.modules.archives import Service, listing, serving
from tests.agent.modules.test_layers import World, served

pytestmark = [needs_npm, pytest.mark.nightly]
SAYS = "console.log(require('react').version, require('library').react)"


def says(directory: Path) -> str:
    return subprocess.check_output(["node", "-e", SAYS], cwd=directory, text=True).strip()


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as it:
        yield it


@pytest.fixture
async def world(tmp_path: Path, service: Service) -> AsyncIterator[World]:
    async with httpx.AsyncClient() as http:
        yield World(tmp_path, service, http)


async def workspace(bench: Bench, manager: str, lock: Path | None = None) -> Dependencies:
    """Two packages with a React each, one of which uses the other."""
    package, make_lock, more = MANAGERS[manager]
    linked = "*" if manager in ("npm", "yarn") else "workspace:*"
    app, library = bench.root / "packages/app", bench.root / "packages/library"
    write(app, name="app", dependencies={"react": "19.1.0", "library": linked})
    write(library, name="library", version="1.0.0", main="index.js", dependencies={"react": "18.3.1"})
    (library / "index.js").write_text("exports.react = require('react').version\n")
    write(bench.root, private=True, workspaces=["packages/*"], **more)
    if manager == "pnpm":
        (bench.root / "pnpm-workspace.yaml").write_text("packages: ['packages/*']\n")
    if manager == "yarn-4":
        (bench.root / "yarn.lock").touch()
    if lock is None:
        await asyncio.to_thread(by_hand, bench.root, package, make_lock)
    else:
        (bench.root / lock.name).write_bytes(lock.read_bytes())
    return dependencies(bench.root)


@pytest.mark.parametrize("manager", MANAGERS)
async def test_what_a_manager_installed_comes_out_of_a_layer(world: World, manager: str) -> None:
    """Both machines of a workspace: every package finds its own version, and each link is where it was."""
    first = world.machine("first", real_npm=True)
    wanted = await workspace(first, manager)
    assert (await first.install(wanted)).outcome is InstallOutcome.INSTALLED, first.lines
    await served(first)
    assert world.count("sent") == 1

    second = world.machine("second", real_npm=True)
    again = await workspace(second, manager, first.root / str(wanted.manager.lock))
    assert again.key == wanted.key
    result = await second.install(again)
    assert (result.outcome, result.problem) == (InstallOutcome.LAYER, None)
    assert await asyncio.to_thread(says, second.root / "packages/app") == "19.1.0 18.3.1"
    for place in (".", "packages/app", "packages/library"):
        assert listing(second.root / place / "node_modules") == listing(first.root / place / "node_modules")
    assert (await second.install(again)).outcome is InstallOutcome.CURRENT
