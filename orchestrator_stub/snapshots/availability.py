"""Knows which content readers cannot be given: its object is gone or wrong, or has no room in an archive.

Such a file is its own path's problem. It is left out of archives and answers, which name it, and the project opens with
everything else. What was found is kept in the database, so that no tree hash is compared that nobody can have, and is
forgotten when the content was read well again.
"""

from __future__ import annotations

from typing import Final, Literal
from uuid import UUID

from orchestrator_stub.platform.database import Pool, fetch_one

Reason = Literal["lost", "wrong_bytes", "no_room"]

READ_AGAIN: Final = 600.0
"""Seconds after which content that was found bad is read again: somebody may have uploaded it again meanwhile."""

STORAGE_LIMIT: Final = 52_428_800
"""Bytes that Supabase Storage takes by default, where the bucket names no limit. A smaller one costs more tries."""

_NOTE: Final = """
insert into preview.unavailable_content (project_id, content_hash, reason)
select project_id, %s, %s from public.project_heads where project_id = %s
on conflict (project_id, content_hash) do update set reason = excluded.reason, found_at = now()
"""
_LARGEST: Final = """
select content_hash, max(size_bytes) from public.project_files
where project_id = %s and is_current_version and not is_deleted
  and preview.unavailable(project_id, file_path, content_hash, content is null) is null
group by content_hash order by bool_or(content is null) desc, max(size_bytes) desc, content_hash
"""
_ANY: Final = """
select exists (
  select from public.project_files f
  where f.project_id = %s and f.is_current_version and not f.is_deleted
    and preview.unavailable(f.project_id, f.file_path, f.content_hash, f.content is null) is not null
)
"""


async def note(pool: Pool, project_id: UUID, digest: str, reason: Reason) -> None:
    """Keep that this content cannot be given."""
    async with pool.connection() as connection:
        await connection.execute(_NOTE, (digest, reason, project_id))


async def forget(pool: Pool, project_id: UUID, digests: list[str]) -> None:
    """Forget what was kept of content that was read well."""
    async with pool.connection() as connection:
        await connection.execute(
            "delete from preview.unavailable_content where project_id = %s and content_hash = any(%s)",
            (project_id, digests),
        )


async def make_room(pool: Pool, project_id: UUID, bucket: str, size: int) -> bool:
    """Note the largest files, assets first, as having no room in an archive of `size` bytes. False: none is left."""
    async with pool.connection() as connection:
        limit = await (
            await connection.execute("select file_size_limit from storage.buckets where id = %s", (bucket,))
        ).fetchone()
        over = max(1, size - ((limit and limit[0]) or STORAGE_LIMIT))
        rows = await (await connection.execute(_LARGEST, (project_id,))).fetchall()
    noted = 0
    for digest, file_size in rows:
        if noted >= over:
            break
        await note(pool, project_id, digest, "no_room")
        noted += file_size
    return noted > 0


async def any_unavailable(pool: Pool, project_id: UUID) -> bool:
    """Whether the project has a current file that readers cannot be given."""
    row = await fetch_one(pool, _ANY, (project_id,))
    return bool(row and row[0])
