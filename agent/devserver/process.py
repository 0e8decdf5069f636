"""Programs of the project: started with less than the agent has, heard line by line, never left behind.

Everything that runs project code (the dev server, installs, their clean-up) goes through here: a clean
environment from an allow-list, another user where the agent may choose one, limits, a process group of its
own, and `devserver.guard` in between, which kills whatever is left when the program or the agent ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from agent.devserver.guard import CANNOT_RUN
from agent.devserver.reaper import Reaper
from agent.devserver.sandbox import Launch, Rights

LONGEST_LINE = 4096
"""Characters kept of one line: a minified bundle printed in one line must not fill the log."""
MOST_LINES = 200
"""Lines looked at of one read of up to 256 KB: a program that prints without end is heard, not followed."""
FOLLOWED = 2**20
"""Bytes a second that are split into lines; the rest is read, so that the program never waits, and left out."""
KILL_PATIENCE = 2.0
"""Seconds for the guard to kill and reap everything; measured in milliseconds. Past it the guard is killed."""

LAST_WORDS = 1.0
"""Seconds for the output to end after the process did; only a leftover that was not found holds it open."""

_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


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
        self._second = 0
        self._followed = 0
        self._left_out = 0
        self._last = b""
        self.exited = asyncio.Event()
        self.closed = asyncio.Event()

    @classmethod
    def over(cls) -> _Output:
        """Of a program that never was."""
        output = cls(lambda line: None)
        output.exited.set()
        output.closed.set()
        return output

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        second = int(time.monotonic())
        if second != self._second:
            self._catch_up()
            self._second, self._followed = second, 0
        self._followed += len(data)
        if self._followed > FOLLOWED + len(data):
            self._left_out += len(data)
            self._last = (self._last + data)[-4 * LONGEST_LINE :]
        else:
            self._split(data)

    def _catch_up(self) -> None:
        """Say how much was left out, and hear the end of it: a program's last words are at the end."""
        if self._left_out:
            self._flush()
            self._on_line(f"… {self._left_out / 1e6:.1f} MB left out")
            _, _, ending = self._last.partition(b"\n")
            self._left_out, self._last = 0, b""
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


class _Started(Protocol):
    """A guard's process, whoever started it."""

    @property
    def pid(self) -> int: ...
    def returncode(self) -> int | None: ...
    def close_lifeline(self) -> None: ...
    def close(self) -> None: ...


class _Spawned:
    """One that asyncio started."""

    def __init__(self, transport: asyncio.SubprocessTransport) -> None:
        self._transport = transport

    @property
    def pid(self) -> int:
        return self._transport.get_pid()

    def returncode(self) -> int | None:
        return self._transport.get_returncode()

    def close_lifeline(self) -> None:
        lifeline = self._transport.get_pipe_transport(0)
        if lifeline is not None:
            lifeline.close()

    def close(self) -> None:
        self._transport.close()


class _Unstarted:
    """One that the system had no room for."""

    pid = 0

    def returncode(self) -> int:
        return CANNOT_RUN

    def close_lifeline(self) -> None:
        return

    def close(self) -> None:
        return


class Child:
    """One running program, its guard and its output. Make it with `start`."""

    def __init__(self, started: _Started, output: _Output, reaper: Reaper | None) -> None:
        self._started = started
        self._output = output
        self._reaper = reaper
        self.pid = started.pid
        """The guard's pid, which is the process group and the session too."""
        self.asked_to_stop = False
        self._ended = asyncio.create_task(self._wait(), name=f"wait-{self.pid}")

    @classmethod
    async def start(
        cls, launch: Launch, *, on_line: Callable[[str], None], reaper: Reaper | None = None
    ) -> Child:
        """Run it. `on_line` gets its output, both streams, and must not block or raise.

        A program that cannot be run ends with code 126 and one line that says why, whether it is the program's
        fault or the machine has no process, no memory or no file left for it.
        """
        with reaper.hold() if reaper else contextlib.nullcontext():
            try:
                transport, output = await asyncio.get_running_loop().subprocess_exec(
                    lambda: _Output(on_line), *launch.command(),
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    cwd="/", env={}, start_new_session=True,
                )  # fmt: skip
            except (OSError, ValueError) as error:
                on_line(f"cannot run {printable(launch.argv[0].encode(errors='replace'))}: {error}")
                return cls(_Unstarted(), _Output.over(), None)
            if reaper:
                reaper.own(transport.get_pid())
        lifeline = transport.get_pipe_transport(0)
        assert isinstance(lifeline, asyncio.WriteTransport)
        lifeline.write(launch.environment())
        return cls(_Spawned(transport), output, reaper)

    async def _wait(self) -> int:
        await self._output.exited.wait()
        code = self._started.returncode()
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
        self._started.close()
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
        self._started.close_lifeline()
        await asyncio.wait({self._ended}, timeout=KILL_PATIENCE)
        if not self._ended.done():
            self._signal(signal.SIGKILL)
        return await self.wait()

    def _signal(self, number: signal.Signals) -> None:
        if self.pid and not self._ended.done():
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

    launch = Launch(tuple(argv), str(cwd), env, rights)
    child = await Child.start(launch, on_line=heard, reaper=reaper)
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
