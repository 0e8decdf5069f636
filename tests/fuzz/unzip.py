"""Fuzzing the zip reader, guided by coverage: `make fuzz` (atheris), one minute by default.

What must hold for any bytes at all: the reader ends in the archive's end or in `SnapshotRejected`, the pieces they
come in make no difference, and whatever it accepts, Python's own reader sees as the same files. Seeds are the archives
of the tests and what earlier runs found worth keeping (`CORPUS`, checked by every test run too). What a run finds new
goes to the directory given, to be copied from there. What it breaks belongs in `tests/agent`.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

from agent.config import SnapshotLimits
from agent.core.errors import SnapshotRejected
from agent.core.messages import MANIFEST_PATH
from agent.snapshot.zip_format import FileFound, FileStarted
from agent.snapshot.zip_reader import ZipReader

CORPUS = Path(__file__).parent / "corpus"

LIMITS = SnapshotLimits(
    snapshot_max_bytes=1_000_000, snapshot_max_file_bytes=500_000, snapshot_max_entries=200
)


def read(pieces: Iterable[bytes]) -> list[tuple[str, bytes]] | str:
    """The files in order, or the rule that refused them."""
    reader = ZipReader(LIMITS, reserved=MANIFEST_PATH)
    files: list[tuple[str, bytes]] = []
    try:
        for piece in pieces:
            for event in reader.feed(piece):
                if isinstance(event, FileFound):
                    files.append((event.path, event.content))
                elif isinstance(event, FileStarted):
                    files.append((event.path, b""))
                elif isinstance(event, (bytes, memoryview)):
                    name, content = files.pop()
                    files.append((name, content + event))
        reader.close()
    except SnapshotRejected as refused:
        return refused.rule
    return files


def check(data: bytes) -> None:
    """Raises `AssertionError`, or whatever the reader should not have raised."""
    whole = read([data])
    step = data[0] % 61 + 1 if data else 1
    assert isinstance(read(data[at : at + step] for at in range(0, len(data), step)), str) == isinstance(
        whole, str
    )
    if isinstance(whole, str):
        return
    with zipfile.ZipFile(BytesIO(data)) as theirs:
        seen = [(_name(info), theirs.read(info)) for info in theirs.infolist() if not info.is_dir()]
    assert seen == whole


def _name(info: zipfile.ZipInfo) -> str:
    """The name as we read it: UTF-8 also without the flag."""
    return info.filename if info.flag_bits & 0x800 else info.filename.encode("cp437").decode()


def seeds() -> dict[str, bytes]:
    """The archives that the tests make, by name."""
    from tests.agent.snapshot.test_zip_reader_hostile import GRAMMAR
    from tests.fakes.zips import Member, archive, snapshot

    files = {"package.json": b"{}", "src/App.tsx": b"export default 1\n" * 40, "bin/x": bytes(range(256))}
    wide = struct.pack("<HHQQ", 1, 16, 5, 5)
    return {
        "plain": snapshot(files),
        "described": snapshot(files, described=True),
        "zip64": archive([Member(b"a", b"12345", method=0, size=0xFFFFFFFF, packed_size=0xFFFFFFFF,
                                 extra=wide, version=45)], zip64=True),
        "comment": archive([Member(b"d/", mode=0o040755), Member(b"d/a", b"x")], comment=b"made by hand"),
        **{name: data for name, (data, _) in GRAMMAR.items()},
    }  # fmt: skip
