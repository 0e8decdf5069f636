"""Decides whether a client may join, with which rights, and whether its next token may replace the last.

The words are those of supabase/realtime (`realtime_channel.ex`): a code, a colon and a sentence in the answer to a
join, the sentence alone in the system message that ends a channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import psycopg

from orchestrator_stub.local_supabase.access import Claims, Policies, Pool, ask_read, ask_write, read_claims
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.realtime import feed
from orchestrator_stub.local_supabase.realtime.frames import Broadcast, Push
from orchestrator_stub.local_supabase.realtime.hub import Channel, Connection
from orchestrator_stub.local_supabase.realtime.limits import Limits, Rate
from orchestrator_stub.platform.tokens import TokenRejected


class Refused(Exception):
    """A join, or a token, that is turned away. `closes`: the whole socket has to go, with 1001."""

    def __init__(self, code: str, sentence: str, *, closes: bool = False) -> None:
        self.sentence = sentence
        self.closes = closes
        super().__init__(f"{code}: {sentence}")


@dataclass(frozen=True, slots=True)
class AfterJoin:
    """What a join asked for besides being joined."""

    replayed: list[Broadcast]
    changes: list[dict[str, Any]]
    """Its `postgres_changes`, numbered as the reply must have them."""
    replication_ready: bool


class Admission:
    """Asks the keyring, the limits and the database, in the order of the original."""

    def __init__(self, pool: Pool, keys: ProjectKeys, limits: Limits, clock: Callable[[], float]) -> None:
        self._pool = pool
        self._keys = keys
        self._limits = limits
        self._clock = clock
        self._joins = Rate(limits.joins_per_second, clock)

    def read(self, token: str) -> Claims:
        """The claims of a token that counts now. Raises `Refused`."""
        try:
            claims = read_claims(self._keys.keyring, token, now=self._clock())
        except TokenRejected as error:
            raise _of_token(error) from None
        if not isinstance(claims.get("role"), str):
            raise _of_token(TokenRejected("claims", "no role"))
        return claims

    def turn_away(self, key: str, connections: int) -> tuple[int, str] | None:
        """Why a handshake with this API key is refused, when so many sockets are open: HTTP status and text."""
        if not key:
            return 401, "API key is missing"
        try:
            self.read(key)
        except Refused as error:
            return 401, error.sentence
        if key not in (self._keys.anon_key, self._keys.service_key):
            # The hosted gateway knows its keys by heart: a minted token is not one of them.
            return 401, "Invalid API key"
        if self._limits.connections is not None and connections >= self._limits.connections:
            return 429, "Too many connected users"
        return None

    async def admit(self, connection: Connection, push: Push) -> tuple[Channel, AfterJoin]:
        """The channel that `push` asks for, not joined yet. Raises `Refused`."""
        params = push.payload if isinstance(push.payload, dict) else {}
        config = _dict(params, "config")
        broadcast, presence = _dict(config, "broadcast"), _dict(config, "presence")
        topic = push.topic.removeprefix("realtime:")
        if not topic:
            raise Refused("TopicNameRequired", "You must provide a topic name")
        if self._joins.exceeded(1):
            raise Refused("ClientJoinRateLimitReached", "Too many joins per second", closes=True)
        if len(connection.channels) >= self._limits.channels_per_connection:
            raise Refused("ChannelRateLimitReached", "Too many channels")
        token = params.get("user_token") or params.get("access_token")
        if not isinstance(token, str) or token.startswith("sb_"):
            token = connection.token
        claims = self.read(token)
        channel = Channel(
            connection,
            topic,
            push.join_ref if push.join_ref is not None else push.ref,
            private=bool(config.get("private")),
            token=token,
            claims=claims,
            policies=Policies(),
            ack=bool(broadcast.get("ack")),
            self_broadcast=bool(broadcast.get("self")),
            presence_key=str(presence.get("key") or uuid4()),
            presence_enabled=bool(presence.get("enabled")),
        )
        channel.policies = await self._readable(channel, claims)
        replayed: list[Broadcast] = []
        if "replay" in broadcast:
            replayed = await self._replay(channel, broadcast["replay"])
            channel.replayed = frozenset(message.id for message in replayed if message.id)
        changes = config.get("postgres_changes")
        wanted = [c for c in changes if isinstance(c, dict)] if isinstance(changes, list) else []
        numbered = [{**change, "id": number} for number, change in enumerate(wanted, 1)]
        return channel, AfterJoin(replayed, numbered, bool(broadcast.get("replication_ready")))

    async def renew(self, channel: Channel, token: str) -> None:
        """Put a new token in force on an open channel. Raises `Refused`."""
        claims = self.read(token)
        before, after = channel.policies, await self._readable(channel, claims)
        if (before.read_broadcast and after.read_broadcast is False) or (
            before.read_presence and after.read_presence is False
        ):
            sentence = f"You no longer have permission to read from this Channel topic: {channel.topic}"
            raise Refused("Unauthorized", sentence)
        channel.token, channel.claims, channel.policies = token, claims, after

    async def may_send(self, channel: Channel) -> bool:
        """Whether the channel's token may broadcast; asked once for each token."""
        return not channel.private or bool((await self._written(channel)).write_broadcast)

    async def may_broadcast(self, topic: str, claims: Claims) -> bool:
        """The same over HTTP, where there is no channel."""
        try:
            return bool((await ask_write(self._pool, topic, claims, Policies())).write_broadcast)
        except psycopg.Error:
            return False

    async def may_track(self, channel: Channel) -> bool:
        """Whether it may be seen. To read presence is asked with it, when the join did not."""
        if not channel.private:
            return True
        if channel.policies.read_presence is None:
            try:
                read = await ask_read(self._pool, channel.topic, channel.claims, presence=True)
            except psycopg.OperationalError:
                return False
            channel.policies = Policies(read.read_broadcast, read.read_presence)
        return bool((await self._written(channel)).write_presence)

    async def _written(self, channel: Channel) -> Policies:
        if channel.policies.write_broadcast is None:
            try:
                channel.policies = await ask_write(
                    self._pool, channel.topic, channel.claims, channel.policies
                )
            except psycopg.Error:
                return Policies()
        return channel.policies

    async def _readable(self, channel: Channel, claims: Claims) -> Policies:
        if not channel.private:
            return Policies()
        try:
            policies = await ask_read(self._pool, channel.topic, claims, presence=channel.presence_enabled)
        except psycopg.OperationalError:
            sentence = "Realtime was unable to connect to the project database"
            raise Refused("UnableToConnectToProject", sentence) from None
        if not policies.readable:
            sentence = f"You do not have permissions to read from this Channel topic: {channel.topic}"
            raise Refused("Unauthorized", sentence)
        return policies

    async def _replay(self, channel: Channel, wanted: Any) -> list[Broadcast]:
        if not channel.private:
            raise Refused("UnableToReplayMessages", "Replay is not allowed for public channels")
        wanted = wanted if isinstance(wanted, dict) else {}
        since, limit = wanted.get("since", 0), wanted.get("limit", feed.MOST_REPLAYED)
        if type(since) is not int or type(limit) is not int:
            raise Refused("UnableToReplayMessages", "Replay params are not valid")
        try:
            return await feed.replay(self._pool, channel.topic, since, limit)
        except psycopg.Error:
            raise Refused("UnableToReplayMessages", "Realtime was unable to replay messages") from None


def _dict(whole: dict[str, Any], key: str) -> dict[str, Any]:
    part = whole.get(key)
    return part if isinstance(part, dict) else {}


def _of_token(error: TokenRejected) -> Refused:
    match error.reason:
        case "expired":
            return Refused("InvalidJWTToken", str(error))
        case "claims":
            return Refused("InvalidJWTToken", "Fields `role` and `exp` are required in JWT")
        case "signature":
            return Refused("JwtSignatureError", "Failed to validate JWT signature")
        case "key":
            sentence = "Failed to generate JWT signer, check your JWT secret or JWKS configuration"
            return Refused("JwtSignerError", sentence)
        case _:
            return Refused("MalformedJWT", "The token provided is not a valid JWT")
