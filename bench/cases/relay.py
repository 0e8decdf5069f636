"""Measures the relay: events a second, how much later NATS brings a save than Realtime, and the agent's memory.

The first is of processor time: a backlog of 1 KB events of 500 projects, emptied by one relay into one nats-server; a
second is one of the relay's process, not of the server's or the database's. The second is of the clock: with the
transport `both` each save is heard over both, and what counts is the difference of the medians from the RPC's return.
The third is of two processes with the whole agent imported, one linked to each.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import median
from uuid import uuid4

import structlog
from prometheus_client import CollectorRegistry

from agent.link.loop import LinkLoop
from agent.link.nats import nats_link
from agent.link.realtime import realtime_link
from agent.link.source import Received, Resync
from agent.link.types import LinkState
from agent.tokens import Tokens
from bench.harness.results import Row
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.platform.migrations import bootstrap, migrate
from orchestrator_stub.relay.embedded import EmbeddedNats
from orchestrator_stub.relay.publisher import NatsStream
from orchestrator_stub.relay.service import Relay, RelayMetrics
from tests.database.db import Project, acting_as, connect, make_project, upsert
from tests.fakes.serving import Local, serve_local

BACKLOG = """
insert into preview.outbox (project_id, event, message_id, payload)
select p.id, 'file:update', p.id || ':e:' || n,
  jsonb_build_object('revision', n, 'epoch', 'e', 'content', repeat('x', 1000))
from (select gen_random_uuid() as id from generate_series(1, 500)) p, generate_series(1, %s) n
"""


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for tells nobody
        await asyncio.sleep(0.1)


@asynccontextmanager
async def relaying(dsn: str, server: EmbeddedNats) -> AsyncIterator[None]:
    stream = NatsStream(server.url, server.operator.keys)
    relay = Relay(dsn, stream, RelayMetrics(CollectorRegistry()))
    task = asyncio.create_task(relay.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def drained(dsn: str, server: EmbeddedNats, each: int) -> float:
    """Messages for each second of this process, which is the relay's alone meanwhile."""
    with connect(dsn) as db:
        db.execute("update preview.settings set transport = 'nats'")
        db.execute(BACKLOG, [each])
        began = time.process_time()
        async with relaying(dsn, server):
            await until(lambda: db.execute("select from preview.outbox limit 1").rowcount == 0)
            return 500 * each / (time.process_time() - began)


async def consume(link: LinkLoop, heard: dict[int, float]) -> None:
    while True:
        signal = await link.receive()
        if isinstance(signal, Resync):
            link.caught_up()
        elif isinstance(signal, Received):
            heard[int(str(signal.payload["revision"]))] = time.perf_counter()


def save(dsn: str, project: Project, number: int) -> dict[int, float]:
    """So many saves; when each returned."""
    returned = {}
    with connect(dsn) as db:
        for _ in range(number):
            with acting_as(db, "authenticated", sub=project.owner):
                revision = upsert(db, project.id, "src/App.tsx", uuid4().hex * 30)["revision"]
            returned[int(revision)] = time.perf_counter()
            time.sleep(0.02)
    return returned


async def later(dsn: str, server: EmbeddedNats, local: Local, number: int) -> tuple[float, float]:
    """The medians from a save's return to our link's queue in milliseconds: over NATS, over Realtime."""
    with connect(dsn) as db:
        db.execute("update preview.settings set transport = 'both', writes_per_minute = 1000000")
        project = make_project(db)
    token = local.token(project_id=str(project.id), session_id=str(uuid4()), iat=int(time.time()))
    jwt = server.operator.keys.machine_token(project.id, uuid4(), time.time() + 600)
    tokens = Tokens(token, nats_jwt=jwt)
    topic = f"realtime:project:{project.id}"
    links = [
        nats_link(server.url, str(project.id), tokens),
        realtime_link(f"{local.url}/realtime/v1", local.keys.anon_key, topic, tokens),
    ]
    heard: list[dict[int, float]] = [{}, {}]
    tasks = [asyncio.create_task(link.run()) for link in links]
    tasks += [asyncio.create_task(consume(link, into)) for link, into in zip(links, heard, strict=True)]
    try:
        async with relaying(dsn, server):
            await until(lambda: all(link.state is LinkState.LIVE for link in links))
            returned = await asyncio.to_thread(save, dsn, project, number)
            await until(lambda: all(len(each) == number for each in heard))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    nats, realtime = (median(1000 * (each[n] - returned[n]) for n in returned) for each in heard)
    return nats, realtime


def memory_of(*words: str) -> float:
    command = [sys.executable, "-m", "bench.harness.linked", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return float(done.stdout.split()[-1])


async def held(server: EmbeddedNats, local: Local) -> tuple[float, float]:
    """The agent's memory in MB, linked to NATS and to Realtime."""
    project, session = uuid4(), uuid4()
    nats = server.operator.keys.machine_token(project, session, time.time() + 600)
    realtime = local.token(project_id=str(project), session_id=str(session), iat=int(time.time()))
    url = f"ws://127.0.0.1:{local.port}/realtime/v1"
    return (
        await asyncio.to_thread(memory_of, "nats", server.url, "-", nats, str(project)),
        await asyncio.to_thread(memory_of, "realtime", url, local.keys.anon_key, realtime, str(project)),
    )


async def measure(quick: bool) -> Sequence[Row]:
    with tempfile.TemporaryDirectory(prefix="preview-bench-relay-") as directory:
        postgres = EmbeddedPostgres(Path(directory) / "postgres")
        server = EmbeddedNats(Path(directory) / "nats")
        dsn = await postgres.start()
        await server.start()
        try:
            await bootstrap(dsn)
            await migrate(dsn)
            speeds = [await drained(dsn, server, 8 if quick else 40) for _ in range(2 if quick else 5)]
            async with serve_local(dsn, Path(directory) / "storage") as local:
                nats, realtime = await later(dsn, server, local, 100 if quick else 500)
                with_nats, with_realtime = await held(server, local)
        finally:
            await server.stop()
            await postgres.stop()
    return [
        Row("relay, 1 KB events", median(speeds), "events per core-second", sense="speed", at_least=6000,
            samples=len(speeds)),
        Row("a save over NATS, later than Realtime", nats - realtime, "ms", at_most=5,
            note=f"{nats:.1f} ms after the RPC, {realtime:.1f} over Realtime"),
        Row("the agent's memory, more with NATS", with_nats - with_realtime, "MB", sense="memory", at_most=4,
            note=f"{with_nats:.1f} MB, {with_realtime:.1f} with Realtime"),
    ]  # fmt: skip


def run(quick: bool) -> Sequence[Row]:
    """All three, in one database and one server."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    return asyncio.run(measure(quick))
