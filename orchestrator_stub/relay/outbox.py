"""Reads the outbox: which buckets this relay owns, what waits, what may be sent.

Projects are in sixteen buckets. A relay owns a bucket while its session holds the advisory lock of it, so each project
has one relay at most, a relay that dies is followed within half a second, and there may be any number of them. The
locks need a session: a pooler in transaction mode loses them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, Final, Self

import psycopg

from orchestrator_stub.relay.publisher import Event

BUCKETS: Final = 16

_CLASS: Final = 0x50565242
"""Of our advisory locks; the second number is the bucket, or `_PRESENT`."""

_PRESENT: Final = BUCKETS
"""Every relay holds this one together with the others, to be counted."""

SILENCE_SECONDS: Final = 10
"""After this long without a word from a relay the database ends its session, and another takes its buckets: a relay
that is stopped, and not dead, keeps its connection else."""

SURE_SECONDS: Final = 5.0
"""Since the last answer of the database a relay takes its buckets for its own. Below `SILENCE_SECONDS`."""

_NOTICED: Final[dict[str, Any]] = {
    "keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3, "tcp_user_timeout": 1000 * SILENCE_SECONDS
}  # fmt: skip
"""A database that is gone without a word is given up as soon as it would give us up."""

AT_ONCE: Final = 1000
"""Rows on their way to NATS."""

AT_ONCE_BYTES: Final = 32 * 2**20
"""The same in bytes, give or take one row."""

_COUNT: Final = """
select count(*) from pg_locks where locktype = 'advisory' and granted and classid = %s and objid = %s and objsubid = 2
  and database = (select oid from pg_database where datname = current_database())
"""

_READ: Final = """
select id, bucket, project_id::text, event, message_id, payload from (
  select o.*, sum(octet_length(o.payload)) over (order by o.id) - octet_length(o.payload) as before from (
    select * from preview.outbox where bucket = any(%s) and id <> all(%s) order by id limit %s) o
) each where before < %s order by id
"""

_WAITING: Final = """
select count(*), coalesce(extract(epoch from clock_timestamp() - min(created_at)), 0)::float8 from preview.outbox
"""


class Outbox:
    """One relay's session with the database. Made by `open`; every method raises `psycopg.Error` when it is lost."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self._answered_at = time.monotonic()
        self._away: dict[int, Event] = {}
        """Rows that were given out and not deleted yet."""
        self._away_bytes = 0
        self._done: list[int] = []
        self._share = BUCKETS
        self.owned: set[int] = set()
        """Buckets whose locks this session holds."""

    @classmethod
    async def open(cls, dsn: str) -> Self:
        """Connect, and be counted as a relay. Raises `psycopg.Error`."""
        connection = await psycopg.AsyncConnection.connect(
            dsn, autocommit=True, connect_timeout=10, application_name="preview-sync relay", **_NOTICED
        )
        try:
            await connection.execute(f"set idle_session_timeout = '{SILENCE_SECONDS}s'".encode())
            await connection.execute("select pg_advisory_lock_shared(%s, %s)", (_CLASS, _PRESENT))
        except BaseException:
            await connection.close()
            raise
        return cls(connection)

    async def close(self) -> None:
        """Give all buckets back."""
        await self._connection.close()

    @property
    def certain(self) -> bool:
        """Whether the buckets are ours: the database answered a moment ago, so it has not given them to another."""
        return time.monotonic() - self._answered_at < SURE_SECONDS

    @property
    def busy(self) -> bool:
        """Whether rows are on their way."""
        return bool(self._away)

    async def transport(self) -> str:
        """Which way events take, as the setting says."""
        rows = await self._rows("select transport from preview.settings", ())
        return str(rows[0][0]) if rows else "realtime"

    async def waiting(self) -> tuple[int, float]:
        """How many rows wait, of all buckets, and since when the oldest does, in seconds."""
        count, age = (await self._rows(_WAITING, ()))[0]
        return int(count), float(age)

    async def balance(self) -> None:
        """Take buckets that nobody has, up to a fair share, and give back those above it once they are empty."""
        relays = (await self._rows(_COUNT, (_CLASS, _PRESENT)))[0][0]
        self._share = -(-BUCKETS // max(1, relays))
        for bucket in self._leaving():
            if all(event.bucket != bucket for event in self._away.values()):
                await self._rows("select pg_advisory_unlock(%s, %s)", (_CLASS, bucket))
                self.owned.discard(bucket)
        for bucket in range(BUCKETS):
            if len(self.owned) >= self._share:
                break
            if bucket not in self.owned:
                locked = await self._rows("select pg_try_advisory_lock(%s, %s)", (_CLASS, bucket))
                if locked[0][0]:
                    self.owned.add(bucket)

    def _leaving(self) -> list[int]:
        return sorted(self.owned)[self._share :]

    async def read(self) -> list[Event]:
        """Give out rows that were not given out before, each project's in order."""
        room, room_bytes = AT_ONCE - len(self._away), AT_ONCE_BYTES - self._away_bytes
        buckets = sorted(self.owned.difference(self._leaving()))
        if room <= 0 or room_bytes <= 0 or not buckets:
            return []
        rows = await self._rows(_READ, (buckets, list(self._away), room, room_bytes))
        events = [Event(*row) for row in rows]
        self._away.update((event.id, event) for event in events)
        self._away_bytes += sum(len(event.payload) for event in events)
        return events

    def done(self, event: Event) -> None:
        """Note that a row may be deleted."""
        self._done.append(event.id)

    async def delete_done(self) -> None:
        """Delete the rows that were noted."""
        if self._done:
            ids, self._done = self._done, []
            await self._connection.execute("delete from preview.outbox where id = any(%s)", (ids,))
            self._answered_at = time.monotonic()
            for each in ids:
                self._away_bytes -= len(self._away.pop(each).payload)

    async def _rows(self, query: str, values: Iterable[object]) -> list[tuple[Any, ...]]:
        cursor = await self._connection.execute(query.encode(), tuple(values), prepare=True)
        rows = await cursor.fetchall()
        self._answered_at = time.monotonic()
        return rows
