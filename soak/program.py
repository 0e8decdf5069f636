"""One process of the stack that is not an agent: started, ended, and started again when it went by itself."""

from __future__ import annotations

import asyncio
import ctypes
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1

START_SECONDS = 120.0
"""Until it answers; a busy machine starts twenty agents beside it."""

STOP_SECONDS = 15.0
"""Between SIGTERM and SIGKILL."""


class CannotRun(Exception):
    """A part of the stack does not start, or does not end when asked; the sentence says which and why."""


class Program:
    """`argv` with exactly `env`. `answers` says whether it is up. It is asked to end when this process disappears."""

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        answers: Callable[[], Awaitable[bool]],
    ) -> None:
        self.name = name
        self.log = log
        self._argv = argv
        self._env = env
        self._answers = answers
        self._process: asyncio.subprocess.Process | None = None
        self.wanted = False
        """It should be running: nobody took it down on purpose."""

    @property
    def pid(self) -> int | None:
        """While it runs."""
        return self._process.pid if self.alive and self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def code(self) -> int | None:
        """How it ended."""
        return self._process.returncode if self._process is not None else None

    async def start(self) -> None:
        """Start, and wait until it answers. Raises `CannotRun`."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                env=dict(self._env),
                cwd=self.log.parent,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        deadline = asyncio.get_running_loop().time() + START_SECONDS
        while not await self._answers():
            if not self.alive or asyncio.get_running_loop().time() > deadline:
                raise CannotRun(f"{self.name} did not start (exit {self.code}):\n{self.tail()}")
            await asyncio.sleep(0.05)
        self.wanted = True

    async def stop(self) -> bool:
        """SIGTERM, and SIGKILL when that takes too long; whether it went by itself."""
        self.wanted = False
        if self._process is None or not self.alive:
            return True
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            return True
        await self.kill()
        return False

    async def kill(self) -> None:
        """SIGKILL."""
        self.wanted = False
        if self._process is not None and self.alive:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def tail(self, lines: int = 12) -> str:
        with suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        return ""


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
