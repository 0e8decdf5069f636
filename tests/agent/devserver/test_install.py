"""Installs that work, fail, hang and are killed half-way; what runs on the old node_modules never notices."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from agent.devserver import install
from agent.devserver.install import InstallOutcome
from agent.devserver.sandbox import Rights, User
from agent.project import reading
from agent.project.reading import NO_DEPENDENCIES, Dependencies
from tests.agent.devserver.installs import FAKE, Bench, fake, snapshot, write
from tests.agent.processes import running, until


async def test_a_project_without_dependencies_needs_no_install(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake("exit 1"))
    wanted = write(bench.root, scripts={"dev": "vite"})
    assert wanted.key == NO_DEPENDENCIES
    result = await bench.install(wanted)
    assert (result.outcome, result.swapped, result.usable) == (InstallOutcome.CURRENT, False, True)


async def test_the_same_lock_is_installed_once_and_linked_afterwards(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake())
    wanted = write(bench.root, dependencies={"thing": "1"})
    first = await bench.install(wanted)
    assert (first.outcome, first.swapped, first.usable, first.problem) == (
        InstallOutcome.INSTALLED,
        True,
        True,
        None,
    )
    made = wanted.modules / "thing" / "made"
    before = made.read_bytes()
    assert (await bench.install(wanted)).outcome is InstallOutcome.CURRENT
    shutil.rmtree(wanted.modules)
    assert (await bench.install(wanted)).outcome is InstallOutcome.CACHED
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
    monkeypatch.setattr(install, "CACHED_INSTALLS", 2)
    bench = Bench(tmp_path, install_command=fake())
    for version in range(install.CACHED_INSTALLS + 2):
        result = await bench.install(write(bench.root, dependencies={"thing": str(version)}))
        assert result.outcome is InstallOutcome.INSTALLED
    assert len(list((bench.settings.modules / "cache").iterdir())) == install.CACHED_INSTALLS
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
    assert (result.outcome, result.swapped, result.usable) == (InstallOutcome.FAILED, False, True)
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
    assert (result.outcome, result.usable) == (InstallOutcome.FAILED, False)


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
from agent.devserver.sandbox import Rights
from agent.config import Settings
from agent.devserver.install import Installer
from agent.project.reading import dependencies
root = Path({str(bench.root)!r})
settings = Settings(project_id=UUID(int=1), session_id=UUID(int=1), project_dir=root,
    install_command=("sh", "-c", "mkdir -p node_modules/half; touch started; sleep 60 # {tmp_path}"))
installer = Installer(settings, environ=os.environ, rights=Rights(), on_line=print)
asyncio.run(installer.install(dependencies(root)))
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


def workspace(root: Path, version: str) -> Dependencies:
    for name in ("a", "b"):
        write(root / "packages" / name, name=name, dependencies={"thing": version})
    return write(root, workspaces=["packages/*"], dependencies={"thing": version})


@pytest.mark.parametrize("after", [2, 6, 7])
@pytest.mark.parametrize("end", ["killed", "cancelled"])
async def test_a_swap_that_is_cut_short_at_any_of_its_renames_is_undone(
    tmp_path: Path, after: int, end: str
) -> None:
    """Killed, with the agent: by the next one that opens. Cancelled, as when the agent stops: at once."""
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


async def _nothing() -> None:
    """What an agent that is killed does about its stage."""


async def test_what_a_workspace_no_longer_has_goes_with_the_swap(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake(WORKSPACE))
    await bench.install(workspace(bench.root, "1"))
    fewer = Bench(tmp_path, install_command=fake())
    result = await fewer.install(workspace(bench.root, "2"))
    assert result.outcome is InstallOutcome.INSTALLED
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
    (elsewhere / reading.RECORD).write_text(json.dumps({"key": wanted.key}))
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
    assert (result.outcome, result.problem) == (InstallOutcome.INSTALLED, None)
    assert (wanted.modules / "thing" / "made").exists()
    assert not wanted.modules.is_symlink()
    assert sorted(path.name for path in elsewhere.iterdir()) == [reading.RECORD]


async def test_a_node_modules_that_another_process_makes_during_the_swap_is_not_moved_into(
    tmp_path: Path,
) -> None:
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
    assert result.outcome is InstallOutcome.INSTALLED
    assert reading.installed_key(newer.modules) == newer.key
    assert [path.name for path in (bench.settings.modules / "cache").iterdir()] == [newer.key]
    assert (await bench.install(newer)).outcome is InstallOutcome.CURRENT


async def test_a_cancelled_install_leaves_nothing_running_and_no_stage(tmp_path: Path) -> None:
    bench = Bench(tmp_path, install_command=fake(f"touch started; sleep 60 # {tmp_path}"))
    task = asyncio.create_task(bench.install(write(bench.root, dependencies={"thing": "1"})))
    await until(lambda: list(bench.settings.modules.glob("stage-*/tree/started")))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert running(f"# {tmp_path}") == []
    assert bench.leftovers == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_an_install_is_done_by_the_projects_user(open_path: Path) -> None:
    other = User("other", 54_323, 54_323, "/nonexistent")
    bench = Bench(open_path, Rights(other), install_command=fake(f'{FAKE}; echo "$(id -u) $HOME"'))
    wanted = write(bench.root, dependencies={"thing": "1"})
    result = await bench.install(wanted)
    assert result.problem is None, result.problem
    assert bench.lines[-1].startswith("54323 ")
    assert not bench.lines[-1].endswith("/nonexistent")
    assert (wanted.modules / "thing" / "made").stat().st_uid == 54_323
    assert bench.root.stat().st_uid == 54_323


@pytest.mark.parametrize(
    "name",
    [
        b"stage-99999999999999999999-1",
        "stage-²-1".encode(),
        "stage-٣-1".encode(),
        b"stage-",
        b"stage-1",
        b"stage--1-1",
        b"stage-0-1",
        b"stage-+1-1",
        b"stage-12\n-1",
        b"stage-caf\xe9-1",
        b"stage-99999999-1-extra",
    ],
)
async def test_what_only_resembles_a_stage_stays_and_is_ignored(tmp_path: Path, name: bytes) -> None:
    """What the project's user owns, the project's code can fill with any names."""
    bench = Bench(tmp_path, install_command=fake())
    bench.settings.modules.mkdir()
    planted = os.fsencode(bench.settings.modules) + b"/" + name
    os.mkdir(planted)
    result = await bench.install(write(bench.root, dependencies={"thing": "1"}))
    assert result.outcome is InstallOutcome.INSTALLED
    assert bench.leftovers == [os.fsdecode(name)]


@pytest.mark.parametrize("pid", ["2147483648", "9999999999"])
async def test_a_stage_of_a_pid_that_no_system_gives_is_left_over(tmp_path: Path, pid: str) -> None:
    bench = Bench(tmp_path, install_command=fake())
    (bench.settings.modules / f"stage-{pid}-1/tree").mkdir(parents=True)
    (bench.settings.modules / f"stage-{pid}-{'1' * 200}").write_text("a file")
    await bench.installer.open()
    assert bench.leftovers == []


async def test_any_number_of_stages_is_removed(tmp_path: Path) -> None:
    """Their names together are longer than what a program may be given."""
    bench = Bench(tmp_path, install_command=fake())
    bench.settings.modules.mkdir()
    above_pid_max, long = 5_000_000, "0" * 200
    stage = str(bench.settings.modules / f"stage-{above_pid_max}-{long}")
    for number in range(os.sysconf("SC_ARG_MAX") // len(stage) + 1):
        Path(f"{stage}{number}").touch()
    await bench.installer.open()
    assert bench.leftovers == []


async def test_the_npmrc_of_run_settings_is_in_the_stage_alone_and_for_its_user_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    secret = "//npm.example/:_authToken=a-token-of-the-registry\n"
    script = f'stat -c %a "$NPM_CONFIG_USERCONFIG" >said && cat "$NPM_CONFIG_USERCONFIG" >>said && {FAKE}'
    script += f' && cp said {tmp_path}/said && echo "$NPM_CONFIG_USERCONFIG" >{tmp_path}/where && rm said'
    bench.installer.configure(fake(script), secret)
    wanted = write(bench.root, dependencies={"thing": "1"})
    assert (await bench.install(wanted)).problem is None
    assert (tmp_path / "said").read_text() == "600\n" + secret
    assert (tmp_path / "where").read_text().startswith(f"{bench.settings.modules}/stage-")
    assert bench.leftovers == []
    for directory in (bench.root, bench.settings.modules):
        assert not any(b"a-token" in content for content in snapshot(directory).values())
    bench.installer.configure(fake('test -z "$NPM_CONFIG_USERCONFIG" && ' + FAKE), None)
    assert (await bench.install(write(bench.root, dependencies={"thing": "2"}))).problem is None


async def test_an_install_that_fails_leaves_no_npmrc(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.installer.configure(fake("exit 1"), "//npm.example/:_authToken=a-token-of-the-registry\n")
    result = await bench.install(write(bench.root, dependencies={"thing": "1"}))
    assert result.outcome is InstallOutcome.FAILED
    assert bench.leftovers == []
