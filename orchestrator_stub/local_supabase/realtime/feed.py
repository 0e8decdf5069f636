"""Follows what the database broadcasts, in the order of its commits.

Supabase Realtime reads `realtime.messages` from a replication slot. Here a trigger on that table notifies the row's
id on the channel `realtime_messages`; PostgreSQL delivers notifications only after commit, and in commit order
(NOTIFY's documentation), so the order and the at-most-once nature are the same.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from orchestrator_stub.local_supabase.access import Pool
from orchestrator_stub.local_supabase.realtime.frames import Broadcast

CHANNEL = "realtime_messages"
MOST_REPLAYED = 25
"""As the real server, whatever is asked."""

log = logging.getLogger("preview_orchestrator.realtime")

ROWS = """
select id::text, topic, event, payload::text, private, binary_payload
from realtime.messages where id = any(%s::uuid[]) and extension = 'broadcast'
order by array_position(%s::uuid[], id)
"""

AT_ONCE = 64
"""Rows read in one query: a broadcast may have 256 KB, and a burst thousands of them."""

FORGET = "delete from realtime.messages where inserted_at < (now() - interval '72 hours') at time zone 'utc'"
"""The hosted service drops partitions of that age; here it is done at each start."""


async def follow(
    dsn: str,
    publish: Callable[[Broadcast, bool], Awaitable[None]],
    listening: Callable[[bool], None],
) -> None:
    """Hand every committed broadcast to `publish(message, private)`, for ever.

    `listening` hears whether the database is being listened to. When the connection is lost, what commits until
    the next one is lost with it, as with the real server's slot; subscribers find out by their revisions.
    """
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(psycopg.Error),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        before_sleep=_say_lost,
    ):
        with attempt:
            try:
                await _follow_one_connection(dsn, publish, listening)
            finally:
                listening(False)


def _say_lost(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("realtime.database_lost", extra={"reason": " ".join(str(error).split())})


async def _follow_one_connection(
    dsn: str,
    publish: Callable[[Broadcast, bool], Awaitable[None]],
    listening: Callable[[bool], None],
) -> None:
    async with (
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection,
        # Of its own and without transactions: one round trip between a commit and its subscribers.
        await psycopg.AsyncConnection.connect(dsn, autocommit=True) as reader,
    ):
        await reader.execute(FORGET)
        await connection.execute(f"listen {CHANNEL}")
        listening(True)
        while True:
            # Everything that arrived in one packet is one query, not one each.
            ids = [note.payload async for note in connection.notifies(stop_after=1)]
            if not ids:
                raise psycopg.OperationalError("the listening connection ended")
            for start in range(0, len(ids), AT_ONCE):
                some = ids[start : start + AT_ONCE]
                for row in await (await reader.execute(ROWS, [some, some])).fetchall():
                    message, private = _read(row)
                    await publish(message, private)
                    await asyncio.sleep(0)


def _read(row: tuple[Any, ...]) -> tuple[Broadcast, bool]:
    id_, topic, event, payload, private, binary = row
    meta = {"id": id_}
    if binary is not None:
        return Broadcast(topic, event or "", bytes(binary), is_json=False, meta=meta), bool(private)
    return Broadcast(topic, event or "", (payload or "null").encode(), meta=meta), bool(private)


async def replay(pool: Pool, topic: str, since_ms: int, limit: int) -> list[Broadcast]:
    """The newest private broadcasts of `topic` since a moment (Unix milliseconds), oldest first."""
    async with pool.connection() as connection:
        cursor = await connection.execute(
            "select id::text, topic, event, payload::text, private, binary_payload from realtime.messages"
            " where topic = %s and private and extension = 'broadcast' and event is not null"
            " and inserted_at >= (to_timestamp(%s / 1000.0) at time zone 'utc')"
            " order by inserted_at desc limit %s",
            [topic, since_ms, max(1, min(limit, MOST_REPLAYED))],
        )
        rows = await cursor.fetchall()
    messages = [_read(row)[0] for row in reversed(rows)]
    for message in messages:
        message.meta = {**(message.meta or {}), "replayed": True}
        message.as_text = message.is_json
    return messages
