"""Dependencies: installed beside the project and swapped in only when whole.

    current    node_modules says it was installed for what the project wants now: nothing to do
    cached     an earlier install for the same key is hard-linked into place
    installed  the package manager ran in a staged directory, and its result was swapped in

Until the swap, two renames for each node_modules, the old ones and whatever runs on them stay as they are; an
install that fails, hangs or is killed leaves them so for good, and a swap that is cut short is undone. Every step
that touches what the project's user owns runs as that user: the agent, which may be root, writes nothing there itself.

The directories called node_modules that one install makes: sealed, kept, put in place, and put back, as one set.

A workspace has one at its root and, with pnpm, one in each package. Everything here is a shell script, because it
is run as the project's user, on what that user owns. A *place* is the path of a node_modules relative to the root.

A stage is `tree`, where the package manager works; `for`, which says whose node_modules it will be; `old`, what
was in place, while a swap is under way, renamed to `done` by the last step of it. So whoever finds a stage with
an `old` puts that back: the swap did not come to its end.
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

_FIND = "find . -name node_modules -prune -type d"
_START = """
exact=-T; [ "$(uname)" = Linux ] || exact=
"""
"""`mv -T` renames, where a plain `mv` moves *into* a directory that somebody put there in the meantime."""

STAGE_ALL = """
mkdir -p "$2/tree" && printf %s "$1" >"$2/for" && cd "$1" &&
tar --exclude=node_modules --exclude=.git -cf - . | tar -C "$2/tree" -xf -
"""
"""ROOT STAGE: the whole project but what is installed."""

STAGE_SOME = """
root=$1; stage=$2; shift 2
mkdir -p "$stage/tree" && printf %s "$root" >"$stage/for" && cp -p -- "$@" "$stage/tree"
"""
"""ROOT STAGE FILE...: those files."""

SEAL = f"""
cd "$1" && mkdir -p node_modules && [ ! -L node_modules ] && printf '{{"key": "%s"}}\\n' "$2" >"node_modules/$3" &&
{_FIND} ! -path ./node_modules >node_modules/{PLACES} &&
{{ [ -s node_modules/{PLACES} ] || rm node_modules/{PLACES}; }}
"""
"""TREE KEY RECORD: what it was installed for, and which places belong to it."""

LINK = f"""
cd "$1" && {_FIND} | while IFS= read -r place; do
  mkdir -p "$2/${{place%/*}}" || exit 1
  cp -al "$place" "$2/$place" 2>/dev/null || {{ rm -rf "$2/$place"; cp -Rp "$place" "$2/$place"; }} || exit 1
done
"""
"""FROM TO: the same set elsewhere, as hard links where possible."""

SWAP = f"""{_START}
root=$2; old=$3
aside() {{
  mkdir -p "$old/${{1%/*}}" || return 1
  if [ -e "$root/$1" ] || [ -L "$root/$1" ]; then mv $exact "$root/$1" "$old/$1"; fi
}}
cd "$1" || exit 1
{{ cat "$root/node_modules/{PLACES}" 2>/dev/null; {_FIND} ! -path ./node_modules; }} | sort -u |
while IFS= read -r place; do
  [ -d "$root/${{place%/*}}" ] || continue
  aside "$place" || exit 1
  if [ -d "$place" ]; then mv $exact "$place" "$root/$place" || exit 1; fi
done && aside ./node_modules && mv $exact ./node_modules "$root/node_modules" && mv $exact "$old" "${{old%/*}}/done"
"""
"""TREE ROOT OLD: the set into its places, the root's last, because it holds the record that says what is there."""

PUT_BACK = f"""{_START}
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
"""PROJECT_DIR STAGE...: undo what swaps of this project were interrupted, and remove the stages."""


KEPT = 4
"""Finished installs in the cache: a few lock files back and forth, at some 70 MB each."""
SHELL_SECONDS = 120.0
"""For copying, linking, renaming. Measured in tens of milliseconds; a full disk or a slow one must end too."""
AT_ONCE = 200
"""Left-over stages that one shell is given. The guard gets them as one argument, of which Linux takes 128 KB."""
TAIL = 15
"""Lines of the package manager's last words that a problem shows."""

_STALE_LOCK = re.compile(
    r"EUSAGE|ERR_PNPM_OUTDATED_LOCKFILE|frozen-lockfile|lockfile needs to be updated|lockfile had changes|YN0028"
)
"""How each package manager says that its lock file and package.json disagree."""

_STAGE = re.compile(r"stage-([1-9][0-9]{0,9})-[0-9]+")
"""A stage's name: the pid of the agent that made it, and a number. Whatever else is there, others have put there."""

STEPS = {"stage": "stage the install", "seal": "finish the install", "swap": "put node_modules in place"}
"""What fails, in a problem's words."""


class How(StrEnum):
    """What an install came to; the metric's label."""

    CURRENT = "current"
    CACHED = "cached"
    INSTALLED = "installed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Result:
    """How it ended. `swapped`: another node_modules is in place now. `usable`: there is one to run with."""

    how: How
    swapped: bool
    usable: bool
    seconds: float
    problem: Problem | None = None


class _Failed(Exception):
    """One step did not work; the message is for people."""

    def __init__(self, rule: str, detail: str) -> None:
        self.rule = rule
        super().__init__(detail)


class Installer:
    """Brings a project's node_modules up to date. One `install` at a time."""

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
        self._scripts = settings.install_scripts
        self._seconds = settings.install_seconds
        self._rights = rights
        self._on_line = on_line
        self._reaper = reaper
        self._environ = environ
        self._names = itertools.count(1)

    async def open(self) -> None:
        """Make the directory for stages and cache, and remove what a killed agent left. Raises OSError, and
        `RootUnusable` where a link stands.

        A project directory that somebody made as root is given to the project's user, who has to put node_modules
        there; what is in it stays as it is.
        """
        self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        self._give(self._directory, whose=None)
        with contextlib.suppress(FileNotFoundError):
            self._give(self._project_dir, whose=0)
        left = [name for name in os.listdir(self._directory) if _is_left_over(name)]
        for start in range(0, len(left), AT_ONCE):
            await self._shell(PUT_BACK, str(self._project_dir), *left[start : start + AT_ONCE])

    def _give(self, directory: Path, *, whose: int | None) -> None:
        """To the project's user if it is `whose`, or anybody's. Raises `RootUnusable` where a link leads elsewhere."""
        try:
            descriptor = open_directory(directory)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RootUnusable(f"cannot use {directory}: {error.strerror}") from error
        try:
            if (user := self._rights.user) and whose in (None, os.fstat(descriptor).st_uid):
                os.fchown(descriptor, user.uid, user.gid)
        finally:
            os.close(descriptor)

    async def install(self, wanted: Project) -> Result:
        """Make `wanted.modules` what the project wants. Never raises for what the project did wrong."""
        began = time.monotonic()

        def result(how: How, *, swapped: bool = False, problem: Problem | None = None) -> Result:
            usable = wanted.modules.is_dir() or not wanted.has_dependencies
            return Result(how, swapped, usable, time.monotonic() - began, problem)

        if not wanted.has_dependencies or project.installed_key(wanted.modules) == wanted.key:
            return result(How.CURRENT)
        stage = self._directory / f"stage-{os.getpid()}-{next(self._names)}"
        try:
            if await self._from_cache(wanted, stage):
                return result(How.CACHED, swapped=True)
            await self._fresh(wanted, stage)
            return result(How.INSTALLED, swapped=True)
        except _Failed as failure:
            return result(How.FAILED, problem=Problem("install_failed", str(failure), rule=failure.rule))
        finally:
            await asyncio.shield(self._discard(stage))

    # --- the steps

    async def _from_cache(self, wanted: Project, stage: Path) -> bool:
        kept = self._directory / "cache" / wanted.key
        if not (kept / "node_modules").is_dir():
            return False
        await self._do("stage", STAGE_SOME, wanted.root, stage, wanted.root / "package.json")
        done = await self._shell(f'({LINK}) && touch "$1"', str(kept), str(stage / "tree"))
        if not done.ok:
            await self._discard(stage)
            return False
        await self._swap(wanted, stage)
        return True

    async def _fresh(self, wanted: Project, stage: Path) -> None:
        staged = await self._prepare(wanted, stage)
        env = self._environment()
        commands = [self._command] if self._command else _commands(staged, scripts=self._scripts)
        prefix = () if self._command else self._fetched(staged)
        done, stale = await self._manager((*prefix, *commands[0]), staged.root, env)
        if not done.ok and len(commands) > 1 and stale:
            self._on_line(f"{wanted.lock} does not match package.json; installing without it")
            done, _ = await self._manager((*prefix, *commands[1]), staged.root, env)
        if not done.ok:
            raise _explained(commands[0], done, self._seconds)
        await self._do("seal", SEAL, staged.root, staged.key, project.RECORD)
        await self._keep(staged, stage)
        await self._swap(wanted, stage)

    def _fetched(self, wanted: Project) -> tuple[str, ...]:
        """What to put before the command so that npm fetches a package manager that is not installed."""
        name, path = wanted.manager.value, self._environ.get("PATH")
        if shutil.which(name, path=path) or not shutil.which("npm", path=path):
            return ()
        self._on_line(f"{name} is not installed here; npm fetches {wanted.package}")
        return ("npm", "exec", "--yes", f"--package={wanted.package}", "--")

    async def _manager(
        self, command: Sequence[str], stage: Path, env: Mapping[str, str]
    ) -> tuple[Finished, bool]:
        """Run it; also whether it said that lock file and package.json disagree."""
        stale = False

        def heard(line: str) -> None:
            nonlocal stale
            stale = stale or bool(_STALE_LOCK.search(line))
            self._on_line(line)

        done = await process.run(
            command, cwd=stage, env=env, rights=self._rights, timeout=self._seconds,
            on_line=heard, reaper=self._reaper,
        )  # fmt: skip
        return done, stale

    async def _prepare(self, wanted: Project, stage: Path) -> Project:
        """Fill the stage; the project as it was copied, which may be a save later than `wanted`."""
        whole = wanted.whole_tree or self._command
        script, files = (STAGE_ALL, ()) if whole else (STAGE_SOME, _manifests(wanted))
        await self._do("stage", script, wanted.root, stage, *files)
        try:
            staged = project.find(stage / "tree", scripts=self._scripts)
        except ProjectUnreadable as error:
            raise _Failed("package_json", str(error)) from None
        if staged is None or not staged.has_dependencies:
            raise _Failed(
                "stage", "package.json changed while it was read; it is looked at again on its next change"
            )
        return staged

    async def _keep(self, staged: Project, stage: Path) -> None:
        """Into the cache, for the next time. That it cannot be kept is no reason to fail."""
        kept = self._directory / "cache" / staged.key
        done = await self._shell(
            f'mkdir -p "$2" "$3" && ({LINK}) && {{ mv "$2" "$4" 2>/dev/null || [ -d "$4" ]; }}',
            *map(str, (staged.root, stage / "kept", kept.parent, kept)),
        )
        if not done.ok:
            self._on_line(f"the install is not kept for the next time: {_last(done)}")
            return
        with contextlib.suppress(OSError):
            old = sorted(os.scandir(kept.parent), key=lambda entry: entry.stat().st_mtime)[:-KEPT]
            if old:
                await self._shell('rm -rf -- "$@"', *(entry.path for entry in old))

    async def _swap(self, wanted: Project, stage: Path) -> None:
        await self._do("swap", SWAP, stage / "tree", wanted.root, stage / "old")

    async def _discard(self, stage: Path) -> None:
        await self._shell(PUT_BACK, str(self._project_dir), str(stage))

    async def _do(self, rule: str, script: str, *arguments: str | Path) -> None:
        """One step of ours. Raises `_Failed`."""
        done = await self._shell(script, *map(str, arguments))
        if not done.ok:
            raise _Failed(rule, f"cannot {STEPS[rule]}: {_last(done)}")

    async def _shell(self, script: str, *arguments: str) -> Finished:
        return await process.run(
            ("sh", "-c", script, "install", *arguments), cwd=self._directory, env=self._environment(),
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
    """What to run; the second is for a lock file that does not match package.json."""
    quiet = () if scripts else ("--ignore-scripts",)
    match wanted.manager:
        case Manager.NPM:
            flags = ("--no-audit", "--no-fund", "--prefer-offline", "--include=dev", *quiet)
            loose = ("npm", "install", "--no-package-lock" if not wanted.lock else "--no-save", *flags)
            return [("npm", "ci", *flags), loose] if wanted.lock else [loose]
        case Manager.PNPM:
            start = ("pnpm", "install", "--prefer-offline", *quiet)
            return [(*start, "--frozen-lockfile"), (*start, "--no-frozen-lockfile")][
                0 if wanted.lock else 1 :
            ]
        case Manager.YARN if wanted.modern_yarn:
            strict, start = ("yarn", "install", "--immutable"), ("yarn", "install", "--no-immutable")
            return [strict, start] if wanted.lock else [start]
        case Manager.YARN:
            start = ("yarn", "install", "--non-interactive", "--prefer-offline", "--production=false", *quiet)
            return [(*start, "--frozen-lockfile"), start] if wanted.lock else [(*start, "--no-lockfile")]
        case Manager.BUN:
            start = ("bun", "install", *quiet)
            return [(*start, "--frozen-lockfile"), start] if wanted.lock else [start]


def _explained(command: Sequence[str], done: Finished, seconds: float) -> _Failed:
    said = "\n".join(done.tail[-TAIL:])
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
    """Whether this is a stage of an agent that is no more."""
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
        return False
    return False


NOBODY = UUID(int=0)
"""An image is baked for no session."""


async def bake(directory: Path) -> Result:
    """Install in `directory` as an image does it once for all: no other user, no cache kept."""
    wanted = project.find(directory)
    if wanted is None:
        raise SystemExit(f"no package.json in {directory}")
    settings = Settings(project_id=NOBODY, session_id=NOBODY, project_dir=directory)
    installer = Installer(settings, environ=os.environ, rights=Rights(), on_line=_say)
    await installer.open()
    try:
        return await installer.install(wanted)
    finally:
        shutil.rmtree(settings.modules)


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


if __name__ == "__main__":
    outcome = asyncio.run(bake(Path(sys.argv[1]).resolve()))
    if outcome.problem:
        sys.exit(outcome.problem.detail)
