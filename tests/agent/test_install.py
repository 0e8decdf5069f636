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

    def __init__(self, tmp_path: Path, rights: Rights | None = None, **settings: object) -> None:
        self.root = tmp_path / "project"
        self.lines: list[str] = []
        given: dict[str, object] = {"project_id": UUID(int=1), "session_id": UUID(int=1), **settings}
        self.settings = Settings(project_dir=self.root, **given)  # type: ignore[arg-type]
        self.installer = Installer(
            self.settings, environ=os.environ, rights=rights or Rights(), on_line=self.lines.append
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
    await until(lambda: list(bad.settings.modules.glob("stage-*/started")))
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
    await until(lambda: list(bench.settings.modules.glob("stage-*/started")))
    agent.kill()
    await agent.wait()
    await until(lambda: running(f"# {tmp_path}") == [], 5)
    assert snapshot(wanted.modules) == before
    assert bench.leftovers != []
    await bench.installer.open()
    assert bench.leftovers == []


async def test_a_cancelled_install_leaves_nothing_running_and_no_stage(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake(f"touch started; sleep 60 # {tmp_path}"))
    task = asyncio.create_task(bench.install(write(bench.root, dependencies={"thing": "1"})))
    await until(lambda: list(bench.settings.modules.glob("stage-*/started")))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running(f"# {tmp_path}") == []
    assert bench.leftovers == []


async def test_a_package_manager_that_is_not_here_is_named(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    write(bench.root, dependencies={"thing": "1"})
    (bench.root / "bun.lock").write_text("{}")
    wanted = find(bench.root)
    assert wanted is not None
    if shutil.which("bun"):
        pytest.skip("bun is installed here")
    result = await bench.install(wanted)
    assert result.problem is not None
    assert (result.problem.rule, result.problem.detail) == ("missing", "bun is not installed here")


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


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("manager", "make_lock"),
    [
        ("pnpm", ["pnpm", "install", "--lockfile-only"]),
        ("yarn", ["yarn", "install", "--ignore-scripts"]),
        ("bun", ["bun", "install", "--lockfile-only"]),
    ],
)
async def test_the_other_package_managers_do_the_same(
    tmp_path: Path, manager: str, make_lock: list[str]
) -> None:
    """Against the registry, with whichever of them is on PATH."""
    if shutil.which(manager) is None:
        pytest.skip(f"{manager} is not installed here")
    bench = Bench(tmp_path)
    write(bench.root, dependencies={"react": "^19.0.0"})
    await asyncio.to_thread(subprocess.run, make_lock, cwd=bench.root, check=True, capture_output=True)
    shutil.rmtree(bench.root / "node_modules", ignore_errors=True)
    wanted = find(bench.root)
    assert wanted is not None
    assert wanted.manager.value == manager
    assert (await bench.install(wanted)).how is How.INSTALLED
    changed = write(bench.root, dependencies={"react": "^19.0.0", "csstype": "^3.0.0"})
    assert (await bench.install(changed)).how is How.INSTALLED
    assert any("does not match package.json" in line for line in bench.lines)
    shutil.rmtree(wanted.modules)
    assert (await bench.install(changed)).how is How.CACHED
    for name in ("react", "csstype"):
        assert (wanted.modules / name / "package.json").exists()


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


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "\0", "nope"])
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
