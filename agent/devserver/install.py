"""Installs dependencies beside the project, and swaps them in only when they are complete.

    current    node_modules was installed for what the project wants now: nothing is done
    cached     an earlier install for the same key is hard-linked into place
    layer      an archive of the same install, made by another machine, is unpacked and swapped in (`agent.modules`)
    installed  the package manager ran in a staging directory, and its result was swapped in

An install that fails, hangs or is killed leaves the project's node_modules and whatever runs on them as they were, and
a swap that is cut short is undone. Every step runs as a shell script as the project's user: the agent, which may be
root, writes nothing itself into what that user owns.

A workspace has a node_modules at its root and, with pnpm, one in each package. They are sealed, cached, swapped in and
put back as one set; a *place* is the path of one, relative to the root. A staging directory has

    tree   the copy of the project in which the package manager works
    for    the path of the project
    old    during a swap: what was in place before; the last step of the swap renames it to `done`

so a staging directory that has `old` is that of a swap that did not end, and `old` is put back.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import NoReturn
from uuid import UUID

from agent.config import Settings
from agent.core.errors import RootUnusable
from agent.core.model import Problem
from agent.devserver import process
from agent.devserver.process import Finished, node_platform
from agent.devserver.reaper import Reaper
from agent.devserver.sandbox import Rights, environment, install_environment
from agent.fs.places import open_directory
from agent.modules.arrivals import Arrival, Layers, first
from agent.modules.bundles import DEPS, WAIT_SECONDS, Bundles
from agent.modules.layers import LayerStore, Missing
from agent.modules.stages import Stages
from agent.modules.steps import (
    FETCH,
    LINK,
    SEAL,
    STAGE_ALL,
    STAGE_SOME,
    STAMP,
    SWAP,
    StepFailed,
    failure,
    lock_line,
    manifests,
)
from agent.project import reading
from agent.project.choice import ProjectUnreadable
from agent.project.install_key import Platform, layer_key
from agent.project.locks import Locks, MadeLocks
from agent.project.managers import LOCK_AT_FAULT, Manager, PackageManager
from agent.project.reading import Dependencies
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics

CACHED_INSTALLS = 4
"""Finished installs in the cache, at some 70 MB each: enough to go back and forth between a few lock files."""

log = get_logger("supervisor")


class InstallOutcome(StrEnum):
    """How an install ended; the metric's label."""

    CURRENT = "current"
    CACHED = "cached"
    LAYER = "layer"
    INSTALLED = "installed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class InstallResult:
    """How an install ended.

    `swapped`: another node_modules is in place now. `usable`: there is one to run with. `seconds`: how long it took.
    """

    outcome: InstallOutcome
    swapped: bool
    usable: bool
    seconds: float
    problem: Problem | None = None


class Installer:
    """Brings a project's node_modules up to date, one `install` at a time."""

    def __init__(
        self,
        settings: Settings,
        *,
        environ: Mapping[str, str],
        rights: Rights,
        on_line: Callable[[str], None],
        reaper: Reaper | None = None,
        layers: LayerStore | None = None,
        metrics: Metrics | None = None,
        locks: Locks | None = None,
    ) -> None:
        self._directory = settings.modules
        self._project_dir = settings.project_dir
        self._command = settings.install_command
        self._npmrc: str | None = None
        self._scripts = settings.install_scripts
        self._seconds = settings.install_seconds
        self._rights = rights
        self._on_line = on_line
        self._reaper = reaper
        self._environ = environ
        self._stages = Stages(self._directory, self._project_dir, self._program)
        self._metrics = metrics or Metrics()
        self._made_locks = MadeLocks(locks, settings.project_dir)
        # Layers: archives of whole installs, where there is somebody to ask for them.
        self._layers = (
            Layers(layers, self._program, self._stages.with_tree, self._metrics, settings.state_dir)
            if layers
            else None
        )
        self._bundles = Bundles(self._layers, self._stages) if self._layers else None
        self._wait = settings.modules_wait_seconds
        self._platform: Platform | None = None
        self._wanted_layer: tuple[Missing, Path] | None = None
        """A layer that is not there, and the install that is to be sent for it."""

    def configure(self, command: tuple[str, ...] | None, npmrc: str | None) -> None:
        """Take the project's install command and its npmrc, which is a secret, from run settings."""
        self._command, self._npmrc = command, npmrc

    async def open(self) -> None:
        """Make the directory for staging and cache, and undo and remove what a killed agent left there.

        Gives a project directory that belongs to root to the project's user, who has to put node_modules there; what
        is in it stays as it is.

        Raises:
            RootUnusable: It cannot be made, or there is a symbolic link in its place.
        """
        try:
            self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise RootUnusable(f"cannot make {self._directory} for installs: {error.strerror}") from error
        self._chown(self._directory, only_from=None)
        with contextlib.suppress(FileNotFoundError):
            self._chown(self._project_dir, only_from=0)
        await self._stages.recover()

    def _chown(self, directory: Path, *, only_from: int | None) -> None:
        """Give a directory to the project's user, if it belongs to the user `only_from`; None: to any user."""
        try:
            descriptor = open_directory(directory)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RootUnusable(f"cannot use {directory}: {error.strerror}") from error
        try:
            if (user := self._rights.user) and only_from in (None, os.fstat(descriptor).st_uid):
                os.fchown(descriptor, user.uid, user.gid)
        finally:
            os.close(descriptor)

    async def install(self, wanted: Dependencies, *, manager_runs: bool = False) -> InstallResult:
        """Make `wanted.modules` what the project wants.

        Args:
            wanted: What to install, and where.
            manager_runs: Whether the package manager is there to run the project, too: it is fetched in any case.

        Returns:
            How it ended. What went wrong is its `problem`, not an exception.
        """
        began = time.monotonic()
        problem: Problem | None = None
        outcome, swapped = InstallOutcome.CURRENT, False
        stage = self._stages.new()
        current = not wanted.exist or self._made_locks.same(reading.installed_key(wanted.modules), wanted.key)
        bundle = self._fetch_bundle(wanted, current=current)
        try:
            cached = not current and await self._from_cache(wanted, stage)
            if manager_runs:
                await self._provide(wanted.manager, stage)
            if not current:
                if cached:
                    outcome = InstallOutcome.CACHED
                else:
                    outcome, stage, problem = await self._obtain(wanted)
                await self._place_bundle(bundle, stage / "tree")
                await self._stages.do("swap", SWAP, stage / "tree", wanted.root, stage / "old")
                swapped = True
            else:
                await self._place_bundle(bundle, wanted.root)
        except StepFailed as failure:
            outcome = InstallOutcome.FAILED
            problem = Problem("install_failed", str(failure), rule=failure.rule)
        finally:
            await _ended(bundle)
            await asyncio.shield(self._discard())
        usable = wanted.modules.is_dir() or not wanted.exist
        seconds, rule = time.monotonic() - began, problem.rule if problem else None
        self._metrics.installs.labels(outcome.value).inc()
        self._metrics.start.mark("modules")
        log.info("install.done", result=outcome.value, seconds=round(seconds, 3), problem=rule)
        return InstallResult(outcome, swapped, usable, seconds, problem)

    def path(self, manager: PackageManager, path: str) -> str:
        """Return a PATH on which a shell finds this package manager first, if it was fetched; else `path`."""
        fetched = self._fetched(manager) / "node_modules" / ".bin"
        return f"{fetched}:{path}" if fetched.is_dir() and not manager.is_installed(path) else path

    async def prefetch(self) -> None:
        """Fetch the layer that was named when the machine was made, while the project's files are on their way."""
        if self._layers is None or self._command:
            return
        given = self._layers.given
        recorded = reading.installed_key(self._project_dir / "node_modules")
        if given is not None and not recorded:
            # What the key needs to know of Node takes a tenth of a second, which passes meanwhile.
            await asyncio.gather(self._layers.prefetch(), self._layer_key(""))
        elif await self._layer_key(recorded or "") != (given and given.key) and given is not None:
            await self._layers.prefetch()

    async def served(self) -> None:
        """Note that the project runs on what was installed last, and send that as a layer, if one is wanted."""
        self._metrics.start.mark("first_page")
        if self._layers and self._wanted_layer:
            (missing, directory), self._wanted_layer = self._wanted_layer, None
            await self._layers.send(missing, directory, directory / STAMP)
        if self._bundles:
            await self._bundles.keep()

    # --- layers

    def _fetch_bundle(self, wanted: Dependencies, *, current: bool) -> asyncio.Task[Path | None] | None:
        """Begin to fetch what Vite bundled ahead, where it is not there."""
        if self._bundles is None or not wanted.exist:
            return None
        key = partial(self._key_of, wanted)
        self._bundles.installed(wanted.root, key)
        if current and os.path.lexists(wanted.root / DEPS):
            return None
        return asyncio.create_task(self._bundles.fetch(wanted.root, key), name="modules-bundle")

    async def _place_bundle(self, bundle: asyncio.Task[Path | None] | None, directory: Path) -> None:
        if bundle is None or self._bundles is None:
            return
        await asyncio.wait({bundle}, timeout=WAIT_SECONDS)
        if bundle.done() and not bundle.cancelled() and (stage := bundle.result()) is not None:
            await self._bundles.place(stage, directory)

    async def _obtain(self, wanted: Dependencies) -> tuple[InstallOutcome, Path, Problem | None]:
        """Get what is wanted from a layer or from the package manager. Returns also where it is staged."""
        key = await self._key_of(wanted)
        near = wanted.manager.name is Manager.NPM
        arrival = await self._layers.arrival(key, near=near) if self._layers else None
        if arrival is None or self._layers is None:
            return await self._managed(wanted)
        await asyncio.wait({arrival.task}, timeout=self._wait)
        if arrival.key == key and arrival.is_there:
            return await self._unpacked(arrival, wanted)
        if arrival.key == key and not arrival.task.done():
            managed = await first(arrival, partial(self._managed, wanted))
            return managed or await self._unpacked(arrival, wanted)
        if arrival.is_there:
            with contextlib.suppress(StepFailed):  # it is installed from nothing then
                managed = await self._managed(wanted, ahead=arrival.stage)
                self._layers.used(arrival, "head_start")
                return managed
        await arrival.cancel()
        await self._stages.shell('rm -rf "$1"', arrival.stage)  # the disk may be full of it
        return await self._managed(wanted)

    async def _unpacked(
        self, arrival: Arrival, wanted: Dependencies
    ) -> tuple[InstallOutcome, Path, Problem | None]:
        there = f'[ -d "$2/tree/node_modules" ] && {STAGE_SOME.strip()}'
        await self._stages.do("stage", there, wanted.root, arrival.stage, wanted.root / "package.json")
        await self._stages.do("seal", SEAL, arrival.stage / "tree", wanted.key, reading.RECORD)
        assert self._layers is not None
        self._layers.used(arrival, "unpacked")
        return InstallOutcome.LAYER, arrival.stage, None

    async def _managed(
        self, wanted: Dependencies, *, ahead: Path | None = None
    ) -> tuple[InstallOutcome, Path, Problem | None]:
        """Have the package manager install: in a stage of its own, or in `ahead`, which has a near node_modules."""
        stage = ahead or self._stages.new()
        if not self._command:
            await self._provide(wanted.manager, stage)
        problem = await self._run_manager(wanted, stage, ahead=ahead is not None)
        missing = self._layers.missing if self._layers else None
        if missing is not None and missing.upload_urls and problem is None:
            self._wanted_layer = (missing, self._directory / "cache" / wanted.key)
        return InstallOutcome.INSTALLED, stage, problem

    async def _key_of(self, wanted: Dependencies) -> str | None:
        """Return the key of the layer for what is wanted; None: no key says what its install brings about."""
        return None if self._command or wanted.own_scripts else await self._layer_key(wanted.key)

    async def _layer_key(self, key: str) -> str | None:
        """Return the key of the layer for an install; None where no Node says what it is built for."""
        if self._platform is None:
            env = environment(self._environ, user=self._rights.user, more={})
            self._platform = await node_platform(env, self._rights, self._reaper)
        return layer_key(key, self._platform) if self._platform else None

    async def _program(
        self, argv: tuple[str, ...], given: int | None, seconds: float, more: Mapping[str, str] | None = None
    ) -> Finished:
        return await process.run(
            argv, cwd=self._directory, env=self._environment() | dict(more or {}), rights=self._rights,
            timeout=seconds, reaper=self._reaper, given=given,
        )  # fmt: skip

    # --- the steps

    async def _from_cache(self, wanted: Dependencies, stage: Path) -> bool:
        cached = self._directory / "cache" / wanted.key
        if not (cached / "node_modules").is_dir():
            return False
        await self._stages.do("stage", STAGE_SOME, wanted.root, stage, wanted.root / "package.json")
        done = await self._stages.shell(f'({LINK}) && touch "$1"', cached, stage / "tree")
        if not done.ok:
            await self._stages.shell('rm -rf "$1"', stage)
        return done.ok

    def _fetched(self, manager: PackageManager) -> Path:
        return self._directory / "managers" / manager.package.replace("/", "+")

    async def _provide(self, manager: PackageManager, stage: Path) -> None:
        """Have npm fetch the package manager, unless the one on PATH or one fetched earlier is the right one."""
        path = self._environ.get("PATH")
        if manager.is_installed(path) or self._fetched(manager).is_dir():
            return
        if not shutil.which("npm", path=path):
            remedy = f"use an image with Node and npm, add {manager.package} to it, or set INSTALL_COMMAND"
            raise StepFailed(
                "missing", f"{manager.package} is not installed here, nor is npm to fetch it; {remedy}"
            )
        self._on_line(f"npm fetches {manager.package}")
        fetched = (manager.package, stage / "manager", self._fetched(manager), manager.name)
        done = await self._stages.shell(FETCH, *fetched, seconds=self._seconds)
        if not done.ok:
            self._refuse(("npm", "install", manager.package), done)

    async def _run_manager(self, wanted: Dependencies, stage: Path, *, ahead: bool) -> Problem | None:
        """Install in the stage, as the lock file says or else without it. Returns a problem if it was without.

        `ahead`: there is a near node_modules, which the strict command (`npm ci`) would delete.
        """
        staged = await self._stage(wanted, stage)
        manager, problem = staged.manager, None
        saves = not self._command and self._made_locks.wanted(wanted)
        commands = [self._command] if self._command else manager.commands(scripts=self._scripts, saves=saves)
        if ahead:
            commands = commands[-1:]
        env = self._environment()
        env["PATH"] = self.path(manager, env.get("PATH", os.defpath))
        if self._npmrc is not None:
            env["NPM_CONFIG_USERCONFIG"] = env["npm_config_userconfig"] = str(stage / "npmrc")
        fault = None if self._command else reading.lock_fault(staged)
        for command in () if fault else commands:
            done, at_lock = await self._run(command, staged.root, env)
            fault = lock_line(done.tail, done.last) if at_lock and not self._command else None
            if fault is None:
                break
            self._on_line(f"{manager.lock} does not match package.json")
        if fault:
            self._on_line(f"{manager.lock} cannot be used; installing without it")
            detail = f"installed without {manager.lock}, which {manager.package} cannot use: {fault}"
            problem = Problem("lock_unusable", detail, path=manager.lock)
            await self._stages.shell('rm -f -- "$1"', staged.root / str(manager.lock))
            commands = replace(manager, lock=None).commands(scripts=self._scripts, saves=saves)
            done, _ = await self._run(commands[0], staged.root, env)
        if not done.ok:
            self._refuse(commands[0], done)
        await self._stages.do("seal", SEAL, staged.root, staged.key, reading.RECORD)
        await self._cache(staged, stage)
        if saves:
            await self._made_locks.hand_over(wanted, staged, scripts=self._scripts)
        return problem

    def _refuse(self, command: Sequence[str], done: Finished) -> NoReturn:
        raise failure(command, done.code, done.tail, self._seconds, done.timed_out)

    async def _run(
        self, command: Sequence[str], directory: Path, env: Mapping[str, str]
    ) -> tuple[Finished, bool]:
        """Run the package manager. Returns also whether it failed and said that it was at its lock file."""
        said = False

        def on_line(line: str) -> None:
            nonlocal said
            said = said or bool(LOCK_AT_FAULT.search(line))
            self._on_line(line)

        done = await process.run(
            command, cwd=directory, env=env, rights=self._rights,
            timeout=self._seconds, on_line=on_line, reaper=self._reaper,
        )  # fmt: skip
        return done, said and not done.ok and not done.timed_out

    async def _stage(self, wanted: Dependencies, stage: Path) -> Dependencies:
        """Copy what the install needs. Returns what is wanted of the copy, which may be a save later than `wanted`."""
        whole = wanted.whole_tree or self._command
        script, files = (STAGE_ALL, ()) if whole else (STAGE_SOME, manifests(wanted))
        await self._stages.do("stage", script, wanted.root, stage, *files)
        try:
            staged = await asyncio.to_thread(reading.dependencies, stage / "tree", scripts=self._scripts)
        except ProjectUnreadable as error:
            raise StepFailed("package_json", str(error)) from None
        if self._npmrc is not None:
            secrets = {"npmrc": self._npmrc}
            await self._stages.do(
                "stage", 'umask 077; printf %s "$npmrc" >"$1"', stage / "npmrc", secrets=secrets
            )
        if not staged.exist:
            raise StepFailed(
                "stage", "package.json changed while it was read; it is read again on its next change"
            )
        return staged

    async def _cache(self, staged: Dependencies, stage: Path) -> None:
        """Copy the install into the cache. Where that fails, only a line of output says so."""
        cached = self._directory / "cache" / staged.key
        done = await self._stages.shell(
            f'mkdir -p "$2" "$3" && ({LINK}) && : >"$2/{STAMP}" && {{ mv "$2" "$4" 2>/dev/null || [ -d "$4" ]; }}',
            staged.root,
            stage / "cached",
            cached.parent,
            cached,
        )
        if not done.ok:
            self._on_line(f"the install is not cached: {done.last}")
            return
        with contextlib.suppress(OSError):
            by_age = sorted(cached.parent.iterdir(), key=lambda install: install.stat().st_mtime)
            if old := by_age[:-CACHED_INSTALLS]:
                await self._stages.shell('rm -rf -- "$@"', *old)

    async def _discard(self) -> None:
        """Undo what the install under way left half-done, and remove its staging directories."""
        early = self._layers.take_early() if self._layers else None
        if early:
            await early.cancel()
        await self._stages.discard(*([early.stage] if early else []))

    def _environment(self) -> dict[str, str]:
        return install_environment(
            self._environ, user=self._rights.user, scripts=self._scripts, home=self._directory
        )


async def _ended(task: asyncio.Task[Path | None] | None) -> None:
    if task is not None:
        task.cancel()
        await asyncio.wait({task})


async def bake(directory: Path) -> InstallResult:
    """Install in `directory` for an image: as this user, and without a cache."""
    wanted = reading.dependencies(directory)
    settings = Settings(project_id=UUID(int=0), session_id=UUID(int=0), project_dir=directory)
    installer = Installer(settings, environ=os.environ, rights=Rights(), on_line=_print)
    await installer.open()
    try:
        return await installer.install(wanted)
    finally:
        shutil.rmtree(settings.modules)


def _print(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    baked = asyncio.run(bake(Path(sys.argv[1]).resolve()))
    if baked.problem:
        sys.exit(baked.problem.detail)
