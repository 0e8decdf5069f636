"""Programs of the project: started with less than the agent has, heard line by line, never left behind.

Everything that runs project code (the dev server, installs, their clean-up) goes through here: a clean
environment from an allow-list, another user where the agent may choose one, limits, a process group of its
own, and `agent.guard` in between, which kills whatever is left when the program or the agent ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent import guard
from agent.errors import SettingsError
from agent.reaper import Reaper

GUARD = guard.__file__
INHERITED = frozenset({"PATH", "LANG", "LANGUAGE", "TZ", "TMPDIR", "NODE_EXTRA_CA_CERTS", "SSL_CERT_FILE",
                       "SSL_CERT_DIR"})  # fmt: skip
FOR_INSTALLS = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
                          "npm_config_registry", "NPM_CONFIG_REGISTRY", "npm_config_cache"})  # fmt: skip
PASSED_ON = "DEV_ENV_"
"""`DEV_ENV_NAME=value` in the agent's environment becomes `NAME=value` in the program's."""
LONGEST_LINE = 4096
"""Characters kept of one line: a minified bundle printed in one line must not fill the log."""
MOST_LINES = 200
"""Lines looked at of one read of up to 256 KB: a program that prints without end is heard, not followed."""
KILL_PATIENCE = 2.0
"""Seconds for the guard to kill and reap everything; measured in milliseconds. Past it the guard is killed."""

LAST_WORDS = 1.0
"""Seconds for the output to end after the process did; only a leftover that was not found holds it open."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


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
    """The program's whole environment: an allow-list of `given`, `DEV_ENV_*`, and `more`."""
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


def printable(raw: bytes) -> str:
    """One line of a program's output with nothing in it that a terminal or a log reader would act on."""
    text = _ESCAPES.sub("", raw[: 4 * LONGEST_LINE].decode(errors="replace")).rstrip("\r")
    end = " … cut" if len(text) > LONGEST_LINE else ""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text[:LONGEST_LINE]) + end


class _Output(asyncio.SubprocessProtocol):
    """Splits a program's output into lines and knows two ends apart: that of the process and that of the pipe.

    asyncio's own `Process.wait` waits for both, and a grandchild that holds the pipe can put off the second
    for as long as it likes.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self.exited = asyncio.Event()
        self.closed = asyncio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(lines) > MOST_LINES:
            self._on_line(f"… {len(lines) - MOST_LINES} lines left out")
            del lines[:-MOST_LINES]
        for line in lines:
            self._on_line(printable(line))
        if len(self._rest) > 16 * LONGEST_LINE:
            self._flush()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if fd == 1:
            self._flush()
            self.closed.set()

    def process_exited(self) -> None:
        self.exited.set()

    def _flush(self) -> None:
        if self._rest:
            self._on_line(printable(self._rest))
            self._rest = b""


class Child:
    """One running program, its guard and its output. Make it with `start`."""

    def __init__(
        self, transport: asyncio.SubprocessTransport, output: _Output, reaper: Reaper | None
    ) -> None:
        self._transport = transport
        self._output = output
        self._reaper = reaper
        self.pid = transport.get_pid()
        """The guard's pid, which is the process group and the session too."""
        self.asked_to_stop = False
        self._ended = asyncio.create_task(self._wait(), name=f"wait-{self.pid}")

    @classmethod
    async def start(
        cls,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        rights: Rights,
        on_line: Callable[[str], None],
        reaper: Reaper | None = None,
    ) -> Child:
        """Run `argv` in `cwd`. `on_line` gets its output, both streams, and must not block or raise.

        A program that cannot be run ends with code 126 and one line that says why.
        """
        spec: dict[str, object] = {
            "argv": list(argv),
            "cwd": str(cwd),
            "processes": rights.processes,
            "files": rights.files,
        }
        if rights.user is not None:
            spec |= {"uid": rights.user.uid, "gid": rights.user.gid}
        with reaper.hold() if reaper else contextlib.nullcontext():
            transport, output = await asyncio.get_running_loop().subprocess_exec(
                lambda: _Output(on_line),
                sys.executable, "-I", "-S", GUARD, json.dumps(spec),
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                cwd="/", env=dict(env), start_new_session=True,
            )  # fmt: skip
            if reaper:
                reaper.own(transport.get_pid())
        return cls(transport, output, reaper)

    async def _wait(self) -> int:
        await self._output.exited.wait()
        code = self._transport.get_returncode()
        assert code is not None
        if self._reaper:
            self._reaper.disown(self.pid)
        if code < 0:
            # The guard did not end by itself: what it watched over is still there.
            self._signal(signal.SIGKILL)
            if self._reaper:
                self._reaper.kill_strangers()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS):
                await self._output.closed.wait()
        self._transport.close()
        return code if code >= 0 else 128 - code

    async def wait(self) -> int:
        """The exit code, or 128 + the signal; safe to cancel and to ask again."""
        return await asyncio.shield(self._ended)

    async def stop(self, grace: float) -> int:
        """TERM to the group, everything killed after `grace` seconds. Returns as `wait`."""
        self.asked_to_stop = True
        self._signal(signal.SIGTERM)
        await asyncio.wait({self._ended}, timeout=grace)
        return await self.kill()

    async def kill(self) -> int:
        """Kill everything now."""
        self.asked_to_stop = True
        lifeline = self._transport.get_pipe_transport(0)
        if lifeline is not None:
            lifeline.close()
        await asyncio.wait({self._ended}, timeout=KILL_PATIENCE)
        if not self._ended.done():
            self._signal(signal.SIGKILL)
        return await self.wait()

    def _signal(self, number: signal.Signals) -> None:
        if not self._ended.done():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program that was run to its end ended. `tail`: its last lines."""

    code: int
    timed_out: bool
    tail: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.code == 0 and not self.timed_out


async def run(
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    rights: Rights,
    timeout: float,
    on_line: Callable[[str], None] | None = None,
    reaper: Reaper | None = None,
) -> Finished:
    """Run a program to its end, at most `timeout` seconds. Cancelled, it leaves nothing running."""
    tail: deque[str] = deque(maxlen=40)

    def heard(line: str) -> None:
        tail.append(line)
        if on_line:
            on_line(line)

    child = await Child.start(argv, cwd=cwd, env=env, rights=rights, on_line=heard, reaper=reaper)
    timed_out = False
    try:
        async with asyncio.timeout(timeout):
            code = await child.wait()
    except TimeoutError:
        timed_out = True
        code = await child.kill()
    except asyncio.CancelledError:
        await child.kill()
        raise
    return Finished(code, timed_out, tuple(tail))
