"""Serves Phoenix channels as Supabase Realtime does, for one project.

This module takes what clients send; `admission` decides, `hub` delivers, `feed` brings what the database says. Texts,
orders and omissions follow supabase/realtime v2 (`realtime_channel.ex`, `broadcast_handler.ex`, `presence_handler.ex`),
because clients match on them:

    join refused        reply error, after `Limits.join_error_delay`
    token expired       system message, phx_close, and the socket stays open
    duplicate join      reply to the new, then phx_close with the old join_ref
    forbidden broadcast no reply at all

What is not served: `postgres_changes` (the subscriber is told so by a system message).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

import orjson
from starlette.types import Message, Receive, Scope, Send

from orchestrator_stub.local_supabase.access import Pool
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.realtime import feed, frames
from orchestrator_stub.local_supabase.realtime.admission import Admission, AfterJoin, Refused
from orchestrator_stub.local_supabase.realtime.faults import Faults
from orchestrator_stub.local_supabase.realtime.frames import Broadcast, Push, Version
from orchestrator_stub.local_supabase.realtime.hub import Channel, Connection, Hub
from orchestrator_stub.local_supabase.realtime.limits import Limits
from orchestrator_stub.local_supabase.realtime.socket import EXTENSION

log = logging.getLogger("preview_orchestrator.realtime")

MAX_CONFIRM_SECONDS = 3600.0
"""A token is looked at again at its expiry, and at least this often (`@confirm_token_ms_max_interval`)."""

READY_CHECK_SECONDS = 0.5
"""Between looks at whether the database is being listened to (`@replication_ready_check_interval`)."""


class Realtime:
    """The server: an ASGI WebSocket application for uvicorn with `socket.uvicorn_options()`.

    `clock` gives Unix seconds. `faults` None: the server cannot misbehave.
    """

    def __init__(
        self,
        pool: Pool,
        keys: ProjectKeys,
        *,
        limits: Limits | None = None,
        faults: Faults | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.pool = pool
        self.keys = keys
        self.limits = limits or Limits()
        self.clock = clock
        self.hub = Hub(self.limits, faults, clock)
        self.connections: set[Connection] = set()
        self.admission = Admission(pool, keys, self.limits, clock)
        self._listening = asyncio.Event()

    # --- the feed from the database

    async def follow(self, dsn: str) -> None:
        """Deliver the database's broadcasts, for ever."""

        async def publish(message: Broadcast, private: bool) -> None:
            if len(message.payload) <= self.limits.payload_bytes:
                self.hub.publish(message, private)
            else:
                # As hosted: no subscriber hears of it.
                log.warning("realtime.payload_too_large", extra={"bytes": len(message.payload)})

        def listening(yes: bool) -> None:
            self._listening.set() if yes else self._listening.clear()

        await feed.follow(dsn, publish, listening)

    @property
    def listening(self) -> bool:
        """Whether what the database broadcasts is being heard."""
        return self._listening.is_set()

    async def until_listening(self) -> None:
        await self._listening.wait()

    # --- one socket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        query = parse_qs(scope["query_string"].decode("latin-1"))
        header = dict(scope["headers"]).get(b"x-api-key", b"").decode("latin-1")
        key = header or query.get("apikey", [""])[0]
        refusal = self.faults.turn_away() if self.faults else None
        if refusal := refusal or self.admission.turn_away(key, len(self.connections)):
            await _refuse(send, *refusal)
            return
        socket = scope["extensions"].get(EXTENSION)
        if socket is None:
            raise RuntimeError("the realtime endpoint needs uvicorn with local.socket.uvicorn_options()")
        connection = Connection(self.hub, socket, Version.asked(query.get("vsn", [""])[0]), key)
        await send({"type": "websocket.accept"})
        self.connections.add(connection)
        try:
            await self._converse(connection, receive, send)
        finally:
            self.connections.discard(connection)
            for channel in tuple(connection.channels.values()):
                self.hub.remove(channel)

    @property
    def faults(self) -> Faults | None:
        """The faults in force; to be replaced whole by new ones, or None on a server that cannot misbehave."""
        return self.hub.faults

    @faults.setter
    def faults(self, faults: Faults | None) -> None:
        self.hub.faults = faults

    async def _converse(self, connection: Connection, receive: Receive, send: Send) -> None:
        while True:
            try:
                async with asyncio.timeout(self.limits.idle_seconds):
                    message = await receive()
            except TimeoutError:
                await send({"type": "websocket.close", "code": 1000})
                return
            if message["type"] == "websocket.disconnect":
                return
            if self.hub.dark():
                continue
            try:
                await self._take(connection, _read_push(connection.version, message))
            except frames.BadFrame as error:
                log.info("realtime.bad_frame", extra={"reason": str(error)})
                await send({"type": "websocket.close", "code": 1011})
                return
            except _Closing:
                await send({"type": "websocket.close", "code": 1001})
                return

    async def _take(self, connection: Connection, push: Push) -> None:
        if push.topic == "phoenix":
            if push.event == "heartbeat" and not (self.faults and self.faults.mute_heartbeats):
                connection.reply(push, "ok", {})
            return
        if push.event == "phx_join":
            await self._join(connection, push)
            return
        channel = connection.channels.get(push.topic)
        if channel is None:
            if push.event == "phx_leave":
                connection.reply(push, "ok", {})
            else:
                connection.reply(push, "error", {"reason": "unmatched topic"})
            return
        if push.join_ref is not None and push.join_ref != channel.join_ref:
            return  # of a join that was replaced
        payload = push.payload if isinstance(push.payload, dict) else {}
        match push.event:
            case "phx_leave":
                self.hub.remove(channel)
                connection.reply(push, "ok", {})
                channel.ended("phx_close")
            case "broadcast":
                await self._broadcast(channel, push, payload)
            case "presence":
                await self._presence(channel, push, payload)
            case "access_token":
                await self._renew(channel, payload.get("access_token"))
            case _:
                pass  # the real server logs it and says nothing

    # --- joining

    async def _join(self, connection: Connection, push: Push) -> None:
        if not push.topic.startswith("realtime:"):
            connection.reply(push, "error", {"reason": "unmatched topic"})
            return
        replaced = connection.channels.get(push.topic)
        if replaced is not None:
            self.hub.remove(replaced)
        try:
            if self.faults is not None:
                await asyncio.sleep(self.faults.join_delay)
            channel, after = await self.admission.admit(connection, push)
        except Refused as error:
            if not error.closes:
                await asyncio.sleep(self.limits.join_error_delay)
            connection.reply(push, "error", {"reason": str(error)})
            if error.closes:
                raise _Closing from None
        else:
            self.hub.add(channel)
            self._arm(channel)
            if not (self.faults and self.faults.mute_joins):
                connection.reply(push, "ok", {"postgres_changes": after.changes})
            self._welcome(channel, after)
        if replaced is not None:
            replaced.ended("phx_close")

    def _welcome(self, channel: Channel, after: AfterJoin) -> None:
        """What follows a join's reply."""
        if channel.presence_enabled:
            self.hub.present(channel)
        for message in after.replayed:
            frame = message.encode(channel.connection.version)
            if frame is not None:
                channel.connection.write(frame)
        if after.changes:
            channel.system(
                "error", "postgres_changes is not served by the local stand-in", "postgres_changes"
            )
        if after.replication_ready:
            self._report_ready(
                channel, asyncio.get_running_loop().time() + self.limits.replication_ready_seconds
            )

    def _report_ready(self, channel: Channel, deadline: float) -> None:
        """Say that the database is being listened to, as soon as it is; close the channel past `deadline`."""
        loop = asyncio.get_running_loop()
        if not self.hub.holds(channel):
            return
        if self.listening:
            channel.system("ok", "Replication connection established")
        elif loop.time() >= deadline:
            self.hub.shut(channel, "Replication connection was not established in time")
        else:
            loop.call_later(READY_CHECK_SECONDS, self._report_ready, channel, deadline)

    # --- tokens

    def _arm(self, channel: Channel) -> None:
        if channel.expiry is not None:
            channel.expiry.cancel()
        left = min(max(channel.claims["exp"] - self.clock(), 0.0), MAX_CONFIRM_SECONDS)
        channel.expiry = asyncio.get_running_loop().call_later(left, self._confirm, channel)

    def _confirm(self, channel: Channel) -> None:
        if not self.hub.holds(channel):
            return
        try:
            self.admission.read(channel.token)
        except Refused as error:
            self.hub.shut(channel, error.sentence)
        else:
            self._arm(channel)

    async def _renew(self, channel: Channel, token: Any) -> None:
        """A new token on an open channel. No reply on success."""
        if not isinstance(token, str) or token.startswith("sb_") or token == channel.token:
            return
        try:
            await self.admission.renew(channel, token)
        except Refused as error:
            self.hub.shut(channel, error.sentence)
        else:
            self._arm(channel)

    # --- what clients send

    async def _broadcast(self, channel: Channel, push: Push, payload: dict[str, Any]) -> None:
        if not await self.admission.may_send(channel):
            return
        event = str(payload.get("event", ""))
        if push.raw is not None:
            message = Broadcast(channel.topic, event, push.raw, is_json=push.raw_json)
        else:
            extra = {k: v for k, v in payload.items() if k not in ("type", "event", "payload")}
            body = orjson.dumps(payload.get("payload"))
            message = Broadcast(channel.topic, event, body, as_text=True, extra=extra)
        if len(message.payload) > self.limits.payload_bytes:
            if channel.ack:
                channel.connection.reply(push, "error", {"reason": "payload_size_exceeded"})
            return
        self.hub.publish(message, channel.private, skip=None if channel.self_broadcast else channel)
        if channel.ack:
            channel.connection.reply(push, "ok", {})

    async def _presence(self, channel: Channel, push: Push, payload: dict[str, Any]) -> None:
        match str(payload.get("event", "")).lower():
            case "track":
                tracked = payload.get("payload", {})
                if not isinstance(tracked, dict):
                    reason = "Presence track payload must be a map"
                    channel.connection.reply(push, "error", {"reason": reason})
                elif not await self.admission.may_track(channel):
                    channel.connection.reply(push, "error", {})
                else:
                    channel.connection.reply(push, "ok", {})
                    self.hub.track(channel, tracked)
            case "untrack":
                channel.connection.reply(push, "ok", {})
                self.hub.untrack(channel)
            case _:
                channel.connection.reply(push, "error", {})

    # --- faults on demand

    async def _close(self, connections: list[Connection], code: int) -> None:
        for connection in connections:
            if code == 1012:
                connection.farewell()
            await connection.socket.finish(code)

    async def act(self, action: str, *, topic: str | None = None, code: int = 1000, size: int = 0) -> int:
        """One of `faults.ACTIONS`, done now to every socket (with `topic`: to those that joined it).

        `code`: of `close`. `size`: of `oversize`, bytes. Returns how many sockets it was done to.
        """
        chosen = [
            c for c in self.connections if topic is None or any(h.topic == topic for h in c.channels.values())
        ]
        channels = [c for c in _channels(chosen) if topic is None or c.topic == topic]
        match action:
            case "close":
                await self._close(chosen, code)
            case "abort":
                for connection in chosen:
                    connection.socket.abort()
            case "oversize":
                for channel in channels:
                    junk = Broadcast(channel.topic, "oversize", orjson.dumps({"junk": "x" * size}))
                    if frame := junk.encode(channel.connection.version):
                        channel.connection.socket.write_frame(frame)
            case "rate_limit":
                for channel in channels:
                    self.hub.shut(channel, "Too many messages per second")
            case "expire_tokens":
                for channel in channels:
                    self.hub.shut(channel, "Token has expired 0 seconds ago")
            case "crash":
                for channel in channels:
                    self.hub.remove(channel)
                    channel.ended("phx_error")
            case _:
                raise ValueError(f"no action {action!r}")
        return len(chosen)


class _Closing(Exception):
    """The socket has to go, with 1001."""


def _channels(connections: Iterable[Connection]) -> list[Channel]:
    return [channel for connection in connections for channel in connection.channels.values()]


def _read_push(version: Version, message: Message) -> Push:
    text = message.get("text")
    return (
        frames.read_text(version, text) if text is not None else frames.read_binary(version, message["bytes"])
    )


async def _refuse(send: Send, status: int, text: str) -> None:
    """A handshake answered with HTTP instead of a socket."""
    body = orjson.dumps({"error": text})
    headers = [(b"content-type", b"application/json; charset=utf-8")]
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
