"""Connects to PostgreSQL, and asks what several rooms ask: at which revision a project stands.

A database that does not answer, or has no connection left for us, is a `psycopg.OperationalError` everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg_pool import AsyncConnectionPool

Pool = AsyncConnectionPool[psycopg.AsyncConnection[Any]]

POOL_SIZE: Final = 8
"""Connections of one orchestrator. Every query is a few milliseconds; the database's limit is shared by all."""

POOL_TIMEOUT: Final = 10.0
"""Seconds to wait for a connection of the pool: a database that takes longer is away."""


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
