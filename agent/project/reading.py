"""Reads from a project's files what is previewed, which package manager installs it, and what starts it.

Other processes write these files, so nothing here follows a link, blocks on a pipe or trusts a size. A project that
cannot be read is a `ProjectUnreadable` with one sentence; what runs already is left running.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.project import choice, managers, scripts
from agent.project.choice import LARGEST_PACKAGE, Candidate, ProjectUnreadable, choose, read_small
from agent.project.install_key import install_key
from agent.project.managers import BESIDE, LOCKS

LARGEST_LOCK = 64 * 2**20
"""Bytes of a lock file that is read. Those of big workspaces reach 10 MB."""
RECORD = ".preview-install.json"
"""The file in node_modules that has the key it was installed for."""
PLACES = ".preview-places"
"""The file in the root's node_modules that names the workspace's other ones, one a line; absent without any."""
MOST_RECORDED = 2**20
"""Bytes of either of those files."""
DEPENDENCY_FIELDS = (
    "dependencies", "devDependencies", "optionalDependencies", "peerDependencies", "peerDependenciesMeta",
    "overrides", "resolutions", "workspaces", "pnpm", "packageManager", "trustedDependencies",
)  # fmt: skip
"""The fields of package.json that decide an install."""
LIFECYCLE = ("preinstall", "install", "postinstall", "prepare")
"""The scripts of package.json that an install runs, with the project's files there."""
PATCHES = "patches"
"""Where patch-package and pnpm have their patches, which such a script applies."""
MOST_PACKAGES = 1000
"""Packages of a workspace that the key takes in."""
MOST_PACKAGE_BYTES = 16 * 2**20
"""Bytes of all package.json of a workspace together; some 0.2 s of reading."""
MOST_WALKED = 20_000
"""Directories of a workspace that are searched for them. Work of a quarter of a second."""
LOCAL_SPECS = ("file:", "link:", "portal:", "workspace:")
CANNOT_FIX = re.compile(
    r"\.(png|jpe?g|gif|webp|avif|ico|bmp|tiff?|mp[34]|m4a|webm|mov|og[gv]|wav|woff2?|ttf|otf|eot|pdf)$", re.I
)
"""Files whose change cannot make a failed dev server work: what it hands out as it is. Any other may be read by it."""
PAGE_SERVER = "vite@8"
"""What npm fetches to serve a page, where no Vite is at hand."""


@dataclass(frozen=True, slots=True)
class Dependencies:
    """What is to be installed in a directory."""

    root: Path
    """The directory of its package.json and its lock file."""
    manager: managers.PackageManager
    key: str
    """Names the node_modules that is wanted: two projects with the same key can share one."""
    whole_tree: bool
    """The install needs more of the project than its manifests."""
    own_scripts: bool = False
    """The install runs scripts of the project itself, which may read any of its files: no layer can stand for it."""

    @property
    def modules(self) -> Path:
        return self.root / "node_modules"

    @property
    def exist(self) -> bool:
        """Whether there is anything to install."""
        return self.key != NO_DEPENDENCIES


@dataclass(frozen=True, slots=True)
class Project:
    """A project as its files describe it."""

    top: Path
    """The directory of all its files."""
    chosen: Candidate
    """The directory that is previewed."""
    others: tuple[str, ...]
    """The scripts that its own script may hand on to."""
    only: str | None
    """The directory whose dev server is meant where one script starts several."""
    dependencies: Dependencies
    """Of the directory that is previewed, or of the workspace that has it."""

    @property
    def directory(self) -> Path:
        """Where its dev server runs."""
        return self.top / self.chosen.place

    @property
    def tool(self) -> scripts.Tool | None:
        """The known dev server that is started; None: some other command, which is told $PORT."""
        name = self.chosen.script
        if name is None:
            return self.chosen.tool
        return scripts.named_tool(self.chosen.scripts[name], self.others)

    @property
    def needs_manager(self) -> bool:
        """Whether the package manager is needed to run it, too."""
        name = self.chosen.script
        return name is not None and self.dependencies.manager.name in self.chosen.scripts[name]

    @property
    def is_page(self) -> bool:
        """Whether it is a page that no package.json stands beside of."""
        return not self.chosen.package

    def report(self) -> dict[str, object]:
        """Return what status shows: what is previewed, why, by what, and who installs it."""
        return {
            "directory": self.chosen.place or ".",
            "why": self.chosen.why,
            "script": self.chosen.script,
            "server": "Vite" if self.is_page else self.tool.name if self.tool else None,
            "manager": self.dependencies.manager.package if self.dependencies.exist else None,
        }

    def command(self, *, modules: Path, path: str) -> tuple[str, ...]:
        """Return the command that starts the dev server.

        Args:
            modules: MODULES_DIR, whose cache may have a Vite for a page without a package.json.
            path: Where programs are found.
        """
        if self.chosen.script:
            return scripts.command(self.chosen.scripts, self.chosen.script)
        if self.chosen.tool:
            return ("sh", "-c", self.chosen.tool.script)
        installs = sorted(modules.glob("cache/*"))
        for vite in (each / "node_modules/.bin/vite" for each in (self.top, *installs)):
            if vite.exists():
                return (str(vite),)
        if found := shutil.which("vite", path=path):
            return (found,)
        return ("npm", "exec", "--yes", f"--package={PAGE_SERVER}", "--", "vite")

    def environment(
        self, given: Mapping[str, str], *, host: str, port: int, preview_host: str | None, fresh: bool
    ) -> dict[str, str]:
        """Return the dev server's environment: `given`, what `npm run` adds, and where it is to listen.

        Args:
            given: The environment of any program of the project.
            host: Where the dev server is to listen.
            port: On which port.
            preview_host: The domains under which visitors come, with spaces between.
            fresh: Whether to start without what the previous start cached.
        """
        name, cwd = self.chosen.script, str(self.directory)
        script = self.chosen.scripts[name] if name else None
        env = {**given, **scripts.variables(self.chosen.package, cwd, name, script)}
        manager = self.dependencies.manager
        env["npm_config_user_agent"] = f"{manager.name}/{manager.release or '?'}"
        inside = [self.directory, *(p for p in self.directory.parents if p.is_relative_to(self.top))]
        env["PATH"] = ":".join(
            [*(str(p / "node_modules/.bin") for p in inside), given.get("PATH", os.defpath)]
        )
        if self.tool is None or script is None or scripts.is_plain(script):
            env = {"PORT": str(port), "HOST": host} | env
        hook = scripts.hook(host=host, port=port, preview_host=preview_host, fresh=fresh, only=self.only)
        env["NODE_OPTIONS"] = f"{given.get('NODE_OPTIONS', '')} {hook}".strip()
        return env


NO_DEPENDENCIES = "none"


def find(directory: Path, *, root: str | None = None, scripts: bool = False) -> Project:
    """Read the project in `directory`.

    Args:
        directory: Where the project's files are.
        root: DEV_ROOT: the directory of it to preview.
        scripts: Whether installs run the dependencies' scripts, which makes another node_modules.

    Raises:
        NothingToServe: There is nothing to preview.
        ProjectUnreadable: There is a package.json that cannot be used.
    """
    chosen, others = choose(directory, root)
    below = [each for each in others if each.place != chosen.place]
    texts = [text for each in (chosen, *below) for text in each.scripts.values()]
    several = not chosen.tool and sum(1 for each in below if each.tool) > 1
    front = choice.front_end(below) if several else None
    return Project(
        top=directory,
        chosen=chosen,
        others=tuple(texts),
        only=os.path.realpath(directory / front.place) if front else None,
        dependencies=dependencies(directory / _workspace(directory, chosen.place), scripts=scripts),
    )


def dependencies(root: Path, *, scripts: bool = False) -> Dependencies:
    """Read what is to be installed in `root`; nothing, without a package.json there.

    Raises:
        ProjectUnreadable: There is a package.json that cannot be used.
    """
    package = choice.read(root).package if os.path.lexists(root / "package.json") else {}
    try:
        manager = managers.choose(root, package, lambda path: read_small(path, LARGEST_LOCK))
        whole_tree = _needs_tree(root, package, scripts)
        key = _key(root, package, manager, scripts, whole_tree) if package else NO_DEPENDENCIES
    except RecursionError:  # it was read, and cannot be written again for the key
        raise ProjectUnreadable("cannot read package.json: it is nested too deep") from None
    return Dependencies(root, manager, key, whole_tree, scripts and bool(_lifecycle(package)))


def lock_fault(wanted: Dependencies) -> str | None:
    """Return what is plainly wrong with the lock file; None when nothing is, or there is none."""
    name = wanted.manager.lock
    content = read_small(wanted.root / name, LARGEST_LOCK) if name else None
    return managers.lock_fault(str(name), content) if content is not None else None


def _workspace(top: Path, place: str) -> str:
    """Return the directory that is installed for `place`: that of the workspace which has it, or itself."""
    parts = place.split("/") if place else []
    for length in range(len(parts)):
        above = "/".join(parts[:length])
        if os.path.lexists(top / above / "pnpm-workspace.yaml"):
            return above
        try:
            declared = choice.read(top, above).package.get("workspaces")
        except ProjectUnreadable:
            continue
        patterns = declared.get("packages") if isinstance(declared, dict) else declared
        inside = "/".join(parts[length:])
        if isinstance(patterns, list) and any(fnmatch.fnmatch(inside, str(p).strip("./")) for p in patterns):
            return above
    return place


def _needs_tree(root: Path, package: Mapping[str, Any], install_scripts: bool) -> bool:
    if any(os.path.lexists(root / name) for name in ("pnpm-workspace.yaml", ".yarn")):
        return True
    pnpm = package.get("pnpm")
    patched = pnpm.get("patchedDependencies") if isinstance(pnpm, dict) else None
    if package.get("workspaces") or package.get("patchedDependencies") or patched:
        return True
    if install_scripts and _lifecycle(package):
        return True
    for name in DEPENDENCY_FIELDS[:3]:
        specs = package.get(name)
        if isinstance(specs, dict) and any(str(s).startswith(LOCAL_SPECS) for s in specs.values()):
            return True
    return False


def _key(
    root: Path,
    package: Mapping[str, Any],
    manager: managers.PackageManager,
    install_scripts: bool,
    whole_tree: bool,
) -> str:
    fields = {name: package[name] for name in DEPENDENCY_FIELDS if package.get(name)}
    wanted = any(fields.get(name) for name in (*DEPENDENCY_FIELDS[:3], "workspaces"))
    if not (wanted or manager.lock or os.path.lexists(root / "pnpm-workspace.yaml")):
        return NO_DEPENDENCIES
    lifecycle = _lifecycle(package) if install_scripts else {}
    what = {
        "manager": manager.package,
        "machine": [sys.platform, os.uname().machine],
        "scripts": install_scripts,
        "fields": fields,
        "lifecycle": lifecycle,
    }
    patches = [f"{PATCHES}/{name}" for name in _patches(root)] if whole_tree else []
    names = (*((manager.lock,) if manager.lock else ()), *BESIDE, *patches)
    contents = ((name, read_small(root / name, LARGEST_LOCK)) for name in names)
    files = ((name, content) for name, content in contents if content is not None)
    return install_key(what, files, _packages(root) if whole_tree else None)


def _lifecycle(package: Mapping[str, Any]) -> dict[str, Any]:
    declared = package.get("scripts")
    return (
        {name: declared[name] for name in LIFECYCLE if name in declared} if isinstance(declared, dict) else {}
    )


def _patches(root: Path) -> list[str]:
    try:
        return sorted(os.listdir(root / PATCHES))[:MOST_PACKAGES]
    except OSError:
        return []


def _packages(root: Path) -> dict[str, Any]:
    """Return what the packages of a workspace depend on, by path."""
    found: dict[str, Any] = {}
    left = MOST_PACKAGE_BYTES
    for walked, (place, directories, files) in enumerate(os.walk(root)):
        directories[:] = sorted(d for d in directories if d != "node_modules" and not d.startswith("."))
        if len(found) == MOST_PACKAGES or walked == MOST_WALKED:
            break
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
    return found


def node_missing(wanted: Project, version: str | None) -> str | None:
    """Return a sentence when the project or its dev server needs another Node; None when this one will do.

    Args:
        wanted: The project.
        version: What `node --version` says; None: there is none.
    """
    if version is None:
        return "Node cannot be run here: use an image with Node and npm, or set DEV_COMMAND to what runs without it"
    here = _numbers(version)
    packages = {"the project": wanted.chosen.package}
    if wanted.tool:
        path = wanted.dependencies.modules / wanted.tool.packages[0] / "package.json"
        with contextlib.suppress(ValueError, RecursionError):
            packages[wanted.tool.packages[0]] = json.loads(read_small(path, LARGEST_PACKAGE) or b"{}")
    for name, package in packages.items():
        engines = package.get("engines") if isinstance(package, dict) else None
        asked = engines.get("node") if isinstance(engines, dict) else None
        if here and isinstance(asked, str) and (least := _least(asked)) > here:
            needed = ".".join(map(str, least))
            remedy = (
                f"use an image with it, or a {name} of an older version"
                if name != "the project"
                else ("use an image with it, or change engines.node in package.json")
            )
            return f"{name} needs Node {needed} or later, and {version} is here: {remedy}"
    return None


def _least(asked: str) -> tuple[int, ...]:
    """Return the lowest version that a range of npm's form takes: of each alternative its highest lower bound."""
    bounds = []
    for alternative in asked[:256].split("||"):
        lower = re.sub(r"<=?\s*v?[\d.x*]+", "", alternative)
        bounds.append(max((_numbers(word) for word in re.findall(r"\d[\d.]*", lower)), default=()))
    return min(bounds, default=())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number[:9]) for number in re.findall(r"\d+", version)[:3])


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


def decides_install(path: str, *, page: bool) -> bool:
    """Return whether a change of `path` may change what is installed or previewed.

    Args:
        path: Relative to the project's directory.
        page: Whether a page without a package.json is previewed now.
    """
    *above, name = path.split("/")
    decides = name == "package.json" or name in LOCKS or name in BESIDE or (page and name == "index.html")
    return decides or above[-1:] == [PATCHES]


def may_fix(paths: Iterable[str]) -> bool:
    """Return whether a change of any of these may make a failed dev server work."""
    return not all(CANNOT_FIX.search(path) for path in paths)
