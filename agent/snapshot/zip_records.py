"""The zip format's records: their layout, and the rules that one record alone can break. Pure.

Layouts and numbers are those of PKWARE's APPNOTE 6.3. The grammar that puts records in order is
`snapshot.zip_reader`'s.
"""

from __future__ import annotations

import struct

from agent.core.errors import SnapshotRejected

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
