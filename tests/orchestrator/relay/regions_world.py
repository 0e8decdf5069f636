"""nats-servers with the configurations of docs/scale/nats, each on a machine of its own: a network namespace.

All are on one bridge, which this process is on too. What two of them say to each other can be cut without a word.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from orchestrator_stub.relay.embedded import end_with_parent, nats_server
from tests.fakes.certificates import certificate

CONFIGURATIONS = Path(__file__).parents[3] / "docs/scale/nats"


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr.strip()}"


def why_not() -> str:
    """Why namespaces cannot be had here; empty: they can."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces need Linux, root and `ip`"
    name = f"pv{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return f"network namespaces are not allowed here: {made.stderr.strip()}" if made.returncode else ""


class Server:
    """One machine and its nats-server."""

    def __init__(self, name: str, address: str, namespace: str, directory: Path) -> None:
        self.name = name
        self.address = address
        self.namespace = namespace
        self.directory = directory
        self.url = f"tls://{address}:4222"
        self._process: Process | None = None

    async def start(self, configuration: str, **variables: str) -> None:
        """Start it as docs/scale/README.md says, in its directory; return once it answers."""
        for file in CONFIGURATIONS.iterdir():
            shutil.copy(file, self.directory)
        environment = os.environ | {
            "NATS_NAME": self.name,
            "NATS_STORE": "store",
            "SSL_CERT_FILE": "ca.pem",
            **variables,
        }
        with (self.directory / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                "ip", "netns", "exec", self.namespace, nats_server(), "-c", configuration,
                cwd=self.directory, env=environment, stdin=DEVNULL, stdout=log, stderr=log,
                preexec_fn=end_with_parent(),
            )  # fmt: skip
        async with asyncio.timeout(30):
            while not await self._answers():
                assert self._process.returncode is None, self.log()
                await asyncio.sleep(0.02)

    async def _answers(self) -> bool:
        try:
            reader, writer = await asyncio.open_connection(self.address, 4222)
        except OSError:
            return False
        try:
            return (await reader.read(5)).startswith(b"INFO")
        finally:
            writer.close()

    def log(self) -> str:
        return (self.directory / "log").read_text()

    async def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


class Network:
    """Machines on one bridge. Made by `network`."""

    def __init__(self, directory: Path, number: int) -> None:
        self._directory = directory
        self._number = number
        self._bridge = f"pvb{os.getpid()}"
        self.servers: dict[str, Server] = {}
        ip("link", "add", self._bridge, "type", "bridge")
        ip("addr", "add", f"10.214.{number}.1/24", "dev", self._bridge)
        ip("link", "set", self._bridge, "up")

    def machine(self, name: str) -> Server:
        """One machine more, with `accounts.conf`, a certificate, and who signed that."""
        place = len(self.servers) + 2
        address, namespace = f"10.214.{self._number}.{place}", f"pv{os.getpid()}-{name}"
        ours, theirs = f"pv{os.getpid()}h{place}", f"pv{os.getpid()}n{place}"
        directory = self._directory / name
        directory.mkdir()
        server = self.servers[name] = Server(name, address, namespace, directory)
        ip("netns", "add", namespace)
        ip("link", "add", ours, "type", "veth", "peer", "name", theirs)
        ip("link", "set", theirs, "netns", namespace)
        ip("link", "set", ours, "master", self._bridge)
        ip("link", "set", ours, "up")
        for words in (("addr", "add", f"{address}/24", "dev", theirs), ("link", "set", theirs, "up")):
            ip("-n", namespace, *words)
        for name in ("accounts.conf", "cert.pem", "key.pem", "ca.pem"):
            shutil.copy(self._directory / "keys" / name, directory)
        return server

    def cut(self, one: Server, other: Server) -> None:
        """From now on nothing of what they say to each other arrives, and nobody is told."""
        ip("-n", one.namespace, "route", "add", "blackhole", other.address)
        ip("-n", other.namespace, "route", "add", "blackhole", one.address)

    def heal(self, one: Server, other: Server) -> None:
        ip("-n", one.namespace, "route", "del", "blackhole", other.address)
        ip("-n", other.namespace, "route", "del", "blackhole", one.address)

    async def remove(self) -> None:
        """End every server, and take it all away."""
        for server in self.servers.values():
            await server.kill()
            with suppress(AssertionError):
                ip("netns", "del", server.namespace)
        with suppress(AssertionError):
            ip("link", "del", self._bridge)


@asynccontextmanager
async def network(directory: Path) -> AsyncIterator[Network]:
    """A network whose machines have directories below `directory`; `keys` there has what they are given."""
    number = os.getpid() % 250 + 1
    certificate(directory / "keys", [f"10.214.{number}.{place}" for place in range(2, 10)])
    made = Network(directory, number)
    try:
        yield made
    finally:
        await made.remove()


def routes(servers: list[Server]) -> str:
    """NATS_ROUTES of a cluster of these."""
    return json.dumps([f"tls://{server.address}:6222" for server in servers])
