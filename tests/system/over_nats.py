"""A nats-server and a relay beside a plane, whose saves then reach its machines over NATS alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

import psycopg
from prometheus_client import CollectorRegistry

from orchestrator_stub.relay.embedded import EmbeddedNats
from orchestrator_stub.relay.publisher import NatsStream
from orchestrator_stub.relay.service import Relay, RelayMetrics
from tests.system.plane import Agent


@asynccontextmanager
async def over_nats(database: str, directory: Path, machine: Agent) -> AsyncIterator[dict[str, str]]:
    """A server and a relay, and no event by the other way; what a machine is told of it."""
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("update preview.settings set transport = 'nats'")
    server = EmbeddedNats(directory / "nats")
    await server.start()
    stream = NatsStream(server.url, server.operator.keys)
    relaying = asyncio.create_task(Relay(database, stream, RelayMetrics(CollectorRegistry())).run())
    project, session = (UUID(machine.environ[name]) for name in ("PROJECT_ID", "SESSION_ID"))
    token = server.operator.keys.machine_token(project, session, time.time() + 600)
    try:
        yield {"REALTIME_URL": server.url, "NATS_JWT": token}
    finally:
        relaying.cancel()
        await asyncio.gather(relaying, return_exceptions=True)
        await server.stop()
