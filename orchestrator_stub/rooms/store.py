"""Asks the database for rooms: who has one, who may come in, what the file is, and to save it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import UUID

import psycopg

from orchestrator_stub.platform.database import Pool, fetch_one
from orchestrator_stub.rooms.state import Sending

CHANNEL: Final = "preview_rooms"
LEASE_SECONDS: Final = 15.0
"""Three times as long as between two renewals: so long a file has no room after its orchestrator died."""
CODE_SECONDS: Final = 60
"""A code stands in an address, which is logged and kept: long enough for a slow browser to use it, as at the door."""
MOST_CODES: Final = 100
"""Of one user, unused: tabs that come back at once after a restart, several times over."""


@dataclass(frozen=True, slots=True)
class Claim:
    """Who has a room. `generation`: of the room, whoever has it."""

    generation: int
    server: UUID
    address: str


@dataclass(frozen=True, slots=True)
class File:
    """A file as it is. `content` None: it is no text that can be shared, or is the version that was known."""

    version: int
    content: str | None
    size: int


Refused = Literal["fenced", "nobody", "conflict", "refused"]
"""Why a save was not taken: the room is somebody else's by now · none of those who typed may write · somebody else
saved first · the database takes no such content."""


def digest_of(code: str) -> bytes:
    """What of a code is kept."""
    return hashlib.sha256(code.encode()).digest()


class RoomStore:
    """`preview.rooms`, codes, and the saves of rooms. Raises `psycopg.Error` where the database does not answer."""

    def __init__(self, pool: Pool, server: UUID, address: str, lease_seconds: float = LEASE_SECONDS) -> None:
        """`server` names this process, `address` is how a browser reaches its rooms."""
        self._lease_seconds = lease_seconds
        self._pool = pool
        self.server = server
        self.address = address

    async def give_code(self, digest: bytes, project_id: UUID, path: str, user: UUID) -> bool:
        """Keep a code; False: the user has as many as one may have."""
        row = await fetch_one(
            self._pool, "select preview.give_room_code(%s, %s, %s, %s, %s, %s)",
            (digest, project_id, path, user, CODE_SECONDS, MOST_CODES),
        )  # fmt: skip
        return bool(row and row[0])

    async def take_code(self, digest: bytes, project_id: UUID, path: str) -> UUID | None:
        """Use a code up: the user whose it is; None: it is not good, or not for this file."""
        row = await fetch_one(
            self._pool, "select preview.take_room_code(%s, %s, %s)", (digest, project_id, path)
        )
        return row[0] if row else None

    async def claim(self, project_id: UUID, path: str) -> Claim | None:
        """Take the room if nobody has it, and say who does; None: there is no such project."""
        query = "select generation, server, address from preview.claim_room(%s, %s, %s, %s, %s)"
        row = await fetch_one(
            self._pool, query, (project_id, path, self.server, self.address, self._lease_seconds)
        )
        return Claim(*row) if row and row[0] is not None else None

    async def held(self, project_id: UUID, path: str) -> Claim | None:
        """Who has the room now, if its lease holds."""
        query = (
            "select generation, server, address from preview.rooms"
            " where project_id = %s and file_path = %s and lease_until >= now()"
        )
        row = await fetch_one(self._pool, query, (project_id, path))
        return Claim(*row) if row else None

    async def renew(self, generations: Sequence[int]) -> frozenset[int]:
        """Prolong the leases; those that are still ours."""
        async with self._pool.connection() as connection:
            rows = await connection.execute(
                "select preview.renew_rooms(%s, %s, %s)",
                (self.server, list(generations), self._lease_seconds),
            )
            return frozenset(row[0] for row in await rows.fetchall())

    async def leave(self, generation: int) -> None:
        """Give a room up: another orchestrator may have it at once."""
        async with self._pool.connection() as connection:
            await connection.execute(
                "delete from preview.rooms where generation = %s and server = %s", (generation, self.server)
            )

    async def members(self, project_id: UUID, users: Sequence[UUID]) -> frozenset[UUID]:
        """Those of the users who may write to the project."""
        row = await fetch_one(self._pool, "select preview.room_members(%s, %s)", (project_id, list(users)))
        return frozenset(row[0] if row else ())

    async def file(self, project_id: UUID, path: str, known: int | None = None) -> File | None:
        """The file as it is, without its text where that is at version `known`; None: it is not there."""
        query = (
            "select version, case when encoding = 'utf-8' and version is distinct from %s then content end,"
            " size_bytes from public.project_files where project_id = %s and file_path = %s"
            " and is_current_version and not is_deleted"
        )
        row = await fetch_one(self._pool, query, (known, project_id, path))
        return File(*row) if row else None

    async def save(self, project_id: UUID, path: str, generation: int, sent: Sending) -> int | Refused:
        """Save what is sent, as who typed last; the new version, or why it was not taken."""
        try:
            row = await fetch_one(
                self._pool, "select preview.save_room(%s, %s, %s, %s, %s, %s, %s)",
                (project_id, path, generation, sent.text, sent.version, [UUID(user) for user in sent.users],
                 sent.correlation_id),
            )  # fmt: skip
        except psycopg.OperationalError:
            raise
        except (psycopg.DataError, psycopg.IntegrityError):
            return "refused"
        except psycopg.Error as error:
            return self._refused(error)
        answer: dict[str, Any] = row[0] if row else {"fenced": True}
        if answer.get("fenced"):
            return "fenced"
        if answer.get("nobody"):
            return "nobody"
        return int(answer["version"])

    @staticmethod
    def _refused(error: psycopg.Error) -> Refused:
        match error.sqlstate:
            case "PT409":
                return "conflict"
            case "PT404" | "PT410":
                return "fenced"  # the project goes, and the room with it
            case "PT400" | "PT413":
                return "refused"
            case "PT429":  # for a while
                raise psycopg.OperationalError(str(error)) from error
        raise error
