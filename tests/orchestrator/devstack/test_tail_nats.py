"""`tail` beside a dev whose agent hears NATS."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import uuid4

from orchestrator_stub.devstack.tail import Channel, _listen_nats
from orchestrator_stub.relay.embedded import EmbeddedNats
from orchestrator_stub.relay.publisher import Event
from tests.orchestrator.relay.nats_world import stream_of, until


async def test_it_prints_what_is_published_and_says_why_it_ended(tmp_path: Path) -> None:
    server = EmbeddedNats(tmp_path / "nats")
    await server.start()
    keys = server.operator.write(tmp_path / "keys")[0]
    project, heard, stream = uuid4(), list[Any](), stream_of(server)
    listening = asyncio.create_task(_listen_nats(Channel("", "", project, server.url, keys), heard.append))
    try:
        number = 0
        while not heard:  # it is subscribed at some moment
            number += 1
            await stream.publish(
                Event(1, 0, str(project), "file:update", f"{project}:e:{number}", '{"revision": 1}')
            )
            await asyncio.sleep(0.05)
        assert heard[0] == {"event": "file:update", "payload": {"revision": 1}}
        await server.kill()
        await until(listening.done, "the end")
        assert listening.result() == "the connection is lost"
    finally:
        listening.cancel()
        await stream.close()
        await server.stop()
