"""The heartbeat against a played orchestrator, in simulated time: when it reports, and what it does with the answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import orjson
import pytest

from agent.core.errors import AgentError, SessionGone, Superseded
from agent.core.model import Cursor, Problem, Tree
from agent.core.reconcile import Reason
from agent.daemon import Agent
from agent.devserver.screen import _Reported
from agent.devserver.state import Phase
from agent.replay.simulated_clock import simulate
from agent.telemetry.status import SyncPhase
from tests.agent.built import DevServer, answer, built, dev_server_of, problem, settings, source_of

EVERY = 30.0
HEAD: dict[str, object] = {"epoch": "an epoch", "revision": 0, "tree_hash": None, "action": None}


@dataclass
class Orchestrator:
    """Keeps what it is told and when; answers are taken from `answers`, then all is well."""

    answers: list[httpx.Response | Exception] = field(default_factory=list)
    seconds: float = 0.0
    """For one answer."""
    at: list[float] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    open_now: int = 0
    most_open: int = 0

    async def respond(self, request: httpx.Request) -> httpx.Response:
        assert request.method == "PUT"
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        self.at.append(asyncio.get_running_loop().time())
        self.told.append(orjson.loads(request.content))
        await asyncio.sleep(self.seconds)
        self.open_now -= 1
        given = self.answers.pop(0) if self.answers else answer(200, HEAD)
        if isinstance(given, Exception):
            raise given
        return given

    @property
    def states(self) -> list[str]:
        return [body["state"] for body in self.told]


@dataclass
class World:
    agent: Agent
    dev: DevServer
    orchestrator: Orchestrator

    def serve(self) -> None:
        """The tree is whole and the preview served."""
        self.agent.follower.adopt(Tree(Cursor("an epoch")))
        self.agent.report.sync_status.phase = SyncPhase.FOLLOWING
        self.dev.state = Phase.READY

    @property
    def kinds(self) -> set[str]:
        return {problem.kind for problem in self.agent.report.all_problems()}


def play(
    directory: Path, script: Callable[[World], Awaitable[None]], orchestrator: Orchestrator, **environ: str
) -> None:
    """Run `script` beside the heartbeat; what ends the heartbeat ends it too."""

    async def main() -> None:
        given = settings(directory, HEARTBEAT_SECONDS=f"{EVERY:g}", **environ)
        async with built(given, orchestrator.respond) as agent:
            world = World(agent, dev_server_of(agent), orchestrator)
            source_of(agent)
            beating = asyncio.ensure_future(agent.heartbeat.run())
            playing = asyncio.ensure_future(script(world))
            try:
                await asyncio.wait([beating, playing], return_when=asyncio.FIRST_COMPLETED)
                if beating.done():
                    beating.result()
                await playing
            finally:
                beating.cancel()
                playing.cancel()
                await asyncio.gather(beating, playing, return_exceptions=True)

    simulate(main())


def test_it_reports_at_once_on_a_change_and_else_at_its_pace(tmp_path: Path) -> None:
    orchestrator = Orchestrator()

    async def script(world: World) -> None:
        await asyncio.sleep(0.05)
        assert orchestrator.states == ["starting"], "at once, and not a second time"
        await asyncio.sleep(5)
        assert len(orchestrator.at) == 1, "nothing has changed"
        world.serve()
        await asyncio.sleep(0.2)
        assert orchestrator.states == ["starting", "serving"], "a change is looked for ten times a second"
        assert orchestrator.told[-1]["dev_server"] == "ready"
        await asyncio.sleep(10 * EVERY)
        gaps = [
            after - before for before, after in zip(orchestrator.at[1:], orchestrator.at[2:], strict=False)
        ]
        assert 8 <= len(gaps) <= 13
        assert all(0.8 * EVERY <= gap <= 1.2 * EVERY + 1 for gap in gaps), gaps
        assert len({round(gap) for gap in gaps}) > 1, "agents that started together spread"
        world.dev.state = Phase.FAILED
        await asyncio.sleep(0.6)
        assert orchestrator.states[-1] == "degraded", "twice a second once it serves"

    play(tmp_path, script, orchestrator)


def test_a_state_that_flaps_is_reported_at_most_four_times_a_second(tmp_path: Path) -> None:
    orchestrator = Orchestrator()

    async def script(world: World) -> None:
        world.serve()
        dice = random.Random(1)
        for _ in range(1000):
            world.dev.state = dice.choice([Phase.STARTING, Phase.INSTALLING])
            await asyncio.sleep(0.01)
        assert 20 <= len(orchestrator.at) <= 41

    play(tmp_path, script, orchestrator)


def test_while_the_orchestrator_is_away_it_backs_off_and_says_so_and_then_all_is_well(tmp_path: Path) -> None:
    away: list[httpx.Response | Exception] = [
        httpx.ConnectError("refused"),
        answer(502, {"not": "ours"}),
        problem(503, "busy"),
        problem(404, "path_unknown"),
        answer(200, {"revision": "no number"}),
        httpx.ReadTimeout("late"),
    ]
    orchestrator = Orchestrator([*away])

    async def script(world: World) -> None:
        await asyncio.sleep(0.05)
        assert world.kinds == {"session_api_unreachable"}
        world.serve()
        await asyncio.sleep(60)
        assert len(orchestrator.at) >= len(away) + 1, "tried again, sooner than at its pace"
        assert world.kinds == set()
        assert orchestrator.states[-1] == "serving"
        assert orchestrator.told[1]["problems"][0]["kind"] == "session_api_unreachable"

    play(tmp_path, script, orchestrator)
    gaps = [after - before for before, after in zip(orchestrator.at, orchestrator.at[1:], strict=False)]
    bounds = [0.25 * 2**number for number in range(len(away))]
    poll = 0.25 + 0.5
    assert all(gap <= bound + poll for gap, bound in zip(gaps, bounds, strict=False)), gaps


def test_a_change_does_not_hurry_an_orchestrator_that_asked_to_be_left_alone(tmp_path: Path) -> None:
    orchestrator = Orchestrator([problem(429, "too_many", **{"retry-after": "20"})])

    async def script(world: World) -> None:
        await asyncio.sleep(1)
        world.serve()
        await asyncio.sleep(18)
        assert len(orchestrator.at) == 1
        await asyncio.sleep(3)
        assert orchestrator.states == ["starting", "degraded", "serving"], "it says that it was refused"

    play(tmp_path, script, orchestrator)


def test_what_was_refused_for_its_size_is_not_sent_again(tmp_path: Path) -> None:
    """A proxy that reads 4 KB: each report is smaller than the one it refused, and after an hour the whole is tried."""
    orchestrator = Orchestrator()
    sizes: list[int] = []

    async def respond(request: httpx.Request) -> httpx.Response:
        told = await Orchestrator.respond(orchestrator, request)
        sizes.append(len(request.content))
        return problem(413, "too_large") if len(request.content) > 4096 else told

    orchestrator.respond = respond  # type: ignore[method-assign]

    async def script(world: World) -> None:
        world.serve()
        for n in range(100):
            world.agent.report.problems.add(
                Problem("drift", "something changed it " * 20, path=f"src/{n}.ts")
            )
        await asyncio.sleep(10 * EVERY)
        refused_sizes = [size for size in sizes if size > 4096]
        assert refused_sizes == sorted(refused_sizes, reverse=True)
        assert 1 <= len(refused_sizes) <= 4
        assert orchestrator.told[-1]["problems"], "what fits is told"
        await asyncio.sleep(150 * EVERY)
        assert len([size for size in sizes if size > 4096]) <= 2 * len(refused_sizes)

    play(tmp_path, script, orchestrator)


def test_a_body_that_is_too_large_is_sent_again_without_its_problems(tmp_path: Path) -> None:
    orchestrator = Orchestrator([answer(200, HEAD), problem(413, "too_large")])

    async def script(world: World) -> None:
        world.agent.report.problems.add(Problem("drift", "something changed it", path="src/a.ts"))
        await asyncio.sleep(1)
        world.serve()
        await asyncio.sleep(1)
        full, bare = orchestrator.told[1:]
        assert (len(full["problems"]), full["problems_left_out"]) == (1, 0)
        assert (bare["problems"], bare["problems_left_out"]) == ([], 1)
        assert full["state"] == bare["state"]
        assert world.kinds == {"drift"}, "the lease is kept: nothing is wrong with the orchestrator"
        await asyncio.sleep(0.7 * EVERY)
        assert len(orchestrator.at) == 3, "and it is no failure to back off from"

    play(tmp_path, script, orchestrator)


def test_a_refused_token_is_a_problem_and_is_tried_again_at_its_pace(tmp_path: Path) -> None:
    orchestrator = Orchestrator([problem(401, "token_expired"), problem(403, "token_revoked")])

    async def script(world: World) -> None:
        await asyncio.sleep(1)
        assert world.kinds == {"session_api_refused"}
        world.serve()
        await asyncio.sleep(EVERY - 2)
        assert len(orchestrator.at) == 1, "asking sooner cannot help"
        await asyncio.sleep(3)
        assert len(orchestrator.at) == 2
        assert orchestrator.told[1]["state"] == "degraded"
        await asyncio.sleep(EVERY)
        assert world.kinds == set()

    play(tmp_path, script, orchestrator)


@pytest.mark.parametrize(
    ("refusal", "error"),
    [(problem(410, "session_gone"), SessionGone), (problem(409, "superseded"), Superseded)],
)
def test_the_end_of_the_session_ends_the_agent(
    refusal: httpx.Response, error: type[AgentError], tmp_path: Path
) -> None:
    async def script(world: World) -> None:
        await asyncio.sleep(1000)

    with pytest.raises(error):
        play(tmp_path, script, Orchestrator([refusal]))


def test_told_to_stop_it_says_so_to_the_daemon(tmp_path: Path) -> None:
    orchestrator = Orchestrator([answer(200, HEAD), answer(200, {**HEAD, "action": "stop"})])

    async def script(world: World) -> None:
        await asyncio.sleep(1)
        assert not world.agent.stop.is_set()
        await asyncio.wait_for(world.agent.stop.wait(), 2 * EVERY)

    play(tmp_path, script, orchestrator)


def test_told_to_sync_or_of_a_newer_head_a_catch_up_is_wanted(tmp_path: Path) -> None:
    orchestrator = Orchestrator()

    async def script(world: World) -> None:
        sync = world.agent.sync
        await asyncio.sleep(1)
        assert not sync.pending
        orchestrator.answers = [answer(200, {**HEAD, "revision": 7})]
        world.serve()
        await asyncio.sleep(1)
        assert list(sync.pending) == [Reason.HEAD]
        assert sync.head_revision == 7

    play(tmp_path / "1", script, orchestrator)

    async def sync_now(world: World) -> None:
        await asyncio.sleep(1)
        assert list(world.agent.sync.pending) == [Reason.HEAD]

    play(tmp_path / "2", sync_now, Orchestrator([answer(200, {**HEAD, "action": "sync"})]))


def test_there_are_never_two_reports_at_once_however_slow_the_orchestrator_is(tmp_path: Path) -> None:
    orchestrator = Orchestrator(seconds=25.0)

    async def script(world: World) -> None:
        for number in range(200):
            world.agent.report.sync_status.phase = SyncPhase.FOLLOWING if number % 2 else SyncPhase.HYDRATING
            await asyncio.sleep(1)
        assert orchestrator.most_open == 1
        assert len(orchestrator.at) >= 7

    play(tmp_path, script, orchestrator)


def test_without_a_session_api_nothing_is_sent(tmp_path: Path) -> None:
    orchestrator = Orchestrator()

    async def script(world: World) -> None:
        world.serve()
        await asyncio.sleep(3 * EVERY)
        assert orchestrator.at == []
        started = world.agent.report.problems.metrics.registry.get_sample_value(
            "preview_agent_session_start_seconds"
        )
        assert started is not None
        assert started > 0

    play(tmp_path, script, orchestrator, SESSION_API_URL="")


def test_what_is_on_the_disk_is_told_at_once_at_most_four_times_a_second_and_the_last_word(
    tmp_path: Path,
) -> None:
    orchestrator = Orchestrator()

    async def script(world: World) -> None:
        world.serve()
        await asyncio.sleep(2)
        begun = len(orchestrator.at)
        orchestrator.answers = [answer(200, {**HEAD, "revision": 9, "action": "sync"})]
        clock = asyncio.get_running_loop().time
        now = clock()
        world.agent.screen.commit(1, {})
        await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert len(orchestrator.at) == begun + 1
        assert orchestrator.at[-1] - now < 0.01, "at once"
        told = orchestrator.told[-1]
        assert (told["tree_hash"], told["shown"], told["observed"], told["errors"]) == (None, None, False, [])
        assert world.agent.sync.pending == (), "that the database is ahead by then is no news"
        for revision in range(2, 202):
            world.agent.screen.commit(revision, {})
            world.agent.follower.adopt(Tree(Cursor("an epoch", revision)))
            await asyncio.sleep(0.01)
        await asyncio.sleep(1.5)
        sent = len(orchestrator.at) - begun
        assert 6 <= sent <= 13, sent
        assert orchestrator.told[-1]["revision"] == 201, "the last word always"

    play(tmp_path, script, orchestrator)


def test_what_is_shown_is_told_at_once_however_fast_saves_come(tmp_path: Path) -> None:
    orchestrator = Orchestrator()

    async def script(world: World) -> None:
        world.serve()
        screen = world.agent.screen
        clock = asyncio.get_running_loop().time
        await asyncio.sleep(2)

        async def reports(revision: int, **other: object) -> int:
            """How many go out in the next 50 ms, once the plugin has said this."""
            before = len(orchestrator.at)
            said = {"checked": revision, "shown": None, "errors": [], **other}
            screen._take(msgspec.convert(said, _Reported))
            await asyncio.sleep(0.05)
            return len(orchestrator.at) - before

        def page(revision: int) -> dict[str, object]:
            pages = {"visible": 1, "hidden": 0, "behind": 0}
            return {"revision": revision, "at": 0.0, "how": "update", "pages": pages, "blank": False}

        assert await reports(0, shown=page(0)) == 1
        await asyncio.sleep(1)
        waits = []
        for revision in range(1, 12):
            screen.commit(revision, {})
            await asyncio.sleep(0.05)
            assert await reports(revision, shown=page(revision - 1)) == 0, "checked, which no waiter asks"
            now = clock()
            assert await reports(revision, shown=page(revision)) == 1
            waits.append(orchestrator.at[-1] - now)
            await asyncio.sleep(0.3)
        assert max(waits) < 0.001, "a save is two reports at most, and that of what is shown waits for none"
        screen.commit(12, {})
        await asyncio.sleep(1)
        assert await reports(12) == 1
        screen.commit(13, {})
        await asyncio.sleep(1)
        assert await reports(13) == 1, "with no page open, what was checked is the answer"
        gaps = [after - before for before, after in zip(orchestrator.at, orchestrator.at[4:], strict=False)]
        assert min(gaps) >= 1.0 - 1e-6

    play(tmp_path, script, orchestrator)
