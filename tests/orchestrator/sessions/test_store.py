"""The table in PostgreSQL: what each statement does in each state is what the transition table says."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID

import pytest

from orchestrator_stub.sessions.lifecycle import Event, Session, State, moves
from orchestrator_stub.sessions.sleep import MOVES, SUSPEND, WAKE
from orchestrator_stub.sessions.store import Report, Reported, SessionStore
from tests.orchestrator.sessions.control_world import World, control_world


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


async def replaced(store: SessionStore, session_id: UUID) -> Session | None:
    session = await store.get(session_id)
    assert session is not None
    return await store.replace(session, 2, ttl=600)


def claim_of(session_id: UUID) -> dict[str, object]:
    return {"id": session_id, "by": "me", "seconds": 60.0, **MOVES}


STATEMENTS: dict[Event, Callable[[SessionStore, UUID], Awaitable[Session | Reported | None]]] = {
    Event.TAKE_UP: lambda store, id_: store.claim(id_, by="me", seconds=60, event=Event.TAKE_UP),
    Event.REPORT: lambda store, id_: store.report(Report(id_, 1, ready=True, lease=60, status="{}")),
    Event.REPLACE: replaced,
    Event.SUSPEND: lambda store, id_: store.change(SUSPEND, claim_of(id_)),
    Event.WAKE: lambda store, id_: store.change(WAKE, claim_of(id_)),
    Event.END: lambda store, id_: store.end(id_),
    Event.TAKE_DOWN: lambda store, id_: store.claim(id_, by="me", seconds=60, event=Event.TAKE_DOWN),
    Event.DESTROYED: lambda store, id_: store.destroyed(id_),
}


async def test_every_statement_in_every_state_does_what_the_table_says(world: World) -> None:
    project = await world.project()
    assert set(STATEMENTS) == set(Event)
    for event, statement in STATEMENTS.items():
        for state in State:
            session, _ = await world.store.create(project, key=None, generation=1, ttl=600)
            await world.sql(
                "update preview.sessions set state = %s, machine_id = 'm1', state_since = now() - interval '1 hour'"
                " where id = %s",
                state.value,
                session.id,
            )
            after = await statement(world.store, session.id)
            wanted = moves(event).get(state)
            assert (after.state if after else None) == wanted, (state, event)
            kept = await world.store.get(session.id)
            assert kept is not None
            assert kept.state == (wanted or state), (state, event)
            # The deadline of a state counts from when it came, and a new machine's from when it was asked for.
            moved = after is not None and (wanted != state or event is Event.REPLACE)
            assert (kept.state_since > session.created_at - 60) == moved, (state, event)


async def test_a_session_that_ends_with_a_problem_has_failed(world: World) -> None:
    session, _ = await world.store.create(await world.project(), key=None, generation=1, ttl=600)
    await world.store.end(session.id, "lease_lapsed: silence")
    over = await world.store.destroyed(session.id)
    assert over is not None
    assert (over.state, over.problem) == (State.FAILED, "lease_lapsed: silence")


async def test_a_turn_is_one_s_own_until_its_time_is_up(world: World) -> None:
    session, _ = await world.store.create(await world.project(), key=None, generation=1, ttl=600)

    async def taken(by: str) -> bool:
        return await world.store.claim(session.id, by=by, seconds=60, event=Event.TAKE_UP) is not None

    assert await taken("one")
    assert await taken("one"), "its own turn again"
    assert not await taken("other")
    await world.pass_time(61)
    assert await taken("other")
    await world.store.release_all(by="one")
    assert not await taken("one"), "what was given up was not one's own any more"


async def test_heartbeats_that_come_together_are_one_commit_each_with_its_own_outcome(world: World) -> None:
    """Those that come while another is written are one statement, a bad one among them or not."""
    project = await world.project()
    made = [(await world.store.create(project, key=None, generation=1, ttl=600))[0].id for _ in range(12)]
    await world.sql("update preview.sessions set state = 'provisioning'")
    await world.sql("create table commits (id xid8)")
    await world.sql(
        "create function noted() returns trigger language plpgsql as"
        " $$ begin insert into commits values (pg_current_xact_id()); return null; end $$"
    )
    await world.sql(
        "create trigger noted after update on preview.sessions for each row execute function noted()"
    )

    async def hear(**changed: Report) -> list[Reported | BaseException | None]:
        reports = [
            changed.get(f"n{n}", Report(id_, 1, ready=True, lease=60, status=f'{{"n": {n}}}'))
            for n, id_ in enumerate(made)
        ]
        return await asyncio.gather(*map(world.store.report, reports), return_exceptions=True)

    got = await hear(n3=Report(made[3], 2, ready=True, lease=60, status="{}"))
    assert [each and each.state for each in got] == [None if n == 3 else State.READY for n in range(12)]
    [[commits]] = await world.sql("select count(distinct id::text) from commits")
    assert commits == 1
    kept = await world.sql("select status ->> 'n' from preview.sessions order by status ->> 'n'")
    assert [n for (n,) in kept] == [*sorted(str(n) for n in range(12) if n != 3), None]

    # No JSON that the database takes: its own trouble.
    got = await hear(n5=Report(made[5], 1, ready=True, lease=60, status='{"n": "\\ud800"}'))
    assert [n for n, each in enumerate(got) if isinstance(each, Exception)] == [5]
    assert all(each is not None and each.state is State.READY for n, each in enumerate(got) if n not in (5,))
    # Twice from the same one: the later word counts.
    await asyncio.gather(
        *(
            world.store.report(Report(made[0], 1, ready=True, lease=60, status=f'{{"n": "last {n}"}}'))
            for n in range(5)
        )
    )
    [[last]] = await world.sql("select status ->> 'n' from preview.sessions where id = %s", made[0])
    assert last == "last 4"


async def test_a_status_that_did_not_change_is_not_written_and_its_time_is(world: World) -> None:
    """A large status lies beside its row, and is written there again only when it is another."""
    session, _ = await world.store.create(await world.project(), key=None, generation=1, ttl=600)
    await world.sql("update preview.sessions set state = 'ready' where id = %s", session.id)
    status = json.dumps({"problems": [hashlib.sha256(bytes([n])).hexdigest() for n in range(200)]})

    async def wal(status: str) -> int:
        [[before]] = await world.sql("select pg_current_wal_insert_lsn()::text")
        await world.store.report(Report(session.id, 1, ready=True, lease=60, status=status))
        [[written]] = await world.sql("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), %s)::int", before)
        return int(written)

    assert await wal(status) > 10_000
    await world.pass_time(60)
    assert await wal(status) < 2_000
    found = await world.store.screen(session.id)
    assert found is not None
    assert found[1] == json.loads(status)
    assert found[2] < 30, "how old it is counts from when it was heard last"
    assert await wal(status.replace("[", '["news", ')) > 10_000
