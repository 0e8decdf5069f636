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
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from uuid import UUID

from agent.config import Settings
from agent.core.errors import RootUnusable
from agent.core.model import Problem
from agent.devserver import process, project
from agent.devserver.process import Finished
from agent.devserver.project import PLACES, Manager, Project, ProjectUnreadable
from agent.devserver.reaper import Reaper
from agent.devserver.sandbox import Rights, environment
from agent.fs.places import open_directory

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

CACHED_INSTALLS = 4
"""Finished installs in the cache, at some 70 MB each: enough to go back and forth between a few lock files."""
SHELL_SECONDS = 120.0
"""For one of the scripts above. They take tens of milliseconds; on a full or a slow disk they must end too."""
STAGES_AT_ONCE = 200
"""Staging directories that one shell is given. The guard gets them in one argument, of at most 128 KB on Linux."""
PROBLEM_LINES = 15
"""Lines of the package manager's output, the last ones, that a problem shows."""

_STALE_LOCK = re.compile(
    r"EUSAGE|ERR_PNPM_OUTDATED_LOCKFILE|frozen-lockfile|lockfile needs to be updated|lockfile had changes|YN0028"
)
"""How each package manager says that its lock file and package.json disagree."""

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
        self._userconfig: Path | None = None
        """The project's own npmrc, while a package manager runs."""

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

    async def install(self, wanted: Project) -> InstallResult:
        """Make `wanted.modules` what the project wants. What goes wrong is the result's `problem`, not an exception."""
        began = time.monotonic()

        def result(
            outcome: InstallOutcome, *, swapped: bool = False, problem: Problem | None = None
        ) -> InstallResult:
            usable = wanted.modules.is_dir() or not wanted.has_dependencies
            return InstallResult(outcome, swapped, usable, time.monotonic() - began, problem)

        if not wanted.has_dependencies or project.installed_key(wanted.modules) == wanted.key:
            return result(InstallOutcome.CURRENT)
        stage = self._directory / f"stage-{os.getpid()}-{next(self._names)}"
        try:
            cached = await self._from_cache(wanted, stage)
            if not cached:
                await self._run_manager(wanted, stage)
            await self._do("swap", SWAP, stage / "tree", wanted.root, stage / "old")
            return result(InstallOutcome.CACHED if cached else InstallOutcome.INSTALLED, swapped=True)
        except _Failed as failure:
            return result(
                InstallOutcome.FAILED, problem=Problem("install_failed", str(failure), rule=failure.rule)
            )
        finally:
            await asyncio.shield(self._discard(stage))

    # --- the steps

    async def _from_cache(self, wanted: Project, stage: Path) -> bool:
        cached = self._directory / "cache" / wanted.key
        if not (cached / "node_modules").is_dir():
            return False
        await self._do("stage", STAGE_SOME, wanted.root, stage, wanted.root / "package.json")
        done = await self._shell(f'({LINK}) && touch "$1"', cached, stage / "tree")
        if not done.ok:
            await self._discard(stage)
        return done.ok

    async def _run_manager(self, wanted: Project, stage: Path) -> None:
        staged = await self._stage(wanted, stage)
        commands = [self._command] if self._command else _commands(staged, scripts=self._scripts)
        self._userconfig = await self._write_npmrc(stage)
        prefix = () if self._command else self._fetch_prefix(staged)
        done, stale = await self._run(prefix, commands[0], staged.root)
        if not done.ok and len(commands) > 1 and stale:
            self._on_line(f"{wanted.lock} does not match package.json; installing without it")
            done, _ = await self._run(prefix, commands[1], staged.root)
        if not done.ok:
            raise _failure(commands[0], done, self._seconds)
        await self._do("seal", SEAL, staged.root, staged.key, project.RECORD)
        await self._cache(staged, stage)

    def _fetch_prefix(self, wanted: Project) -> tuple[str, ...]:
        """Return what to put before the command so that npm fetches a package manager that is not installed."""
        name, path = wanted.manager.value, self._environ.get("PATH")
        if shutil.which(name, path=path) or not shutil.which("npm", path=path):
            return ()
        self._on_line(f"{name} is not installed here; npm fetches {wanted.package}")
        return ("npm", "exec", "--yes", f"--package={wanted.package}", "--")

    async def _run(
        self, prefix: Sequence[str], command: Sequence[str], directory: Path
    ) -> tuple[Finished, bool]:
        """Run the package manager. Returns also whether it said that lock file and package.json disagree."""
        stale = False

        def on_line(line: str) -> None:
            nonlocal stale
            stale = stale or bool(_STALE_LOCK.search(line))
            self._on_line(line)

        done = await process.run(
            (*prefix, *command), cwd=directory, env=self._environment() | self._registry(), rights=self._rights,
            timeout=self._seconds, on_line=on_line, reaper=self._reaper,
        )  # fmt: skip
        return done, stale

    async def _write_npmrc(self, stage: Path) -> Path | None:
        """Write the npmrc of run settings into the stage, for the project's user alone; it goes with the stage."""
        if self._npmrc is None:
            return None
        path = stage / "npmrc"
        script = 'umask 077 && printf %s "$NPMRC" >"$1"'
        done = await self._shell(script, path, more={"NPMRC": self._npmrc})
        if not done.ok:
            raise _Failed("stage", f"cannot write the npmrc of the run settings: {_last(done)}")
        return path

    def _registry(self) -> dict[str, str]:
        """Return the variable by which package managers find it."""
        return {"NPM_CONFIG_USERCONFIG": str(self._userconfig)} if self._userconfig else {}

    async def _stage(self, wanted: Project, stage: Path) -> Project:
        """Copy what the install needs. Returns the project as copied, which may be a save later than `wanted`."""
        whole = wanted.whole_tree or self._command
        script, files = (STAGE_ALL, ()) if whole else (STAGE_SOME, _manifests(wanted))
        await self._do("stage", script, wanted.root, stage, *files)
        try:
            staged = project.find(stage / "tree", scripts=self._scripts)
        except ProjectUnreadable as error:
            raise _Failed("package_json", str(error)) from None
        if staged is None or not staged.has_dependencies:
            raise _Failed(
                "stage", "package.json changed while it was read; it is read again on its next change"
            )
        return staged

    async def _cache(self, staged: Project, stage: Path) -> None:
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

    async def _do(self, rule: str, script: str, *arguments: str | Path) -> None:
        """Run one of the scripts above. Raises `_Failed`."""
        done = await self._shell(script, *arguments)
        if not done.ok:
            raise _Failed(rule, f"cannot {STEPS[rule]}: {_last(done)}")

    async def _shell(
        self, script: str, *arguments: str | Path, more: Mapping[str, str] | None = None
    ) -> Finished:
        env = self._environment() | dict(more or {})
        return await process.run(
            ("sh", "-c", script, "install", *map(str, arguments)), cwd=self._directory, env=env,
            rights=self._rights, timeout=SHELL_SECONDS, reaper=self._reaper,
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


def _manifests(wanted: Project) -> list[str]:
    names = [n for n in ("package.json", wanted.lock, *project.BESIDE) if n]
    return [str(wanted.root / n) for n in names if os.path.lexists(wanted.root / n)]


def _commands(wanted: Project, *, scripts: bool) -> list[tuple[str, ...]]:
    """Return the commands to try; the second is for a lock file that does not match package.json."""
    quiet = () if scripts else ("--ignore-scripts",)
    match wanted.manager:
        case Manager.NPM:
            flags = ("--no-audit", "--no-fund", "--prefer-offline", "--include=dev", *quiet)
            loose = ("npm", "install", "--no-package-lock" if not wanted.lock else "--no-save", *flags)
            return [("npm", "ci", *flags), loose] if wanted.lock else [loose]
        case Manager.PNPM:
            start = ("pnpm", "install", "--prefer-offline", *quiet)
            strict, loose = (*start, "--frozen-lockfile"), (*start, "--no-frozen-lockfile")
            return [strict, loose] if wanted.lock else [loose]
        case Manager.YARN if wanted.modern_yarn:
            strict, start = ("yarn", "install", "--immutable"), ("yarn", "install", "--no-immutable")
            return [strict, start] if wanted.lock else [start]
        case Manager.YARN:
            start = ("yarn", "install", "--non-interactive", "--prefer-offline", "--production=false", *quiet)
            return [(*start, "--frozen-lockfile"), start] if wanted.lock else [(*start, "--no-lockfile")]
        case Manager.BUN:
            start = ("bun", "install", *quiet)
            return [(*start, "--frozen-lockfile"), start] if wanted.lock else [start]


def _failure(command: Sequence[str], done: Finished, seconds: float) -> _Failed:
    said = "\n".join(done.tail[-PROBLEM_LINES:])
    if done.timed_out:
        return _Failed("timeout", f"{command[0]} did not end within {seconds:g} s\n{said}".rstrip())
    if done.code == 126 and f"cannot run {command[0]}" in said:
        return _Failed(
            "missing", f"{command[0]} is not installed here; add it to the image, or set INSTALL_COMMAND"
        )
    return _Failed("exit", f"{' '.join(command[:2])} ended with {done.code}\n{said}".rstrip())


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
    wanted = project.find(directory)
    if wanted is None:
        raise SystemExit(f"no package.json in {directory}")
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
