"""Zip archives made byte by byte, so that any field can lie."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

MANIFEST_PATH = ".preview-sync/manifest.json"
PROJECT = "6b0a0000-0000-4000-8000-000000000001"
EPOCH = "6b0a0000-0000-4000-8000-00000000000e"


@dataclass(frozen=True, slots=True)
class Member:
    """One entry. What is None is told truly; everything else is written as given.

    `central` False leaves it out of the central directory; `central_*` lie there only.
    """

    name: bytes
    data: bytes = b""
    method: int = 8
    flags: int = 0x800
    described: bool = False
    descriptor: bytes | None = None
    crc: int | None = None
    size: int | None = None
    packed_size: int | None = None
    packed: bytes | None = None
    extra: bytes = b""
    version: int = 20
    mode: int = 0o100644
    attributes: int | None = None
    made_by: int = 0x031E
    central: bool = True
    central_name: bytes | None = None
    central_crc: int | None = None
    central_size: int | None = None
    central_packed_size: int | None = None
    central_offset: int | None = None
    central_extra: bytes = b""
    before: bytes = b""


def deflate(data: bytes, level: int = 6) -> bytes:
    """A raw deflate stream."""
    packer = zlib.compressobj(level, zlib.DEFLATED, -15)
    return packer.compress(data) + packer.flush()


def archive(
    members: Iterable[Member],
    *,
    prefix: bytes = b"",
    between: bytes = b"",
    suffix: bytes = b"",
    comment: bytes = b"",
    reverse_directory: bool = False,
    count: int | None = None,
    zip64: bool = False,
    end: Mapping[str, int] | None = None,
) -> bytes:
    """The archive of `members`. `end` overrides fields of the end record: size, offset, disk."""
    out = bytearray(prefix)
    records: list[bytes] = []
    for member in members:
        out += member.before
        offset = len(out)
        packed = member.packed
        if packed is None:
            packed = deflate(member.data) if member.method == 8 else member.data
        true = (zlib.crc32(member.data), len(packed), len(member.data))
        flags = member.flags | (8 if member.described else 0)
        stated = tuple(
            lie if lie is not None else (0 if member.described else value)
            for lie, value in zip((member.crc, member.packed_size, member.size), true, strict=True)
        )
        out += struct.pack(
            "<4s5H3I2H", b"PK\3\4", member.version, flags, member.method, 0, 33,
            *stated, len(member.name), len(member.extra),
        )  # fmt: skip
        out += member.name + member.extra + packed
        if member.described:
            out += struct.pack("<4s3I", b"PK\7\10", *true) if member.descriptor is None else member.descriptor
        if not member.central:
            continue
        name = member.name if member.central_name is None else member.central_name
        lies = (member.central_crc, member.central_packed_size, member.central_size)
        fields = [value if lie is None else lie for lie, value in zip(lies, true, strict=True)]
        attributes = member.mode << 16 if member.attributes is None else member.attributes
        records.append(
            struct.pack(
                "<4s6H3I5H2I", b"PK\1\2", member.made_by, member.version, flags, member.method, 0, 33,
                *fields, len(name), len(member.central_extra), 0, 0, 0, attributes,
                offset if member.central_offset is None else member.central_offset,
            )
            + name
            + member.central_extra
        )  # fmt: skip
    out += between
    begin = len(out)
    out += b"".join(reversed(records) if reverse_directory else records)
    size = len(out) - begin
    entries = len(records) if count is None else count
    fields_of_end = {"size": size, "offset": begin, "disk": 0, **(end or {})}
    if zip64:
        position = len(out)
        out += struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, begin)
        out += struct.pack("<4sIQI", b"PK\6\7", 0, position, 1)
        fields_of_end = {"size": 0xFFFFFFFF, "offset": 0xFFFFFFFF, "disk": 0, **(end or {})}
        entries = 0xFFFF
    out += struct.pack(
        "<4s4H2IH", b"PK\5\6", fields_of_end["disk"], 0, entries & 0xFFFF, entries & 0xFFFF,
        fields_of_end["size"], fields_of_end["offset"], len(comment),
    )  # fmt: skip
    out += comment + suffix
    return bytes(out)


def manifest(
    files: Mapping[str, bytes],
    *,
    revision: int = 7,
    base_revision: int | None = None,
    deleted: Sequence[str] = (),
    project_id: str = PROJECT,
    executable: Iterable[str] = (),
) -> dict[str, object]:
    """The manifest that tells the truth about `files`."""
    marked = set(executable)
    return {
        "format": 1,
        "project_id": project_id,
        "epoch": EPOCH,
        "revision": revision,
        "base_revision": base_revision,
        "created_at": "2026-11-01T00:00:00+00:00",
        "files": [
            {
                "file_path": path,
                "content_hash": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "version": 1,
                **({"executable": True} if path in marked else {}),
            }
            for path, content in files.items()
        ],
        "deleted": [{"file_path": path, "version": 2} for path in deleted],
    }


def snapshot(
    files: Mapping[str, bytes], *, said: Mapping[str, object] | None = None, described: bool = False
) -> bytes:
    """A snapshot of `files`: manifest first. `said` is a manifest that says something else."""
    told = json.dumps(manifest(files) if said is None else said).encode()
    members = [Member(MANIFEST_PATH.encode(), told)]
    members += [Member(path.encode(), content, described=described) for path, content in files.items()]
    return archive(members)
