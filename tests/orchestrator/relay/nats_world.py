"""A real nats-server with our accounts, clients with any token, and projects that are saved."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from uuid import uuid4

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from orchestrator_stub.relay.accounts import IN, OUT
from orchestrator_stub.relay.embedded import EmbeddedNats
from orchestrator_stub.relay.publisher import NatsStream


@asynccontextmanager
async def client(url: str, token: str | None, **options: Any) -> AsyncIterator[Client]:
    """A connection with this token that does not come back; its errors are in `client.said`."""
    said: list[str] = []

    async def hear(error: Exception) -> None:
        said.append(str(error))

    if token is not None:
        options |= {"user_jwt_cb": lambda: bytearray(token, "ascii"), "signature_cb": lambda _: b""}
    connected = await nats.connect(
        url, allow_reconnect=False, max_reconnect_attempts=1, error_cb=hear, connect_timeout=30, **options
    )
    connected.said = said  # type: ignore[attr-defined]
    try:
        yield connected
    finally:
        with suppress(Exception):
            await connected.close()


async def settled(connected: Client) -> None:
    """Everything said so far has reached the server, and what it said to that has been read.

    Twice, because nats-py's `flush` writes its PING past what still waits to be written.
    """
    await connected.flush(5)
    await connected.flush(5)


def machine(server: EmbeddedNats, project: Any, *, seconds: float = 600.0) -> str:
    return server.operator.keys.machine_token(project, uuid4(), time.time() + seconds)


def stream_of(server: EmbeddedNats) -> NatsStream:
    return NatsStream(server.url, server.operator.keys)


def stream_owner(server: EmbeddedNats) -> str:
    """Somebody of PREVIEW who may do anything there: what a test looks with."""
    return server.operator.keys.preview.user(
        "all", {"pub": {"allow": [">"]}, "sub": {"allow": [">"]}}, time.time() + 600
    )


class Heard:
    """What machines hear, by project, over subscriptions to all subjects."""

    def __init__(self) -> None:
        self.by_project: dict[str, list[str]] = defaultdict(list)

    async def take(self, message: Msg) -> None:
        assert message.headers is not None
        project = message.subject.removeprefix(OUT)
        assert message.headers["Nats-Subject"] == IN + project
        self.by_project[project].append(message.headers["Nats-Msg-Id"].rpartition(":")[2])


async def until(condition: Callable[[], bool], what: str, within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"waited {within} s for {what}"
        await asyncio.sleep(0.01)
