"""The orchestrator's share in turns: what nobody resumes is reaped, and each turn that is over is counted once."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
from prometheus_client import CollectorRegistry

from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.snapshots.turns import AT_ONCE, Turns


class Database:
    """A project whose turns begin and end as they are told."""

    def __init__(self, dsn: str) -> None:
        self.db = psycopg.connect(dsn, autocommit=True)
        owner = uuid4()
        self.one("insert into auth.users (id) values (%s) returning id", owner)
        self.one("insert into public.user_profiles (id) values (%s) returning id", owner)
        self.project: UUID = self.one(
            "insert into public.projects (owner_id) values (%s) returning id", owner
        )
        self.db.execute("update preview.settings set max_open_turns = 1000, turns_per_minute = 1000")

    def one(self, query: str, *values: object) -> Any:
        row = self.db.execute(query.encode(), values).fetchone()
        assert row is not None
        return row[0]

    def begin(self) -> str:
        return str(self.one("select public.begin_turn(%s) ->> 'turn_id'", self.project))


@pytest.fixture
def world(database: str) -> Any:
    world = Database(database)
    yield world
    world.db.close()


class Orchestrator:
    def __init__(self, pool: Any) -> None:
        self.now = 1000.0
        self.registry = CollectorRegistry()
        self.turns = Turns(pool, registry=self.registry, clock=lambda: self.now)

    async def look(self) -> None:
        self.now += 60
        await self.turns.look_after()

    def value(self, name: str, **labels: str) -> float:
        value = self.registry.get_sample_value(f"preview_orchestrator_{name}", labels)
        assert value is not None, name
        return value


async def test_each_turn_is_counted_by_one_of_several(database: str, world: Database) -> None:
    turns = [world.begin() for _ in range(AT_ONCE + 20)]
    for turn in turns[:-10]:
        world.one("select public.end_turn(%s, %s)", world.project, turn)
    for turn in turns[-10:-5]:
        world.one("select public.abandon_turn(%s, %s)", world.project, turn)
    world.db.execute(
        "update preview.turns set kept_until = now() - interval '1 second' where id = any(%s::uuid[])",
        [turns[-5:-3]],
    )
    async with pool_of(database) as pool:
        both = [Orchestrator(pool), Orchestrator(pool)]
        for _ in range(2):
            await asyncio.gather(*(each.look() for each in both))
        await both[0].look()
        counted = {
            outcome: sum(each.value("turns_total", outcome=outcome) for each in both)
            for outcome in ("ended", "abandoned", "reaped")
        }
        assert counted == {"ended": AT_ONCE + 10, "abandoned": 5, "reaped": 2}
        assert both[0].value("turns_open") == 3
        assert both[0].value("turns_oldest_seconds") > 0
        states = json.loads(
            world.one("select json_agg(distinct state order by state)::text from preview.turns")
        )
        assert states == ["abandoned", "ended", "open", "reaped"]


async def test_a_look_that_was_just_taken_is_not_repeated(database: str, world: Database) -> None:
    async with pool_of(database) as pool:
        orchestrator = Orchestrator(pool)
        await orchestrator.look()
        world.begin()
        await orchestrator.turns.look_after()
        assert orchestrator.value("turns_open") == 0
        await orchestrator.look()
        assert orchestrator.value("turns_open") == 1
