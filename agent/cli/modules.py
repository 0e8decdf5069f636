"""Makes the key of a project's dependency layer, and a layer that projects can share: `preview-agent modules`.

What is packed here is installed in a clean directory, from the manifests and the lock file alone, and without running a
single script: no project has had its hands on it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, Final

from agent.core.errors import AgentError
from agent.devserver.install import bake
from agent.devserver.process import node_platform
from agent.devserver.sandbox import Rights
from agent.modules import archive
from agent.modules.tar import LayerRefused
from agent.project import reading
from agent.project.choice import LARGEST_PACKAGE, ProjectUnreadable, read_small
from agent.project.install_key import layer_key
from agent.project.managers import Manager
from agent.project.sources import not_shareable

REGISTRY_SECONDS: Final = 20.0
"""For npm to say which registry it uses; it takes half a second."""


class CannotPack(AgentError):
    """There is no key, or no layer can be made; the message says why, one reason a line."""


def print_key(directory: Path, environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Print the key of a project's layer on this machine. Raises `CannotPack`."""
    say(_key(_wanted(directory), environ))
    return 0


def pack(directory: Path, target: BinaryIO, environ: Mapping[str, str], say: Callable[[str], None]) -> int:
    """Install a project's dependencies in a clean directory, and pack them. Prints one object of JSON.

    Raises:
        CannotPack: They may not be shared, or cannot be installed.
    """
    wanted = _wanted(directory)
    if wanted.manager.name is not Manager.NPM or wanted.whole_tree:
        raise CannotPack(f"only what npm installs from package.json and its lock file is packed: {directory}")
    lock = (
        read_small(directory / str(wanted.manager.lock), reading.LARGEST_LOCK)
        if wanted.manager.lock
        else None
    )
    npmrc = read_small(directory / ".npmrc", LARGEST_PACKAGE) or b""
    if reasons := not_shareable(lock, npmrc, _registries()):
        raise CannotPack("\n".join(reasons))
    with tempfile.TemporaryDirectory(prefix="preview-modules-") as made:
        clean = Path(made, "project")
        clean.mkdir()
        for name in ("package.json", str(wanted.manager.lock), ".npmrc"):
            if (content := read_small(directory / name, reading.LARGEST_LOCK)) is not None:
                (clean / name).write_bytes(content)
        installed = asyncio.run(bake(clean))
        if installed.problem is not None:
            raise CannotPack(installed.problem.detail)
        try:
            archive.pack(str(clean), target)
        except (LayerRefused, OSError) as error:
            raise CannotPack(str(error)) from None
    key = _key(wanted, environ)
    say(json.dumps({"key": key, "bytes": target.tell(), "seconds": round(installed.seconds, 3)}))
    return 0


def _wanted(directory: Path) -> reading.Dependencies:
    try:
        wanted = reading.dependencies(directory)
    except ProjectUnreadable as error:
        raise CannotPack(str(error)) from None
    if not wanted.exist:
        raise CannotPack(f"there is nothing to install in {directory}")
    return wanted


def _key(wanted: reading.Dependencies, environ: Mapping[str, str]) -> str:
    platform = asyncio.run(node_platform(environ, Rights()))
    if platform is None:
        raise CannotPack("node cannot be run here, so nobody knows what the layer is built for")
    return layer_key(wanted.key, platform)


def _registries() -> list[str]:
    """Return the registry that npm uses outside of any project, and its default."""
    npm = shutil.which("npm")
    if npm is None:
        raise CannotPack("npm is not installed here")
    plain = {"PATH": os.environ.get("PATH", os.defpath)}
    nothing = ("--userconfig=/nonexistent/user", "--globalconfig=/nonexistent/global")
    found = []
    for more, env in (((), dict(os.environ)), (nothing, plain)):
        asked = subprocess.run(
            [npm, "config", "get", "registry", *more], cwd="/", capture_output=True, text=True,
            timeout=REGISTRY_SECONDS, check=False, env=env,
        )  # fmt: skip
        found.append(asked.stdout.strip())
    return found
