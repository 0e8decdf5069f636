"""Says which package manager a project wants, in which version, and by which commands it installs.

The version is that of `packageManager`, or one that reads the lock file. A package manager on PATH is used only if it
is of that version; else npm fetches the right one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


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
JSON_LOCKS = frozenset({"npm-shrinkwrap.json", "package-lock.json"})
BESIDE = (".npmrc", ".yarnrc", ".yarnrc.yml", "pnpm-workspace.yaml", ".pnpmfile.cjs", "bunfig.toml")
"""Other files that decide an install."""
RELEASES = {Manager.NPM: "11", Manager.PNPM: "10", Manager.YARN: "1", Manager.BUN: "1"}
"""The release of a package manager that is fetched for a project that names none."""
LOCK_READERS: Mapping[Manager, Sequence[tuple[int, str]]] = {
    Manager.PNPM: ((9, "10"), (6, "8"), (0, "7")),
    Manager.YARN: ((10, "4"), (9, "4.14"), (8, "4.13"), (6, "3"), (5, "3.1"), (0, "2")),
}
"""From which `lockfileVersion`, or version in Yarn's `__metadata`, on a release reads a lock file; newest first.

A later Yarn refuses an earlier one's lock file with `--immutable`, since it would write another version into it.
"""
_LOCK_VERSION = re.compile(rb"^(?:lockfileVersion:|__metadata:\s+version:)\s*['\"]?(\d{1,6})", re.M)
_NAMED = re.compile(r"(\w+)@(\d+(?:\.\d+){0,2}(?:-[0-9A-Za-z.-]+)?)")
MODERN_YARN = "@yarnpkg/cli-dist"
"""npm's package of Yarn 2 and later."""
LOCK_AT_FAULT = re.compile(
    r"EUSAGE|EINTEGRITY|lock ?file|package-lock|npm-shrinkwrap|yarn\.lock|pnpm-lock|bun\.lock|YN00(?:18|28)",
    re.I,
)
"""How a package manager says that it failed at its lock file, whatever is wrong with that."""


@dataclass(frozen=True, slots=True)
class PackageManager:
    """A package manager, in a release, for a lock file."""

    name: Manager
    release: str | None
    """A version, or its first numbers; None: whichever there is."""
    lock: str | None
    """The lock file's name."""

    @property
    def modern_yarn(self) -> bool:
        """Whether it is Yarn 2 or later, whose options are not those of Yarn 1."""
        return self.name is Manager.YARN and (self.release or "1").partition(".")[0] != "1"

    @property
    def package(self) -> str:
        """The package manager's own package in npm's registry, with its version."""
        name = MODERN_YARN if self.modern_yarn else self.name.value
        return f"{name}@{self.release or RELEASES[self.name]}"

    def is_installed(self, path: str | None) -> bool:
        """Return whether the one that a shell finds on `path` is of this release.

        npm comes with Node, and any npm of the same major installs the same: its minor does not matter.
        """
        found = shutil.which(self.name, path=path)
        wanted = self.release
        if found is None or wanted is None:
            return found is not None
        version = _version_of(Path(os.path.realpath(found)))
        if self.name is Manager.NPM:
            wanted = wanted.partition(".")[0]
        return f"{version}.".startswith(f"{wanted}.")

    def commands(self, *, scripts: bool, saves: bool = False) -> list[tuple[str, ...]]:
        """Return the commands to try; the second is for a lock file that the first refuses.

        `saves`: the second makes a lock file where there is none that fits, in the directory of the install.
        """
        quiet = () if scripts else ("--ignore-scripts",)
        match self.name:
            case Manager.NPM:
                flags = ("--no-audit", "--no-fund", "--prefer-offline", "--include=dev", *quiet)
                strict = ("npm", "ci", *flags)
                unsaved = "--no-save" if self.lock else "--no-package-lock"
                loose = ("npm", "install", *(() if saves else (unsaved,)), *flags)
            case Manager.YARN if self.modern_yarn:
                strict, loose = ("yarn", "install", "--immutable"), ("yarn", "install", "--no-immutable")
            case Manager.YARN:
                start = (
                    "yarn",
                    "install",
                    "--non-interactive",
                    "--prefer-offline",
                    "--production=false",
                    *quiet,
                )
                strict, loose = (
                    (*start, "--frozen-lockfile"),
                    (*start, *(() if self.lock or saves else ("--no-lockfile",))),
                )
            case Manager.PNPM:
                start = ("pnpm", "install", "--prefer-offline", *quiet)
                strict, loose = (*start, "--frozen-lockfile"), (*start, "--no-frozen-lockfile")
            case Manager.BUN:
                strict, loose = ("bun", "install", *quiet, "--frozen-lockfile"), ("bun", "install", *quiet)
        return [strict, loose] if self.lock else [loose]


def choose(root: Path, package: Mapping[str, Any], read: Callable[[Path], bytes | None]) -> PackageManager:
    """Choose the package manager of the project in `root`.

    Args:
        root: The directory of its lock file.
        package: Its package.json.
        read: Reads a file; None when it cannot.
    """
    named = _NAMED.match(str(package.get("packageManager", "")))
    lock = next((name for name in LOCKS if os.path.lexists(root / name)), None)
    if named and named[1] in set(Manager) and (lock is None or LOCKS[lock] == named[1]):
        return PackageManager(Manager(named[1]), named[2], lock)
    if lock is None:
        return PackageManager(Manager.NPM, None, None)
    manager = LOCKS[lock]
    readers = LOCK_READERS.get(manager, ())
    version = _LOCK_VERSION.search((read(root / lock) or b"")[:4096]) if readers else None
    release = next(one for least, one in readers if int(version[1]) >= least) if version else None
    if manager is Manager.YARN and not version:
        release = "4" if os.path.lexists(root / ".yarnrc.yml") else "1"
    return PackageManager(manager, release, lock)


def lock_fault(name: str, content: bytes) -> str | None:
    """Return what is wrong with a lock file that no release reads; None: its package manager is to judge.

    Some leave such a file out without a word, and install whatever is newest.
    """
    if not content.strip():
        return "it is empty"
    if re.search(rb"^<{7} ", content, re.M):
        return "it has the marks of a merge conflict"
    if name in JSON_LOCKS:
        try:
            json.loads(content)
        except (ValueError, RecursionError) as error:
            return f"it is not JSON: {error}"
    return None


def _version_of(program: Path) -> str:
    """Return the version of the package that a program is in; "" where that cannot be told, as for a shim."""
    for directory in list(program.parents)[:4]:
        try:
            package = json.loads((directory / "package.json").read_bytes())
            return str(package["version"]) if package.get("name") != "corepack" else ""
        except (OSError, ValueError, KeyError, AttributeError):
            continue
    return ""
