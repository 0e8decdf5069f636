"""Several people in one file, over real sockets, a real database and two orchestrators: what breaks, and must not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import psycopg
import pytest
import pytest_asyncio
import websockets
from prometheus_client import CollectorRegistry
from pycrdt import create_update_message

from orchestrator_stub.rooms.room import Person
from orchestrator_stub.rooms.state import Sending
from tests.conftest import fresh
from tests.orchestrator.rooms.world import PATH, Browser, file_of, place, until
from tests.orchestrator.sessions.control_world import World, assert_problem, bearer, control_world

SOURCE = "export function App() {\n  return <h1>Grüße 🎉</h1>\n}\n"
KEYS = "abcdefghijklmnopqrstuvwxyz"


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(postgres_dsn: str, template_database: str) -> AsyncIterator[World]:
    with fresh(postgres_dsn, template_database) as dsn:
        async with control_world(dsn) as running:
            yield running


async def people(world: World) -> tuple[UUID, UUID, UUID]:
    """A project with a file, and two who may write it."""
    owner, other = await world.user(), await world.user()
    project = await world.project(owner)
    await world.sql(
        "insert into public.project_collaborators (project_id, user_id, added_by) values (%s, %s, %s)",
        project, other, owner,
    )  # fmt: skip
    await world.write(project, PATH, SOURCE)
    return project, owner, other


async def edit(world: World, project: UUID, old: str, new: str) -> None:
    """Save as an AI does: what it read, changed; and anew where somebody saved meanwhile."""
    while True:
        content, version = await file_of(world, project)
        try:
            await world.sql(
                "select public.upsert_project_file(%s, %s, %s, expected_version => %s)",
                project, PATH, content.replace(old, new), version,
            )  # fmt: skip
            return
        except psycopg.Error as error:
            if error.sqlstate != "PT409":
                raise


async def saved(world: World, project: UUID, *browsers: Browser) -> str:
    """Wait until everybody and the database have the same; that."""

    async def same() -> bool:
        content, _ = await file_of(world, project)
        return all(str(browser) == content for browser in browsers)

    await until("all are equal", same)
    return (await file_of(world, project))[0]


async def test_two_type_and_a_third_saves_and_nothing_is_lost(world: World) -> None:
    project, ann, bob = await people(world)
    async with place(world) as here:
        a, b = await here.browser(ann, project), await here.browser(bob, project)
        await a.type(0, "// ann:\n")
        await b.type_after("}\n", "// bob:\n")

        async def ai() -> None:
            for number in range(5):
                await edit(world, project, "</h1>", f"</h1><p>{number}</p>")
                await asyncio.sleep(0.1)

        await asyncio.gather(a.type_after("// ann:", KEYS), b.type_after("// bob:", KEYS), ai())
        text = await saved(world, project, a, b)
        assert f"// ann:{KEYS}\n" in text
        assert f"// bob:{KEYS}\n" in text
        assert all(f"<p>{number}</p>" in text for number in range(5)), text
        assert "Grüße 🎉" in text
        rows = await world.sql(
            "select origin, contributors, created_by from public.project_files"
            " where project_id = %s and origin = 'room' order by version desc",
            project,
        )
        assert rows
        assert all(set(contributors) <= {ann, bob} and by in contributors for _, contributors, by in rows)
        assert {each for _, contributors, _ in rows for each in contributors} == {ann, bob}


async def test_rooms_are_counted(world: World) -> None:
    project, ann, bob = await people(world)
    registry = CollectorRegistry()

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"preview_orchestrator_{name}", labels)

    async with place(world, registry=registry) as here:
        assert (value("rooms_open"), value("room_members")) == (0, 0)
        a, b = await here.browser(ann, project), await here.browser(bob, project)
        assert (value("rooms_open"), value("room_members")) == (1, 2)
        await a.type(0, "// ann\n")
        await saved(world, project, a, b)
        await until("it is counted", lambda: value("room_saves_total", outcome="saved"))
        await b.close()
        await until("one is left", lambda: value("room_members") == 1)


async def test_two_orchestrators_have_one_room(world: World) -> None:
    """Each loading the text for itself would double it."""
    project, ann, bob = await people(world)
    async with place(world) as here, place(world) as there:
        a = await here.browser(ann, project)
        # Whoever is asked says where the room is.
        address = await there.address(bob, project)
        assert address.startswith(here.url.replace("http", "ws"))
        # Whoever comes to another all the same is told, and its text is not loaded there.
        strayed = Browser(address.replace(here.url[7:], there.url[7:]))
        there.opened.append(strayed)
        await strayed.open()
        await until("it is closed", lambda: strayed.closed)
        assert strayed.closed == (4409, "elsewhere")
        assert there.rooms.rooms == []
        b = await there.browser(bob, project)  # its address is the other's
        await a.type(0, "// a\n")
        await b.type(0, "// b\n")
        text = await saved(world, project, a, b)
        assert text.count("export function") == 1
        assert text.count("// a\n") == text.count("// b\n") == 1


async def test_an_orchestrator_that_was_thought_dead_writes_nothing(world: World) -> None:
    project, ann, bob = await people(world)
    # Its renewals do not happen, and it does not know: as after a long stop of the whole machine.
    async with place(world, lease_seconds=3600) as here, place(world) as there:
        a = await here.browser(ann, project)
        await world.sql("update preview.rooms set lease_until = now() - interval '1 second'")
        b = await there.browser(bob, project)
        assert [room.state.generation for room in there.rooms.rooms] > [
            room.state.generation for room in here.rooms.rooms
        ]
        await a.type(0, "// too late\n")
        await until("it is closed", lambda: a.closed)
        assert a.closed == (4409, "lost")
        assert "too late" not in (await file_of(world, project))[0]
        await b.type(0, "// in time\n")
        assert (await saved(world, project, b)).startswith("// in time\n")


async def test_a_browser_that_outlived_its_room_doubles_nothing(world: World) -> None:
    """Its updates are of another generation's text, whatever it sends."""
    project, ann, bob = await people(world)
    async with place(world) as here:
        old = await here.browser(ann, project)
        await old.type(0, "// typed in the room before\n")
        await saved(world, project, old)
        (room,) = here.rooms.rooms
        room.close()
        await until("the room is over", lambda: old.closed)
        assert old.closed == (4503, "stopped")
        fresh = await here.browser(bob, project)
        again = await here.browser(ann, project)
        await again.socket.send(create_update_message(old.doc.get_update()))
        await again.type(0, "// new\n")
        text = await saved(world, project, fresh, again)
        assert text == "// new\n// typed in the room before\n" + SOURCE


async def test_a_save_from_outside_is_merged_and_not_overwritten(world: World) -> None:
    """The notice alone brings it, before anybody types; and beside what is being typed."""
    project, ann, _ = await people(world)
    async with place(world) as here:
        a = await here.browser(ann, project)
        await world.write(project, PATH, SOURCE.replace("Grüße", "Hallo"))
        await until("it is there", lambda: "Hallo" in str(a))
        (room,) = here.rooms.rooms
        await a.type(0, "// mine\n")
        await world.write(project, PATH, SOURCE.replace("Grüße", "Servus"))
        assert await saved(world, project, a) == "// mine\n" + SOURCE.replace("Grüße", "Servus")
        assert room.why is None


class Failing:
    """A store of which some calls fail."""

    def __init__(self, real: Any, **failing: BaseException) -> None:
        self._real, self._failing = real, failing

    def __getattr__(self, name: str) -> Any:
        if name in self._failing:

            async def fail(*_: object) -> None:
                raise self._failing[name]

            return fail
        return getattr(self._real, name)


async def test_a_load_that_failed_stores_nothing(world: World) -> None:
    project, ann, _ = await people(world)
    async with place(world) as here:
        real = here.rooms.store
        here.rooms.store = Failing(real, file=psycopg.OperationalError("away"))  # type: ignore[assignment]
        a = Browser(await here.address(ann, project))
        here.opened.append(a)
        await a.open()
        await until("it is closed", lambda: a.closed)
        assert a.closed == (4503, "unreachable")
        assert await file_of(world, project) == (SOURCE, 1)
        here.rooms.store = real
        b = await here.browser(ann, project)
        assert str(b) == SOURCE
        missing = await here.browser(ann, project, "src/nothing.ts")
        await until("it is closed", lambda: missing.closed)
        assert missing.closed == (4404, "gone")
        await world.write(project, "src/dos.ts", "one\r\ntwo\r\n")
        unfit = await here.browser(ann, project, "src/dos.ts")
        await until("it is closed", lambda: unfit.closed)
        assert unfit.closed == (4413, "unfit")


async def test_a_saver_that_fails_says_so(world: World) -> None:
    """A debounce that died silently would let people type into nothing."""
    project, ann, _ = await people(world)
    async with place(world) as here:
        real = here.rooms.store
        here.rooms.store = Failing(real, save=ZeroDivisionError())  # type: ignore[assignment]
        a = await here.browser(ann, project)
        await a.type(0, "// lost?\n")
        await until("it is told", lambda: a.closed)
        assert a.closed == (4500, "failed")
        here.rooms.store = real
        b = await here.browser(ann, project)
        await b.type(0, "// kept\n")
        assert await saved(world, project, b) == "// kept\n" + SOURCE


async def test_while_the_database_is_away_nothing_is_forgotten_and_nothing_saved_twice(world: World) -> None:
    project, ann, _ = await people(world)
    async with place(world) as here:
        store = here.rooms.store
        a = await here.browser(ann, project)
        real, tries = store.save, 0

        async def lossy(project_id: UUID, path: str, generation: int, sent: Sending) -> Any:
            nonlocal tries
            tries += 1
            if tries == 1:  # nobody answers
                raise psycopg.OperationalError("away")
            answer = await real(project_id, path, generation, sent)
            if tries == 2:  # it is done, and the answer is lost
                raise psycopg.OperationalError("cut")
            return answer

        store.save = lossy  # type: ignore[method-assign]
        await a.type(0, "// one\n")
        await until("it is told", lambda: any(said["type"] == "unsaved" for said in a.said))
        await a.type(0, "// two\n")
        assert await saved(world, project, a) == "// two\n// one\n" + SOURCE
        assert tries >= 4
        assert (await file_of(world, project))[1] == 3  # two saves


async def test_a_project_with_too_many_writes_is_saved_when_it_may(world: World) -> None:
    project, ann, _ = await people(world)
    async with place(world) as here:
        a = await here.browser(ann, project)
        await world.sql("update preview.settings set writes_per_minute = 1")
        try:

            async def told() -> bool:  # a minute may begin between two keys
                if a.closed is None:
                    await a.type(0, "x")
                return a.closed is not None or any(said["type"] == "unsaved" for said in a.said)

            await until("it is told", told)
            assert a.closed is None
        finally:
            await world.sql("update preview.settings set writes_per_minute = 6000")
        assert (await saved(world, project, a)).endswith(f"x{SOURCE}")


async def test_a_member_who_is_removed_is_out(world: World) -> None:
    project, ann, bob = await people(world)
    remove = "delete from public.project_collaborators where project_id = %s and user_id = %s"
    async with place(world, member_seconds=0.2) as here:
        a, b = await here.browser(ann, project), await here.browser(bob, project)
        await world.sql(remove, project, bob)
        await until("he is out", lambda: b.closed)
        assert b.closed == (4403, "removed")
        assert (await here.ask(bob, project)).status_code == 404
        assert a.closed is None
    await world.sql(
        "insert into public.project_collaborators (project_id, user_id, added_by) values (%s, %s, %s)",
        project, bob, ann,
    )  # fmt: skip
    async with place(world, member_seconds=3600) as here:
        a, b = await here.browser(ann, project), await here.browser(bob, project)
        # At the save: what he typed while he was a member is saved by who still is, who sees it, too.
        await b.type(0, "// bob\n")
        await world.sql(remove, project, bob)
        await until("he is out", lambda: b.closed)
        assert await saved(world, project, a) == "// bob\n" + SOURCE
        ((by, contributors),) = await world.sql(
            "select created_by, contributors from public.project_files where project_id = %s"
            " and is_current_version and file_path = %s",
            project, PATH,
        )  # fmt: skip
        assert (by, contributors) == (ann, [ann])
        # Alone, and removed: nothing is saved by him.
        await a.close()
        late = await here.browser(ann, project)
        await world.sql("update public.projects set owner_id = %s where id = %s", await world.user(), project)
        await late.type(0, "// not any more\n")
        await until("she is out", lambda: late.closed)
        assert "not any more" not in (await file_of(world, project))[0]


async def test_a_file_that_goes_ends_its_room(world: World) -> None:
    project, ann, _ = await people(world)
    async with place(world) as here:
        a = await here.browser(ann, project)
        await world.sql("select public.delete_project_file(%s, %s)", project, PATH)
        await until("it is closed", lambda: a.closed)
        assert a.closed == (4404, "gone")
        await until("no lease is left", lambda: nothing_in(world, "preview.rooms", project))


async def nothing_in(world: World, table: str, project: UUID) -> bool:
    return not await world.sql(f"select from {table} where project_id = %s", project)


async def test_an_empty_room_ends_and_a_stop_saves_what_was_typed(world: World) -> None:
    project, ann, _ = await people(world)
    async with place(world, idle_seconds=0.2) as here:
        a = await here.browser(ann, project)
        await a.type(0, "// and gone\n")
        await a.close()
        await until("the room is over", lambda: not here.rooms.rooms)
        assert (await file_of(world, project))[0] == "// and gone\n" + SOURCE
    async with place(world) as here:
        b = await here.browser(ann, project)
        await b.type(0, "// at the stop\n")
        (room,) = here.rooms.rooms
        await until("it was heard", lambda: room.state.dirty)
    assert (await file_of(world, project))[0] == "// at the stop\n// and gone\n" + SOURCE
    assert await nothing_in(world, "preview.rooms", project)


async def refused(url: str) -> tuple[int, str]:
    browser = Browser(url)
    await browser.open()
    await until("it is closed", lambda: browser.closed)
    await browser.close()
    assert browser.closed is not None
    return browser.closed


async def test_codes_are_for_one_member_one_file_once_and_a_minute(world: World) -> None:
    project, ann, bob = await people(world)
    other = await world.project(bob)
    await world.write(other, PATH, "theirs\n")
    async with place(world) as here:
        # Another project's code, another file's, and none at all.
        address = await here.address(bob, other)
        assert await refused(address.replace(str(other), str(project))) == (4401, "code")
        assert await refused(address) == (4401, "code"), "a code that was tried elsewhere is over"
        assert await refused((await here.address(ann, project, "b.ts")).replace("b.ts", PATH)) == (
            4401,
            "code",
        )
        for code in ("", "?code=", "?code=x", f"?code={uuid4()}"):
            assert await refused(f"{here.url.replace('http', 'ws')}/v1/rooms/{project}/{PATH}{code}") == (
                4401, "code",
            )  # fmt: skip
        # Used twice.
        address = await here.address(ann, project)
        first = Browser(address)
        here.opened.append(await first.open())
        assert first.closed is None
        assert await refused(address) == (4401, "code")
        # Expired.
        address = await here.address(ann, project)
        await world.sql("update preview.room_codes set expires_at = now() - interval '1 second'")
        assert await refused(address) == (4401, "code")
        # Of somebody who was removed meanwhile.
        address = await here.address(bob, project)
        await world.sql("delete from public.project_collaborators where user_id = %s", bob)
        assert await refused(address) == (4401, "code")
        # A stranger is told of no project, and the service has no name to type by.
        assert (await here.ask(await world.user(), project)).status_code == 404
        assert first.closed is None


async def test_what_a_browser_may_not(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    project, ann, bob = await people(world)
    async with place(world) as here:
        quiet = await here.browser(ann, project)
        (room,) = here.rooms.rooms
        for message, why in (
            (b"", "bad"), (b"\x00", "bad"), (b"\x00\x02\xff\xff", "bad"), (b"\x07abc", "bad"),
            (b"\x00\x01\x05hallo", "bad"), (b"\x01\x02\x01\x80", "bad"), ("text", "bad"),
        ):  # fmt: skip
            b = await here.browser(bob, project)
            await b.socket.send(message)
            await until("it is closed", lambda b=b: b.closed)
            assert b.closed is not None
            assert b.closed[1] == why, message
        monkeypatch.setattr("orchestrator_stub.rooms.connection.BURST", 10.0)
        fast = await here.browser(bob, project)
        with suppress(websockets.ConnectionClosed):
            for _ in range(500):
                await fast.socket.send(b"\x00\x00\x01\x00")
        await until("it is closed", lambda: fast.closed)
        assert fast.closed == (4429, "fast")
        monkeypatch.setattr("orchestrator_stub.rooms.connection.BURST", 400.0)
        # What the database takes not ends the room, and says so; nobody else's text is touched.
        nul = await here.browser(bob, project)
        await nul.type(0, "\x00")
        await until("it is closed", lambda: nul.closed and quiet.closed)
        assert nul.closed == quiet.closed == (4413, "refused")
        assert await file_of(world, project) == (SOURCE, 1)
        assert room.why == "refused"
        monkeypatch.setattr("orchestrator_stub.rooms.room.MOST_TEXT_BYTES", 100)
        big = await here.browser(bob, project)
        await big.type(0, "x" * 101)
        await until("it is closed", lambda: big.closed)
        assert big.closed == (4413, "too_large")
        monkeypatch.setattr("orchestrator_stub.rooms.room.MOST_PEOPLE", 1)
        one = await here.browser(bob, project)
        two = await here.browser(ann, project)
        await until("it is closed", lambda: two.closed)
        assert two.closed == (4429, "full")
        assert one.closed is None
        monkeypatch.setattr("orchestrator_stub.rooms.service.MOST_ROOMS", 1)
        await world.write(project, "b.ts", "b")
        three = await here.browser(ann, project, "b.ts")
        await until("it is closed", lambda: three.closed)
        assert three.closed == (4429, "full")


async def test_a_bug_in_the_upkeep_costs_no_lease(world: World) -> None:
    project, ann, _ = await people(world)
    async with place(world, lease_seconds=3) as here:
        a = await here.browser(ann, project)
        real, failed = here.rooms.store.renew, 0

        async def broken(generations: Sequence[int]) -> frozenset[int]:
            nonlocal failed
            failed += 1
            if failed == 1:
                raise ZeroDivisionError
            return await real(generations)

        here.rooms.store.renew = broken  # type: ignore[method-assign]
        await until("it is asked again", lambda: failed > 1)
        await a.type(0, "// on\n")
        assert await saved(world, project, a) == "// on\n" + SOURCE


async def test_a_browser_that_takes_nothing_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator_stub.rooms.room.MOST_WAITING", 3)
    person = Person(uuid4())
    for number in range(5):
        person.send(bytes([number]))
    assert person.ended == "slow"
    assert person.out.get_nowait() is None  # what it did not take is not kept
    assert person.out.empty()


async def test_without_the_extra_there_are_no_rooms(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    async with control_world(database) as world:
        project, ann, _ = await people(world)
        answer = await world.http.post(
            f"/v1/projects/{project}/rooms", json={"path": PATH}, headers=bearer(world.user_token(ann))
        )
        assert_problem(answer, 503, "no_rooms")
