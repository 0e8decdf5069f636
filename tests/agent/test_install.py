"""Installs that work, fail, hang and are killed half-way; what runs on the old node_modules never notices."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from uuid import UUID

import pytest

from agent import install, project
from agent.config import Settings
from agent.install import How, Installer, Result
from agent.project import NO_DEPENDENCIES, Manager, Project, ProjectUnreadable, find
from agent.rights import Rights, User
from tests.agent.processes import running, until

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
DEPENDENCY = {"name": "dep", "version": "1.0.0", "main": "index.js"}


def write(root: Path, **package: object) -> Project:
    root.mkdir(parents=True, exist_ok=True)
    (root / "package.json").write_text(json.dumps({"name": "p", "version": "1.0.0", **package}))
    found = find(root)
    assert found is not None
    return found


def with_dependency(root: Path, **package: object) -> Project:
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
        **settings: object,
    ) -> None:
        self.root = tmp_path / "project"
        self.lines: list[str] = []
        given: dict[str, object] = {"project_id": UUID(int=1), "session_id": UUID(int=1), **settings}
        self.settings = Settings(project_dir=self.root, **given)  # type: ignore[arg-type]
        self.installer = Installer(
            self.settings, environ=environ or os.environ, rights=rights or Rights(), on_line=self.lines.append
        )

    async def install(self, wanted: Project) -> Result:
        await self.installer.open()
        return await self.installer.install(wanted)

    @property
    def leftovers(self) -> list[str]:
        return [path.name for path in self.settings.modules.iterdir() if path.name != "cache"]


FAKE = 'mkdir -p node_modules/thing && echo "$RANDOM $$" >node_modules/thing/made && echo done'


def fake(script: str = FAKE) -> tuple[str, ...]:
    return ("sh", "-c", script)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


async def test_a_project_without_dependencies_needs_no_install(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake("exit 1"))
    wanted = write(bench.root, scripts={"dev": "vite"})
    assert wanted.key == NO_DEPENDENCIES
    result = await bench.install(wanted)
    assert (result.how, result.swapped, result.usable) == (How.CURRENT, False, True)


async def test_the_same_lock_is_installed_once_and_linked_afterwards(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake())
    wanted = write(bench.root, dependencies={"thing": "1"})
    first = await bench.install(wanted)
    assert (first.how, first.swapped, first.usable, first.problem) == (How.INSTALLED, True, True, None)
    made = wanted.modules / "thing" / "made"
    before = made.read_bytes()
    assert (await bench.install(wanted)).how is How.CURRENT
    shutil.rmtree(wanted.modules)
    assert (await bench.install(wanted)).how is How.CACHED
    assert made.read_bytes() == before
    assert made.stat().st_nlink >= 2, "linked, not copied"
    assert bench.leftovers == []


async def test_a_changed_script_is_no_reason_and_a_changed_dependency_is(tmp_path: Path) -> None:
    root = tmp_path / "project"
    key = write(root, dependencies={"thing": "1"}).key
    assert write(root, dependencies={"thing": "1"}, scripts={"dev": "x"}, description="y").key == key
    assert write(root, dependencies={"thing": "2"}).key != key
    (root / "package-lock.json").write_text("{}")
    assert write(root, dependencies={"thing": "1"}).key != key


async def test_only_the_last_few_installs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "KEPT", 2)
    bench = Bench(tmp_path, install_command=fake())
    for version in range(install.KEPT + 2):
        result = await bench.install(write(bench.root, dependencies={"thing": str(version)}))
        assert result.how is How.INSTALLED
    assert len(list((bench.settings.modules / "cache").iterdir())) == install.KEPT
    assert bench.leftovers == []


@pytest.mark.parametrize(
    ("script", "rule", "said"),
    [
        ("mkdir -p node_modules/half; echo no such package; exit 3", "exit", "ended with 3\nno such package"),
        (
            "mkdir -p node_modules/half; echo working; sleep 60",
            "timeout",
            "did not end within 0.5 s\nworking",
        ),
        ("rm -rf node_modules; ln -s /etc node_modules", "seal", "cannot finish"),
    ],
)
async def test_an_install_that_fails_or_hangs_leaves_everything_as_it_was(
    tmp_path: Path, script: str, rule: str, said: str
) -> None:
    good = Bench(tmp_path, install_command=fake())
    wanted = write(good.root, dependencies={"thing": "1"})
    await good.install(wanted)
    before = snapshot(wanted.modules)
    bad = Bench(tmp_path, install_command=fake(f"{script} # {tmp_path}"), install_seconds=0.5)
    result = await bad.install(write(bad.root, dependencies={"thing": "2"}))
    assert (result.how, result.swapped, result.usable) == (How.FAILED, False, True)
    assert result.problem is not None
    assert (result.problem.kind, result.problem.rule) == ("install_failed", rule)
    assert said in result.problem.detail
    assert snapshot(wanted.modules) == before
    assert bad.leftovers == []
    assert running(f"# {tmp_path}") == []
    assert not Path("/etc/.preview-install.json").exists()


async def test_a_first_install_that_fails_leaves_nothing_to_run_with(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake("exit 1"))
    result = await bench.install(write(bench.root, dependencies={"thing": "1"}))
    assert (result.how, result.usable) == (How.FAILED, False)


async def test_an_install_killed_half_way_leaves_everything_as_it_was(tmp_path: Path) -> None:
    good = Bench(tmp_path, install_command=fake())
    wanted = write(good.root, dependencies={"thing": "1"})
    await good.install(wanted)
    before = snapshot(wanted.modules)
    bad = Bench(tmp_path, install_command=fake("mkdir -p node_modules/half; touch started; sleep 60"))
    task = asyncio.create_task(bad.install(write(bad.root, dependencies={"thing": "2"})))
    await until(lambda: list(bad.settings.modules.glob("stage-*/tree/started")))
    os.kill(running("touch started")[0], signal.SIGKILL)
    result = await task
    assert result.problem is not None
    assert "ended with 137" in result.problem.detail
    assert snapshot(wanted.modules) == before
    assert bad.leftovers == []


async def test_an_agent_killed_half_way_leaves_everything_as_it_was_and_the_next_cleans_up(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path, install_command=fake())
    wanted = write(bench.root, dependencies={"thing": "1"})
    await bench.install(wanted)
    before = snapshot(wanted.modules)
    write(bench.root, dependencies={"thing": "2"})
    source = f"""
import asyncio, os, sys
from pathlib import Path
from uuid import UUID
from agent.rights import Rights
from agent.config import Settings
from agent.install import Installer
from agent.project import find
root = Path({str(bench.root)!r})
settings = Settings(project_id=UUID(int=1), session_id=UUID(int=1), project_dir=root,
    install_command=("sh", "-c", "mkdir -p node_modules/half; touch started; sleep 60 # {tmp_path}"))
installer = Installer(settings, environ=os.environ, rights=Rights(), on_line=print)
asyncio.run(installer.install(find(root)))
"""
    agent = await asyncio.create_subprocess_exec(sys.executable, "-c", source)
    await until(lambda: list(bench.settings.modules.glob("stage-*/tree/started")))
    agent.kill()
    await agent.wait()
    await until(lambda: running(f"# {tmp_path}") == [], 5)
    assert snapshot(wanted.modules) == before
    assert bench.leftovers != []
    await bench.installer.open()
    assert bench.leftovers == []


WORKSPACE = "for d in . packages/a packages/b; do (mkdir -p $d && cd $d && " + FAKE + "); done"


def slow_mv(directory: Path, after: int) -> dict[str, str]:
    """An environment whose `mv` comes to a stop at its call number `after` of a swap, and says so in `here`."""
    binary = directory / "bin"
    binary.mkdir(exist_ok=True)
    (binary / "mv").write_text(
        f"""#!/bin/sh
case "$*" in *stage-*/old*|*project/*) echo >>{directory}/calls;; esac
if [ "$(grep -c '' {directory}/calls)" = {after} ]; then : >{directory}/here; sleep 60; fi
exec {shutil.which("mv")} "$@"
"""
    )
    (binary / "mv").chmod(0o755)
    return {**os.environ, "PATH": f"{binary}:{os.environ['PATH']}"}


def workspace(root: Path, version: str) -> Project:
    for name in ("a", "b"):
        write(root / "packages" / name, name=name, dependencies={"thing": version})
    return write(root, workspaces=["packages/*"], dependencies={"thing": version})


@pytest.mark.parametrize("after", [2, 6, 7])
@pytest.mark.parametrize("end", ["killed", "cancelled"])
async def test_a_swap_that_is_cut_short_at_any_of_its_renames_is_undone(
    tmp_path: Path, after: int, end: str
) -> None:
    """Killed, with the agent: by the next one that opens. Cancelled, as when the agent is told to stop: at once."""
    good = Bench(tmp_path, install_command=fake(WORKSPACE))
    await good.install(workspace(good.root, "1"))
    before = snapshot(good.root)
    assert len([name for name in before if name.endswith("made")]) == 3
    packages = {name: content for name, content in before.items() if name.endswith("package.json")}
    (tmp_path / "calls").touch()
    bad = Bench(tmp_path, environ=slow_mv(tmp_path, after), install_command=fake(WORKSPACE))
    task = asyncio.create_task(bad.install(workspace(bad.root, "2")))
    await until(lambda: (tmp_path / "here").exists() or task.done())
    assert not task.done(), task.result()
    if end == "killed":
        bad.installer._discard = _nothing  # type: ignore[method-assign]
        for pid in running(str(tmp_path)):
            os.kill(pid, signal.SIGKILL)
        await task
        assert snapshot(bad.root) != before | packages
        await good.installer.open()
    else:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    workspace(good.root, "1")
    assert snapshot(good.root) == before
    assert good.leftovers == []


async def _nothing(stage: Path) -> None:
    """What an agent that is killed does about its stage."""


async def test_what_a_workspace_no_longer_has_goes_with_the_swap(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake(WORKSPACE))
    await bench.install(workspace(bench.root, "1"))
    fewer = Bench(tmp_path, install_command=fake())
    result = await fewer.install(workspace(bench.root, "2"))
    assert result.how is How.INSTALLED
    assert not list(bench.root.glob("packages/*/node_modules"))
    assert (bench.root / "node_modules" / "thing" / "made").exists()


@pytest.mark.parametrize("planted", ["link", "file", "directory", "link to a directory"])
async def test_whatever_stands_in_the_place_of_node_modules_is_replaced_and_never_followed(
    tmp_path: Path, planted: str
) -> None:
    bench = Bench(tmp_path, install_command=fake())
    wanted = write(bench.root, dependencies={"thing": "1"})
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / project.RECORD).write_text(json.dumps({"key": wanted.key}))
    match planted:
        case "link":
            wanted.modules.symlink_to(tmp_path / "nowhere")
        case "file":
            wanted.modules.write_text("not a directory")
        case "directory":
            (wanted.modules / "mine").mkdir(parents=True)
        case _:
            wanted.modules.symlink_to(elsewhere)
    result = await bench.install(wanted)
    assert (result.how, result.problem) == (How.INSTALLED, None)
    assert (wanted.modules / "thing" / "made").exists()
    assert not wanted.modules.is_symlink()
    assert sorted(path.name for path in elsewhere.iterdir()) == [project.RECORD]


async def test_a_node_modules_that_somebody_makes_during_the_swap_is_not_moved_into(tmp_path: Path) -> None:
    """`mv` into the place that has just been cleared would otherwise end in node_modules/node_modules."""
    good = Bench(tmp_path, install_command=fake())
    wanted = write(good.root, dependencies={"thing": "1"})
    await good.install(wanted)
    before = snapshot(wanted.modules)
    (tmp_path / "bin").mkdir()
    mv = tmp_path / "bin" / "mv"
    mv.write_text(
        f'#!/bin/sh\n{shutil.which("mv")} "$@" || exit\n'
        f'case "$*" in *stage-*/old/*) mkdir -p {wanted.modules}/planted;; esac\n'
    )
    mv.chmod(0o755)
    environ = {**os.environ, "PATH": f"{mv.parent}:{os.environ['PATH']}"}
    bad = Bench(tmp_path, environ=environ, install_command=fake())
    result = await bad.install(write(bad.root, dependencies={"thing": "2"}))
    assert result.problem is not None
    assert result.problem.rule == "swap"
    assert snapshot(wanted.modules) == before
    assert bad.leftovers == []


async def test_a_save_during_the_copy_is_installed_as_what_it_is(tmp_path: Path) -> None:
    """The key that was asked for and the files that were staged are two reads; the second one counts."""
    bench = Bench(tmp_path, install_command=fake())
    stale = write(bench.root, dependencies={"thing": "1"})
    newer = write(bench.root, dependencies={"thing": "2"})
    result = await bench.install(stale)
    assert result.how is How.INSTALLED
    assert project.installed_key(newer.modules) == newer.key
    assert [path.name for path in (bench.settings.modules / "cache").iterdir()] == [newer.key]
    assert (await bench.install(newer)).how is How.CURRENT


async def test_a_cancelled_install_leaves_nothing_running_and_no_stage(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake(f"touch started; sleep 60 # {tmp_path}"))
    task = asyncio.create_task(bench.install(write(bench.root, dependencies={"thing": "1"})))
    await until(lambda: list(bench.settings.modules.glob("stage-*/tree/started")))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running(f"# {tmp_path}") == []
    assert bench.leftovers == []


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
    assert result.how is How.INSTALLED
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
    assert first.how is How.INSTALLED, first.problem
    changed = write(bench.root, dependencies={"react": "^19.0.0", "csstype": "^3.0.0"}, **more)
    second = await bench.install(changed)
    assert second.how is How.INSTALLED, second.problem
    assert any("does not match package.json" in line for line in bench.lines)
    shutil.rmtree(wanted.modules)
    assert (await bench.install(changed)).how is How.CACHED
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
    assert result.how is How.INSTALLED, result.problem
    assert bench.leftovers == []

    def versions() -> str:
        script = "console.log(require('react').version, require('library').react)"
        return subprocess.check_output(["node", "-e", script], cwd=app, text=True).strip()

    assert versions() == "19.1.0 18.3.1"
    assert (await bench.install(wanted)).how is How.CURRENT
    for modules in bench.root.rglob("node_modules"):
        shutil.rmtree(modules, ignore_errors=True)
    assert (await bench.install(wanted)).how is How.CACHED
    assert versions() == "19.1.0 18.3.1"
    places = [p for p in bench.root.glob("packages/*/node_modules") if p.is_dir()]
    if places:
        shutil.rmtree(places[0])
        assert (await bench.install(wanted)).how is How.CACHED, "a part of the set was missing"
        assert versions() == "19.1.0 18.3.1"

    write(app, name="app", dependencies={"react": "19.2.0", "library": linked})
    changed = find(bench.root)
    assert changed is not None
    assert changed.key != wanted.key, "what a package asks for is part of what is wanted"
    result = await bench.install(changed)
    assert result.how is How.INSTALLED, result.problem
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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
async def test_an_install_is_done_by_the_projects_user(open_path: Path) -> None:
    somebody = User("somebody", 54_323, 54_323, "/nonexistent")
    bench = Bench(open_path, Rights(somebody), install_command=fake(f'{FAKE}; echo "$(id -u) $HOME"'))
    wanted = write(bench.root, dependencies={"thing": "1"})
    result = await bench.install(wanted)
    assert result.problem is None, result.problem
    assert bench.lines[-1].startswith("54323 ")
    assert not bench.lines[-1].endswith("/nonexistent")
    assert (wanted.modules / "thing" / "made").stat().st_uid == 54_323
    assert bench.root.stat().st_uid == 54_323


# --- reading the project


@pytest.mark.parametrize(
    ("script", "argv"),
    [
        ("vite", ("…/.bin/vite",)),
        ("vite --mode staging", ("…/.bin/vite", "--mode", "staging")),
        ("next dev", ("npm", "run", "dev")),
        ("FOO=1 vite", ("npm", "run", "dev", "--")),
        ("tsc && vite", ("npm", "run", "dev", "--")),
        ("vite build --watch", ("npm", "run", "dev", "--")),
        ("vite " + "x" * 200_000, ("npm", "run", "dev", "--")),
    ],
)
def test_what_starts_the_dev_server(tmp_path: Path, script: str, argv: tuple[str, ...]) -> None:
    wanted = write(tmp_path / "p", scripts={"dev": script})
    got = wanted.dev_argv(host="::", port=5, fresh=False)
    shown = tuple(word.replace(str(wanted.modules), "…") for word in got)
    flags = ("--host", "::", "--port", "5", "--strictPort") if "vite" in script else ()
    assert shown == (*argv, *flags)


def test_a_project_one_level_down_is_found_and_two_of_them_are_not(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    write(tmp_path / "frontend", scripts={"dev": "vite"})
    found = find(tmp_path)
    assert found is not None
    assert found.root == tmp_path / "frontend"
    write(tmp_path / "backend", scripts={"dev": "vite"})
    assert find(tmp_path) is None
    write(tmp_path)
    assert find(tmp_path).root == tmp_path  # type: ignore[union-attr]


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\0", "nope", '{"a":' + "[" * 200_000])
def test_a_broken_package_json_is_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "package.json").write_text(content)
    with pytest.raises(ProjectUnreadable, match=r"^cannot read package\.json: "):
        find(tmp_path)


def test_files_that_are_not_what_they_seem_are_neither_followed_nor_waited_for(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"name": "secret"}')
    (tmp_path / "link").symlink_to(secret)
    os.mkfifo(tmp_path / "pipe")
    assert project.read_small(tmp_path / "link") is None
    assert project.read_small(tmp_path / "pipe") is None
    assert project.read_small(Path("/dev/zero")) is None
    assert project.read_small(tmp_path) is None


@pytest.mark.parametrize(
    ("lock", "manager"),
    [
        ("pnpm-lock.yaml", "pnpm"),
        ("yarn.lock", "yarn"),
        ("bun.lock", "bun"),
        ("package-lock.json", "npm"),
    ],
)
def test_the_lock_file_names_the_package_manager(tmp_path: Path, lock: str, manager: str) -> None:
    (tmp_path / lock).touch()
    (tmp_path / "package-lock.json").touch()
    assert write(tmp_path, dependencies={"a": "1"}).manager.value == manager
