"""An image is rolled out: to whom, when, and what becomes of one that does not work."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.machines.driver import MachineState
from orchestrator_stub.sessions.lifecycle import State
from orchestrator_stub.sessions.rollout import Candidate, Rollout, Stopped, plan, standing
from orchestrator_stub.sessions.shown import viewers
from tests.orchestrator.sessions.control_world import SERVICE_KEY, World, bearer, control_world, report

OLD, NEW = "preview-agent:latest", "preview-agent:2"

candidates = st.lists(
    st.builds(
        Candidate,
        id=st.uuids(),
        project_id=st.uuids(),
        state=st.sampled_from([State.REQUESTED, State.PROVISIONING, State.READY]),
        image=st.sampled_from([None, OLD, NEW]),
        image_next=st.sampled_from([None, NEW]),
        image_failed=st.sampled_from([None, None, NEW]),
        rolled=st.booleans(),
        viewers=st.none() | st.integers(0, 2),
        quiet=st.floats(0, 1000),
    ),
    unique_by=lambda each: each.id,
)


@given(candidates, st.sampled_from([0.0, 60.0]), st.integers(1, 4))
def test_only_idle_ones_are_replaced_and_so_many_at_a_time(
    found: list[Candidate], idle: float, at_once: int
) -> None:
    chosen = plan(found, NEW, idle=idle, at_once=at_once)
    marked = [each for each in found if each.id in chosen.mark]
    for each in marked:
        assert each.state is State.READY
        assert each.image != NEW
        assert each.image_failed != NEW
        assert idle == 0 or (not each.viewers and each.quiet >= idle)
    assert len(marked) + chosen.under_way <= max(at_once, chosen.under_way)
    # Every one of them is somewhere, so that none is forgotten.
    assert len(found) == sum(
        (
            chosen.have, chosen.under_way, len(chosen.mark), chosen.queued, chosen.in_use, chosen.starting, chosen.kept,
        )
    )  # fmt: skip
    assert chosen.finished == (len(found) == chosen.have + chosen.kept)


def test_viewers_are_pages_visible_or_hidden_and_unknown_where_nobody_observes() -> None:
    pages = {"visible": 1, "hidden": 2, "behind": 1}
    assert viewers({"observed": True, "shown": {"revision": 1, "pages": pages}}) == 3
    assert viewers({"observed": True, "shown": None}) == 0
    assert viewers({"observed": False, "shown": {"revision": 1, "pages": pages}}) is None
    assert (
        viewers({"observed": True, "shown": {"revision": 1, "pages": {"visible": -1, "hidden": "many"}}}) == 0
    )
    assert viewers(None) is None


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with control_world(database) as running:
        yield running


class Told:
    """A rollout, and what it said."""

    def __init__(self, world: World, image: str = NEW, **how: Any) -> None:
        self.world = world
        self.lines: list[str] = []
        self.how = {"idle": 0.0, "at_once": 4, **how}
        self.share = self.how.pop("share", 1.0)
        self.rollout = Rollout(world.pool, image, self.lines.append)

    async def begin(self) -> Told:
        await self.rollout.begin(self.share)
        return self

    async def step(self) -> bool:
        """One step, then a sweep, as the orchestrators make them."""
        done = await self.rollout.step(self.share, **self.how)
        await self.world.controller.sweep()
        return done

    async def all_ready(self) -> None:
        """Every machine that runs says that it serves."""
        for machine_id, spec in [*self.world.platform.specs.items()]:
            machine = self.world.platform.machines.get(machine_id)
            if machine is not None and machine.state is MachineState.RUNNING:
                await ready(self.world, str(spec.session_id), str(spec.project_id), spec.generation)

    async def to_the_end(self) -> None:
        for _ in range(20):
            if await self.step():
                return
            await self.all_ready()
        raise AssertionError(self.lines)


async def ready(world: World, session_id: str, project_id: str, generation: int = 1, **said: Any) -> None:
    session = {"session_id": session_id, "project_id": project_id, "generation": generation}
    answer = await report(world, session, world.token(session), **said)
    assert answer.status_code == 200, answer.text


async def ready_session(world: World, **said: Any) -> dict[str, Any]:
    session = await world.session()
    await ready(world, session["session_id"], session["project_id"], session["generation"], **said)
    return session


async def images(world: World) -> dict[str, str | None]:
    """What the machine of each session is made of, as the platform knows it."""
    return {
        str(spec.session_id): spec.image
        for spec in (world.platform.specs[m] for m in world.platform.machines)
    }


async def row(world: World, session: dict[str, Any]) -> tuple[Any, ...]:
    [found] = await world.sql(
        "select state, generation, image from preview.sessions where id = %s", UUID(session["session_id"])
    )
    return found


async def test_new_sessions_wait_for_the_trial_and_running_ones_for_them(world: World) -> None:
    first = await ready_session(world)
    told = await Told(world).begin()
    await told.step()
    early = await world.session()
    assert (await row(world, early))[2] == OLD, "nobody gets an image that was not tried"
    listed = (await world.http.get("/v1/sessions", headers=bearer(SERVICE_KEY))).json()["sessions"]
    assert {each["session_id"] for each in listed} == {first["session_id"], early["session_id"]}
    await told.all_ready()
    await told.step()
    fresh = await world.session()
    assert (await row(world, fresh))[2] == NEW
    assert (await row(world, first))[:2] == ("ready", 1), "still on its machine"
    await told.to_the_end()
    for each in (first, early):
        assert await row(world, each) == ("ready", 2, NEW)
    assert await row(world, fresh) == ("ready", 1, NEW)
    assert set((await images(world)).values()) == {NEW}
    assert len(world.platform.machines) == 3, "the trial's machine is gone"
    assert "done" in await standing(world.pool)


async def test_back_again_with_the_same_command_and_without_a_trial(world: World) -> None:
    session = await ready_session(world)
    await (await Told(world).begin()).to_the_end()
    back = await Told(world, OLD).begin()
    await back.to_the_end()
    assert await row(world, session) == ("ready", 3, OLD)
    assert not any("trying" in line for line in back.lines)
    assert (await row(world, await world.session()))[2] == OLD


async def test_a_share_is_the_same_sessions_every_time_and_grows(world: World) -> None:
    sessions = [await ready_session(world) for _ in range(12)]
    inside = {
        each["session_id"] for each in sessions if int(UUID(each["session_id"]).hex[:8], 16) / 2**32 < 0.4
    }
    await (await Told(world, share=0.4).begin()).to_the_end()
    assert {id_ for id_, image in (await images(world)).items() if image == NEW} == inside
    fresh = await world.session()
    in_share = int(UUID(fresh["session_id"]).hex[:8], 16) / 2**32 < 0.4
    assert (await row(world, fresh))[2] == (NEW if in_share else OLD)
    await ready(world, fresh["session_id"], fresh["project_id"])
    await (await Told(world).begin()).to_the_end()
    assert set((await images(world)).values()) == {NEW}
    assert {(await row(world, each))[1] for each in sessions} == {2}, "none was replaced twice"


async def test_a_bad_image_stops_at_the_trial_and_touches_nobody(world: World) -> None:
    session = await ready_session(world)
    before = dict(world.platform.machines)
    world.platform.refuse_image = NEW
    told = await Told(world).begin()
    with pytest.raises(Stopped, match=f"trial session .*machine_refused: no such image: {NEW}"):
        await told.to_the_end()
    assert world.platform.machines == before
    assert await row(world, session) == ("ready", 1, OLD)
    assert (await row(world, await world.session()))[2] == OLD
    # The same command tries again, once there is such an image.
    world.platform.refuse_image = None
    await (await Told(world).begin()).to_the_end()
    assert await row(world, session) == ("ready", 2, NEW)


@pytest.mark.parametrize("refused", [True, False], ids=["refused by the platform", "silent"])
async def test_one_that_ran_and_does_not_become_ready_stops_it_and_has_its_image_back(
    world: World, refused: bool
) -> None:
    sessions = [await ready_session(world) for _ in range(3)]
    told = await Told(world, at_once=1).begin()
    await told.step()
    await told.all_ready()
    await told.step()  # the trial was ready
    world.platform.refuse_image = NEW if refused else None
    await told.step()  # one is marked, and the sweep replaces it
    if not refused:
        await world.pass_time(world.settings.rollout_seconds + 1)
        await world.sql(
            "update preview.sessions set lease_until = now() + interval '1 hour' where state = 'ready'"
        )
        await world.controller.sweep()
    while world.controller._tasks:
        await asyncio.wait(list(world.controller._tasks.values()))
    with pytest.raises(Stopped, match=r"session .* of project .*(refused|timeout)") as stopped:
        await told.step()
    assert str(stopped.value).endswith("; its agent has said nothing")
    world.platform.refuse_image = None
    await told.all_ready()
    rows = [await row(world, each) for each in sessions]
    assert sorted(rows) == [("ready", 1, OLD), ("ready", 1, OLD), ("ready", 3, OLD)]


async def test_new_sessions_that_fail_fall_back_and_three_of_them_stop_it(world: World) -> None:
    told = await Told(world).begin()
    await told.step()  # nobody to try it beside
    assert "no session is ready to try it beside: the next new session is the first to get it" in told.lines
    world.platform.refuse_image = NEW
    for n in range(3):
        session = await world.session()
        assert (await row(world, session))[1:] == (2, OLD), n
        [(state,)] = await world.sql("select state from preview.rollout")
        assert state == ("stopped" if n == 2 else "rolling")
    assert (await row(world, await world.session()))[1:] == (1, OLD)


async def test_one_in_use_is_left_alone_until_it_is_not(world: World) -> None:
    pages = {"revision": 0, "pages": {"visible": 1, "hidden": 0, "behind": 0}}
    watched = await ready_session(world, observed=True, shown=pages)
    saving = await ready_session(world)
    await world.sql(
        "update public.project_heads set updated_at = now() - interval '1 hour' where project_id = %s",
        UUID(watched["project_id"]),
    )
    await world.write(UUID(saving["project_id"]), "a.ts", "a")
    told = await Told(world, idle=60.0).begin()
    await told.step()
    [(trial,)] = await world.sql("select trial from preview.rollout")
    [(project,)] = await world.sql("select project_id from preview.sessions where id = %s", trial)
    await ready(world, str(trial), str(project))
    for _ in range(3):
        assert not await told.step()
    assert told.lines[-1] == "0 of 2 have it, 2 wait until they are idle"
    await ready(world, watched["session_id"], watched["project_id"], observed=True, shown=None)
    await told.step()
    assert (await row(world, watched))[1:] == (2, NEW)
    assert (await row(world, saving))[1:] == (1, OLD)
    await world.sql("update public.project_heads set updated_at = now() - interval '61 seconds'")
    await told.to_the_end()
    assert await row(world, saving) == ("ready", 2, NEW)


async def test_another_rollout_takes_its_place(world: World) -> None:
    await ready_session(world)
    told = await Told(world).begin()
    await (await Told(world, "preview-agent:3").begin()).to_the_end()
    with pytest.raises(Stopped, match="preview-agent:3 has taken this one's place"):
        await told.step()


@pytest.mark.parametrize("what", ["is another", "is being tried", "has stopped", "is not there"])
async def test_a_mark_that_came_late_replaces_nothing(world: World, what: str) -> None:
    """A command on its way while another begins, or its own stops, marks sessions after the marks were taken."""
    session = await ready_session(world)
    await (await Told(world).begin()).to_the_end()
    if what == "is not there":
        await world.sql("delete from preview.rollout")
    else:
        state = {"is being tried": "trying", "has stopped": "stopped"}.get(what, "rolling")
        image = "preview-agent:4" if what == "is another" else "preview-agent:3"
        await world.sql("update preview.rollout set image = %s, state = %s", image, state)
    await world.sql("update preview.sessions set image_next = 'preview-agent:3'")
    await world.controller.sweep()
    assert await row(world, session) == ("ready", 2, NEW)
