"""What is on the screen, as the product asks for it: on a real database, with the agent played."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import httpx
import pytest

from orchestrator_stub.sessions.shown import MOST_WAITERS
from tests.contract.golden import assert_same_form, load
from tests.orchestrator.sessions.control_world import (
    SERVICE_KEY,
    World,
    assert_problem,
    bearer,
    control_world,
    report,
)

SERVICE = bearer(SERVICE_KEY)
GOLDEN = load("status.request")
ERROR = GOLDEN["errors"][0]
NOTICE = {**ERROR, "kind": "console", "message": "a warning"}


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


def screen(revision: int, *, applied: int | None = None, **other: Any) -> dict[str, Any]:
    shown = {**GOLDEN["shown"], "revision": revision}
    said = {"observed": True, "checked": 0, "shown": shown, "errors": [], "errors_truncated": 0}
    return {**said, "revision": revision if applied is None else applied, "tree_hash": None, **other}


class Preview:
    """A session, its agent's word, and the product's question."""

    def __init__(self, world: World, session: dict[str, Any]) -> None:
        self.world, self.session, self.token = world, session, world.token(session)

    async def say(self, **said: Any) -> httpx.Response:
        answer = await report(self.world, self.session, self.token, **said)
        assert answer.status_code == 200, answer.text
        return answer

    async def ask(self, revision: object = 0, headers: Any = None, **query: Any) -> httpx.Response:
        return await self.world.http.get(
            f"/v1/sessions/{self.session['session_id']}/shown",
            params={"revision": revision, **query},
            headers=headers or SERVICE,
        )


@pytest.fixture
async def preview(world: World) -> Preview:
    return Preview(world, await world.session())


@pytest.mark.parametrize(
    ("said", "outcome"),
    [
        (screen(4), "behind"),
        (screen(5), "shown"),
        (screen(9), "shown"),
        (screen(4, applied=5), "applied"),
        (screen(5, observed=False, shown=None), "applied"),
        (screen(5, shown=None), "applied"),
        (screen(5, shown=None, checked=5), "no_viewer"),
        (screen(5, shown=None, checked=5, errors=[{**ERROR, "revision": 5}]), "error"),
        (screen(4, applied=5, errors=[{**ERROR, "revision": 5}]), "error"),
        (screen(4, applied=5, errors=[{**ERROR, "revision": 4}]), "applied"),
        (screen(5, checked=5, errors=[{**ERROR, "revision": 4}]), "error"),
        (screen(5, checked=5, errors=[{**ERROR, "kind": "module", "revision": 4}]), "applied"),
        (screen(5, checked=4, errors=[{**ERROR, "revision": 4}]), "applied"),
        (screen(5, errors=[{**ERROR, "kind": "runtime", "revision": 4}]), "error"),
        (screen(4, applied=5, checked=5, errors=[{**ERROR, "kind": "runtime", "revision": 4}]), "applied"),
        (screen(5, errors=[NOTICE]), "shown"),
        (screen(5, errors="nonsense", shown={"revision": "5"}), "applied"),
        (screen(5, errors=[7, None, {}]), "error"),
    ],
    ids=range(18),
)
async def test_what_became_of_revision_five(preview: Preview, said: dict[str, Any], outcome: str) -> None:
    await preview.say(**said)
    answer = await preview.ask(5, quiet=0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["outcome"] == outcome
    assert answer.json()["applied"] == said["revision"]


async def test_the_answer_and_the_session_are_of_the_golden_form(preview: Preview) -> None:
    await preview.say(**{**GOLDEN, "tree_hash": None})
    answer = (await preview.ask(10, quiet=0)).json()
    assert_same_form(answer, load("shown.answer"))
    one = await preview.world.http.get(f"/v1/sessions/{preview.session['session_id']}", headers=SERVICE)
    assert {key: one.json()[key] for key in ("applied", "shown", "errors")} == {
        key: answer[key] for key in ("applied", "shown", "errors")
    }
    project = await preview.world.http.get(
        f"/v1/projects/{preview.session['project_id']}/shown", params={"revision": 10}, headers=SERVICE
    )
    assert project.json() == answer


async def test_whoever_waits_is_answered_as_soon_as_it_is_known(preview: Preview) -> None:
    await preview.say(**screen(4))
    waiting = asyncio.create_task(preview.ask(5, wait=25, quiet=0))
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not preview.world.screens.waiting(UUID(preview.session["session_id"])):
        await asyncio.sleep(0.01)
    await preview.say(**screen(4, applied=5))
    await preview.say(**screen(5))
    assert (await waiting).json()["outcome"] == "shown"
    assert loop.time() - began < 20


async def test_an_error_within_the_quiet_time_is_the_answer(preview: Preview) -> None:
    await preview.say(**screen(5))
    waiting = asyncio.create_task(preview.ask(5, wait=25, quiet=10))
    while not preview.world.screens.waiting(UUID(preview.session["session_id"])):
        await asyncio.sleep(0.01)
    await preview.say(**screen(5, errors=[{**ERROR, "revision": 5}]))
    answer = (await waiting).json()
    assert (answer["outcome"], answer["errors"][0]["line"]) == ("error", 1)


async def test_another_epoch_is_behind(preview: Preview) -> None:
    await preview.say(**screen(5, epoch="one"))
    assert (await preview.ask(5, epoch="one", quiet=0)).json()["outcome"] == "shown"
    assert (await preview.ask(5, epoch="other", quiet=0)).json()["outcome"] == "behind"


async def test_strangers_and_agents_do_not_see_it(preview: Preview) -> None:
    world = preview.world
    await preview.say(**screen(5))
    assert_problem(await preview.ask(5, headers=bearer(preview.token)), 403, "not_allowed")
    nobody = await world.http.get(f"/v1/sessions/{preview.session['session_id']}/shown")
    assert_problem(nobody, 401, "token_missing")
    url = f"/v1/projects/{preview.session['project_id']}/shown"
    assert_problem(await world.http.get(url, headers=bearer(preview.token)), 403, "not_allowed")
    unknown = await world.http.get("/v1/projects/00000000-0000-4000-8000-000000000000/shown", headers=SERVICE)
    assert unknown.status_code == 404


@pytest.mark.parametrize(
    "query",
    [{"revision": "x"}, {"revision": "-1"}, {"revision": "9" * 30}, {"wait": "31"}, {"wait": "nan"},
     {"wait": "-1"}, {"quiet": "1e9"}, {"quiet": "x"}, {"epoch": "e" * 256}],
    ids=str,
)  # fmt: skip
async def test_a_malformed_question_is_said_to_be(preview: Preview, query: dict[str, str]) -> None:
    answer = await preview.ask(**{"revision": 0, **query})
    assert_problem(answer, 400, "bad_query")


async def test_a_fifth_waiter_is_turned_away_and_a_session_that_ends_is_gone(preview: Preview) -> None:
    waiting = [asyncio.create_task(preview.ask(5, wait=25)) for _ in range(MOST_WAITERS)]
    while preview.world.screens.waiting(UUID(preview.session["session_id"])) < MOST_WAITERS:
        await asyncio.sleep(0.01)
    assert_problem(await preview.ask(5, wait=25), 429, "too_many_waiters")
    await preview.world.sql(
        "update preview.sessions set state = 'gone' where id = %s", preview.session["session_id"]
    )
    for answer in await asyncio.gather(*waiting):
        assert_problem(answer, 410, "session_over")


async def test_members_are_told_what_is_news_at_most_once_a_second_and_the_last_word(
    preview: Preview,
) -> None:
    for revision in range(1, 6):
        await preview.say(**screen(revision, errors=[{**ERROR, "revision": revision}, NOTICE]))
    await preview.say(**screen(5, errors=[NOTICE]))
    topic = f"preview:{preview.session['project_id']}"

    async def told() -> list[dict[str, Any]]:
        rows = await preview.world.sql(
            "select payload, event, private from realtime.messages where topic = %s order by inserted_at, payload",
            topic,
        )
        assert {(event, private) for _, event, private in rows} <= {("preview:status", True)}
        return [row[0] for row in rows]

    async with asyncio.timeout(20):
        while not (heard := await told()) or heard[-1]["error_count"]:
            await asyncio.sleep(0.02)
    last = {key: value for key, value in heard[-1].items() if key != "id"}
    assert_same_form(last, load("preview_status"))
    assert (last["applied"], last["shown"], last["error_count"]) == (5, 5, 0)
    assert len(heard) <= 3
    assert "nowhere" not in json.dumps(heard), "the errors' text is the project's"
    await preview.say(**screen(5, errors=[NOTICE]))
    assert await told() == heard
