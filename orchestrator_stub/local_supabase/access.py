"""Runs queries as the role that a token names, and asks PostgreSQL what that role may do.

Nothing here decides anything: a token's claims are put where Supabase's services put them (`role`,
`request.jwt.claims`, `realtime.topic`), and the database's own grants and policies answer.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import jwt
import orjson
import psycopg
from psycopg import AsyncConnection
from psycopg.errors import InsufficientPrivilege
from psycopg_pool import AsyncConnectionPool

from orchestrator_stub.platform.tokens import Keyring, TokenRejected

Claims = Mapping[str, Any]
"""The body of a token whose signature was checked."""

Pool = AsyncConnectionPool[AsyncConnection[Any]]

log = logging.getLogger("preview_orchestrator.realtime")

LOGIN_ROLE = "authenticator"
"""The role PostgREST connects as: a token can only name a role that was granted to this one."""


def read_claims(keys: Keyring, token: str, *, now: float) -> Claims:
    """The claims of a token that counts at `now` (Unix seconds), with no leeway: a channel closes at `exp`.

    Raises `TokenRejected`; for `expired` its text is the one Supabase Realtime uses.
    """
    try:
        claims: Claims = keys.verify(token)
    except TokenRejected as error:
        if error.reason != "expired":
            raise
        # The signature was found good before the expiry was looked at.
        claims = jwt.decode(token, options={"verify_signature": False})
    if isinstance(claims["exp"], bool) or not isinstance(claims["exp"], (int, float)):
        raise TokenRejected("claims", "exp is not a number")
    late = now - claims["exp"]
    if late >= 0:
        raise TokenRejected("expired", f"Token has expired {int(late)} seconds ago")
    return claims


@asynccontextmanager
async def acting_as(
    pool: Pool, claims: Claims, settings: Mapping[str, str] | None = None
) -> AsyncIterator[AsyncConnection[Any]]:
    """A transaction that runs as the role the claims name, with PostgREST's settings for it.

    Committed when the block ends, rolled back when it raises. `settings` are further transaction-local settings.
    Raises psycopg's `InsufficientPrivilege` when the role was not granted to `authenticator`, and
    `InvalidParameterValue` when it does not exist.
    """
    async with pool.connection() as connection, connection.transaction():
        await _become(connection, claims, {"search_path": "public, extensions", **(settings or {})})
        yield connection


@dataclass(frozen=True, slots=True)
class Policies:
    """What one token may do on one topic. None: not asked yet."""

    read_broadcast: bool | None = None
    read_presence: bool | None = None
    write_broadcast: bool | None = None
    write_presence: bool | None = None

    @property
    def readable(self) -> bool:
        return bool(self.read_broadcast or self.read_presence)


class _Probed(Exception):
    """Ends a probing transaction: nothing of it is kept."""


async def ask_read(pool: Pool, topic: str, claims: Claims, *, presence: bool) -> Policies:
    """Whether these claims may read `topic`, asked as Supabase Realtime asks.

    Two probe rows go into `realtime.messages`, the role changes, and the rows that its policies still show are the
    answer; then everything is rolled back. A policy that raises denies.
    """
    found: set[str] = set()
    try:
        async with pool.connection() as connection, connection.transaction():
            probes = await connection.execute(
                "insert into realtime.messages (topic, extension) values (%s, 'broadcast'), (%s, 'presence')"
                " returning id",
                [topic, topic],
            )
            ids = [row[0] for row in await probes.fetchall()]
            await _become(connection, claims, {"realtime.topic": topic, "request.headers": "{}"})
            shown = await connection.execute(
                "select extension from realtime.messages where topic = %s and id = any(%s)", [topic, ids]
            )
            found = {row[0] for row in await shown.fetchall()}
            raise _Probed
    except _Probed:
        pass
    except psycopg.OperationalError:
        raise
    except psycopg.Error as error:
        log.info("realtime.policy_error", extra={"sqlstate": error.sqlstate})
    return Policies("broadcast" in found, "presence" in found if presence else None)


async def ask_write(pool: Pool, topic: str, claims: Claims, known: Policies) -> Policies:
    """`known`, with whether these claims may send broadcasts and presence to `topic`: an insert is tried."""
    allowed: dict[str, bool] = {}
    try:
        async with pool.connection() as connection, connection.transaction():
            await _become(connection, claims, {"realtime.topic": topic, "request.headers": "{}"})
            for extension in ("broadcast", "presence"):
                try:
                    async with connection.transaction():
                        await connection.execute(
                            "insert into realtime.messages (topic, extension) values (%s, %s)",
                            [topic, extension],
                        )
                    allowed[extension] = True
                except InsufficientPrivilege:
                    allowed[extension] = False
            raise _Probed
    except _Probed:
        pass
    return replace(known, write_broadcast=allowed["broadcast"], write_presence=allowed["presence"])


async def _become(connection: AsyncConnection[Any], claims: Claims, settings: Mapping[str, str]) -> None:
    """Until the transaction ends: the claims' role, in one round trip, the settings in their order.

    First down to `authenticator`, who can only become what it was granted: a token naming another role fails here.
    """
    wanted = {
        "session_authorization": LOGIN_ROLE,
        "role": str(claims.get("role", "anon")),
        "request.jwt.claims": orjson.dumps(dict(claims)).decode(),
        **settings,
    }
    await connection.execute(
        "select " + ", ".join(["set_config(%s, %s, true)"] * len(wanted)),
        [part for pair in wanted.items() for part in pair],
    )
