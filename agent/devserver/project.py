"""Reads from a project's files where its package.json is, which package manager installs it, and what starts it.

Other processes write these files, so nothing here follows a link, blocks on a pipe or trusts a size. A project that
cannot be read is a `ProjectUnreadable` with one sentence; what runs already is left running.
"""

from __future__ import annotations

import hashlib
import itertools
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
"""Bytes of a lock file that is read. Those of big workspaces reach 10 MB."""
LARGEST_PACKAGE = 2**20
"""Bytes of a package.json that is read. One of 64 MB took 1.7 GB of memory and held the interpreter for seconds."""
MOST_PACKAGE_BYTES = 16 * 2**20
"""Bytes of all package.json of a workspace together; some 0.2 s of reading."""
MOST_WALKED = 20_000
"""Directories that are searched for a workspace's packages: 0.5 s."""
MOST_BESIDE = 2_000
"""Entries beside which a project one level down is searched: 10 ms."""
RECORD = ".preview-install.json"
"""The file in node_modules that has the key it was installed for."""
PLACES = ".preview-places"
"""The file in the root's node_modules that names the workspace's other ones, one a line; absent without any."""
MOST_RECORDED = 2**20
"""Bytes of either of those files."""


class ProjectUnreadable(AgentError):
    """package.json is missing, is not JSON, or is not a regular file."""


class Manager(StrEnum):
    """A package manager."""

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
"""In order of precedence: a package-lock.json beside another lock file is mostly an accident."""
BESIDE = (".npmrc", ".yarnrc", ".yarnrc.yml", "pnpm-workspace.yaml", ".pnpmfile.cjs", "bunfig.toml")
"""Other files that decide an install."""
DEPENDENCY_FIELDS = (
    "dependencies", "devDependencies", "optionalDependencies", "peerDependencies", "peerDependenciesMeta",
    "overrides", "resolutions", "workspaces", "pnpm", "packageManager", "trustedDependencies",
)  # fmt: skip
"""The fields of package.json that decide an install."""
RELEASES = {Manager.NPM: "11", Manager.PNPM: "10", Manager.YARN: "1", Manager.BUN: "1"}
"""The release of a package manager that is fetched for a project that names none."""
MOST_PACKAGES = 1000
"""Packages of a workspace that the key takes in."""
LOCAL_SPECS = ("file:", "link:", "portal:", "workspace:")
RELEVANT = re.compile(
    r"\.([cm]?[jt]sx?|json|html?|vue|svelte|astro|mdx|ya?ml|toml)$|(^|/)\.env|rc$|lock", re.I
)
"""Files that may fix a failed dev server: code, configuration, environment; not pictures, not prose."""
RELEASE = re.compile(r"\d+(\.\d+){0,2}(-[0-9A-Za-z.-]+)?")
LONGEST_SCRIPT = 4096
"""Characters of a script that is split into words. The kernel takes 128 KB a word."""
SHELL = re.compile(r"[|&;<>()$`\\\"'*?\[#~\n]|^\w+=")
"""A script that has any of this is left to a shell."""


@dataclass(frozen=True, slots=True)
class Project:
    """A project as its files describe it."""

    root: Path
    """The directory of its package.json."""

    # Its install.
    manager: Manager
    lock: str | None
    """The lock file's name."""
    key: str
    """Names the node_modules that this project wants: two projects with the same key can share one."""
    whole_tree: bool
    """The install needs more of the project than its manifests."""
    release: str | None
    """The version of the package manager that package.json asks for."""
    modern_yarn: bool
    """Yarn 2 or later, whose options are not those of Yarn 1."""

    # Its dev server.
    script_name: str | None
    """`dev` or `start`."""
    script: str | None

    @property
    def package(self) -> str:
        """The package manager's own package in npm's registry, with its version."""
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
        """Return the command that starts the dev server; empty when the project has no script for it.

        A script that is plainly Vite is started without a package manager in between: that is one process
        fewer, 0.3 s less, and signals arrive. `fresh`: without the dependency cache of Vite's previous run.
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
    """Read the project in `directory`, or in the one directory below it that has a package.json; None without.

    Args:
        directory: Where the project's files are.
        scripts: Whether installs run the dependencies' scripts, which makes another node_modules.

    Raises:
        ProjectUnreadable: There is a package.json that cannot be used.
    """
    try:
        if not os.path.lexists(directory / "package.json"):
            below = _below(directory)
            return _read(below[0], scripts) if len(below) == 1 else None
        return _read(directory, scripts)
    except RecursionError:
        why = "it is nested too deep"  # it was read, and cannot be written again for the key
    except OSError as error:
        why = error.strerror or str(error)
    except ValueError as error:
        why = str(error)
    raise ProjectUnreadable(f"cannot read package.json: {why}")


def is_there(directory: Path) -> bool:
    """Return whether `find` would read anything. Quick enough for the event loop."""
    return os.path.lexists(directory / "package.json") or len(_below(directory)) == 1


def _below(directory: Path) -> list[Path]:
    try:
        with os.scandir(directory) as entries:
            some = itertools.islice(entries, MOST_BESIDE)
            names = sorted(e.name for e in some if e.is_dir(follow_symlinks=False))
    except OSError:
        return []
    hidden = (".", "node_modules")
    return [
        directory / n
        for n in names
        if not n.startswith(hidden) and _is_path(n) and os.path.lexists(directory / n / "package.json")
    ]


def _is_path(name: str) -> bool:
    """Return whether the database could have this path. Other directories are not the project's."""
    try:
        parse_path(name)
    except PathRefused:
        return False
    return True


def _read(root: Path, scripts: bool) -> Project:
    raw = read_small(root / "package.json", LARGEST_PACKAGE)
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
    if script_name and not _is_argument(named[script_name]):
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


def _is_argument(script: str) -> bool:
    """Return whether it can be a command line's word: a JSON string may have half of a surrogate pair, or NUL."""
    try:
        return b"\0" not in script.encode()
    except UnicodeEncodeError:
        return False


def _named_manager(package: Mapping[str, Any]) -> tuple[Manager, str | None]:
    """Return package manager and version from the field `packageManager`: `pnpm@10.1.0+sha512.…`."""
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
    """Return what the packages of a workspace depend on, by path; of an immense one, the first."""
    found: dict[str, Any] = {}
    left = MOST_PACKAGE_BYTES
    for place, directories, files in itertools.islice(os.walk(root), MOST_WALKED):
        directories[:] = sorted(d for d in directories if d != "node_modules" and not d.startswith("."))
        if "package.json" not in files or Path(place) == root:
            continue
        raw = read_small(Path(place, "package.json"), min(LARGEST_PACKAGE, left)) or b""
        left -= len(raw)
        try:
            package = json.loads(raw)
            fields = {name: package.get(name) for name in ("name", "version", "bin", *DEPENDENCY_FIELDS)}
        except (ValueError, AttributeError, RecursionError):
            fields = {"unreadable": hashlib.sha256(raw).hexdigest()}
        found[os.path.relpath(place, root)] = fields
        if len(found) == MOST_PACKAGES:
            break
    return found


def read_small(path: Path, most: int = LARGEST) -> bytes | None:
    """Read a file without following a link or waiting. None when it is not a regular file, or has over `most` bytes."""
    try:
        with open(path, "rb", opener=_open_strictly) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > most:
                return None
            return file.read(most + 1)
    except OSError:
        return None


def _open_strictly(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def installed_key(modules: Path) -> str | None:
    """Return the key a node_modules was installed for; None without a record, or when part of its set is missing."""
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
    """Return whether a change of `path` may change the install.

    Args:
        path: Relative to the project directory.
        prefix: The directory of package.json, relative to the project directory, with a slash at its end; or empty.
    """
    name = path.removeprefix(prefix)
    return name == "package.json" or name in LOCKS or name in BESIDE or path.endswith("/package.json")


def may_fix(paths: Iterable[str]) -> bool:
    """Return whether a change of any of these may make a failed dev server work."""
    return any(RELEVANT.search(path) for path in paths)
