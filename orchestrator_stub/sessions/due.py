"""Asks the database which sessions and machines a sweep has to act on.

`lifecycle.judge` is the word on each session. Here is the same question as a condition of SQL, so that a hundred
thousand rows are looked at where they are, and the platform's listing is joined to them there. `test_due.py` holds the
two against each other. Reading all rows to judge them here held the event loop for 1.4 s ([scale](docs/scale)).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final, Literal, LiteralString, NamedTuple
from uuid import UUID

from orchestrator_stub.config import Timing
from orchestrator_stub.machines.driver import Machine, MachineState, owner_of
from orchestrator_stub.sessions.lifecycle import Judgement, Session, State, judge
from orchestrator_stub.sessions.store import SELECT, SessionStore, session_of

SLICE: Final = 1_000
"""Machines whose names are read, and sessions judged, without a pause: some 5 ms."""

_UNCLAIMED: Final[LiteralString] = "(claimed_until is null or claimed_until <= now())"
_AGE: Final[LiteralString] = "extract(epoch from now() - state_since)"

CONDITION: Final[LiteralString] = f"""(case
  when state in ('gone', 'failed') then false
  when state = 'draining' then {_UNCLAIMED} or {_AGE} > %(drain)s
  when expires_at <= now() then true
  when state = 'suspended' then {_AGE} >= %(asleep)s and machine_id is not null and {_UNCLAIMED}
  when state = 'provisioning' and woken_at is not null then {_AGE} >= %(wake)s and {_UNCLAIMED}
  when state = 'ready' then coalesce(lease_until <= now(), false)
    or {_UNCLAIMED} and (image_next is not null or machine_id is null)
  else {_AGE} >= case when rolled_at is not null or trial then %(impatient)s else %(provision)s end
    or {_UNCLAIMED} and machine_id is null
  end)"""
"""True where `judge` has something to do, and for a session whose end takes too long."""

DUE: Final[LiteralString] = (
    "select s.*, extract(epoch from now())::float8 as now from ("  # noqa: S608 - literals
    + SELECT
    + f"where state not in ('gone', 'failed') and {CONDITION}) s"
)


class Found(NamedTuple):
    """What the platform's listing says of a session, or of a machine.

    `lost`: the session's machine is not among them; one that wakes has its own deadline. `awake`: it should sleep and
    its machine runs, as whoever was to freeze it was killed before. `unwanted`: a machine of ours that no session has.
    """

    what: Literal["lost", "awake", "unwanted"]
    id: UUID
    machine: str


LISTED: Final[LiteralString] = f"""
with listed as materialized (
  select f[1] as machine, f[2]::uuid as session, f[3]::bigint as generation, f[4] = 'm' as marked, f[5] = 'r' as runs
  from (select string_to_array(line, ' ') from string_to_table(%(machines)s, E'\\n') line where line <> '') as l (f)),
lost as (
  select 'lost' as what, id, machine_id as machine from preview.sessions s
  where state in ('requested', 'provisioning', 'ready') and woken_at is null and machine_id is not null
  and not {CONDITION} and not exists (select from listed l where l.machine = s.machine_id)),
awake as (
  select 'awake' as what, id, machine_id as machine from preview.sessions s
  where state = 'suspended' and not {CONDITION}
  and exists (select from listed l where l.machine = s.machine_id and l.runs)),
unwanted as (
  select 'unwanted' as what, l.session as id, l.machine from listed l left join preview.sessions s on s.id = l.session
  where case
    when s.id is null then l.marked
    when s.state in ('gone', 'failed') then true
    when s.state = 'draining' then false
    when l.generation = s.generation then s.machine_id <> l.machine
    else l.generation < s.generation end)
select * from lost union all select * from awake union all select * from unwanted
"""  # noqa: S608 - literals
"""`unwanted` is what `inventory.wanted` says no to."""


class Due:
    """The questions of a sweep.

    Args:
        store: Where the sessions are.
        timing: What they are judged by.
        mark: Of this installation, whose machines are looked at; and those without one, when their session is here.
    """

    def __init__(self, store: SessionStore, timing: Timing, mark: str) -> None:
        self._store = store
        self._timing = timing
        self._mark = mark
        self._values = {
            "drain": timing.drain,
            "asleep": timing.asleep,
            "wake": timing.wake,
            "provision": timing.provision,
            "impatient": min(timing.rollout, timing.provision),
        }

    async def sessions(self) -> list[tuple[Session, Judgement, bool]]:
        """Every session with something to do, and what; and whether its end takes too long."""
        due = []
        for row in await self._store.found(DUE, self._values):
            now = row.pop("now")
            session = session_of(row)
            stuck = session.state is State.DRAINING and session.state_since + self._timing.drain < now
            due.append((session, judge(session, now, self._timing), stuck))
            if len(due) % SLICE == 0:
                await asyncio.sleep(0)
        return due

    async def machines(self, machines: Sequence[Machine]) -> list[Found]:
        """What is wrong with the machines of a listing that was begun before this was called."""
        values = {**self._values, "machines": await listing_of(machines, self._mark)}
        return [Found(**row) for row in await self._store.found(LISTED, values)]


async def listing_of(machines: Sequence[Machine], mark: str) -> str:
    """A line for each machine that carries `mark` or none: id, session, generation, mark and state."""
    lines = []
    for at in range(0, len(machines), SLICE):
        for machine in machines[at : at + SLICE]:
            owner = owner_of(machine.name)
            # An id with a blank would be another machine's line; no platform has one.
            if owner is not None and owner.mark in (None, mark) and machine.id.split() == [machine.id]:
                runs = "r" if machine.state is MachineState.RUNNING else "-"
                marked = "m" if owner.mark else "-"
                lines.append(f"{machine.id} {owner.session_id.hex} {owner.generation} {marked} {runs}")
        await asyncio.sleep(0)
    return "\n".join(lines)
