"""Bounds what is stored at one session's request: a session's token could fill the bucket, a delta for each revision.

Each session has an allowance of bytes that comes back at a steady rate, a whole one an hour. It is kept in the
session's row, so it holds however many orchestrators there are. Whoever has used it up is told when there is room
again; archives that are stored already are signed all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Protocol
from uuid import UUID
from weakref import WeakValueDictionary

from orchestrator_stub.platform.database import Pool, fetch_one

PERIOD: Final = 3600.0
"""Seconds in which a whole allowance comes back."""

USED = """
select greatest(0, stored_bytes - extract(epoch from now() - stored_at) * %(rate)s)::float8
from preview.sessions where id = %(session)s
"""

CHARGE = """
update preview.sessions set stored_at = now(),
  stored_bytes = greatest(0, stored_bytes - extract(epoch from now() - stored_at) * %(rate)s) + %(bytes)s
where id = %(session)s
"""


class AllowanceSpent(Exception):
    """The session has had `limit` bytes stored; there is room again in `retry_after` seconds."""

    def __init__(self, limit: int, retry_after: float) -> None:
        self.limit = limit
        self.retry_after = retry_after
        super().__init__(f"{limit} bytes of archives an hour are stored for one session")


class Stored(Protocol):
    """An archive that was stored: a `StoredSnapshot`."""

    @property
    def bytes(self) -> int: ...


class Allowance:
    """The allowance of every session: `limit` bytes, above which no further archive is begun."""

    def __init__(self, pool: Pool, limit: int) -> None:
        self._pool = pool
        self._limit = limit
        self._locks: WeakValueDictionary[UUID, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def spending(self, session_id: UUID) -> AsyncIterator[list[Stored]]:
        """Store archives for a session: append each to the list that this yields. Raises `AllowanceSpent`.

        A session's archives are made one at a time here, so that the one before has been counted: what is stored passes
        the limit by one archive for each orchestrator.
        """
        lock = self._locks.setdefault(session_id, asyncio.Lock())
        async with lock:
            rate = self._limit / PERIOD
            row = await fetch_one(self._pool, USED, {"rate": rate, "session": session_id})
            if row is not None and row[0] >= self._limit:
                raise AllowanceSpent(self._limit, (row[0] - self._limit) / rate + 1)
            stored: list[Stored] = []
            try:
                yield stored
            finally:
                for each in stored:
                    values = {"rate": rate, "session": session_id, "bytes": each.bytes}
                    async with self._pool.connection() as connection:
                        await connection.execute(CHARGE, values)
