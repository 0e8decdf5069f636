"""Holds the parts of a zip archive: its records, the reader's events, and the paths of the entries. Pure.

Here are the layouts (PKWARE's APPNOTE 6.3) and the rules that a record can break by itself. `snapshot.zip_reader`
reads the records in order and compares what they say. Its events are, for each file, a `FileFound`, or a `FileStarted`,
the bytes in pieces and a `FileEnded`; then an `ExecutableFound` for some, and at last `ArchiveEnded`: nothing may be
used before that.
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
    """The bytes of an entry follow. `size` in bytes; None: only its data descriptor, behind them, has it."""

    path: RelPath
    size: int | None


@dataclass(slots=True)
class FileEnded:
    """An entry ended, and its bytes agree with its header. `size` in bytes."""

    size: int


class FileFound(Struct, gc=False):
    """A whole entry, unpacked, which agrees with its header. Most entries are this one event."""

    path: RelPath
    content: bytes


@dataclass(frozen=True, slots=True)
class ExecutableFound:
    """The central directory gives the file `path`, which came before, an execute bit."""

    path: RelPath


@dataclass(frozen=True, slots=True)
class ArchiveEnded:
    """The archive is whole, and its parts agree. `entries` counts directories too; `size` is the bytes unpacked."""

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


class LocalHeader(Struct, gc=False):
    """The header before an entry. `packed` and `size` are the declared bytes; with a descriptor they mean nothing."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    length: int
    """Bytes of the header itself."""
    described: bool
    """A data descriptor follows the entry's data."""
    is_directory: bool


class CentralRecord(Struct, gc=False):
    """What the central directory says of an entry."""

    name: str
    length: int
    """Bytes of the record itself."""
    description: bytes
    """As `describe` makes it."""
    is_executable: bool


def read_local(buffer: bytes, at: int) -> LocalHeader | None:
    """Read the local header at `at`, where its fixed part is whole. None while the rest is not.

    Raises:
        SnapshotRejected: The header breaks a rule.
    """
    _, version, flags, method, _, _, crc, packed, size, name_length, extra_length = LOCAL.unpack_from(
        buffer, at
    )
    length = LOCAL.size + name_length + extra_length
    if len(buffer) - at < length:
        return None
    start = at + LOCAL.size
    raw_name = buffer[start : (end := start + name_length)]
    name = read_name(raw_name)
    check_features(name, version, flags, method)
    wide = wide_field(name, raw_name, buffer[end : end + extra_length]) if extra_length else b""
    described = flags & DESCRIPTOR != 0
    if not described and (wide or size == FULL32 or packed == FULL32):
        size, packed = widen(name, wide, size, packed)
    return LocalHeader(
        name, raw_name, flags, method, crc, packed, size, length, described, name.endswith("/")
    )


def read_central(buffer: bytes, at: int) -> CentralRecord | None:
    """Read the record of the central directory at `at`. None while it is not there whole.

    Raises:
        SnapshotRejected: The record breaks a rule, or is that of a link, a device or a volume.
    """
    have = len(buffer) - at
    if have < CENTRAL.size:
        return None
    (
        _, made_by, version, flags, method, _, _, crc, packed, size,
        name_length, extra_length, comment_length, disk, _, attributes, offset,
    ) = CENTRAL.unpack_from(buffer, at)  # fmt: skip
    length = CENTRAL.size + name_length + extra_length + comment_length
    if have < length:
        return None
    start = at + CENTRAL.size
    raw_name = buffer[start : (end := start + name_length)]
    name = read_name(raw_name)
    check_features(name, version, flags, method)
    wide = wide_field(name, raw_name, buffer[end : end + extra_length]) if extra_length else b""
    if wide or size == FULL32 or packed == FULL32 or offset == FULL32:
        size, packed, offset = widen(name, wide, size, packed, offset)
    if disk != 0:
        raise SnapshotRejected("directory_mismatch", f"{shown(name)} is said to be on another disk")
    is_directory = name.endswith("/")
    if attributes & DOS_VOLUME or bool(attributes & DOS_DIRECTORY) > is_directory:
        raise SnapshotRejected("entry_type", f"{shown(name)} is marked as a volume or a directory")
    mode = attributes >> 16 if made_by >> 8 in UNIX_HOSTS else 0
    expected = TYPE_DIRECTORY if is_directory else TYPE_FILE
    if mode & TYPE_MASK not in (0, expected):
        raise SnapshotRejected("entry_type", f"{shown(name)} is a link or a special file")
    description = describe(flags, method, crc, packed, size, offset, raw_name)
    return CentralRecord(name, length, description, mode & 0o111 != 0 and not is_directory)


def read_name(raw: bytes) -> str:
    """Decode a name as UTF-8. Without its flag the standard says CP437, but Unix writers mean UTF-8 (Info-ZIP)."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise SnapshotRejected("name_encoding", f"the name {raw[:100]!r} is not UTF-8") from None


def check_features(name: str, version: int, flags: int, method: int) -> None:
    """Refuse what the reader does not support, each by a rule of its own."""
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
    """Return the zip64 field's body, empty without one. Refuses a second name that differs from the first."""
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
    """Return `values`, with those that are all ones replaced, in order, from the zip64 field `wide`."""
    widened = []
    for value in values:
        if value == FULL32:
            if len(wide) < 8:
                raise SnapshotRejected("bad_extra", f"{shown(name)} lacks a zip64 field")
            value = int.from_bytes(wide[:8], "little")
            wide = wide[8:]
        widened.append(value)
    if wide:
        raise SnapshotRejected("bad_extra", f"the zip64 field of {shown(name)} holds more than it is to")
    return tuple(widened)


def describe(
    flags: int, method: int, crc: int, packed: int, size: int, offset: int, raw_name: bytes
) -> bytes:
    """Pack what local header and central directory must both say of an entry.

    Self-delimiting: the descriptions of two lists of entries, one after another, are equal only if the lists are.
    """
    return CORE.pack(flags, method, crc, packed, size, offset, len(raw_name)) + raw_name


def check_end64(buffer: bytes, at: int, position: int, *, entries: int, begin: int, size: int) -> None:
    """Check the zip64 end record and its locator.

    Args:
        buffer: Where they are, whole.
        at: Where in `buffer` they begin.
        position: Where in the archive they begin.
        entries: How many entries there were.
        begin: Where in the archive the central directory began.
        size: Its bytes.

    Raises:
        SnapshotRejected: They say something else.
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
    """Check the end record, as `check_end64` does. Returns how long the comment behind it is.

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
    """Return a name from outside in a form that is safe and short enough for a message."""
    return repr(name)[:200]


class EntryPaths:
    """Admits the paths of an archive's entries: each may be written, none comes twice, no file is a directory too.

    Its memory grows with the directories of the archive, and with those files that no manifest lists.
    """

    def __init__(self, reserved: str | None) -> None:
        """`reserved`: a name that is admitted although `parse_path` refuses it, and only as the first entry's."""
        self._reserved = reserved
        self._files: set[RelPath] = set()
        self._directories: set[RelPath] = set()
        self._listed: Mapping[RelPath, Entry] = {}

    def expect(self, listed: Mapping[RelPath, Entry]) -> None:
        """Note the files of the manifest, whose paths were parsed already and are not stored here again.

        From here on the caller must refuse a listed file that comes twice.
        """
        self._listed = listed

    def lists(self, name: str, size: int) -> bool:
        """Return whether the manifest lists the file `name` with at least `size` bytes."""
        entry = self._listed.get(RelPath(name))
        return entry is not None and size <= entry.size

    def admit(self, name: str, *, is_directory: bool, first: bool) -> RelPath:
        """Return the path of the entry `name`. Raises `SnapshotRejected` if it is unsafe or clashes with another."""
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
            # The usual case: a listed file in a directory that was checked already.
            return path
        # The parents of a known directory are known too.
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
