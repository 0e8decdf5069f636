"""Hostile archives, each refused by the rule that is meant for it; then damage of every kind.

The valid grammar is in `test_zip_reader`; these archives want to write outside, hide a file, or exhaust memory.
"""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import SnapshotLimits
from agent.core.errors import SnapshotRejected
from agent.snapshot.zip_format import Event, FileFound
from agent.snapshot.zip_reader import CHUNK, ZipReader
from tests.fakes.zips import Member, archive, deflate
from tests.profiles import examples

LIMITS = SnapshotLimits()
TEXT = b"export default function App() { return null }\n" * 20


def refusal(pieces: Iterable[bytes], limits: SnapshotLimits = LIMITS) -> SnapshotRejected:
    """The refusal that the archive meets with; fails when it is accepted."""
    reader = ZipReader(limits)
    try:
        for piece in pieces:
            for _ in reader.feed(piece):
                pass
        reader.close()
    except SnapshotRejected as refused:
        return refused
    pytest.fail("the archive was accepted")


def content_in(event: Event) -> bytes | memoryview:
    """What an event has of a file; empty when it has nothing of one."""
    if isinstance(event, FileFound):
        return event.content
    return event if isinstance(event, (bytes, memoryview)) else b""


def named(name: bytes | str) -> bytes:
    raw = name.encode() if isinstance(name, str) else name
    return archive([Member(b"package.json", b"{}"), Member(raw, TEXT)])


def two(first: Member, second: Member) -> bytes:
    return archive([first, second])


def patched(data: bytes, signature: bytes, offset: int, value: bytes, *, last: bool = False) -> bytes:
    """`data` with bytes replaced `offset` behind the first (or last) `signature`."""
    at = (data.rindex if last else data.index)(signature) + offset
    return data[:at] + value + data[at + len(value) :]


def strong_overlap() -> bytes:
    """Two central records for one local entry (CVE-2024-0450, the zip bomb of overlapping files)."""
    whole = archive([Member(b"a", TEXT)])
    local = whole[: whole.index(b"PK\1\2")]
    record = whole[whole.index(b"PK\1\2") : whole.index(b"PK\5\6")]
    second = record.replace(b"a", b"b", 1)[:46] + b"b"
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, len(record) + len(second), len(local), 0)
    return local + record + second + end


def quoted_overlap() -> bytes:
    """An entry whose stored data are another entry's header and data: `better zip bomb`'s quoting."""
    inner = archive([Member(b"inner", TEXT, method=0)])
    inner_local = inner[: inner.index(b"PK\1\2")]
    outer = Member(b"outer", inner_local, method=0)
    both = archive([outer])
    at = both.index(b"PK\1\2")
    record = inner[inner.index(b"PK\1\2") : inner.index(b"PK\5\6")]
    record = record[:42] + struct.pack("<I", both.index(inner_local)) + record[46:]
    directory = both[at : both.index(b"PK\5\6", at)] + record
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 2, 2, len(directory), at, 0)
    return both[:at] + directory + end


def nested(depth: int, size: int) -> bytes:
    data = archive([Member(b"zeros", bytes(size))])
    for _ in range(depth):
        data = archive([Member(b"inner.zip", data)])
    return data


PATHS = {
    "../evil": "dot_segment", "src/../../evil": "dot_segment", "..": "dot_segment", "./a": "dot_segment",
    "/etc/passwd": "absolute", "//server/share": "absolute", "a//b": "empty_segment",
    "a\\..\\b": "backslash", "C:\\evil": "backslash", "nul\0led": "control", "new\nline": "control",
    "esc\x1b[2J": "control", "c1\x85": "control", "node_modules/left-pad/index.js": "protected",
    "src/.git/hooks/post-checkout": "protected", ".preview-sync/state": "protected",
    "e\u0301.txt": "not_nfc", "x" * 256: "segment_too_long", "/".join(["y" * 200] * 6): "too_long",
    "": "empty", "/": "empty", "../": "dot_segment",
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_name_that_must_never_be_written(name: str) -> None:
    assert refusal([named(name)]).rule == PATHS[name]


GRAMMAR: dict[str, tuple[bytes, str]] = {
    "name is not UTF-8": (named(b"caf\xe9"), "name_encoding"),
    "name is an overlong encoding of ../": (named(b"\xc0\xae\xc0\xae/x"), "name_encoding"),
    "two names in one entry": (
        archive([Member(b"good", TEXT, extra=struct.pack("<HHBI", 0x7075, 9, 1, 0) + b"evil")]),
        "name_mismatch",
    ),
    "duplicate": (two(Member(b"a", b"1"), Member(b"a", b"2")), "duplicate"),
    "file, then directory of that name": (two(Member(b"a", b"1"), Member(b"a/b", b"2")), "path_clash"),
    "directory, then file of that name": (two(Member(b"a/b", b"1"), Member(b"a", b"2")), "path_clash"),
    "directory entry over a file": (
        two(Member(b"a", b"1"), Member(b"a/", b"", mode=0o040755)), "path_clash"
    ),
    "directory with content": (archive([Member(b"a/", TEXT, mode=0o040755)]), "directory_content"),
    "deeper than allowed": (named("/".join("d" * 65)), "too_deep"),
    "symlink": (archive([Member(b"a", b"/etc/passwd", mode=0o120777)]), "entry_type"),
    "symlink by an Apple host": (archive([Member(b"a", b"x", mode=0o120777, made_by=19 << 8)]), "entry_type"),
    "fifo": (archive([Member(b"a", b"", mode=0o010644)]), "entry_type"),
    "character device": (archive([Member(b"a", b"", mode=0o020644)]), "entry_type"),
    "block device": (archive([Member(b"a", b"", mode=0o060644)]), "entry_type"),
    "socket": (archive([Member(b"a", b"", mode=0o140644)]), "entry_type"),
    "file marked as DOS directory": (archive([Member(b"a", b"x", attributes=0x10)]), "entry_type"),
    "volume label": (archive([Member(b"a", b"x", attributes=0x08)]), "entry_type"),
    "directory by mode, file by name": (archive([Member(b"a", b"", mode=0o040755)]), "entry_type"),
    "encrypted": (archive([Member(b"a", TEXT, flags=0x801)]), "encrypted"),
    "strong encryption": (archive([Member(b"a", TEXT, flags=0x841)]), "encrypted"),
    "masked headers": (archive([Member(b"a", TEXT, flags=0x2800)]), "encrypted"),
    "patched data": (archive([Member(b"a", TEXT, flags=0x820)]), "unsupported_flags"),
    "lzma": (archive([Member(b"a", TEXT, method=14, version=63)]), "unsupported_method"),
    "bzip2": (archive([Member(b"a", TEXT, method=12, version=46)]), "unsupported_method"),
    "deflate64": (archive([Member(b"a", TEXT, method=9)]), "unsupported_method"),
    "AES": (archive([Member(b"a", TEXT, method=99, version=51)]), "unsupported_method"),
    "a version from the future": (archive([Member(b"a", TEXT, version=63)]), "unsupported_version"),
    "stored, with its length behind it": (
        archive([Member(b"a", TEXT, method=0, described=True)]), "descriptor_on_stored"
    ),
    "header and descriptor disagree": (
        archive([Member(b"a", TEXT, described=True, size=7)]), "size_mismatch"
    ),
    "descriptor lies about the CRC": (
        archive([Member(b"a", TEXT, described=True,
                        descriptor=struct.pack("<4sIII", b"PK\7\10", 7, len(deflate(TEXT)), len(TEXT)))]),
        "descriptor_mismatch",
    ),
    "descriptor is missing": (archive([Member(b"a", TEXT, described=True, descriptor=b"")]), "descriptor_mismatch"),
    "size is larger than the data": (archive([Member(b"a", TEXT, size=len(TEXT) + 1)]), "size_mismatch"),
    "size is smaller than the data": (archive([Member(b"a", TEXT, size=len(TEXT) - 1)]), "size_mismatch"),
    "size 0 over data": (archive([Member(b"a", TEXT, size=0)]), "size_mismatch"),
    "packed size swallows the next entry": (
        two(Member(b"a", TEXT, packed_size=len(deflate(TEXT)) + 40), Member(b"b", TEXT)), "size_mismatch"
    ),
    "packed size cuts the data": (
        archive([Member(b"a", TEXT, packed_size=len(deflate(TEXT)) - 1)]), "bad_deflate"
    ),
    "CRC lies in the local header": (archive([Member(b"a", TEXT, crc=1)]), "crc_mismatch"),
    "deflate is noise": (archive([Member(b"a", TEXT, packed=b"\xff" * 40)]), "bad_deflate"),
    "extra field runs over": (archive([Member(b"a", TEXT, extra=b"\1\0\xff\0")]), "bad_extra"),
    "extra field is a stub": (archive([Member(b"a", TEXT, extra=b"\1")]), "bad_extra"),
    "two zip64 fields": (
        archive([Member(b"a", TEXT, extra=struct.pack("<HHQQ", 1, 16, 1, 1) * 2)]), "bad_extra"
    ),
    "zip64 announced and absent": (archive([Member(b"a", TEXT, size=0xFFFFFFFF)]), "bad_extra"),
    "name differs in the directory": (archive([Member(b"good", TEXT, central_name=b"evil")]), "directory_mismatch"),
    "CRC differs in the directory": (archive([Member(b"a", TEXT, central_crc=1)]), "directory_mismatch"),
    "size differs in the directory": (archive([Member(b"a", TEXT, central_size=1)]), "directory_mismatch"),
    "packed size differs in the directory": (
        archive([Member(b"a", TEXT, central_packed_size=1)]), "directory_mismatch"
    ),
    "offset points elsewhere": (
        two(Member(b"a", TEXT), Member(b"b", TEXT, central_offset=0)), "directory_mismatch"
    ),
    "streamed but not listed": (two(Member(b"a", TEXT), Member(b"b", TEXT, central=False)), "directory_mismatch"),
    "another order": (
        archive([Member(b"a", b"1"), Member(b"b", b"2")], reverse_directory=True), "directory_mismatch"
    ),
    "listed but not streamed": (strong_overlap(), "directory_mismatch"),
    "an entry inside another": (quoted_overlap(), "directory_mismatch"),
    "bytes before": (archive([Member(b"a", TEXT)], prefix=b"#!/bin/sh\n"), "not_a_zip"),
    "a spanned archive's marker": (archive([Member(b"a", TEXT)], prefix=b"PK\7\10"), "not_a_zip"),
    "bytes between entries": (two(Member(b"a", TEXT), Member(b"b", TEXT, before=b"?")), "unexpected_bytes"),
    "bytes before the directory": (archive([Member(b"a", TEXT)], between=b"gap!"), "unexpected_bytes"),
    "bytes after the end": (archive([Member(b"a", TEXT)], suffix=b"\0"), "trailing_data"),
    "a second archive after the end": (archive([Member(b"a", TEXT)], suffix=named("b")), "trailing_data"),
    "a second end record in the comment": (
        archive([Member(b"a", TEXT)], comment=archive([])), "trailing_data"
    ),
    "the end counts too many": (archive([Member(b"a", TEXT)], count=2), "end_mismatch"),
    "the end says another size": (archive([Member(b"a", TEXT)], end={"size": 1}), "end_mismatch"),
    "the end says another place": (archive([Member(b"a", TEXT)], end={"offset": 0}), "end_mismatch"),
    "the end is of another disk": (archive([Member(b"a", TEXT)], end={"disk": 1}), "end_mismatch"),
    "sentinels without zip64": (
        archive([Member(b"a", TEXT)], end={"size": 0xFFFFFFFF, "offset": 0xFFFFFFFF}), "end_mismatch"
    ),
    "zip64 end says another place": (
        patched(archive([Member(b"a", TEXT)], zip64=True), b"PK\6\6", 48, b"\7"), "end_mismatch"
    ),
    "zip64 locator points elsewhere": (
        patched(archive([Member(b"a", TEXT)], zip64=True), b"PK\6\7", 8, b"\1"), "end_mismatch"
    ),
    "zip64 end with room for more": (
        patched(archive([Member(b"a", TEXT)], zip64=True), b"PK\6\6", 4, b"\x90"), "bad_header"
    ),
    "a page instead of a zip": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "not_a_zip"),
    "Storage's JSON instead of a zip": (b'{"statusCode":"404","error":"not_found"}', "not_a_zip"),
    "a gzip instead of a zip": (b"\x1f\x8b\x08\0" + bytes(30), "not_a_zip"),
    "nothing at all": (b"", "empty"),
    "three bytes": (b"PK\3", "truncated"),
    "directory alone": (archive([Member(b"a", TEXT)])[len(deflate(TEXT)) + 31 :], "not_a_zip"),
}  # fmt: skip


@pytest.mark.parametrize("piece", [1, 7, 10_000])
@pytest.mark.parametrize("case", GRAMMAR)
def test_an_archive_that_lies(case: str, piece: int) -> None:
    data, rule = GRAMMAR[case]
    assert refusal(data[at : at + piece] for at in range(0, len(data), piece)).rule == rule


def small(**bounds: int) -> SnapshotLimits:
    return SnapshotLimits(**{f"snapshot_{name}": value for name, value in bounds.items()})


BOMBS: dict[str, tuple[Callable[[], bytes], SnapshotLimits, str]] = {
    "1000:1": (lambda: archive([Member(b"zeros", bytes(20_000_000))]), LIMITS, "ratio"),
    "1000:1, size behind the data": (
        lambda: archive([Member(b"zeros", bytes(20_000_000), described=True)]), LIMITS, "ratio"
    ),
    "larger than a file may be": (
        lambda: archive([Member(b"a", bytes(101), method=0)]), small(max_file_bytes=100), "file_size"
    ),
    "larger than a file may be, unannounced": (
        lambda: archive([Member(b"a", bytes(101), described=True)]), small(max_file_bytes=100), "file_size"
    ),
    "announces a terabyte": (
        lambda: archive([Member(b"a", b"", size=0xFFFFFFFF, packed_size=0xFFFFFFFF, version=45,
                                extra=struct.pack("<HHQQ", 1, 16, 2**40, 2**40))]),
        LIMITS, "file_size",
    ),
    "more in total": (
        lambda: archive([Member(b"%d" % i, bytes(60)) for i in range(3)]), small(max_bytes=150), "total_size"
    ),
    "more packed": (
        lambda: archive([Member(b"a", bytes(500), method=0)]),
        small(max_compressed_bytes=400), "compressed_size",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_costs_nothing(case: str) -> None:
    make, limits, rule = BOMBS[case]
    data = make()
    tracemalloc.start()
    try:
        error = refusal((data[at : at + 65_536] for at in range(0, len(data), 65_536)), limits)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.rule == rule
    assert peak < 16 * 2**20


def test_70_000_empty_entries() -> None:
    data = archive([Member(b"%d" % i, b"", method=0) for i in range(70_000)], zip64=True)
    assert refusal(data[at : at + 65_536] for at in range(0, len(data), 65_536)).rule == "entries"


def test_an_archive_in_an_archive_is_a_file_and_nothing_more() -> None:
    data = nested(3, 3_000_000)
    reader = ZipReader(LIMITS)
    content = b"".join(content_in(event) for event in reader.feed(data))
    reader.close()
    assert content == nested(2, 3_000_000)


def test_a_large_honest_entry_is_read_in_flat_memory() -> None:
    size = 64 * 2**20
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    pattern = bytes(range(256)) * 256
    packed = b"".join(packer.compress(pattern) for _ in range(size // len(pattern))) + packer.flush()
    limits = small(max_ratio=1100)
    head = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 8, 8, 0, 33, 0, 0, 0, 1, 0) + b"a"
    reader = ZipReader(limits)
    tracemalloc.start()
    seen = 0
    try:
        for piece in (head, *(packed[at : at + 65_536] for at in range(0, len(packed), 65_536))):
            for event in reader.feed(piece):
                seen += len(content_in(event))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen == size
    assert peak < 8 * CHUNK


@examples(150, 3_000)
@given(st.data())
def test_two_archives_spliced_anywhere_are_refused_or_read_as_the_standard_library_reads_them(
    data: st.DataObject,
) -> None:
    """Whatever is accepted, Python's own reader must see as the same files: no two readers, two trees."""
    first = archive([Member(b"a", b"one" * 9), Member(b"b/c", b"two" * 5, described=True)])
    second = archive([Member(b"a", b"other"), Member(b"evil", b"three" * 4, method=0)], zip64=True)
    cut = data.draw(st.integers(0, len(first)))
    take = data.draw(st.integers(0, len(second)))
    spliced = first[:cut] + second[take:]
    reader = ZipReader(LIMITS)
    try:
        contents = [content for e in reader.feed(spliced) if (content := content_in(e))]
        reader.close()
    except SnapshotRejected:
        return
    with zipfile.ZipFile(BytesIO(spliced)) as theirs:
        assert [theirs.read(name) for name in theirs.namelist()] == contents


@examples(150, 3_000)
@given(st.data())
def test_any_lie_in_any_field_changes_nothing_or_is_refused(data: st.DataObject) -> None:
    fields = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "crc": st.integers(0, 2**32 - 1),
                "size": st.integers(0, 2**32 - 1),
                "packed_size": st.integers(0, 200),
                "flags": st.integers(0, 0xFFFF),
                "method": st.integers(0, 20),
                "version": st.integers(0, 99),
                "extra": st.binary(max_size=40),
                "central_crc": st.integers(0, 2**32 - 1),
                "central_size": st.integers(0, 2**32 - 1),
                "central_packed_size": st.integers(0, 2**32 - 1),
                "central_offset": st.integers(0, 2**32 - 1),
                "central_extra": st.binary(max_size=40),
                "described": st.booleans(),
            },
        )
    )
    liar = dataclasses.replace(Member(b"a", TEXT), **fields)
    reader = ZipReader(LIMITS)
    try:
        events = reader.feed(two(liar, Member(b"b", b"end")))
        contents = [content for e in events if (content := content_in(e))]
        reader.close()
    except SnapshotRejected:
        return
    assert contents == [TEXT, b"end"]
