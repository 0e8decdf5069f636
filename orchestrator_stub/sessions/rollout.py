"""Updates the image that machines are made of: `preview-orchestrator rollout`.

    trying ──a session of its own is ready──▶ rolling ──all of the share have it──▶ done
       └──it does not become ready──▶ stopped ◀──one does not become ready──┘

What is rolled out is one row of the database, and the orchestrators act on it: they make new sessions' machines of the
image, and replace a running one by the next generation once it is marked. This command decides which are marked, and
when; it may be killed and begun again at any time. A session whose new image does not become ready is given the
former one by its orchestrator (`preview.fall_back`), and the rollout stops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, LiteralString
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

from orchestrator_stub.platform.database import Pool, pool_of
from orchestrator_stub.sessions.lifecycle import State
from orchestrator_stub.sessions.shown import viewers
from orchestrator_stub.sessions.store import SessionStore

POLL_SECONDS: Final = 1.0
"""Between two steps: small against the seconds that a machine takes to become ready."""

CONNECT_TIMEOUT: Final = 10
"""Seconds for the database to be reached at the start."""

TRIAL_SECONDS: Final = 900
"""A trial session lives at most so long, should whoever began it not come again."""

BEGIN: Final[LiteralString] = """
insert into preview.rollout as r (image, share, state, former)
values (%(image)s, %(share)s, 'trying', (
  select s.image from preview.sessions s where s.image is not null and not s.trial order by s.created_at desc limit 1))
on conflict (one) do update set share = excluded.share, image = excluded.image, problem = null,
  former = case when r.image <> excluded.image and r.state = 'done' and r.share = 1 then r.image else r.former end,
  trial = case when r.image = excluded.image and r.state = 'trying' then r.trial end,
  started_at = case when r.image = excluded.image and r.state <> 'stopped' then r.started_at else clock_timestamp() end,
  state = case
    when r.image = excluded.image and r.state in ('trying', 'rolling') then r.state
    -- It has run before: the way back does not wait for a trial.
    when r.image = excluded.image and r.state = 'done' or r.former = excluded.image then 'rolling'
    else 'trying' end
returning state
"""

FORGET: Final[LiteralString] = """
update preview.sessions set image_next = case when image_next = %(image)s then image_next end,
  image_failed = case when image_failed = %(image)s then null else image_failed end
where image_next <> %(image)s or image_failed = %(image)s
"""
"""Marks of another rollout, and what this one found out before it was begun anew."""

SESSIONS: Final[LiteralString] = """
select s.id, s.project_id, s.state, s.image, s.image_next, s.image_failed, s.rolled_at is not null as rolled, s.status,
  extract(epoch from clock_timestamp() - h.updated_at)::float8 as quiet
from preview.sessions s join public.project_heads h using (project_id)
where s.state in ('requested', 'provisioning', 'ready') and not s.trial and preview.in_share(s.id, %(share)s)
order by h.updated_at, s.id
"""

MARK: Final[LiteralString] = """
update preview.sessions set image_next = %(image)s where id = any(%(ids)s) and state = 'ready'
and exists (select from preview.rollout r where r.image = %(image)s and r.state = 'rolling')
"""

ROLL: Final[LiteralString] = """
update preview.sessions set generation = generation + 1,
  image_before = nullif(coalesce(image, (select former from preview.rollout), %(standard)s), image_next),
  image = image_next, image_next = null, rolled_at = now(), state = 'provisioning', state_since = now(),
  machine_id = null, machine_driver = null, machine_region = null, preview_url = null, health_url = null,
  lease_until = null, claimed_until = null, problem = null
where id = %(id)s and state = 'ready'
and image_next = (select r.image from preview.rollout r where r.state in ('rolling', 'done'))
"""
"""Begins the generation that a rollout wants, if it still does: marks may come after those of before were taken.
`standard`: to fall back to, where nobody knows what it was made of."""

MARK_ASLEEP: Final[LiteralString] = """
update preview.sessions set image_next = %(image)s
where state = 'suspended' and preview.in_share(id, %(share)s)
and image is distinct from %(image)s and image_next is distinct from %(image)s
and exists (select from preview.rollout r where r.image = %(image)s and r.state = 'rolling')
"""
"""They get another machine when they wake: nobody waits for that now."""

TRY: Final[LiteralString] = """
with made as (
  insert into preview.sessions (project_id, expires_at, image, trial, run)
  select s.project_id, now() + %(seconds)s * interval '1 second', %(image)s, true, s.run
  from preview.sessions s join public.project_heads h using (project_id)
  where s.state = 'ready' and not s.trial and exists (
    select from preview.rollout r where r.image = %(image)s and r.state = 'trying' and r.trial is null)
  order by h.updated_at limit 1
  returning id, project_id)
update preview.rollout r set trial = made.id from made returning made.id, made.project_id
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A session as a rollout sees it. `quiet`: seconds since its project's last save."""

    id: UUID
    project_id: UUID
    state: State
    image: str | None
    image_next: str | None
    image_failed: str | None
    rolled: bool
    viewers: int | None
    quiet: float

    def idle(self, seconds: float) -> bool:
        """Whether nobody would miss its preview for a moment."""
        return not self.viewers and self.quiet >= seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do next, and how far it is."""

    mark: tuple[UUID, ...]
    have: int
    under_way: int
    queued: int
    """Idle, and for a later turn."""
    in_use: int
    starting: int
    """Become ready on another image first."""
    kept: int
    """Could not become ready on the image, as new sessions, and run on the former."""

    @property
    def finished(self) -> bool:
        """Whether none is left to wait for."""
        return not (self.mark or self.under_way or self.queued or self.in_use or self.starting)


def plan(candidates: Sequence[Candidate], image: str, *, idle: float, at_once: int) -> Plan:
    """Choose which sessions to replace now: idle ones, the longest quiet first, so many at a time. PURE.

    Args:
        candidates: Those of the share that are not over, the longest quiet first.
        image: What they are to have.
        idle: Seconds without a save, and no page open; 0 or less: in use or not.
        at_once: Replaced at the same time.
    """
    have = [each for each in candidates if each.image == image and not each.rolled]
    under_way = [
        each for each in candidates if (each.rolled if each.image == image else each.image_next == image)
    ]
    rest = [each for each in candidates if each.image != image and each.image_next != image]
    kept = [each for each in rest if each.image_failed == image]
    open_ = [each for each in rest if each.image_failed != image and each.state is State.READY]
    free = [each for each in open_ if idle <= 0 or each.idle(idle)]
    mark = free[: max(0, at_once - len(under_way))]
    return Plan(
        tuple(each.id for each in mark),
        have=len(have),
        under_way=len(under_way),
        queued=len(free) - len(mark),
        in_use=len(open_) - len(free),
        starting=len(rest) - len(kept) - len(open_),
        kept=len(kept),
    )


class Stopped(Exception):
    """The rollout ended before all had the image; the message says which session, and why."""


class Rollout:
    """One image on its way.

    Args:
        pool: The database that the orchestrators use.
        image: What machines are to be made of.
        say: Told each news, one line.
    """

    def __init__(self, pool: Pool, image: str, say: Callable[[str], None]) -> None:
        self._pool = pool
        self._store = SessionStore(pool)
        self._image = image
        self._say = say
        self._said = ""

    async def run(self, *, share: float, idle: float, at_once: int) -> None:
        """Begin it, or go on with it, until all of the share have the image. Raises `Stopped`, `psycopg.Error`.

        Args:
            share: Of all sessions, above 0 to 1.
            idle: As in `plan`.
            at_once: As in `plan`.
        """
        await self.begin(share)
        while True:
            if await self.step(share, idle=idle, at_once=at_once):
                return
            await asyncio.sleep(POLL_SECONDS)

    async def begin(self, share: float) -> None:
        """Write down what is to be rolled out; from here on all orchestrators know."""
        values = {"image": self._image, "share": share}
        async with self._pool.connection() as connection, connection.transaction():
            [state] = await (await connection.execute(BEGIN, values)).fetchone() or ["trying"]
            await connection.execute(FORGET, values)
        self._tell(f"rolling out {self._image} to {share:.0%} of the sessions")
        if state == "rolling":
            self._tell("new sessions get it")

    async def step(self, share: float, *, idle: float, at_once: int) -> bool:
        """Do what is due now; whether all is done. Raises `Stopped`."""
        row = await self._row()
        if row["image"] != self._image:
            raise Stopped(f"the rollout of {row['image']} has taken this one's place")
        if row["state"] == "stopped":
            raise Stopped(row["problem"])
        if row["state"] == "trying":
            await self._try(row["trial"])
            return False
        values: dict[str, object] = {"image": self._image, "share": share}
        await self._run(MARK_ASLEEP, values)
        rows = await self._rows(SESSIONS, values)
        next_ = plan([_candidate(row) for row in rows], self._image, idle=idle, at_once=at_once)
        if next_.mark:
            await self._run(MARK, {**values, "ids": list(next_.mark)})
        self._tell(_progress(next_, len(rows)))
        if not next_.finished:
            return False
        await self._run(
            "update preview.rollout set state = 'done' where image = %(image)s and state = 'rolling'", values
        )
        if (await self._row())["state"] != "done":
            return False
        self._tell(f"done: {next_.have} sessions run {self._image}, and new ones get it")
        return True

    async def _try(self, trial: UUID | None) -> None:
        """See whether a machine of the image becomes ready, in a session that nobody uses."""
        values: dict[str, object] = {"image": self._image, "seconds": TRIAL_SECONDS}
        if trial is None:
            async with self._pool.connection() as connection, connection.transaction():
                # Of two of these commands, one makes the session.
                await connection.execute("select from preview.rollout for update")
                cursor = connection.cursor(row_factory=dict_row)
                made = await (await cursor.execute(TRY, values)).fetchall()
            if made:
                self._tell("trying it in session {id}, beside project {project_id}".format(**made[0]))
            elif (await self._row())["trial"] is None:
                self._tell(
                    "no session is ready to try it beside: the next new session is the first to get it"
                )
                await self._roll()
            return
        session = await self._store.get(trial)
        if session is not None and session.state in (State.REQUESTED, State.PROVISIONING):
            return
        if session is not None and session.state is State.READY:
            await self._store.end(trial)
            self._tell("the trial session is ready; new sessions get the image")
            await self._roll()
            return
        said = await self._rows(
            "select preview.agent_said(s) as said from preview.sessions s where id = %(id)s", {"id": trial}
        )
        problem = (session and session.problem) or "it ended before it was ready"
        why = f"trial session {trial}: {problem}" + (said[0]["said"] if said else "")
        await self._run("select preview.stop_rollout(%(image)s, %(why)s)", {**values, "why": why})

    async def _roll(self) -> None:
        values = {"image": self._image}
        await self._run(
            "update preview.rollout set state = 'rolling' where image = %(image)s and state = 'trying'",
            values,
        )

    def _tell(self, line: str) -> None:
        if line != self._said:
            self._said = line
            self._say(line)

    async def _row(self) -> Mapping[str, Any]:
        rows = await self._rows("select * from preview.rollout", {})
        if not rows:
            raise Stopped("the row of preview.rollout is gone")
        return rows[0]

    async def _rows(self, query: LiteralString, values: Mapping[str, object]) -> list[dict[str, Any]]:
        async with self._pool.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            await cursor.execute(query, values)
            return await cursor.fetchall()

    async def _run(self, query: LiteralString, values: Mapping[str, object]) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(query, values)


async def run_rollout(
    dsn: str, image: str | None, say: Callable[[str], None], *, share: float, idle: float, at_once: int
) -> None:
    """The command: roll out `image`, or without one say how it stands. Raises `Stopped`, `psycopg.Error`."""
    # A pool would retry for ever when there is no database.
    async with await psycopg.AsyncConnection.connect(dsn, connect_timeout=CONNECT_TIMEOUT):
        pass
    async with pool_of(dsn, size=1) as pool:
        if image is None:
            say(await standing(pool))
        else:
            await Rollout(pool, image, say).run(share=share, idle=idle, at_once=at_once)


async def standing(pool: Pool) -> str:
    """What is rolled out, and how many sessions have what, as lines."""
    async with pool.connection() as connection:
        row = await (
            await connection.execute("select image, former, share, state, problem from preview.rollout")
        ).fetchone()
        counted = await connection.execute(
            "select coalesce(image, 'made before images were noted'), count(*) from preview.sessions"
            " where state not in ('gone', 'failed') and not trial group by 1 order by 2 desc"
        )
        images = await counted.fetchall()
    lines = ["no image was rolled out: each orchestrator's AGENT_IMAGE is what new sessions get"]
    if row is not None:
        image, former, share, state, problem = row
        lines = [
            f"{image}: {state}, for {share:.0%} of the sessions; the others get {former or 'AGENT_IMAGE'}"
        ]
        lines += [problem] if problem else []
    return "\n".join([*lines, *(f"{count} sessions: {image}" for image, count in images)])


def _candidate(row: Mapping[str, Any]) -> Candidate:
    status = row["status"]
    kept = {
        name: row[name]
        for name in ("id", "project_id", "image", "image_next", "image_failed", "rolled", "quiet")
    }
    return Candidate(state=State(row["state"]), viewers=viewers(status), **kept)


def _progress(next_: Plan, of: int) -> str:
    parts = [f"{next_.have} of {of} have it"]
    parts += [f"{next_.queued} wait for their turn"] if next_.queued else []
    replacing = next_.under_way + len(next_.mark)
    parts += [f"{replacing} being replaced"] if replacing else []
    parts += [f"{next_.in_use} wait until they are idle"] if next_.in_use else []
    parts += [f"{next_.starting} are still starting"] if next_.starting else []
    parts += [f"{next_.kept} did not become ready on it and keep the former"] if next_.kept else []
    return ", ".join(parts)
