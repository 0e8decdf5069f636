"""When a download is tried again, with which URL, and what is said when it is given up."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from agent.config import SnapshotLimits
from agent.core.errors import (
    CredentialRejected,
    HydrationImpossible,
)
from agent.fs.project_dir import ProjectDir
from agent.snapshot.download import Downloader, Progress
from agent.sync.catchup import CatchUp
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems
from tests.agent.disks import staged_files
from tests.fakes.origin import Answer, origin
from tests.fakes.zips import PROJECT, snapshot

QUICK = SnapshotLimits(
    snapshot_stall_seconds=0.3, snapshot_retry_seconds=0.001, snapshot_retry_max_seconds=0.002
)
FILES = {"package.json": b"{}", "src/App.tsx": b"export default 1\n" * 40}


async def test_transient_failures_are_retried(
    disk: ProjectDir, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    data = snapshot(FILES)
    bad = (Answer(b"", 503), Answer(data, cut=50, how="reset"), Answer(data))
    progress = Progress()
    async with origin(*bad) as server:
        got = await Downloader(disk, http, QUICK, progress=progress).obtain(server.url, renew=None)
    assert staged_files(got, tmp_path) == FILES
    assert progress.attempt == 3


async def test_the_peer_is_not_asked_before_it_wants_to_be(disk: ProjectDir, http: httpx.AsyncClient) -> None:
    """Jitter would be some milliseconds here."""
    async with origin(Answer(b"", 503, headers=[("Retry-After", "1")]), Answer(snapshot(FILES))) as server:
        started = time.monotonic()
        await Downloader(disk, http, QUICK).obtain(server.url, renew=None)
        assert time.monotonic() - started >= 1.0
    assert len(server.requests) == 2


async def test_a_refused_url_is_renewed(disk: ProjectDir, http: httpx.AsyncClient) -> None:
    reasons = []
    async with origin(
        Answer(b'{"code":"InvalidJWT"}', 400), Answer(b"junk"), Answer(snapshot(FILES))
    ) as server:

        async def renew(reason: str) -> str | None:
            reasons.append(reason)
            return f"{server.url}&n={len(reasons)}"

        await Downloader(disk, http, QUICK).obtain(None, renew=renew)
    assert reasons == ["snapshot_missing", "snapshot_expired", "snapshot_rejected"]


@pytest.mark.parametrize(
    ("bad", "kind"),
    [(Answer(b'{"code":"InvalidJWT"}', 400), "snapshot_expired"), (Answer(b"junk"), "snapshot_rejected")],
)
async def test_a_refusal_is_a_problem_until_a_snapshot_is_taken(
    disk: ProjectDir, http: httpx.AsyncClient, bad: Answer, kind: str
) -> None:
    problems = Problems(Metrics())
    catch_up = CatchUp(None, Downloader(disk, http, QUICK, PROJECT), problems, have=dict)
    async with origin(bad, Answer(snapshot(FILES))) as server:
        with pytest.raises((CredentialRejected, HydrationImpossible)):
            await catch_up.first(server.url)
        assert [problem.kind for problem in problems.open.values()] == [kind]
        await catch_up.first(server.url)
    assert not problems.open


async def test_giving_up_says_why_in_one_line(disk: ProjectDir, http: httpx.AsyncClient) -> None:
    async with origin(Answer(b"", 503)) as server:
        with pytest.raises(HydrationImpossible, match=r"after 8 attempts.*HTTP 503") as spent:
            await Downloader(disk, http, QUICK).obtain(server.url, renew=None)
        assert len(server.requests) == 8
    assert "SECRET" not in str(spent.value)
    async with origin(Answer(b'{"code":"InvalidJWT"}', 400)) as server:
        with pytest.raises(CredentialRejected):
            await Downloader(disk, http, QUICK).obtain(server.url, renew=None)
    async with origin(Answer(b"junk")) as server:
        with pytest.raises(HydrationImpossible, match="not_a_zip"):
            await Downloader(disk, http, QUICK).obtain(server.url, renew=None)


@pytest.mark.parametrize("other", [None, "the same"])
async def test_an_archive_that_the_orchestrator_has_no_other_for_is_refused_for_good(
    disk: ProjectDir, http: httpx.AsyncClient, other: str | None
) -> None:
    async with origin(Answer(b"junk")) as server:

        async def renew(_: str) -> str | None:
            return other and server.url

        with pytest.raises(CredentialRejected, match=r"not_a_zip.*the orchestrator has no other"):
            await Downloader(disk, http, QUICK).obtain(server.url, renew=renew)
        assert len(server.requests) == 1
