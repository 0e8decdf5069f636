"""Keeps sessions in one table of PostgreSQL; each transition is one statement.

A statement that changes a state carries the rows of the transition table that it may follow (`lifecycle.moves`), so two
orchestrators, a late heartbeat and a sweeper can run at once: the second one changes nothing and gets `None`. Times are
the database's, the one clock that all orchestrators share.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, LiteralString, NamedTuple
from uuid import UUID

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb

from orchestrator_stub.machines.driver import Installation, Machine
from orchestrator_stub.platform.batches import Batches
from orchestrator_stub.platform.database import Head, Pool
from orchestrator_stub.platform.limits import environment_of
from orchestrator_stub.sessions.lifecycle import ENDED, LIVE, Event, Session, State, moves

COLUMNS: Final[LiteralString] = """
  id, project_id, state, generation, idempotency_key,
  extract(epoch from created_at)::float8 as created_at,
  extract(epoch from expires_at)::float8 as expires_at,
  extract(epoch from state_since)::float8 as state_since,
  extract(epoch from claimed_until)::float8 as claimed_until,
  extract(epoch from lease_until)::float8 as lease_until,
  machine_driver, machine_id, machine_region, preview_url, problem,
  coalesce((select r.revision from preview.run_settings r where r.project_id = sessions.project_id), 0)
    + (run is not null)::int as run_revision,
  image, image_next, rolled_at is not null as rolled, trial, woken_at is not null as waking
"""
SELECT: Final[LiteralString] = "select " + COLUMNS + " from preview.sessions "  # noqa: S608 - two literals
STANDING: Final[LiteralString] = (
    "select s.*, h.epoch::text, h.revision from ("  # noqa: S608 - literals
    + SELECT
    + "where id = any(%(ids)s)) s join public.project_heads h on h.project_id = s.project_id"
)
RETURNING: Final[LiteralString] = " returning " + COLUMNS

LOCK: Final = "select pg_advisory_xact_lock(hashtextextended(%(name)s, 0))"
COUNT: Final = """
select count(*) filter (where requested_by = %(user)s), count(*) filter (where project_id = %(project)s)
from preview.sessions
where (requested_by = %(user)s or project_id = %(project)s) and state <> all(%(over)s) and not trial
"""
"""Sessions that are not over: one that is ending still has a machine."""

SWEEP_LOCK: Final = 0x70726576  # "prev"
"""The advisory lock of the one sweeper at work."""


ROWS_AT_ONCE: Final = 200
"""Rows of a large answer read without a pause: some 5 ms."""

Right = Literal["read", "write", "own"]


REPORT: Final[LiteralString] = """
with heard as (
  select h.*, s.status is distinct from h.said::jsonb as news
  from unnest(%(id)s::uuid[], %(generation)s::int[], %(ready)s::boolean[], %(viewed)s::boolean[],
    %(lease)s::float8[], %(status)b::text[]) as h (id, generation, ready, viewed, lease, said)
  join preview.sessions s on s.id = h.id and s.generation = h.generation and %(moves)s ? s.state
  order by s.id for no key update of s)
update preview.sessions s set
  state = case when h.ready then %(moves)s ->> s.state else s.state end,
  state_since = case when h.ready and %(moves)s ->> s.state <> s.state then now() else s.state_since end,
  image_before = case when h.ready then null else s.image_before end,
  rolled_at = case when h.ready then null else s.rolled_at end,
  woken_at = case when h.ready then null else s.woken_at end,
  viewed_at = case when h.viewed then now() else s.viewed_at end,
  lease_until = case when s.state <> 'suspended' then now() + h.lease * interval '1 second' end,
  status = case when h.news then h.said::jsonb else s.status end, status_at = now()
from heard h where s.id = h.id and s.generation = h.generation and %(moves)s ? s.state
returning s.id, s.state, extract(epoch from s.state_since)::float8
"""
"""Many heartbeats in one commit. Rows are locked in one order: two orchestrators may hear of the same ones. Their JSON
goes in binary: as text Python escapes each of its quotes."""


@dataclass(frozen=True, slots=True)
class Report:
    """A heartbeat of the machine of `generation`. `status` is JSON; `lease` in seconds from now.

    `viewed`: somebody has the preview open.
    """

    id: UUID
    generation: int
    ready: bool
    lease: float
    status: str
    viewed: bool = False

    def __post_init__(self) -> None:
        # jsonb holds every character but NUL, and an agent repeats what other programs said.
        object.__setattr__(self, "status", self.status.replace("\\u0000", "\\ufffd"))


class Reported(NamedTuple):
    """Where a session is after a heartbeat; `state_since` in Unix seconds."""

    state: State
    state_since: float


class ProjectUnknown(Exception):
    """There is no project of that id."""


class TooManySessions(Exception):
    """The user, or the project (`of`), has `limit` sessions that are not over."""

    def __init__(self, of: str, limit: int) -> None:
        self.of = of
        self.limit = limit
        super().__init__(f"{limit} sessions of one {of}")


@dataclass(frozen=True, slots=True)
class Asker:
    """A user who asks for a session, and how many may be alive at a time: of theirs, and of a project."""

    user: str
    of_user: int
    of_project: int


class Unmigrated(Exception):
    """The database lacks what the migrations make; the message says what to do."""


class SessionStore:
    """`preview.sessions`, through `pool`. Raises `psycopg.OperationalError` when the database is not there."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._asked: Batches[UUID, tuple[Session, Head]] = Batches(
            self._standings, lambda session_id: session_id
        )
        self._heard: Batches[Report, Reported] = Batches(
            self._reports,
            lambda report: report.id,
            alone=(psycopg.DataError, psycopg.errors.DeadlockDetected),
        )

    async def installation(self) -> Installation:
        """Which installation this database is. One that was copied without its rows becomes a new one.

        Raises `Unmigrated`.
        """
        query = "select id, extract(epoch from since)::float8 from preview.installation"
        try:
            async with self._pool.connection() as connection:
                row = await (await connection.execute(query)).fetchone()
                if row is None:
                    await connection.execute(
                        "insert into preview.installation default values on conflict do nothing"
                    )
                    row = await (await connection.execute(query)).fetchone()
        except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
            raise Unmigrated(
                "the database has no preview.installation; run `preview-orchestrator migrate` first"
            ) from None
        assert row is not None
        return Installation(row[0], float(row[1]))

    async def create(
        self,
        project_id: UUID,
        *,
        key: str | None,
        generation: int,
        ttl: float,
        asker: Asker | None = None,
        run: Mapping[str, object] | None = None,
    ) -> tuple[Session, bool]:
        """A new session, or the one that `key` made before for this project; and whether it is new.

        `run`: its own run settings, as `run_settings.RunSettings.own` gives them; one that was made keeps its first.
        Raises `ProjectUnknown`, `TooManySessions`.
        """
        known = "where project_id = %(project)s and idempotency_key = %(key)s"
        values = {"project": project_id, "key": key, "generation": generation, "ttl": ttl}
        if asker is not None and (kept := await self._first(known, values)) is not None:
            return kept, False  # however many there are
        # The head is what a session stands on; a product's project has none before somebody needs it.
        try:
            made = await self._one(
                "insert into preview.sessions"
                " (project_id, idempotency_key, generation, expires_at, requested_by, run)"
                " select %(project)s, %(key)s, %(generation)s, now() + %(ttl)s * interval '1 second', %(user)s,"
                " %(run)s::jsonb where preview.give_head(%(project)s)"
                " on conflict (project_id, idempotency_key) do nothing",
                {**values, "user": asker and asker.user, "run": None if run is None else Jsonb(run)},
                room=(project_id, asker),
            )
        except psycopg.errors.ForeignKeyViolation:  # deleted at this moment
            raise ProjectUnknown(str(project_id)) from None
        if made is not None:
            return made, True
        kept = await self._first(known, values)
        if kept is None:
            raise ProjectUnknown(str(project_id))
        return kept, False

    async def get(self, session_id: UUID) -> Session | None:
        return await self._first("where id = %(id)s", {"id": session_id})

    async def standing(self, session_id: UUID) -> tuple[Session, Head] | None:
        """A session, and where its project stands; a thousand agents that ask at once cost a handful of queries."""
        return await self._asked.ask(session_id)

    async def _standings(self, session_ids: Sequence[UUID]) -> dict[Hashable, tuple[Session, Head]]:
        async with self._pool.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            await cursor.execute(STANDING, {"ids": list(session_ids)})
            rows = await cursor.fetchall()
        found: dict[Hashable, tuple[Session, Head]] = {}
        for row in rows:
            head = Head(row.pop("epoch"), row.pop("revision"))
            session = session_of(row)
            found[session.id] = (session, head)
        return found

    async def listing(self, *, project_id: UUID | None, ended: bool, limit: int) -> Sequence[Session]:
        """The newest sessions first. `ended` False leaves out those in `gone` and `failed`."""
        return await self._rows(
            SELECT + "where (%(project)s::uuid is null or project_id = %(project)s)"
            " and (%(ended)s or state <> all(%(over)s)) and not trial"
            " order by created_at desc, id limit %(limit)s",
            {"project": project_id, "ended": ended, "over": _names(ENDED), "limit": limit},
        )

    async def found(self, query: LiteralString, values: Mapping[str, object]) -> list[dict[str, Any]]:
        """The rows that a query finds, however many: the loop is not held while they are read."""
        found: list[dict[str, Any]] = []
        async with self._pool.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            await cursor.execute(query, values)
            while rows := await cursor.fetchmany(ROWS_AT_ONCE):
                found.extend(rows)
                await asyncio.sleep(0)
        return found

    async def known(self, session_ids: Collection[UUID]) -> Mapping[UUID, Session]:
        """Those of `session_ids` that are sessions here, over or not."""
        if not session_ids:
            return {}
        rows = await self._rows(SELECT + "where id = any(%(ids)s)", {"ids": list(session_ids)})
        return {session.id: session for session in rows}

    async def claim(self, session_id: UUID, *, by: str, seconds: float, event: Event) -> Session | None:
        """Claim the session for making (`TAKE_UP`) or ending (`TAKE_DOWN`) its machine.

        None: another orchestrator has claimed it, or its state has no such event.
        """
        return await self._one(
            "update preview.sessions set"
            " state = %(moves)s ->> state,"
            " state_since = case when %(moves)s ->> state <> state then now() else state_since end,"
            " claimed_by = %(by)s, claimed_until = now() + %(seconds)s * interval '1 second'"
            " where id = %(id)s and %(moves)s ? state"
            " and (claimed_until is null or claimed_until <= now() or claimed_by = %(by)s)",
            {"id": session_id, "by": by, "seconds": seconds, "moves": _moves(event)},
        )

    async def machine_made(self, session_id: UUID, generation: int, machine: Machine) -> Session | None:
        """Record the machine of this generation. None: it is not wanted any more and must be destroyed."""
        return await self._one(
            "update preview.sessions set machine_driver = %(driver)s, machine_id = %(machine)s,"
            " machine_region = %(region)s, preview_url = %(preview)s, health_url = %(health)s,"
            " claimed_until = null, problem = null"
            " where id = %(id)s and generation = %(generation)s and state = any(%(live)s)",
            {
                "id": session_id,
                "generation": generation,
                "driver": machine.driver,
                "machine": machine.id,
                "region": machine.region,
                "preview": machine.preview_url,
                "health": machine.health_url,
                "live": _names(LIVE),
            },
        )

    async def release(self, session_id: UUID, *, by: str, problem: str | None) -> None:
        """Release a claim before its end, with the reason; the sweeper goes on from there."""
        await self._run(
            "update preview.sessions set claimed_until = null, problem = coalesce(%(problem)s, problem)"
            " where id = %(id)s and claimed_by = %(by)s",
            {"id": session_id, "by": by, "problem": problem},
        )

    async def release_all(self, *, by: str) -> None:
        """Release all claims of an orchestrator that stops, for others to go on."""
        await self._run(
            "update preview.sessions set claimed_until = null where claimed_by = %(by)s", {"by": by}
        )

    async def report(self, report: Report, *, patient: bool = False) -> Reported | None:
        """Keep a heartbeat; a `patient` one may wait for others. None: the session or the generation is over."""
        return await self._heard.ask(report, patient=patient)

    async def _reports(self, reports: Sequence[Report]) -> dict[Hashable, Reported]:
        columns = {name: [getattr(each, name) for each in reports] for name in Report.__slots__}
        async with self._pool.connection() as connection:
            cursor = await connection.execute(REPORT, {**columns, "moves": _moves(Event.REPORT)})
            return {row[0]: Reported(State(row[1]), row[2]) for row in await cursor.fetchall()}

    async def screen(self, session_id: UUID) -> tuple[Session, Mapping[str, Any] | None, float] | None:
        """The session, its agent's last status, and how many seconds ago that came."""
        age = ", status, coalesce(extract(epoch from now() - status_at), 0)::float8 as status_age"
        query = "select " + COLUMNS + age + " from preview.sessions where id = %(id)s"  # noqa: S608 - literals
        async with self._pool.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            await cursor.execute(query.encode(), {"id": session_id})
            row = await cursor.fetchone()
        if row is None:
            return None
        status, since = row.pop("status"), row.pop("status_age")
        return session_of(row), status, since

    async def tell_shown(self, session_id: UUID) -> float:
        """Tell members what is shown, if it is news. Returns in how many seconds to ask again; 0: it is done."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute("select preview.tell_shown(%s)", (session_id,))
            row = await cursor.fetchone()
            return float(row[0]) if row else 0.0

    async def replace(
        self, session: Session, generation: int, *, ttl: float, asker: Asker | None = None
    ) -> Session | None:
        """Ask for a newer generation of machine. None: this one, or a newer, is there; or the session ended.

        To bring back a session that failed is to make one. Raises `TooManySessions`.
        """
        return await self._one(
            "update preview.sessions set generation = %(generation)s,"
            " state = %(moves)s ->> state, state_since = now(),"
            " expires_at = greatest(expires_at, now() + %(ttl)s * interval '1 second'),"
            " machine_id = null, machine_driver = null, machine_region = null, preview_url = null,"
            " health_url = null, lease_until = null, claimed_until = null, problem = null,"
            " image = null, image_before = null, image_next = null, rolled_at = null, woken_at = null,"
            " requested_by = coalesce(%(user)s, requested_by)"
            " where id = %(id)s and generation < %(generation)s and %(moves)s ? state",
            {
                "id": session.id,
                "generation": generation,
                "ttl": ttl,
                "user": asker and asker.user,
                "moves": _moves(Event.REPLACE),
            },
            room=(session.project_id, asker if session.state in ENDED else None),
        )

    async def image(self, session_id: UUID, standard: str) -> str:
        """What the session's machine is made of, chosen now unless it was; `standard` where no rollout says."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute("select preview.choose_image(%s, %s)", (session_id, standard))
            row = await cursor.fetchone()
            return (row and row[0]) or standard

    async def fall_back(self, session_id: UUID, problem: str) -> bool:
        """Give a session whose image did not become ready the former one; whether it had one."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute("select preview.fall_back(%s, %s)", (session_id, problem))
            row = await cursor.fetchone()
            return bool(row and row[0])

    async def end(self, session_id: UUID, problem: str | None = None) -> Session | None:
        """No more machine is wanted. None: it was ending or over already."""
        return await self._one(
            "update preview.sessions set state = %(moves)s ->> state, state_since = now(), claimed_until = null,"
            " problem = %(problem)s"
            " where id = %(id)s and %(moves)s ? state",
            {"id": session_id, "problem": problem, "moves": _moves(Event.END)},
        )

    async def destroyed(self, session_id: UUID) -> Session | None:
        """No machine of this session is left."""
        return await self._one(
            "update preview.sessions set"
            " state = case when problem is null then %(moves)s ->> state else 'failed' end,"
            " state_since = now(), claimed_until = null, machine_id = null, preview_url = null,"
            " health_url = null, lease_until = null, requested_by = null"
            " where id = %(id)s and %(moves)s ? state",
            {"id": session_id, "moves": _moves(Event.DESTROYED)},
        )

    async def machine_limits(self, project_id: UUID, archive_bytes: int) -> Mapping[str, str]:
        """What a machine of the project is told of limits, as its environment."""
        return await environment_of(self._pool, project_id, archive_bytes=archive_bytes)

    async def may(self, claims: Mapping[str, object], project_id: UUID, what: Right) -> bool:
        """Whether a user with these claims may read the project, write it, or owns it."""
        query: LiteralString = "select preview.allows(%(project)s, %(what)s)"
        if what == "own":
            query = "select preview.allows(%(project)s, 'read') and preview.owns(%(project)s)"
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(
                "select set_config('role', 'authenticated', true), set_config('request.jwt.claims', %s, true)",
                (json.dumps(dict(claims)),),
            )
            cursor = await connection.execute(query, {"project": project_id, "what": what})
            row = await cursor.fetchone()
            return bool(row and row[0])

    async def change(self, statement: LiteralString, values: Mapping[str, object]) -> Session | None:
        """The row that an update of `preview.sessions` wrote, or None."""
        return await self._one(statement, values)

    async def ids(self, query: LiteralString, values: Mapping[str, object]) -> list[UUID]:
        """The ids that a query finds."""
        async with self._pool.connection() as connection:
            return [row[0] for row in await (await connection.execute(query, values)).fetchall()]

    @asynccontextmanager
    async def sweeping(self) -> AsyncIterator[bool]:
        """Hold the sweeper's lock, or learn (False) that another orchestrator is sweeping."""
        async with self._pool.connection() as connection, connection.transaction():
            cursor = await connection.execute("select pg_try_advisory_xact_lock(%s)", (SWEEP_LOCK,))
            row = await cursor.fetchone()
            yield bool(row and row[0])

    async def _one(
        self,
        change: LiteralString,
        values: Mapping[str, object],
        *,
        room: tuple[UUID, Asker | None] | None = None,
    ) -> Session | None:
        """The row that `change` wrote, or None. `room`: first see that the asker may have one more in the project."""
        project_id, asker = room or (None, None)
        if project_id is None or asker is None:
            rows = await self._rows(change + RETURNING, values)
            return rows[0] if rows else None
        async with self._pool.connection() as connection, connection.transaction():
            # Until the transaction ends, the user's first: of two that ask at once, the second sees the first.
            for name in (f"user {asker.user}", f"project {project_id}"):
                await connection.execute(LOCK, {"name": f"preview.sessions of {name}"})
            found = await (
                await connection.execute(
                    COUNT, {"user": asker.user, "project": project_id, "over": _names(ENDED)}
                )
            ).fetchone()
            assert found is not None
            for of, number, limit in (
                ("user", found[0], asker.of_user),
                ("project", found[1], asker.of_project),
            ):
                if number >= limit:
                    raise TooManySessions(of, limit)
            cursor = connection.cursor(row_factory=dict_row)
            await cursor.execute(change + RETURNING, values)
            made = await cursor.fetchone()
            return session_of(made) if made else None

    async def _first(self, where: LiteralString, values: Mapping[str, object]) -> Session | None:
        rows = await self._rows(SELECT + where, values)
        return rows[0] if rows else None

    async def _rows(self, query: LiteralString, values: Mapping[str, object]) -> Sequence[Session]:
        async with self._pool.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            await cursor.execute(query, values)
            return [session_of(row) for row in await cursor.fetchall()]

    async def _run(self, query: LiteralString, values: Mapping[str, object]) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(query, values)


def session_of(row: Mapping[str, Any]) -> Session:
    """A row of `COLUMNS` as a session."""
    return Session(**{**row, "state": State(row["state"])})


def _moves(event: Event) -> Jsonb:
    return Jsonb(moves(event))


def _names(states: Any) -> list[str]:
    return [state.value for state in states]
