from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.conftest import fresh
from tests.orchestrator.door.world import World, door_world


@pytest.fixture(scope="module")
def dsn(postgres_dsn: str, template_database: str) -> Iterator[str]:
    """One database for the tests of a module: each has a project of its own."""
    with fresh(postgres_dsn, template_database) as dsn:
        yield dsn


@pytest.fixture
async def world(dsn: str) -> AsyncIterator[World]:
    async with door_world(dsn) as running:
        yield running
