"""Reads a zip archive in one pass: bytes in, events out. Pure: no I/O, no clock.

A zip describes itself twice, in a header before each entry and in the central directory at the end, and most
attacks on zip readers use the difference. This reader streams by the first and then demands that the second
says the same, entry by entry and in the same order: names, flags, methods, sizes, checksums and positions, with no
byte left over before, between or after (CVE-2024-0450 overlaps, CVE-2025-54368 stream against directory,
CVE-2025-8291 end records, Zip Slip). So any other reader would unpack the same files.
The kind of an entry (link, device) is only in the central directory, so no event's content may be used before
`ArchiveEnded`.

Supported are stored and deflate, zip64, data descriptors on deflate, and names in UTF-8. Everything else
is refused, with `SnapshotRejected.rule` one of

    empty not_a_zip truncated trailing_data unexpected_bytes bad_header bad_extra encrypted unsupported_flags
    unsupported_method unsupported_version descriptor_on_stored descriptor_mismatch name_encoding name_mismatch
    duplicate path_clash entry_type directory_content bad_deflate size_mismatch crc_mismatch
    directory_mismatch end_mismatch manifest_position compressed_size
    total_size file_size entries ratio

or one of the rules of `core.model.parse_path`. Memory holds what was fed, one chunk of output, and the paths that no
manifest lists, whatever the entries' sizes and number.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Iterator, Mapping
from hashlib import blake2b

from isal import isal_zlib

from agent.config import SnapshotLimits
from agent.core.errors import SnapshotRejected
from agent.core.model import Entry, RelPath
from agent.snapshot.zip_format import (
    CENTRAL_SIGNATURE,
    DEFLATED,
    DESCRIPTOR_SIGNATURE,
    END,
    END64,
    END64_SIGNATURE,
    END_SIGNATURE,
    FULL32,
    LOCAL,
    LOCAL_SIGNATURE,
    LOCATOR,
    STORED,
    ArchiveEnded,
    EntryPaths,
    Event,
    ExecutableFound,
    FileEnded,
    FileFound,
    FileStarted,
    LocalHeader,
    check_end,
    check_end64,
    describe,
    read_central,
    read_local,
    shown,
)

CHUNK = 256 * 1024
"""Bytes, the most that is unpacked into one piece: the cost of a call vanishes in it, and memory does not notice it.
Stored entries come in pieces as large as they were fed, without a copy."""


# The package's own stub calls this class an instance.
_DeflateError: type[Exception] = isal_zlib.error  # type: ignore[assignment]


class ZipReader:
    """Reads one archive. Feed it, take every event, feed it again; at the end `close` it."""

    def __init__(self, limits: SnapshotLimits, *, reserved: str | None = None) -> None:
        """Make a reader, for one archive.

        Args:
            limits: The bounds on entries and bytes.
            reserved: The manifest's name, which is allowed although `parse_path` refuses it, and only as the first
                entry's.
        """
        self._limits = limits
        self._paths = EntryPaths(reserved)

        # What was fed and is not read yet begins at `_at` in the buffer, which begins at `_base` in the archive.
        self._buffer = b""
        self._at = 0
        self._base = 0

        # What was read.
        self._parser = self._archive()
        self._entries = 0
        self._size = 0
        """Bytes unpacked."""
        self._streamed, self._directory_says = blake2b(), blake2b()
        """Digests of the entries' descriptions: as they were streamed, and as the central directory has them."""
        self._failure: SnapshotRejected | None = None
        self._complete = False

    @property
    def received(self) -> int:
        """How many bytes were fed."""
        return self._base + len(self._buffer)

    def expect(self, listed: Mapping[RelPath, Entry]) -> None:
        """Note the files of the manifest; from here on the caller must refuse one of them that comes twice."""
        self._paths.expect(listed)

    def feed(self, *data: bytes) -> Iterator[Event]:
        """Return the events that `data` completes. Unpacks lazily: take every event before feeding again.

        The iterator raises `SnapshotRejected`, and again at every later call.
        """
        self._base += self._at
        rest = self._buffer[self._at :]
        self._buffer = b"".join((rest, *data)) if rest or len(data) != 1 else data[0]
        self._at = 0
        return self._events()

    def _events(self) -> Iterator[Event]:
        if self._failure is not None:
            raise self._failure
        try:
            if self.received > self._limits.snapshot_max_compressed_bytes:
                raise SnapshotRejected(
                    "compressed_size",
                    f"more than {self._limits.snapshot_max_compressed_bytes} bytes arrived",
                )
            for event in self._parser:
                if event is None:
                    return
                yield event
            self._complete = True
            if self._at != len(self._buffer):
                raise SnapshotRejected("trailing_data", "something follows the end of the archive")
        except SnapshotRejected as failure:
            self._failure = failure
            raise

    def close(self) -> None:
        """Note that the stream ended. Raises `SnapshotRejected` unless the archive ended too."""
        if self._failure is not None:
            raise self._failure
        if not self._complete:
            rule = "truncated" if self.received else "empty"
            self._failure = SnapshotRejected(rule, f"the archive stops after {self.received} bytes")
            raise self._failure

    # --- the grammar: entry* central* (end64 locator)? end

    def _archive(self) -> Generator[Event | None, None, None]:
        yield from self._need(4)
        self._check_first_bytes()
        while (signature := self._peek(4)) == LOCAL_SIGNATURE:
            while (header := self._header()) is None:
                yield None
            offset = self._base + self._at
            self._at += header.length
            path = self._paths.admit(header.name, is_directory=header.is_directory, first=self._entries == 1)
            if (
                0 < header.size <= CHUNK
                and header.packed <= len(self._buffer) - self._at
                and not header.described
                and not header.is_directory
            ):
                yield self._whole(path, header, offset)
            else:
                yield from self._entry(path, header, offset)
            if len(self._buffer) - self._at < 4:
                yield from self._need(4)
        if signature not in (CENTRAL_SIGNATURE, END_SIGNATURE, END64_SIGNATURE):
            raise self._unexpected("after an entry", signature)
        yield from self._central_directory()
        yield ArchiveEnded(self._entries, self._size)

    def _header(self) -> LocalHeader | None:
        """Read the next local header; None while it is not there whole. Does not move the position."""
        if len(self._buffer) - self._at < LOCAL.size:
            return None
        most = self._limits.snapshot_max_entries
        if self._entries >= most:
            raise SnapshotRejected("entries", f"more than {most} entries")
        header = read_local(self._buffer, self._at)
        if header is not None:
            if not header.described:
                self._check_size(header.name, header.size)
            self._entries += 1
        return header

    def _entry(self, path: RelPath, header: LocalHeader, offset: int) -> Generator[Event | None, None, None]:
        """Read an entry that comes in pieces, or is large, or has a descriptor, or is a directory."""
        name, method, described = header.name, header.method, header.described
        crc, packed, size = header.crc, header.packed, header.size
        is_directory = header.is_directory
        declared = None if described else size
        if not is_directory:
            yield FileStarted(path, declared)
        data_start = self._base + self._at
        body: Generator[bytes | memoryview | None, None, None]
        if method == STORED:
            # With a descriptor only an empty entry's end can be known (Info-ZIP writes those to a pipe).
            body = self._stored(0 if described else packed)
        else:
            body = self._inflated(name, None if described else packed, declared)
        true_crc = true_size = 0
        for piece in body:
            if piece is None:
                yield None
                continue
            true_size += len(piece)
            true_crc = isal_zlib.crc32(piece, true_crc)
            self._check_size(name, true_size)
            self._check_ratio(name, true_size, self._base + self._at - data_start)
            if is_directory:
                raise SnapshotRejected("directory_content", f"the directory {shown(name)} has content")
            yield piece
        true_packed = self._base + self._at - data_start

        if described:
            stated = ((crc, true_crc), (packed, true_packed), (size, true_size))
            if any(value not in (0, FULL32, true) for value, true in stated):
                raise SnapshotRejected("size_mismatch", f"the header of {shown(name)} disagrees with it")
            rule = "descriptor_on_stored" if method == STORED else "descriptor_mismatch"
            yield from self._descriptor(name, rule, true_crc, true_packed, true_size)
        elif true_size != size:
            raise SnapshotRejected("size_mismatch", f"{shown(name)} has {true_size} bytes, not {size}")
        elif true_crc != crc:
            raise SnapshotRejected("crc_mismatch", f"{shown(name)} is damaged")
        self._size += true_size
        self._note(header, offset, true_crc, true_packed, true_size)
        if not is_directory:
            yield FileEnded(true_size)

    def _whole(self, path: RelPath, header: LocalHeader, offset: int) -> FileFound:
        """Read an entry that is in the buffer whole."""
        name, crc, packed, size = header.name, header.crc, header.packed, header.size
        end = self._at + packed
        content = self._buffer[self._at : end]
        if header.method == DEFLATED:
            inflater = isal_zlib.decompressobj(-15)
            try:
                content = inflater.decompress(content, size + 1)
            except _DeflateError as error:
                raise SnapshotRejected("bad_deflate", f"{shown(name)}: {error}") from None
            if not inflater.eof and len(content) <= size:
                raise SnapshotRejected("bad_deflate", f"the data of {shown(name)} ends too early")
            if not inflater.eof or inflater.unused_data:
                raise SnapshotRejected("size_mismatch", f"{shown(name)} is not as long as it declares")
        if len(content) != size:
            raise SnapshotRejected("size_mismatch", f"{shown(name)} has {len(content)} bytes, not {size}")
        if isal_zlib.crc32(content) != crc:
            raise SnapshotRejected("crc_mismatch", f"{shown(name)} is damaged")
        self._check_ratio(name, size, packed)
        self._at = end
        self._size += size
        self._note(header, offset, crc, packed, size)
        return FileFound(path, content)

    def _note(self, header: LocalHeader, offset: int, crc: int, packed: int, size: int) -> None:
        """Note what the central directory must say of an entry."""
        self._streamed.update(
            describe(header.flags, header.method, crc, packed, size, offset, header.raw_name)
        )

    def _stored(self, size: int) -> Generator[memoryview | None, None, None]:
        left = size
        while left:
            piece = memoryview(self._buffer)[self._at : self._at + left]
            if not piece:
                yield None
                continue
            self._at += len(piece)
            left -= len(piece)
            yield piece

    def _inflated(
        self, name: str, packed: int | None, size: int | None
    ) -> Generator[bytes | None, None, None]:
        """Yield the entry's content, in pieces. Leaves the position just behind its last compressed byte."""
        inflater = isal_zlib.decompressobj(-15)
        unpacked = 0
        left = packed
        while not inflater.eof:
            available = len(self._buffer) - self._at
            if left is not None and left < available:
                available = left
            if not available and left != 0:
                yield None
                continue
            window = memoryview(self._buffer)[self._at : self._at + available]
            # One byte more than declared, so that an entry longer than it says is caught and not cut.
            most = CHUNK if size is None else min(CHUNK, size - unpacked + 1)
            try:
                piece = inflater.decompress(window, most)
            except _DeflateError as error:
                raise SnapshotRejected("bad_deflate", f"{shown(name)}: {error}") from None
            used = available - len(inflater.unused_data if inflater.eof else inflater.unconsumed_tail)
            self._at += used
            if left is not None:
                left -= used
            unpacked += len(piece)
            if size is not None and unpacked > size:
                raise SnapshotRejected(
                    "size_mismatch", f"{shown(name)} is longer than the {size} bytes it declares"
                )
            if piece:
                yield piece
            elif not used:
                raise SnapshotRejected("bad_deflate", f"the data of {shown(name)} ends too early")
        if left:
            raise SnapshotRejected("size_mismatch", f"{shown(name)} leaves {left} compressed bytes unused")

    def _descriptor(
        self, name: str, rule: str, crc: int, packed: int, size: int
    ) -> Generator[None, None, None]:
        """Check that the data descriptor has what was counted; it may lack a signature, and be 32 or 64 bits wide.

        The four forms can only be told apart by what they must contain, and the central directory's offsets then
        prove the choice. The wide ones are tried first: of an empty entry the narrow form is a prefix of the wide
        one, and a narrow one is followed by a signature, which no wide one holds at that place.
        """
        forms = [struct.pack("<4sIQQ", DESCRIPTOR_SIGNATURE, crc, packed, size)]
        if packed < FULL32 and size < FULL32:
            forms.append(struct.pack("<4sIII", DESCRIPTOR_SIGNATURE, crc, packed, size))
        yield from self._need(4)
        unsigned = 0 if self._peek(4) == DESCRIPTOR_SIGNATURE else 4
        for form in forms:
            # Never past the end of a well-formed archive: a directory record and an end record follow.
            yield from self._need(len(form) - unsigned)
            if self._peek(len(form) - unsigned) == form[unsigned:]:
                self._at += len(form) - unsigned
                return
        raise SnapshotRejected(rule, f"the descriptor of {shown(name)} disagrees with it")

    def _central_directory(self) -> Generator[Event | None, None, None]:
        begin = self._base + self._at
        records = 0
        while self._peek(4) == CENTRAL_SIGNATURE:
            if records == self._entries:
                raise SnapshotRejected(
                    "directory_mismatch", "the central directory lists more than was there"
                )
            while (record := read_central(self._buffer, self._at)) is None:
                yield None
            self._at += record.length
            self._directory_says.update(record.description)
            if record.is_executable:
                yield ExecutableFound(RelPath(record.name))
            records += 1
            if len(self._buffer) - self._at < 4:
                yield from self._need(4)
        if records != self._entries:
            raise SnapshotRejected(
                "directory_mismatch",
                f"the central directory lists {records} of {self._entries} entries",
            )
        if self._streamed.digest() != self._directory_says.digest():
            raise SnapshotRejected(
                "directory_mismatch", "the central directory does not describe the entries that were streamed"
            )
        size = self._base + self._at - begin
        is_wide = False
        if self._peek(4) == END64_SIGNATURE:
            is_wide = True
            yield from self._end64(begin, size)
            yield from self._need(4)
        if self._peek(4) != END_SIGNATURE:
            raise self._unexpected("where the end record should be", self._peek(4))
        yield from self._end(begin, size, is_wide)

    def _end64(self, begin: int, size: int) -> Generator[None, None, None]:
        position = self._base + self._at
        yield from self._need(END64.size + LOCATOR.size)
        check_end64(self._buffer, self._at, position, entries=self._entries, begin=begin, size=size)
        self._at += END64.size + LOCATOR.size

    def _end(self, begin: int, size: int, is_wide: bool) -> Generator[None, None, None]:
        yield from self._need(END.size)
        comment_length = check_end(
            self._buffer, self._at, entries=self._entries, begin=begin, size=size, is_wide=is_wide
        )
        yield from self._need(END.size + comment_length)
        comment = self._buffer[self._at + END.size : self._at + END.size + comment_length]
        if END_SIGNATURE in comment:
            raise SnapshotRejected("trailing_data", "the archive's comment hides another end record")
        self._at += END.size + comment_length

    # --- the rules

    def _check_first_bytes(self) -> None:
        first = self._peek(4)
        if first in (LOCAL_SIGNATURE, END_SIGNATURE, END64_SIGNATURE):
            return
        shown = self._buffer[self._at : self._at + 24]
        raise SnapshotRejected("not_a_zip", f"what arrived begins with {shown!r}")

    def _check_size(self, name: str, size: int) -> None:
        limits = self._limits
        if size > limits.snapshot_max_file_bytes:
            raise SnapshotRejected(
                "file_size", f"{shown(name)} is larger than {limits.snapshot_max_file_bytes} bytes"
            )
        if self._size + size > limits.snapshot_max_bytes:
            raise SnapshotRejected("total_size", f"more than {limits.snapshot_max_bytes} bytes unpacked")

    def _check_ratio(self, name: str, size: int, packed: int) -> None:
        limits = self._limits
        if size <= limits.snapshot_ratio_floor_bytes or size <= packed * limits.snapshot_max_ratio:
            return
        if not self._paths.lists(name, size):
            raise SnapshotRejected(
                "ratio", f"{shown(name)} unpacks to more than {limits.snapshot_max_ratio} times its size"
            )

    # --- the buffer

    def _need(self, count: int) -> Generator[None, None, None]:
        while len(self._buffer) - self._at < count:
            yield None

    def _peek(self, count: int) -> bytes:
        return self._buffer[self._at : self._at + count]

    def _unexpected(self, where: str, found: bytes) -> SnapshotRejected:
        return SnapshotRejected("unexpected_bytes", f"{found!r} {where}, at byte {self._base + self._at}")
