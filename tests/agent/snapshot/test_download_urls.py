"""A snapshot's URL that cannot be requested, and a body that comes encoded: reported and tried again."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from agent.config import SnapshotLimits
from agent.core.errors import (
    AgentError,
    CredentialRejected,
    HydrationImpossible,
    MalformedMessage,
    Unavailable,
)
from agent.core.reconcile import Reason
from agent.core.scheduler import Request
from agent.fs.project_dir import ProjectDir
from agent.snapshot.download import Downloader
from agent.sync.catchup import CatchUp
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems
from tests.agent.disks import in_staging
from tests.fakes.origin import Answer, origin
from tests.fakes.zips import PROJECT, snapshot

QUICK = SnapshotLimits(
    snapshot_stall_seconds=0.5, snapshot_retry_seconds=0.001, snapshot_retry_max_seconds=0.002
)
FILES = {"package.json": b"{}", "src/App.tsx": b"export default 1\n" * 40}

NO_ADDRESS = {
    "a port above all": "http://127.0.0.1:99999/s.zip?token=SECRET",
    "a port of twenty digits": "http://127.0.0.1:99999999999999999999/s.zip?token=SECRET",
    "a port below none": "http://127.0.0.1:-1/s.zip?token=SECRET",
    "no port": "http://127.0.0.1:x/s.zip?token=SECRET",
    "a name of no letters": "http://xn--/s.zip?token=SECRET",
    "a name of wrong letters": "http://xn--a-ecp.ru/s.zip?token=SECRET",
    "half an address": "http://[::1/s.zip?token=SECRET",
    "half a surrogate pair": "http://127.0.0.1/\ud800?token=SECRET",
    "a control character": "http://127.0.0.1/\0?token=SECRET",
    "no end": "http://127.0.0.1/" + "a" * 70_000 + "?token=SECRET",
    "no host": "http:///s.zip?token=SECRET",
    "another scheme": "file:///etc/passwd?token=SECRET",
    "no scheme": "s.zip?token=SECRET",
    "nothing": "",
}


@pytest.mark.parametrize("url", NO_ADDRESS.values(), ids=NO_ADDRESS)
async def test_a_url_that_cannot_be_requested_is_refused(
    url: str, disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    with pytest.raises(CredentialRejected, match=r"^the snapshot's URL cannot be used: ") as caught:
        await Downloader(disk, http, QUICK).fetch(url)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__suppress_context__
    assert in_staging(tmp_path / "staging") == []


@pytest.mark.parametrize("url", NO_ADDRESS.values(), ids=NO_ADDRESS)
async def test_another_is_asked_for_at_a_start(url: str, disk: ProjectDir, http: httpx.AsyncClient) -> None:
    asked: list[str] = []
    async with origin(Answer(snapshot(FILES))) as server:

        async def renew(reason: str) -> str:
            asked.append(reason)
            return server.url

        await Downloader(disk, http, QUICK).obtain(url, renew=renew)
    assert asked == ["snapshot_expired"]


@pytest.mark.parametrize("url", NO_ADDRESS.values(), ids=NO_ADDRESS)
async def test_and_in_a_catch_up_it_is_a_problem_until_another_comes(
    url: str, disk: ProjectDir, http: httpx.AsyncClient
) -> None:
    problems = Problems(Metrics())
    catch_up = CatchUp(None, Downloader(disk, http, QUICK, PROJECT), problems, have=dict)
    catch_up.offered = url
    with pytest.raises(Unavailable):
        await catch_up.ask(Request(None, 0, Reason.SNAPSHOT_READY, frozenset()))
    assert [problem.kind for problem in problems.open.values()] == ["snapshot_expired"]
    async with origin(Answer(snapshot(FILES))) as server:
        catch_up.offered = server.url
        await catch_up.ask(Request(None, 0, Reason.SNAPSHOT_READY, frozenset()))
    assert not problems.open


@pytest.mark.parametrize(
    ("coding", "encode"),
    [
        ("gzip", gzip.compress),
        ("gzip, gzip", lambda body: gzip.compress(gzip.compress(body))),
        ("deflate", zlib.compress),
        ("of-tomorrow", lambda body: body),
    ],
)
@pytest.mark.parametrize("content", ["a snapshot", "a bomb"])
async def test_a_body_that_is_encoded_is_refused_unread(
    content: str,
    coding: str,
    encode: Callable[[bytes], bytes],
    disk: ProjectDir,
    http: httpx.AsyncClient,
    tmp_path: Path,
) -> None:
    body = encode(snapshot(FILES) if content == "a snapshot" else bytes(20_000_000))
    async with origin(Answer(body, headers=[("Content-Encoding", coding)])) as server:
        tracemalloc.start()
        try:
            with pytest.raises(Unavailable, match=f"encoded as '{coding}'"):
                await Downloader(disk, http, QUICK).fetch(server.url)
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()
    assert "accept-encoding: identity" in server.requests[0].lower()
    assert in_staging(tmp_path / "staging") == []
    assert os.listdir(tmp_path / "project") == []


async def test_a_refusal_that_is_nested_without_end_is_one_like_another(
    disk: ProjectDir, http: httpx.AsyncClient
) -> None:
    deep = "[" * 1000 + "]" * 1000
    for body in (f'{{"statusCode": {deep}}}', f'{{"code": {deep}, "error": {deep}}}'):
        async with origin(Answer(body.encode(), 400)) as server:
            with pytest.raises(Unavailable, match="HTTP 400"):
                await Downloader(disk, http, QUICK).fetch(server.url)


@pytest.mark.parametrize(
    ("error", "end"),
    [(CredentialRejected("no"), CredentialRejected), (MalformedMessage("x", "y"), HydrationImpossible)],
)
async def test_a_refused_token_is_not_asked_with_again_at_once(
    error: AgentError, end: type[AgentError], disk: ProjectDir, http: httpx.AsyncClient
) -> None:
    """Nor is a malformed answer the end: the waits grow as for an orchestrator that is away."""
    limits = SnapshotLimits(snapshot_attempts=6, snapshot_retry_seconds=0.05, snapshot_retry_max_seconds=0.4)
    at: list[float] = []

    async def renew(reason: str) -> str:
        at.append(asyncio.get_running_loop().time())
        raise error

    with pytest.raises(end):
        await Downloader(disk, http, limits).obtain(None, renew=renew)
    assert len(at) == 6
    assert at[-1] - at[0] > 0.05, "eight times without a pause"


async def test_a_body_that_trickles_is_given_up(disk: ProjectDir, http: httpx.AsyncClient) -> None:
    """A byte now and then is no stall, and would hold up every other catch-up for ten minutes."""
    body = snapshot(FILES)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
        with contextlib.suppress(OSError):
            for byte in body:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.05)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/s.zip"
    try:
        with pytest.raises(Unavailable, match=r"no_progress: [0-9]+ bytes arrived"):
            async with asyncio.timeout(20):
                await Downloader(disk, http, QUICK).fetch(url)
    finally:
        server.close()
