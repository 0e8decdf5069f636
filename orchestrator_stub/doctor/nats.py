"""Examines NATS: the stream as the relay makes it, and the connection that a machine would make."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Final
from uuid import UUID, uuid4

import psycopg
from nats.aio.client import Client
from nats.errors import Error as NatsError

from orchestrator_stub.config import Settings
from orchestrator_stub.doctor.findings import Report
from orchestrator_stub.process import CannotServe
from orchestrator_stub.relay.accounts import OUT, MachineNats, NatsKeys
from orchestrator_stub.relay.publisher import NatsStream
from orchestrator_stub.server.control_plane import machine_nats_of

SECONDS: Final = 8
"""For one answer of a server."""


async def examine_nats(settings: Settings, report: Report) -> None:
    """Examine all of it; nothing where it is not used."""
    try:
        machines = machine_nats_of(settings)
    except CannotServe as error:
        report.bad(str(error), "make the file with `preview-orchestrator nats-keys`, or mend NATS_KEYS_FILE")
        return
    if machines is None or settings.nats_url is None:
        report.ok("not used; machines hear Realtime")
        await _transport(settings, report, used=False)
        return
    await _stream(settings.nats_url, machines.keys, settings.nats_replicas, report)
    await _machine(machines, report)
    await _transport(settings, report, used=True)


async def _stream(url: str, keys: NatsKeys, replicas: int, report: Report) -> None:
    stream = NatsStream(url, keys, replicas=replicas)
    try:
        await stream.prepare()
    except OSError as error:
        report.bad(
            f"the relay cannot use the stream: {error}",
            "see NATS_URL and NATS_REPLICAS; the servers must include the accounts.conf of the same nats-keys",
        )
    else:
        report.ok(f"the stream is there, on {replicas} server{'s' if replicas > 1 else ''}")
    finally:
        await stream.close()


async def _machine(machines: MachineNats, report: Report) -> None:
    """Connect as a machine of no project would, and try to say something, which must be refused."""
    project: UUID = uuid4()
    token = machines.keys.machine_token(project, uuid4(), time.time() + 60)
    refusals: list[str] = []

    async def hear(error: Exception) -> None:
        refusals.append(str(error))

    client = Client()
    try:
        async with asyncio.timeout(SECONDS * 2):
            await client.connect(
                machines.url, user_jwt_cb=lambda: bytearray(token, "ascii"), signature_cb=lambda _: b"",
                allow_reconnect=False, max_reconnect_attempts=1, connect_timeout=SECONDS, error_cb=hear,
            )  # fmt: skip
            await client.subscribe(f"{OUT}{project}")
            await client.publish(f"{OUT}{project}", b"{}")
            for _ in range(2):  # its flush writes its PING past what waits
                await client.flush(SECONDS)
    except (NatsError, OSError, TimeoutError) as error:
        report.bad(
            f"a machine could not connect: {error or type(error).__name__}",
            "see NATS_AGENT_URL; from here the address may be another than from a machine",
        )
    else:
        if any("publish" in said for said in refusals):
            report.ok("a machine connects, hears its project and may say nothing")
        else:
            report.bad("a machine may publish", "the servers must run with the accounts.conf of nats-keys")
    finally:
        with suppress(NatsError, OSError):
            await client.close()
    if machines.url.startswith("nats:"):
        report.warn("machines connect without TLS", "take tls:// in NATS_AGENT_URL across any open network")


async def _transport(settings: Settings, report: Report, *, used: bool) -> None:
    try:
        async with await psycopg.AsyncConnection.connect(
            settings.database_url.get_secret_value(), connect_timeout=SECONDS
        ) as connection:
            row = await (await connection.execute("select transport from preview.settings")).fetchone()
    except psycopg.Error:
        return  # which the part of the database says
    transport = row[0] if row else "realtime"
    if settings.agent_transport == "nats" and transport == "realtime":
        report.bad(
            "machines hear NATS, and the database sends events to Realtime alone",
            "update preview.settings set transport = 'both'",
        )
    elif not used and transport != "realtime":
        report.bad(
            "the database keeps events for NATS, and there is no NATS_URL: nobody takes them",
            "set NATS_URL, or update preview.settings set transport = 'realtime'",
        )
    elif used:
        report.ok(f"the database sends events by: {transport}")
