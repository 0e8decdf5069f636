"""Turns the bytes of an archive, as they come, into staged files that its manifest bears out.

Between the zip reader, which knows what an archive is, and the disk, which knows where bytes may go, this knows what a
snapshot is: the manifest comes first and is the authority. Whoever is not on its list, is missing from the archive,
or is not what its hash says, refuses the whole. No clock, no network.

How far a hydration has come, for the three who ask: `/status`, the log, and a person at a terminal.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, TextIO

from agent.config import SnapshotLimits
from agent.core.errors import MalformedMessage, PathRefused, SnapshotRejected, Unavailable
from agent.core.messages import MANIFEST_PATH, decode_manifest
from agent.core.model import Digest, Entry, Manifest, RelPath, digest_of
from agent.fs.project_dir import ProjectDir
from agent.fs.staging import StagedFile, StagedFileWriter
from agent.snapshot.zip_format import ArchiveEnded, Event, ExecutableFound, FileEnded, FileFound, FileStarted
from agent.snapshot.zip_reader import ZipReader
from agent.telemetry.logging import get_logger

EVERY: Final = 1.0
"""Seconds between two log lines of long work. What is done before the first is not announced at all."""

REDRAW: Final = 0.1
"""Seconds between two drawings of the bar: fluent to the eye, nothing to the terminal."""

BAR_WIDTH: Final = 30

log = get_logger("hydrate")


@dataclass(slots=True)
class Progress:
    """Written by `snapshot.download`, read by everybody. Totals are None until known."""

    attempt: int = 0
    received_bytes: int = 0
    expected_bytes: int | None = None
    files: int = 0
    files_total: int | None = None
    unpacked_bytes: int = 0
    unpacked_total: int | None = None

    def restart(self) -> None:
        """A new attempt begins: nothing of the last one is kept."""
        self.attempt += 1
        self.received_bytes = self.files = self.unpacked_bytes = 0
        self.expected_bytes = self.files_total = self.unpacked_total = None

    def report(self) -> dict[str, int | None]:
        """For `/status` and the log."""
        return {
            "attempt": self.attempt,
            "received_bytes": self.received_bytes,
            "expected_bytes": self.expected_bytes,
            "files": self.files,
            "files_total": self.files_total,
            "unpacked_bytes": self.unpacked_bytes,
            "unpacked_total": self.unpacked_total,
        }

    @property
    def share(self) -> float | None:
        """Of the whole, 0 to 1: by unpacked bytes when the manifest told the total, else by received ones."""
        if self.unpacked_total:
            return min(1.0, self.unpacked_bytes / self.unpacked_total)
        if self.expected_bytes:
            return min(1.0, self.received_bytes / self.expected_bytes)
        return None

    def bar(self) -> str:
        """One line for a terminal."""
        share = self.share
        filled = int(BAR_WIDTH * (share or 0.0))
        drawn = "█" * filled + "░" * (BAR_WIDTH - filled)
        percent = " ..." if share is None else f"{share:4.0%}"
        of_files = "" if self.files_total is None else f" of {self.files_total:,}"
        again = f", attempt {self.attempt}" if self.attempt > 1 else ""
        return f"hydrating {drawn} {percent}  {self.files:,}{of_files} files, {self.received_bytes / 1e6:.1f} MB{again}"


@asynccontextmanager
async def announced(progress: Progress, terminal: TextIO | None = None) -> AsyncIterator[None]:
    """Tell of `progress` while the block runs: a bar when `terminal` (default: stderr) is one, else log lines."""
    stream = terminal if terminal is not None else sys.stderr
    telling = asyncio.create_task(
        _draw(progress, stream) if stream.isatty() else _log(progress), name="hydrate-progress"
    )
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def _log(progress: Progress) -> None:
    while True:
        await asyncio.sleep(EVERY)
        log.info("hydrate.progress", **progress.report())


async def _draw(progress: Progress, stream: TextIO) -> None:
    # What is quick draws nothing, so a small project's start stays clean.
    await asyncio.sleep(3 * REDRAW)
    try:
        while True:
            stream.write(f"\r\x1b[K{progress.bar()}")
            stream.flush()
            await asyncio.sleep(REDRAW)
    finally:
        stream.write("\r\x1b[K")
        stream.flush()


class StagingFailed(Unavailable):
    """Our own disk did not take the staged bytes."""

    def __init__(self, error: OSError) -> None:
        super().__init__("the staging directory", error.strerror or type(error).__name__)


@dataclass(frozen=True, slots=True)
class StagedSnapshot:
    """A whole, verified snapshot. Its files wait in staging, except those the caller had already.

    `staged`: per path what `Write.staged` wants, as `core.reconcile.reconcile` takes it.
    `plain`: the archive had no manifest (the seed's form), so `manifest` is made from what it held: every version
    0, and epoch and revision mean nothing. `size`: bytes that travelled.
    """

    manifest: Manifest
    plain: bool
    staged: Mapping[RelPath, str]
    size: int


class Assembly:
    """What has arrived so far: the reader's state, the manifest, the staged files.

    `take_all` runs in a thread, everything else on the loop while it does not; the lock is for `abandon`, which a
    cancellation may call in the middle of it.
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
        self._manifest: Manifest | None = None
        self._manifest_bytes: bytearray | None = None
        self._path: RelPath | None = None
        self._file: Entry | None = None
        self._stage: StagedFileWriter | None = None
        self._digest: hashlib._Hash | None = None
        self._staged: dict[RelPath, str] = {}
        self._plain: dict[RelPath, StagedFile] = {}
        self._missing: dict[RelPath, RelPath] = {}
        """What is listed and not yet here, by itself: the manifest's own string is the one to keep."""
        self._executable: set[RelPath] = set()
        self._lock = threading.Lock()
        self._abandoned = False
        self.sated = False
        """True once the rest of the archive is not needed: every listed file is in the tree already."""

    def take_all(self, pieces: list[bytes]) -> None:
        """Unpack what `pieces` complete, unless the hydration was abandoned or no more is needed.

        Empties the list: the reader has joined them, and nothing shall be in memory twice. Raises `SnapshotRejected`,
        `StagingFailed`.
        """
        with self._lock:
            if self._abandoned or self.sated:
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
                if self.sated:
                    return
            elif isinstance(event, (bytes, memoryview)):
                self._write(event)
            elif isinstance(event, FileStarted):
                self._start(event.path, event.size)
            elif isinstance(event, FileEnded):
                self._end(event.size)
                if self.sated:
                    return
            elif isinstance(event, ExecutableFound):
                self._executable.add(event.path)
            elif isinstance(event, ArchiveEnded):
                self._check_complete()

    def close(self) -> None:
        """The body is over. Raises `SnapshotRejected` unless the archive is whole."""
        self._reader.close()

    def finish(self) -> StagedSnapshot:
        """What was assembled, once `close` is content or `sated` is set."""
        manifest = self._manifest
        return StagedSnapshot(
            manifest if manifest is not None else self._synthesised(),
            plain=manifest is None,
            staged=self._staged,
            size=self._progress.received_bytes,
        )

    def abandon(self) -> None:
        """Leave nothing in staging, once the thread has finished the piece it has in hand."""
        self._abandoned = True
        with self._lock:
            if self._stage is not None:
                with suppress(OSError):
                    self._stage.abort()
                self._stage = None
            self._staged.clear()
            with suppress(OSError):
                # Nothing but this hydration's own files waits there: a batch of the disk's begins and ends in one call.
                self._disk.clear_staging()

    def _take_whole(self, path: RelPath, content: bytes) -> None:
        """A file in one piece: verified before a byte of it is written."""
        if path == MANIFEST_PATH:
            self._check_manifest_size(len(content))
            self._read_manifest(content)
            return
        size = len(content)
        digest = digest_of(content)
        if self._manifest is None:
            name = self._disk.stage_whole(content, path)
            self._plain[path] = StagedFile(name, digest, size)
            self._staged[path] = name
        else:
            path, listed = self._expected(path, size)
            if digest != listed.digest:
                raise SnapshotRejected("hash_mismatch", f"{path!r} is not what the manifest says")
            if not self._have or not _equal(self._have.get(path), listed):
                self._staged[path] = self._disk.stage_whole(content, None if path in self._have else path)
        self._progress.unpacked_bytes += size
        self._progress.files += 1

    def _expected(self, path: RelPath, size: int | None) -> tuple[RelPath, Entry]:
        """What the manifest says of an entry, which it has to list, once, and with that `size` if one is declared.

        With the manifest's own string: of 20,000 files a second copy of each would be megabytes.
        """
        assert self._manifest is not None
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

    def _start(self, path: RelPath, size: int | None) -> None:
        if path == MANIFEST_PATH:
            self._manifest_bytes = bytearray()
            return
        if self._manifest is None:
            self._path = path
            self._stage = self._disk.stage(path)
            return
        self._path, self._file = path, listed = self._expected(path, size)
        if self._have and _equal(self._have.get(path), listed):
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
        path, stage = self._path, self._stage
        if path is None:
            assert self._manifest_bytes is not None
            data, self._manifest_bytes = self._manifest_bytes, None
            self._read_manifest(data)
            return
        if stage is not None:
            staged = stage.finish()
            self._stage = None
            digest = staged.digest
        else:
            assert self._digest is not None
            digest = Digest(self._digest.hexdigest())
            self._digest = None
        listed = self._file
        if listed is not None:
            if size != listed.size or digest != listed.digest:
                rule = "size_mismatch" if size != listed.size else "hash_mismatch"
                raise SnapshotRejected(rule, f"{path!r} is not what the manifest says")
        elif stage is not None:
            self._plain[path] = staged
        if stage is not None:
            self._staged[path] = staged.name
        self._path = self._file = None
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
        self.sated = all(_equal(self._have.get(path), listed) for path, listed in manifest.files.items())

    def _check_complete(self) -> None:
        if self._missing:
            first = next(iter(self._missing))
            raise SnapshotRejected(
                "missing_file", f"{len(self._missing)} listed files are absent, {first!r} first"
            )

    def _synthesised(self) -> Manifest:
        """The manifest of an archive that has none."""
        files = {
            path: Entry(0, staged.digest, staged.size, path in self._executable)
            for path, staged in self._plain.items()
        }
        return Manifest(self._expected_project or "", "", 0, files, {})


def _equal(entry: Entry | None, listed: Entry) -> bool:
    return entry is not None and entry.digest == listed.digest and entry.executable == listed.executable
