"""`preview-orchestrator machines`: every machine that the platform has, and whose it is.

    148e21ea7b3d89  running   ours        session 3f0c…, ready (project 77aa…)
    6e82d1f3c94587  stopped   over        session 91d2…, gone; the next sweep ends it
    9080e1bd2f7387  running   another's   installation 4ab7a3f75f6e
    3d8d9f62b19789  running   nobody's    from before machines said whose they are, and its session is not here

It changes nothing. What is nobody's is left alone by every sweep; a person may end it on the platform.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from uuid import UUID

import psycopg

from orchestrator_stub.config import Settings
from orchestrator_stub.machines.driver import Machine
from orchestrator_stub.platform.database import pool_of
from orchestrator_stub.platform.redaction import Redactor, secrets_of
from orchestrator_stub.serve import CONNECT_TIMEOUT, driver_of
from orchestrator_stub.server import configure_logs
from orchestrator_stub.sessions.controller import wanted
from orchestrator_stub.sessions.lifecycle import ENDED, Installation, Session, owner_of
from orchestrator_stub.sessions.store import SessionStore


@dataclass(frozen=True, slots=True)
class Found:
    """One machine. `whose`: `ours`, `over` (ours, for the next sweep to end), `another's` or `nobody's`."""

    machine_id: str
    name: str
    state: str
    whose: str
    detail: str
    installation: str | None = None
    session_id: str | None = None
    session_state: str | None = None


def judged(machine: Machine, installation: Installation, sessions: Mapping[UUID, Session]) -> Found:
    """Whose a machine is. `sessions` are those of this database that the machines' names speak of."""
    owner = owner_of(machine.name)
    mark, session_id = (owner.mark, owner.session_id) if owner else (None, None)
    session = (
        sessions.get(session_id) if session_id is not None and mark in (None, installation.mark) else None
    )
    whose, detail = _whose(machine, mark, session, installation, sessions)
    return Found(
        machine.id, machine.name, machine.state.value, whose, detail,
        installation=mark,
        session_id=str(session_id) if session_id else None,
        session_state=session.state.value if session else None,
    )  # fmt: skip


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


async def run_machines(settings: Settings, say: Callable[[str], None], *, as_json: bool) -> None:
    """List them all. Raises `CannotServe`, `MachineError`, `Unmigrated`, `psycopg.Error`."""
    configure_logs("warning", settings.log_format, Redactor(secrets_of(settings)))
    dsn = settings.database_url.get_secret_value()
    driver = driver_of(settings)
    try:
        # A pool would try again and again to reach a database that is not there.
        async with await psycopg.AsyncConnection.connect(dsn, connect_timeout=CONNECT_TIMEOUT):
            pass
        async with pool_of(dsn, size=1) as pool:
            store = SessionStore(pool)
            installation = await store.installation()
            machines = await driver.list()
            owners = [owner for machine in machines if (owner := owner_of(machine.name)) is not None]
            sessions = await store.known({owner.session_id for owner in owners})
    finally:
        await driver.close()
    found = [judged(machine, installation, sessions) for machine in machines]
    for each in sorted(found, key=lambda each: (each.whose, each.machine_id)):
        line = f"{each.machine_id}  {each.state:<8}  {each.whose:<9}  {each.detail}"
        say(json.dumps(asdict(each)) if as_json else line)
    if not found and not as_json:
        say("no machines")
