"""Decides what a program of the project is given: its user, its limits, its environment, and its command line."""

from __future__ import annotations

import json
import os
import pwd
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from agent.config import PASSED_ON, Settings
from agent.core.errors import SettingsError

INHERITED = frozenset({"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE",
                       "SSL_CERT_DIR"})  # fmt: skip
FOR_INSTALLS = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
                          "npm_config_registry", "NPM_CONFIG_REGISTRY", "npm_config_cache"})  # fmt: skip

START = "import sys; sys.path.append(sys.argv[1]); from agent.devserver.guard import main; sys.exit(main(sys.argv[2]))"
"""Imports the guard instead of running it as a script, which would compile it at every start."""
SECRET_NAME = re.compile(
    r"SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|PRIVATE|DATABASE_URL|DSN|(?<!PUBLISHABLE_)KEY\b"
)
MOST_PROCESSES = 512
"""Of the project's user, where the settings name no other number."""


@dataclass(frozen=True, slots=True)
class User:
    """Whom a program runs as."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class Rights:
    """What a program may do. `user` None: the agent's own. `processes`, `files`: RLIMIT_NPROC and RLIMIT_NOFILE."""

    user: User | None = None
    processes: int | None = None
    files: int | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that the start of a program depends on."""

    argv: tuple[str, ...]
    cwd: str
    env: Mapping[str, str]
    rights: Rights
    stdin: bool = False
    """Whether its standard input stays open; else it is empty."""
    given: int | None = None
    """A descriptor of the agent's that is its standard input instead. It stays the agent's to close."""

    def command(self) -> list[str]:
        """Return the guard's command line.

        It is to be started without an environment, in a session of its own, and with the lifeline as standard input,
        which first carries `environment`.
        """
        rights = self.rights
        spec: dict[str, object] = {
            "argv": self.argv, "cwd": self.cwd, "processes": rights.processes, "files": rights.files,
            "stdin": self.stdin, "given": self.given,
        }  # fmt: skip
        if rights.user is not None:
            spec |= {"uid": rights.user.uid, "gid": rights.user.gid}
        packages = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        return [sys.executable, "-I", "-S", "-X", "utf8", "-c", START, packages, json.dumps(spec)]

    def environment(self) -> bytes:
        """Return the program's environment as its guard reads it: a line of JSON."""
        return json.dumps(dict(self.env)).encode() + b"\n"


def find_user(name: str) -> User:
    """Look up a user by name or number. Raises `SettingsError` when there is none, or it is root."""
    try:
        found = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        raise SettingsError([f"DEV_USER: there is no user {name!r} on this machine"]) from None
    if found.pw_uid == 0:
        raise SettingsError(["DEV_USER: is root; leave it unset, or name an ordinary user"])
    return User(found.pw_name, found.pw_uid, found.pw_gid, found.pw_dir)


def project_rights(settings: Settings) -> tuple[Rights, str]:
    """Return the rights of the project's programs, and a sentence about them for status. Raises `SettingsError`."""
    limits = Rights(None, settings.dev_processes, settings.dev_files)
    if settings.dev_user is None:
        same = "the project's code runs as the agent's own user and could read what the agent can"
        return limits, f"none: DEV_USER is not set, {same}"
    user = find_user(settings.dev_user)
    if os.geteuid() == user.uid:
        return limits, f"none: the agent itself runs as {user.name}"
    if os.geteuid() != 0:
        return limits, f"none: the agent is not root and cannot become {user.name}"
    return replace(limits, user=user, processes=limits.processes or MOST_PROCESSES), f"runs as {user.name}"


def project_secrets(given: Mapping[str, str]) -> list[str]:
    """Return the values of `DEV_ENV_*` whose names speak of a secret: the project's code may print them in an error."""
    return [
        value
        for name, value in given.items()
        if name.startswith(PASSED_ON) and SECRET_NAME.search(name.upper())
    ]


def environment(
    given: Mapping[str, str], *, user: User | None, more: Mapping[str, str], install: bool = False
) -> dict[str, str]:
    """Make the whole environment of a program of the project: an allow-list of the agent's, `more`, `DEV_ENV_*`.

    Args:
        given: The agent's own environment.
        user: Whom the program runs as; None: the agent's own user.
        more: What the caller sets; a `DEV_ENV_*` of the same name wins.
        install: Whether it is an installer, which is given proxies and a registry too.
    """
    allowed = INHERITED | FOR_INSTALLS if install else INHERITED
    env = {name: value for name, value in given.items() if name in allowed or name.startswith("LC_")}
    env["HOME"] = user.home if user else given.get("HOME", "/")
    if user:
        env["USER"] = env["LOGNAME"] = user.name
    env["NO_COLOR"] = "1"
    env.update(more)
    for name, value in given.items():
        if name.startswith(PASSED_ON) and len(name) > len(PASSED_ON):
            env[name.removeprefix(PASSED_ON)] = value
    return env


def install_environment(
    given: Mapping[str, str], *, user: User | None, scripts: bool, home: Path
) -> dict[str, str]:
    """Make the environment of an installer. `scripts`: as INSTALL_SCRIPTS; `home`: where the user has none."""
    more = {
        "CI": "1",
        "npm_config_update_notifier": "false",
        "YARN_NODE_LINKER": "node-modules",
        "YARN_ENABLE_SCRIPTS": str(scripts).lower(),
        "YARN_ENABLE_TELEMETRY": "false",
        # The paths that pnpm would write into .bin are those of the stage.
        "npm_config_extend_node_path": "false",
        "pnpm_config_extend_node_path": "false",
    }
    env = environment(given, user=user, more=more, install=True)
    if not os.path.isdir(env["HOME"]):
        env["HOME"] = str(home)
    return env
