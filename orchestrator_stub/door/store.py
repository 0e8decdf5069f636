"""Asks the database what stands behind a label, gives a project its label, and takes access back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, LiteralString
from urllib.parse import urlencode
from uuid import UUID

from orchestrator_stub.door.decision import ENTER, Address, Behind
from orchestrator_stub.door.passes import Passes
from orchestrator_stub.platform.database import Pool, fetch_one

CHANNEL: Final = "preview_door"

STANDING: Final[LiteralString] = (
    "select label, (select session_id where not exists"
    " (select from preview.sessions t where t.id = session_id and t.trial)),"
    " state, preview_url, door_version, expires_at, machine_driver, machine_id, run"
    " from preview.door_standing(%s)"
)
"""Without the sessions by which a rollout tries an image: they are nobody's."""


class DoorStore:
    """`preview.doors` and what of `preview.sessions` concerns the door. Raises `psycopg.Error`."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def standing(self, labels: Sequence[str]) -> Mapping[str, list[Behind]]:
        """The sessions behind each label; a label that is nobody's is left out."""
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(STANDING, (list(labels),))).fetchall()
        found: dict[str, list[Behind]] = {}
        for label, session_id, *rest in rows:
            behind = found.setdefault(label, [])
            if session_id is not None:
                behind.append(Behind(session_id, *rest))
        return found

    async def label(self, project_id: UUID) -> str:
        """The project's label, made at its first need."""
        row = await fetch_one(self._pool, "select preview.door_label(%s)", (project_id,))
        assert row is not None
        return str(row[0])

    async def version(self, session_id: UUID) -> int | None:
        """The version of the session's door; None: there is no such session."""
        row = await fetch_one(
            self._pool, "select door_version from preview.sessions where id = %s", (session_id,)
        )
        return int(row[0]) if row else None

    async def revoke(self, session_id: UUID) -> None:
        """Have every code and cookie of the session be over."""
        async with self._pool.connection() as connection:
            await connection.execute(
                "update preview.sessions set door_version = door_version + 1 where id = %s", (session_id,)
            )

    async def want_awake(self, session_id: UUID) -> None:
        """Note that somebody wants to see the session, if it sleeps: an orchestrator's next sweep wakes it."""
        async with self._pool.connection() as connection:
            await connection.execute(
                "update preview.sessions set wake_wanted_at = now() where id = %s and state = 'suspended'"
                " and (wake_wanted_at is null or wake_wanted_at < now() - interval '1 second')",
                (session_id,),
            )

    async def viewed(self, session_ids: Sequence[UUID]) -> None:
        """Note that somebody looks at the sessions: none of them is idle."""
        async with self._pool.connection() as connection:
            await connection.execute(
                "update preview.sessions set viewed_at = now() where id = any(%s)", (list(session_ids),)
            )

    async def progress(self, session_id: UUID) -> Mapping[str, Any] | None:
        """How far the session's start is, as its agent said last; None: there is no such session."""
        query = (
            "select state, problem, status -> 'state', status -> 'dev_server', status -> 'problems'"
            " from preview.sessions where id = %s"
        )
        row = await fetch_one(self._pool, query, (session_id,))
        if row is None:
            return None
        names = ("session", "problem", "agent", "dev_server", "problems")
        return dict(zip(names, row, strict=True))


class Access:
    """Lets people in, and takes that back: what the session API asks of the door."""

    def __init__(self, store: DoorStore, passes: Passes, address: Address) -> None:
        self._store = store
        self._passes = passes
        self._address = address

    async def host(self, project_id: UUID) -> str | None:
        """The host name that the project's dev server is reached by; None on loopback, where all are let in anyway."""
        if self._address.plain:
            return None
        return f"{await self._store.label(project_id)}.{self._address.domain.partition(':')[0]}"

    async def label(self, project_id: UUID) -> str:
        """The project's label."""
        return await self._store.label(project_id)

    async def open(self, project_id: UUID, session_id: UUID, path: str) -> tuple[str, float]:
        """An address that lets whoever has it into the session, and until when (Unix seconds)."""
        label = await self._store.label(project_id)
        code, expires_at = self._passes.code(session_id, await self._store.version(session_id) or 0)
        query = urlencode({"code": code, "to": path})
        return f"{self._address.url(label)}{ENTER}?{query}", expires_at

    async def revoke(self, session_id: UUID) -> None:
        """Have every code and cookie of the session be over, within a second at every door."""
        await self._store.revoke(session_id)
