"""An app of a framework, as a small file says it: its files, what a save and a deletion look like from outside."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

APPS = Path(__file__).parent / "apps"
ADDED = "ms"
"""The dependency that is added: a package of one file."""
ADDED_VERSION = "2.1.3"


@dataclass(frozen=True, slots=True)
class Seen:
    """A file, and where what is in it is served."""

    path: str
    url: str


@dataclass(frozen=True, slots=True)
class App:
    """An app with the versions of its dependencies."""

    name: str
    title: str
    server: str
    """What the agent calls the dev server that it starts."""
    directory: str
    """What the agent chooses to preview."""
    page: str
    """The URL's path of its page."""
    scheme: str
    save: Seen
    delete: Seen | None
    """None: what is deleted is served on, as `note` says."""
    manifest: str
    """The package.json that gets another dependency; "" without one."""
    config: str
    """The configuration that is broken and mended; "" without one."""
    note: str
    nightly: bool
    environ: dict[str, str]
    files: dict[str, str]

    @property
    def script(self) -> str:
        """What starts it, as people write it."""
        top = json.loads(self.files.get("package.json") or self.files.get(self.manifest) or "{}")
        scripts = top.get("scripts", {})
        return str(scripts.get("dev") or scripts.get("start") or "")

    @property
    def with_dependency(self) -> str:
        """Its manifest with one dependency more."""
        package = json.loads(self.files[self.manifest])
        package.setdefault("dependencies", {})[ADDED] = ADDED_VERSION
        return json.dumps(package, indent=2)


def read(path: Path) -> App:
    """Read an app."""
    told: dict[str, Any] = tomllib.loads(path.read_text())
    given = {"scheme": "http", "note": "", "environ": {}, "delete": None, "page": "/"} | told
    for name in ("save", "delete"):
        given[name] = given[name] and Seen(**given[name])
    return App(name=path.stem, **given)


def read_all() -> list[App]:
    """Read every app, by name."""
    return [read(path) for path in sorted(APPS.glob("*.toml"))]
