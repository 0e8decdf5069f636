"""What the door asks the database: how often, for whom, and what it notes there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial

import pytest

from orchestrator_stub.door import registry
from orchestrator_stub.door.decision import Behind
from orchestrator_stub.door.store import DoorStore
from tests.orchestrator.door.test_refused import upgraded
from tests.orchestrator.door.world import World, status, within


def guess() -> str:
    return f"p{secrets.token_hex(12)}"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The labels of each query."""
    found: list[list[str]] = []
    standing = DoorStore.standing

    async def noted(self: DoorStore, labels: Sequence[str]) -> Mapping[str, list[Behind]]:
        found.append(list(labels))
        return await standing(self, labels)

    monkeypatch.setattr(DoorStore, "standing", noted)
    return found


async def ask(world: World, label: str) -> int:
    host = f"{label}.{world.address.domain}"
    return status(await world.say(f"GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()))


async def test_names_that_are_guessed_share_their_queries(world: World, asked: list[list[str]]) -> None:
    preview = await world.preview()
    labels = [guess() for _ in range(199)] + [preview.label]
    assert await asyncio.gather(*(ask(world, each) for each in labels)) == [404] * 199 + [401]
    queries = [each for each in asked if set(each) & set(labels)]
    assert len(queries) <= 20, "one is under way at a time, and the next has all that came meanwhile"
    assert {label for each in queries for label in each} == set(labels)


async def test_a_name_of_nobodys_is_asked_for_once_a_second(
    world: World, asked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    world.door.registry._clock = lambda: now
    label = guess()
    for _ in range(5):
        assert await ask(world, label) == 404
    assert sum(label in each for each in asked) == 1
    now += registry.POLL_SECONDS
    assert await ask(world, label) == 404
    assert sum(label in each for each in asked) == 2
    monkeypatch.setattr(registry, "NOBODYS_MOST", 3)
    others = [guess() for _ in range(5)]
    for each in others:
        assert await ask(world, each) == 404
    assert list(world.door.registry._nobodys) == others[2:], "so many are remembered, the newest"


async def test_a_name_that_is_given_is_known_within_a_second(world: World) -> None:
    preview = await world.preview()
    [(project,)] = await world.sql(
        "delete from preview.doors where label = %s returning project_id", preview.label
    )
    assert await ask(world, preview.label) == 404
    await world.sql("insert into preview.doors (project_id, label) values (%s, %s)", project, preview.label)

    async def known() -> bool:
        return await ask(world, preview.label) == 401

    await within("it is known", known, 5)


async def test_a_query_that_fails_lets_nobody_in_and_the_next_is_asked_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    preview = await world.preview()
    standing = DoorStore.standing
    stuck = asyncio.Event()

    async def slow(self: DoorStore, labels: Sequence[str]) -> Mapping[str, list[Behind]]:
        stuck.set()
        await asyncio.sleep(3600)
        return {}

    monkeypatch.setattr(registry, "QUERY_SECONDS", 0.2)
    monkeypatch.setattr(DoorStore, "standing", slow)
    leaves = asyncio.create_task(world.door.registry.of(guess()))
    await stuck.wait()
    stays = asyncio.create_task(world.door.registry.of(preview.label))
    await asyncio.sleep(0)
    leaves.cancel()
    with suppress(asyncio.CancelledError):
        await leaves
    with pytest.raises(registry.Away):
        await stays
    monkeypatch.setattr(DoorStore, "standing", standing)
    assert await world.door.registry.of(preview.label)


@pytest.mark.parametrize("how", ["a request", "an open socket"])
async def test_who_looks_through_the_door_is_noted(
    world: World, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    preview, other = await world.preview(), await world.preview()
    query = "select viewed_at from preview.sessions where id = %s"
    writer = None
    if how == "an open socket":
        _, writer = await upgraded(world, preview)
        world.door.registry._viewed.clear()  # it was opened long ago
    else:
        assert status(await world.ask(preview)) == 200
    monkeypatch.setattr(registry, "VIEWED_SECONDS", 0.05)
    noting = asyncio.create_task(world.door.registry._note_views())

    async def noted(before: object) -> object:
        [(at,)] = await world.sql(query, preview.session_id)
        return at != before and at

    first = await within("it is noted", partial(noted, None))
    if writer is not None:
        await within("and again", partial(noted, first))
        writer.close()
    else:
        await asyncio.sleep(0.2)
        assert await world.sql(query, preview.session_id) == [(first,)], "one request is one look"
    assert await world.sql(query, other.session_id) == [(None,)]
    noting.cancel()
    await asyncio.gather(noting, return_exceptions=True)
