"""Follows the run settings of the project: what a product knows of it and a machine cannot guess.

What is no secret is in the machine's environment at the start. `env` and `npmrc` are secrets and never there: a
platform's API shows a machine's environment to whoever holds its token. They are asked of the session API before the
first install, and again whenever a heartbeat's answer names another `run_revision`, so that a change reaches a
running agent. Until an answer has come nothing is installed or started.
"""

from __future__ import annotations

import asyncio
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from agent.config import Settings, loads_code
from agent.core.errors import CredentialRejected, MalformedMessage, PathRefused, Unavailable
from agent.core.globs import Rule, read_rules
from agent.core.model import Problem, parse_path
from agent.retry import Backoff
from agent.session_api import SessionApi
from agent.telemetry.logging import get_logger

log = get_logger("run_settings")

BACKOFF: Final = Backoff(first=0.25, most=15.0)
"""As of the catch-ups: somebody waits for the preview."""

ENV_NAME: Final = re.compile(r"[A-Z][A-Z0-9_]{0,127}")
OURS: Final = frozenset({"PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "PORT", "HOST"})
"""What the agent itself gives the project's programs. NODE_OPTIONS is the project's own."""

SHORTEST_SECRET: Final = 8
"""Characters. Taking out less than that would take out words (`telemetry.logging`)."""


def refused_name(name: str) -> bool:
    """Return whether a variable of the project may not have that name."""
    return ENV_NAME.fullmatch(name) is None or name in OURS or loads_code(name)


@dataclass(frozen=True, slots=True)
class RunSettings:
    """One answer of `GET …/run`. None: the project says nothing of it. `env` and `npmrc` are secrets.

    `write_back`: what tools in the container may give back; empty: nothing.
    """

    revision: int
    root: str | None = None
    dev_command: tuple[str, ...] | None = None
    dev_port: int | None = None
    install_command: tuple[str, ...] | None = None
    allowed_hosts: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    npmrc: str | None = field(default=None, repr=False)
    write_back: tuple[Rule, ...] = ()

    def secrets(self) -> set[str]:
        """Return what must be in no log and no status: the values of `env`, their lines, and what `npmrc` sets."""
        values = [*self.env.values(), *(line for value in self.env.values() for line in value.splitlines())]
        for line in (self.npmrc or "").splitlines():
            values.append(line.partition("=")[2].strip().strip("\"'"))
        return {value for value in values if len(value) >= SHORTEST_SECRET}


def read_run_settings(obj: object) -> RunSettings:
    """Read the answer of `GET …/run`. Unknown fields are ignored. Raises `MalformedMessage`, never with a value."""
    if not isinstance(obj, dict):
        raise _malformed("not an object")
    revision = obj.get("run_revision")
    if type(revision) is not int or not 0 <= revision < 2**63:
        raise _malformed("run_revision is no whole number")
    port = obj.get("dev_port")
    if port is not None and not (type(port) is int and 1 <= port <= 65535):
        raise _malformed("dev_port is no port")
    root = _text(obj, "root")
    try:
        root = root and parse_path(root)
    except PathRefused as error:
        raise _malformed(f"root is no path of the project ({error.rule})") from None
    hosts = obj.get("allowed_hosts") or []
    if not isinstance(hosts, list) or not all(isinstance(host, str) and host for host in hosts):
        raise _malformed("allowed_hosts is no list of text")
    env = obj.get("env") or {}
    if not isinstance(env, dict) or not all(isinstance(value, str) for value in env.values()):
        raise _malformed("env is no object of text")
    if (bad := next((name for name in env if refused_name(name)), None)) is not None:
        raise _malformed(f"env names {bad[:40]!r}, which is not the project's to set")
    if any("\0" in value for value in env.values()):
        raise _malformed("env has a NUL")
    return RunSettings(
        revision, root, _words(obj, "dev_command"), port, _words(obj, "install_command"), tuple(hosts), env,
        _text(obj, "npmrc"), read_rules(obj.get("write_back")),
    )  # fmt: skip


def _malformed(why: str) -> MalformedMessage:
    return MalformedMessage("run settings", why)


def _text(obj: Mapping[str, object], key: str) -> str | None:
    value = obj.get(key)
    if value is not None and not (isinstance(value, str) and "\0" not in value):
        raise _malformed(f"{key} is no text")
    return value or None


def _words(obj: Mapping[str, object], key: str) -> tuple[str, ...] | None:
    try:
        return tuple(shlex.split(_text(obj, key) or "")) or None
    except ValueError:
        raise _malformed(f"{key} is no words as in a shell") from None


def merged(base: Settings, run: RunSettings) -> Settings:
    """Return the settings of an agent whose project has these run settings.

    What the machine was given at its start from run settings of that moment (RUN_NAMES) is replaced, also by nothing;
    what it was given otherwise, by its image say, stays where the project says nothing.
    """
    fields = {
        "dev_root": run.root,
        "dev_command": run.dev_command,
        "dev_server_port": run.dev_port,
        "install_command": run.install_command,
        "preview_host": " ".join(run.allowed_hosts) or None,
    }
    given = {
        name: value for name, value in fields.items() if value is not None or name.upper() in base.run_names
    }
    return base.model_copy(update=given)


class RunSettingsFollower:
    """Asks for run settings when they are needed and when they changed. `run` until cancelled.

    Args:
        api: None without a session API; then there is nothing to ask.
        first: The revision at the machine's start (RUN_REVISION); 0 or None: there were none.
        on_settings: Told each answer.
        on_secret: Told each secret of an answer before that.
    """

    def __init__(
        self,
        api: SessionApi | None,
        first: int | None,
        *,
        on_settings: Callable[[RunSettings], None],
        on_secret: Callable[[str], None],
    ) -> None:
        self._api = api
        self._on_settings = on_settings
        self._on_secret = on_secret
        self._wanted = first or 0
        self._changed = asyncio.Event()
        self._problem: Problem | None = None
        self.known = asyncio.Event()
        """Set when nothing is to be waited for: there are none, or they have come."""
        self.revision = 0
        """Of the settings in force; 0: none."""
        if api is None or not self._wanted:
            self.known.set()
        else:
            self._changed.set()

    def hear(self, revision: int | None) -> None:
        """Take the revision that a heartbeat's answer names; None: the orchestrator knows of no run settings."""
        if revision is not None and revision != self._wanted:
            self._wanted = revision
            self._changed.set()

    def problems(self) -> tuple[Problem, ...]:
        """Return what is wrong now."""
        return (self._problem,) if self._problem else ()

    async def run(self) -> None:
        """Ask whenever there is something to ask for. Raises `SessionGone` and `Superseded` as the session API does."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                run = await self._fetch()
            except Exception:
                self._changed.set()  # it is asked again when this is started again
                raise
            self.revision = self._wanted = run.revision
            for secret in run.secrets():
                self._on_secret(secret)
            log.info("run_settings.applied", revision=run.revision, variables=len(run.env))
            self.known.set()
            self._on_settings(run)

    async def _fetch(self) -> RunSettings:
        """Ask until there is an answer."""
        assert self._api is not None, "without a session API nothing is heard of"
        failures = 0
        while True:
            try:
                run = read_run_settings(await self._api.run_settings())
            except (CredentialRejected, MalformedMessage, Unavailable) as error:
                failures += 1
                waits = "" if self.known.is_set() else "; nothing is started until they are there"
                self._problem = Problem("run_settings_unavailable", f"{error}{waits}")
                await asyncio.sleep(BACKOFF.delay(failures, error))
            else:
                self._problem = None
                return run
