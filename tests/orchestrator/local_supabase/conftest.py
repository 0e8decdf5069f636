"""The stand-in served for real, on a free port: one server a module, wiped between tests.

Modules that use it run on one loop: `pytestmark = pytest.mark.asyncio(loop_scope="module")`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator_stub.local_supabase.realtime.faults import Faults
from tests.fakes.serving import Local, serve_local


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
