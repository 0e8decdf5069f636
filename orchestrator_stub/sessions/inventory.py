"""Says whose each machine of the platform is: `preview-orchestrator machines`.

    148e21ea7b3d89  running   2 h    ours        session 3f0c…, ready (project 77aa…)
    6e82d1f3c94587  stopped   3 min  over        session 91d2…, gone; the next sweep ends it
    9080e1bd2f7387  running   9 d    another's   installation 4ab7a3f75f6e
    3d8d9f62b19789  running   40 d   nobody's    from before machines said whose they are, and its session is not here

It changes nothing. What is nobody's is left alone by every sweep; a person may end it on the platform.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from uuid import UUID

from orchestrator_stub.machines.driver import Installation, Machine, owner_of
from orchestrator_stub.sessions.lifecycle import ENDED, Session, State


@dataclass(frozen=True, slots=True)
class ListedMachine:
    """One machine. `whose`: `ours`, `over` (ours, for the next sweep to end), `another's` or `nobody's`."""

    machine_id: str
    name: str
    state: str
    whose: str
    detail: str
    age_seconds: float
    """Since the platform made it; 0: it does not say."""
    installation: str | None = None
    session_id: str | None = None
    session_state: str | None = None


def describe(
    machine: Machine, installation: Installation, sessions: Mapping[UUID, Session], now: float
) -> ListedMachine:
    """Whose a machine is.

    Args:
        sessions: Those of this database that the machines' names speak of.
        now: Unix seconds.
    """
    owner = owner_of(machine.name)
    mark, session_id = (owner.mark, owner.session_id) if owner else (None, None)
    session = (
        sessions.get(session_id) if session_id is not None and mark in (None, installation.mark) else None
    )
    whose, detail = _whose(machine, mark, session, installation, sessions)
    return ListedMachine(
        machine.id, machine.name, machine.state.value, whose, detail,
        age_seconds=max(0.0, round(now - machine.created_at, 3)) if machine.created_at else 0.0,
        installation=mark,
        session_id=str(session_id) if session_id else None,
        session_state=session.state.value if session else None,
    )  # fmt: skip


def age_of(seconds: float) -> str:
    """An age as people say it: the largest unit that it has two of."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _whose(
    machine: Machine,
    mark: str | None,
    session: Session | None,
    installation: Installation,
    sessions: Mapping[UUID, Session],
) -> tuple[str, str]:
    if mark not in (None, installation.mark):
        return "another's", f"installation {mark}"
    if session is None and mark is None:
        return "nobody's", "from before machines said whose they are, and its session is not here"
    unended = {each.id: each for each in sessions.values() if each.state not in ENDED}
    said = f"session {session.id}, {session.state}" if session else "its session is not here any more"
    if not wanted(machine, unended, sessions):
        return "over", f"{said}; the next sweep ends it"
    return "ours", f"{said} (project {session.project_id})" if session else said


def wanted(machine: Machine, unended: Mapping[UUID, Session], ours: Container[UUID]) -> bool:
    """Whether to keep this machine: a session that is not over has it, or it is not ours to destroy.

    `ours`: those of the unmarked machines' sessions that are in this database, over or not.
    """
    owner = owner_of(machine.name)
    if owner is None or (owner.mark is None and owner.session_id not in ours):
        return True
    session = unended.get(owner.session_id)
    if session is None:
        return False
    if session.state is State.DRAINING:
        return True
    if owner.generation == session.generation:
        # There are two only if an orchestrator from before machines carried a mark made the other.
        return session.machine_id in (None, machine.id)
    # A newer generation than the row's is left alone: the row was read a moment ago, and may have moved on since.
    return owner.generation > session.generation
