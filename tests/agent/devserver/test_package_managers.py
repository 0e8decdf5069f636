"""npm, pnpm, yarn and bun as they are, and what is done where one is not here."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.devserver.install import InstallOutcome
from agent.devserver.project import Manager, find
from tests.agent.devserver.installs import DEPENDENCY, FAKE, Bench, needs_npm, with_dependency, write


async def test_a_package_manager_that_is_not_here_is_named(tmp_path: Path) -> None:
    """With the shell's own tools on PATH and no npm to fetch it with."""
    bench = Bench(tmp_path, environ={"PATH": str(tmp_path / "bin")})
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "mkdir", "cp", "rm", "uname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or "")
    write(bench.root, dependencies={"thing": "1"})
    (bench.root / "bun.lock").write_text("{}")
    wanted = find(bench.root)
    assert wanted is not None
    result = await bench.install(wanted)
    assert result.problem is not None
    assert result.problem.rule == "missing"
    assert result.problem.detail == "bun is not installed here; add it to the image, or set INSTALL_COMMAND"


async def test_a_package_manager_that_is_not_here_is_fetched_with_npm(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "mkdir", "cp", "rm", "uname", "mv", "find", "cat", "sort"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or "")
    (tmp_path / "bin" / "npm").write_text(f"#!/bin/sh\n{FAKE}\necho said $*\n")
    (tmp_path / "bin" / "npm").chmod(0o755)
    bench = Bench(tmp_path, environ={"PATH": str(tmp_path / "bin")})
    wanted = write(bench.root, dependencies={"thing": "1"}, packageManager="pnpm@9.12.0+sha512.abc")
    result = await bench.install(wanted)
    assert result.outcome is InstallOutcome.INSTALLED
    assert bench.lines[0] == "pnpm is not installed here; npm fetches pnpm@9.12.0"
    assert bench.lines[-1].startswith("said exec --yes --package=pnpm@9.12.0 -- pnpm install ")


@needs_npm
async def test_npm_installs_from_the_lock_and_without_it_when_the_two_disagree(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with_dependency(bench.root)
    command = [
        "npm",
        "install",
        "--package-lock-only",
        "--ignore-scripts",
        "--no-audit",
        "--no-fund",
        "--offline",
    ]
    await asyncio.to_thread(subprocess.run, command, cwd=bench.root, check=True, capture_output=True)
    wanted = find(bench.root)
    assert wanted is not None
    assert (wanted.manager, wanted.lock, wanted.whole_tree) == (Manager.NPM, "package-lock.json", True)
    first = await bench.install(wanted)
    assert first.problem is None
    assert (wanted.modules / "dep" / "index.js").read_text() == "module.exports = 1\n"
    lock = (bench.root / "package-lock.json").read_bytes()

    shutil.copytree(bench.root / "dep", bench.root / "other")
    (bench.root / "other" / "package.json").write_text(json.dumps(DEPENDENCY | {"name": "other"}))
    changed = write(bench.root, dependencies={"dep": "file:./dep", "other": "file:./other"})
    second = await bench.install(changed)
    assert second.problem is None, second.problem
    assert any("does not match package.json" in line for line in bench.lines)
    assert (wanted.modules / "other" / "index.js").exists()
    assert (bench.root / "package-lock.json").read_bytes() == lock, "the database is the source of truth"


MANAGERS = {
    "npm": ("npm@11", ["npm", "install", "--package-lock-only", "--ignore-scripts"], {}),
    "pnpm": ("pnpm@10.20.0", ["pnpm", "install", "--lockfile-only"], {"packageManager": "pnpm@10.20.0"}),
    "yarn": ("yarn@1", ["yarn", "install", "--ignore-scripts"], {}),
    "yarn-4": ("@yarnpkg/cli-dist@4", ["yarn", "install", "--mode=update-lockfile"], {}),
    "bun": ("bun@1", ["bun", "install", "--lockfile-only"], {}),
}
"""Each with the package it comes in, how a developer makes the lock file, and what package.json says more."""


def by_hand(root: Path, package: str, command: list[str]) -> None:
    """What a developer does at home; whatever that installed is not in the database."""
    environ = os.environ | {"YARN_NODE_LINKER": "node-modules", "YARN_ENABLE_IMMUTABLE_INSTALLS": "false"}
    fetched = ["npm", "exec", "--yes", f"--package={package}", "--", *command]
    done = subprocess.run(fetched, cwd=root, capture_output=True, text=True, env=environ)
    if "postinstall" in done.stderr:
        pytest.skip("npm is not allowed to run the script that bun's package needs")
    assert done.returncode == 0, done.stdout + done.stderr
    for modules in list(root.rglob("node_modules")):
        shutil.rmtree(modules, ignore_errors=True)


@needs_npm
@pytest.mark.nightly
@pytest.mark.parametrize("manager", MANAGERS)
async def test_every_package_manager_does_the_same(tmp_path: Path, manager: str) -> None:
    """Against the registry, with whichever of them is on PATH or else with what npm fetches."""
    package, make_lock, more = MANAGERS[manager]
    bench = Bench(tmp_path)
    write(bench.root, dependencies={"react": "^19.0.0"}, **more)
    if manager == "yarn-4":
        (bench.root / "yarn.lock").touch()
    await asyncio.to_thread(by_hand, bench.root, package, make_lock)
    wanted = find(bench.root)
    assert wanted is not None
    assert (wanted.manager.value, wanted.modern_yarn) == (manager.partition("-")[0], manager == "yarn-4")
    first = await bench.install(wanted)
    assert first.outcome is InstallOutcome.INSTALLED, first.problem
    changed = write(bench.root, dependencies={"react": "^19.0.0", "csstype": "^3.0.0"}, **more)
    second = await bench.install(changed)
    assert second.outcome is InstallOutcome.INSTALLED, second.problem
    assert any("does not match package.json" in line for line in bench.lines)
    shutil.rmtree(wanted.modules)
    assert (await bench.install(changed)).outcome is InstallOutcome.CACHED
    for name in ("react", "csstype"):
        assert (wanted.modules / name / "package.json").exists()


@needs_npm
@pytest.mark.nightly
@pytest.mark.parametrize("manager", MANAGERS)
async def test_a_workspace_gets_all_its_node_modules(tmp_path: Path, manager: str) -> None:
    """Two packages, each with a React of its own, so that no hoisting makes one node_modules of them; one uses the
    other."""
    package, make_lock, more = MANAGERS[manager]
    bench = Bench(tmp_path)
    linked = "*" if manager in ("npm", "yarn") else "workspace:*"
    app, library = bench.root / "packages" / "app", bench.root / "packages" / "library"
    write(app, name="app", dependencies={"react": "19.1.0", "library": linked})
    write(library, name="library", version="1.0.0", main="index.js", dependencies={"react": "18.3.1"})
    (library / "index.js").write_text("exports.react = require('react').version\n")
    write(bench.root, private=True, workspaces=["packages/*"], **more)
    if manager == "pnpm":
        (bench.root / "pnpm-workspace.yaml").write_text("packages: ['packages/*']\n")
    if manager == "yarn-4":
        (bench.root / "yarn.lock").touch()
    await asyncio.to_thread(by_hand, bench.root, package, make_lock)
    wanted = find(bench.root)
    assert wanted is not None
    assert wanted.whole_tree
    result = await bench.install(wanted)
    assert result.outcome is InstallOutcome.INSTALLED, result.problem
    assert bench.leftovers == []

    def versions() -> str:
        script = "console.log(require('react').version, require('library').react)"
        return subprocess.check_output(["node", "-e", script], cwd=app, text=True).strip()

    assert versions() == "19.1.0 18.3.1"
    assert (await bench.install(wanted)).outcome is InstallOutcome.CURRENT
    for modules in bench.root.rglob("node_modules"):
        shutil.rmtree(modules, ignore_errors=True)
    assert (await bench.install(wanted)).outcome is InstallOutcome.CACHED
    assert versions() == "19.1.0 18.3.1"
    places = [p for p in bench.root.glob("packages/*/node_modules") if p.is_dir()]
    if places:
        shutil.rmtree(places[0])
        assert (await bench.install(wanted)).outcome is InstallOutcome.CACHED, "a part of the set was missing"
        assert versions() == "19.1.0 18.3.1"

    write(app, name="app", dependencies={"react": "19.2.0", "library": linked})
    changed = find(bench.root)
    assert changed is not None
    assert changed.key != wanted.key, "what a package asks for is part of what is wanted"
    result = await bench.install(changed)
    assert result.outcome is InstallOutcome.INSTALLED, result.problem
    assert versions() == "19.2.0 18.3.1"


@needs_npm
@pytest.mark.parametrize("allowed", [False, True])
async def test_scripts_run_only_when_they_may(tmp_path: Path, allowed: bool) -> None:
    bench = Bench(tmp_path, install_scripts=allowed)
    with_dependency(bench.root, scripts={"postinstall": "touch node_modules/ran"})
    wanted = find(bench.root, scripts=allowed)
    assert wanted is not None
    result = await bench.install(wanted)
    assert result.problem is None
    assert (wanted.modules / "ran").exists() == allowed
