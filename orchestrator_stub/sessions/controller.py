"""Makes a session's machine, ends it, and sweeps: retries, expires and destroys what others left undone.

All state is in PostgreSQL and on the machine platform, so any number of orchestrators may run this, and any of them may
be killed between any two lines. The order of steps makes that safe:

    the row exists before its machine is made       so a machine of ours without a row is an orphan, and is swept
    a claim is taken before a platform is called     so two orchestrators do not work on one session
    the machine's name follows from the row          so making it again finds the first one
    its name says which database has the row         so another installation on the platform leaves it alone
    the row is ended only when the machine is gone   so a machine is never forgotten
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Final, Protocol
from uuid import UUID, uuid4

import psycopg
import structlog

from orchestrator_stub.config import Settings
from orchestrator_stub.machines.driver import (
    Installation,
    Machine,
    MachineDriver,
    MachineError,
    MachineRefused,
    MachineSpec,
    MachineState,
    machine_name,
    owner_of,
)
from orchestrator_stub.modules.layers import ModuleLayers
from orchestrator_stub.platform.storage import StorageFailure
from orchestrator_stub.platform.tokens import CannotSign, Keyring, mint_session
from orchestrator_stub.relay.accounts import MachineNats
from orchestrator_stub.sessions.due import Due
from orchestrator_stub.sessions.lifecycle import LIVE, Action, Event, Judgement, Session, State
from orchestrator_stub.sessions.rollout import ROLL
from orchestrator_stub.sessions.run_settings import RunSettings
from orchestrator_stub.sessions.sleep import Sleep, Step
from orchestrator_stub.sessions.store import Asker, SessionStore
from orchestrator_stub.snapshots.model import SnapshotSource, SnapshotUnavailable

log = structlog.get_logger("session_controller")

AT_ONCE: Final = 16
"""Machines made or ended at the same time by one orchestrator; the platform's own rate limit is the driver's."""


class TemplateRefused(Exception):
    """The template holds what a project may not; trying again cannot help."""


class ProjectTemplate(Protocol):
    """Fills a new project."""

    async def apply(self, project_id: UUID) -> bool:
        """Write the files into a project that never had a commit. Safe to repeat. Raises `TemplateRefused`."""
        ...


class SessionController:
    """Takes the steps of `lifecycle` for one orchestrator.

    Args:
        clock: Gives Unix seconds.
        name: Signs this orchestrator's claims; unique among those of one database.
        on_part: Told the seconds of each part of making a machine: replace, template, snapshot, modules, token,
            machine.
        on_suspend: Told of each machine that was put to sleep.
    """

    def __init__(
        self,
        settings: Settings,
        store: SessionStore,
        snapshots: SnapshotSource,
        driver: MachineDriver,
        keys: Keyring,
        *,
        runs: RunSettings,
        installation: Installation,
        template: ProjectTemplate | None = None,
        layers: ModuleLayers | None = None,
        clock: Callable[[], float] = time.time,
        name: str | None = None,
        on_part: Callable[[str, float], None] = lambda part, seconds: None,
        on_suspend: Callable[[], None] = lambda: None,
        nats: MachineNats | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._snapshots = snapshots
        self._driver = driver
        self._keys = keys
        self._installation = installation
        self._runs = runs
        self._template = template
        self._layers = layers
        self._clock = clock
        self._on_part = on_part
        self.nats = nats
        """How machines reach NATS; None: they do not."""
        self._name = name or f"orchestrator-{uuid4().hex[:12]}"
        self.sleep = Sleep(
            store, driver, settings, by=self._name, start=self._start, provision=self.provision,
            destroy=self._destroy, on_suspend=on_suspend,
        )  # fmt: skip
        self._due = Due(store, settings.timing, installation.mark)
        self._tasks: dict[tuple[str, UUID], asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self.swept_at = 0.0
        """Unix seconds of the last sweep that was ours and came to its end."""

    async def request(
        self,
        project_id: UUID,
        *,
        key: str | None,
        generation: int | None,
        ttl: float,
        user: str | None = None,
        run: Mapping[str, object] | None = None,
    ) -> tuple[Session, bool]:
        """The session for this request, and whether it is new. Its machine is being made when this returns.

        The same `key` gives the same session of the project. A `generation` above the session's replaces its machine.
        `user` asks with a token of their own; None: the service does. Raises `ProjectUnknown`, `TooManySessions`.
        """
        limits = self._settings
        asker = Asker(user, limits.user_sessions, limits.project_sessions) if user else None
        session, new = await self._store.create(
            project_id, key=key, generation=generation or 1, ttl=ttl, asker=asker, run=run
        )
        if not new and generation and generation > session.generation:
            session = await self._store.replace(session, generation, ttl=ttl, asker=asker) or session
        if session.state in LIVE and session.machine_id is None:
            self._start("provision", session.id, self.provision)
        return session, new

    async def settled(self, session_id: UUID, within: float) -> Session | None:
        """The session once its machine is made, or as it stands after `within` seconds."""
        task = self._tasks.get(("provision", session_id))
        if task is not None:
            await asyncio.wait([task], timeout=within)
        return await self._store.get(session_id)

    async def provision(self, session_id: UUID) -> None:
        """Make the session's machine, if it is wanted and no other orchestrator has claimed it."""
        session = await self._store.claim(
            session_id, by=self._name, seconds=self._settings.claim_seconds, event=Event.TAKE_UP
        )
        if session is None:
            return
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._settings.claim_seconds):
                if session.generation > 1:
                    with self._part("replace"):
                        await self._destroy_older(session)
                spec = await self._spec(session)
                with self._part("machine"):
                    machine = await self._driver.create(spec)
        except MachineRefused as error:
            log.error("session.refused", session_id=str(session_id), reason=str(error))
            await self._fail(session_id, problem=f"machine_refused: {error}")
            return
        except TemplateRefused as error:
            log.error("session.refused", session_id=str(session_id), reason=str(error))
            await self._fail(session_id, problem=f"template_refused: {error}")
            return
        except (
            MachineError,
            SnapshotUnavailable,
            StorageFailure,
            CannotSign,
            psycopg.OperationalError,
            OSError,
        ) as error:
            reason = str(error) or type(error).__name__
            log.warning("session.not_yet", session_id=str(session_id), reason=reason)
            await self._store.release(session_id, by=self._name, problem=f"provisioning: {reason}")
            return
        kept = await self._store.machine_made(session_id, session.generation, machine)
        if kept is None:
            log.info("machine.unwanted", session_id=str(session_id), machine=machine.name)
            await self._driver.destroy(machine.id)
            # A newer generation was asked for meanwhile, or nothing is wanted any more: `claim` knows.
            await self.provision(session_id)
            return
        log.info(
            "machine.made",
            session_id=str(session_id),
            machine=machine.name,
            seconds=round(time.monotonic() - started, 3),
        )

    async def _fail(self, session_id: UUID, problem: str) -> None:
        """End it, or make its machine of the former image."""
        if await self._falls_back(session_id, problem):
            await self.provision(session_id)
        else:
            await self.end(session_id, problem=problem)

    async def _falls_back(self, session_id: UUID, problem: str) -> bool:
        if not await self._store.fall_back(session_id, problem):
            return False
        log.warning("session.fell_back", session_id=str(session_id), reason=problem)
        return True

    async def roll(self, session_id: UUID) -> None:
        """Replace the session's machine by one of the image that a rollout wants it to have."""
        session = await self._store.change(ROLL, {"id": session_id, "standard": self._settings.agent_image})
        if session is not None:
            log.info(
                "session.rolled",
                session_id=str(session_id),
                generation=session.generation,
                image=session.image,
            )
            await self.provision(session_id)

    async def end(self, session_id: UUID, *, problem: str | None = None) -> Session | None:
        """No more machine is wanted: the session drains. None: there is no such session.

        With a problem, one whose image is new is given the former image instead, and another machine.
        """
        if problem is not None and await self._falls_back(session_id, problem):
            self._start("provision", session_id, self.provision)
            return await self._store.get(session_id)
        ended = await self._store.end(session_id, problem)
        session = ended or await self._store.get(session_id)
        if session is not None and session.state is State.DRAINING:
            self._start("finish", session_id, self.finish)
        return session

    async def finish(self, session_id: UUID) -> None:
        """Destroy what is left of a draining session, then call it over."""
        session = await self._store.claim(
            session_id, by=self._name, seconds=self._settings.claim_seconds, event=Event.TAKE_DOWN
        )
        if session is None:
            return
        try:
            async with asyncio.timeout(self._settings.claim_seconds):
                await self._destroy(session_id)
        except (MachineError, TimeoutError, OSError) as error:
            log.warning("session.not_ended_yet", session_id=str(session_id), reason=str(error))
            await self._store.release(session_id, by=self._name, problem=None)
            return
        over = await self._store.destroyed(session_id)
        if over is not None:
            log.info("session.over", session_id=str(session_id), state=over.state, problem=over.problem)

    def token_for(self, session: Session) -> tuple[str, float]:
        """A fresh token for the session's machine, and when it expires (Unix seconds).

        Not after the session, or one sweep later: our clock may be ahead of the database's, and a token that is
        over at once would have its agent ask for the next one for as long as that is.
        """
        now = self._clock()
        ttl = max(min(self._settings.token_ttl, session.expires_at - now), self._settings.sweep_seconds)
        token = mint_session(
            self._keys,
            project_id=session.project_id,
            session_id=session.id,
            generation=session.generation,
            role=self._settings.token_role,
            now=now,
            ttl=ttl,
        )
        return token, now + ttl

    async def sweep(self) -> int:
        """Do what is due: end what expired or fell silent, retry what stalled, destroy orphaned machines.

        Gives the number of steps it took. Safe at any time, in any number of orchestrators.
        """
        async with self._store.sweeping() as mine:
            if not mine:
                return 0
            # Machines first: a machine is only ever made for a row that exists already, so one whose row is not
            # among those read *afterwards* is an orphan.
            async with asyncio.timeout(self._settings.lease_seconds):
                machines = await self._driver.list()
            wrong = await self._due.machines(machines)
            sessions = await self._due.sessions()
        steps: list[Step] = []
        for session, judgement, stuck in sessions:
            if stuck:
                log.error("session.stuck", session_id=str(session.id), machine=session.machine_id)
            steps.extend(self._steps(session.id, judgement))
        for found in wrong:
            match found.what:
                case "lost":
                    steps.append(partial(self._end_if_gone, found.id, found.machine))
                case "awake":
                    steps.append(partial(self.sleep.suspend_again, found.id))
                case "unwanted":
                    steps.append(partial(self._driver.destroy, found.machine))
        steps.extend(await self.sleep.due())
        todo = iter(steps)

        async def work() -> None:
            for step in todo:
                await self._guarded(step)

        await asyncio.gather(*(work() for _ in range(AT_ONCE)))
        self.swept_at = self._clock()
        return len(steps)

    def _steps(self, session_id: UUID, judgement: Judgement) -> Iterator[Step]:
        match judgement.action:
            case Action.PROVISION:
                yield partial(self.provision, session_id)
            case Action.ROLL:
                yield partial(self.roll, session_id)
            case Action.UNLOAD:
                yield partial(self.sleep.unload, session_id)
            case Action.RENEW:
                yield partial(self.sleep.renew, session_id)
            case Action.DRAIN:
                yield partial(self.end, session_id, problem=judgement.problem)
            case Action.DESTROY:
                yield partial(self.finish, session_id)

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            await asyncio.sleep(self._settings.sweep_seconds)
            try:
                await self.sweep()
            except (MachineError, psycopg.Error, OSError) as error:
                log.warning("sweep.failed", reason=str(error))

    async def close(self) -> None:
        """Cancel the steps under way and release their claims: the next sweep of any orchestrator goes on at once.

        The claims of an orchestrator that is killed end with their time.
        """
        await self.drop()
        try:
            await self._store.release_all(by=self._name)
        except psycopg.OperationalError as error:
            log.warning("close.not_said", reason=str(error))

    async def drop(self) -> None:
        """Cancel the steps under way and keep their claims, as being killed would."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _spec(self, session: Session) -> MachineSpec:
        if self._template is not None:
            with self._part("template"):
                await self._template.apply(session.project_id)
        with self._part("snapshot"):
            snapshot = await self._snapshots.signed_snapshot(session.project_id, earlier=True)
        modules: Mapping[str, str] = {}
        if self._layers is not None:
            with self._part("modules"):
                modules = await self._layers.environment(session.project_id)
        with self._part("token"):
            token, until = self.token_for(session)
        run = await self._runs.of_session(session.id)
        settings, nats = self._settings, self.nats
        limits = await self._store.machine_limits(session.project_id, settings.storage_object_limit)
        image = await self._store.image(session.id, settings.agent_image)
        return MachineSpec(
            name=await self._name_for(session),
            installation=self._installation.id,
            project_id=session.project_id,
            session_id=session.id,
            generation=session.generation,
            region=settings.fly_region,
            image=image if image != settings.agent_image else None,
            env={
                "PROJECT_ID": str(session.project_id),
                "SESSION_ID": str(session.id),
                "SNAPSHOT_URL": snapshot.url,
                "REALTIME_TOKEN": token,
                "REALTIME_URL": settings.realtime_url,
                "REALTIME_API_KEY": settings.supabase_anon_key.get_secret_value(),
                "SESSION_API_URL": settings.agent_facing_url,
                "LOG_LEVEL": settings.log_level,
                **limits,
                # What is no secret. `env` and `npmrc` never: a platform shows this to whoever holds its token.
                **run.environment(),
                **modules,
                **(
                    nats.environment(session.project_id, session.id, run.plain.get("transport"), until)
                    if nats
                    else {}
                ),
                **({"SYNC_MODE": settings.sync_mode} if settings.sync_mode != "live" else {}),
            },
        )

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        """Report how long this part took, unless it raised."""
        started = time.perf_counter()
        yield
        self._on_part(name, time.perf_counter() - started)

    async def _name_for(self, session: Session) -> str:
        """What the session's machine is called. One from before machines carried a mark keeps its name: making it again
        is adopting it.
        """
        if session.created_at < self._installation.since:
            before = machine_name(None, session.id, session.generation)
            if any(machine.name == before for machine in await self._driver.find(session.id)):
                return before
        return machine_name(self._installation.mark, session.id, session.generation)

    def _ours(self, machine: Machine) -> bool:
        """Whether a machine carries this installation's mark, or none."""
        owner = owner_of(machine.name)
        return owner is not None and owner.mark in (None, self._installation.mark)

    async def _find(self, session_id: UUID) -> list[Machine]:
        """The machines of a session of ours; one without a mark is ours because the session is."""
        return [machine for machine in await self._driver.find(session_id) if self._ours(machine)]

    async def _destroy(self, session_id: UUID) -> None:
        for machine in await self._find(session_id):
            await self._driver.destroy(machine.id)

    async def _destroy_older(self, session: Session) -> None:
        for machine in await self._find(session.id):
            owner = owner_of(machine.name)
            if owner is not None and owner.generation < session.generation:
                await self._driver.retire(machine.id)

    async def _end_if_gone(self, session_id: UUID, machine_id: str) -> None:
        machine = await self._driver.inspect(machine_id)
        if machine is None or machine.state is MachineState.GONE:
            await self.end(session_id, problem="machine_gone: the machine is not there any more")

    async def _guarded(self, step: Step) -> None:
        async with self._slots:
            try:
                await step()
            except (MachineError, psycopg.Error, OSError) as error:
                # What was half-way is taken up again by the next sweep.
                log.warning("step.failed", reason=str(error) or type(error).__name__)
            except Exception:
                # A bug, over one session: it must not keep the others from their machines.
                log.error("step.failed", exc_info=True)

    def _start(self, what: str, session_id: UUID, step: Callable[[UUID], Awaitable[object]]) -> None:
        key = (what, session_id)
        running = self._tasks.get(key)
        if running is not None and not running.done():
            return
        task = asyncio.create_task(self._guarded(partial(step, session_id)), name=f"{what} {session_id}")
        self._tasks[key] = task

        def ended(task: asyncio.Task[None]) -> None:
            if self._tasks.get(key) is task:
                del self._tasks[key]

        task.add_done_callback(ended)
