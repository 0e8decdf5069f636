"""Hydration against real sockets: what is staged, what is refused, and that nothing else is left behind."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random

import httpx
import pytest

from agent.config import SnapshotLimits
from agent.core.errors import (
    CredentialRejected,
    SnapshotRejected,
    Unavailable,
)
from agent.core.model import MAX_SEGMENTS, Entry, RelPath, digest_of
from agent.fs.project_dir import ProjectDir
from agent.fs.staging import Staging
from agent.snapshot.download import READ_BYTES, Downloader, Progress, expiry
from agent.snapshot.zip_format import Event
from agent.snapshot.zip_reader import ZipReader
from tests.agent.disks import in_staging, staged_files
from tests.fakes.origin import Answer, origin
from tests.fakes.zips import EPOCH, MANIFEST_PATH, PROJECT, Member, archive, manifest, snapshot

QUICK = SnapshotLimits(
    snapshot_stall_seconds=0.3, snapshot_retry_seconds=0.001, snapshot_retry_max_seconds=0.002
)
FILES = {
    "package.json": b"{}",
    "src/App.tsx": b"export default 1\n" * 40,
    "public/dot.bin": bytes(range(256)),
}


@pytest.fixture
def tls(tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's side, and that of a client who trusts it."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        "-subj",
        "/CN=localhost",
    ]
    extra = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command, *extra], check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=str(certificate))


def is_clean(tmp_path: Path) -> bool:
    """Nothing staged, nothing in the project."""
    return in_staging(tmp_path / "staging") == [] and os.listdir(tmp_path / "project") == []


async def test_a_snapshot_is_staged_whole(disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path) -> None:
    data = snapshot(FILES)
    progress = Progress()
    async with origin(Answer(data, piece=100)) as server:
        got = await Downloader(disk, http, QUICK, PROJECT, progress=progress).fetch(server.url)
    assert staged_files(got, tmp_path) == FILES
    assert not got.plain
    assert (got.manifest.epoch, got.manifest.revision, got.size) == (EPOCH, 7, len(data))
    assert progress.report() == {
        "attempt": 1,
        "received_bytes": len(data),
        "expected_bytes": len(data),
        "files": 3,
        "files_total": 3,
        "unpacked_bytes": sum(map(len, FILES.values())),
        "unpacked_total": sum(map(len, FILES.values())),
    }
    assert os.listdir(tmp_path / "project") == []


async def test_a_directory_entry_over_a_listed_file_is_refused(
    disk: ProjectDir, http: httpx.AsyncClient
) -> None:
    listed = Member(MANIFEST_PATH.encode(), json.dumps(manifest({"a": b"1"})).encode())
    directory = Member(b"a/", b"", method=0, mode=0o040755)
    for members in ([listed, directory, Member(b"a", b"1")], [listed, Member(b"a", b"1"), directory]):
        async with origin(Answer(archive(members))) as server:
            with pytest.raises(SnapshotRejected) as caught:
                await Downloader(disk, http, QUICK).fetch(server.url)
        assert caught.value.rule == "path_clash"


@pytest.mark.parametrize("announced", [True, False], ids=["its directory first", "alone"])
async def test_a_listed_file_is_no_deeper_than_allowed(
    announced: bool, disk: ProjectDir, http: httpx.AsyncClient
) -> None:
    above = "d/" * MAX_SEGMENTS
    listed = Member(MANIFEST_PATH.encode(), json.dumps(manifest({f"{above}x": b"1"})).encode())
    directory = [Member(above.encode(), b"", method=0, mode=0o040755)] if announced else []
    async with origin(Answer(archive([listed, *directory, Member(f"{above}x".encode(), b"1")]))) as server:
        with pytest.raises(SnapshotRejected) as caught:
            await Downloader(disk, http, QUICK).fetch(server.url)
    assert caught.value.rule == "too_deep"


@pytest.mark.parametrize(
    ("said", "described", "rule"),
    [(20_000_000, False, None), (20_000_000, True, None), (19_999_999, False, "size_mismatch"),
     (9_000_000, True, "ratio")],
)  # fmt: skip
async def test_how_well_a_file_packs_matters_only_past_what_the_manifest_says(
    said: int, described: bool, rule: str | None, disk: ProjectDir, http: httpx.AsyncClient
) -> None:
    """A blank picture is no bomb; what unpacks to more than it is said to have is one."""
    listed = Member(MANIFEST_PATH.encode(), json.dumps(manifest({"a": bytes(said)})).encode())
    blank = Member(b"a", bytes(20_000_000), described=described)
    async with origin(Answer(archive([listed, blank]))) as server:
        if rule is None:
            snapshot = await Downloader(disk, http, QUICK).fetch(server.url)
            assert list(snapshot.staged) == ["a"]
            return
        with pytest.raises(SnapshotRejected) as caught:
            await Downloader(disk, http, QUICK).fetch(server.url)
        assert caught.value.rule == rule


async def test_a_plain_zip_is_taken_with_its_cursor_unknown(
    disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    members = [Member(p.encode(), c) for p, c in FILES.items()] + [Member(b"run.sh", b"#!", mode=0o100755)]
    async with origin(Answer(archive(members))) as server:
        got = await Downloader(disk, http, QUICK, PROJECT).fetch(server.url)
    assert got.plain
    assert staged_files(got, tmp_path) == {**FILES, "run.sh": b"#!"}
    assert {p for p, f in got.manifest.files.items() if f.executable} == {"run.sh"}
    assert got.manifest.files[RelPath("package.json")].digest == digest_of(b"{}")


async def test_a_large_body_is_taken_in_large_pieces(
    disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What httpx does by itself is 64 KB; and what is stored goes to the disk as it came, in no smaller pieces."""
    content = Random(1).randbytes(24 * READ_BYTES)
    data = archive([Member(b"public/film.bin", content, method=0)])
    fed: list[int] = []
    feed = ZipReader.feed

    def watched(self: ZipReader, *pieces: bytes) -> Iterator[Event]:
        fed.extend(map(len, pieces))
        return feed(self, *pieces)

    monkeypatch.setattr(ZipReader, "feed", watched)
    async with origin(Answer(data)) as server:
        got = await Downloader(disk, http, QUICK).fetch(server.url)
    assert staged_files(got, tmp_path) == {"public/film.bin": content}
    assert 64 * 1024 < max(fed) <= READ_BYTES
    assert sum(fed) == len(data)


def chunked(data: bytes, piece: int) -> bytes:
    pieces = [data[at : at + piece] for at in range(0, len(data), piece)]
    return b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in (*pieces, b""))


@pytest.mark.parametrize("length", [True, False], ids=["a length", "no length"])
async def test_a_body_in_chunks_is_what_is_in_them(
    length: bool, disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    """A proxy may send it so; a length beside it says nothing (RFC 9112, 6.3)."""
    data = snapshot(FILES)
    answer = Answer(
        chunked(data, 100), headers=[("Transfer-Encoding", "chunked")], announced=length, piece=333
    )
    async with origin(answer) as server:
        got = await Downloader(disk, http, QUICK).fetch(server.url)
    assert staged_files(got, tmp_path) == FILES


async def test_what_follows_the_announced_body_is_not_taken_for_it(
    disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    data = snapshot(FILES)
    answer = Answer(
        data + b"HTTP/1.1 200 OK\r\n\r\n", headers=[("Content-Length", str(len(data)))], announced=False
    )
    for piece in (100, 65_536):
        answer.piece = piece
        async with origin(answer) as server:
            for _ in range(2):
                got = await Downloader(disk, http, QUICK).fetch(server.url)
                assert got.size == len(data)
                assert staged_files(got, tmp_path) == FILES
                disk.clear_staging()


async def test_a_body_over_tls(
    disk: ProjectDir, tls: tuple[ssl.SSLContext, ssl.SSLContext], tmp_path: Path
) -> None:
    content = Random(2).randbytes(5 * READ_BYTES)
    data = archive([Member(b"public/film.bin", content, method=0)])
    theirs, ours = tls
    async with origin(Answer(data), tls=theirs) as server, httpx.AsyncClient(verify=ours) as http:
        got = await Downloader(disk, http, QUICK).fetch(server.url)
        assert staged_files(got, tmp_path) == {"public/film.bin": content}
        server.answers = [Answer(data, cut=3 * READ_BYTES)]
        with pytest.raises(Unavailable):
            await Downloader(disk, http, QUICK).fetch(server.url)
    assert is_clean(tmp_path)


async def test_files_the_tree_has_are_checked_but_not_staged(
    disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    have = {RelPath("package.json"): Entry(1, digest_of(b"{}"), 2)}
    async with origin(Answer(snapshot(FILES))) as server:
        got = await Downloader(disk, http, QUICK).fetch(server.url, have=have)
    assert set(got.staged) == {"src/App.tsx", "public/dot.bin"}
    lying = snapshot({**FILES, "package.json": b"[]"}, said=manifest(FILES))
    async with origin(Answer(lying)) as server:
        with pytest.raises(SnapshotRejected) as caught:
            await Downloader(disk, http, QUICK).fetch(server.url, have=have)
    assert caught.value.rule == "hash_mismatch"


async def test_an_identical_snapshot_ends_with_its_manifest(
    disk: ProjectDir, http: httpx.AsyncClient
) -> None:
    files = {**FILES, "big.bin": os.urandom(3_000_000)}
    have = {RelPath(p): Entry(1, digest_of(c), len(c)) for p, c in files.items()}
    data = snapshot(files)
    async with origin(Answer(data)) as server:
        got = await Downloader(disk, http, QUICK).fetch(server.url, have=have)
    assert got.staged == {}
    assert set(got.manifest.files) == set(files)
    assert got.size < len(data) / 2


def altered(**changes: object) -> bytes:
    return snapshot(FILES, said={**manifest(FILES), **changes})


def without(path: str) -> bytes:
    listed = manifest(FILES)
    return snapshot({p: c for p, c in FILES.items() if p != path}, said=listed)


LIES = {
    "unlisted": snapshot({**FILES, "extra.txt": b"x"}, said=manifest(FILES)),
    "missing_file": without("src/App.tsx"),
    "hash_mismatch": snapshot({**FILES, "package.json": b"[]"}, said=manifest(FILES)),
    "size_mismatch": snapshot({**FILES, "package.json": b"{ }"}, said=manifest(FILES)),
    "other_project": altered(project_id="6b0a0000-0000-4000-8000-0000000000ff"),
    "manifest": altered(format=2),
    "dot_segment": altered(files=[{"file_path": "../x", "content_hash": "0" * 64, "size": 0, "version": 1}]),
    "duplicate": archive(
        [
            Member(MANIFEST_PATH.encode(), json.dumps(manifest({"a": b"1"})).encode()),
            Member(b"a", b"1"),
            Member(b"a", b"1"),
        ]
    ),
    "path_clash": archive(
        [
            Member(MANIFEST_PATH.encode(), json.dumps(manifest({"a/b": b"1", "a": b"1"})).encode()),
            Member(b"a/b", b"1"),
            Member(b"a", b"1"),
        ]
    ),
    "manifest_position": archive([Member(b"a", b"a"), Member(MANIFEST_PATH.encode(), b"{}")]),
    "not_a_zip": b"<!DOCTYPE html><title>Sign in</title>",
    "empty": b"",
    "trailing_data": snapshot(FILES) + b"x",
}


@pytest.mark.parametrize("rule", LIES)
async def test_what_the_manifest_does_not_bear_out_is_refused_whole(
    rule: str, disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    async with origin(Answer(LIES[rule])) as server:
        with pytest.raises(SnapshotRejected) as caught:
            await Downloader(disk, http, QUICK, PROJECT).fetch(server.url)
    assert caught.value.rule == rule
    assert is_clean(tmp_path)


STORAGE = {
    "expired": ({"statusCode": "400", "code": "InvalidJWT", "error": "InvalidJWT"}, CredentialRejected),
    "other path": ({"statusCode": "400", "code": "InvalidSignature"}, CredentialRejected),
    "older form": (
        {"statusCode": "400", "error": "InvalidJWT", "message": "jwt expired"},
        CredentialRejected,
    ),
    "no object": ({"statusCode": "404", "code": "NoSuchKey", "error": "not_found"}, SnapshotRejected),
    "database": ({"statusCode": "544", "code": "DatabaseTimeout"}, Unavailable),
}


@pytest.mark.parametrize("case", STORAGE)
async def test_storage_is_judged_by_what_its_json_says(
    case: str, disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    body, error = STORAGE[case]
    async with origin(Answer(json.dumps(body).encode(), 400)) as server:
        with pytest.raises(error):
            await Downloader(disk, http, QUICK).fetch(server.url)
    assert is_clean(tmp_path)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, Unavailable), (403, CredentialRejected), (410, CredentialRejected), (404, SnapshotRejected),
        (429, Unavailable), (500, Unavailable), (502, Unavailable), (503, Unavailable), (302, Unavailable),
    ],
)  # fmt: skip
async def test_a_status_without_json(
    status: int, error: type[Exception], disk: ProjectDir, http: httpx.AsyncClient
) -> None:
    async with origin(Answer(b"<html>no", status, headers=[("Retry-After", "7")])) as server:
        with pytest.raises(error) as caught:
            await Downloader(disk, http, QUICK).fetch(server.url)
    if status in (429, 503):
        assert isinstance(caught.value, Unavailable)
        assert caught.value.retry_after == 7


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("how", ["close", "reset", "stall"])
async def test_a_stream_that_dies_can_be_tried_again(
    how: str, announced: bool, disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    data = snapshot({**FILES, "more.bin": os.urandom(200_000)})
    async with origin(Answer(data, cut=len(data) // 2, how=how, announced=announced)) as server:
        with pytest.raises(Unavailable) as caught:
            await Downloader(disk, http, QUICK).fetch(server.url)
    assert "SECRET" not in str(caught.value)
    assert is_clean(tmp_path)


async def test_a_slow_drip_ends_with_the_total_time(
    disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    limits = QUICK.model_copy(update={"snapshot_total_seconds": 0.2})
    async with origin(Answer(snapshot(FILES), piece=1, pause=0.01)) as server:
        with pytest.raises(Unavailable, match="total_time"):
            await Downloader(disk, http, limits).fetch(server.url)
    assert is_clean(tmp_path)


async def test_nothing_listens(disk: ProjectDir, http: httpx.AsyncClient) -> None:
    async with origin(Answer()) as server:
        url = server.url
    with pytest.raises(Unavailable):
        await Downloader(disk, http, QUICK).fetch(url)


def token(exp: float) -> str:
    claims = base64.urlsafe_b64encode(json.dumps({"url": "b/p", "exp": exp}).encode()).decode().rstrip("=")
    return f"e30.{claims}.c2ln"


async def test_an_expired_url_is_known_before_asking(disk: ProjectDir, http: httpx.AsyncClient) -> None:
    async with origin(Answer(snapshot(FILES))) as server:
        url = server.url.replace("SECRET", token(1000))
        assert expiry(url) == 1000
        with pytest.raises(CredentialRejected, match="expired 3600 s ago"):
            await Downloader(disk, http, QUICK, wall=lambda: 4600).fetch(url)
        assert server.requests == []
        await Downloader(disk, http, QUICK, wall=lambda: 999).fetch(url)


async def test_a_hydration_cancelled_in_the_middle_leaves_nothing(
    disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    """Wherever the cancellation falls, the thread in hand is waited for and its files are gone."""
    data = snapshot({f"src/f{i}.bin": os.urandom(40_000) for i in range(60)})
    for after in (1, 300_000, 1_000_000, 2_000_000):
        progress = Progress()
        async with origin(Answer(data, piece=20_000, pause=0.0005)) as server:
            hydrating = asyncio.create_task(
                Downloader(disk, http, QUICK, progress=progress).fetch(server.url)
            )
            async with asyncio.timeout(10):
                while progress.received_bytes < after:
                    await asyncio.sleep(0)
            hydrating.cancel()
            with pytest.raises(asyncio.CancelledError):
                await hydrating
        assert is_clean(tmp_path)


async def test_the_loop_is_free_while_a_slow_disk_is_written(
    disk: ProjectDir, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = threading.Event()
    go_on = threading.Event()

    stage_whole = Staging.stage_whole

    def slow(self: Staging, content: bytes, path: RelPath | None = None) -> str:
        writing.set()
        assert go_on.wait(10)
        return stage_whole(self, content, path)

    monkeypatch.setattr(Staging, "stage_whole", slow)
    async with origin(Answer(archive([Member(b"a", b"x" * 1000)]))) as server:
        hydrating = asyncio.create_task(Downloader(disk, http, QUICK).fetch(server.url))
        async with asyncio.timeout(10):
            while not writing.is_set():
                await asyncio.sleep(0.001)
        go_on.set()
        await hydrating


async def test_the_url_is_in_no_log(
    disk: ProjectDir, http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", "agent")
    async with origin(Answer(b"", 503)) as server:
        with pytest.raises(Unavailable) as caught:
            await Downloader(disk, http, QUICK).fetch(server.url)
    chain = [str(caught.value), repr(caught.value), repr(caught.value.__cause__)]
    assert "SECRET" not in " ".join([*chain, caplog.text])
