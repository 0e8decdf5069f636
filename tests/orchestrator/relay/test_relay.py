"""The relay between a real database and a real nats-server: everything, once, in order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import psycopg
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from orchestrator_stub.relay.accounts import OUT
from orchestrator_stub.relay.embedded import EmbeddedNats
from orchestrator_stub.relay.outbox import BUCKETS, Outbox
from orchestrator_stub.relay.publisher import Event, Lanes, Refused
from orchestrator_stub.relay.service import Relay, RelayMetrics
from tests.database.db import Project, acting_as, connect, make_project, upsert
from tests.orchestrator.relay.nats_world import Heard, client, settled, stream_of, stream_owner, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

Db = psycopg.Connection[Any]


@pytest.fixture(scope="module")
def db(module_database: str) -> Any:
    with connect(module_database) as connection:
        connection.execute("update preview.settings set transport = 'nats', writes_per_minute = 1000000")
        yield connection


@pytest_asyncio.fixture(loop_scope="module")
async def heard(server: EmbeddedNats) -> AsyncIterator[Heard]:
    """What everybody hears together, over a subscription to all projects."""
    found = Heard()
    async with client(server.url, stream_owner(server)) as listener:
        await listener.subscribe(f"{OUT}*", cb=found.take)
        await settled(listener)
        yield found


def save(db: Db, project: Project, times: int) -> list[str]:
    """Save so often; the revisions, as a machine is told them."""
    with acting_as(db, "authenticated", sub=project.owner):
        return [str(upsert(db, project.id, f"f{n % 7}", uuid4().hex)["revision"]) for n in range(times)]


class Running:
    """One relay that runs, and its numbers."""

    def __init__(self, dsn: str, server: EmbeddedNats) -> None:
        self.registry = CollectorRegistry()
        self.stream = stream_of(server)
        self.relay = Relay(dsn, self.stream, RelayMetrics(self.registry))

    def number(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"preview_orchestrator_{name}", labels) or 0.0


@asynccontextmanager
async def relaying(dsn: str, server: EmbeddedNats) -> AsyncIterator[Running]:
    running = Running(dsn, server)
    task = asyncio.create_task(running.relay.run())
    try:
        yield running
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def empty(db: Db) -> bool:
    return db.execute("select from preview.outbox").rowcount == 0


async def test_every_save_is_heard_once_and_in_order(
    db: Db, module_database: str, server: EmbeddedNats, heard: Heard
) -> None:
    projects = [make_project(db) for _ in range(5)]
    waiting = {str(p.id): save(db, p, 20) for p in projects}  # before there is a relay
    async with relaying(module_database, server) as relay:
        for project in projects:
            waiting[str(project.id)] += await asyncio.to_thread(save, db, project, 20)
        await until(lambda: empty(db), "the outbox to be empty")
        await until(lambda: sum(map(len, heard.by_project.values())) >= 200, "all events")
        assert heard.by_project == waiting
        assert relay.number("relay_published_total", outcome="new") == 200
        assert relay.number("relay_published_total", outcome="retry") == 0
        assert relay.number("relay_buckets") == BUCKETS


async def test_a_lost_session_with_the_database_doubles_nothing(
    db: Db, module_database: str, server: EmbeddedNats, heard: Heard
) -> None:
    project = make_project(db)
    wanted: list[str] = []
    async with relaying(module_database, server):
        for _ in range(3):
            wanted += await asyncio.to_thread(save, db, project, 30)
            db.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name ~ 'relay'"
            )
        await until(lambda: empty(db), "the outbox to be empty")
        await until(lambda: len(heard.by_project[str(project.id)]) >= 90, "all events")
    assert heard.by_project[str(project.id)] == wanted


async def test_a_server_that_is_killed_loses_doubles_and_reorders_nothing(
    db: Db, module_database: str, tmp_path: Any
) -> None:
    own = EmbeddedNats(tmp_path / "server")
    await own.start()
    project = make_project(db)
    try:
        async with relaying(module_database, own) as relay:
            wanted = await asyncio.to_thread(save, db, project, 6)
            await own.kill()
            wanted += await asyncio.to_thread(save, db, project, 6)
            await until(lambda: relay.number("relay_published_total", outcome="retry") > 0, "a retry")
            await own.start(keep=True)
            await until(lambda: empty(db), "the outbox to be empty")
        async with client(own.url, stream_owner(own)) as owner:
            stored = await owner.jetstream().pull_subscribe("pv.in.*", stream="PREVIEW")
            kept = [m.headers["Nats-Msg-Id"].rpartition(":")[2] for m in await stored.fetch(12, timeout=30)]
    finally:
        await own.stop()
    assert kept == wanted


async def test_two_relays_share_the_buckets_and_one_inherits_them(
    db: Db, module_database: str, server: EmbeddedNats, heard: Heard
) -> None:
    projects = [make_project(db) for _ in range(8)]
    wanted: dict[str, list[str]] = {}

    def save_all() -> None:
        for project in projects:
            wanted.setdefault(str(project.id), []).extend(save(db, project, 5))

    async with relaying(module_database, server) as first:
        await until(lambda: first.number("relay_buckets") == BUCKETS, "all buckets")
        async with relaying(module_database, server) as second:
            saving = asyncio.create_task(asyncio.to_thread(save_all))
            await until(lambda: second.number("relay_buckets") == BUCKETS / 2, "half of them")
            await until(lambda: first.number("relay_buckets") == BUCKETS / 2, "the other half")
            await saving
            await asyncio.to_thread(save_all)
        await asyncio.to_thread(save_all)
        await until(lambda: first.number("relay_buckets") == BUCKETS, "all buckets again")
        await until(lambda: empty(db), "the outbox to be empty")
        await until(lambda: sum(map(len, heard.by_project.values())) >= 120, "all events")
    assert heard.by_project == wanted


async def test_with_realtime_alone_the_relay_stands_by_and_empties_what_is_left(
    db: Db, module_database: str, server: EmbeddedNats, heard: Heard
) -> None:
    project = make_project(db)
    wanted = save(db, project, 3)
    db.execute("update preview.settings set transport = 'realtime'")
    try:
        async with relaying(module_database, server):
            await until(lambda: len(heard.by_project[str(project.id)]) == 3, "what was left")
            await until(lambda: empty(db), "the outbox to be empty")
            assert save(db, project, 1)
            assert empty(db)
    finally:
        db.execute("update preview.settings set transport = 'nats'")
    assert heard.by_project[str(project.id)] == wanted


async def test_what_is_on_its_way_is_bounded_in_rows_and_bytes(db: Db, module_database: str) -> None:
    row = "insert into preview.outbox (project_id, event, message_id, payload) values (%s, '', '', repeat('x', %s))"
    project = uuid4()
    outbox = await Outbox.open(module_database)
    try:
        await outbox.balance()
        for _ in range(40):
            db.execute(row, [project, 2**20])
        first = await outbox.read()
        assert len(first) == 32, "bytes"
        assert await outbox.read() == []
        outbox.done(first[0])
        await outbox.delete_done()
        second = await outbox.read()
        assert [event.id for event in second] == [first[-1].id + 1], (
            "the next, and one more byte than there was room"
        )
        db.execute("delete from preview.outbox")
        for event in [*first[1:], *second]:
            outbox.done(event)
        await outbox.delete_done()
        db.execute(
            "insert into preview.outbox (project_id, event, message_id, payload)"
            " select gen_random_uuid(), '', '', 'x' from generate_series(1, 1100)"
        )
        assert len(await outbox.read()) == 1000, "rows"
    finally:
        await outbox.close()
        db.execute("delete from preview.outbox")


class Stubborn:
    """A stream that fails as told, by message."""

    def __init__(self, fail: dict[int, list[Exception]]) -> None:
        self.fail = fail
        self.tries: list[int] = []

    async def publish(self, event: Event) -> bool:
        self.tries.append(event.id)
        await asyncio.sleep(0)
        if faults := self.fail.get(event.id):
            raise faults.pop(0)
        return True

    async def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize(
    ("fault", "counted"),
    [(OSError("away"), "retry"), (Refused("too large"), "dropped")],
    ids=["away", "refused"],
)
async def test_what_cannot_be_published_is_tried_in_place_or_dropped(fault: Exception, counted: str) -> None:
    """Never overtaken: what is behind it waits, other projects do not."""
    stream, done, counts = Stubborn({1: [fault]}), [], []
    lanes = Lanes(stream, may_publish=lambda: True, done=lambda e: done.append(e.id), count=counts.append)
    for event in (Event(1, 0, "a", "", "", ""), Event(2, 0, "a", "", "", ""), Event(3, 0, "b", "", "", "")):
        lanes.put(event)
    await until(lambda: len(done) == 3, "all of them")
    assert stream.tries == ([1, 3, 1, 2] if counted == "retry" else [1, 3, 2])
    assert sorted(counts) == sorted([counted, *(["new"] * (3 if counted == "retry" else 2))])


async def test_a_relay_that_is_not_sure_of_its_buckets_publishes_nothing() -> None:
    stream, done, sure = Stubborn({}), [], [False]
    lanes = Lanes(stream, may_publish=lambda: sure[0], done=lambda e: done.append(e.id), count=lambda _: None)
    lanes.put(Event(1, 0, "a", "", "", ""))
    await asyncio.sleep(0.05)
    assert stream.tries == []
    sure[0] = True
    await until(lambda: done == [1], "the event")
    await lanes.close()
