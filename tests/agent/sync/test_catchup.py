"""Asking the database: which answer comes, which snapshot is trusted, and how long is waited before asking again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from agent.config import SnapshotLimits
from agent.core.errors import (
    AgentError,
    CredentialRejected,
    MalformedMessage,
    SessionGone,
    SnapshotRejected,
    Superseded,
    Unavailable,
)
from agent.core.messages import Changes, Current
from agent.core.model import Cursor, Entry, Manifest, RelPath, Tree, digest_of
from agent.core.reconcile import Reason, reconcile
from agent.core.scheduler import Request
from agent.fs.project_dir import ProjectDir
from agent.session_api import SessionApi
from agent.snapshot.download import Downloader, StagedSnapshot
from agent.sync.catchup import BACKOFF, REFUSED_RETRY, UNFIT_RETRY, CatchUp
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems
from agent.tokens import Tokens
from tests.agent.disks import in_staging
from tests.agent.sync.world import HOST, World, paths, plain, refused
from tests.fakes.realtime import jwt
from tests.fakes.zips import EPOCH, PROJECT, manifest, snapshot

GAP = Request(EPOCH, 1, Reason.GAP, frozenset())


@asynccontextmanager
async def catching_up(world: World, *, api: bool = True) -> AsyncIterator[CatchUp]:
    disk = ProjectDir(world.root, world.place / "staging")
    disk.open()
    async with httpx.AsyncClient(transport=httpx.MockTransport(world.orchestrator), trust_env=False) as http:
        session = SessionApi(HOST, "session", Tokens(jwt(2_000_000_000)), http) if api else None
        limits = SnapshotLimits(snapshot_retry_seconds=0.001, snapshot_retry_max_seconds=0.002)
        yield CatchUp(session, Downloader(disk, http, limits, PROJECT), Problems(Metrics()), dict)
    disk.close()


def kinds(catch_up: CatchUp) -> list[str]:
    return sorted(problem.kind for problem in catch_up.problems.open.values())


# --- asking


async def test_the_question_is_the_schedulers_and_each_kind_of_answer_comes_back(world: World) -> None:
    world.database.commit({"a": "2"})
    world.orchestrator.script = [
        lambda _: world.database.current(),
        lambda question: world.database.changes(question),
        lambda _: world.database.offer(),
    ]
    async with catching_up(world) as catch_up:
        request = Request(EPOCH, 1, Reason.DRIFT, paths("src/b", "a"))
        assert await catch_up.ask(request) == Current(EPOCH, 2)
        assert isinstance(await catch_up.ask(GAP), Changes)
        staged = await catch_up.ask(GAP)
        assert isinstance(staged, StagedSnapshot)
        assert staged.manifest.revision == 2
    assert world.orchestrator.asked[0] == {
        "epoch": EPOCH,
        "revision": 1,
        "reason": "drift",
        "paths": ["a", "src/b"],
        "accept": ["splices"],
    }


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refused(503), Unavailable),
        (httpx.ConnectError("no"), Unavailable),
        (plain(200, b"{"), Unavailable),
        (plain(200, b"[]"), MalformedMessage),
        (refused(401), CredentialRejected),
        (refused(404), SessionGone),
        (refused(409), Superseded),
    ],
    ids=["away", "no connection", "no JSON", "no answer", "refused", "gone", "superseded"],
)
async def test_why_there_is_no_answer_is_the_callers_to_hear(
    world: World, answer: object, error: type[AgentError]
) -> None:
    world.orchestrator.script = [answer]  # type: ignore[list-item]
    async with catching_up(world) as catch_up:
        with pytest.raises(error):
            await catch_up.ask(GAP)
        assert kinds(catch_up) == []


async def test_without_a_session_api_only_an_offered_snapshot_can_be_asked_for_once(world: World) -> None:
    async with catching_up(world, api=False) as catch_up:
        assert not catch_up.can_ask
        with pytest.raises(Unavailable, match="SESSION_API_URL"):
            await catch_up.ask(GAP)
        catch_up.offered = f"{HOST}/x.zip"
        assert catch_up.can_ask
        assert isinstance(await catch_up.ask(GAP), StagedSnapshot)
        assert not catch_up.can_ask


async def test_how_long_a_snapshot_took_to_build_is_kept_from_the_offer(world: World) -> None:
    told = {**manifest({}), "build_seconds": 1.5}
    world.orchestrator.script = [{**world.database.offer(), "manifest": told}, world.database.offer()]
    async with catching_up(world) as catch_up:
        for seconds in (1.5, None):
            staged = await catch_up.ask(GAP)
            assert isinstance(staged, StagedSnapshot)
            assert staged.manifest.build_seconds == seconds


# --- the first tree


async def test_the_first_tree_comes_from_its_url_without_a_question(world: World) -> None:
    async with catching_up(world) as catch_up:
        staged = await catch_up.first(f"{HOST}/first.zip")
    assert staged.manifest.revision == 1
    assert world.orchestrator.asked == []


async def test_a_first_url_that_is_over_is_replaced_by_the_session_apis(world: World) -> None:
    world.orchestrator.archives = [plain(403, b"expired")]
    world.orchestrator.script = [lambda _: world.database.offer()]
    async with catching_up(world) as catch_up:
        await catch_up.first(f"{HOST}/first.zip")
        assert kinds(catch_up) == []
    assert world.orchestrator.reasons == ["snapshot_expired"]


# --- trust


async def test_an_archive_that_breaks_a_rule_is_a_problem_until_another_build_of_it_comes(
    world: World,
) -> None:
    lie = snapshot({"a": b"other"}, said=manifest({"a": b"told"}))
    world.orchestrator.script = [lambda _: world.database.offer()] * 3
    world.orchestrator.archives = [lie]
    async with catching_up(world) as catch_up:
        with pytest.raises(SnapshotRejected):
            await catch_up.ask(GAP)
        assert kinds(catch_up) == ["snapshot_rejected"]
        assert in_staging(world.place / "staging") == []
        await catch_up.ask(GAP)
        assert kinds(catch_up) == []
        await catch_up.ask(GAP)
    assert world.orchestrator.reasons == ["gap", "snapshot_rejected", "gap"]


async def test_a_url_that_is_over_is_not_the_tokens_end(world: World) -> None:
    world.orchestrator.script = [lambda _: world.database.offer()] * 2
    world.orchestrator.archives = [plain(403, b"expired")]
    async with catching_up(world) as catch_up:
        with pytest.raises(Unavailable):
            await catch_up.ask(GAP)
        assert kinds(catch_up) == ["snapshot_expired"]
        await catch_up.ask(GAP)
        assert kinds(catch_up) == []
    assert world.orchestrator.reasons == ["gap", "gap"]


def says(*files: str) -> StagedSnapshot:
    """A staged snapshot with just these files."""
    entries = {RelPath(path): Entry(1, digest_of(path.encode())) for path in files}
    whole = Manifest(PROJECT, EPOCH, 2, entries, {})
    return StagedSnapshot(whole, plain=False, staged=dict.fromkeys(entries, "staged"), size=0)


def doubts(catch_up: CatchUp, staged: StagedSnapshot) -> bool:
    entries = {RelPath(f"f{n}"): Entry(1, digest_of(b"x"), revision=1) for n in range(30)}
    tree = Tree(Cursor(EPOCH, 1), Tree().entries.update(entries))
    return catch_up.doubts(tree, reconcile(tree, staged.manifest, staged.staged)) is not None


async def test_a_snapshot_that_deletes_too_much_is_believed_at_its_second_build(world: World) -> None:
    world.orchestrator.script = [lambda _: world.database.offer()] * 2
    async with catching_up(world) as catch_up:
        assert not catch_up.halted
        assert doubts(catch_up, says("f1", "x"))
        assert catch_up.halted
        assert kinds(catch_up) == ["mass_delete"]
        assert doubts(catch_up, says("y")), "it deletes what the first left"
        assert not doubts(catch_up, says("f2", "z")), "it deletes no more, and saves went on"
        catch_up.succeeded()
        assert not catch_up.halted
        assert kinds(catch_up) == []
        assert doubts(catch_up, says("y"))
        await catch_up.ask(GAP)
        await catch_up.ask(GAP)
    assert world.orchestrator.reasons == ["snapshot_rejected", "gap"]


async def test_one_that_deletes_little_is_not_doubted(world: World) -> None:
    async with catching_up(world) as catch_up:
        assert not doubts(catch_up, says(*(f"f{n}" for n in range(16))))
        assert kinds(catch_up) == []


# --- asking again


@pytest.mark.parametrize(
    ("error", "least"),
    [
        (None, UNFIT_RETRY),
        (CredentialRejected("no"), REFUSED_RETRY),
        (Unavailable("x", "busy", retry_after=33.0), 33.0),
        (Unavailable("x", "away"), 0.0),
        (SnapshotRejected("rule", "x"), 0.0),
        (MalformedMessage("x", "y"), 0.0),
    ],
    ids=["unfit", "refused", "Retry-After", "away", "rejected", "malformed"],
)
async def test_the_wait_grows_and_is_never_shorter_than_its_cause_allows(
    world: World, error: AgentError | None, least: float
) -> None:
    async with catching_up(world) as catch_up:
        waits = [catch_up.wait(error) for _ in range(200)]
        assert min(waits) >= least
        assert max(waits) <= max(least, 15.0)
        assert max(waits[50:]) > 7.5
        assert catch_up.attempts == 200
        catch_up.succeeded()
        assert max(catch_up.wait(Unavailable("x", "away")) for _ in range(1)) <= 0.25


def test_the_longest_wait_is_half_of_the_heartbeats_interval() -> None:
    assert all(BACKOFF.delay(n) <= 15.0 for n in range(1, 100))


async def test_what_is_not_needed_any_more_is_forgotten(world: World) -> None:
    world.orchestrator.script = [refused(503)]
    async with catching_up(world) as catch_up:
        with pytest.raises(Unavailable) as failed:
            await catch_up.ask(GAP)
        catch_up.wait(failed.value)
        assert catch_up.api is not None
        assert [problem.kind for problem in catch_up.api.problems()] == ["session_api_unreachable"]
        catch_up.not_needed()
        assert catch_up.api.problems() == ()
        assert catch_up.attempts == 0
    async with catching_up(world, api=False) as catch_up:
        catch_up.not_needed()
