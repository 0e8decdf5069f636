"""Builds, lists and drops layers by hand: `preview-orchestrator modules`.

Only this writes a shared layer, and only from an install that the agent's own command makes in a clean directory, from
manifests and lock file, without scripts (`preview-agent modules pack`). The key is of the machine that this runs on:
run it in the agent's image.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import httpx
from psycopg.types.json import Jsonb

from orchestrator_stub.config import Settings
from orchestrator_stub.modules.layers import BUCKET, PART_BYTES, SHARED
from orchestrator_stub.platform.database import Pool, fetch_one, pool_of
from orchestrator_stub.platform.storage import StorageClient

Say = Callable[[str], None]
MANIFESTS: Final = ("package.json", "package-lock.json", "npm-shrinkwrap.json", ".npmrc")

FILES: Final = """
select file_path, content from public.project_files
where project_id = %s and is_current_version and not is_deleted and file_path = any(%s) and content is not null
"""
SHARE: Final = """
insert into preview.modules (id, key, parts, size_bytes) values (%s, %s, %s, %s) on conflict do nothing returning id
"""
LIST: Final = """
select id, project_id, key, size_bytes, jsonb_array_length(parts), created_at, used_at
from preview.modules where parts is not null order by project_id nulls first, used_at desc
"""
DROP: Final = """
with gone as (delete from preview.modules where key = %(key)s or project_id::text = %(key)s returning id)
select count(*) from gone
"""


class CannotBuild(Exception):
    """No layer was made; the message says why."""


@asynccontextmanager
async def parts_of(settings: Settings) -> AsyncIterator[tuple[Pool, StorageClient]]:
    """The database and Storage that the settings name."""
    async with (
        pool_of(settings.database_url.get_secret_value(), size=1) as pool,
        httpx.AsyncClient(timeout=60) as http,
    ):
        key = settings.supabase_service_role_key.get_secret_value()
        yield pool, StorageClient(settings.storage_url, key, http, object_limit=settings.storage_object_limit)


async def build(settings: Settings, source: str, say: Say) -> None:
    """Make the shared layer of a directory or a project.

    Raises `CannotBuild`, `StorageFailure`, `psycopg.Error`, `OSError`.
    """
    async with parts_of(settings) as (pool, storage):
        with tempfile.TemporaryDirectory(prefix="preview-modules-") as made:
            file = Path(made, "layer")
            told = await _pack(_directory(source) or await _fetch(pool, source, Path(made)), file)
            key, module = str(told["key"]), uuid4()
            parts: list[dict[str, Any]] = []
            for content in _pieces(file):
                name = f"{SHARED}/{key}/{module}.{len(parts)}"
                await storage.upload(BUCKET, name, content, len(content), content_type="application/zstd")
                parts.append({"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)})
        size = sum(part["size"] for part in parts)
        if await fetch_one(pool, SHARE, (module, key, Jsonb(parts), size)) is None:
            say(f"{key} is there already")
        else:
            say(f"{key} is shared: {size / 1e6:.1f} MB in {len(parts)} parts")


def _directory(source: str) -> Path | None:
    return Path(source) if Path(source).is_dir() else None


def _pieces(file: Path) -> Iterator[bytes]:
    with file.open("rb") as packed:
        while content := packed.read(PART_BYTES):
            yield content


async def _fetch(pool: Pool, source: str, directory: Path) -> Path:
    """Write a project's manifests and lock file into a directory, and return it."""
    try:
        project_id = UUID(source)
    except ValueError:
        raise CannotBuild(f"{source} is neither a directory nor a project's id") from None
    async with pool.connection() as connection:
        cursor = await connection.execute(FILES.encode(), (project_id, list(MANIFESTS)))
        for path, content in await cursor.fetchall():
            (directory / path).write_text(content)
    return directory


async def _pack(directory: Path, file: Path) -> dict[str, Any]:
    argv = (sys.executable, "-m", "agent", "modules", "pack", str(directory), str(file))
    agent = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    said, complained = await agent.communicate()
    if agent.returncode != 0:
        raise CannotBuild(complained.decode(errors="replace").strip() or "preview-agent modules pack failed")
    told: dict[str, Any] = json.loads(said)
    return told


async def show(settings: Settings, say: Say, *, as_json: bool) -> None:
    """Print every layer: whose, key, size, and when it was used last. Raises `psycopg.Error`."""
    async with parts_of(settings) as (pool, _), pool.connection() as connection:
        rows = await (await connection.execute(LIST.encode())).fetchall()
    for module, project, key, size, count, created, used in rows:
        if as_json:
            say(
                json.dumps(
                    {
                        "id": str(module),
                        "project_id": str(project) if project else None,
                        "key": key,
                        "size_bytes": size,
                        "parts": count,
                        "created_at": created.isoformat(),
                        "used_at": used.isoformat(),
                    }
                )
            )
        else:
            say(f"{project or SHARED!s:<36}  {key}  {size / 1e6:>7.1f} MB  used {used:%Y-%m-%d %H:%M}")
    if not rows and not as_json:
        say("no layers")


async def drop(settings: Settings, which: str, say: Say) -> None:
    """Drop the layers of a key, or of a project; their objects follow within hours. Raises `psycopg.Error`."""
    async with parts_of(settings) as (pool, _):
        row = await fetch_one(pool, DROP, {"key": which})
    say(f"dropped {row[0] if row else 0}")
