"""The dev server of the last time, started before the agent is awake.

A restarted machine has the tree, the dependencies and a ledger that vouches for them; what it lacks is time: the
agent's own imports take as long as Vite's whole start. So the first thing `preview-agent run` does, with nothing but
the standard library, is to start exactly what was ready when it last ran; the supervisor adopts it when, by its own
reckoning, it would have started the same, and kills it otherwise. Whether the preview is *ready* is decided as ever.

Nothing is started early on a machine that was never ready, without a ledger, whose dependencies are not those that
package.json asks for now, or whose port is taken; nor in shadow mode, which has no dev server.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agent import host, project
from agent.errors import SettingsError
from agent.project import ProjectUnreadable
from agent.rights import Launch, Rights, environment, find_user

RECORD = "dev-server.json"
LEDGER = "ledger.sqlite"
PROJECT_DIR = "/app/project"
STATE_DIR = "/var/lib/preview-agent"
"""The defaults of `agent.config`, which takes too long to import; a test holds them together."""


@dataclass(frozen=True, slots=True)
class HeadStart:
    """A running dev server that nobody listens to yet. It ends with the agent, whatever becomes of it."""

    launch: Launch
    process: subprocess.Popen[bytes]


def remember(state_dir: Path, launch: Launch, more: Mapping[str, str], host_name: str, port: int) -> None:
    """Note what is ready now, for the next start. That it cannot be noted is no reason to fail."""
    noted = {
        "argv": launch.argv,
        "cwd": launch.cwd,
        "more": dict(more),
        "user": launch.rights.user.name if launch.rights.user else None,
        "processes": launch.rights.processes,
        "files": launch.rights.files,
        "host": host_name,
        "port": port,
    }
    with contextlib.suppress(OSError):
        beside = state_dir / f".{RECORD}"
        beside.write_text(json.dumps(noted))
        beside.replace(state_dir / RECORD)


def forget(state_dir: Path) -> None:
    """What was ready is not worth starting again."""
    with contextlib.suppress(OSError):
        (state_dir / RECORD).unlink()


def begin(environ: Mapping[str, str]) -> HeadStart | None:
    """Start what the last run had ready; None when there is a reason not to. Never raises for what it finds."""
    state = Path(environ.get("STATE_DIR") or STATE_DIR)
    directory = Path(environ.get("PROJECT_DIR") or PROJECT_DIR)
    if (environ.get("SYNC_MODE") or "live") != "live":
        return None
    try:
        noted = json.loads((state / RECORD).read_bytes())
        launch = _launch(noted, environ)
        wanted = project.find(directory, scripts=False)
        if wanted is None or str(wanted.root) != launch.cwd or not (state / LEDGER).exists():
            return None
        if wanted.has_dependencies and project.installed_key(wanted.modules) != wanted.key:
            return None
        if not host.port_is_free(noted["host"], noted["port"]):
            return None
        process = subprocess.Popen(
            launch.command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/",
            env=dict(launch.env), start_new_session=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, ProjectUnreadable, SettingsError):
        return None
    return HeadStart(launch, process)


def _launch(noted: dict[str, object], environ: Mapping[str, str]) -> Launch:
    """The launch as it would be today. Raises `ValueError` when the user is another, and for a record that is none."""
    user_name, more, argv = noted["user"], noted["more"], noted["argv"]
    processes, files = noted["processes"], noted["files"]
    asked = environ.get("DEV_USER") or None
    if user_name is not None and (user_name != asked or os.geteuid() != 0):
        raise ValueError("another user")
    if user_name is None and asked is not None and os.geteuid() == 0:
        raise ValueError("another user")
    user = find_user(str(user_name)) if user_name is not None else None
    if not isinstance(argv, list) or not isinstance(more, dict) or not argv:
        raise ValueError("not a record")
    rights = Rights(
        user, processes if isinstance(processes, int) else None, files if isinstance(files, int) else None
    )
    env = environment(environ, user=user, more={str(k): str(v) for k, v in more.items()})
    return Launch(tuple(map(str, argv)), str(noted["cwd"]), env, rights)
