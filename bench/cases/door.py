"""Measures the door: a page's modules and a hot update's way through it, what an open socket takes, how soon one wakes.

- *230 modules*: a page of Chromium that loads a React app through the door of `dev`, against the same page from the
  same Vite directly, each with an empty cache; navigation to the end of `load`.
- *Round trip*: a hundred bytes on a socket after its 101, to a server that sends them back, against the same without
  the door; door and server are processes of their own.
- *2,000 sockets*: what the door's resident memory grew by when they were open.
- *Wake*: a frozen session of the local driver is asked to wake; until its address answers with what was saved while it
  slept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import httpx
import psycopg
import structlog

from bench.cases.idle import _processor_seconds as processor_seconds
from bench.cases.idle import _resident as resident
from bench.cases.start import free_port
from bench.harness.many_components import app
from bench.harness.results import Row, Unmeasurable, in_turn, ratio_of
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.machines.local import LocalMachines
from orchestrator_stub.platform.migrations import bootstrap, migrate
from tests.browser.conftest import Browser, missing
from tests.browser.served import small_project
from tests.orchestrator.door.test_process import door_environ
from tests.system.plane import Plane, Project, eventually, running_plane
from tests.system.stack import Stack
from tests.system.test_sleep import SERVER

MODULES_AT_MOST = 1.25
"""Of the time that the same page takes directly."""
ADDED_AT_MOST_MS = 2.0
"""That the door adds to a round trip of a hot update."""
SOCKETS = 2_000
SOCKET_AT_MOST_KB = 60.0
WAKE_AT_MOST = 1.0
"""Seconds from the wake to the page of now."""
PROJECTS = 8
"""The sockets' previews: one takes 500 exchanges at most."""
LOADED = """new Promise((resolve) => {
  const look = () => {
    const [entry] = performance.getEntriesByType('navigation')
    const there = document.querySelectorAll('[data-v]').length >= 150
    if (entry.loadEventEnd && there) resolve([entry.loadEventEnd, performance.getEntriesByType('resource').length])
    else setTimeout(look, 5)
  }
  look()
})"""


def run(quick: bool) -> Sequence[Row]:
    """Modules, round trips, sockets, a wake. Raises `Unmeasurable` without Chromium."""
    if (why := missing()) is not None:
        raise Unmeasurable(why)
    with tempfile.TemporaryDirectory(prefix="bench-door-") as name, asyncio.Runner() as runner:
        place = Path(name)
        rows = [_modules(place, 5 if quick else 15)]
        server = EmbeddedPostgres(place / "postgres")
        dsn = runner.run(server.start())
        try:
            runner.run(_prepare(dsn))
            rows += _sockets(dsn, 5 if quick else 15)
            rows.append(runner.run(_wakes(dsn, place, 3 if quick else 9)))
        finally:
            runner.run(server.stop())
        return rows


async def _prepare(dsn: str) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    await bootstrap(dsn)
    await migrate(dsn)


# --- a page


def _modules(place: Path, rounds: int) -> Row:
    with contextlib.ExitStack() as ending:
        stack = Stack(
            small_project(place / "app", dict(app(False, 40))), place / "state", options=("--no-watch",)
        )
        ending.callback(stack.kill)
        stack.start()
        browser = Browser()
        ending.callback(browser.close)
        info = stack.info
        session = httpx.get(
            f"{info['orchestrator_url']}/v1/sessions/{info['session_id']}",
            headers={"authorization": f"Bearer {info['service_key']}"},
        ).json()
        counts = []

        def load(url: str) -> float:
            browser.do("open", url=url)
            seconds, modules = browser.run(LOADED)
            browser.do("close")
            counts.append(modules)
            return float(seconds)

        taken = in_turn(
            {"door": lambda: load(info["preview_url"]), "directly": lambda: load(session["preview_url"])},
            rounds,
            warm_up=2,
        )
    return Row(
        "door: a page of 230 modules", median(taken["door"]), "ms", "directly", median(taken["directly"]),
        ratio_of(taken["door"], taken["directly"]), at_most=MODULES_AT_MOST, samples=rounds,
        note=f"{median(counts):.0f} requests, Chromium, an empty cache",
    )  # fmt: skip


# --- sockets


def _echo(told: Connection) -> None:
    """Answer a request for an upgrade, then send back whatever comes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=1024)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


@contextlib.contextmanager
def _echoing() -> Iterator[int]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_echo, args=(theirs,), daemon=True)
    process.start()
    try:
        yield ours.recv()
    finally:
        process.kill()
        process.join()


@contextlib.contextmanager
def _door(dsn: str) -> Iterator[tuple[int, int]]:
    """A door of its own; its pid and port."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator_stub", "door"], stderr=subprocess.DEVNULL,
        env={**os.environ, **door_environ(dsn, port)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the door does not open")
            time.sleep(0.05)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait()


def _previews(dsn: str, port: int) -> list[str]:
    """The hosts of public projects whose dev server is at `port`."""
    hosts = []
    with psycopg.connect(dsn, autocommit=True) as connection:
        for _ in range(PROJECTS):
            [(user,)] = connection.execute(
                "insert into auth.users (id) values (gen_random_uuid()) returning id"
            )
            connection.execute(
                "insert into public.user_profiles (id) values (%s) on conflict do nothing", (user,)
            )
            [(project,)] = connection.execute(
                "insert into public.projects (owner_id) values (%s) returning id", (user,)
            )
            connection.execute(
                "insert into preview.sessions (project_id, state, expires_at, preview_url, run)"
                " select %s, 'ready', now() + interval '1 hour', %s,"
                ' \'{"plain": {"public": true}, "sealed": {}}\' where preview.give_head(%s)',
                (project, f"http://127.0.0.1:{port}", project),
            )
            [(label,)] = connection.execute("select preview.door_label(%s)", (project,))
            hosts.append(f"{label}.preview.test")
    return hosts


def _upgraded(port: int, host: str) -> socket.socket:
    """An open socket after its 101."""
    sock = socket.create_connection(("127.0.0.1", port), timeout=20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
    sock.sendall(
        f"GET /ws HTTP/1.1\r\nHost: {host}\r\nOrigin: https://{host}\r\nConnection: Upgrade\r\n"
        f"Upgrade: websocket\r\n{key}\r\n".encode()
    )
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        more = sock.recv(4096)
        if not more:
            raise RuntimeError(f"no upgrade: {head!r}")
        head += more
    if b" 101 " not in head:
        raise RuntimeError(f"no upgrade: {head!r}")
    return sock


def _round_trip(sock: socket.socket) -> float:
    """Milliseconds of one round trip, the median of a hundred."""
    taken = []
    for _ in range(100):
        began = time.perf_counter()
        sock.sendall(b"x" * 100)
        rest = 100
        while rest:
            rest -= len(sock.recv(rest))
        taken.append((time.perf_counter() - began) * 1e3)
    return median(taken)


def _sockets(dsn: str, rounds: int) -> list[Row]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * SOCKETS + 1000
    if hard < wanted:
        raise Unmeasurable(f"needs {wanted} descriptors; this machine allows {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    try:
        with _echoing() as echo, _door(dsn) as (pid, port), contextlib.ExitStack() as ending:
            hosts = _previews(dsn, echo)
            ours, theirs = _upgraded(port, hosts[0]), _upgraded(echo, hosts[0])
            ending.callback(ours.close)
            ending.callback(theirs.close)
            trips = {"door": lambda: _round_trip(ours), "directly": lambda: _round_trip(theirs)}
            taken = in_turn(trips, rounds)
            for host in hosts:  # what the first of each take stays
                _upgraded(port, host).close()
            before = resident(pid)
            for number in range(SOCKETS):
                ending.callback(_upgraded(port, hosts[number % PROJECTS]).close)
            time.sleep(2)
            grown = (resident(pid) - before) * 1e3 / SOCKETS
            began = processor_seconds(pid)
            time.sleep(5)
            share = (processor_seconds(pid) - began) / 5
            held = in_turn(trips, rounds)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    added, then = (
        median(a - b for a, b in zip(each["door"], each["directly"], strict=True)) for each in (taken, held)
    )
    return [
        Row(
            "door: round trip of a hot update, added", added, "ms", at_most=ADDED_AT_MOST_MS, samples=rounds,
            note=f"{median(taken['door']):.2f} ms, directly {median(taken['directly']):.2f}; "
            f"with {SOCKETS:,} sockets open {then:.2f} added",
        ),
        Row(
            "door: an open socket", grown, "KB", sense="memory", at_most=SOCKET_AT_MOST_KB, samples=SOCKETS,
            note=f"{SOCKETS:,} open, idle {share:.1%} of a core",
        ),
    ]  # fmt: skip


# --- a wake


async def _wakes(dsn: str, place: Path, rounds: int) -> Row:
    driver = LocalMachines(place / "machines", environment=os.environ)
    async with (
        running_plane(dsn, place / "plane", machines=driver, sweep_seconds=0.2) as plane,
        httpx.AsyncClient(trust_env=False, timeout=5) as browser,
        _session(plane, driver) as (project, path),
    ):
        taken = [
            await _wake(plane, browser, project, path, f"<p>round {number}</p>") for number in range(rounds)
        ]
    return Row(
        "door: wake to the page of now", median(taken), "s", at_most=WAKE_AT_MOST, samples=rounds,
        note=f"local driver, frozen processes; the slowest {max(taken):.2f}",
    )  # fmt: skip


@contextlib.asynccontextmanager
async def _session(plane: Plane, driver: LocalMachines) -> AsyncIterator[tuple[Project, str]]:
    """A project whose page is `index.html`, and the path of its session, which is ready."""
    sweeping = asyncio.create_task(plane.controller.run())
    try:
        project = await plane.project({"index.html": "<p>before</p>", "server.py": SERVER})
        run = {"dev_command": f"{sys.executable} server.py"}
        made = await plane.http.post("/v1/sessions", json={"project_id": str(project.id), "run": run})
        made.raise_for_status()
        path = f"/v1/sessions/{made.json()['session_id']}"
        await eventually("the session is ready", partial(_address, plane, path), 60)
        yield project, path
        await plane.http.delete(path)
    finally:
        sweeping.cancel()
        await asyncio.gather(sweeping, return_exceptions=True)
        for machine in await driver.list():
            await driver.destroy(machine.id)


async def _address(plane: Plane, path: str) -> str | None:
    """Where the preview is, once the session is ready."""
    form = (await plane.http.get(path)).json()
    return str(form["preview_url"]) if form["state"] == "ready" else None


async def _wake(plane: Plane, browser: httpx.AsyncClient, project: Project, path: str, page: str) -> float:
    """Seconds from the wake until the page is the one that was saved while the session slept."""
    (await plane.http.post(f"{path}/suspend")).raise_for_status()
    await project.save("index.html", page)
    began = time.monotonic()
    (await plane.http.post(f"{path}/wake")).raise_for_status()
    address = await eventually("it is ready again", partial(_address, plane, path), 60)
    if page not in (await browser.get(address)).text:
        raise RuntimeError("ready, and the page is another")
    return time.monotonic() - began
