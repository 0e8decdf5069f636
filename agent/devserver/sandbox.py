"""What a program of the project may do and may know: its user, its limits, its environment, and how it is started."""

from __future__ import annotations

import json
import os
import pwd
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from agent.config import PASSED_ON
from agent.core.errors import SettingsError

INHERITED = frozenset({"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE",
                       "SSL_CERT_DIR"})  # fmt: skip
FOR_INSTALLS = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
                          "npm_config_registry", "NPM_CONFIG_REGISTRY", "npm_config_cache"})  # fmt: skip

START = "import sys; sys.path.append(sys.argv[1]); from agent.devserver.guard import main; sys.exit(main(sys.argv[2]))"
"""Imported, not run as a script: then it is compiled once, not at every start."""


@dataclass(frozen=True, slots=True)
class User:
    """Whom a program runs as."""

    name: str
    uid: int
    gid: int
    home: str


@dataclass(frozen=True, slots=True)
class Rights:
    """What a program is allowed. `user` None: the agent's own. `processes`, `files`: RLIMIT_NPROC, _NOFILE."""

    user: User | None = None
    processes: int | None = None
    files: int | None = None


@dataclass(frozen=True, slots=True)
class Launch:
    """Everything that decides what a started program is. Equal launches make equal programs."""

    argv: tuple[str, ...]
    cwd: str
    env: Mapping[str, str]
    rights: Rights

    def spec(self) -> dict[str, object]:
        """All but the environment, as the guard reads it."""
        spec: dict[str, object] = {
            "argv": list(self.argv),
            "cwd": self.cwd,
            "processes": self.rights.processes,
            "files": self.rights.files,
        }
        if self.rights.user is not None:
            spec |= {"uid": self.rights.user.uid, "gid": self.rights.user.gid}
        return spec

    def command(self) -> list[str]:
        """The guard's command line. It wants no environment, a session of its own, and as standard input the lifeline,
        which first says `environment`.
        """
        packages = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
        return [sys.executable, "-I", "-S", "-X", "utf8", "-c", START, packages, json.dumps(self.spec())]

    def environment(self) -> bytes:
        """The program's environment as its guard hears it."""
        return json.dumps(dict(self.env)).encode() + b"\n"


def find_user(name: str) -> User:
    """Look up a name or a number. Raises `SettingsError` when there is no such user, or it is root."""
    try:
        found = pwd.getpwuid(int(name)) if name.isdigit() else pwd.getpwnam(name)
    except KeyError:
        raise SettingsError([f"DEV_USER: there is no user {name!r} on this machine"]) from None
    if found.pw_uid == 0:
        raise SettingsError(["DEV_USER: is root; leave it unset, or name an ordinary user"])
    return User(found.pw_name, found.pw_uid, found.pw_gid, found.pw_dir)


def environment(
    given: Mapping[str, str], *, user: User | None, more: Mapping[str, str], install: bool = False
) -> dict[str, str]:
    """The whole environment of a program of the project: an allow-list of the agent's, `DEV_ENV_*`, and `more`.

    Args:
        given: The agent's own environment.
        user: Whom the program runs as; None: the agent's own user.
        more: What its caller sets, before `DEV_ENV_*`.
        install: Whether it is an installer, which may know of proxies and a registry.
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
