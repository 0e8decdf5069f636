"""Fills a new project with the files of one directory, in one commit, through the bulk RPC."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg

from orchestrator_stub.platform.database import Pool, head_of
from orchestrator_stub.platform.source_files import as_text, path_problem, scan, shown
from orchestrator_stub.platform.storage import ASSETS, StorageClient
from orchestrator_stub.sessions.controller import TemplateRefused


class Template:
    """`directory`'s files. None: new projects stay empty."""

    def __init__(
        self,
        directory: Path | None,
        pool: Pool,
        storage: StorageClient,
    ) -> None:
        self._directory = directory
        self._pool = pool
        self._storage = storage

    async def apply(self, project_id: UUID) -> bool:
        """Write the template into a project that never had a commit. False: it had one, or is gone.

        Twice at once is once: each file is written only where no file is, and the second finds the first's.
        Raises `TemplateRefused`, and `StorageFailure`, `psycopg.OperationalError`, `OSError` for what may pass.
        """
        if self._directory is None or not await self._is_new(project_id):
            return False
        files = await asyncio.to_thread(_read_all, self._directory)
        changes: list[dict[str, Any]] = []
        for path, (content, executable) in files.items():
            digest = hashlib.sha256(content).hexdigest()
            change = {
                "file_path": path,
                "content_hash": digest,
                "executable": executable,
                "expected_version": 0,
            }
            text = as_text(content)
            if text is not None:
                change["content"] = text
            else:
                change["encoding"] = "base64"
                await self._storage.ensure(ASSETS, f"{project_id}/{digest}", content, len(content))
            changes.append(change)
        try:
            async with self._pool.connection() as connection:
                await connection.execute(
                    "select public.apply_project_files(%s, %s::jsonb, 'template')",
                    (project_id, json.dumps(changes)),
                )
        except psycopg.DatabaseError as error:
            if error.sqlstate in ("PT404", "PT409", "PT410", "PT422"):
                return False
            if isinstance(error, psycopg.OperationalError):
                raise
            raise TemplateRefused(
                f"{self._directory} is no template: {error.diag.message_primary}"
            ) from error
        return True

    async def _is_new(self, project_id: UUID) -> bool:
        head = await head_of(self._pool, project_id)
        return head is not None and head.revision == 0


def _read_all(directory: Path) -> dict[str, tuple[bytes, bool]]:
    found = {}
    for path in sorted(scan(directory)):
        if problem := path_problem(path):
            raise TemplateRefused(f"{directory} is no template: {shown(path)}: {problem}")
        file = directory / path
        found[path] = (file.read_bytes(), bool(file.stat().st_mode & 0o100))
    return found
