"""A small real websocket server that speaks Supabase Realtime's vsn 2, with a switch for each way of failing.

It knows nothing of PostgreSQL: tests say what is broadcast. The full local server stands in orchestrator_stub.
"""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request, Response

TOPIC = "realtime:project:11111111-1111-4111-8111-111111111111"


def jwt(expires_at: float, issued_at: float | None = None, name: str = "t", **claims: Any) -> str:
    """A token with these claims and no real signature; `name` tells one from another."""
    claims = {"role": "preview_agent", "exp": expires_at, "sub": name, **claims}
    if issued_at is not None:
        claims["iat"] = issued_at
    parts = ({"alg": "HS256", "typ": "JWT"}, claims, "signature")
    return ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts)


def claims_of(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    return claims


@dataclass
class Channel:
    """One join of one socket."""

    socket: ServerConnection
    join_ref: str
    topic: str
    token: str


@dataclass
class FakeRealtime:
    """`async with FakeRealtime() as server`; `server.url` is what goes into REALTIME_URL."""

    wall: Callable[[], float] = time.time
    tls: ssl.SSLContext | None = None
    # --- switches
    refuse_handshake: tuple[int, dict[str, str]] | None = None
    mute_heartbeats: bool = False
    mute_joins: bool = False
    join_delay: float = 0.0
    join_error: str | None = None
    replication_ready: bool = True
    replication_delay: float = 0.0
    unmatched_topic: bool = False
    """Answer pushes on a channel that is not there, as Phoenix does."""
    join_error_for: Callable[[str], str | None] = lambda token: None
    # --- what was seen
    sockets: list[ServerConnection] = field(default_factory=list)
    joins: list[Channel] = field(default_factory=list)
    channels: dict[ServerConnection, Channel] = field(default_factory=dict)
    pushed_tokens: list[str] = field(default_factory=list)
    left: int = 0
    heartbeats: int = 0
    requests: list[str] = field(default_factory=list)
    _server: Server | None = None

    async def __aenter__(self) -> FakeRealtime:
        self._server = await serve(
            self._serve,
            "127.0.0.1",
            0,
            process_request=self._process_request,
            compression=None,
            ping_interval=None,
            ssl=self.tls,
        )
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        for socket in list(self.sockets):
            socket.transport.abort()
        self._server.close()
        await self._server.wait_closed()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(next(iter(self._server.sockets)).getsockname()[1])

    @property
    def url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://127.0.0.1:{self.port}/realtime/v1"

    @property
    def token_in_force(self) -> str:
        return self.pushed_tokens[-1] if self.pushed_tokens else self.joins[-1].token

    # --- what tests make happen

    def message(self, event: str, payload: dict[str, Any]) -> bytes:
        """As a channel is sent it."""
        return type4(self.joins[-1].topic, event, payload)

    def goodbye(self) -> bytes:
        """The close frame of a server that goes away."""
        return Frame(Opcode.CLOSE, Close(1001, "going away").serialize()).serialize(mask=False)

    async def broadcast(self, event: str, payload: dict[str, Any], *, binary: bool = True) -> int:
        """To every channel; returns to how many."""
        for channel in list(self.channels.values()):
            await channel.socket.send(
                type4(channel.topic, event, payload)
                if binary
                else json.dumps([None, None, channel.topic, "broadcast", broadcast_payload(event, payload)])
            )
        return len(self.channels)

    async def system(self, status: str, message: str, extension: str = "system") -> None:
        for channel in list(self.channels.values()):
            name = channel.topic.removeprefix("realtime:")
            payload = {"extension": extension, "status": status, "message": message, "channel": name}
            await channel.socket.send(json.dumps([channel.join_ref, None, channel.topic, "system", payload]))

    async def shut_channels(self, message: str | None = None, event: str = "phx_close") -> None:
        """As the real server's shutdown_response: a system error, then phx_close; the socket stays."""
        if message is not None:
            await self.system("error", message)
        for channel in list(self.channels.values()):
            await channel.socket.send(
                json.dumps([channel.join_ref, channel.join_ref, channel.topic, event, {}])
            )
        self.channels.clear()

    async def close_sockets(self, code: int) -> None:
        for socket in list(self.channels):
            await socket.close(code)

    def abort_sockets(self) -> None:
        for socket in list(self.channels):
            socket.transport.abort()

    def deafen(self) -> None:
        """Channels die without a word; the sockets and their heartbeats go on."""
        self.channels.clear()

    # --- the protocol

    def _process_request(self, socket: ServerConnection, request: Request) -> Response | None:
        self.requests.append(request.path)
        parts = urlsplit(request.path)
        if self.refuse_handshake is not None:
            status, headers = self.refuse_handshake
            return Response(status, HTTPStatus(status).phrase, Headers(headers), b'{"error":"refused"}')
        if parts.path != "/realtime/v1/websocket" or parse_qs(parts.query).get("vsn") != ["2.0.0"]:
            return Response(404, "Not Found", Headers(), b"")
        return None

    async def _serve(self, socket: ServerConnection) -> None:
        self.sockets.append(socket)
        try:
            async for message in socket:
                await self._receive(socket, json.loads(message))
        except ConnectionClosed:
            pass
        finally:
            self.sockets.remove(socket)
            self.channels.pop(socket, None)

    async def _receive(self, socket: ServerConnection, frame: list[Any]) -> None:
        join_ref, ref, topic, event, payload = frame
        match event:
            case "heartbeat":
                self.heartbeats += 1
                if not self.mute_heartbeats:
                    await self._reply(socket, None, ref, "phoenix", "ok", {})
            case "phx_join":
                await self._join(socket, join_ref, ref, topic, payload)
            case "access_token":
                self.pushed_tokens.append(payload["access_token"])
                if channel := self.channels.get(socket):
                    channel.token = payload["access_token"]
                elif self.unmatched_topic:
                    await self._reply(socket, None, ref, topic, "error", {"reason": "unmatched topic"})
            case "phx_leave":
                self.left += 1
                self.channels.pop(socket, None)
                await self._reply(socket, join_ref, ref, topic, "ok", {})
                await socket.send(json.dumps([join_ref, join_ref, topic, "phx_close", {}]))

    async def _join(
        self, socket: ServerConnection, join_ref: str, ref: str, topic: str, payload: Any
    ) -> None:
        assert join_ref == ref
        assert payload["config"]["private"] is True
        channel = Channel(socket, join_ref, topic, payload["access_token"])
        self.joins.append(channel)
        if self.mute_joins:
            return
        if self.join_delay:
            await asyncio.sleep(self.join_delay)
        expired = claims_of(channel.token)["exp"] - self.wall()
        error = self.join_error or self.join_error_for(channel.token)
        if error is None and expired <= 0:
            error = f"InvalidJWTToken: Token has expired {-expired:.0f} seconds ago"
        if error is not None:
            await self._reply(socket, join_ref, ref, topic, "error", {"reason": error})
            return
        self.channels[socket] = channel
        await self._reply(socket, join_ref, ref, topic, "ok", {"postgres_changes": []})
        if self.replication_ready and payload["config"]["broadcast"].get("replication_ready"):
            if self.replication_delay:
                await asyncio.sleep(self.replication_delay)
            await self.system("ok", "Replication connection established")

    async def _reply(
        self, socket: Any, join_ref: Any, ref: Any, topic: str, status: str, response: Any
    ) -> None:
        await socket.send(
            json.dumps([join_ref, ref, topic, "phx_reply", {"status": status, "response": response}])
        )


def broadcast_payload(event: str, payload: dict[str, Any]) -> dict[str, Any]:
    return {"type": "broadcast", "event": event, "payload": payload, "meta": {"id": "m"}}


def type4(topic: str, event: str, payload: Any, meta: Any = None, encoding: int = 1) -> bytes:
    """The server's binary broadcast: 4|topicLen|eventLen|metaLen|enc|topic|event|meta|payload."""
    t, e = topic.encode(), event.encode()
    m = b"" if meta is None else json.dumps(meta).encode()
    body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return bytes((4, len(t), len(e), len(m), encoding)) + t + e + m + body
