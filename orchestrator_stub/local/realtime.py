"""The local realtime server: Phoenix channels as Supabase Realtime serves them, for one project.

One `Connection` per socket, one `Channel` per joined topic; a public and a private topic of the same name are two
different things. Texts, orders and omissions follow supabase/realtime v2 (`realtime_channel.ex`,
`broadcast_handler.ex`, `presence_handler.ex`), because clients match on them:

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
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4

import orjson
import psycopg
from psycopg_pool import PoolTimeout
from starlette.types import Message, Receive, Scope, Send

from orchestrator_stub.local import feed, frames
from orchestrator_stub.local.access import Claims, Policies, Pool, ask_read, ask_write, read_claims
from orchestrator_stub.local.faults import Faults
from orchestrator_stub.local.frames import Broadcast, Push, Version
from orchestrator_stub.local.keys import ProjectKeys
from orchestrator_stub.local.presence import Metas, Presence
from orchestrator_stub.local.socket import EXTENSION, FrameSocket
from orchestrator_stub.tokens import TokenRejected

log = logging.getLogger("preview_orchestrator.realtime")

MAX_CONFIRM_SECONDS = 3600.0
"""A token is looked at again at its expiry, and at least this often (`@confirm_token_ms_max_interval`)."""

SERVER_DISCONNECT = "Server requested disconnect"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one project may do. None: no limit, because nobody is billed here."""

    connections: int | None = 10_000
    """Open sockets; the hosted number of the Team plan."""
    joins_per_second: int | None = 2_500
    """Averaged over up to a minute, as the real counters are. Team plan."""
    messages_per_second: int | None = None
    """Counted one per broadcast and one per delivery, averaged likewise. Hosted: 100, 500, 2,500."""
    channels_per_connection: int = 100
    payload_bytes: int = 256_000
    """One broadcast's payload as JSON. The Free plan's, the strictest, so that what works here works there."""
    idle_seconds: float = 60.0
    """A socket without client data for so long is closed."""
    join_error_delay: float = 5.0
    """Seconds before a refused join is answered, which slows down clients that ask in a loop."""
    backlog_bytes: int = 16 * 1024 * 1024
    """Unsent bytes of one socket; beyond it the reader is too slow and is cut off."""
    replication_ready_seconds: float = 10.0
    """How long a join that asked for `replication_ready` waits for the database."""


class Rate:
    """Events per second, averaged over the seconds seen, at most the last 60."""

    def __init__(self, limit: int | None, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._buckets: deque[list[int]] = deque()
        self._total = 0

    def exceeded(self, more: int = 0) -> bool:
        """Count `more` events; whether the average is now above the limit."""
        if self._limit is None:
            return False
        second = int(self._clock())
        if not self._buckets or self._buckets[-1][0] != second:
            self._buckets.append([second, 0])
        self._buckets[-1][1] += more
        self._total += more
        while self._buckets[0][0] <= second - 60:
            self._total -= self._buckets.popleft()[1]
        return self._total / (second - self._buckets[0][0] + 1) > self._limit


class Refused(Exception):
    """A join that is answered with an error; the text is what the client sees."""


@dataclass(slots=True, eq=False)
class Channel:
    """One joined topic of one connection."""

    connection: Connection
    topic: str
    """Without the `realtime:` in front."""
    join_ref: str | None
    private: bool
    token: str
    claims: Claims
    policies: Policies
    ack: bool
    self_broadcast: bool
    presence_key: str
    presence_enabled: bool
    replayed: frozenset[str] = frozenset()
    expiry: asyncio.TimerHandle | None = None

    @property
    def address(self) -> tuple[str, bool]:
        return self.topic, self.private

    @property
    def hears_presence(self) -> bool:
        return not self.private or bool(self.policies.read_presence)

    def push(self, event: str, payload: Any) -> None:
        self.connection.send(f"realtime:{self.topic}", event, payload, ref=None, join_ref=self.join_ref)

    def system(self, status: str, message: str, extension: str = "system") -> None:
        body = {"extension": extension, "status": status, "message": message, "channel": self.topic}
        self.push("system", body)

    def ended(self, event: str) -> None:
        """`phx_close`, or `phx_error` after a crash: the ref is the join's."""
        wire = f"realtime:{self.topic}"
        self.connection.send(wire, event, {}, ref=self.join_ref, join_ref=self.join_ref)


class Connection:
    """One socket and the channels joined on it."""

    __slots__ = ("channels", "server", "socket", "token", "version")

    def __init__(self, server: Realtime, socket: FrameSocket, version: Version, token: str) -> None:
        self.server = server
        self.socket = socket
        self.version = version
        self.token = token
        self.channels: dict[str, Channel] = {}
        socket.before_shutdown = self.farewell

    def write(self, frame: bytes) -> None:
        """One finished frame. A reader that lets too much pile up is cut off."""
        if self.server.dark():
            return
        self.socket.write_frame(frame)
        if self.socket.backlog > self.server.limits.backlog_bytes:
            log.warning("realtime.slow_reader")
            self.socket.abort()

    def send(self, topic: str, event: str, payload: Any, *, ref: str | None, join_ref: str | None) -> None:
        self.write(frames.message(self.version, topic, event, payload, ref=ref, join_ref=join_ref))

    def reply(self, push: Push, status: str, response: Any) -> None:
        payload = {"status": status, "response": response}
        self.send(push.topic, "phx_reply", payload, ref=push.ref, join_ref=push.join_ref)

    def farewell(self) -> None:
        """The server goes, as at a deploy of the real one: 1012 follows."""
        for channel in self.channels.values():
            channel.system("ok", SERVER_DISCONNECT)


class Realtime:
    """The server: an ASGI WebSocket application, and the hub every broadcast goes through.

    Runs under uvicorn with `socket.uvicorn_options()`. `clock` gives Unix seconds. `faults` None: the server
    cannot misbehave.
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
        self.faults = faults
        self.clock = clock
        self.connections: set[Connection] = set()
        self._subscribers: dict[tuple[str, bool], dict[Channel, None]] = {}
        self._presences: dict[tuple[str, bool], Presence] = {}
        self._joins = Rate(self.limits.joins_per_second, clock)
        self._messages = Rate(self.limits.messages_per_second, clock)
        self._listening = asyncio.Event()

    # --- the feed from the database

    async def follow(self, dsn: str) -> None:
        """Deliver the database's broadcasts, for ever."""

        async def publish(message: Broadcast, private: bool) -> None:
            if len(message.payload) <= self.limits.payload_bytes:
                self.publish(message, private)
            else:
                # As hosted: no subscriber hears of it.
                log.warning("realtime.payload_too_large", extra={"bytes": len(message.payload)})

        def listening(yes: bool) -> None:
            self._listening.set() if yes else self._listening.clear()

        await feed.follow(dsn, self.pool, publish, listening)

    @property
    def listening(self) -> bool:
        """Whether what the database broadcasts is being heard."""
        return self._listening.is_set()

    async def until_listening(self) -> None:
        await self._listening.wait()

    # --- fan-out

    def publish(self, message: Broadcast, private: bool, *, skip: Channel | None = None) -> None:
        """Deliver to every subscriber of the message's topic but `skip`."""
        outgoing = [(message, private)] if self.faults is None else self.faults.passing(message, private)
        for each, is_private in outgoing:
            self._deliver(each, is_private, skip)

    def _deliver(self, message: Broadcast, private: bool, skip: Channel | None) -> None:
        subscribers = self._subscribers.get((message.topic, private), {})
        if self._messages.exceeded(1 + len(subscribers)):
            for channel in tuple(subscribers):
                self._shut(channel, "Too many messages per second")
            return
        id_ = message.id
        for channel in subscribers:
            if channel is skip or (id_ is not None and id_ in channel.replayed):
                continue
            if channel.private and not channel.policies.read_broadcast:
                continue
            frame = message.encode(channel.connection.version)
            if frame is not None:
                channel.connection.write(frame)

    def dark(self) -> bool:
        """Whether a blackout is losing every frame."""
        return self.faults is not None and self.faults.blackout_until > asyncio.get_running_loop().time()

    # --- one socket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        query = parse_qs(scope["query_string"].decode("latin-1"))
        token = (
            dict(scope["headers"]).get(b"x-api-key", b"").decode("latin-1") or query.get("apikey", [""])[0]
        )
        if refusal := self._turn_away(token):
            await _refuse(send, *refusal)
            return
        socket = scope["extensions"].get(EXTENSION)
        if socket is None:
            raise RuntimeError("the realtime endpoint needs uvicorn with local.socket.uvicorn_options()")
        connection = Connection(self, socket, Version.asked(query.get("vsn", [""])[0]), token)
        await send({"type": "websocket.accept"})
        self.connections.add(connection)
        try:
            await self._converse(connection, receive, send)
        finally:
            self.connections.discard(connection)
            for channel in tuple(connection.channels.values()):
                self._remove(channel)

    def _turn_away(self, token: str) -> tuple[int, str] | None:
        """Why this handshake is refused: HTTP status and text."""
        if self.faults is not None and (wanted := self.faults.turn_away()):
            return wanted
        if not token:
            return 401, "API key is missing"
        try:
            self._read(token)
        except TokenRejected as error:
            return 401, _token_text(error)[1]
        if token not in (self.keys.anon_key, self.keys.service_key):
            # The hosted gateway knows its keys by heart: a minted token is not one of them.
            return 401, "Invalid API key"
        if self.limits.connections is not None and len(self.connections) >= self.limits.connections:
            return 429, "Too many connected users"
        return None

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
            if self.dark():
                continue
            try:
                await self._take(connection, _read_push(connection.version, message))
            except frames.BadFrame as error:
                log.info("realtime.bad_frame", extra={"reason": str(error)})
                await send({"type": "websocket.close", "code": 1011})
                return
            except TooManyJoins:
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
                self._remove(channel)
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
            self._remove(replaced)
        try:
            if self.faults is not None:
                await asyncio.sleep(self.faults.join_delay)
            channel, after = await self._admit(connection, push)
        except Refused as error:
            await asyncio.sleep(self.limits.join_error_delay)
            connection.reply(push, "error", {"reason": str(error)})
        else:
            connection.channels[push.topic] = channel
            self._subscribers.setdefault(channel.address, {})[channel] = None
            self._arm(channel)
            if not (self.faults and self.faults.mute_joins):
                connection.reply(push, "ok", {"postgres_changes": after.changes})
            self._welcome(channel, after)
        if replaced is not None:
            replaced.ended("phx_close")

    async def _admit(self, connection: Connection, push: Push) -> tuple[Channel, AfterJoin]:
        """The channel, once everything was asked. Raises `Refused`, or `TooManyJoins` after its reply."""
        params = push.payload if isinstance(push.payload, dict) else {}
        config = _dict(params, "config")
        broadcast, presence = _dict(config, "broadcast"), _dict(config, "presence")
        topic = push.topic.removeprefix("realtime:")
        if not topic:
            raise Refused("TopicNameRequired: You must provide a topic name")
        if self._joins.exceeded(1):
            text = "ClientJoinRateLimitReached: Too many joins per second"
            connection.reply(push, "error", {"reason": text})
            raise TooManyJoins
        if len(connection.channels) >= self.limits.channels_per_connection:
            raise Refused("ChannelRateLimitReached: Too many channels")
        token = params.get("user_token") or params.get("access_token")
        if not isinstance(token, str) or token.startswith("sb_"):
            token = connection.token
        private = bool(config.get("private"))
        try:
            claims = self._read(token)
        except TokenRejected as error:
            raise Refused(": ".join(_token_text(error))) from None
        presence_enabled = bool(presence.get("enabled"))
        policies = Policies()
        replayed: list[Broadcast] = []
        if "replay" in broadcast and not private:
            raise Refused("UnableToReplayMessages: Replay is not allowed for public channels")
        try:
            if private:
                policies = await self._readable(topic, claims, presence=presence_enabled)
                if "replay" in broadcast:
                    replayed = await self._replayed(topic, broadcast["replay"])
        except (psycopg.OperationalError, PoolTimeout):
            text = "Realtime was unable to connect to the project database"
            raise Refused(f"UnableToConnectToProject: {text}") from None
        channel = Channel(
            connection, topic, push.join_ref if push.join_ref is not None else push.ref, private, token,
            claims, policies, bool(broadcast.get("ack")), bool(broadcast.get("self")),
            presence.get("key") or str(uuid4()), presence_enabled,
            frozenset(m.id for m in replayed if m.id),
        )  # fmt: skip
        changes = config.get("postgres_changes")
        wanted = [c for c in changes if isinstance(c, dict)] if isinstance(changes, list) else []
        return channel, AfterJoin(
            replayed,
            [{**change, "id": number} for number, change in enumerate(wanted, 1)],
            bool(broadcast.get("replication_ready")),
        )

    async def _readable(self, topic: str, claims: Claims, *, presence: bool) -> Policies:
        policies = await ask_read(self.pool, topic, claims, presence=presence)
        if not policies.readable:
            text = f"You do not have permissions to read from this Channel topic: {topic}"
            raise Refused(f"Unauthorized: {text}")
        return policies

    async def _replayed(self, topic: str, wanted: Any) -> list[Broadcast]:
        wanted = wanted if isinstance(wanted, dict) else {}
        since, limit = wanted.get("since", 0), wanted.get("limit", 25)
        if type(since) is not int or type(limit) is not int:
            raise Refused("UnableToReplayMessages: Replay params are not valid")
        return await feed.replay(self.pool, topic, since, limit)

    def _welcome(self, channel: Channel, after: AfterJoin) -> None:
        """What follows a join's reply."""
        if channel.presence_enabled and channel.hears_presence:
            channel.push("presence_state", self._presence_of(channel).state())
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
        if not self._joined(channel):
            return
        if self.listening:
            channel.system("ok", "Replication connection established")
        elif loop.time() >= deadline:
            self._shut(channel, "Replication connection was not established in time")
        else:
            loop.call_later(0.5, self._report_ready, channel, deadline)

    # --- tokens

    def _read(self, token: str) -> Claims:
        claims = read_claims(self.keys.keyring, token, now=self.clock())
        if not isinstance(claims.get("role"), str):
            raise TokenRejected("claims", "no role")
        return claims

    def _arm(self, channel: Channel) -> None:
        if channel.expiry is not None:
            channel.expiry.cancel()
        left = min(max(channel.claims["exp"] - self.clock(), 0.0), MAX_CONFIRM_SECONDS)
        channel.expiry = asyncio.get_running_loop().call_later(left, self._confirm, channel)

    def _confirm(self, channel: Channel) -> None:
        if not self._joined(channel):
            return
        try:
            self._read(channel.token)
        except TokenRejected as error:
            self._shut(channel, _token_text(error)[1])
        else:
            self._arm(channel)

    async def _renew(self, channel: Channel, token: Any) -> None:
        """A new token on an open channel. No reply on success."""
        if not isinstance(token, str) or token.startswith("sb_") or token == channel.token:
            return
        try:
            claims = self._read(token)
            policies = Policies()
            if channel.private:
                policies = await self._readable(channel.topic, claims, presence=channel.presence_enabled)
        except TokenRejected as error:
            self._shut(channel, _token_text(error)[1])
            return
        except Refused as error:
            self._shut(channel, str(error).partition(": ")[2])
            return
        except (psycopg.OperationalError, PoolTimeout):
            self._shut(channel, "Realtime was unable to connect to the project database")
            return
        before = channel.policies
        if (before.read_broadcast and policies.read_broadcast is False) or (
            before.read_presence and policies.read_presence is False
        ):
            text = f"You no longer have permission to read from this Channel topic: {channel.topic}"
            self._shut(channel, text)
            return
        channel.token, channel.claims, channel.policies = token, claims, policies
        self._arm(channel)

    # --- what clients send

    async def _writable(self, channel: Channel) -> Policies:
        if channel.policies.write_broadcast is None:
            channel.policies = await ask_write(self.pool, channel.topic, channel.claims, channel.policies)
        return channel.policies

    async def _broadcast(self, channel: Channel, push: Push, payload: dict[str, Any]) -> None:
        if channel.private:
            try:
                allowed = (await self._writable(channel)).write_broadcast
            except (psycopg.Error, PoolTimeout):
                allowed = False
            if not allowed:
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
        self.publish(message, channel.private, skip=None if channel.self_broadcast else channel)
        if channel.ack:
            channel.connection.reply(push, "ok", {})

    async def _presence(self, channel: Channel, push: Push, payload: dict[str, Any]) -> None:
        match str(payload.get("event", "")).lower():
            case "track":
                tracked = payload.get("payload", {})
                if not isinstance(tracked, dict):
                    reason = "Presence track payload must be a map"
                    channel.connection.reply(push, "error", {"reason": reason})
                    return
                if channel.private and not await self._may_track(channel):
                    channel.connection.reply(push, "error", {})
                    return
                presence, first = self._presence_of(channel), not channel.presence_enabled
                diff = presence.track(channel, channel.presence_key, tracked)
                channel.presence_enabled = True
                channel.connection.reply(push, "ok", {})
                if first and channel.hears_presence:
                    channel.push("presence_state", presence.state())
                self._tell_presence(channel, diff)
            case "untrack":
                channel.connection.reply(push, "ok", {})
                self._tell_presence(channel, self._presence_of(channel).untrack(channel))
            case _:
                channel.connection.reply(push, "error", {})

    async def _may_track(self, channel: Channel) -> bool:
        try:
            if channel.policies.read_presence is None:
                read = await ask_read(self.pool, channel.topic, channel.claims, presence=True)
                channel.policies = Policies(read.read_broadcast, read.read_presence)
            return bool((await self._writable(channel)).write_presence)
        except (psycopg.Error, PoolTimeout):
            return False

    def _presence_of(self, channel: Channel) -> Presence:
        return self._presences.setdefault(channel.address, Presence())

    def _tell_presence(self, origin: Channel, diff: dict[str, Metas] | None) -> None:
        if diff is None:
            return
        for channel in self._subscribers.get(origin.address, {}):
            if channel.hears_presence:
                channel.push("presence_diff", diff)

    # --- ends

    def _joined(self, channel: Channel) -> bool:
        return channel in self._subscribers.get(channel.address, {})

    def _remove(self, channel: Channel) -> None:
        """Unsubscribe, and tell the others who is gone."""
        channel.connection.channels.pop(f"realtime:{channel.topic}", None)
        if channel.expiry is not None:
            channel.expiry.cancel()
        subscribers = self._subscribers.get(channel.address)
        if subscribers is not None:
            subscribers.pop(channel, None)
            if not subscribers:
                del self._subscribers[channel.address]
        presence = self._presences.get(channel.address)
        if presence is not None:
            self._tell_presence(channel, presence.untrack(channel))
            if not presence:
                del self._presences[channel.address]

    def _shut(self, channel: Channel, text: str) -> None:
        """The server ends one channel: the reason, then phx_close. The socket stays open."""
        if self._joined(channel):
            self._remove(channel)
            channel.system("error", text)
            channel.ended("phx_close")

    def _channels(self, connections: Iterable[Connection]) -> list[Channel]:
        return [channel for connection in connections for channel in connection.channels.values()]

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
        channels = [c for c in self._channels(chosen) if topic is None or c.topic == topic]
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
                    self._shut(channel, "Too many messages per second")
            case "expire_tokens":
                for channel in channels:
                    self._shut(channel, "Token has expired 0 seconds ago")
            case "crash":
                for channel in channels:
                    self._remove(channel)
                    channel.ended("phx_error")
            case _:
                raise ValueError(f"no action {action!r}")
        return len(chosen)


class TooManyJoins(Exception):
    """The join rate is exceeded: the socket closes with 1001."""


@dataclass(frozen=True, slots=True)
class AfterJoin:
    """What a join asked for besides being joined."""

    replayed: list[Broadcast]
    changes: list[dict[str, Any]]
    replication_ready: bool


def _dict(whole: dict[str, Any], key: str) -> dict[str, Any]:
    part = whole.get(key)
    return part if isinstance(part, dict) else {}


def _read_push(version: Version, message: Message) -> Push:
    text = message.get("text")
    return (
        frames.read_text(version, text) if text is not None else frames.read_binary(version, message["bytes"])
    )


def _token_text(error: TokenRejected) -> tuple[str, str]:
    """Supabase Realtime's error code and sentence for a token that does not count."""
    match error.reason:
        case "expired":
            return "InvalidJWTToken", str(error)
        case "claims":
            return "InvalidJWTToken", "Fields `role` and `exp` are required in JWT"
        case "signature":
            return "JwtSignatureError", "Failed to validate JWT signature"
        case "key":
            text = "Failed to generate JWT signer, check your JWT secret or JWKS configuration"
            return "JwtSignerError", text
        case _:
            return "MalformedJWT", "The token provided is not a valid JWT"


async def _refuse(send: Send, status: int, text: str) -> None:
    """A handshake answered with HTTP instead of a socket."""
    body = orjson.dumps({"error": text})
    headers = [(b"content-type", b"application/json; charset=utf-8")]
    await send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
