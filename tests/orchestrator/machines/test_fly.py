"""The fly driver against a Machines API with a memory, its faults and its limits; time is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any
from uuid import UUID

import httpx
import pytest
import respx
from hypothesis import given
from hypothesis import strategies as st

from agent.replay.simulated_clock import simulate
from orchestrator_stub.machines.driver import (
    Machine,
    MachineRefused,
    MachineState,
    MachineUnavailable,
    machine_name,
    mark_of,
)
from orchestrator_stub.machines.fly import FlyMachines, FlyShape, machine_request
from orchestrator_stub.machines.fly_api import Buckets, Conflict, FlyApi, Rate
from orchestrator_stub.machines.fly_apps import FlyApps, app_of
from tests.agent.loops import STALL, longest_turn
from tests.fakes.fly import APP, DOCUMENT, TOKEN, Fly
from tests.fakes.openapi import OpenApi
from tests.orchestrator.machines.driver_contract import DriverContract, spec_for

SHAPE = FlyShape(app=APP, image="registry.fly.io/previews:v1")
URL = "http://fly.invalid/v1"


def driver_for(fly: Fly, token: str = TOKEN) -> FlyMachines:
    http = httpx.AsyncClient(transport=fly.transport())
    buckets = Buckets(clock=fly.clock, sleep=fly.sleep)
    return FlyMachines(FlyApi(URL, APP, token, http, buckets=buckets, sleep=fly.sleep), SHAPE, http)


def api_of(driver: FlyMachines) -> FlyApi:
    return driver._api


def on_fly(test: Callable[[Fly, FlyMachines], Awaitable[Any]], **shape: Any) -> Fly:
    """Run `test` in simulated time, against a platform whose limits are Fly's. No request may be invalid."""

    async def main() -> Fly:
        fly = Fly(clock=asyncio.get_running_loop().time, latency=0.05, **shape)
        driver = driver_for(fly)
        await test(fly, driver)
        await driver.close()
        return fly

    fly = simulate(main())
    assert fly.invalid == []
    return fly


class TestFly(DriverContract):
    @pytest.fixture
    async def driver(self) -> AsyncIterator[FlyMachines]:
        fly = Fly(per_second=1000, burst=1000)
        made = driver_for(fly)
        yield made
        assert fly.invalid == []
        await made.close()


def test_the_document_is_held_against_the_requests() -> None:
    if not DOCUMENT.exists():
        pytest.skip("Fly's OpenAPI document is not beside the checkout")
    document = OpenApi(DOCUMENT)
    path = f"/apps/{APP}/machines"
    request = machine_request(spec_for(), SHAPE)
    assert document.problems("POST", path, request) == []
    request["config"]["stop_config"]["timeout"] = 5
    request["config"]["restart"]["polcy"] = "no"
    request["config"]["guest"]["cpus"] = "1"
    request["nmae"] = "x"
    assert len(document.problems("POST", path, request)) == 4


def test_what_a_machine_is_made_of() -> None:
    assert machine_request(spec_for(), SHAPE)["config"]["image"] == SHAPE.image
    assert machine_request(replace(spec_for(), image="i:2"), SHAPE)["config"]["image"] == "i:2"
    request = machine_request(spec_for(SNAPSHOT_URL="https://s.invalid"), SHAPE)
    config = request["config"]
    assert config["auto_destroy"] is True
    assert config["restart"] == {"policy": "on-failure", "max_retries": 10}
    assert config["stop_config"]["timeout"] == "5s", "a bare number would be nanoseconds"
    assert config["metrics"] == {"port": 9464, "path": "/metrics"}
    assert config["guest"]["memory_mb"] % 256 == 0
    assert "session" not in str(config["metrics"])


@pytest.mark.parametrize(
    "env",
    [
        {"SUPABASE_SERVICE_ROLE_KEY": "x"},
        {"INNOCENT": "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.c2ln"},
        {"INNOCENT": "sb_secret_abc"},
    ],
)
def test_no_machine_is_given_a_key_that_may_do_everything(env: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="service-role"):
        spec_for(**env)


def test_a_reply_that_is_lost_after_the_machine_was_made_makes_no_twin() -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        fly.script = ["lost"]
        spec = spec_for()
        machine = await driver.create(spec)
        assert [m["id"] for m in fly.live()] == [machine.id]
        assert [action for action, _ in fly.asked] == ["create", "create", "list"]

    on_fly(test)


def test_adopting_starts_what_stands_still() -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        spec = spec_for()
        machine = await driver.create(spec)
        await api_of(driver).stop(machine.id)
        adopted = await driver.create(spec)
        assert adopted.id == machine.id
        assert fly.machines[machine.id]["state"] == "started"

    on_fly(test)


def test_one_on_its_way_to_sleep_is_woken_once_it_is_there() -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        machine = await driver.create(spec_for())
        fly.machines[machine.id]["state"] = "suspending"

        async def sleep_at_last() -> None:
            await asyncio.sleep(3)
            fly.machines[machine.id]["state"] = "suspended"

        sleeping = asyncio.create_task(sleep_at_last())
        assert await driver.resume(machine.id)
        await sleeping
        assert fly.machines[machine.id]["state"] == "started"
        assert [action for action, _ in fly.asked] == ["create", "get", "wait", "get", "start"]

    on_fly(test)


def test_one_that_stopped_instead_of_sleeping_is_not_started_cold() -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        machine = await driver.create(spec_for())
        await api_of(driver).stop(machine.id)
        assert not await driver.resume(machine.id)
        assert fly.machines[machine.id]["state"] == "stopped"

    on_fly(test)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_what_passes_is_tried_again(status: int) -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        fly.script = [status, status]
        await driver.create(spec_for())
        assert len(fly.live()) == 1

    on_fly(test)


def test_what_does_not_pass_is_given_up_and_says_so() -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        fly.script = [503] * 20
        with pytest.raises(MachineUnavailable, match="503"):
            await driver.create(spec_for())
        assert len(fly.asked) == 5

    on_fly(test)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_is_refused_is_not_tried_again(status: int) -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        fly.script = [status]
        with pytest.raises(MachineRefused):
            await driver.create(spec_for())
        assert len(fly.asked) == 1

    on_fly(test)


@pytest.mark.parametrize("status", [412, 422])
def test_a_full_region_is_no_refusal(status: int) -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        fly.full_is = status
        fly.script = ["full"]
        with pytest.raises(MachineUnavailable, match="insufficient memory"):
            await driver.create(spec_for())
        await driver.create(spec_for())

    on_fly(test)


@pytest.mark.parametrize("status", [409, 412])
def test_a_conflict_over_a_name_that_nobody_has_is_for_later(status: int) -> None:
    """The machine of that name is on its way out, or a precondition did not hold: the next sweep asks again."""

    async def test(fly: Fly, driver: FlyMachines) -> None:
        fly.script = [status]
        with pytest.raises(MachineUnavailable):
            await driver.create(spec_for())
        assert [action for action, _ in fly.asked] == ["create", "list"]

    on_fly(test)


def test_a_bad_token_is_refused_without_being_told() -> None:
    async def main() -> None:
        fly = Fly(clock=asyncio.get_running_loop().time)
        driver = driver_for(fly, token="fo1_a-wrong-one")
        with pytest.raises(MachineRefused) as caught:
            await driver.create(spec_for())
        assert "fo1_" not in str(caught.value)

    simulate(main())


def test_a_leased_machine_is_left_to_its_holder() -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        machine = await driver.create(spec_for())
        api = api_of(driver)
        nonce = await api.lease(machine.id, ttl=30)
        assert await api.lease(machine.id, ttl=60, nonce=nonce) == nonce
        with pytest.raises(Conflict):
            await api.lease(machine.id, ttl=30)
        with pytest.raises(MachineUnavailable, match="leased"):
            await driver.destroy(machine.id)
        await api.release(machine.id, nonce)
        await api.release(machine.id, nonce)
        await driver.destroy(machine.id)
        assert not fly.live()

    on_fly(test)


def test_suspend_start_wait_and_metadata() -> None:
    async def test(fly: Fly, driver: FlyMachines) -> None:
        machine = await driver.create(spec_for())
        api = api_of(driver)
        assert not await api.wait(machine.id, "started", timeout=1), "it takes three seconds"
        assert await api.wait(machine.id, "started", timeout=30)
        await api.suspend(machine.id)
        seen = await driver.inspect(machine.id)
        assert seen is not None
        assert seen.state is MachineState.SUSPENDED
        await api.start(machine.id)
        await api.set_metadata(machine.id, "note", "kept")
        assert fly.machines[machine.id]["config"]["metadata"]["note"] == "kept"

    on_fly(test, start_seconds=3.0)


def test_fifty_machines_at_once_never_pass_the_limits() -> None:
    """At one creation a second they take the better part of a minute, and not one 429 is seen."""

    async def test(fly: Fly, driver: FlyMachines) -> None:
        started = fly.clock()
        machines = await asyncio.gather(*(driver.create(spec_for()) for _ in range(50)))
        assert len({machine.id for machine in machines}) == 50
        assert 45 < fly.clock() - started < 60
        await asyncio.gather(*(driver.list() for _ in range(30)))
        await asyncio.gather(*(driver.destroy(machine.id) for machine in machines))

    fly = on_fly(test)
    assert fly.answers[429] == 0
    assert sum(action == "list" for action, _ in fly.asked) == 2, "those who ask at once share an answer"


def test_a_bucket_gives_a_burst_and_then_its_rate() -> None:
    async def main() -> list[float]:
        clock = asyncio.get_running_loop().time
        buckets = Buckets(clock=clock)
        taken = []

        async def take() -> None:
            await buckets.take("create", "app", Rate(2.0, 3))
            taken.append(clock())

        await asyncio.gather(*(take() for _ in range(6)))
        await buckets.take("create", "another app", Rate(2.0, 3))
        return taken

    assert simulate(main()) == [0, 0, 0, 0.5, 1.0, 1.5]


@respx.mock
async def test_junk_from_the_platform_is_a_fault_of_the_platform() -> None:
    async def no_wait(_: float) -> None:
        pass

    async with httpx.AsyncClient() as http:
        api = FlyApi(URL, APP, TOKEN, http, sleep=no_wait)
        route = respx.post(f"{URL}/apps/{APP}/machines")
        for answer in (
            httpx.Response(200, text="<html>"),
            httpx.Response(200, json=[]),
            httpx.ConnectError(""),
        ):
            route.side_effect = [answer] * 5
            with pytest.raises(MachineUnavailable):
                await api.create({"name": "x"})
        listing = respx.get(f"{URL}/apps/{APP}/machines")
        for junk in ({"machines": []}, [{"name": "without an id"}], ["x"]):
            listing.side_effect = [httpx.Response(200, json=junk)]
            with pytest.raises(MachineUnavailable):
                await api.list()
        route.side_effect = [
            httpx.Response(429, headers={"retry-after": "soon"}), httpx.Response(200, json={"id": "m"}),
        ]  # fmt: skip
        assert (await api.create({"name": "x"}))["id"] == "m"


def test_retry_after_is_obeyed() -> None:
    waits: list[float] = []

    async def main() -> None:
        async def note(seconds: float) -> None:
            waits.append(seconds)

        with respx.mock:
            respx.post(f"{URL}/apps/{APP}/machines").side_effect = [
                httpx.Response(429, headers={"retry-after": "20"}),
                httpx.Response(200, json={"id": "m"}),
            ]
            async with httpx.AsyncClient() as http:
                await FlyApi(URL, APP, TOKEN, http, buckets=Buckets(), sleep=note).create({"name": "x"})

    asyncio.run(main())
    assert waits[0] >= 20


class Apps(httpx.AsyncBaseTransport):
    """Several apps behind one address."""

    def __init__(self, *apps: Fly) -> None:
        self.apps = {app.name: app for app in apps}
        self._ways = {name: app.transport() for name, app in self.apps.items()}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return await self._ways[request.url.path.split("/")[3]].handle_async_request(request)


def driver_for_apps(apps: Apps, *names: str) -> FlyApps:
    http = httpx.AsyncClient(transport=apps)

    def one(name: str) -> FlyMachines:
        fly = apps.apps[name]
        buckets = Buckets(clock=fly.clock, sleep=fly.sleep)
        api = FlyApi(URL, name, TOKEN, http, buckets=buckets, sleep=fly.sleep)
        return FlyMachines(api, replace(SHAPE, app=name))

    return FlyApps({name: one(name) for name in names or apps.apps})


class TestFlyApps(DriverContract):
    @pytest.fixture
    async def driver(self) -> AsyncIterator[FlyApps]:
        apps = Apps(*(Fly(per_second=1000, burst=1000, name=name) for name in ("a", "b", "c")))
        made = driver_for_apps(apps)
        yield made
        assert all(fly.invalid == [] for fly in apps.apps.values())
        await made.close()


@given(
    st.lists(st.uuids(), min_size=1, max_size=50),
    st.lists(st.text("abcdef", min_size=1), min_size=1, unique=True),
)
def test_an_app_more_takes_sessions_from_the_others_and_moves_no_other(
    sessions: list[UUID], apps: list[str]
) -> None:
    for session in sessions:
        before, after = app_of(session, apps), app_of(session, [*reversed(apps), "new"])
        assert before in apps
        assert after in (before, "new")


def test_three_apps_make_machines_three_times_as_fast_each_within_its_own_limit() -> None:
    async def main() -> None:
        clock = asyncio.get_running_loop().time
        apps = Apps(*(Fly(clock=clock, latency=0.05, name=name) for name in ("a", "b", "c")))
        driver = driver_for_apps(apps)
        specs = [spec_for() for _ in range(60)]
        started = clock()
        machines = await asyncio.gather(*map(driver.create, specs))
        shares = [len(fly.live()) for fly in apps.apps.values()]
        assert sum(shares) == 60
        assert min(shares) > 8, shares
        assert clock() - started < max(shares)
        assert all(fly.answers[429] == 0 for fly in apps.apps.values())
        again = await asyncio.gather(*map(driver.create, specs))
        assert [m.id for m in again] == [m.id for m in machines], "adopted where they are"
        assert {m.id for m in await driver.list()} == {m.id for m in machines}
        # An orchestrator that starts now, with an app more and in another order, finds each of them.
        apps.apps["d"] = Fly(clock=clock, name="d")
        apps = Apps(*apps.apps.values())
        other = driver_for_apps(apps, "d", "c", "b", "a")
        for spec, machine in list(zip(specs, machines, strict=True))[::10]:
            assert await other.inspect(machine.id) is not None
            assert [m.id for m in await other.find(spec.session_id)] == [machine.id]
            await other.destroy(machine.id)
            assert await other.inspect(machine.id) is None
        await other.destroy("nowhere")
        assert sum(len(fly.live()) for fly in apps.apps.values()) == 54
        apps.apps["b"].script = [500] * 20
        with pytest.raises(MachineUnavailable):
            await other.list()  # what is not listed would be taken for gone

    simulate(main())


def test_an_app_that_asks_for_a_rest_keeps_no_turn_of_the_others() -> None:
    """One creation waits for it; the others of that app are told at once when to come again."""

    async def main() -> None:
        clock = asyncio.get_running_loop().time
        limited = httpx.Response(429, headers={"retry-after": "30"})
        with respx.mock:
            respx.post(f"{URL}/apps/full/machines").side_effect = [
                limited,
                httpx.Response(200, json={"id": "m"}),
            ]
            respx.post(f"{URL}/apps/free/machines").respond(json={"id": "n"})
            async with httpx.AsyncClient() as http:
                full, free = (
                    FlyApi(URL, app, TOKEN, http, buckets=Buckets(clock=clock)) for app in ("full", "free")
                )
                first = asyncio.create_task(full.create({"name": "x"}))
                await asyncio.sleep(1)
                with pytest.raises(MachineUnavailable, match="rest") as refused:
                    await full.create({"name": "y"})
                assert 25 < (refused.value.retry_after or 0) <= 30
                assert (await free.create({"name": "z"}))["id"] == "n"
                assert clock() < 2
                assert (await first)["id"] == "m"
                assert clock() >= 30

    simulate(main())


async def test_ten_thousand_machines_of_an_app_are_listed_in_pieces() -> None:
    fly = Fly(per_second=1000, burst=1000)
    spec = spec_for()
    for n in range(10_000):
        name = machine_name(mark_of(spec.installation), UUID(int=n), 1)
        fly.machines[f"{n:014x}"] = {
            "id": f"{n:014x}", "name": name, "state": "started", "region": "ams", "config": {"env": {"A": "x" * 500}},
            "created_at": "2026-11-30T00:00:00Z",
        }  # fmt: skip
    async with httpx.AsyncClient(transport=fly.transport()) as http:
        answer = await http.get(
            f"{URL}/apps/{APP}/machines?summary=true", headers={"authorization": f"Bearer {TOKEN}"}
        )
    found: list[Machine] = []
    kept = httpx.AsyncClient(
        transport=httpx.MockTransport(lambda _: httpx.Response(200, content=answer.content))
    )
    driver = FlyMachines(FlyApi(URL, APP, TOKEN, kept), SHAPE, kept)

    async def listing() -> None:
        found.extend(await driver.list())
        found.extend(await driver.find(UUID(int=77)))
        await driver.close()

    held = await asyncio.to_thread(longest_turn, listing)
    print(f"loop held for {held * 1000:.1f} ms at most, {len(answer.content) / 1e6:.1f} MB")
    assert len(found) == 10_001
    assert len(answer.content) < 3_000_000
    assert held < STALL
