"""A bug is contained, counted and told; a task that it ends is started again; and every task has somebody who looks."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path

import pytest
import structlog

from agent.core.errors import AgentError, SessionGone, Superseded
from agent.replay.simulated_clock import simulate
from agent.telemetry.errors import STEADY_AFTER, Errors
from agent.telemetry.metrics import Metrics

AGENT = Path(__file__).parents[3] / "agent"


@pytest.fixture
def errors() -> Errors:
    return Errors(Metrics())


def test_a_bug_is_logged_with_its_traceback_and_counted(errors: Errors) -> None:
    then: list[str] = []
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            with errors.contained("event", lambda: then.append("asked"), event_type="file:update"):
                raise KeyError("a bug")
    assert [line["event_type"] for line in lines] == ["file:update"] * 2
    assert all(isinstance(line["exc_info"], KeyError) and line["exc_info"].__traceback__ for line in lines)
    assert then == ["asked"] * 2
    assert errors.report() == {"event": {"count": 2, "latest": "KeyError: 'a bug'"}}


def test_what_is_raised_on_purpose_and_a_cancellation_pass(errors: Errors) -> None:
    for meant in (AgentError("x"), asyncio.CancelledError(), KeyboardInterrupt()):
        with pytest.raises(type(meant)), errors.contained("event"):
            raise meant
    assert errors.counts == {}


def test_a_task_that_fails_is_started_again_later_each_time(errors: Errors) -> None:
    starts: list[float] = []

    async def fails() -> None:
        starts.append(asyncio.get_running_loop().time())
        raise RuntimeError("at every start")

    async def main() -> None:
        task = asyncio.create_task(errors.keep_running("link", fails))
        await asyncio.sleep(600)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    simulate(main())
    assert 20 < len(starts) < 200, "neither given up nor a loop"
    assert errors.counts == {"link": len(starts)}


def test_one_that_ran_well_in_between_begins_with_a_short_wait(errors: Errors) -> None:
    gaps: list[float] = []

    async def main() -> None:
        now = asyncio.get_running_loop().time
        ended = 0.0

        async def fails() -> None:
            nonlocal ended
            gaps.append(now() - ended)
            await asyncio.sleep(STEADY_AFTER + 1)
            ended = now()
            raise RuntimeError("now and then")

        task = asyncio.create_task(errors.keep_running("link", fails))
        await asyncio.sleep(30 * STEADY_AFTER)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    simulate(main())
    assert len(gaps) > 20
    assert max(gaps) <= 0.51


@pytest.mark.parametrize("meant", [SessionGone("over"), Superseded("another")])
def test_what_ends_a_task_on_purpose_ends_it_also_out_of_a_group(errors: Errors, meant: AgentError) -> None:
    async def alone() -> None:
        raise meant

    async def grouped() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(alone())
            tasks.create_task(asyncio.sleep(1000))

    for start in (alone, grouped):
        with pytest.raises(type(meant)):
            asyncio.run(errors.keep_running("heartbeat", start))
    assert errors.counts == {}


# --- every task has somebody who looks

MAKES = {
    "create_task",
    "ensure_future",
    "call_later",
    "call_soon",
    "call_at",
    "add_done_callback",
    "add_reader",
}

REVIEWED = {
    "daemon._until_stopped": "the root tasks, kept running or the loop itself; the wait for a stop",
    "devserver.forward._accept": "one visitor's connection: it is closed in any case",
    "devserver.probe.observe": "the inspection; its result is read, or it is cancelled with the probe",
    "devserver.install._fetch_bundle": "the bundle's arrival; a bug in it is a line of the log and no bundle",
    "devserver.process.__init__": "waits for the child; `wait` raises it",
    "devserver.supervisor._do_start": "the probe, contained",
    "devserver.supervisor._spawn": "contained; a bug is a failed install or an exit",
    "fs.notify.changed": "the watch's thread; awaited",
    "fs.turns.in_thread": "the thread with the disk; awaited, also when it is given up",
    "link.loop.run": "the link's own group, kept running as a whole",
    "link.nats._apart": "what the client does; awaited, and its result read",
    "link.realtime.run": "the connection's own group, kept running with the link",
    "modules.arrivals.begin": "the arrival; what goes wrong in it is its result, a bug too",
    "modules.arrivals._unpack": "the program that unpacks; awaited",
    "modules.arrivals.first": "the install beside a layer; awaited",
    "snapshot.download._hand_over": "the unpacking; the next batch raises it",
    "snapshot.unpack.reported": "the progress lines; gathered at the end",
    "sync.engine._ask": "the question; its result is read in the next turn",
    "sync.engine._finish_catch_up": "only wakes the loop",
    "sync.engine.run": "the loop itself, contained turn by turn; drift and obstacles are kept running",
    "sync.recording._wait": "the record, contained",
    "sync.shadow._turn": "the reading; awaited",
    "write_back.flow.start": "the give-back, kept running until its rules are gone",
    "write_back.flow._run": "the task's own group, kept running as a whole",
}
"""Where tasks and callbacks are made, and who looks at what ends them. A replay's and a command's end with it."""


def made() -> set[str]:
    found = set()
    for path in sorted(AGENT.rglob("*.py")):
        module = ".".join(path.relative_to(AGENT).with_suffix("").parts)
        if module.startswith(("replay.", "cli.")):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in ast.walk(function):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and call.func.attr in MAKES
                ):
                    found.add(f"{module}.{function.name}")
    return found


def test_every_place_that_makes_a_task_says_who_looks_at_its_end() -> None:
    assert made() - REVIEWED.keys() == set(), (
        "say in REVIEWED what a bug in it does; see agent.telemetry.errors"
    )
