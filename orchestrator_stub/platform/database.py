"""Connects to PostgreSQL, and asks what several rooms ask: at which revision a project stands.

A database that does not answer, or has no connection left for us, is a `psycopg.OperationalError` everywhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import psycopg
import structlog
from psycopg.conninfo import make_conninfo
from psycopg.pq import PGconn, Ping
from psycopg_pool import AsyncConnectionPool

log = structlog.get_logger("database")

Pool = AsyncConnectionPool[psycopg.AsyncConnection[Any]]

POOL_SIZE: Final = 8
"""Connections of one orchestrator. Every query is a few milliseconds; the database's limit is shared by all."""

POOL_TIMEOUT: Final = 10.0
"""Seconds to wait for a connection of the pool: a database that takes longer is away."""


CONNECT_TIMEOUT: Final = 5
"""Seconds for one attempt to reach it."""

AGAIN_SECONDS: Final = 0.5
"""Between two attempts."""


async def reached(dsn: str, *, wait: float) -> None:
    """Return once the database takes a connection.

    One that is starting, recovering or stopping (SQLSTATE 57P03), and one where nothing answers, is tried again, and
    the log says so. What the database itself refuses is final: a password, a name, one connection too many.

    Args:
        dsn: where it is.
        wait: seconds to go on trying; 0: one attempt.

    Raises:
        psycopg.OperationalError: it refuses us, or did not answer in time.
    """
    deadline, said, refused = time.monotonic() + wait, "", False
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(dsn, connect_timeout=CONNECT_TIMEOUT):
                return
        except psycopg.OperationalError as error:
            # The error of a connection that never was has no SQLSTATE, but libpq's ping knows it. The database may have
            # come up between the two: a refusal is believed when it is repeated.
            answers = await asyncio.to_thread(_answers, dsn)
            if (answers and refused) or time.monotonic() >= deadline:
                raise
            refused = answers
            reason = " ".join(str(error).split())
            if not answers and reason != said:
                said = reason
                log.warning("database.away", reason=reason, wait=wait)
        await asyncio.sleep(AGAIN_SECONDS)


def _answers(dsn: str) -> bool:
    """Whether a database is there and takes connections, ours or not."""
    state = PGconn.ping(make_conninfo(dsn, connect_timeout=CONNECT_TIMEOUT).encode())
    return state not in (Ping.REJECT, Ping.NO_RESPONSE)


def pool_of(dsn: str, *, size: int = POOL_SIZE, timeout: float = POOL_TIMEOUT) -> Pool:
    """A pool to be entered with `async with`.

    Its connections are in autocommit: every statement of ours stands alone or says `transaction()`, and needs no BEGIN
    and COMMIT round it.
    """
    kwargs = {"autocommit": True}
    return AsyncConnectionPool(dsn, min_size=1, max_size=size, open=False, timeout=timeout, kwargs=kwargs)


async def fetch_one(
    pool: Pool, query: str, values: Sequence[object] | Mapping[str, object]
) -> tuple[Any, ...] | None:
    """The first row of one statement."""
    async with pool.connection() as connection:
        return await (await connection.execute(query.encode(), values)).fetchone()


@dataclass(frozen=True, slots=True)
class Head:
    """Where a project's history stands."""

    epoch: str
    revision: int


async def head_of(pool: Pool, project_id: UUID) -> Head | None:
    """Where the project stands now; None when there is no such project."""
    query = "select epoch::text, revision from public.project_heads where project_id = %s"
    row = await fetch_one(pool, query, (project_id,))
    return Head(*row) if row is not None else None
