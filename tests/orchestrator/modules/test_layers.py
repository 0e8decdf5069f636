"""Layers over the session API and a real Storage: what is sent is found by its project, and by nobody else."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest
import pytest_asyncio
from psycopg.errors import InsufficientPrivilege

from orchestrator_stub.modules import layers as module_layers
from orchestrator_stub.modules.layers import Limits
from orchestrator_stub.modules.upkeep import ModuleUpkeep
from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.platform.storage import StorageClient
from tests.database.db import acting_as
from tests.system.plane import Plane, Project, running_plane

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY, OTHER = "a" * 40, "b" * 40


@dataclass
class Machine:
    """What a session's token can do."""

    plane: Plane
    project: Project
    session: dict[str, Any]
    token: str

    async def ask(self, method: str, body: object, session: str | None = None) -> httpx.Response:
        path = f"/v1/sessions/{session or self.session['session_id']}/modules"
        headers = {"authorization": f"Bearer {self.token}"}
        return await self.plane.http.request(method, path, json=body, headers=headers)

    async def find(self, key: str = KEY) -> dict[str, Any]:
        answer = await self.ask("POST", {"key": key})
        assert answer.is_success, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def send(self, content: bytes, key: str = KEY, urls: list[str] | None = None) -> httpx.Response:
        urls = (await self.find(key))["upload_urls"] if urls is None else urls
        stored = await put(urls[0], content)
        assert stored.is_success, stored.text
        return await self.tell(content, key)

    async def tell(self, content: bytes, key: str = KEY) -> httpx.Response:
        return await self.ask("PUT", {"key": key, "parts": [part(content)]})


def part(content: bytes) -> dict[str, object]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}


async def put(url: str, content: bytes) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as http:
        return await http.put(url, content=content)


async def read(url: str) -> httpx.Response:
    async with httpx.AsyncClient(trust_env=False) as http:
        return await http.get(url)


@dataclass
class World:
    plane: Plane

    async def machine(self, project: Project | None = None) -> Machine:
        project = project or await self.plane.project({"package.json": "{}"})
        answer = await self.plane.http.post("/v1/sessions", json={"project_id": str(project.id)})
        assert answer.is_success, answer.text
        session = answer.json()
        spec = next(s for s in self.plane.driver.made.values() if str(s.session_id) == session["session_id"])
        return Machine(self.plane, project, session, spec.env["REALTIME_TOKEN"])

    def environment(self, machine: Machine) -> dict[str, str]:
        specs = self.plane.driver.made.values()
        return dict(next(s for s in specs if str(s.session_id) == machine.session["session_id"]).env)

    async def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        async with await psycopg.AsyncConnection.connect(self.plane.dsn, autocommit=True) as connection:
            cursor = await connection.execute(query.encode(), values)
            return await cursor.fetchall() if cursor.description else []

    async def upkeep(self, **limits: float) -> None:
        given = {"layer": 2**20, "project": 2**30, "total": 2**40, "keep": 3600.0, **limits}
        key = self.plane.keys.service_key
        async with pool_of(self.plane.dsn, size=1) as pool, httpx.AsyncClient(trust_env=False) as http:
            storage = StorageClient(f"{self.plane.url}/storage/v1", key, http)
            now = 0.0
            work = ModuleUpkeep(pool, storage, Limits(**given), clock=lambda: now)  # type: ignore[arg-type]
            await work.step()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plane(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Plane]:
    directory = tmp_path_factory.mktemp("plane")
    async with running_plane(module_database, directory, modules_layer_bytes=2**20) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def world(plane: Plane) -> World:
    """Nobody has a layer yet."""
    world = World(plane)
    await world.sql("delete from preview.modules")
    await world.sql("delete from storage.objects where bucket_id = 'preview-modules'")
    return world


async def test_what_a_machine_sends_its_project_has(world: World) -> None:
    first = await world.machine()
    assert "MODULES_KEY" not in world.environment(first)
    missing = await first.find()
    assert (missing["kind"], missing["max_bytes"], len(missing["upload_urls"])) == ("missing", 2**20, 1)
    assert (await first.send(b"a layer", urls=missing["upload_urls"])).json() == {"kind": "layer"}
    found = await first.find()
    assert found["kind"] == "layer"
    [only] = found["parts"]
    assert (await read(only["url"])).content == b"a layer"
    assert {name: only[name] for name in ("sha256", "size")} == part(b"a layer")

    second = await world.machine(first.project)
    environ = world.environment(second)
    assert environ["MODULES_KEY"] == KEY
    [named] = json.loads(environ["MODULES_PARTS"])
    assert (await read(named["url"])).content == b"a layer"
    assert world.plane.keys.service_key not in environ["MODULES_PARTS"]


async def test_two_machines_that_send_the_same_are_both_done(world: World) -> None:
    first = await world.machine()
    second = await world.machine(first.project)
    offers = [await machine.find() for machine in (first, second)]
    answers = await asyncio.gather(
        first.send(b"one", urls=offers[0]["upload_urls"]), second.send(b"two", urls=offers[1]["upload_urls"])
    )
    assert [answer.status_code for answer in answers] == [200, 200]
    [only] = (await first.find())["parts"]
    assert (await read(only["url"])).content in (b"one", b"two")
    assert await world.sql("select count(*) from preview.modules") == [(1,)]


@pytest.mark.parametrize("told", ["nothing is there", "another size", "not asked", "too large"])
async def test_what_is_not_stored_is_not_taken(world: World, told: str) -> None:
    machine = await world.machine()
    if told != "not asked":
        [url] = (await machine.find())["upload_urls"]
    content = b"x" * (2**20 + 1 if told == "too large" else 5)
    if told in ("another size", "too large"):
        await put(url, content)
    answer = await machine.tell(content + b"more" if told == "another size" else content)
    assert answer.status_code == 422
    assert answer.json()["type"] == "urn:preview-sync:problem:modules_not_sent"
    assert (await machine.find())["kind"] == "missing"


WAYS = [
    "with its token at the other's session",
    "by the other's key",
    "by the other's path at its own upload URL",
    "by a path in the key",
    "by a path in the parts",
    "with its token in the database",
    "with its token in Storage",
    "over a layer that is there",
]


@pytest.mark.parametrize("way", WAYS)
async def test_a_project_cannot_make_another_ones_layer(world: World, way: str) -> None:
    """The row of docs/security.md: whatever a hostile machine sends, the other project reads its own or none."""
    hostile, other = await world.machine(), await world.machine()
    evil = b"evil"
    one = str(other.session["session_id"])
    match way:
        case "with its token at the other's session":
            assert (await hostile.ask("POST", {"key": KEY}, one)).status_code == 403
            assert (await hostile.ask("PUT", {"key": KEY, "parts": [part(evil)]}, one)).status_code == 403
        case "by the other's key":
            assert (await hostile.send(evil)).is_success
        case "by the other's path at its own upload URL":
            await other.find()
            [url] = (await hostile.find())["upload_urls"]
            [(module,)] = await world.sql(
                "select id from preview.modules where project_id = %s", other.project.id
            )
            place, _, token = url.partition("?")
            hers = f"{place[: place.index('preview-modules')]}preview-modules/{other.project.id}/{KEY}/{module}.0"
            assert not (await put(f"{hers}?{token}", evil)).is_success
        case "by a path in the key":
            for key in (f"../{other.project.id}/{KEY}", f"{KEY}\n", KEY.upper(), "shared/x", ""):
                assert (await hostile.ask("POST", {"key": key})).status_code == 400
                assert (await hostile.ask("PUT", {"key": key, "parts": [part(evil)]})).status_code == 400
        case "by a path in the parts":
            for more in (
                {"url": "x"},
                {"path": f"{other.project.id}/x"},
                {"project_id": str(other.project.id)},
            ):
                body = {"key": KEY, "parts": [{**part(evil), **more}]}
                assert (await hostile.ask("PUT", body)).status_code == 400
                assert (
                    await hostile.ask("PUT", {"key": KEY, "parts": [part(evil)], **more})
                ).status_code == 400
        case "with its token in the database":
            claims = {"project_id": str(hostile.project.id)}
            with psycopg.connect(world.plane.dsn) as db, acting_as(db, "preview_agent", **claims):
                for statement in (
                    "insert into preview.modules (project_id, key, parts) values (%s, %s, '[]')",
                    "update preview.modules set project_id = %s where key = %s",
                ):
                    with pytest.raises(InsufficientPrivilege), db.transaction():
                        db.execute(statement.encode(), [other.project.id, KEY])
        case "with its token in Storage":
            headers = {"authorization": f"Bearer {hostile.token}", "apikey": world.plane.keys.anon_key}
            path = f"/storage/v1/object/preview-modules/{other.project.id}/{KEY}/x.0"
            async with httpx.AsyncClient(base_url=world.plane.url, trust_env=False) as http:
                for at in (path, path.replace("/object/", "/object/upload/sign/")):
                    assert not (await http.post(at, content=evil, headers=headers)).is_success
        case "over a layer that is there":
            [url] = (await other.find())["upload_urls"]
            assert (await other.send(b"mine", urls=[url])).is_success
            assert not (await put(url, evil)).is_success
            assert (await hostile.send(evil)).is_success
            assert (await other.ask("PUT", {"key": KEY, "parts": [part(evil)]})).is_success
            [only] = (await other.find())["parts"]
            assert (await read(only["url"])).content == b"mine"
            return
    found = await other.find()
    assert found["kind"] == "missing"
    assert "MODULES_KEY" not in world.environment(await world.machine(other.project))


async def test_a_shared_layer_is_read_by_all(world: World) -> None:
    first, second = await world.machine(), await world.machine()
    await first.send(b"my own")
    await share(world, b"shared")
    for machine in (first, second):
        [only] = (await machine.find())["parts"]
        assert (await read(only["url"])).content == b"shared"
    assert world.environment(await world.machine(second.project))["MODULES_KEY"] == KEY


async def share(world: World, content: bytes) -> None:
    """What `modules build` does."""
    [(module,)] = await world.sql(
        "insert into preview.modules (key, parts, size_bytes) values (%s, %s, %s) returning id",
        KEY, json.dumps([part(content)]), len(content),
    )  # fmt: skip
    answer = await world.plane.http.post(
        f"/storage/v1/object/preview-modules/shared/{KEY}/{module}.0", content=content
    )
    assert answer.is_success, answer.text


async def refused(machine: Machine, content: bytes) -> dict[str, Any]:
    answer = await machine.ask("POST", {"key": KEY, "refused": part(content)["sha256"]})
    assert answer.is_success, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_layer_that_a_machine_refuses_is_its_keys_no_more(world: World) -> None:
    """Its own project's, if it is still the one that was refused: whoever comes late drops nothing."""
    first, other = await world.machine(), await world.machine()
    for machine in (first, other):
        await machine.send(b"damaged")
    assert (await refused(first, b"another"))["kind"] == "layer"
    answer = await refused(first, b"damaged")
    assert answer["kind"] == "missing"
    assert "MODULES_KEY" not in world.environment(await world.machine(first.project))
    assert (await first.send(b"right", urls=answer["upload_urls"])).is_success
    assert (await refused(first, b"damaged"))["kind"] == "layer"
    [only] = (await first.find())["parts"]
    assert (await read(only["url"])).content == b"right"
    [hers] = (await other.find())["parts"]
    assert (await read(hers["url"])).content == b"damaged", "nobody else's"


async def test_a_shared_layer_stays_whatever_a_machine_says(world: World) -> None:
    machine = await world.machine()
    await share(world, b"shared")
    for _ in range(3):
        assert (await refused(machine, b"shared"))["kind"] == "layer"


async def test_refusing_is_bounded_by_the_day(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_layers, "A_DAY", 3)
    machine = await world.machine()
    answer, made = await machine.find(), 0
    while "upload_urls" in answer:
        assert (await machine.send(b"a layer", urls=answer["upload_urls"])).is_success
        answer, made = await refused(machine, b"a layer"), made + 1
    assert made == 3


async def test_asking_without_sending_takes_none_of_the_days(world: World) -> None:
    """Each start of a project asks for what Vite bundles ahead, which many never have."""
    machine = await world.machine()
    for _ in range(module_layers.SENDING + 1):
        answer = await machine.ask("POST", {"key": OTHER, "ahead": False, "send": False})
        assert answer.json() == {"kind": "missing", "max_bytes": 2**20}
    assert await world.sql("select * from preview.modules") == []
    assert (await machine.send(b"a layer")).is_success


async def test_what_is_not_needed_ahead_is_not_named_to_the_next_machine(world: World) -> None:
    machine = await world.machine()
    await machine.send(b"a layer")
    missing = (await machine.ask("POST", {"key": OTHER, "ahead": False})).json()
    await put(missing["upload_urls"][0], b"bundled")
    answer = await machine.ask("PUT", {"key": OTHER, "parts": [part(b"bundled")], "ahead": False})
    assert answer.is_success, answer.text
    assert (await machine.ask("POST", {"key": OTHER, "ahead": False})).json()["kind"] == "layer"
    assert world.environment(await world.machine(machine.project))["MODULES_KEY"] == KEY


async def test_uploads_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = await world.machine()
    for number in range(module_layers.SENDING):
        assert "upload_urls" in await machine.find(f"{number}" * 40)
    assert "upload_urls" not in await machine.find("f" * 40), "as many are on their way as may be"
    assert "upload_urls" in await machine.find("0" * 40), "the same again is another try"
    monkeypatch.setattr(module_layers, "A_DAY", module_layers.SENDING)
    await world.sql("update preview.modules set created_at = created_at - interval '3 hours'")
    assert "upload_urls" not in await machine.find("e" * 40), "and so many in a day"
    assert "upload_urls" in await (await world.machine()).find("e" * 40), "of one project"


async def test_no_number_of_tries_is_more_than_a_days(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was asked for again, or dropped for a newer one, may have been uploaded all the same."""
    monkeypatch.setattr(module_layers, "A_DAY", 6)
    machine = await world.machine()
    answers = [await machine.find() for _ in range(9)]
    assert sum("upload_urls" in answer for answer in answers) == 6
    assert (await (await world.machine()).send(b"a layer")).is_success
    # All at once are no more than one after the other.
    machine = await world.machine()
    at_once = await asyncio.gather(*(machine.find(f"{number:040}") for number in range(12)))
    assert sum("upload_urls" in answer for answer in at_once) == module_layers.SENDING


async def test_layers_that_made_room_count_for_the_day(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_layers, "A_DAY", 4)
    async with running_plane(database, tmp_path, modules_project_bytes=10) as plane:
        machine = await World(plane).machine()
        for number in range(4):
            assert (await machine.send(b"1234567", f"{number}" * 40)).is_success
        assert "upload_urls" not in await machine.find("e" * 40)
        assert (await machine.find("3" * 40))["kind"] == "layer"


async def test_a_layer_whose_object_is_gone_is_missing(world: World) -> None:
    machine = await world.machine()
    await machine.send(b"a layer")
    await world.sql("delete from storage.objects where bucket_id = 'preview-modules'")
    assert "MODULES_KEY" not in world.environment(await world.machine(machine.project))
    assert (await machine.send(b"again")).is_success


async def objects(world: World) -> int:
    [(count,)] = await world.sql("select count(*) from storage.objects where bucket_id = 'preview-modules'")
    return int(count)


async def test_what_nobody_uses_goes_and_its_objects_after_it(world: World) -> None:
    machine = await world.machine()
    await machine.send(b"old")
    await machine.send(b"new", OTHER)
    await world.sql("update preview.modules set used_at = used_at - interval '2 hours' where key = %s", KEY)
    await world.upkeep()
    assert await world.sql("select key from preview.modules") == [(OTHER,)]
    assert await objects(world) == 2, "somebody may be reading it"
    await world.sql("update storage.objects set created_at = created_at - interval '4 hours'")
    await world.upkeep()
    assert await objects(world) == 1
    assert (await machine.find(OTHER))["kind"] == "layer"


async def test_the_oldest_go_where_there_are_too_many(world: World) -> None:
    machine = await world.machine()
    for number, key in enumerate((KEY, OTHER)):
        await machine.send(b"123456", key)
        await world.sql(
            "update preview.modules set used_at = now() - %s * interval '1 minute' where key = %s",
            9 - number,
            key,
        )
    await world.upkeep(total=11)
    assert await world.sql("select key from preview.modules") == [(OTHER,)]


async def test_one_project_keeps_so_much(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path, modules_project_bytes=10) as plane:
        world = World(plane)
        machine, other = await world.machine(), await world.machine()
        await other.send(b"123456")
        await machine.send(b"123456")
        await world.sql("update preview.modules set used_at = used_at - interval '1 minute'")
        await machine.send(b"1234567", OTHER)
        kept = await world.sql(
            "select project_id, key from preview.modules where parts is not null order by key"
        )
        assert kept == [(other.project.id, KEY), (machine.project.id, OTHER)]


async def test_a_deleted_project_takes_its_layers_along(world: World) -> None:
    machine = await world.machine()
    await machine.send(b"a layer")
    await world.sql("delete from public.projects where id = %s", machine.project.id)
    assert await world.sql("select * from preview.modules") == []


async def test_without_a_size_none_is_taken(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path, modules_layer_bytes=0) as plane:
        machine = await World(plane).machine()
        assert await machine.find() == {"kind": "missing", "max_bytes": 0}
        assert isinstance(machine.project.id, UUID)
