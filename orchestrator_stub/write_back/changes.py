"""Takes what a container offers: reads the body, checks lock files, and has the database judge and write it.

The database is asked as the role `preview_writer`, which may execute that one function. Whatever is refused here
already goes along with its rule, so that an answer is whole, in the request's order, and kept for whoever asks again.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final
from uuid import UUID

import psycopg
import structlog
from psycopg.types.json import Jsonb

from orchestrator_stub.http.bodies import ChangesBody, OfferedChange
from orchestrator_stub.http.problems import Refusal
from orchestrator_stub.platform.database import Pool
from orchestrator_stub.write_back.lockfiles import is_lock, lock_problem

log = structlog.get_logger("write_back")

FILE_BYTES: Final = 2**20
OFFER_BYTES: Final = 4 * 2**20
OFFER_FILES: Final = 50
BODY_BYTES: Final = 8 * 2**20
"""Of an offer as JSON: text that is all quotes and line ends is twice as long."""


class Offers:
    """Takes offers into the database of `pool`. `registries`: hosts that lock files may name beside the public ones."""

    def __init__(self, pool: Pool, registries: AbstractSet[str] = frozenset()) -> None:
        self._pool = pool
        self._registries = registries

    async def take(self, session_id: UUID, project_id: UUID, offer: ChangesBody) -> dict[str, Any]:
        """The answer as it travels. Raises `Refusal`, `psycopg.OperationalError`."""
        _check_size(offer.changes)
        changes = await self._checked(project_id, offer.changes)
        try:
            async with self._pool.connection() as connection, connection.transaction():
                await connection.execute("set local role preview_writer")
                cursor = await connection.execute(
                    "select preview.write_back(%s, %s, %s, %s, %s)",
                    (session_id, offer.generation, offer.offer_id, offer.epoch, Jsonb(changes)),
                )
                row = await cursor.fetchone()
        except psycopg.DatabaseError as error:
            raise _refusal(error) from error
        assert row is not None
        answer: dict[str, Any] = row[0]
        log.info(
            "write_back.offer", session_id=str(session_id), revision=answer["revision"],
            outcomes=dict(Counter(result["outcome"] for result in answer["results"])),
        )  # fmt: skip
        return answer

    async def _checked(self, project_id: UUID, changes: Sequence[OfferedChange]) -> list[dict[str, Any]]:
        """The changes for the database, with what is refused here."""
        before = await self._locks(project_id, [change.file_path for change in changes])
        checked = []
        for change in changes:
            form = change.model_dump()
            if (rule := await self._rule_broken(change, before)) is not None:
                form["refused"] = rule
            if change.content is not None and "\0" in change.content:
                form["content"] = None  # PostgreSQL holds every character but this one
            checked.append(form)
        return checked

    async def _rule_broken(self, change: OfferedChange, before: dict[str, str | None]) -> str | None:
        content = change.content
        if change.action == "delete":
            return None
        if content is None or "\0" in content:
            return "text"
        if not is_lock(change.file_path):
            return None
        there = before.get(change.file_path)
        return await asyncio.to_thread(lock_problem, change.file_path, content, there, self._registries)

    async def _locks(self, project_id: UUID, paths: Sequence[str]) -> dict[str, str | None]:
        """What the project has at those of the paths that are lock files'."""
        wanted = [path for path in paths if is_lock(path)]
        if not wanted:
            return {}
        async with self._pool.connection() as connection:
            rows = await connection.execute(
                "select file_path, content from public.project_files_current"
                " where project_id = %s and file_path = any(%s)",
                (project_id, wanted),
            )
            return dict(await rows.fetchall())


def _check_size(changes: Sequence[OfferedChange]) -> None:
    sizes = [len(change.content.encode()) for change in changes if change.content is not None]
    if len(changes) > OFFER_FILES or sum(sizes) > OFFER_BYTES or any(size > FILE_BYTES for size in sizes):
        raise Refusal(
            413,
            "offer_too_large",
            f"An offer has at most {OFFER_FILES} files, {FILE_BYTES} bytes of each and {OFFER_BYTES} in all.",
        )
    if len({change.file_path for change in changes}) < len(changes):
        raise Refusal(400, "bad_body", "changes: a path is named twice.")


def _refusal(error: psycopg.DatabaseError) -> Exception:
    """What the database said, as an answer; another failure as it is."""
    match error.sqlstate:
        case "PT410":
            return Refusal(410, "session_over", "The session is over. Create a new one.")
        case "PT413":
            return Refusal(413, "offer_too_large", str(error.diag.message_primary))
        case "PT422":
            return Refusal(422, "offer_id_used", "Another offer was made under this offer_id.")
        case "PT429":
            wait = float(json.loads(error.diag.message_detail or "{}").get("retry_after", 2))
            return Refusal(429, "too_many_offers", "Too many offers in a minute; wait.", retry_after=wait)
    return error
