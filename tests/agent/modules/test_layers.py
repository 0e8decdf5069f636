"""An install that a layer stands for, from key to swap: over HTTP, by the program, as the machine does it."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from structlog.testing import capture_logs

from agent.devserver.install import Installer, InstallOutcome, InstallResult
from agent.devserver.sandbox import Rights, User
from agent.modules import arrivals
from agent.modules.layers import given_layer
from agent.project.install_key import Platform, layer_key
from agent.project.reading import Dependencies, dependencies, installed_key
from agent.telemetry.metrics import Metrics
from tests.agent.devserver.installs import DEPENDENCY, Bench, needs_npm, with_dependency, write
from tests.agent.modules.archives import Service, link, listing, made_of, packed, serving, tarball, tree
from tests.agent.processes import running, until

pytestmark = needs_npm
ABSENT = {"left-pad-that-nobody-has": "1.0.0"}
"""Only a layer can bring this: no registry has it."""


NPM = """#!/bin/sh
if grep -q that-nobody-has package.json; then echo "no such package"; exit 1; fi
mkdir -p node_modules/dep && echo "module.exports = 1" >node_modules/dep/index.js
"""
"""A package manager that installs in no time, and does not have what only a layer has."""


class World:
    """Machines of one project, each with an installer of its own, and the service they share."""

    def __init__(self, tmp_path: Path, service: Service, http: httpx.AsyncClient) -> None:
        self.tmp_path = tmp_path
        self.service = service
        self.http = http
        self.metrics = Metrics()
        self.npm = tmp_path / "bin"
        self.npm.mkdir()
        (self.npm / "npm").write_text(NPM)
        (self.npm / "npm").chmod(0o755)

    def machine(
        self,
        name: str,
        *,
        given: str | None = None,
        rights: Rights | None = None,
        real_npm: bool = False,
        **settings: object,
    ) -> Bench:
        """A machine. Its npm is a line of shell, unless it is to be the real one."""
        bench = Bench(self.tmp_path / name, rights, None, state_dir=self.tmp_path, **settings)
        bench.installer = Installer(
            bench.settings,
            environ={**os.environ, "PATH": ("" if real_npm else f"{self.npm}:") + os.environ["PATH"]},
            rights=rights or Rights(),
            on_line=bench.lines.append,
            layers=self.service.store(self.http, given),
            metrics=self.metrics,
        )
        return bench

    def programs(self) -> list[int]:
        """The programs that pack or unpack a layer of these machines now."""
        return running("agent.modules.archive", str(self.tmp_path))

    def count(self, outcome: str) -> float:
        return float(self.metrics.modules.labels(outcome)._value.get())


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as it:
        yield it


@pytest.fixture
async def world(tmp_path: Path, service: Service) -> AsyncIterator[World]:
    async with httpx.AsyncClient() as http:
        yield World(tmp_path, service, http)


async def key_of(bench: Bench, wanted: Dependencies) -> str:
    key = await bench.installer._layer_key(wanted.key)
    assert key is not None
    return key


async def served(bench: Bench) -> None:
    """The first page of a machine is there, and what it has to send is sent: then it watches what Vite bundles."""
    bundles = bench.installer._bundles
    assert bundles is not None
    task = asyncio.create_task(bench.installer.served())
    await until(lambda: task.done() or bundles._keeping, 60)
    await ended(task)


MODULES: Mapping[str, str | bytes | tuple[str]] = {
    "node_modules/left-pad-that-nobody-has/index.js": "module.exports = 1",
    "node_modules/.bin/pad": ("../left-pad-that-nobody-has/index.js",),
}


def layer(tmp_path: Path) -> bytes:
    return packed(tree(tmp_path / "packed", MODULES))


async def test_what_one_machine_installed_the_next_one_unpacks(world: World) -> None:
    first, second = world.machine("first", real_npm=True), world.machine("second", real_npm=True)
    wanted = with_dependency(first.root)
    assert (await first.install(wanted)).outcome is InstallOutcome.INSTALLED
    await served(first)
    assert (world.count("missing"), world.count("sent")) == (1, 1)
    await served(first)
    assert world.count("sent") == 1, "once a key"

    again = with_dependency(second.root)
    result = await second.install(again)
    assert (result.outcome, result.swapped, result.usable, result.problem) == (
        InstallOutcome.LAYER, True, True, None,
    )  # fmt: skip
    assert installed_key(again.modules) == again.key
    assert listing(again.modules) == listing(wanted.modules)
    assert (second.leftovers, first.leftovers) == ([], [])
    assert (await second.install(again)).outcome is InstallOutcome.CURRENT


async def test_a_layer_that_was_named_at_creation_comes_before_the_project(world: World) -> None:
    bench = world.machine("first")
    root = tree(world.tmp_path / "like", {})
    key = await key_of(bench, write(root, dependencies=ABSENT))
    world.service.keep(key, layer(world.tmp_path), size=200)
    machine = world.machine("second", given=key)
    await machine.installer.open()
    await machine.installer.prefetch()
    assert len(machine.leftovers) == 1, "it waits in its stage"
    wanted = write(machine.root, dependencies=ABSENT)
    assert (await machine.installer.install(wanted)).outcome is InstallOutcome.LAYER
    assert world.service.asked_for_layers() == [], "nobody needs to ask"
    assert (wanted.modules / ".bin/pad").read_text() == "module.exports = 1"
    assert machine.leftovers == []


async def test_a_layer_of_another_key_is_a_start_for_npm(world: World) -> None:
    first = world.machine("first", real_npm=True)
    wanted = with_dependency(first.root, description="one")
    await first.install(wanted)
    await served(first)
    (key,) = world.service.layers
    second = world.machine("second", given=key, real_npm=True)
    again = with_dependency(second.root)
    (second.root / "more").mkdir()
    (second.root / "more/package.json").write_text('{"name": "more", "version": "1.0.0"}')
    again = write(second.root, dependencies={"dep": "file:./dep", "more": "file:./more"})
    await second.installer.open()
    await second.installer.prefetch()
    assert (await second.installer.install(again)).outcome is InstallOutcome.INSTALLED
    assert world.count("head_start") == 1
    assert (again.modules / "more").exists()
    assert installed_key(again.modules) == again.key
    await served(second)
    assert len(world.service.layers) == 2, "what came of it is a layer of its own"
    assert second.leftovers == []


@pytest.mark.parametrize("fault", ["cut", "damaged", "another hash", "hostile", "gone", "down"])
async def test_a_layer_that_is_no_good_is_an_install(world: World, fault: str) -> None:
    bench = world.machine("first")
    wanted = with_dependency(bench.root)
    key = await key_of(bench, wanted)
    good = layer(world.tmp_path)
    bad = {
        "damaged": good[:200] + b"x" + good[201:],
        "hostile": made_of(link("node_modules/x", "/etc")) + os.urandom(2**20),
    }
    world.service.keep(key, bad.get(fault, good), size=2**22)
    (part,) = world.service.layers[key]
    where = f"/objects/{key}.0"
    match fault:
        case "cut":
            world.service.objects[where] = good[:-10]
        case "another hash":
            part["sha256"] = "0" * 64
        case "gone":
            del world.service.objects[where]
        case "down":
            world.service.faults["storage"] = "down"
    machine = world.machine("second", given=key if fault in ("cut", "gone") else None)
    wanted = with_dependency(machine.root)
    await machine.installer.open()
    await machine.installer.prefetch()
    with capture_logs() as lines:
        result = await machine.installer.install(wanted)
    assert (result.outcome, result.problem) == (InstallOutcome.INSTALLED, None)
    assert not (wanted.modules / "left-pad-that-nobody-has").exists()
    assert world.count("refused") + world.count("unavailable") == (2 if fault in ("cut", "gone") else 1)
    assert world.service.url not in str(lines), "its URL is a credential"
    assert machine.leftovers == []


@pytest.mark.parametrize("fault", ["another hash", "hostile", "cut", "disk"])
async def test_a_layer_that_is_no_good_is_made_anew_by_who_found_it(
    world: World, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with the layer is told, and what is wrong with the way or the disk is not."""
    machine = world.machine("first")
    wanted = with_dependency(machine.root)
    key = await key_of(machine, wanted)
    good = packed(tree(world.tmp_path / "packed", MODULES))
    hostile = made_of(link("node_modules/x", "/etc"))
    world.service.keep(key, hostile if fault == "hostile" else good, size=2**22)
    if fault == "another hash":
        world.service.layers[key][0]["sha256"] = "0" * 64
    if fault == "cut":
        world.service.objects[f"/objects/{key}.0"] = good[:-10]
    if fault == "disk":
        full = ("sh", "-c", "cat >/dev/null; echo 'failed: No space left on device'; exit 1")
        monkeypatch.setattr(arrivals, "command", lambda *_: full)
    assert (await machine.install(wanted)).outcome is InstallOutcome.INSTALLED
    monkeypatch.undo()
    is_its_fault = fault in ("another hash", "hostile")
    assert world.service.refused == ([key] if is_its_fault else [])
    served = asyncio.create_task(machine.installer.served())
    if is_its_fault:
        await until(lambda: world.count("sent") == 1, 30)
        second = world.machine("second")
        assert (await second.install(with_dependency(second.root))).outcome is InstallOutcome.LAYER
    await ended(served)


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def test_an_early_layer_whose_url_is_old_is_asked_for(world: World) -> None:
    """A machine that starts again has the environment it was made with."""
    machine = world.machine("first")
    wanted = write(machine.root, dependencies=ABSENT)
    key = await key_of(machine, wanted)
    world.service.keep(key, layer(world.tmp_path))
    again = world.machine("second", given=key)
    world.service.objects["/objects/new"] = world.service.objects.pop(f"/objects/{key}.0")
    world.service.layers[key][0]["url"] = f"{world.service.url}/objects/new"
    await again.installer.open()
    await again.installer.prefetch()
    wanted = write(again.root, dependencies=ABSENT)
    assert (await again.installer.install(wanted)).outcome is InstallOutcome.LAYER
    assert world.service.asked_for_layers() == [key]


async def test_without_the_orchestrator_it_is_installed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.service.faults["api"] = "down"
    machine = world.machine("first")
    assert (await machine.install(with_dependency(machine.root))).outcome is InstallOutcome.INSTALLED
    await served(machine)
    assert world.service.layers == {}


async def test_while_storage_is_slow_the_install_is_first(world: World) -> None:
    machine = world.machine("first", modules_wait_seconds=0.01)
    wanted = with_dependency(machine.root)
    world.service.keep(await key_of(machine, wanted), layer(world.tmp_path))
    world.service.faults["storage"] = "slow"
    result = await machine.install(wanted)
    assert result.outcome is InstallOutcome.INSTALLED
    assert world.programs() == [], "and nobody waits for the layer"
    assert machine.leftovers == []


async def test_a_slow_layer_is_first_where_the_registry_is_slower(world: World) -> None:
    machine = world.machine("first", modules_wait_seconds=0.01)
    (world.npm / "npm").write_text(f"#!/bin/sh\n: >{world.npm}/runs\nsleep 61\n")
    wanted = write(machine.root, dependencies=ABSENT)
    world.service.keep(await key_of(machine, wanted), layer(world.tmp_path))
    world.service.faults["storage"] = "slow"
    installing = asyncio.create_task(machine.install(wanted))
    await until((world.npm / "runs").exists, 20)
    world.service.release.set()
    assert (await installing).outcome is InstallOutcome.LAYER
    assert machine.leftovers == []


async def test_an_agent_that_is_killed_in_the_middle_leaves_nothing(world: World) -> None:
    machine = world.machine("first")
    wanted = write(machine.root, dependencies=ABSENT)
    key = await key_of(machine, wanted)
    world.service.keep(key, layer(world.tmp_path))
    world.service.faults["storage"] = "slow"
    await machine.installer.open()
    installing = asyncio.create_task(machine.installer.install(wanted))
    await until(lambda: world.programs(), 20)
    (program,) = world.programs()[-1:]
    os.kill(program, signal.SIGKILL)
    world.service.release.set()
    assert (await installing).outcome is not InstallOutcome.LAYER
    assert not wanted.modules.exists()
    assert machine.leftovers == []


async def test_a_cancelled_install_ends_the_program(world: World) -> None:
    machine = world.machine("first")
    wanted = write(machine.root, dependencies=ABSENT)
    world.service.keep(await key_of(machine, wanted), layer(world.tmp_path))
    world.service.faults["storage"] = "slow"
    installing = asyncio.create_task(machine.install(wanted))
    await until(lambda: world.programs(), 20)
    installing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await installing
    await until(lambda: not world.programs())


async def test_a_lock_that_changes_while_the_layer_streams_is_another_key(world: World) -> None:
    first = world.machine("first")
    old = await key_of(first, write(first.root, dependencies=ABSENT))
    world.service.keep(old, layer(world.tmp_path))
    world.service.faults["storage"] = "slow"
    machine = world.machine("second", given=old, modules_wait_seconds=0.05)
    await machine.installer.open()
    ahead = asyncio.create_task(machine.installer.prefetch())
    await until(lambda: world.programs(), 20)
    wanted = with_dependency(machine.root)
    assert (await machine.installer.install(wanted)).outcome is InstallOutcome.INSTALLED
    assert not (wanted.modules / "left-pad-that-nobody-has").exists()
    await ahead
    assert world.programs() == []
    assert machine.leftovers == []


async def test_a_project_whose_own_scripts_run_is_installed(world: World) -> None:
    """They may read any file of the project, which no key covers."""
    machine = world.machine("first", install_scripts=True)
    with_dependency(machine.root, scripts={"postinstall": "echo >node_modules/made"})
    wanted = dependencies(machine.root, scripts=True)
    assert (await machine.install(wanted)).outcome is InstallOutcome.INSTALLED
    await served(machine)
    assert (world.service.asked, world.service.layers) == ([], {})


async def test_what_a_packages_postinstall_made_is_in_the_layer(world: World) -> None:
    """It runs on one machine of those that may run it, and on none that may not."""

    def project(bench: Bench, *, scripts: bool) -> Dependencies:
        write(bench.root, dependencies={"dep": "file:./dep.tgz"})
        (bench.root / "dep.tgz").write_bytes(package)
        return dependencies(bench.root, scripts=scripts)

    manifest = json.dumps({**DEPENDENCY, "scripts": {"postinstall": "node make.js"}})
    make = "require('fs').writeFileSync('made', `${process.pid} ${Date.now()}`)"
    package = tarball({"package/package.json": manifest, "package/make.js": make})
    first = world.machine("first", real_npm=True, install_scripts=True)
    wanted = project(first, scripts=True)
    assert (await first.install(wanted)).outcome is InstallOutcome.INSTALLED
    made = (wanted.modules / "dep/made").read_text()
    await served(first)

    second = world.machine("second", real_npm=True, install_scripts=True)
    again = project(second, scripts=True)
    assert (await second.install(again)).outcome is InstallOutcome.LAYER
    assert (again.modules / "dep/made").read_text() == made

    third = world.machine("third", real_npm=True)
    without = project(third, scripts=False)
    assert (await third.install(without)).outcome is InstallOutcome.INSTALLED
    assert not (without.modules / "dep/made").exists()


async def test_a_project_with_a_command_of_its_own_is_installed(world: World) -> None:
    machine = world.machine(
        "first", install_command=("sh", "-c", "mkdir -p node_modules/x; touch node_modules/x/y")
    )
    assert (
        await machine.install(write(machine.root, dependencies=ABSENT))
    ).outcome is InstallOutcome.INSTALLED
    assert world.service.asked == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
async def test_the_projects_user_packs_and_unpacks(world: World) -> None:
    """What root holds open is all that the program has of root: the files are the user's."""
    nobody = pwd.getpwnam("nobody")
    user = User("nobody", nobody.pw_uid, nobody.pw_gid, "/nonexistent")
    for path in (world.tmp_path, *world.tmp_path.parents):
        if path != Path("/tmp"):
            if path == Path("/"):
                break
            path.chmod(0o755)
    first = world.machine("first", rights=Rights(user))
    wanted = with_dependency(first.root)
    for path in (first.root, *first.root.rglob("*")):
        os.chown(path, user.uid, user.gid)
    result: InstallResult = await first.install(wanted)
    assert (result.outcome, result.problem) == (InstallOutcome.INSTALLED, None)
    await served(first)
    assert world.count("sent") == 1
    second = world.machine("second", rights=Rights(user))
    again = with_dependency(second.root)
    for path in (second.root, *second.root.rglob("*")):
        os.chown(path, user.uid, user.gid)
    assert (await second.install(again)).outcome is InstallOutcome.LAYER
    assert {path.lstat().st_uid for path in again.modules.rglob("*")} == {user.uid}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MB. Needs root, to mount it."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk of its own cannot be mounted here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


async def test_a_disk_that_is_full_is_an_install(world: World, small_disk: Path) -> None:
    """What a layer took of it is free again before the install begins, which needs all there is."""
    large = packed(tree(world.tmp_path / "large", {"node_modules/dep/large": os.urandom(3 * 2**20)}))
    (world.npm / "npm").write_text(f"{NPM}head -c 1500000 /dev/zero >node_modules/dep/half\n")
    machine = world.machine("first", modules_dir=small_disk / "modules")
    wanted = with_dependency(machine.root)
    world.service.keep(await key_of(machine, wanted), large)
    with capture_logs() as lines:
        result = await machine.install(wanted)
    assert (result.outcome, result.problem) == (InstallOutcome.INSTALLED, None)
    assert "No space left on device" in str(lines)
    assert world.service.refused == [], "the layer is as good as it was"
    assert machine.leftovers == []


async def test_what_a_killed_agent_was_unpacking_goes_at_the_next_start(world: World) -> None:
    machine = world.machine("first")
    gone = await asyncio.create_subprocess_exec("true")
    await gone.wait()
    tree(machine.settings.modules / f"stage-{gone.pid}-1" / "tree", MODULES)
    wanted = with_dependency(machine.root)
    assert (await machine.install(wanted)).outcome is InstallOutcome.INSTALLED
    assert machine.leftovers == []
    assert not (wanted.modules / "left-pad-that-nobody-has").exists()


@pytest.mark.parametrize(
    "text", ["", "no JSON", "{}", "[]", '[{"url": 1}]', '[{"url":"x","sha256":"y","size":1}]']
)
def test_parts_that_cannot_be_read_are_none(text: str) -> None:
    assert given_layer("0" * 40, text) is None
    part = '[{"url":"http://x","sha256":"%s","size":1}]' % ("0" * 64)
    assert given_layer("0" * 40, part) is not None
    assert given_layer("not a key", part) is None


def test_the_layer_key_is_what_the_orchestrator_takes() -> None:
    key = layer_key("x", Platform("1", "linux", "x86_64", "glibc"))
    assert len(key) == 40
