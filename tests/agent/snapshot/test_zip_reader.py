"""The zip reader: what it reads, however the bytes arrive, and that damage is always found."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import unicodedata
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import SnapshotLimits
from agent.core.errors import SnapshotRejected
from agent.snapshot.zip_format import ArchiveEnded, ExecutableFound, FileEnded, FileFound, FileStarted
from agent.snapshot.zip_reader import CHUNK, ZipReader
from tests.fakes.zips import Member, archive, deflate

LIMITS = SnapshotLimits()


def read(pieces: Iterable[bytes], limits: SnapshotLimits = LIMITS) -> dict[str, bytes]:
    """The files of an archive arriving in `pieces`, with the shape of the events checked on the way."""
    reader = ZipReader(limits)
    files: dict[str, bytes] = {}
    path: str | None = None
    content = bytearray()
    ended = False
    for piece in pieces:
        for event in reader.feed(piece):
            assert not ended
            match event:
                case FileFound():
                    assert path is None
                    assert event.path not in files
                    assert 0 < len(event.content) <= CHUNK
                    files[event.path] = event.content
                case FileStarted():
                    assert path is None
                    path, content = event.path, bytearray()
                    assert path not in files
                case bytes() | memoryview():
                    assert path is not None
                    assert 0 < len(event) <= CHUNK
                    content += event
                case FileEnded():
                    assert path is not None
                    assert event.size == len(content)
                    files[path] = bytes(content)
                    path = None
                case ExecutableFound():
                    assert event.path in files
                case ArchiveEnded():
                    ended = True
    reader.close()
    assert ended
    return files


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


segments = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn"), exclude_characters="/\\"),
    min_size=1,
    max_size=8,
).map(lambda s: "f" + unicodedata.normalize("NFC", s))
contents = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda unit, times: unit * times, st.binary(min_size=1, max_size=9), st.integers(0, 5000)),
)
trees = st.dictionaries(segments, contents, max_size=6).flatmap(
    lambda top: st.dictionaries(segments.map(lambda s: "d/" + s), contents, max_size=4).map(
        lambda below: {**{k: v for k, v in top.items() if k != "d"}, **below}
    )
)


@st.composite
def written(draw: st.DrawFn) -> tuple[dict[str, bytes], bytes]:
    """Any tree, in an archive made with any mixture of forms."""
    files = draw(trees)
    members = []
    for path, content in files.items():
        method = draw(st.sampled_from((0, 8)))
        described = method == 8 and draw(st.booleans())
        member = Member(path.encode(), content, method=method, described=described)
        if described:
            signed = draw(st.booleans())
            wide = draw(st.booleans())
            form = struct.pack(
                "<4sIQQ" if wide else "<4sIII",
                b"PK\7\10", zlib.crc32(content), len(deflate(content)), len(content),
            )  # fmt: skip
            member = Member(path.encode(), content, described=True, descriptor=form if signed else form[4:])
        elif draw(st.booleans()):
            packed = deflate(content) if method == 8 else content
            wide_field = struct.pack("<HHQQ", 1, 16, len(content), len(packed))
            member = Member(
                path.encode(), content, method=method, version=45, extra=wide_field,
                size=0xFFFFFFFF, packed_size=0xFFFFFFFF,
            )  # fmt: skip
        members.append(member)
    return files, archive(
        members, zip64=draw(st.booleans()), comment=draw(st.text("abc", max_size=9)).encode()
    )


@settings(deadline=None)
@given(written(), st.integers(1, 70_000))
def test_any_tree_comes_back_whatever_the_form_and_the_pieces(
    case: tuple[dict[str, bytes], bytes], size: int
) -> None:
    files, data = case
    assert read(cut(data, size)) == files


@settings(max_examples=30, deadline=None)
@given(written())
def test_one_byte_at_a_time(case: tuple[dict[str, bytes], bytes]) -> None:
    files, data = case
    assert read(cut(data, 1)) == files


@settings(max_examples=40, deadline=None)
@given(written(), st.data())
def test_a_stream_cut_anywhere_is_refused(case: tuple[dict[str, bytes], bytes], data: st.DataObject) -> None:
    _, whole = case
    at = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(SnapshotRejected) as caught:
        read([whole[:at]])
    assert caught.value.rule in ("truncated", "empty")


def test_every_cut_of_one_archive() -> None:
    files = {"a.txt": b"hello" * 100, "d/b.bin": bytes(range(256))}
    data = archive(
        [Member(p.encode(), c, described=bool(i)) for i, (p, c) in enumerate(files.items())], comment=b"c"
    )
    for at in range(len(data)):
        with pytest.raises(SnapshotRejected):
            read([data[:at]])
        assert read([data[:at], data[at:]]) == files


@settings(max_examples=300, deadline=None)
@given(written(), st.data())
def test_a_flipped_bit_never_changes_a_file(
    case: tuple[dict[str, bytes], bytes], data: st.DataObject
) -> None:
    files, whole = case
    at = data.draw(st.integers(0, len(whole) - 1))
    broken = bytearray(whole)
    broken[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        got = read([bytes(broken)])
    except SnapshotRejected:
        return
    # Times, attributes, versions and the comment may differ unnoticed: names and contents may not.
    assert got == files


@given(st.binary(max_size=300), st.integers(1, 50))
def test_noise_is_refused(noise: bytes, size: int) -> None:
    with pytest.raises(SnapshotRejected):
        read(cut(noise, size))


def test_a_refusal_is_remembered() -> None:
    reader = ZipReader(LIMITS)
    with pytest.raises(SnapshotRejected) as first:
        list(reader.feed(b"<html>"))
    with pytest.raises(SnapshotRejected) as again:
        list(reader.feed(b"more"))
    assert again.value is first.value
    with pytest.raises(SnapshotRejected):
        reader.close()


def test_large_entries_come_in_chunks() -> None:
    content = bytes(3 * CHUNK + 5)
    data = archive([Member(b"zeros", content, described=True), Member(b"stored", content, method=0)])
    limits = SnapshotLimits(snapshot_max_ratio=2000)
    assert read(cut(data, 65_536), limits) == {"zeros": content, "stored": content}


def test_directories_and_execute_bits() -> None:
    reader = ZipReader(LIMITS)
    data = archive(
        [
            Member(b"bin/", method=0, mode=0o040755, attributes=0o040755 << 16 | 0x10),
            Member(b"bin/run", b"#!", mode=0o100755),
            Member(b"bin/read", b"", mode=0o100644),
        ]
    )
    events = list(reader.feed(data))
    reader.close()
    assert [e.path for e in events if isinstance(e, ExecutableFound)] == ["bin/run"]
    assert events[-1] == ArchiveEnded(entries=3, size=2)


@pytest.mark.parametrize(
    ("tool", "streamed"),
    # bsdtar to a pipe pads with NULs up to a tape block: bytes after the end, which we refuse.
    [("zip", False), ("zip", True), ("python", False), ("python", True), ("bsdtar", False)],
)
def test_archives_of_other_writers(tool: str, streamed: bool, tmp_path: Path) -> None:
    files = {"a.txt": b"a" * 1000, "src/b.tsx": b"export {}\n" * 50, "src/empty": b"", "src/naïve.md": b"x"}
    for path, content in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    if tool == "python":
        out = io.BytesIO()
        sink = _Unseekable(out) if streamed else out
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as writer:  # type: ignore[arg-type]
            for path in files:
                writer.write(tmp_path / path, path)
        data = out.getvalue()
    else:
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
        command = {
            "zip": ["zip", "-q", "-r", "-UN=UTF8", "-" if streamed else "out.zip", "a.txt", "src"],
            "bsdtar": ["bsdtar", "--format", "zip", "-cf", "out.zip", "a.txt", "src"],
        }[tool]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            check=True,
            capture_output=True,
            env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
        )
        data = done.stdout if streamed else (tmp_path / "out.zip").read_bytes()
    assert read(cut(data, 777)) == files


class _Unseekable(io.RawIOBase):
    """A pipe: makes the writer use data descriptors."""

    def __init__(self, inner: io.BytesIO) -> None:
        self._inner = inner

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:  # type: ignore[override]
        return self._inner.write(data)  # type: ignore[arg-type]


@pytest.mark.parametrize("longer", [b"x", bytes(8), bytes(12)])
@pytest.mark.parametrize("needed", [True, False], ids=["sizes in it", "no size in it"])
def test_a_zip64_field_that_holds_more_than_it_is_to_is_refused(longer: bytes, needed: bool) -> None:
    body = (struct.pack("<QQ", 3, 3) if needed else b"") + longer
    field = struct.pack("<HH", 1, len(body)) + body
    sizes = {"size": 0xFFFFFFFF, "packed_size": 0xFFFFFFFF} if needed else {}
    with pytest.raises(SnapshotRejected) as refused:
        read([archive([Member(b"a.txt", b"abc", version=45, extra=field, **sizes)])])
    assert refused.value.rule == "bad_extra"
