"""Answers an agent that asks where the database is and what it missed: the session API's sync and head.

The database itself says what happened since a revision (`public.changes_since`); here its answer is completed with
the bytes of binary files, or turned into a signed snapshot when changes are not the way.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Sequence
from typing import Any, Final, Protocol
from uuid import UUID

import psycopg

from orchestrator_stub.platform.database import Head, Pool, fetch_one
from orchestrator_stub.platform.recent import Recent
from orchestrator_stub.platform.storage import ASSETS, StorageFailure
from orchestrator_stub.snapshots.availability import Reason, any_unavailable, note
from orchestrator_stub.snapshots.model import SignedSnapshot, SnapshotSource

FULL: Final = frozenset({"tree_hash", "snapshot_rejected"})
"""Reasons for which no difference will do: the agent's tree, or the snapshot it was given, is not what it should be."""

REBUILD: Final = frozenset({"snapshot_rejected"})
"""Reasons for which a kept snapshot will not do either."""

RESIGN: Final = frozenset({"snapshot_expired", "snapshot_unavailable"})
"""Reasons for which a kept URL will not do: the agent has tried it."""

ASSET_DOWNLOADS: Final = 4
"""Binary files fetched at once for one answer."""

MANIFEST_INLINE: Final = 1000
"""Files of a manifest that an answer repeats; a longer one is read from the zip, where it is the first entry."""


class ProjectGone(Exception):
    """The project of a session does not exist any more."""


class Assets(Protocol):
    """Where the bytes of binary files are."""

    async def download(self, bucket: str, path: str) -> bytes:
        """The object's bytes. Raises `SnapshotUnavailable` or an `OSError` when they cannot be had now."""
        ...


class Catchup:
    """Answers from the database behind `pool`. `inline_limit`: bytes of content one answer may carry."""

    def __init__(
        self,
        pool: Pool,
        snapshots: SnapshotSource,
        assets: Assets,
        *,
        inline_limit: int,
    ) -> None:
        self._pool = pool
        self._snapshots = snapshots
        self._assets = assets
        self._inline_limit = inline_limit
        self._hashes: Recent[UUID, tuple[Head, str]] = Recent()

    async def tree_hash(self, project_id: UUID, head: Head) -> tuple[Head, str | None]:
        """A head, this one or a later, and the hash of exactly that tree, computed once for each revision.

        None: nobody can have that tree, because a file of it is unavailable. Raises `ProjectGone`.
        """
        kept = self._hashes.get(project_id)
        if kept is None or kept[0] != head:
            # One statement: the head and the hash are of one moment.
            row = await fetch_one(
                self._pool,
                "select epoch::text, revision, public.project_tree_hash(project_id)"
                " from public.project_heads where project_id = %s",
                (project_id,),
            )
            if row is None:
                raise ProjectGone(str(project_id))
            kept = Head(row[0], row[1]), row[2]
            if await any_unavailable(self._pool, project_id):
                return kept[0], None
            self._hashes.put(project_id, kept)
        return kept

    async def sync(
        self,
        project_id: UUID,
        *,
        epoch: str | None,
        revision: int,
        reason: str,
        paths: Sequence[str],
        accept: Sequence[str] = (),
        session_id: UUID | None = None,
    ) -> dict[str, Any]:
        """The answer of `POST …/sync`, as it travels; an archive is built out of the session's allowance.

        `accept` names what the agent reads besides whole contents (`splices`).

        Raises `ProjectGone`, `SnapshotUnavailable`, `AllowanceSpent`.
        """
        if epoch is None or reason in FULL:
            snapshot = await self._snapshots.signed_snapshot(
                project_id, rebuild=reason in REBUILD, resign=reason in RESIGN, payer=session_id
            )
            if reason == "tree_hash" and "unavailable" in snapshot.manifest:
                # What that one left out may be there again: the hash is compared only when all is.
                snapshot = await self._snapshots.signed_snapshot(project_id, rebuild=True, payer=session_id)
            return _snapshot(snapshot)
        try:
            row = await fetch_one(
                self._pool,
                "select public.changes_since(%s, %s, %s, %s, %s, %s)",
                (project_id, epoch, revision, list(paths) or None, self._inline_limit, list(accept) or None),
            )
        except psycopg.DatabaseError as error:
            if error.sqlstate == "PT404":
                raise ProjectGone(str(project_id)) from None
            raise
        assert row is not None
        answer: dict[str, Any] = row[0]
        if answer["kind"] == "changes":
            # A path that was asked for and never was: an editor's optimistic write that came to nothing.
            known = {change["file_path"] for change in answer["changes"]}
            absent = [path for path in paths if path not in known]
            answer["changes"] += [{"action": "delete", "file_path": path, "version": 0} for path in absent]
        match answer["kind"]:
            case "current":
                return answer
            case "changes" if await self._complete(project_id, answer):
                return answer
            case "changes":
                # More bytes than an answer should carry: a delta, or all when the wanted paths are older than that.
                newer = not paths
                return _snapshot(
                    await self._snapshots.signed_snapshot(
                        project_id, base_revision=revision if newer else None, payer=session_id
                    )
                )
        base = revision if answer.get("reason") == "too_large" and not paths else None
        # An archive that is kept under this revision may hold commits that the database has lost since.
        ahead = answer.get("reason") == "ahead"
        snapshot = await self._snapshots.signed_snapshot(
            project_id, base_revision=base, rebuild=ahead, payer=session_id
        )
        return _snapshot(snapshot) | ({"reason": "ahead"} if ahead else {})

    async def _complete(self, project_id: UUID, answer: dict[str, Any]) -> bool:
        """Give every binary file of the answer its bytes, or name it as unavailable. False: they are too many."""
        changes = answer["changes"]
        # Not by a content of null: a text that is splices has none either.
        binary = [c for c in changes if c.get("action") == "update" and c.get("encoding") == "base64"]
        if not binary:
            return True
        row = await fetch_one(
            self._pool,
            "select coalesce(sum(size_bytes), 0) from public.project_files_current"
            " where project_id = %s and file_path = any(%s)",
            (project_id, [c["file_path"] for c in binary]),
        )
        if row is not None and row[0] > self._inline_limit:
            return False
        slots = asyncio.Semaphore(ASSET_DOWNLOADS)

        async def leave_out(change: dict[str, Any], reason: Reason) -> None:
            await note(self._pool, project_id, change["content_hash"], reason)
            changes.remove(change)
            answer.setdefault("unavailable", []).append({"file_path": change["file_path"], "reason": reason})

        async def fetch(change: dict[str, Any]) -> None:
            try:
                async with slots:
                    content = await self._assets.download(ASSETS, f"{project_id}/{change['content_hash']}")
            except StorageFailure as error:
                if not error.missing:
                    raise
                await leave_out(change, "lost")
                return
            if hashlib.sha256(content).hexdigest() != change["content_hash"]:
                await leave_out(change, "wrong_bytes")
                return
            change["content"] = base64.b64encode(content).decode()
            change["encoding"] = "base64"

        await asyncio.gather(*(fetch(change) for change in binary))
        return True


def _snapshot(snapshot: SignedSnapshot) -> dict[str, Any]:
    small = len(snapshot.manifest.get("files", ())) <= MANIFEST_INLINE
    return {
        "kind": "snapshot",
        "snapshot_url": snapshot.url,
        "manifest": snapshot.manifest if small else None,
    }
