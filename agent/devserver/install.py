"""Installs dependencies beside the project, and swaps them in only when they are complete.

    current    node_modules was installed for what the project wants now: nothing is done
    cached     an earlier install for the same key is hard-linked into place
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
import itertools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from uuid import UUID

from agent.config import Settings
from agent.core.errors import RootUnusable
from agent.core.model import Problem
from agent.devserver import process
from agent.devserver.process import Finished
from agent.devserver.reaper import Reaper
from agent.devserver.sandbox import Rights, environment
from agent.fs.places import open_directory
from agent.project import reading
from agent.project.choice import ProjectUnreadable
from agent.project.managers import BESIDE, LOCK_AT_FAULT, PackageManager
from agent.project.reading import PLACES, Dependencies

_FIND_PLACES = "find . -name node_modules -prune -type d"
_EXACT = """
exact=-T; [ "$(uname)" = Linux ] || exact=
"""
"""`mv -T` fails where another process made a directory in the meantime; a plain `mv` moves *into* it."""

STAGE_ALL = """
mkdir -p "$2/tree" && printf %s "$1" >"$2/for" && cd "$1" &&
tar --exclude=node_modules --exclude=.git -cf - . | tar -C "$2/tree" -xf -
"""
"""ROOT STAGE: copy the whole project without its node_modules."""

STAGE_SOME = """
root=$1; stage=$2; shift 2
mkdir -p "$stage/tree" && printf %s "$root" >"$stage/for" && cp -p -- "$@" "$stage/tree"
"""
"""ROOT STAGE FILE...: copy those files of the project."""

SEAL = f"""
cd "$1" && mkdir -p node_modules && [ ! -L node_modules ] && printf '{{"key": "%s"}}\\n' "$2" >"node_modules/$3" &&
{_FIND_PLACES} ! -path ./node_modules >node_modules/{PLACES} &&
{{ [ -s node_modules/{PLACES} ] || rm node_modules/{PLACES}; }}
"""
"""TREE KEY RECORD: write into node_modules what it was installed for, and which places belong to the set."""

LINK = f"""
cd "$1" && {_FIND_PLACES} | while IFS= read -r place; do
  mkdir -p "$2/${{place%/*}}" || exit 1
  cp -al "$place" "$2/$place" 2>/dev/null || {{ rm -rf "$2/$place"; cp -Rp "$place" "$2/$place"; }} || exit 1
done
"""
"""FROM TO: copy the set, as hard links where possible."""

SWAP = f"""{_EXACT}
root=$2; old=$3
aside() {{
  mkdir -p "$old/${{1%/*}}" || return 1
  if [ -e "$root/$1" ] || [ -L "$root/$1" ]; then mv $exact "$root/$1" "$old/$1"; fi
}}
cd "$1" || exit 1
{{ cat "$root/node_modules/{PLACES}" 2>/dev/null; {_FIND_PLACES} ! -path ./node_modules; }} | sort -u |
while IFS= read -r place; do
  [ -d "$root/${{place%/*}}" ] || continue
  aside "$place" || exit 1
  if [ -d "$place" ]; then mv $exact "$place" "$root/$place" || exit 1; fi
done && aside ./node_modules && mv $exact ./node_modules "$root/node_modules" && mv $exact "$old" "${{old%/*}}/done"
"""
"""TREE ROOT OLD: rename the set into its places. The root's comes last, since it holds the record of what is there."""

PUT_BACK = f"""{_EXACT}
within=$1; shift
for stage; do
  [ -d "$stage/old" ] || continue
  root=$(cat "$stage/for")
  case "$root/" in "$within"/*) ;; *) continue ;; esac
  (
    cd "$stage/old" && find . -name node_modules -prune | while IFS= read -r place; do
      if [ -d "$root/${{place%/*}}" ]; then rm -rf "$root/$place"; mv $exact "$place" "$root/$place"; fi
    done
  )
done
rm -rf -- "$@"
"""
"""PROJECT_DIR STAGE...: undo interrupted swaps of this project, and remove the staging directories."""

FETCH = f"""{_EXACT}
npm install --prefix "$2" --no-save --no-audit --no-fund --prefer-offline --ignore-scripts "$1" &&
{{ [ "$4" != bun ] || (cd "$2/node_modules/bun" && node install.js); }} &&
mkdir -p "${{3%/*}}" && {{ mv $exact "$2" "$3" || [ -d "$3" ]; }}
"""
"""PACKAGE STAGE DIRECTORY NAME: have npm fetch a package manager. Bun's package has its program from a script."""

CACHED_INSTALLS = 4
"""Finished installs in the cache, at some 70 MB each: enough to go back and forth between a few lock files."""
SHELL_SECONDS = 120.0
"""For one of the scripts above. They take tens of milliseconds; on a full or a slow disk they must end too."""
STAGES_AT_ONCE = 200
"""Staging directories that one shell is given. The guard gets them in one argument, of at most 128 KB on Linux."""
PROBLEM_LINES = 15
"""Lines of the package manager's output, the last ones, that a problem shows."""

_STAGE = re.compile(r"stage-([1-9][0-9]{0,9})-[0-9]+")
"""A staging directory's name: the pid of the agent that made it, and a number. Other names are left alone."""

STEPS = {"stage": "stage the install", "seal": "finish the install", "swap": "put node_modules in place"}
"""What a problem says could not be done, by step."""


class InstallOutcome(StrEnum):
    """How an install ended; the metric's label."""

    CURRENT = "current"
    CACHED = "cached"
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


class _Failed(Exception):
    """A step failed; `rule` names it, the message is for people."""

    def __init__(self, rule: str, detail: str) -> None:
        self.rule = rule
        super().__init__(detail)


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
        self._names = itertools.count(1)

    def configure(self, command: tuple[str, ...] | None, npmrc: str | None) -> None:
        """Take the project's install command and its npmrc, which is a secret, from run settings."""
        self._command, self._npmrc = command, npmrc

    async def open(self) -> None:
        """Make the directory for staging and cache, and undo and remove what a killed agent left there.

        Gives a project directory that belongs to root to the project's user, who has to put node_modules there; what
        is in it stays as it is.

        Raises:
            OSError: The directory cannot be made.
            RootUnusable: There is a symbolic link in its place.
        """
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._chown(self._directory, only_from=None)
        with contextlib.suppress(FileNotFoundError):
            self._chown(self._project_dir, only_from=0)
        left = [name for name in os.listdir(self._directory) if _is_left_over(name)]
        for start in range(0, len(left), STAGES_AT_ONCE):
            await self._shell(PUT_BACK, self._project_dir, *left[start : start + STAGES_AT_ONCE])

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
        stage = self._directory / f"stage-{os.getpid()}-{next(self._names)}"
        current = not wanted.exist or reading.installed_key(wanted.modules) == wanted.key
        try:
            cached = not current and await self._from_cache(wanted, stage)
            if not (current or cached or self._command) or manager_runs:
                await self._provide(wanted.manager, stage)
            if not current:
                if not cached:
                    problem = await self._run_manager(wanted, stage)
                await self._do("swap", SWAP, stage / "tree", wanted.root, stage / "old")
                outcome = InstallOutcome.CACHED if cached else InstallOutcome.INSTALLED
                swapped = True
        except _Failed as failure:
            outcome = InstallOutcome.FAILED
            problem = Problem("install_failed", str(failure), rule=failure.rule)
        finally:
            await asyncio.shield(self._discard(stage))
        usable = wanted.modules.is_dir() or not wanted.exist
        return InstallResult(outcome, swapped, usable, time.monotonic() - began, problem)

    def path(self, manager: PackageManager, path: str) -> str:
        """Return a PATH on which a shell finds this package manager first, if it was fetched; else `path`."""
        fetched = self._fetched(manager) / "node_modules" / ".bin"
        return f"{fetched}:{path}" if fetched.is_dir() and not manager.is_installed(path) else path

    # --- the steps

    async def _from_cache(self, wanted: Dependencies, stage: Path) -> bool:
        cached = self._directory / "cache" / wanted.key
        if not (cached / "node_modules").is_dir():
            return False
        await self._do("stage", STAGE_SOME, wanted.root, stage, wanted.root / "package.json")
        done = await self._shell(f'({LINK}) && touch "$1"', cached, stage / "tree")
        if not done.ok:
            await self._discard(stage)
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
            raise _Failed(
                "missing", f"{manager.package} is not installed here, nor is npm to fetch it; {remedy}"
            )
        self._on_line(f"npm fetches {manager.package}")
        fetched = (manager.package, stage / "manager", self._fetched(manager), manager.name)
        done = await self._shell(FETCH, *fetched, seconds=self._seconds)
        if not done.ok:
            raise _failure(("npm", "install", manager.package), done, self._seconds)

    async def _run_manager(self, wanted: Dependencies, stage: Path) -> Problem | None:
        """Install in the stage, as the lock file says or else without it. Returns a problem if it was without."""
        staged = await self._stage(wanted, stage)
        manager, problem = staged.manager, None
        commands = [self._command] if self._command else manager.commands(scripts=self._scripts)
        env = self._environment()
        env["PATH"] = self.path(manager, env.get("PATH", os.defpath))
        if self._npmrc is not None:
            env["NPM_CONFIG_USERCONFIG"] = env["npm_config_userconfig"] = str(stage / "npmrc")
        fault = None if self._command else reading.lock_fault(staged)
        for command in () if fault else commands:
            done, at_lock = await self._run(command, staged.root, env)
            fault = _lock_line(done) if at_lock and not self._command else None
            if fault is None:
                break
            self._on_line(f"{manager.lock} does not match package.json")
        if fault:
            self._on_line(f"{manager.lock} cannot be used; installing without it")
            detail = f"installed without {manager.lock}, which {manager.package} cannot use: {fault}"
            problem = Problem("lock_unusable", detail, path=manager.lock)
            await self._shell('rm -f -- "$1"', staged.root / str(manager.lock))
            commands = replace(manager, lock=None).commands(scripts=self._scripts)
            done, _ = await self._run(commands[0], staged.root, env)
        if not done.ok:
            raise _failure(commands[0], done, self._seconds)
        await self._do("seal", SEAL, staged.root, staged.key, reading.RECORD)
        await self._cache(staged, stage)
        return problem

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
        script, files = (STAGE_ALL, ()) if whole else (STAGE_SOME, _manifests(wanted))
        await self._do("stage", script, wanted.root, stage, *files)
        try:
            staged = await asyncio.to_thread(reading.dependencies, stage / "tree", scripts=self._scripts)
        except ProjectUnreadable as error:
            raise _Failed("package_json", str(error)) from None
        if self._npmrc is not None:
            secrets = {"npmrc": self._npmrc}
            await self._do("stage", 'umask 077; printf %s "$npmrc" >"$1"', stage / "npmrc", secrets=secrets)
        if not staged.exist:
            raise _Failed(
                "stage", "package.json changed while it was read; it is read again on its next change"
            )
        return staged

    async def _cache(self, staged: Dependencies, stage: Path) -> None:
        """Copy the install into the cache. Where that fails, only a line of output says so."""
        cached = self._directory / "cache" / staged.key
        done = await self._shell(
            f'mkdir -p "$2" "$3" && ({LINK}) && {{ mv "$2" "$4" 2>/dev/null || [ -d "$4" ]; }}',
            staged.root,
            stage / "cached",
            cached.parent,
            cached,
        )
        if not done.ok:
            self._on_line(f"the install is not cached: {_last(done)}")
            return
        with contextlib.suppress(OSError):
            by_age = sorted(cached.parent.iterdir(), key=lambda install: install.stat().st_mtime)
            if old := by_age[:-CACHED_INSTALLS]:
                await self._shell('rm -rf -- "$@"', *old)

    async def _discard(self, stage: Path) -> None:
        await self._shell(PUT_BACK, self._project_dir, stage)

    async def _do(
        self, rule: str, script: str, *arguments: str | Path, secrets: Mapping[str, str] | None = None
    ) -> None:
        """Run one of the scripts above. Raises `_Failed`."""
        done = await self._shell(script, *arguments, secrets=secrets)
        if not done.ok:
            raise _Failed(rule, f"cannot {STEPS[rule]}: {_last(done)}")

    async def _shell(
        self,
        script: str,
        *arguments: str | Path,
        seconds: float = SHELL_SECONDS,
        secrets: Mapping[str, str] | None = None,
    ) -> Finished:
        return await process.run(
            ("sh", "-c", script, "install", *map(str, arguments)), cwd=self._directory,
            env=self._environment() | dict(secrets or {}),
            rights=self._rights, timeout=seconds, reaper=self._reaper,
        )  # fmt: skip

    def _environment(self) -> dict[str, str]:
        more = {
            "CI": "1",
            "npm_config_update_notifier": "false",
            "YARN_NODE_LINKER": "node-modules",
            "YARN_ENABLE_SCRIPTS": str(self._scripts).lower(),
            "YARN_ENABLE_TELEMETRY": "false",
            # The paths that pnpm would write into .bin are those of the stage.
            "npm_config_extend_node_path": "false",
            "pnpm_config_extend_node_path": "false",
        }
        env = environment(self._environ, user=self._rights.user, more=more, install=True)
        if not os.path.isdir(env["HOME"]):
            env["HOME"] = str(self._directory)
        return env


def _manifests(wanted: Dependencies) -> list[str]:
    names = [n for n in ("package.json", wanted.manager.lock, *BESIDE) if n]
    return [str(wanted.root / n) for n in names if os.path.lexists(wanted.root / n)]


def _failure(command: Sequence[str], done: Finished, seconds: float) -> _Failed:
    said = "\n".join(done.tail[-PROBLEM_LINES:])
    if done.timed_out:
        return _Failed("timeout", f"{command[0]} did not end within {seconds:g} s\n{said}".rstrip())
    if done.code == 126 and f"cannot run {command[0]}" in said:
        return _Failed(
            "missing", f"{command[0]} is not installed here; add it to the image, or set INSTALL_COMMAND"
        )
    return _Failed("exit", f"{' '.join(command[:2])} ended with {done.code}\n{said}".rstrip())


def _lock_line(done: Finished) -> str:
    return next((line for line in reversed(done.tail) if LOCK_AT_FAULT.search(line)), _last(done))


def _last(done: Finished) -> str:
    return done.tail[-1] if done.tail else f"exit {done.code}"


def _is_left_over(name: str) -> bool:
    """Return whether this is a staging directory of an agent that has ended."""
    stage = _STAGE.fullmatch(name)
    if stage is None:
        return False
    pid = int(stage[1])
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False


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
