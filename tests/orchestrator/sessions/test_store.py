"""The table in PostgreSQL: what each statement does in each state is what the transition table says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID

import pytest

from orchestrator_stub.sessions.lifecycle import Event, Session, State, moves
from orchestrator_stub.sessions.sleep import MOVES, SUSPEND, WAKE
from orchestrator_stub.sessions.store import SessionStore
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


STATEMENTS: dict[Event, Callable[[SessionStore, UUID], Awaitable[Session | None]]] = {
    Event.TAKE_UP: lambda store, id_: store.claim(id_, by="me", seconds=60, event=Event.TAKE_UP),
    Event.REPORT: lambda store, id_: store.report(id_, 1, ready=True, lease=60, status="{}"),
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
