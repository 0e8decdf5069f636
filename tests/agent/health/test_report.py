"""The report: every state follows from the parts, problems of all parts are shown, and no secret is."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import orjson
import pytest
from prometheus_client import generate_latest

from agent.core.model import PROBLEM_OWNERS, Problem, ProblemKind
from agent.daemon import Agent
from agent.devserver.state import Phase
from agent.health.report import HARMLESS
from agent.link.types import LinkState
from agent.telemetry.status import LINK_PATIENCE, MAX_OF_KIND, AgentState, SyncPhase
from tests.agent.built import built, dev_server_of, settings, source_of
from tests.agent.test_config import GOOD, jwt

F, S = SyncPhase.FOLLOWING, AgentState


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    async with built(settings(tmp_path)) as agent:
        yield agent


@pytest.mark.parametrize(
    ("phase", "dev", "state", "ready"),
    [
        (SyncPhase.STARTING, Phase.ABSENT, S.STARTING, False),
        (SyncPhase.HYDRATING, Phase.ABSENT, S.HYDRATING, False),
        (SyncPhase.HYDRATING, Phase.READY, S.HYDRATING, False),
        (F, Phase.INSTALLING, S.INSTALLING, False),
        (F, Phase.STARTING, S.STARTING, False),
        (F, Phase.READY, S.SERVING, True),
        (F, Phase.ABSENT, S.SERVING, False),
        (F, Phase.FAILED, S.DEGRADED, False),
        (F, Phase.BACKOFF, S.DEGRADED, False),
        (F, Phase.STOPPING, S.STARTING, False),
        (SyncPhase.HALTED, Phase.READY, S.HALTED, True),
        (SyncPhase.HALTED, Phase.FAILED, S.HALTED, False),
    ],
)
def test_the_state_follows_from_the_tree_and_the_dev_server(
    phase: SyncPhase, dev: Phase, state: AgentState, ready: bool, agent: Agent
) -> None:
    dev_server_of(agent, dev)
    report = agent.report
    report.sync_status.phase = phase
    assert (report.state, report.ready()) == (state, ready)
    assert report.heartbeat()["state"] == report.status()["state"] == state.value
    assert report.heartbeat()["dev_server"] == dev.value
    assert report.why().startswith(f"{state.value}, dev server {dev.value}")
    report.draining = True
    assert (report.state, report.ready()) == (AgentState.DRAINING, False), "whatever it was"


def test_every_state_but_the_last_is_reached() -> None:
    """`stopped` is the orchestrator's word for a machine that is gone."""
    table = test_the_state_follows_from_the_tree_and_the_dev_server.pytestmark[0].args[1]  # type: ignore[attr-defined]
    assert {row[2] for row in table} | {S.DRAINING, S.STOPPED} == set(AgentState)


@pytest.mark.parametrize("link", [state for state in LinkState if state is not LinkState.LIVE])
def test_a_link_that_is_down_for_long_degrades_it_and_it_stays_ready(link: LinkState, agent: Agent) -> None:
    dev_server_of(agent, Phase.READY)
    agent.report.sync_status.phase = F
    source = source_of(agent)
    source.since = time.time() - 10 * LINK_PATIENCE
    assert agent.report.state == S.SERVING, "live for long is good"
    source.state, source.since = link, time.time()
    assert agent.report.state == S.SERVING, "most reconnects are over by then"
    source.since = time.time() - LINK_PATIENCE - 1
    assert agent.report.state == S.DEGRADED
    assert agent.report.ready(), "what is shown is still shown"


@pytest.mark.parametrize("kind", ["drift", "disk_full", "shadow_difference", "token_refused", "path_refused"])
def test_a_problem_degrades_it_unless_it_is_harmless(kind: ProblemKind, agent: Agent) -> None:
    dev_server_of(agent, Phase.READY)
    agent.report.sync_status.phase = F
    agent.report.problems.add(Problem(kind, "why", path="a"))
    assert agent.report.state is (S.SERVING if kind in HARMLESS else S.DEGRADED)
    assert agent.report.why().endswith(f"; {kind}")
    agent.report.problems.owned_by(PROBLEM_OWNERS[kind]).clear(kind, paths=["a"])
    assert agent.report.state == S.SERVING


def test_the_problems_of_all_parts_are_shown_the_harmful_first(agent: Agent) -> None:
    class Source(type(source_of(agent))):  # type: ignore[misc]
        def problems(self) -> tuple[Problem, ...]:
            return (Problem("token_refused", "expired"),)

    report = agent.report
    report.link = Source()
    dev = dev_server_of(agent, Phase.FAILED)
    dev.found = (Problem("dev_server_failed", "a plugin is broken", rule="exited"),)
    for name in ("a", "b"):
        report.problems.add(Problem("drift", "changed by something else", path=name))
    kinds = [each["kind"] for each in report.heartbeat()["problems"]]  # type: ignore[attr-defined]
    assert kinds == ["token_refused", "dev_server_failed", "drift", "drift"]
    shown = report.status()["problems"]
    assert isinstance(shown, list)
    assert sorted(each["kind"] for each in shown) == sorted(kinds)
    expected = {
        "kind": "dev_server_failed",
        "rule": "exited",
        "file_path": None,
        "detail": "a plugin is broken",
    }
    assert expected in shown
    assert report.heartbeat(0)["problems_left_out"] == 4
    text = generate_latest(report.problems.metrics.registry).decode()
    assert 'preview_agent_problems{kind="drift"} 2.0' in text
    assert 'preview_agent_problems{kind="token_refused"} 1.0' in text


def test_no_secret_is_in_anything_that_is_reported(agent: Agent) -> None:
    """Also one that was minted after the start, which nothing knows by value."""
    later = jwt(role="preview_agent", exp=4_000_000_001)
    secrets = [GOOD["REALTIME_TOKEN"], later, "canary"]
    report = agent.report
    for number, secret in enumerate((GOOD["SNAPSHOT_URL"], GOOD["REALTIME_TOKEN"], later)):
        report.problems.add(
            Problem("io_error", f"refused: {secret}!", path=f"{number}/{secret}", rule=secret)
        )
    dev = dev_server_of(agent, Phase.FAILED)
    dev.found = (Problem("dev_server_failed", f"env: {GOOD['REALTIME_TOKEN']}"),)
    metrics = generate_latest(report.problems.metrics.registry)
    for said in (orjson.dumps(report.status(), default=str), orjson.dumps(report.heartbeat()), metrics):
        assert not [secret for secret in secrets if secret.encode() in said]
    assert b"refused: " in orjson.dumps(report.heartbeat()), "the rest is said"
    assert report.why().isprintable()


def test_the_metrics_name_no_project_no_session_and_no_path(agent: Agent) -> None:
    agent.report.problems.add(Problem("drift", "why", path="src/secret-plan.ts"))
    text = generate_latest(agent.report.problems.metrics.registry).decode()
    for name in (GOOD["PROJECT_ID"], GOOD["SESSION_ID"], "secret-plan"):
        assert name not in text
    states = re.findall(r'^preview_agent_link_state\{state="(\w+)"\} (\S+)$', text, re.MULTILINE)
    assert dict(states) == {each.value: "1.0" if each is LinkState.LIVE else "0.0" for each in LinkState}
    assert "preview_agent_clock_skew_seconds" not in text, "absent until the orchestrator has answered"


def test_many_problems_of_one_kind_hide_no_other(agent: Agent) -> None:
    """Two hundred drifts filled the table, and a refused token had no place in it."""
    report = agent.report
    for n in range(3 * MAX_OF_KIND):
        report.problems.add(Problem("drift", "why", path=f"f{n}"))
    report.problems.add(Problem("undo_failed", "why", path="a"))
    assert Counter(problem.kind for problem in report.all_problems()) == {
        "drift": MAX_OF_KIND, "undo_failed": 1,
    }  # fmt: skip
    assert report.status()["problems_not_kept"] == {"drift": 2 * MAX_OF_KIND}
    assert "undo_failed" in [problem["kind"] for problem in report.heartbeat()["problems"]]  # type: ignore[index, attr-defined]


def test_a_problem_that_is_tried_again_says_so(agent: Agent) -> None:
    agent.report.problems.add(Problem("path_unusable", "why", path="a", waiting=True))
    agent.report.problems.add(Problem("drift", "why", path="b"))
    waiting, drift = agent.report.status()["problems"]  # type: ignore[misc]
    assert (waiting["waiting"], "waiting" in drift) == (True, False)
    assert agent.report.heartbeat()["problems"][0]["waiting"] is True  # type: ignore[index]
