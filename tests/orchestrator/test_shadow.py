"""SYNC_MODE=shadow at the control plane: machines are told, and the agent's silence ends nobody's work."""

from __future__ import annotations

from tests.orchestrator.http.test_routes import head_of
from tests.orchestrator.sessions.control_world import World, control_world


async def state_after(world: World, *, reported: bool, seconds: float) -> tuple[str, int]:
    """A session's state when its agent has been silent for `seconds`, and how many machines are up."""
    session = await world.session()
    if reported:
        await head_of(world, session)
    before = len(world.platform.specs)
    await world.pass_time(seconds)
    await world.controller.sweep()
    [row] = await world.sql("select state from preview.sessions where id = %s", session["session_id"])
    return str(row[0]), len(world.platform.specs) - before


async def test_machines_are_told_and_silence_ends_nothing(database: str) -> None:
    async with control_world(database, sync_mode="shadow") as world:
        session = await world.session()
        [spec] = world.platform.specs.values()
        assert spec.env["SYNC_MODE"] == "shadow"
        assert spec.env["SESSION_ID"] == session["session_id"]
        hours = 6 * 3600.0
        assert await state_after(world, reported=False, seconds=hours) == ("provisioning", 0)
    async with control_world(database, sync_mode="shadow") as world:
        assert await state_after(world, reported=True, seconds=6 * 3600.0) == ("ready", 0)


async def test_the_session_s_own_end_still_counts(database: str) -> None:
    async with control_world(database, sync_mode="shadow", session_ttl=3600) as world:
        state, _ = await state_after(world, reported=True, seconds=3601)
        assert state in ("draining", "gone")


async def test_live_it_is_as_ever(database: str) -> None:
    async with control_world(database) as world:
        state, _ = await state_after(world, reported=True, seconds=world.settings.lease_seconds + 1)
        assert state in ("draining", "failed")
