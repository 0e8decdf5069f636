"""A small real server that speaks the NATS protocol to machines, with a switch for each way of failing.

Its switches are those of `tests.fakes.realtime`, so that one table of faults is made with both. It knows no stream:
tests say what is broadcast. tests/agent/link/test_nats_server.py holds the same link against the real nats-server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.realtime import claims_of

PROJECT = "11111111-1111-4111-8111-111111111111"


@dataclass(eq=False)
class Socket:
    """One connection."""

    writer: asyncio.StreamWriter
    token: str = ""
    sid: str | None = None
    greeted: bool = False
    unconfirmed: int = 0
    """Pings that say whether a subscription was made; two are sent."""

    async def send(self, data: bytes | str) -> None:
        with contextlib.suppress(ConnectionError):
            self.writer.write(data if isinstance(data, bytes) else data.encode())
            await self.writer.drain()


@dataclass
class FakeNats:
    """`async with FakeNats() as server`; `server.url` is what goes into REALTIME_URL."""

    wall: Callable[[], float] = time.time
    tls: ssl.SSLContext | None = None
    # --- switches
    refuse_handshake: tuple[int, dict[str, str]] | None = None
    mute_heartbeats: bool = False
    mute_joins: bool = False
    join_delay: float = 0.0
    join_error: str | None = None
    replication_ready: bool = True
    """Of no meaning here, as `replication_delay`: what is published is complete from the subscription on."""
    replication_delay: float = 0.0
    unmatched_topic: bool = False
    """Of no meaning here: a server does not say that it forgot a subscription."""
    # --- what was seen
    sockets: list[Socket] = field(default_factory=list)
    joins: list[Socket] = field(default_factory=list)
    channels: dict[Socket, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    heartbeats: int = 0
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> FakeNats:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for socket in list(self.sockets):
            socket.writer.transport.abort()
        await asyncio.sleep(0)

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"{'tls' if self.tls else 'nats'}://127.0.0.1:{self.port}"

    @property
    def token_in_force(self) -> str:
        return self.joins[-1].token

    # --- what tests make happen

    def message(self, event: str, payload: dict[str, Any], sid: str = "1", **headers: str) -> bytes:
        """As a machine is sent it."""
        body = json.dumps(payload).encode()
        lines = {"Pv-Event": event, "Nats-Subject": f"pv.in.{PROJECT}", "Nats-Stream": "PREVIEW"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        head = "NATS/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
        sizes = f"HMSG pv.out.{PROJECT} {sid} {len(head)} {len(head) + len(body)}\r\n"
        return sizes.encode() + head.encode() + body + b"\r\n"

    async def broadcast(self, event: str, payload: dict[str, Any], *, binary: bool = True) -> int:
        """To every subscription; returns to how many."""
        for socket, sid in list(self.channels.items()):
            await socket.send(self.message(event, payload, sid))
        return len(self.channels)

    async def system(self, status: str, message: str) -> None:
        """The server is about to go: lame duck mode."""
        for socket in list(self.sockets):
            await socket.send(f"INFO {json.dumps({**INFO, 'ldm': True})}\r\n")

    async def shut_channels(self, message: str | None = None, event: str = "") -> None:
        """End every connection for what the words mean."""
        said = {
            None: 'Permissions Violation for Subscription to "pv.out"',
            "Token has expired 0 seconds ago": "User Authentication Expired",
            "Too many messages per second": "Maximum Connections Exceeded",
        }.get(message, "User Authentication Revoked")
        for socket in list(self.channels):
            await self._end(socket, said)

    def goodbye(self) -> bytes:
        """What a server says that shuts down."""
        return b"-ERR 'Server Shutdown'\r\n"

    async def close_sockets(self, code: int) -> None:
        for socket in list(self.sockets):
            await self._end(socket, None if code == 1000 else "Server Shutdown")

    def abort_sockets(self) -> None:
        for socket in list(self.sockets):
            socket.writer.transport.abort()

    def deafen(self) -> None:
        """Subscriptions die without a word; the connections and their pings go on."""
        self.channels.clear()

    async def _end(self, socket: Socket, said: str | None) -> None:
        if said is not None:
            await socket.send(f"-ERR '{said}'\r\n")
        socket.writer.close()

    # --- the protocol

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        socket = Socket(writer)
        self.sockets.append(socket)
        expiry: asyncio.TimerHandle | None = None
        with contextlib.suppress(ConnectionError, asyncio.LimitOverrunError):
            await socket.send(f"INFO {json.dumps({**INFO, 'tls_required': self.tls is not None})}\r\n")
            if self.tls is not None:
                await writer.start_tls(self.tls)
            while line := await reader.readline():
                verb, _, rest = line.decode().strip().partition(" ")
                if verb == "CONNECT":
                    expiry = await self._connect(socket, json.loads(rest))
                elif verb == "SUB":
                    await self._subscribe(socket, *rest.split())
                elif verb == "UNSUB":
                    self.channels.pop(socket, None)
                elif verb == "PING":
                    await self._ping(socket)
        if expiry is not None:
            expiry.cancel()
        self.sockets.remove(socket)
        self.channels.pop(socket, None)
        writer.transport.abort()

    async def _connect(self, socket: Socket, options: dict[str, Any]) -> asyncio.TimerHandle | None:
        self.requests.append("CONNECT")
        socket.token = options.get("jwt", "")
        left = claims_of(socket.token)["exp"] - self.wall() if socket.token else 0.0
        if self.refuse_handshake is not None:
            status = self.refuse_handshake[0]
            said = "Authorization Violation" if status in (401, 403) else "maximum connections exceeded"
            await self._end(socket, said)
            return None
        if left <= 0:
            await self._end(socket, "Authorization Violation")
            return None
        loop = asyncio.get_running_loop()
        return loop.call_later(
            left, lambda: loop.create_task(self._end(socket, "User Authentication Expired"))
        )

    async def _subscribe(self, socket: Socket, subject: str, sid: str) -> None:
        assert subject == f"pv.out.{PROJECT}"
        self.joins.append(socket)
        socket.unconfirmed = 2
        if self.join_error is not None:
            await socket.send(f"-ERR 'Permissions Violation for Subscription to \"{subject}\"'\r\n")
            return
        self.channels[socket] = sid

    async def _ping(self, socket: Socket) -> None:
        if not socket.greeted:
            socket.greeted = True  # of the handshake
        elif socket.unconfirmed:
            if self.mute_joins:
                return
            if self.join_delay:
                await asyncio.sleep(self.join_delay)
            socket.unconfirmed -= 1
        else:
            self.heartbeats += 1
            if self.mute_heartbeats:
                return
        await socket.send("PONG\r\n")


INFO = {
    "server_id": "FAKE", "server_name": "fake", "version": "2.11.0", "proto": 1, "headers": True,
    "max_payload": 1048576, "auth_required": True, "nonce": "n", "client_id": 1,
}  # fmt: skip
