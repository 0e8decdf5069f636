"""Puts sessions' machines to sleep and wakes them, in an order that survives a kill between any two steps.

    suspend    the row says `suspended`, then the machine is frozen; the next sweep freezes one that still runs
    wake       the row says that it wakes, then the machine is resumed; one whose agent does not say within
               `Timing.wake` that all is right is replaced by the next generation

A claim keeps a wake from overtaking the suspension that is under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, LiteralString, Protocol
from uuid import UUID

import structlog
from psycopg.types.json import Jsonb

from orchestrator_stub.config import Settings
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


Step = Callable[[], Awaitable[object]]
"""One thing to do about one session or machine, begun when a slot is free."""


class Start(Protocol):
    """Begins a step of a session in the background, unless that very step is under way."""

    def __call__(self, what: str, session_id: UUID, step: Callable[[UUID], Awaitable[object]]) -> None: ...


class Sleep:
    """The steps of one orchestrator.

    Args:
        by: Signs its claims, which last `Settings.claim_seconds`.
        start: Begins a step in the background.
        provision: Makes a session's machine.
        destroy: Ends all machines of a session. Raises `MachineError`.
        on_suspend: Told of each machine that was put to sleep.
    """

    def __init__(
        self,
        store: SessionStore,
        driver: MachineDriver,
        settings: Settings,
        *,
        by: str,
        start: Start,
        provision: Callable[[UUID], Awaitable[None]],
        destroy: Callable[[UUID], Awaitable[None]],
        on_suspend: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = store
        self._driver = driver
        self._settings = settings
        self._by = by
        self._seconds = settings.claim_seconds
        self._start = start
        self._provision = provision
        self._destroy = destroy
        self._on_suspend = on_suspend

    async def suspend(self, session_id: UUID) -> Session | None:
        """Put a ready session's machine to sleep; the session as it is then.

        Raises `MachineRefused`: it cannot sleep and is ready as before; another `MachineError`: a sweep tries again.
        """
        try:
            slept = await self._asleep(await self._change(SUSPEND, session_id))
        except MachineRefused:
            await self._change(AWAKE_AFTER_ALL, session_id)
            raise
        if slept:
            log.info("session.suspended", session_id=str(session_id))
            self._on_suspend()
        return await self._store.get(session_id)

    async def suspend_again(self, session_id: UUID) -> None:
        """Freeze the machine of a session that sleeps already. Raises `MachineError`."""
        await self._asleep(await self._change(CLAIM_ASLEEP, session_id))

    async def wake(self, session_id: UUID) -> Session | None:
        """Wake a sleeping session; in any other state, and for any number of callers at once, this changes nothing.

        Returns:
            The session as it is then: `provisioning` until its agent says that it serves what the database has, with
            the machine it had or another that is being made. None: there is no such session.

        Raises:
            MachineUnavailable: It is still being put to sleep; ask again.
        """
        session, renew = await self._woken(session_id)
        if renew:
            self._start("renew", session_id, self.renew)
        return session

    def wake_soon(self, session_id: UUID) -> None:
        """Wake a sleeping session, without waiting for it."""
        self._start("wake", session_id, self.wake)

    async def renew(self, session_id: UUID) -> None:
        """Give a session whose machine does not wake the next generation of one."""
        if await self._change(RENEW, session_id) is not None:
            log.warning("session.woken_anew", session_id=str(session_id))
            await self._provision(session_id)

    def woke_cold(self, session: Session) -> None:
        """Its machine says that it began anew instead of going on."""
        self._start("renew", session.id, self.renew)

    async def unload(self, session_id: UUID) -> None:
        """Destroy the machine of a session that slept too long; the session sleeps on, and its wake makes another."""
        if await self._change(CLAIM_ASLEEP, session_id) is not None:
            async with asyncio.timeout(self._seconds):  # later it may have been woken
                await self._destroy(session_id)
            await self._change(UNLOADED, session_id)

    async def due(self) -> list[Step]:
        """Who is to sleep, and who to wake."""
        due: list[Step] = []
        if seconds := self._settings.idle_suspend_seconds:
            idle = await self._store.ids(IDLE, {"seconds": seconds})
            due.extend(partial(self.suspend, session_id) for session_id in idle)
        due.extend(partial(self.wake, session_id) for session_id in await self._store.ids(WANTED, {}))
        if self._settings.wake_on_save:
            due.extend(partial(self.wake, session_id) for session_id in await self._store.ids(SAVED, {}))
        return due

    async def _woken(self, session_id: UUID) -> tuple[Session | None, bool]:
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
