"""Starts the project's programs, passes their output on line by line, and ends them.

Everything that runs project code (the dev server, installs, their clean-up) is started here, with the rights and the
environment of a `Launch`, in a process group of its own, and with `devserver.guard` in between, which kills whatever
is left when the program or the agent ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.devserver.guard import CANNOT_RUN
from agent.devserver.reaper import Reaper
from agent.devserver.sandbox import Launch, Rights
from agent.project.install_key import Platform

LONGEST_LINE = 4096
"""Characters kept of one line: a minified bundle printed in one line must not fill the log."""
MOST_LINES = 200
"""Lines passed on of one read of up to 256 KB: a program that prints without end must not occupy the agent."""
MOST_BYTES_A_SECOND = 2**20
"""Bytes a second that are split into lines; the rest is read, so that the program never waits, and dropped."""
KILL_WITHIN = 2.0
"""Seconds for the guard to kill and reap everything, which takes milliseconds; then the guard itself is killed."""
OUTPUT_WITHIN = 1.0
"""Seconds for the output to end after the process did; only a process that the guard missed holds it open longer."""

NODE_SECONDS = 5.0
"""For `node --version`, which takes 0.05."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(raw: bytes) -> str:
    """Return one line of output as text, without what a terminal or a log reader would act on, and cut if long."""
    text = _ESCAPES.sub("", raw[: 4 * LONGEST_LINE].decode(errors="replace")).rstrip("\r")
    end = " … cut" if len(text) > LONGEST_LINE else ""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text[:LONGEST_LINE]) + end


class _Output(asyncio.SubprocessProtocol):
    """Splits a program's output into lines, and reports the end of the process and that of the pipe separately.

    asyncio's own `Process.wait` waits for both, and a grandchild that holds the pipe can put off the second
    for as long as it likes.
    """

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        """An unfinished line."""

        # The bound on a second's output.
        self._second = 0
        self._taken = 0
        self._dropped = 0
        self._last = b""
        """The end of what was dropped."""

        self.exited = asyncio.Event()
        self.closed = asyncio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._catch_up()
            self._second, self._taken = second, 0
        self._taken += len(data)
        if self._taken > MOST_BYTES_A_SECOND + len(data):
            self._dropped += len(data)
            self._last = (self._last + data)[-4 * LONGEST_LINE :]
        else:
            self._split(data)

    def _catch_up(self) -> None:
        """Report how much was dropped, and pass on the end of it: what a program says last explains how it ended."""
        if self._dropped:
            self._flush()
            self._on_line(f"… {self._dropped / 1e6:.1f} MB left out")
            _, _, ending = self._last.partition(b"\n")
            self._dropped, self._last = 0, b""
            self._split(ending)

    def _split(self, data: bytes) -> None:
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
            self._catch_up()
            self._flush()
            self.closed.set()

    def process_exited(self) -> None:
        self.exited.set()

    def _flush(self) -> None:
        if self._rest:
            self._on_line(printable(self._rest))
            self._rest = b""


class Child:
    """One running program with its guard and its output. Make it with `start`."""

    def __init__(
        self, transport: asyncio.SubprocessTransport | None, output: _Output, reaper: Reaper | None
    ) -> None:
        self._transport = transport
        """The guard's process; None: it could not be started."""
        self._output = output
        self._reaper = reaper
        self.pid = transport.get_pid() if transport else 0
        """The guard's pid, which is the process group and the session too; 0: there is none."""
        self.asked_to_stop = False
        self._ended = asyncio.create_task(self._wait(), name=f"wait-{self.pid}")

    @classmethod
    async def start(
        cls, launch: Launch, *, on_line: Callable[[str], None], reaper: Reaper | None = None
    ) -> Child:
        """Start the program of `launch`.

        A program that cannot be run ends with code 126 and one line that says why, whether it is the program's
        fault or the machine has no process, no memory or no file left for it.

        Args:
            launch: The program, its environment and its rights.
            on_line: Called with each line of both output streams; must not block or raise.
            reaper: Who collects orphans in this process, and must leave the guard to us.
        """
        output = _Output(on_line)
        with reaper.hold() if reaper else contextlib.nullcontext():
            try:
                transport, _ = await asyncio.get_running_loop().subprocess_exec(
                    lambda: output, *launch.command(),
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    cwd="/", env={}, start_new_session=True,
                    pass_fds=() if launch.given is None else (launch.given,),
                )  # fmt: skip
            except (OSError, ValueError) as error:
                on_line(f"cannot run {printable(launch.argv[0].encode(errors='replace'))}: {error}")
                return cls(None, output, None)
            if reaper:
                reaper.own(transport.get_pid())
        lifeline = transport.get_pipe_transport(0)
        assert isinstance(lifeline, asyncio.WriteTransport)
        lifeline.write(launch.environment())
        return cls(transport, output, reaper)

    async def _wait(self) -> int:
        if self._transport is None:
            return CANNOT_RUN
        await self._output.exited.wait()
        code = self._transport.get_returncode()
        assert code is not None
        if self._reaper:
            self._reaper.disown(self.pid)
        if code < 0:
            # A signal ended the guard, so it killed nothing: what it started still runs.
            self._signal(signal.SIGKILL)
            if self._reaper:
                self._reaper.kill_orphans()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(OUTPUT_WITHIN):
                await self._output.closed.wait()
        self._transport.close()
        return code if code >= 0 else 128 - code

    async def wait(self) -> int:
        """Wait for the end. Returns the exit code, or 128 + the signal. May be cancelled, and called again."""
        return await asyncio.shield(self._ended)

    async def stop(self, grace: float) -> int:
        """Send TERM to the process group, and kill what is left after `grace` seconds. Returns as `wait`."""
        self.asked_to_stop = True
        self._signal(signal.SIGTERM)
        await asyncio.wait({self._ended}, timeout=grace)
        return await self.kill()

    async def kill(self) -> int:
        """Kill the program and everything it started. Returns as `wait`."""
        self.asked_to_stop = True
        if self._transport and (lifeline := self._transport.get_pipe_transport(0)):
            lifeline.close()
        await asyncio.wait({self._ended}, timeout=KILL_WITHIN)
        if not self._ended.done():
            self._signal(signal.SIGKILL)
        return await self.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.pid and not self._ended.done():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)


@dataclass(frozen=True, slots=True)
class Finished:
    """How a program ended. `code`: as `Child.wait` returns it; `tail`: its last lines of output."""

    code: int
    timed_out: bool
    tail: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.code == 0 and not self.timed_out

    @property
    def last(self) -> str:
        """What it said last."""
        return self.tail[-1] if self.tail else f"exit {self.code}"


async def run(
    argv: Sequence[str],
    *,
    cwd: Path,
    env: Mapping[str, str],
    rights: Rights,
    timeout: float,
    on_line: Callable[[str], None] | None = None,
    reaper: Reaper | None = None,
    given: int | None = None,
) -> Finished:
    """Run a program to its end, at most `timeout` seconds. When this is cancelled, nothing is left running.

    `given`: a descriptor that is its standard input.
    """
    tail: deque[str] = deque(maxlen=40)

    def on_output(line: str) -> None:
        tail.append(line)
        if on_line:
            on_line(line)

    launch = Launch(tuple(argv), str(cwd), env, rights, given=given)
    child = await Child.start(launch, on_line=on_output, reaper=reaper)
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


async def node_version(env: Mapping[str, str], rights: Rights, reaper: Reaper | None = None) -> str | None:
    """Return what `node --version` says when it is run as the project's programs are; None: it cannot be run."""
    done = await run(
        ("node", "--version"), cwd=Path("/"), env=env, rights=rights, timeout=NODE_SECONDS, reaper=reaper
    )
    return done.tail[-1] if done.ok and done.tail else None


async def node_platform(
    env: Mapping[str, str], rights: Rights, reaper: Reaper | None = None
) -> Platform | None:
    """Return what native packages are built against here; None: Node cannot be run."""
    ask = ("node", "-p", "process.versions.modules")
    done = await run(ask, cwd=Path("/"), env=env, rights=rights, timeout=NODE_SECONDS, reaper=reaper)
    if not done.ok or not done.tail:
        return None
    libc = platform.libc_ver()[0] or "musl"
    return Platform(done.tail[-1], sys.platform, os.uname().machine, libc)
