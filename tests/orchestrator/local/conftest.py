"""The stand-in served for real, on a free port: one server a module, wiped between tests.

Modules that use it run on one loop: `pytestmark = pytest.mark.asyncio(loop_scope="module")`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
import pytest_asyncio
from psycopg import sql
from psycopg.conninfo import make_conninfo

from orchestrator_stub.local.faults import Faults
from tests.fakes.serving import Local, serve_local


@pytest.fixture(scope="module")
def module_database(postgres_dsn: str, template_database: str) -> Iterator[str]:
    """As `database`, for a whole module."""
    name = f"preview_{uuid4().hex[:12]}"
    with psycopg.connect(postgres_dsn, autocommit=True) as server:
        made = sql.SQL("create database {} template {}")
        server.execute(made.format(sql.Identifier(name), sql.Identifier(template_database)))
        yield make_conninfo(postgres_dsn, dbname=name)
        server.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Local]:
    storage: Path = tmp_path_factory.mktemp("served") / "storage"
    async with serve_local(module_database, storage) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def local(served: Local) -> AsyncIterator[Local]:
    """The whole stand-in, with its faults, empty, and with refused joins answered at once."""
    yield served
    served.stand_in.realtime.faults = Faults()
    await served.sql("truncate realtime.messages, storage.objects, auth.users cascade")
    await served.sql("delete from storage.buckets where not starts_with(id, 'project-')")
    for file in served.storage.iterdir():
        file.unlink()
