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
from agent.project.managers import Manager
from agent.project.reading import dependencies
from tests.agent.devserver.installs import DEPENDENCY, FAKE, Bench, needs_npm, with_dependency, write


async def test_a_package_manager_that_is_not_here_is_named(tmp_path: Path) -> None:
    """With the shell's own tools on PATH and no npm to fetch it with."""
    bench = Bench(tmp_path, environ=tools(tmp_path / "bin"))
    write(bench.root, dependencies={"thing": "1"})
    (bench.root / "bun.lock").write_text("{}")
    wanted = dependencies(bench.root)
    result = await bench.install(wanted)
    assert result.problem is not None
    assert result.problem.rule == "missing"
    assert result.problem.detail.startswith(
        "bun@1 is not installed here, nor is npm to fetch it; use an image "
    )


def tools(directory: Path, **programs: str) -> dict[str, str]:
    """A PATH with the shell's own tools and some that are one line of shell; as an environment."""
    directory.mkdir()
    for tool in ("sh", "mkdir", "cp", "rm", "uname", "mv", "find", "cat", "sort", "tar", "chmod"):
        (directory / tool).symlink_to(shutil.which(tool) or "")
    for name, script in programs.items():
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)
    return {"PATH": str(directory)}


NPM = """
echo "npm $*"
for name; do :; done
bin=$3/node_modules/.bin; mkdir -p $bin
printf '#!/bin/sh\\nmkdir -p node_modules/thing; echo fetched "$0" "$*"\\n' >$bin/pnpm
cp $bin/pnpm $bin/yarn; chmod 755 $bin/*
"""
"""Fetches any package manager: one that installs a thing."""


@pytest.mark.parametrize(
    ("named", "there", "fetched"),
    [
        ("pnpm@9.12.0+sha512.abc", {}, "pnpm@9.12.0"),
        ("yarn@4.9.2", {"yarn": "exit 1"}, "@yarnpkg/cli-dist@4.9.2"),
        ("pnpm@9.12.0", {"pnpm": "exit 1"}, "pnpm@9.12.0"),
    ],
)
async def test_the_release_that_the_project_names_is_fetched_once_whatever_is_on_path(
    tmp_path: Path, named: str, there: dict[str, str], fetched: str
) -> None:
    bench = Bench(tmp_path, environ=tools(tmp_path / "bin", npm=NPM, **there))
    wanted = write(bench.root, dependencies={"thing": "1"}, packageManager=named)
    result = await bench.install(wanted)
    assert result.outcome is InstallOutcome.INSTALLED, result.problem
    assert bench.lines[0] == f"npm fetches {fetched}"
    place = f"managers/{fetched.replace('/', '+')}/node_modules/.bin"
    assert f"fetched {bench.settings.modules / place}/{named.partition('@')[0]} install " in bench.lines[-1]
    assert bench.installer.path(wanted.manager, "/x") == f"{bench.settings.modules / place}:/x"
    bench.lines.clear()
    await bench.install(write(bench.root, dependencies={"thing": "2"}, packageManager=named))
    assert not any(line.startswith("npm fetches") for line in bench.lines)


async def test_one_on_path_of_the_release_that_is_named_is_used(tmp_path: Path) -> None:
    environ = tools(tmp_path / "bin")
    package = tmp_path / "lib/node_modules/pnpm"
    (package / "bin").mkdir(parents=True)
    (package / "package.json").write_text('{"name": "pnpm", "version": "9.12.0"}')
    (package / "bin/pnpm.cjs").write_text(f"#!/bin/sh\n{FAKE}\n")
    (package / "bin/pnpm.cjs").chmod(0o755)
    (tmp_path / "bin/pnpm").symlink_to(package / "bin/pnpm.cjs")
    bench = Bench(tmp_path, environ=environ)
    wanted = write(bench.root, dependencies={"thing": "1"}, packageManager="pnpm@9.12.0")
    assert (await bench.install(wanted)).outcome is InstallOutcome.INSTALLED
    assert wanted.manager.is_installed(environ["PATH"])
    for other in ("pnpm@9.12.1", "pnpm@10.0.0", "pnpm@9.1"):
        named = write(bench.root, dependencies={"thing": "1"}, packageManager=other)
        assert not named.manager.is_installed(environ["PATH"])


PNPM = """
[ ! -e pnpm-lock.yaml ] || { echo 'ERR_PNPM_BROKEN_LOCKFILE  The lockfile at "pnpm-lock.yaml" is broken'; exit 1; }
mkdir -p node_modules/thing
"""


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "it is empty"),
        ("<<<<<<< HEAD\nlockfileVersion: '9.0'\n", "it has the marks of a merge conflict"),
        ("{{{", 'The lockfile at "pnpm-lock.yaml" is broken'),
        ("lockfileVersion: '9.0'\n???", 'The lockfile at "pnpm-lock.yaml" is broken'),
    ],
)
async def test_a_lock_file_that_cannot_be_used_is_left_out_and_said(
    tmp_path: Path, content: str, why: str
) -> None:
    bench = Bench(tmp_path, environ=tools(tmp_path / "bin", npm=NPM))
    write(bench.root, dependencies={"thing": "1"})
    (bench.root / "pnpm-lock.yaml").write_text(content)
    wanted = dependencies(bench.root)
    fetched = bench.settings.modules / "managers/pnpm@10/node_modules/.bin"
    fetched.mkdir(parents=True)
    (fetched / "pnpm").write_text(f"#!/bin/sh\n{PNPM}")
    (fetched / "pnpm").chmod(0o755)
    result = await bench.install(wanted)
    assert result.outcome is InstallOutcome.INSTALLED, result.problem
    assert result.problem is not None
    assert (result.problem.kind, result.problem.path) == ("lock_unusable", "pnpm-lock.yaml")
    assert why in result.problem.detail
    assert (bench.root / "pnpm-lock.yaml").read_text() == content, "the database is the source of truth"
    assert (wanted.modules / "thing").is_dir()


async def test_one_that_is_no_json_is_said_too_though_npm_would_not(tmp_path: Path) -> None:
    bench = Bench(tmp_path, environ=tools(tmp_path / "bin", npm="echo ran $1; mkdir node_modules"))
    write(bench.root, dependencies={"thing": "1"})
    (bench.root / "package-lock.json").write_text('{"name":')
    result = await bench.install(dependencies(bench.root))
    assert bench.lines[-1] == "ran install"
    assert result.problem is not None
    assert (result.problem.kind, "it is not JSON" in result.problem.detail) == ("lock_unusable", True)


async def test_a_failure_that_is_not_the_locks_is_not_tried_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, environ=tools(tmp_path / "bin", npm="echo ran; echo ENOTFOUND; exit 1"))
    write(bench.root, dependencies={"thing": "1"})
    (bench.root / "package-lock.json").write_text("{}")
    result = await bench.install(dependencies(bench.root))
    assert (result.outcome, bench.lines.count("ran")) == (InstallOutcome.FAILED, 1)


async def test_registries_from_outside_the_project_are_there_for_the_install_alone(tmp_path: Path) -> None:
    npm = 'mkdir -p node_modules/thing; f=$NPM_CONFIG_USERCONFIG; echo "$f"; cat "$f"; find "$f" -perm 600'
    bench = Bench(tmp_path, environ=tools(tmp_path / "bin", npm=npm))
    wanted = write(bench.root, dependencies={"thing": "1"})
    await bench.installer.open()
    text = "always-auth=true\n//npm.example/:_authToken=a b'c\n"
    bench.installer.configure(None, text)
    result = await bench.installer.install(wanted)
    assert result.outcome is InstallOutcome.INSTALLED, result.problem
    place, *said = bench.lines
    assert "\n".join(said[:-1]) + "\n" == text
    assert said[-1] == place, "nobody else may read it"
    assert not any(b"_authToken" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@needs_npm
async def test_the_projects_own_scripts_have_its_files_and_its_patches(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_scripts=True)
    (bench.root / "scripts").mkdir(parents=True)
    (bench.root / "scripts/setup.cjs").write_text("require('fs').copyFileSync('patches/a', 'node_modules/a')")
    (bench.root / "patches").mkdir()
    (bench.root / "patches/a").write_text("one")
    scripts = {"postinstall": "node scripts/setup.cjs"}
    dep = bench.root / "dep"
    with_dependency(bench.root, scripts=scripts)
    wanted = dependencies(bench.root, scripts=True)
    assert dep.is_dir()
    result = await bench.install(wanted)
    assert result.problem is None, result.problem
    assert (wanted.modules / "a").read_text() == "one"
    (bench.root / "patches/a").write_text("two")
    result = await bench.install(dependencies(bench.root, scripts=True))
    assert (wanted.modules / "a").read_text() == "two"


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
    wanted = dependencies(bench.root)
    assert (wanted.manager.name, wanted.manager.lock, wanted.whole_tree) == (
        Manager.NPM,
        "package-lock.json",
        True,
    )
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
    wanted = dependencies(bench.root)
    assert (wanted.manager.name.value, wanted.manager.modern_yarn) == (
        manager.partition("-")[0],
        manager == "yarn-4",
    )
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
    wanted = dependencies(bench.root)
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
    changed = dependencies(bench.root)
    assert changed.key != wanted.key, "what a package asks for is part of what is wanted"
    result = await bench.install(changed)
    assert result.outcome is InstallOutcome.INSTALLED, result.problem
    assert versions() == "19.2.0 18.3.1"


@needs_npm
@pytest.mark.parametrize("allowed", [False, True])
async def test_scripts_run_only_when_they_may(tmp_path: Path, allowed: bool) -> None:
    bench = Bench(tmp_path, install_scripts=allowed)
    with_dependency(bench.root, scripts={"postinstall": "touch node_modules/ran"})
    wanted = dependencies(bench.root, scripts=allowed)
    result = await bench.install(wanted)
    assert result.problem is None
    assert (wanted.modules / "ran").exists() == allowed
