"""What kind of project this is: where its package.json stands, who installs it, what starts it.

Read from files that somebody else writes, so nothing here follows a link, blocks on a pipe or believes a
size. A project that cannot be read is a `ProjectUnreadable` with one sentence, and what runs goes on running.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from agent.core.errors import AgentError, PathRefused
from agent.core.model import parse_path

LARGEST = 64 * 2**20
"""Bytes. Lock files of big workspaces reach 10 MB; past this it is not one."""
RECORD = ".preview-install.json"
"""In node_modules: which key it was installed for."""
PLACES = ".preview-places"
"""In the root's node_modules: the other places of the set, one a line; not there when there are none."""
MOST_RECORDED = 2**20
"""Bytes of a record that is believed."""


class ProjectUnreadable(AgentError):
    """package.json is missing, is not JSON, or is not a regular file."""


class Manager(StrEnum):
    """Who installs dependencies."""

    NPM = "npm"
    PNPM = "pnpm"
    YARN = "yarn"
    BUN = "bun"


LOCKS: Mapping[str, Manager] = {
    "pnpm-lock.yaml": Manager.PNPM,
    "yarn.lock": Manager.YARN,
    "bun.lock": Manager.BUN,
    "bun.lockb": Manager.BUN,
    "npm-shrinkwrap.json": Manager.NPM,
    "package-lock.json": Manager.NPM,
}
"""In order of precedence: a package-lock.json beside another lock is mostly an accident."""
BESIDE = (".npmrc", ".yarnrc", ".yarnrc.yml", "pnpm-workspace.yaml", ".pnpmfile.cjs", "bunfig.toml")
"""What else decides an install."""
DEPENDENCY_FIELDS = (
    "dependencies", "devDependencies", "optionalDependencies", "peerDependencies", "peerDependenciesMeta",
    "overrides", "resolutions", "workspaces", "pnpm", "packageManager", "trustedDependencies",
)  # fmt: skip
"""Of package.json. A changed script or description needs no install."""
RELEASES = {Manager.NPM: "11", Manager.PNPM: "10", Manager.YARN: "1", Manager.BUN: "1"}
"""Of a package manager that is fetched for a project that names none."""
MOST_PACKAGES = 1000
"""Of one workspace."""
LOCAL_SPECS = ("file:", "link:", "portal:", "workspace:")
RELEVANT = re.compile(
    r"\.([cm]?[jt]sx?|json|html?|vue|svelte|astro|mdx|ya?ml|toml)$|(^|/)\.env|rc$|lock", re.I
)
"""What may cure a dev server that failed: code, configuration, environment; not pictures, not prose."""
RELEASE = re.compile(r"\d+(\.\d+){0,2}(-[0-9A-Za-z.-]+)?")
LONGEST_SCRIPT = 4096
"""Characters of a script that is taken apart; the kernel takes 128 KB a word."""
SHELL = re.compile(r"[|&;<>()$`\\\"'*?\[#~\n]|^\w+=")
"""A script that has any of this is for a shell."""


@dataclass(frozen=True, slots=True)
class Project:
    """A project as its files describe it. `root` is where its package.json stands.

    `modern_yarn`: Yarn from 2 on, which shares nothing but the name with its first release.

    `lock` is the lock file's name or None. `key` names the node_modules this project wants: two projects with
    one key can share one. `whole_tree`: the install needs more of the project than its manifests. `script` is
    the `dev` script (or `start`), `script_name` its name.
    """

    root: Path
    manager: Manager
    lock: str | None
    key: str
    whole_tree: bool
    script_name: str | None
    script: str | None
    release: str | None
    """Version of the package manager that package.json asks for."""
    modern_yarn: bool

    @property
    def package(self) -> str:
        """The package manager as a package of npm's registry."""
        if self.modern_yarn:
            return f"@yarnpkg/cli-dist@{self.release or 4}"
        return f"{self.manager.value}@{self.release or RELEASES[self.manager]}"

    @property
    def modules(self) -> Path:
        return self.root / "node_modules"

    @property
    def has_dependencies(self) -> bool:
        return self.key != NO_DEPENDENCIES

    def dev_argv(self, *, host: str, port: int, fresh: bool) -> tuple[str, ...]:
        """How to start the dev server; empty when the project does not say.

        A script that is plainly Vite is started without a package manager in between: that is one process
        fewer, 0.3 s less, and signals arrive. `fresh`: without Vite's dependency cache of the last time.
        """
        if self.script is None:
            return ()
        flags = ("--host", host, "--port", str(port), "--strictPort", *(("--force",) if fresh else ()))
        if len(self.script) < LONGEST_SCRIPT and not SHELL.search(self.script):
            words = shlex.split(self.script)
            if words and words[0] == "vite" and words[1:2] != ["build"]:
                return (str(self.modules / ".bin" / "vite"), *words[1:], *flags)
        runner = self.manager if shutil.which(self.manager) else Manager.NPM
        forward = () if runner is Manager.YARN else ("--",)
        extra = flags if "vite" in self.script else ()
        return (runner.value, "run", str(self.script_name), *(forward if extra else ()), *extra)


NO_DEPENDENCIES = "none"


def find(directory: Path, *, scripts: bool = False) -> Project | None:
    """The project in `directory`, or in the one directory below it that has a package.json; None without.

    `scripts`: whether installs run the dependencies' scripts; it makes another node_modules. Raises
    `ProjectUnreadable` when there is a package.json that cannot be used, and nothing else: what JSON was read from can
    be nested too deep to be written again.
    """
    try:
        return _find(directory, scripts)
    except RecursionError:
        raise ProjectUnreadable("cannot read package.json: it is nested too deep") from None
    except OSError as error:
        raise ProjectUnreadable(f"cannot read package.json: {error.strerror or error}") from None
    except ValueError as error:
        raise ProjectUnreadable(f"cannot read package.json: {error}") from None


def _find(directory: Path, scripts: bool) -> Project | None:
    root = directory
    if not os.path.lexists(root / "package.json"):
        below = _below(directory)
        if len(below) != 1:
            return None
        root = below[0]
    return _read(root, scripts)


def _below(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            names = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    except OSError:
        return []
    hidden = (".", "node_modules")
    return [
        directory / n
        for n in names
        if not n.startswith(hidden) and _is_path(n) and os.path.lexists(directory / n / "package.json")
    ]


def _is_path(name: str) -> bool:
    """Whether the database could have it; nothing else that stands here is the project's."""
    try:
        parse_path(name)
    except PathRefused:
        return False
    return True


def _read(root: Path, scripts: bool) -> Project:
    raw = read_small(root / "package.json")
    if raw is None:
        raise ProjectUnreadable(f"cannot read {root.name}/package.json: not a regular file, or too large")
    package = json.loads(raw)
    if not isinstance(package, dict):
        raise ProjectUnreadable("cannot read package.json: it is not an object")
    lock = next((name for name in LOCKS if os.path.lexists(root / name)), None)
    named_manager, release = _named_manager(package)
    manager = LOCKS[lock] if lock else named_manager
    release = release if manager is named_manager else None
    whole_tree = _needs_tree(root, package)
    declared = package.get("scripts")
    named: dict[str, Any] = declared if isinstance(declared, dict) else {}
    script_name = next((n for n in ("dev", "start") if isinstance(named.get(n), str)), None)
    if script_name and not _can_be_given(named[script_name]):
        unusable = "it has a character that no command line can hold"
        raise ProjectUnreadable(f'cannot use the script "{script_name}" of package.json: {unusable}')
    return Project(
        root=root,
        manager=manager,
        lock=lock,
        key=_key(root, package, manager, lock, scripts, whole_tree),
        whole_tree=whole_tree,
        script_name=script_name,
        script=named[script_name].strip() if script_name else None,
        release=release,
        modern_yarn=manager is Manager.YARN and _is_modern_yarn(root, release),
    )


def _can_be_given(script: str) -> bool:
    """Whether it can be a word of a command line: JSON may spell half of a surrogate pair, and NUL."""
    try:
        return b"\0" not in script.encode()
    except UnicodeEncodeError:
        return False


def _named_manager(package: Mapping[str, Any]) -> tuple[Manager, str | None]:
    """By the field `packageManager`: `pnpm@10.1.0+sha512.…`."""
    named, _, release = str(package.get("packageManager", "")).partition("+")[0].partition("@")
    manager = next((m for m in Manager if m.value == named), Manager.NPM)
    return manager, release if manager.value == named and RELEASE.fullmatch(release) else None


def _is_modern_yarn(root: Path, release: str | None) -> bool:
    if release:
        return not release.startswith("1.")
    lock = read_small(root / "yarn.lock")
    return b"__metadata:" in lock[:4096] if lock else os.path.lexists(root / ".yarnrc.yml")


def _needs_tree(root: Path, package: Mapping[str, Any]) -> bool:
    if any(os.path.lexists(root / name) for name in ("pnpm-workspace.yaml", ".yarn")):
        return True
    pnpm = package.get("pnpm")
    patched = pnpm.get("patchedDependencies") if isinstance(pnpm, dict) else None
    if package.get("workspaces") or package.get("patchedDependencies") or patched:
        return True
    for name in DEPENDENCY_FIELDS[:3]:
        specs = package.get(name)
        if isinstance(specs, dict) and any(str(s).startswith(LOCAL_SPECS) for s in specs.values()):
            return True
    return False


def _key(
    root: Path,
    package: Mapping[str, Any],
    manager: Manager,
    lock: str | None,
    scripts: bool,
    whole_tree: bool,
) -> str:
    fields = {name: package[name] for name in DEPENDENCY_FIELDS if package.get(name)}
    if (
        not lock
        and not any(fields.get(name) for name in DEPENDENCY_FIELDS[:3])
        and "workspaces" not in fields
    ):
        return NO_DEPENDENCIES
    whole = hashlib.sha256()
    whole.update(
        json.dumps([1, manager, sys.platform, os.uname().machine, scripts, fields], sort_keys=True).encode()
    )
    for name in (*((lock,) if lock else ()), *BESIDE):
        if (content := read_small(root / name)) is not None:
            whole.update(f"\0{name}\0{len(content)}\0".encode())
            whole.update(content)
    if whole_tree:
        whole.update(json.dumps(_packages(root), sort_keys=True).encode())
    return whole.hexdigest()[:40]


def _packages(root: Path) -> dict[str, Any]:
    """What the packages of a workspace depend on, by path."""
    found: dict[str, Any] = {}
    for place, directories, files in os.walk(root):
        directories[:] = sorted(d for d in directories if d != "node_modules" and not d.startswith("."))
        if "package.json" not in files or Path(place) == root:
            continue
        raw = read_small(Path(place, "package.json")) or b""
        try:
            package = json.loads(raw)
            told = {name: package.get(name) for name in ("name", "version", "bin", *DEPENDENCY_FIELDS)}
        except (ValueError, AttributeError, RecursionError):
            told = {"unreadable": hashlib.sha256(raw).hexdigest()}
        found[os.path.relpath(place, root)] = told
        if len(found) == MOST_PACKAGES:
            break
    return found


def read_small(path: Path, most: int = LARGEST) -> bytes | None:
    """A regular file's bytes, never through a link, never waiting; None when it is not that or too large."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            return None
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(most + 1)
    finally:
        os.close(fd)


def installed_key(modules: Path) -> str | None:
    """Which key a node_modules was installed for; None when nobody recorded it, or part of its set is gone."""
    if modules.is_symlink() or (raw := read_small(modules / RECORD, MOST_RECORDED)) is None:
        return None
    try:
        key = json.loads(raw)["key"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    places = (read_small(modules / PLACES, MOST_RECORDED) or b"").decode(errors="replace").splitlines()
    if not isinstance(key, str) or not all((modules.parent / place).is_dir() for place in places):
        return None
    return key


def decides_install(path: str, prefix: str) -> bool:
    """Whether a changed path (relative to the project directory) may change what is to be installed."""
    name = path.removeprefix(prefix)
    return name == "package.json" or name in LOCKS or name in BESIDE or path.endswith("/package.json")


def may_cure(paths: Iterable[str]) -> bool:
    """Whether a change of any of these may make a failed dev server work."""
    return any(RELEVANT.search(path) for path in paths)
