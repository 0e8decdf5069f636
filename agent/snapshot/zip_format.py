"""The zip format's records: their layout, and the rules that one record alone can break. Pure.

Layouts and numbers are those of PKWARE's APPNOTE 6.3. The grammar that puts records in order is
`snapshot.zip_reader`'s.

What the zip reader (`snapshot.zip_reader`) says of an archive, in order. Pure.

Of each file `FileFound`, or `FileStarted`, its bytes in pieces and `FileEnded`; then `ExecutableFound` of some, and
`ArchiveEnded`, before which nothing may be used.

Which paths the entries of an archive may have: each may be written, none comes twice, no file is a directory too.

Pure. Grows with the archive by its directories, and by those files that no manifest listed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from msgspec import Struct

from agent.core.errors import PathRefused, SnapshotRejected
from agent.core.model import Entry, RelPath, parents, parse_path


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


LOCAL = struct.Struct("<4s5H3I2H")
CENTRAL = struct.Struct("<4s6H3I5H2I")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR = struct.Struct("<4sIQI")
CORE = struct.Struct("<2HI3QH")

LOCAL_SIGNATURE = b"PK\x03\x04"
CENTRAL_SIGNATURE = b"PK\x01\x02"
END_SIGNATURE = b"PK\x05\x06"
END64_SIGNATURE = b"PK\x06\x06"
LOCATOR_SIGNATURE = b"PK\x06\x07"
DESCRIPTOR_SIGNATURE = b"PK\x07\x08"

ENCRYPTED = 0x1 | 0x40 | 0x2000
DESCRIPTOR = 0x8
UTF8 = 0x800
UNDERSTOOD = 0x6 | DESCRIPTOR | UTF8
STORED, DEFLATED = 0, 8
VERSION = 45
ZIP64_EXTRA, UNICODE_PATH_EXTRA = 0x0001, 0x7075
FULL16, FULL32 = 0xFFFF, 0xFFFFFFFF

UNIX_HOSTS = frozenset({3, 19})
TYPE_MASK, TYPE_FILE, TYPE_DIRECTORY = 0o170000, 0o100000, 0o040000
DOS_DIRECTORY, DOS_VOLUME = 0x10, 0x08


def read_name(raw: bytes) -> str:
    """UTF-8, flagged or not: without the flag the standard says CP437, but Unix writers mean UTF-8 (Info-ZIP)."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise SnapshotRejected("name_encoding", f"the name {raw[:100]!r} is not UTF-8") from None


def check_features(name: str, version: int, flags: int, method: int) -> None:
    """Refuse by name what this reader does not understand."""
    if not flags & ~UNDERSTOOD and method in (STORED, DEFLATED) and version & 0xFF <= VERSION:
        return
    if flags & ENCRYPTED:
        raise SnapshotRejected("encrypted", f"{shown(name)} is encrypted")
    if flags & ~UNDERSTOOD:
        raise SnapshotRejected("unsupported_flags", f"{shown(name)} uses the flags {flags:#06x}")
    if method not in (STORED, DEFLATED):
        raise SnapshotRejected("unsupported_method", f"{shown(name)} is packed by method {method}")
    raise SnapshotRejected("unsupported_version", f"{shown(name)} needs version {version & 0xFF}")


def wide_field(name: str, raw_name: bytes, extra: bytes) -> bytes:
    """The zip64 field's body, empty when there is none. Refuses a second name that differs from the first."""
    wide = b""
    at = 0
    while at < len(extra):
        if at + 4 > len(extra):
            raise SnapshotRejected("bad_extra", f"the extra field of {shown(name)} is cut")
        kind, length = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if len(body) != length:
            raise SnapshotRejected("bad_extra", f"the extra field of {shown(name)} is cut")
        if kind == ZIP64_EXTRA:
            if wide:
                raise SnapshotRejected("bad_extra", f"{shown(name)} has two zip64 fields")
            wide = body
        elif kind == UNICODE_PATH_EXTRA and body[5:] != raw_name:
            raise SnapshotRejected("name_mismatch", f"{shown(name)} has a second, other name")
        at += 4 + length
    return wide


def widen(name: str, wide: bytes, *values: int) -> tuple[int, ...]:
    """`values` with those that are all ones taken, in order, from the zip64 field."""
    widened = []
    for value in values:
        if value == FULL32:
            if len(wide) < 8:
                raise SnapshotRejected("bad_extra", f"{shown(name)} lacks a zip64 field")
            value = int.from_bytes(wide[:8], "little")
            wide = wide[8:]
        widened.append(value)
    return tuple(widened)


def description(
    flags: int, method: int, crc: int, packed: int, size: int, offset: int, raw_name: bytes
) -> bytes:
    """What the local header and the central directory must both say of an entry. Self-delimiting: of two lists of
    entries, the descriptions in a row are equal only if the lists are."""
    return CORE.pack(flags, method, crc, packed, size, offset, len(raw_name)) + raw_name


def check_end64(buffer: bytes, at: int, position: int, *, entries: int, begin: int, size: int) -> None:
    """The zip64 end record at `at`, which is `position` in the archive, and its locator describe what was there.

    That is so many `entries` and a central directory of `size` bytes from `begin`. Raises `SnapshotRejected`.
    """
    _, rest, _, version, disk, start_disk, here, total, directory_size, directory_at = END64.unpack_from(
        buffer, at
    )
    if rest != END64.size - 12 or version & 0xFF > VERSION:
        raise SnapshotRejected("bad_header", "the zip64 end record has a form we do not know")
    if (disk, start_disk, here, total, directory_size, directory_at) != (0, 0, entries, entries, size, begin):
        raise SnapshotRejected("end_mismatch", "the zip64 end record disagrees with the archive")
    if LOCATOR.unpack_from(buffer, at + END64.size) != (LOCATOR_SIGNATURE, 0, position, 1):
        raise SnapshotRejected("end_mismatch", "the zip64 locator does not point at its record")


def check_end(buffer: bytes, at: int, *, entries: int, begin: int, size: int, is_wide: bool) -> int:
    """The end record at `at` describes what was there; how long the comment behind it is.

    All ones mean "see the zip64 record", and only where there is one (`is_wide`).
    """
    _, disk, start_disk, here, total, directory_size, directory_at, comment_length = END.unpack_from(
        buffer, at
    )
    expected = (
        (disk, 0, FULL16),
        (start_disk, 0, FULL16),
        (here, entries, FULL16),
        (total, entries, FULL16),
        (directory_size, size, FULL32),
        (directory_at, begin, FULL32),
    )
    if any(stated != true and not (is_wide and stated == full) for stated, true, full in expected):
        raise SnapshotRejected("end_mismatch", "the end record disagrees with the archive")
    return int(comment_length)


def shown(name: str) -> str:
    """A name from outside, safe and short enough for a message."""
    return repr(name)[:200]


class EntryPaths:
    """`reserved`: the one name that is admitted although `parse_path` refuses it, and only as the first entry's."""

    def __init__(self, reserved: str | None) -> None:
        self._reserved = reserved
        self._files: set[RelPath] = set()
        self._directories: set[RelPath] = set()
        self._listed: Mapping[RelPath, Entry] = {}

    def expect(self, listed: Mapping[RelPath, Entry]) -> None:
        """Files that a manifest names: examined already, and not kept a second time here.

        So that one of them does not come twice is, from here on, for the caller to see.
        """
        self._listed = listed

    def vouched_for(self, name: str, size: int) -> bool:
        """Whether the manifest says that the file `name` has so many bytes, or more."""
        entry = self._listed.get(RelPath(name))
        return entry is not None and size <= entry.size

    def admit(self, name: str, *, is_directory: bool, first: bool) -> RelPath:
        """The path of the entry `name`, when nothing before it stands in its way. Raises `SnapshotRejected`."""
        if name == self._reserved:
            if not first:
                raise SnapshotRejected("manifest_position", f"{shown(name)} is not the first entry")
            return RelPath(name)
        listed = name in self._listed
        if listed:
            path = RelPath(name)
        else:
            try:
                path = parse_path(name[:-1] if is_directory else name)
            except PathRefused as refused:
                raise SnapshotRejected(refused.rule, str(refused)) from None
        if listed and path.rpartition("/")[0] in self._directories and path not in self._directories:
            # Most of them: a listed file beside another one, below no file.
            return path
        # A known directory's own parents are known: no path is ever in both sets.
        if path.rpartition("/")[0] not in self._directories:
            for parent in parents(path):
                if parent in self._files or parent in self._listed:
                    raise SnapshotRejected("path_clash", f"{shown(parent)} is a file and a directory")
                self._directories.add(parent)
        if path in self._files or (is_directory and path in self._listed):
            rule = "path_clash" if is_directory else "duplicate"
            raise SnapshotRejected(rule, f"{shown(name)} is there twice")
        if is_directory:
            self._directories.add(path)
        elif path in self._directories:
            raise SnapshotRejected("path_clash", f"{shown(name)} is a file and a directory")
        elif not listed:
            self._files.add(path)
        return path
