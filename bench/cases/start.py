"""Measures starting and stopping: the agent until Vite's first page against Vite started by hand.

*First page* starts the same warm project two ways, and asks from outside every few milliseconds until `/` answers
200: Vite by hand, and the agent's supervisor once it is told that the tree is whole. Without a peer: *2,000 files*
says what the parts of a start take, and *stop* how long an agent takes after TERM while its dev server ignores TERM.
Agents run as a machine starts them, against a real database and orchestrator on loopback, in an environment like the
image's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from uuid import UUID

import structlog

from agent.config import Settings
from agent.devserver.install import Installer
from agent.devserver.sandbox import Rights
from agent.devserver.supervisor import Supervisor
from agent.project.reading import dependencies
from bench.cases.idle import REPOSITORY
from bench.harness.results import Row, Unmeasurable, ratio_of
from tests.image.engine import NoEngine
from tests.image.engine import find as find_engine
from tests.system.plane import Agent, Plane, eventually, running_plane

EXAMPLE = REPOSITORY / "examples" / "react-app"
LOOK = 0.004
"""Seconds between two looks of the one who waits from outside; the same for all contestants."""


def first_page(
    port: int, failed: Callable[[], bool], seconds: float = 60.0, host: str = "127.0.0.1"
) -> float:
    """The moment when `/` first answers 200, within so many seconds. Raises `RuntimeError` when it never will."""
    request = f"GET / HTTP/1.0\r\nHost: {host}:{port}\r\nAccept: text/html\r\n\r\n".encode()
    end = time.monotonic() + seconds
    while time.monotonic() < end and not failed():
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5) as asked:
            asked.sendall(request)
            if b" 200 " in asked.recv(64):
                return time.monotonic()
        time.sleep(LOOK)
    raise RuntimeError("no page")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def _by_hand(project: Path, environ: Mapping[str, str] | None = None) -> float:
    """Seconds from starting Vite in a shell's way to its first page, with more in its environment."""
    port = free_port()
    flags = ["--host", "127.0.0.1", "--port", str(port), "--strictPort"]
    began = time.monotonic()
    vite = subprocess.Popen(
        [project / "node_modules" / ".bin" / "vite", *flags], cwd=project, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True, env={**os.environ, **(environ or {})},
    )  # fmt: skip
    try:
        return first_page(port, lambda: vite.poll() is not None) - began
    finally:
        os.killpg(vite.pid, signal.SIGKILL)
        vite.wait()


async def _supervised(project: Path) -> float:
    """Seconds from "the tree is whole" to the first page."""
    settings = Settings(
        project_id=UUID(int=1),
        session_id=UUID(int=1),
        project_dir=project,
        dev_host="127.0.0.1",
        dev_port=free_port(),
    )
    supervisor = Supervisor(settings)
    running = asyncio.create_task(supervisor.run())
    await asyncio.sleep(0.05)  # its directory for installs is made before there is a tree
    began = time.monotonic()
    supervisor.project_ready()
    try:
        return await asyncio.to_thread(first_page, settings.dev_port, running.done) - began
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


def log_moments(log: str) -> list[tuple[str, float]]:
    """Name and time of the agent's own log lines."""
    found = []
    for line in log.splitlines():
        with contextlib.suppress(ValueError, KeyError):
            said = json.loads(line)
            name = said["event"] + (f":{said['state']}" if said["event"] == "dev_server.state" else "")
            found.append((name, datetime.fromisoformat(said["timestamp"]).timestamp()))
    return found


@contextlib.asynccontextmanager
async def plane(directory: Path, host: str = "127.0.0.1") -> AsyncIterator[Plane]:
    from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
    from orchestrator_stub.platform.migrations import bootstrap, migrate

    server = EmbeddedPostgres(directory / "pg", options={"fsync": "off"})
    dsn = await server.start()
    try:
        await bootstrap(dsn)
        await migrate(dsn)
        async with running_plane(dsn, directory / "plane", host=host) as plane:
            yield plane
    finally:
        await server.stop()


async def _install(project: Path) -> None:
    """Warm node_modules, and Vite's own cache of dependencies."""
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("node_modules", "dist"))
    settings = Settings(project_id=UUID(int=1), session_id=UUID(int=1), project_dir=project)
    installer = Installer(settings, environ=os.environ, rights=Rights(), on_line=lambda line: None)
    await installer.open()
    done = await installer.install(dependencies(project))
    if done.problem:
        raise Unmeasurable(f"the example cannot be installed: {done.problem.detail.splitlines()[0]}")


async def _first_pages(rounds: int, directory: Path) -> list[Row]:
    project = directory / "project"
    await _install(project)
    hand: list[float] = []
    supervised: list[float] = []
    for number in range(-1, rounds):
        taken = await asyncio.to_thread(_by_hand, project), await _supervised(project)
        if number >= 0:
            hand.append(taken[0])
            supervised.append(taken[1])
    return [
        Row(
            "tree whole to first page", median(supervised), "s", "vite by hand", median(hand),
            ratio_of(supervised, hand), at_most=1.25, samples=rounds, note="warm node_modules",
        ),
    ]  # fmt: skip


async def _hydrated(rounds: int, directory: Path, plane: Plane) -> list[Row]:
    """2,000 files of 2 KB, no dev server; every start on an empty machine."""
    source = "export const value = 'something to be written'\n" * 42
    project = await plane.project(
        {f"src/part{n // 50:02}/file{n:04}.ts": source + str(n) for n in range(2_000)}
    )
    names = ("process to wired", "download, verify, promote", "process to hydrated")
    parts: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        agent = await project.session(directory / f"machine-{number}", LOG_FORMAT="json")
        began = time.time()
        agent.start()
        try:
            await eventually("hydrated", partial(said, agent, '"hydrate.done"'), 60)
        finally:
            await agent.stop()
        moments = dict(reversed(log_moments(agent.log())))
        (done,) = (line for line in agent.log().splitlines() if '"hydrate.done"' in line)
        wired, hydrated = moments["agent.started"] - began, moments["hydrate.done"] - began
        for name, value in zip(names, (wired, json.loads(done)["seconds"], hydrated), strict=True):
            parts[name].append(value)
        shutil.rmtree(agent.directory)
    return [Row(f"2,000 files: {name}", median(each), "s", samples=rounds) for name, each in parts.items()]


async def _stops(rounds: int, directory: Path, plane: Plane) -> list[Row]:
    """TERM while a dev server that takes no notice of it is up: the worst case is the one with a bound."""
    manifest = json.dumps({"scripts": {"dev": "trap '' TERM; while :; do sleep 0.1; done"}})
    project = await plane.project({"package.json": manifest, "index.html": "<p>hello"})
    left = iter(range(rounds))
    taken: list[float] = []
    clean = 0

    async def one_after_the_other(agent: Agent) -> None:
        nonlocal clean
        for _ in left:
            agent.start()
            await eventually("the dev server is up", partial(_is, agent, "starting"))
            began = time.monotonic()
            code = await agent.stop()
            taken.append(time.monotonic() - began)
            clean += code == 0 and taken[-1] <= 4.0

    # Nearly all of a stop is waiting out the grace, and five agents that disturb one another make none shorter.
    agents = [await project.session(directory / f"stopped-{number}") for number in range(5)]
    await asyncio.gather(*(one_after_the_other(agent) for agent in agents))
    share = quantiles(taken, n=100, method="inclusive")[98]
    return [
        Row("stopped within the grace", clean / rounds, "share", at_least=1.0, samples=rounds),
        Row("stop of a dev server that ignores TERM, p99", share, "s", at_most=4.0, samples=rounds),
    ]


async def said(agent: Agent, text: str) -> bool:
    """Whether the agent's log has it. The loop also serves the agent: looking must cost nothing."""
    await asyncio.sleep(0.02)
    return text in agent.log()


async def _is(agent: Agent, state: str) -> bool:
    """Whether the dev server is in `state`."""
    status = await agent.status()
    return status is not None and status["dev_server"]["state"] == state


def _image() -> list[Row]:
    """The image's size, where there is an engine and somebody built it."""
    with contextlib.suppress(NoEngine, subprocess.CalledProcessError, ValueError):
        engine = find_engine()
        for tag in ("preview-agent", "localhost/preview-agent:test"):
            if engine.has(tag):
                size = int(engine.call("image", "inspect", "--format", "{{.Size}}", tag).stdout)
                return [
                    Row(
                        "image size",
                        size / 1e6,
                        "MB",
                        sense="size",
                        samples=1,
                        note="base, agent and the template's modules",
                    )
                ]
    return []


async def _measure(quick: bool) -> list[Row]:
    rounds = 5 if quick else 15
    with tempfile.TemporaryDirectory(prefix="preview-bench-") as name:
        directory = Path(name)
        async with plane(directory) as running:
            rows = await _first_pages(rounds, directory)
            rows += await _hydrated(3 if quick else 9, directory, running)
            rows += await _stops(5 if quick else 100, directory, running)
    return [*rows, *_image()]


def run(quick: bool) -> Sequence[Row]:
    """First page, hydrated, stop, and the image's size. Raises `Unmeasurable` without Node and npm."""
    if shutil.which("npm") is None:
        raise Unmeasurable("Node and npm are needed")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    return asyncio.run(_measure(quick))
