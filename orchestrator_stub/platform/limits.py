"""Reads what a project may hold from where it is set: the database's view `preview.limits`.

The database refuses what is above a limit, so whoever reads a project has to take all that is below. A machine is told
when it is made. Where a project is larger than its limit, since that was lowered or is younger than the project, the
machine is told the project's size: what is saved can be opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from uuid import UUID

from orchestrator_stub.platform.database import Pool, fetch_one
from orchestrator_stub.platform.source_files import (
    MAX_ASSET,
    MAX_PATH_BYTES,
    MAX_SEGMENT_BYTES,
    MAX_SEGMENTS,
    MAX_TEXT,
)

RULES: Final = {
    "path.bytes": MAX_PATH_BYTES,
    "path.segment_bytes": MAX_SEGMENT_BYTES,
    "path.segments": MAX_SEGMENTS,
}
"""What the agents' code and ours take, whatever the database says."""

TOMBSTONE_BYTES: Final = 8 * 2**20
"""Of a manifest, for what was deleted: 80,000 files within a day, which is how long it is told."""

ARCHIVE_BYTES: Final = 512 * 2**20
"""Of an archive as it travels; every agent takes that much (its SNAPSHOT_MAX_COMPRESSED_BYTES)."""

FILE_BYTES: Final = 100 * 2**20
"""Of one file; likewise (its SNAPSHOT_MAX_FILE_BYTES). A file from before a limit was lowered is taken up to this."""

_LISTED: Final = 160
"""Bytes of one file in a manifest, without its path; a path doubles where it is all quotation marks."""

_LIMITS: Final = "select jsonb_object_agg(name, value) from preview.limits"
_HELD: Final = """
select coalesce(t.files, c.files), coalesce(t.bytes, c.bytes), coalesce(t.path_bytes, c.path_bytes)
from (select %s::uuid as id) p
left join preview.project_totals t on t.project_id = p.id
left join lateral preview.counted(p.id) c on t.files is null
"""


def manifest_bytes(files: int, path_bytes: int) -> int:
    """How long a manifest of so many files can be, with what was deleted."""
    return files * _LISTED + 2 * path_bytes + TOMBSTONE_BYTES


async def limits_of(pool: Pool) -> Mapping[str, int]:
    """Every limit by its name, in bytes and numbers."""
    row = await fetch_one(pool, _LIMITS, ())
    assert row is not None
    return {name: value for name, value in row[0].items() if value is not None}


def differences(limits: Mapping[str, int]) -> list[str]:
    """What the database takes and the code of agents and orchestrator does not, one sentence each."""
    found = [
        f"{name} is {limits.get(name)} in preview.limits and {value} in the code of this release"
        for name, value in RULES.items()
        if limits.get(name) != value
    ]
    return found + [
        f"{name} is {limits[name]} in preview.limits: what `dev` saves above that is refused, since it takes {value}"
        for name, value in (("file.bytes", MAX_TEXT), ("asset.bytes", MAX_ASSET))
        if limits.get(name, value) < value
    ]


async def environment_of(pool: Pool, project_id: UUID, *, archive_bytes: int) -> dict[str, str]:
    """What a machine has to be told to take all of this project.

    Args:
        archive_bytes: What Storage takes of one object.
    """
    limits = await limits_of(pool)
    held = await fetch_one(pool, _HELD, (project_id,))
    assert held is not None
    files, size, path_bytes = (
        max(limits[f"project.{name}"], have)
        for name, have in zip(("files", "bytes", "path_bytes"), held, strict=True)
    )
    manifest = manifest_bytes(files, path_bytes)
    # An archive has its manifest beside the files.
    return {
        "SNAPSHOT_MAX_ENTRIES": str(files + 1),
        "SNAPSHOT_MAX_BYTES": str(size + manifest),
        "SNAPSHOT_MAX_FILE_BYTES": str(
            max(FILE_BYTES, manifest, limits["file.bytes"], limits.get("asset.bytes", 0))
        ),
        "SNAPSHOT_MAX_MANIFEST_BYTES": str(manifest),
        "SNAPSHOT_MAX_COMPRESSED_BYTES": str(max(archive_bytes, ARCHIVE_BYTES)),
    }
