"""Unpacks an archive, as its bytes arrive, into staged files that agree with its manifest, logs progress.

`snapshot.zip_reader` knows what an archive is, `fs` where bytes may go; here is what makes an archive a snapshot: the
manifest comes first, and an archive is refused whole if a file in it is not listed, if a listed file is missing, or if
one is not what its hash says. No network.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Final

from agent.config import SnapshotLimits
from agent.core.errors import MalformedMessage, PathRefused, SnapshotRejected, Unavailable
from agent.core.messages import MANIFEST_PATH, decode_manifest
from agent.core.model import Digest, Entry, Manifest, RelPath, digest_of
from agent.fs.project_dir import ProjectDir
from agent.fs.staging import StagedFile, StagedFileWriter
from agent.snapshot.zip_format import ArchiveEnded, Event, ExecutableFound, FileEnded, FileFound, FileStarted
from agent.snapshot.zip_reader import ZipReader
from agent.telemetry.logging import get_logger

LOG_EVERY: Final = 1.0
"""Seconds between two log lines of progress. A hydration that ends before the first has none."""

log = get_logger("hydrate")


@dataclass(slots=True)
class Progress:
    """How far a hydration has come. A total is None until it is known."""

    attempt: int = 0
    received_bytes: int = 0
    expected_bytes: int | None = None
    files: int = 0
    files_total: int | None = None
    unpacked_bytes: int = 0
    unpacked_total: int | None = None

    def restart(self) -> None:
        """Begin the next attempt, from nothing."""
        self.attempt += 1
        self.received_bytes = self.files = self.unpacked_bytes = 0
        self.expected_bytes = self.files_total = self.unpacked_total = None

    def report(self) -> dict[str, int | None]:
        """Return what `/status` and the log show."""
        return asdict(self)


@asynccontextmanager
async def reported(progress: Progress) -> AsyncIterator[None]:
    """Log `progress` while the block runs."""
    showing = asyncio.create_task(_log(progress), name="hydrate-progress")
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def _log(progress: Progress) -> None:
    while True:
        await asyncio.sleep(LOG_EVERY)
        log.info("hydrate.progress", **progress.report())


class StagingFailed(Unavailable):
    """The disk did not take the staged bytes. `error` is the system's."""

    def __init__(self, error: OSError) -> None:
        self.error = error
        super().__init__("the staging directory", error.strerror or type(error).__name__)


@dataclass(frozen=True, slots=True)
class StagedSnapshot:
    """A complete, verified snapshot, whose files are staged except for those that the caller had already."""

    manifest: Manifest
    plain: bool
    """The archive had no manifest, as a seed has none, so `manifest` is made from its files: every version is 0, and
    epoch and revision mean nothing."""
    staged: Mapping[RelPath, str]
    """The staged name of each file, as `core.reconcile.reconcile` takes it."""
    size: int
    """Bytes received."""
    ahead: bool = False
    """The session API says that the database has lost commits which the agent has applied."""


class Unpacker:
    """Unpacks one archive and verifies it against its manifest.

    `feed` runs in a thread, everything else on the loop while that does not; the lock is for `abandon`, which a
    cancellation may call meanwhile.
    """

    def __init__(
        self,
        disk: ProjectDir,
        limits: SnapshotLimits,
        expected_project: str | None,
        progress: Progress,
        have: Mapping[RelPath, Entry],
    ) -> None:
        self._disk = disk
        self._limits = limits
        self._expected_project = expected_project
        self._progress = progress
        self._have = have
        self._reader = ZipReader(limits, reserved=MANIFEST_PATH)
        self._lock = threading.Lock()
        self._abandoned = False

        # What the manifest says.
        self._manifest: Manifest | None = None
        self._missing: dict[RelPath, RelPath] = {}
        """Listed files that did not come yet; each path maps to the manifest's own string, the one to keep."""
        self.up_to_date = False
        """The caller has every listed file already, so the rest of the archive is not needed."""

        # The file that comes in pieces: its path (None: the manifest), what the manifest says of it, and where its
        # bytes go.
        self._path: RelPath | None = None
        self._listed: Entry | None = None
        self._stage: StagedFileWriter | None = None
        self._digest: hashlib._Hash | None = None
        self._manifest_bytes: bytearray | None = None

        # What came.
        self._staged: dict[RelPath, str] = {}
        self._plain: dict[RelPath, StagedFile] = {}
        """The files of an archive without a manifest."""
        self._executable: set[RelPath] = set()

    def feed(self, pieces: list[bytes]) -> None:
        """Unpack what `pieces` complete, unless the hydration was abandoned or no more is needed.

        Empties the list, whose pieces the reader has joined, so that they are not in memory twice.

        Raises:
            SnapshotRejected: The archive is no good.
            StagingFailed: The disk did not take a file.
        """
        with self._lock:
            if self._abandoned or self.up_to_date:
                return
            self._progress.received_bytes += sum(map(len, pieces))
            events = self._reader.feed(*pieces)
            pieces.clear()
            try:
                self._take(events)
            except OSError as error:
                raise StagingFailed(error) from None

    def _take(self, events: Iterator[Event]) -> None:
        for event in events:
            if isinstance(event, FileFound):
                self._take_whole(event.path, event.content)
            elif isinstance(event, (bytes, memoryview)):
                self._write(event)
            elif isinstance(event, FileStarted):
                self._start(event.path, event.size)
            elif isinstance(event, FileEnded):
                self._end(event.size)
            elif isinstance(event, ExecutableFound):
                self._executable.add(event.path)
            elif isinstance(event, ArchiveEnded):
                self._check_complete()
            if self.up_to_date:
                return

    def close(self) -> None:
        """Note that the body ended. Raises `SnapshotRejected` unless the archive is complete."""
        self._reader.close()

    def finish(self) -> StagedSnapshot:
        """Return the snapshot, after `close` or once `up_to_date` is set."""
        manifest = self._manifest
        return StagedSnapshot(
            manifest if manifest is not None else self._made_manifest(),
            plain=manifest is None,
            staged=self._staged,
            size=self._progress.received_bytes,
        )

    def abandon(self) -> None:
        """Wait for the thread to finish its pieces, and drop everything that is staged."""
        self._abandoned = True
        with self._lock:
            if self._stage is not None:
                with suppress(OSError):
                    self._stage.abort()
                self._stage = None
            self._staged.clear()
            with suppress(OSError):
                # Only this hydration's files are there: a transaction of the disk begins and ends in one call.
                self._disk.drop_staged()

    def _take_whole(self, path: RelPath, content: bytes) -> None:
        """Take a file that came in one piece. It is verified before it is written."""
        size = len(content)
        if path == MANIFEST_PATH:
            self._check_manifest_size(size)
            self._read_manifest(content)
            return
        path, listed = self._expected(path, size)
        digest = digest_of(content)
        _verify(path, listed, size, digest)
        if not self._is_here(path, listed):
            name = self._disk.stage_whole(content, None if path in self._have else path)
            self._keep(path, StagedFile(name, digest, size))
        self._progress.unpacked_bytes += size
        self._progress.files += 1

    def _expected(self, path: RelPath, size: int | None) -> tuple[RelPath, Entry | None]:
        """Return the manifest's own path string and entry for a file; without a manifest the path and None.

        Refuses a file that is not listed, or comes twice. The manifest's own string, because a second copy of 20,000
        paths would be megabytes. `size`: the declared one, if there is one.
        """
        if self._manifest is None:
            return path, None
        listed = self._manifest.files.get(path)
        if listed is None:
            raise SnapshotRejected("unlisted", f"the manifest does not list {path!r}")
        own = self._missing.pop(path, None)
        if own is None:
            raise SnapshotRejected("duplicate", f"{path!r} is there twice")
        if size is not None and size != listed.size:
            raise SnapshotRejected(
                "size_mismatch", f"{path!r} has {size} bytes, the manifest says {listed.size}"
            )
        return own, listed

    def _is_here(self, path: RelPath, listed: Entry | None) -> bool:
        return bool(self._have) and listed is not None and _equal(self._have.get(path), listed)

    def _keep(self, path: RelPath, staged: StagedFile) -> None:
        self._staged[path] = staged.name
        if self._manifest is None:
            self._plain[path] = staged

    def _start(self, path: RelPath, size: int | None) -> None:
        if path == MANIFEST_PATH:
            self._manifest_bytes = bytearray()
            return
        self._path, self._listed = path, listed = self._expected(path, size)
        if self._is_here(path, listed):
            self._digest = hashlib.sha256()
        else:
            self._stage = self._disk.stage(None if path in self._have else path)

    def _write(self, piece: bytes | memoryview) -> None:
        if self._stage is not None:
            self._stage.write(piece)
        elif self._digest is not None:
            self._digest.update(piece)
        else:
            assert self._manifest_bytes is not None
            self._manifest_bytes += piece
            self._check_manifest_size(len(self._manifest_bytes))
            return
        self._progress.unpacked_bytes += len(piece)

    def _end(self, size: int) -> None:
        path = self._path
        if path is None:
            assert self._manifest_bytes is not None
            data, self._manifest_bytes = self._manifest_bytes, None
            self._read_manifest(data)
            return
        if self._stage is not None:
            staged, self._stage = self._stage.finish(), None
            self._keep(path, staged)
            digest = staged.digest
        else:
            assert self._digest is not None
            digest, self._digest = Digest(self._digest.hexdigest()), None
        _verify(path, self._listed, size, digest)
        self._path = self._listed = None
        self._progress.files += 1

    def _check_manifest_size(self, size: int) -> None:
        if size > self._limits.snapshot_max_manifest_bytes:
            raise SnapshotRejected("manifest", "the manifest is too large")

    def _read_manifest(self, data: bytes | bytearray) -> None:
        try:
            manifest = decode_manifest(data)
        except PathRefused as refused:
            raise SnapshotRejected(refused.rule, f"in the manifest: {refused}") from None
        except MalformedMessage as malformed:
            raise SnapshotRejected("manifest", str(malformed)) from None
        if self._expected_project is not None and manifest.project_id != self._expected_project:
            raise SnapshotRejected("other_project", "the manifest is another project's")
        self._manifest = manifest
        self._missing = {path: path for path in manifest.files}
        self._reader.expect(manifest.files)
        self._progress.files_total = len(manifest.files)
        self._progress.unpacked_total = manifest.total_bytes
        self.up_to_date = all(_equal(self._have.get(path), listed) for path, listed in manifest.files.items())

    def _check_complete(self) -> None:
        if self._missing:
            first = next(iter(self._missing))
            raise SnapshotRejected(
                "missing_file", f"{len(self._missing)} listed files are absent, {first!r} first"
            )

    def _made_manifest(self) -> Manifest:
        """Return the manifest of an archive that has none."""
        files = {
            path: Entry(0, staged.digest, staged.size, path in self._executable)
            for path, staged in self._plain.items()
        }
        return Manifest(self._expected_project or "", "", 0, files, {})


def _verify(path: RelPath, listed: Entry | None, size: int, digest: Digest) -> None:
    if listed is not None and (size != listed.size or digest != listed.digest):
        rule = "size_mismatch" if size != listed.size else "hash_mismatch"
        raise SnapshotRejected(rule, f"{path!r} is not what the manifest says")


def _equal(entry: Entry | None, listed: Entry) -> bool:
    return entry is not None and entry.digest == listed.digest and entry.executable == listed.executable
