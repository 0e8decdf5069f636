"""Writes a zip whose bytes follow from its content alone: fixed times, fixed order, no data descriptors.

Sizes stand before the data, so that a reader knows every length in advance; an entry whose size is not known when it
begins is written with zeros there and completed by going back. Same content, same bytes, on the same version of the
compressor (isal) and the same family of processors, for which isal has different code.
"""

from __future__ import annotations

import struct
from typing import IO, Final

from isal import isal_zlib

LEVEL: Final = 3
"""Of isal's 0 to 3. Not 1 or 2: there ISA-L takes the hash of the third byte from the address of its own state (a stale
register in `isal_deflate_icf_body_hash_hist`), so one text has several packed forms, one in each thread or process: 17
in 150 processes. Level 3 packs source text at 140 MB/s (2: 180, zlib's 6: 17), 2.5 % smaller than 2."""

PIECE: Final = 256 * 1024
"""Bytes compressed at a time: always the same, because the compressor's output depends on it."""

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_CENTRAL: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_VERSION, _MADE_BY = 20, 3 << 8 | 20
_UTF8_FLAG, _STORED, _DEFLATED = 0x800, 0, 8
_TIME, _DATE = 0, 33
"""1980-01-01 00:00, the earliest a zip can say."""

MAX_ENTRIES: Final = 0xFFFE
MAX_BYTES: Final = 0xFFFFFFFE
"""What fits without zip64. Agents refuse far less (512 MB, 50,000 entries) by default."""


class ArchiveTooLarge(Exception):
    """More entries or bytes than the format holds."""


class ZipWriter:
    """Appends entries to `file`, which is empty and can seek. Not thread-safe; any one thread at a time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._at = 0
        self._directory: list[bytes] = []
        self._open: _Entry | None = None

    def add(self, path: str, content: bytes, *, executable: bool = False) -> None:
        """One whole entry."""
        method, packed = _DEFLATED, isal_zlib.compress(content, LEVEL, -15)
        if len(packed) >= len(content):
            method, packed = _STORED, content
        crc, name = isal_zlib.crc32(content), path.encode()
        header = self._header(name, method, crc, len(packed), len(content))
        self._file.write(header + packed)
        self._record(name, method, crc, len(packed), len(content), executable)

    def begin(self, path: str, *, executable: bool = False) -> None:
        """An entry whose content follows by `write` and whose size `end` will know."""
        assert self._open is None
        self._open = _Entry(path.encode(), executable)

    def write(self, chunk: bytes) -> None:
        """Content of the entry that was begun, in pieces of any size."""
        entry = self._open
        assert entry is not None
        entry.waiting += chunk
        while len(entry.waiting) >= PIECE:
            self._put(entry, bytes(entry.waiting[:PIECE]))
            del entry.waiting[:PIECE]

    def end(self) -> int:
        """Complete the entry; its size in bytes."""
        entry = self._open
        assert entry is not None
        self._open = None
        if entry.waiting or entry.method is None:
            self._put(entry, bytes(entry.waiting))
        if entry.packer is not None:
            self._append(entry, entry.packer.flush())
        assert entry.method is not None
        header = self._header(entry.name, entry.method, entry.crc, entry.packed, entry.size)
        self._file.seek(self._at)
        self._file.write(header)
        self._file.seek(0, 2)
        self._record(entry.name, entry.method, entry.crc, entry.packed, entry.size, entry.executable)
        return entry.size

    def finish(self) -> int:
        """Write the central directory; the archive's size in bytes."""
        directory = b"".join(self._directory)
        if len(self._directory) > MAX_ENTRIES or self._at + len(directory) > MAX_BYTES:
            raise ArchiveTooLarge(f"{len(self._directory)} entries in {self._at} bytes do not fit a zip")
        count = len(self._directory)
        end = _END.pack(b"PK\5\6", 0, 0, count, count, len(directory), self._at, 0)
        self._file.write(directory + end)
        return self._at + len(directory) + len(end)

    def _put(self, entry: _Entry, piece: bytes) -> None:
        if entry.method is None:
            # The first piece tells: media is compressed already, and packing it again only costs everybody time.
            entry.method = _DEFLATED if _shrinks(piece) else _STORED
            if entry.method == _DEFLATED:
                entry.packer = isal_zlib.compressobj(LEVEL, isal_zlib.DEFLATED, -15)
            self._file.write(bytes(_LOCAL.size + len(entry.name)))
        entry.size += len(piece)
        entry.crc = isal_zlib.crc32(piece, entry.crc)
        self._append(entry, piece if entry.packer is None else entry.packer.compress(piece))

    def _append(self, entry: _Entry, packed: bytes) -> None:
        entry.packed += len(packed)
        if self._at + entry.packed > MAX_BYTES or entry.size > MAX_BYTES:
            raise ArchiveTooLarge("an entry does not fit a zip")
        self._file.write(packed)

    def _header(self, name: bytes, method: int, crc: int, packed: int, size: int) -> bytes:
        return (
            _LOCAL.pack(
                b"PK\3\4", _VERSION, _UTF8_FLAG, method, _TIME, _DATE, crc, packed, size, len(name), 0
            )
            + name
        )

    def _record(self, name: bytes, method: int, crc: int, packed: int, size: int, executable: bool) -> None:
        mode = 0o100755 if executable else 0o100644
        self._directory.append(
            _CENTRAL.pack(
                b"PK\1\2", _MADE_BY, _VERSION, _UTF8_FLAG, method, _TIME, _DATE, crc, packed, size,
                len(name), 0, 0, 0, 0, mode << 16, self._at,
            )
            + name
        )  # fmt: skip
        self._at += _LOCAL.size + len(name) + packed
        if self._at > MAX_BYTES:
            raise ArchiveTooLarge("the archive does not fit a zip")


class _Entry:
    """One that was begun and not ended."""

    def __init__(self, name: bytes, executable: bool) -> None:
        self.name = name
        self.executable = executable
        self.method: int | None = None
        self.packer: isal_zlib.Compress | None = None
        self.waiting = bytearray()
        self.crc = self.packed = self.size = 0


def _shrinks(piece: bytes) -> bool:
    return len(isal_zlib.compress(piece, LEVEL, -15)) < len(piece) * 0.97
