"""What the zip reader (`snapshot.zip_reader`) says of an archive, in order. Pure.

Of each file `FileFound`, or `FileStarted`, its bytes in pieces and `FileEnded`; then `ExecutableFound` of some, and
`ArchiveEnded`, before which nothing may be used.
"""

from __future__ import annotations

from dataclasses import dataclass

from msgspec import Struct

from agent.core.model import RelPath


@dataclass(slots=True)
class FileStarted:
    """An entry's bytes follow. `size` in bytes, None when only its data descriptor will say."""

    path: RelPath
    size: int | None


@dataclass(slots=True)
class FileEnded:
    """The entry is over and agrees with its own header. `size` in bytes."""

    size: int


class FileFound(Struct, gc=False):
    """A whole entry that agrees with its own header, unpacked in one piece: what most are, as one event."""

    path: RelPath
    content: bytes


@dataclass(frozen=True, slots=True)
class ExecutableFound:
    """The central directory gives `path`, streamed before, an execute bit."""

    path: RelPath


@dataclass(frozen=True, slots=True)
class ArchiveEnded:
    """Everything agrees with everything. `entries` counts directories too; `size` is the bytes unpacked."""

    entries: int
    size: int


Event = FileFound | FileStarted | bytes | memoryview | FileEnded | ExecutableFound | ArchiveEnded
