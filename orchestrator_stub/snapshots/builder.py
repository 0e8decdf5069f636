"""Builds a snapshot: the project's current tree as one zip in Storage, behind a URL that expires.

The head and the files are read in one REPEATABLE READ transaction, so the archive is exactly the tree of the revision
it names; binaries, which are named by their hash and never change, are fetched after it has ended. The archive goes
to a temporary file first: memory stays flat whatever the project's size, the database is not kept waiting for the
upload, and the object's name can end in its own hash.

The bytes follow from the revision alone (`created_at` is the time of its commit), so building twice stores once, and
a revision that was built is only signed again. How long building took is therefore not in the archive: it is in the
manifest that travels beside it (`build_seconds`), in the metric, and in the returned value.
"""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC
from typing import IO, Any, Final
from uuid import UUID, uuid4

import orjson
import psycopg
import structlog
from prometheus_client import CollectorRegistry, Histogram

from orchestrator_stub.platform.database import Pool
from orchestrator_stub.platform.limits import TOMBSTONE_BYTES
from orchestrator_stub.platform.storage import ASSETS, StorageClient, StorageFailure
from orchestrator_stub.snapshots import newest
from orchestrator_stub.snapshots.availability import READ_AGAIN, Reason, forget, make_room, note
from orchestrator_stub.snapshots.model import SnapshotUnavailable
from orchestrator_stub.snapshots.zip_writer import ArchiveTooLarge, ZipWriter

log = structlog.get_logger("snapshots")

BUCKET: Final = "project-snapshots"
MANIFEST_PATH: Final = ".preview-sync/manifest.json"
FORMAT: Final = 1

BATCH_BYTES: Final = 4 * 2**20
"""Of file content read in one query: enough that the round trip does not count, little against memory."""

SPOOL_BYTES: Final = 4 * 2**20
"""An archive up to this size never touches the disk."""

BUILDS_AT_ONCE: Final = 4
"""Building is compression: more builds than cores finish no sooner."""

_HEAD = """
select epoch::text, revision, pruned_revision, updated_at from public.project_heads where project_id = %s
"""
_FILES = """
select f.file_path, f.content_hash, f.size_bytes, f.version, f.executable, f.content is null,
       preview.unavailable(f.project_id, f.file_path, f.content_hash, f.content is null),
       u.found_at < now() - %s * interval '1 second'
from public.project_files f
left join preview.unavailable_content u
  on u.project_id = f.project_id and u.content_hash = f.content_hash
where f.project_id = %s and f.is_current_version and not f.is_deleted and f.revision > %s
order by f.file_path
"""
_DELETED = """
select file_path, version, total from (
  select file_path, version, count(*) over () as total,
         sum(octet_length(to_json(file_path)::text) + 40) over (order by revision desc, file_path) as bytes
  from public.project_files where project_id = %s and is_current_version and is_deleted and revision > %s
) d where bytes <= %s
order by file_path
"""
"""The latest, as many as an agent's bound on manifests has room for."""
_CONTENT = """
select file_path, convert_to(content, 'UTF8') from public.project_files
where project_id = %s and is_current_version and not is_deleted and revision > %s and content is not null
  and file_path between %s and %s
order by file_path
"""


class ProjectUnknown(SnapshotUnavailable):
    """There is no such project."""


@dataclass(frozen=True, slots=True)
class StoredSnapshot:
    """An archive in Storage. `manifest` is the archive's own plus `build_seconds`; `bytes` its size there."""

    object_path: str
    manifest: dict[str, Any]
    bytes: int
    sha256: str
    build_seconds: float


@dataclass(frozen=True, slots=True)
class _Head:
    epoch: str
    revision: int
    pruned_revision: int
    committed_at: str


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    digest: str
    size: int
    version: int
    executable: bool
    is_binary: bool
    unavailable: str | None = None
    """Why readers cannot be given it."""
    read_again: bool | None = None
    """It was found bad so long ago that it is tried again; None: it never was."""


class _Unreadable(Exception):
    """A binary file's object is not what it should be."""

    def __init__(self, file: _File, reason: Reason) -> None:
        self.file = file
        self.reason = reason
        super().__init__(f"{file.path!r}: {reason}")


class SnapshotBuilder:
    """Builds the archive of a project's head, stores it, and signs URLs for it."""

    def __init__(
        self, pool: Pool, storage: StorageClient, *, registry: CollectorRegistry | None = None
    ) -> None:
        self._pool = pool
        self._storage = storage
        self._slots = asyncio.Semaphore(BUILDS_AT_ONCE)
        self._seconds = Histogram(
            "preview_orchestrator_snapshot_build_seconds",
            "From the first query to the object being in Storage.",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=registry,
        )

    async def build(
        self, project_id: UUID, *, base_revision: int | None = None, anew: bool = False
    ) -> StoredSnapshot:
        """Build the project's head and store it. `anew`: under a new name even if these bytes are stored already.

        Raises `SnapshotUnavailable`, `ProjectUnknown`.
        """
        started = time.perf_counter()
        try:
            async with self._slots:
                with tempfile.SpooledTemporaryFile(SPOOL_BYTES) as spool:
                    while True:
                        manifest, size = await self._write_what_can_be(project_id, base_revision, spool)
                        digest = await asyncio.to_thread(_sha256, spool)
                        path = _object_path(project_id, manifest, digest, anew=anew)
                        if await self._stored(project_id, path, spool, size):
                            break
        except (StorageFailure, ArchiveTooLarge, OSError) as error:
            raise SnapshotUnavailable(f"cannot build a snapshot: {error}") from error
        except psycopg.OperationalError as error:
            raise SnapshotUnavailable("cannot build a snapshot: the database does not answer") from error
        seconds = time.perf_counter() - started
        self._seconds.observe(seconds)
        await newest.note(self._pool, project_id, manifest, path)
        log.info(
            "snapshot.built",
            project_id=str(project_id),
            revision=manifest["revision"],
            base_revision=manifest["base_revision"],
            files=len(manifest["files"]),
            bytes=size,
            seconds=round(seconds, 3),
        )
        return StoredSnapshot(path, {**manifest, "build_seconds": round(seconds, 6)}, size, digest, seconds)

    async def signed_url(self, object_path: str, expires_in: int) -> str:
        """A URL for a stored snapshot. Raises `SnapshotUnavailable`."""
        try:
            return await self._storage.sign(BUCKET, object_path, expires_in)
        except StorageFailure as error:
            raise SnapshotUnavailable(f"cannot sign a snapshot: {error}") from error

    # --- building

    async def _write_what_can_be(
        self, project_id: UUID, base_revision: int | None, spool: IO[bytes]
    ) -> tuple[dict[str, Any], int]:
        """The archive of all that can be read. The manifest comes first, so what cannot be read begins it anew."""
        while True:
            spool.seek(0)
            spool.truncate()
            try:
                return await self._write(project_id, base_revision, spool)
            except _Unreadable as bad:
                log.error(
                    "snapshot.file_left_out", project_id=str(project_id), file_path=bad.file.path,
                    content_hash=bad.file.digest, reason=bad.reason,
                )  # fmt: skip
                await note(self._pool, project_id, bad.file.digest, bad.reason)

    async def _stored(self, project_id: UUID, path: str, spool: IO[bytes], size: int) -> bool:
        """Store an archive. False: Storage takes none so large, and without its largest files it may be."""
        try:
            await self._storage.ensure(BUCKET, path, _pieces(spool), size, content_type="application/zip")
        except StorageFailure as error:
            if error.too_large and await make_room(self._pool, project_id, BUCKET, size):
                log.error("snapshot.too_large", project_id=str(project_id), bytes=size)
                return False
            raise
        return True

    async def _write(
        self, project_id: UUID, base_revision: int | None, spool: IO[bytes]
    ) -> tuple[dict[str, Any], int]:
        """The archive into `spool`; its manifest and its size."""
        archive = ZipWriter(spool)
        async with self._reading() as connection:
            head = await _head(connection, project_id)
            base = base_revision
            if base is not None and not head.pruned_revision <= base <= head.revision:
                base = None
            above = -1 if base is None else base
            deleted, is_all = await _deleted(connection, project_id, above)
            if base is not None and not is_all:
                # What is new has to name all that is gone. An archive of everything need not: it is not there.
                base, above = None, -1
                deleted, _ = await _deleted(connection, project_id, above)
            found = await _files(connection, project_id, above)
            files = [file for file in found if not file.unavailable or file.read_again]
            left_out = [file for file in found if file.unavailable and not file.read_again]
            manifest = _manifest(project_id, head, base, files, deleted, left_out)
            archive.add(MANIFEST_PATH, orjson.dumps(manifest))
            texts = [file for file in files if not file.is_binary]
            for batch in _batches(texts):
                contents = await _contents(connection, project_id, above, batch)
                await asyncio.to_thread(_add_all, archive, batch, contents)
        for file in files:
            if file.is_binary:
                await self._add_binary(archive, project_id, file)
        if well := [file.digest for file in files if file.read_again]:
            await forget(self._pool, project_id, well)
        return manifest, archive.finish()

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection in a transaction that sees one moment of the database."""
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("set transaction isolation level repeatable read, read only")
            yield connection

    async def _add_binary(self, archive: ZipWriter, project_id: UUID, file: _File) -> None:
        archive.begin(file.path, executable=file.executable)
        digest = hashlib.sha256()
        try:
            async with self._storage.stream(ASSETS, f"{project_id}/{file.digest}") as chunks:
                async for chunk in chunks:
                    digest.update(chunk)
                    archive.write(chunk)
        except StorageFailure as error:
            if error.missing:
                raise _Unreadable(file, "lost") from None
            raise
        size = archive.end()
        if digest.hexdigest() != file.digest or size != file.size:
            raise _Unreadable(file, "wrong_bytes")


def _manifest(
    project_id: UUID,
    head: _Head,
    base_revision: int | None,
    files: Sequence[_File],
    deleted: Sequence[tuple[str, int]],
    left_out: Sequence[_File],
) -> dict[str, Any]:
    """As protocol.md writes it. Nothing in here depends on when or where it is built."""
    return {
        "format": FORMAT,
        "project_id": str(project_id),
        "epoch": head.epoch,
        "revision": head.revision,
        "base_revision": base_revision,
        "created_at": head.committed_at,
        "files": [
            {
                "file_path": file.path,
                "content_hash": file.digest,
                "size": file.size,
                "version": file.version,
                **({"executable": True} if file.executable else {}),
            }
            for file in files
        ],
        "deleted": [{"file_path": path, "version": version} for path, version in deleted],
        **(
            {"unavailable": [{"file_path": file.path, "reason": file.unavailable} for file in left_out]}
            if left_out
            else {}
        ),
    }


def _object_path(project_id: UUID, manifest: dict[str, Any], digest: str, *, anew: bool) -> str:
    base = manifest["base_revision"]
    name = f"{manifest['revision']}" if base is None else f"{manifest['revision']}-from-{base}"
    fresh = f"-{uuid4().hex[:8]}" if anew else ""
    return f"{project_id}/{name}-{digest[:32]}{fresh}.zip"


def is_delta(name: str) -> bool:
    """Whether an archive holds what is newer than some revision, and not all."""
    return "-from-" in name


async def _head(connection: psycopg.AsyncConnection[Any], project_id: UUID) -> _Head:
    row = await (await connection.execute(_HEAD, (project_id,))).fetchone()
    if row is None:
        raise ProjectUnknown(f"there is no project {project_id}")
    epoch, revision, pruned, moment = row
    return _Head(epoch, revision, pruned, moment.astimezone(UTC).isoformat())


async def _files(connection: psycopg.AsyncConnection[Any], project_id: UUID, above: int) -> list[_File]:
    rows = await connection.execute(_FILES, (READ_AGAIN, project_id, above))
    return [_File(*row) for row in await rows.fetchall()]


async def _deleted(
    connection: psycopg.AsyncConnection[Any], project_id: UUID, above: int
) -> tuple[list[tuple[str, int]], bool]:
    """What was deleted, and whether that is all of it."""
    rows = await (await connection.execute(_DELETED, (project_id, above, TOMBSTONE_BYTES))).fetchall()
    return [(path, version) for path, version, _ in rows], not rows or rows[0][2] == len(rows)


async def _contents(
    connection: psycopg.AsyncConnection[Any], project_id: UUID, above: int, batch: Sequence[_File]
) -> list[bytes]:
    """The bytes of a run of files that are neighbours by path, but for those that are left out."""
    cursor = connection.cursor(binary=True)
    await cursor.execute(_CONTENT, (project_id, above, batch[0].path, batch[-1].path))
    found: dict[str, bytes] = dict(await cursor.fetchall())
    return [found[file.path] for file in batch]


def _batches(files: Sequence[_File]) -> Iterator[Sequence[_File]]:
    """Runs of about `BATCH_BYTES`; a larger file is a run of its own."""
    begin = total = 0
    for at, file in enumerate(files):
        if total and total + file.size > BATCH_BYTES:
            yield files[begin:at]
            begin, total = at, 0
        total += file.size
    if begin < len(files):
        yield files[begin:]


def _add_all(archive: ZipWriter, batch: Sequence[_File], contents: Sequence[bytes]) -> None:
    for file, content in zip(batch, contents, strict=True):
        archive.add(file.path, content, executable=file.executable)


def _sha256(spool: IO[bytes]) -> str:
    spool.seek(0)
    digest = hashlib.sha256()
    while piece := spool.read(2**20):
        digest.update(piece)
    return digest.hexdigest()


async def _pieces(spool: IO[bytes]) -> AsyncIterator[bytes]:
    spool.seek(0)
    while piece := spool.read(256 * 1024):
        yield piece
