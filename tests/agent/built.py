"""An agent as `daemon.build` makes it, for tests: its channel and dev server are played, its HTTP has a handler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httpx
import orjson

from agent.config import Settings, read_environment
from agent.core.model import Problem
from agent.daemon import Agent, build
from agent.devserver.state import Phase
from agent.devserver.supervisor import Supervisor
from agent.link.types import LinkState
from agent.replay.harness import ScenarioSource
from tests.agent.test_config import GOOD

Handler = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]


def settings(directory: Path, **environ: str) -> Settings:
    """Settings of an agent that keeps all it has in `directory`."""
    places = {
        "PROJECT_DIR": str(directory / "project"),
        "STATE_DIR": str(directory / "state"),
        "HEALTH_PORT": "0",
        "HEALTH_HOST": "127.0.0.1",
    }
    given = {**GOOD, **places, **environ}
    return read_environment({name: value for name, value in given.items() if value})


async def nobody(request: httpx.Request) -> httpx.Response:
    """Fail: whoever calls this is not asked anything."""
    raise AssertionError(f"{request.method} {request.url} was asked")


@asynccontextmanager
async def built(given: Settings, respond: Handler = nobody) -> AsyncIterator[Agent]:
    """Build an agent whose requests `respond` answers, and close it at the end."""
    transport = httpx.MockTransport(respond)
    async with httpx.AsyncClient(transport=transport, trust_env=False) as http:
        agent = build(given, environ={}, http=http, source=ScenarioSource())
        try:
            yield agent
        finally:
            agent.close()


@dataclass
class DevServer:
    """What the report reads of a dev server, to be set by a test."""

    state: Phase = Phase.ABSENT
    found: tuple[Problem, ...] = ()

    @property
    def ready(self) -> bool:
        return self.state is Phase.READY

    def problems(self) -> tuple[Problem, ...]:
        return self.found

    def report(self) -> dict[str, object]:
        return {"state": self.state.value}


def dev_server_of(agent: Agent, state: Phase = Phase.ABSENT) -> DevServer:
    """Put a played dev server in the place of the agent's own."""
    dev = DevServer(state)
    agent.report.dev = cast("Supervisor", dev)
    return dev


def source_of(agent: Agent) -> ScenarioSource:
    """The channel of an agent that `built` made."""
    assert isinstance(agent.source, ScenarioSource)
    assert agent.source.state is LinkState.LIVE
    return agent.source


def answer(status: int, body: dict[str, object], **headers: str) -> httpx.Response:
    """An answer of the orchestrator's, its body not read yet."""
    media = "application/json" if status < 400 else "application/problem+json"
    stream = httpx.ByteStream(orjson.dumps(body))
    return httpx.Response(status, headers={"content-type": media, **headers}, stream=stream)


def problem(status: int, kind: str, **headers: str) -> httpx.Response:
    """A problem document of the orchestrator's."""
    return answer(
        status, {"type": f"urn:preview-sync:problem:{kind}", "title": kind, "status": status}, **headers
    )
