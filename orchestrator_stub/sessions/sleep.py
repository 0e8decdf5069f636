"""Puts sessions' machines to sleep and wakes them, in an order that survives a kill between any two steps.

    suspend    the row says `suspended`, then the machine is frozen; the next sweep freezes one that still runs
    wake       the row says that it wakes, then the machine is resumed; one whose agent does not say within
               `Timing.wake` that all is right is replaced by the next generation

A claim keeps a wake from overtaking the suspension that is under way.
"""

from __future__ import annotations

import asyncio
from typing import Final, LiteralString
from uuid import UUID

import structlog
from psycopg.types.json import Jsonb

from orchestrator_stub.machines.driver import MachineDriver, MachineError, MachineRefused, MachineUnavailable
from orchestrator_stub.sessions.lifecycle import Event, Session, State, moves
from orchestrator_stub.sessions.store import SessionStore

log = structlog.get_logger("sleep")

CLAIM_WAIT: Final = 10.0
"""Seconds that a wake waits for another's step on the session: above a driver's suspension, below a request's time."""

RETRY: Final = 0.05
"""Seconds between two tries at a claim."""

SUSPEND: Final[LiteralString] = """
update preview.sessions set state = %(suspend)s ->> state, state_since = now(), lease_until = null,
  claimed_by = %(by)s, claimed_until = now() + %(seconds)s * interval '1 second'
where id = %(id)s and %(suspend)s ? state and machine_id is not null
  and (claimed_until is null or claimed_until <= now() or claimed_by = %(by)s)
"""
CLAIM_ASLEEP: Final[LiteralString] = """
update preview.sessions set claimed_by = %(by)s, claimed_until = now() + %(seconds)s * interval '1 second'
where id = %(id)s and state = 'suspended' and machine_id is not null
  and (claimed_until is null or claimed_until <= now() or claimed_by = %(by)s)
"""
AWAKE_AFTER_ALL: Final[LiteralString] = """
update preview.sessions set state = 'ready', state_since = now(), claimed_until = null
where id = %(id)s and state = 'suspended' and claimed_by = %(by)s
"""
WAKE: Final[LiteralString] = """
update preview.sessions set state = %(wake)s ->> state, state_since = now(), woken_at = now(), problem = null,
  claimed_by = %(by)s, claimed_until = now() + %(seconds)s * interval '1 second'
where id = %(id)s and %(wake)s ? state
  and (claimed_until is null or claimed_until <= now() or claimed_by = %(by)s)
"""
UNLOADED: Final[LiteralString] = """
update preview.sessions set claimed_until = null, machine_id = null, machine_driver = null, machine_region = null,
  preview_url = null, health_url = null
where id = %(id)s and state = 'suspended' and claimed_by = %(by)s
"""
RENEW: Final[LiteralString] = """
update preview.sessions set generation = generation + 1, state_since = now(), woken_at = null, lease_until = null,
  machine_id = null, machine_driver = null, machine_region = null, preview_url = null, health_url = null,
  image = null, image_before = null, image_next = null,
  claimed_by = %(by)s, claimed_until = now() + %(seconds)s * interval '1 second'
where id = %(id)s and state = 'provisioning' and woken_at is not null
  and (claimed_until is null or claimed_until <= now() or claimed_by = %(by)s)
"""
MOVES: Final = {"suspend": Jsonb(moves(Event.SUSPEND)), "wake": Jsonb(moves(Event.WAKE))}
IDLE: Final[LiteralString] = """
select s.id from preview.sessions s join public.project_heads h using (project_id)
where s.state = 'ready' and s.status ->> 'observed' = 'true' and not s.trial
and greatest(s.state_since, s.viewed_at, h.updated_at) < now() - %(seconds)s * interval '1 second'
"""
"""Nobody had the page open and nothing was saved for so long. Where nobody observes the pages, who knows?"""
SAVED: Final[LiteralString] = """
select s.id from preview.sessions s join public.project_heads h using (project_id)
where s.state = 'suspended' and h.updated_at > s.state_since
"""
WANTED: Final[LiteralString] = """
select s.id from preview.sessions s where s.state = 'suspended' and s.wake_wanted_at > s.state_since
"""


class Sleep:
    """The steps of one orchestrator, whose claims are signed `by` and last `seconds`."""

    def __init__(self, store: SessionStore, driver: MachineDriver, *, by: str, seconds: float) -> None:
        self._store = store
        self._driver = driver
        self._by = by
        self._seconds = seconds

    async def suspend(self, session_id: UUID) -> bool:
        """Put a ready session's machine to sleep; whether this was what did it.

        Raises `MachineRefused`: it cannot sleep and is ready as before; another `MachineError`: a sweep tries again.
        """
        try:
            slept = await self._asleep(await self._change(SUSPEND, session_id))
        except MachineRefused:
            await self._change(AWAKE_AFTER_ALL, session_id)
            raise
        if slept:
            log.info("session.suspended", session_id=str(session_id))
        return slept

    async def suspend_again(self, session_id: UUID) -> None:
        """Freeze the machine of a session that sleeps already. Raises `MachineError`."""
        await self._asleep(await self._change(CLAIM_ASLEEP, session_id))

    async def wake(self, session_id: UUID) -> tuple[Session | None, bool]:
        """Wake a session's machine.

        Returns:
            The session, in whatever state it is now; and whether it is this one's to give another machine, because the
            one it had is gone, ended, or is to be replaced anyway.

        Raises `MachineUnavailable`: another orchestrator is still putting it to sleep.
        """
        try:
            async with asyncio.timeout(CLAIM_WAIT):
                while (woken := await self._change(WAKE, session_id)) is None:
                    session = await self._store.get(session_id)
                    if session is None or session.state is not State.SUSPENDED:
                        return session, False
                    await asyncio.sleep(RETRY)
        except TimeoutError:
            raise MachineUnavailable("the session is still being put to sleep", RETRY) from None
        if woken.machine_id is None or woken.image_next is not None:
            return woken, True
        try:
            async with asyncio.timeout(self._seconds):
                runs = await self._driver.resume(woken.machine_id)
        except (MachineError, OSError) as error:
            log.warning("session.not_woken", session_id=str(session_id), reason=str(error))
            runs = False
        if runs:
            await self._store.release(session_id, by=self._by, problem=None)
        return woken, not runs

    async def renew(self, session_id: UUID) -> Session | None:
        """Begin the next generation of a session whose machine does not wake. None: it is not waking any more."""
        return await self._change(RENEW, session_id)

    async def claim_to_unload(self, session_id: UUID) -> bool:
        """Claim a session whose machine slept too long, to destroy that."""
        return await self._change(CLAIM_ASLEEP, session_id) is not None

    async def unloaded(self, session_id: UUID) -> None:
        """Note that a sleeping session has no machine any more: its wake makes another."""
        await self._change(UNLOADED, session_id)

    async def idle(self, seconds: float) -> list[UUID]:
        """The ready sessions that nobody looked at and nobody saved to for so long."""
        return await self._store.ids(IDLE, {"seconds": seconds})

    async def saved(self) -> list[UUID]:
        """The sleeping sessions whose project was saved meanwhile."""
        return await self._store.ids(SAVED, {})

    async def wanted(self) -> list[UUID]:
        """The sleeping sessions that a door had somebody for."""
        return await self._store.ids(WANTED, {})

    async def _asleep(self, session: Session | None) -> bool:
        if session is None or session.machine_id is None:
            return False
        try:
            async with asyncio.timeout(self._seconds):
                await self._driver.suspend(session.machine_id)
        finally:
            await self._store.release(session.id, by=self._by, problem=None)
        return True

    async def _change(self, statement: LiteralString, session_id: UUID) -> Session | None:
        values = {"id": session_id, "by": self._by, "seconds": self._seconds, **MOVES}
        return await self._store.change(statement, values)
