from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from orchestrator_stub.relay.embedded import EmbeddedNats


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[EmbeddedNats]:
    """A real server, for one module."""
    embedded = EmbeddedNats(tmp_path_factory.mktemp("nats") / "server")
    await embedded.start()
    try:
        yield embedded
    finally:
        await embedded.stop()
