"""The health server over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import cast
from uuid import UUID

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from agent.config import Settings
from agent.core.errors import SettingsError
from agent.health import server as health
from agent.health.report import Report
from agent.telemetry.errors import Errors
from agent.telemetry.metrics import Metrics


@dataclass
class Agent:
    """What the server reads."""

    is_ready: bool = False
    port: int = 0
    errors: Errors = field(default_factory=lambda: Errors(Metrics()))
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def status(self) -> dict[str, object]:
        return {"state": "serving", "at": UUID(int=7)}

    def ready(self) -> bool:
        return self.is_ready

    def why(self) -> str:
        return "the dev server is in backoff"


def settings(host: str = "127.0.0.1", port: int = 0) -> Settings:
    return Settings(project_id=UUID(int=1), session_id=UUID(int=1), health_host=host, health_port=port)


@contextlib.asynccontextmanager
async def served(agent: Agent, host: str = "127.0.0.1") -> AsyncIterator[httpx.AsyncClient]:
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    server = asyncio.create_task(
        health.serve(settings(host), cast("Report", agent), agent.registry, on_bound=bound.set_result)
    )
    agent.port = await bound
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{agent.port}") as http:
            yield http
    finally:
        server.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await server


async def test_ready_and_alive_are_told_apart() -> None:
    agent = Agent()
    async with served(agent) as http:
        answer = await http.get("/readyz")
        assert (answer.status_code, answer.text) == (503, "not ready: the dev server is in backoff\n")
        assert (await http.get("/livez")).status_code == 200
        agent.is_ready = True
        assert (await http.get("/readyz?x=1")).status_code == 200
        assert (await http.get("/livez")).text == "alive\n"


async def test_status_is_json_and_metrics_are_in_both_forms() -> None:
    agent = Agent()
    Counter("preview_agent_things", "Things.", registry=agent.registry).inc(3)
    async with served(agent) as http:
        assert (await http.get("/status")).json() == {"state": "serving", "at": str(UUID(int=7))}
        plain = await http.get("/metrics")
        assert plain.headers["content-type"].startswith("text/plain")
        assert "preview_agent_things_total 3.0" in plain.text
        modern = await http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert modern.headers["content-type"].startswith("application/openmetrics-text")
        assert modern.text.endswith("# EOF\n")
        head = await http.head("/status")
        assert (head.status_code, head.content) == (200, b"")


async def test_what_it_does_not_do() -> None:
    async with served(Agent()) as http:
        assert (await http.get("/")).status_code == 404
        refused = await http.post("/status", content=b"x")
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("sent", "start"),
    [
        (b"nonsense\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /livez SPDY/3\r\n\r\n", b"HTTP/1.1 400 "),
        (b"\x16\x03\x01\x02\x00\r\n\r\n", b"HTTP/1.1 400 "),
        (b"GET /livez HTTP/1.1\r\nX: " + b"y" * 70_000, b""),
        (b"", b""),
    ],
)
async def test_nonsense_is_answered_or_dropped_and_harms_nobody(sent: bytes, start: bytes) -> None:
    agent = Agent()
    async with served(agent) as http, asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", agent.port)
        writer.write(sent)
        if not sent:
            writer.write_eof()
        with contextlib.suppress(ConnectionError):
            assert (await reader.read()).startswith(start)
        writer.close()
        assert (await http.get("/livez")).status_code == 200


async def test_many_silent_connections_do_not_keep_a_prober_out_for_long() -> None:
    """Not even for once: the oldest of them makes room."""
    agent = Agent()
    async with served(agent) as http:
        silent = [
            await asyncio.open_connection("127.0.0.1", agent.port) for _ in range(health.MOST_AT_ONCE + 5)
        ]
        assert [(await http.get("/livez")).status_code for _ in range(10)] == [200] * 10
        for _, writer in silent:
            writer.close()


async def test_a_prober_that_is_slow_to_ask_is_answered_though_hundreds_came_after_it() -> None:
    """On a busy machine it is connected, and others have the processor before it can ask."""
    agent = Agent()
    async with served(agent):
        reader, writer = await asyncio.open_connection("127.0.0.1", agent.port)
        silent = [await asyncio.open_connection("127.0.0.1", agent.port) for _ in range(450)]
        writer.write(b"GET /livez HTTP/1.1\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        for _, each in [(reader, writer), *silent]:
            each.close()


async def test_a_prober_in_a_crowd_that_begins_to_ask_at_once_is_answered() -> None:
    """All of it was there before the loop had a turn; the others never finish their question."""
    agent = Agent()
    async with served(agent):
        crowd = []
        for number in range(800):
            each = socket.create_connection(("127.0.0.1", agent.port))
            each.sendall(b"GET /livez HTTP/1.1\r\n\r\n" if number == 400 else b"G")
            crowd.append(each)
        reader, writer = await asyncio.open_connection(sock=crowd[400])
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        for each in crowd:
            each.close()


async def test_it_listens_on_both_families() -> None:
    agent = Agent()
    async with served(agent, "::") as http:
        assert (await http.get("/livez")).status_code == 200
        if health.net.listening_host("::") == "::":
            async with httpx.AsyncClient() as other:
                assert (await other.get(f"http://[::1]:{agent.port}/livez")).status_code == 200


async def test_a_port_that_is_taken_is_one_clear_line() -> None:
    agent = Agent()
    async with served(agent):
        with pytest.raises(
            SettingsError, match=rf"HEALTH_PORT: cannot listen on 127.0.0.1 port {agent.port}: "
        ):
            await health.serve(settings(port=agent.port), cast("Report", agent), CollectorRegistry())


async def test_whatever_a_project_says_the_status_is_json() -> None:
    """A byte that is not UTF-8 in the dev script, a number that no JSON reader of ours takes."""
    agent = Agent()
    odd = {"argv": ["vite", "--x=\udce9", "\ud800"], "many": 2**70, ("a", 1): {"deep": ("\udcff",)}}
    agent.status = lambda: {"dev_server": odd}  # type: ignore[method-assign]
    async with served(agent) as http:
        said = (await http.get("/status")).json()["dev_server"]
    assert said["argv"] == ["vite", "--x=\\udce9", "\\ud800"]
    assert said["many"] == str(2**70)


async def test_a_bug_in_a_report_is_an_answer_and_counted() -> None:
    agent = Agent()

    def fails() -> dict[str, object]:
        raise KeyError("a bug")

    agent.status = fails  # type: ignore[method-assign]
    async with served(agent) as http:
        assert (await http.get("/status")).status_code == 500
        assert (await http.get("/livez")).status_code == 200
    assert agent.errors.counts == {"health": 1}


async def test_asking_all_the_time_takes_a_twentieth_of_the_loop() -> None:
    now, made = 0.0, 0
    recent = health.Recent(lambda: now)

    def make() -> bytes:
        nonlocal now, made
        now, made = now + 0.01, made + 1
        return b"%d" % made

    seen = set()
    while now < 10:
        seen.add(recent.body("a", make))
        now += 0.001
    assert made == len(seen)
    assert 0.03 < made * 0.01 / now < 1 / health.REST
    assert recent.body("b", make) == b"%d" % made, "each kind has its own"


async def test_status_is_made_once_for_many_who_ask_together() -> None:
    asked = 0

    class Slow(Agent):
        def status(self) -> dict[str, object]:
            nonlocal asked
            asked += 1
            until = time.thread_time() + 0.05
            while time.thread_time() < until:
                pass
            return {"asked": asked}

    async with served(Slow()) as http:
        answers = await asyncio.gather(*(http.get("/status") for _ in range(10)))
    assert {answer.json()["asked"] for answer in answers} == {1}
