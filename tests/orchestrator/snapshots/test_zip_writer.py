"""The zip writer, with Python's own reader and the agent's as judges, and determinism as its promise."""

from __future__ import annotations

import hashlib
import os
import threading
import unicodedata
import zipfile
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.config import SnapshotLimits
from agent.snapshot.zip_format import ExecutableFound, FileFound, FileStarted
from agent.snapshot.zip_reader import ZipReader
from orchestrator_stub.snapshots import zip_writer
from orchestrator_stub.snapshots.zip_writer import PIECE, ArchiveTooLarge, ZipWriter
from tests.profiles import examples

names = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn"), exclude_characters="/\\"),
    min_size=1,
    max_size=9,
).map(lambda text: "d/f" + unicodedata.normalize("NFC", text))
contents = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda unit, times: unit * times, st.binary(min_size=1, max_size=9), st.integers(0, 100_000)),
)
trees = st.dictionaries(names, st.tuples(contents, st.booleans()), max_size=6)


def written(tree: dict[str, tuple[bytes, bool]], cuts: list[int] | None = None) -> bytes:
    """The archive; with `cuts` every entry is streamed in pieces of those sizes."""
    out = BytesIO()
    archive = ZipWriter(out)
    for path, (content, executable) in tree.items():
        if cuts is None:
            archive.add(path, content, executable=executable)
            continue
        archive.begin(path, executable=executable)
        at = number = 0
        while at < len(content):
            step = cuts[number % len(cuts)]
            archive.write(content[at : at + step])
            at, number = at + step, number + 1
        assert archive.end() == len(content)
    assert archive.finish() == len(out.getvalue())
    return out.getvalue()


@examples(60, 1_000)
@given(trees, st.none() | st.lists(st.integers(1, 200_000), min_size=1, max_size=4))
def test_what_is_written_is_what_both_readers_read(
    tree: dict[str, tuple[bytes, bool]], cuts: list[int] | None
) -> None:
    data = written(tree, cuts)
    with zipfile.ZipFile(BytesIO(data)) as theirs:
        assert theirs.testzip() is None
        assert {name: theirs.read(name) for name in theirs.namelist()} == {p: c for p, (c, _) in tree.items()}
    reader = ZipReader(SnapshotLimits(snapshot_max_ratio=2000))
    ours: dict[str, bytes] = {}
    runnable = set()
    for event in reader.feed(data):
        if isinstance(event, FileFound):
            ours[event.path] = event.content
        elif isinstance(event, FileStarted):
            assert event.size is not None
            path = event.path
            ours[path] = b""
        elif isinstance(event, (bytes, memoryview)):
            ours[path] += event
        elif isinstance(event, ExecutableFound):
            runnable.add(event.path)
    reader.close()
    assert ours == {p: c for p, (c, _) in tree.items()}
    assert runnable == {p for p, (_, executable) in tree.items() if executable}


def test_streamed_bytes_do_not_depend_on_how_they_came() -> None:
    tree = {"media": (os.urandom(3 * PIECE + 17), False), "text": (b"a line of text\n" * 60_000, False)}
    digests = {hashlib.sha256(written(tree, cuts)).hexdigest() for cuts in ([PIECE], [1_000], [77_777, 5])}
    assert len(digests) == 1


def test_the_same_content_is_the_same_bytes_in_every_thread() -> None:
    """The compressor keeps its state on the thread's stack: in each thread at another address.

    In a short text, a wrong hash of one byte meets that of the first at one address in 64; these are 500.
    """
    tree = {f"src/{n}.ts": (f"{n:04}-+*/".encode() * 3, False) for n in range(500)}
    everybody_is_here = threading.Barrier(12)
    digests = []

    def write() -> None:
        everybody_is_here.wait(30)
        digests.append(hashlib.sha256(written(tree) + written(tree, [PIECE])).hexdigest())

    threads = [threading.Thread(target=write) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(digests), len(set(digests))) == (12, 1)


def test_media_is_stored_and_text_is_packed() -> None:
    media, text = os.urandom(100_000), b"export const x = 1\n" * 5_000
    tree = {"a.png": (media, False), "b.ts": (text, False)}
    for data in (written(tree), written(tree, [4_096])):
        with zipfile.ZipFile(BytesIO(data)) as archive:
            kinds = {info.filename: info.compress_type for info in archive.infolist()}
        assert kinds == {"a.png": zipfile.ZIP_STORED, "b.ts": zipfile.ZIP_DEFLATED}
        assert len(data) < len(media) + len(text) / 5


def test_what_does_not_fit_the_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_writer, "MAX_BYTES", 5_000)
    with pytest.raises(ArchiveTooLarge):
        written({"a": (os.urandom(6_000), False)})
    with pytest.raises(ArchiveTooLarge):
        written({"a": (os.urandom(6_000), False)}, [1_000])
    monkeypatch.setattr(zip_writer, "MAX_ENTRIES", 2)
    with pytest.raises(ArchiveTooLarge):
        written(dict.fromkeys("abc", (b"", False)))
