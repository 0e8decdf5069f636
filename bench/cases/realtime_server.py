"""Measures the local Realtime server's fan-out against the two usual ways of writing one in Python.

    starlette     one `await websocket.send_text` per socket, uvicorn with `websockets`
    websockets    `websockets.broadcast`, the library's own fan-out

The servers stand on one core, the readers on another. Every reader joins one topic; then a burst of 1 KB broadcasts is
published, until the last reader has the last one. The ratio is of the server's processor time, user and system, which
does not depend on what else the machine does; the wall clock stands in the note. Ours gets the broadcasts from
PostgreSQL (`realtime.send` in one statement), with topics, tokens and channels in between; the peers only copy bytes.

Memory is the server process's growth per connection, without the kernel's socket buffers.
"""

from __future__ import annotations

import asyncio
import base64
import json
import multiprocessing
import os
import resource
import selectors
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
import uvicorn
import websockets.asyncio.server as ws
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from bench.harness.results import Row, Unmeasurable, in_turn, ratio_of
from orchestrator_stub.local_supabase.app import stand_in
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.postgres import EmbeddedPostgres
from orchestrator_stub.local_supabase.realtime.limits import Limits
from orchestrator_stub.local_supabase.realtime.socket import uvicorn_options
from orchestrator_stub.platform.migrations import bootstrap
from orchestrator_stub.platform.tokens import Keyring

PAYLOAD = "x" * 1000
KEYS = ProjectKeys.of(Keyring.from_secret("a secret for benchmarks only, nobody's"))
PATH = f"/realtime/v1/websocket?apikey={KEYS.anon_key}&vsn=2.0.0"
CONNECTIONS = 2_000
WANTED = 30_000
"""Deliveries per second (issue: the live link)."""


# --- the servers, each in a process of its own on one core


def serve_ours(pipe: Connection, dsn: str, core: int) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as storage:
            # The readers never speak again; the real limit would close them after a minute.
            limits = Limits(connections=None, joins_per_second=None, idle_seconds=3600)
            local = stand_in(dsn, KEYS, Path(storage), limits=limits)
            app = Starlette(routes=local.routes, lifespan=local.lifespan)
            await _serve(pipe, app, uvicorn_options(), None)

    _alone(core, run)


def serve_starlette(pipe: Connection, dsn: str, core: int) -> None:
    sockets: set[WebSocket] = set()

    async def endpoint(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.receive_text()
        await websocket.send_text("joined")
        sockets.add(websocket)
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            sockets.discard(websocket)

    async def publish(count: int) -> None:
        text = json.dumps(["", "", "realtime:bench", "broadcast", {"payload": PAYLOAD}])
        for _ in range(count):
            for websocket in sockets:
                await websocket.send_text(text)

    async def run() -> None:
        app = Starlette(routes=[WebSocketRoute("/{rest:path}", endpoint)])
        options = {"ws": "websockets-sansio", "ws_per_message_deflate": False, "ws_ping_interval": None}
        await _serve(pipe, app, options, publish)

    _alone(core, run)


def serve_websockets(pipe: Connection, dsn: str, core: int) -> None:
    sockets: set[ws.ServerConnection] = set()

    async def handler(connection: ws.ServerConnection) -> None:
        await connection.recv()
        await connection.send("joined")
        sockets.add(connection)
        await connection.wait_closed()
        sockets.discard(connection)

    async def run() -> None:
        async with ws.serve(
            handler, "127.0.0.1", 0, compression=None, ping_interval=None, backlog=4096
        ) as server:
            pipe.send(next(iter(server.sockets)).getsockname()[1])
            text = json.dumps(["", "", "realtime:bench", "broadcast", {"payload": PAYLOAD}])
            while count := await asyncio.to_thread(pipe.recv):
                for _ in range(count):
                    ws.broadcast(sockets, text)
                    await asyncio.sleep(0)

    _alone(core, run)


async def _serve(
    pipe: Connection, app: Starlette, options: dict[str, Any], publish: Callable[[int], Any] | None
) -> None:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, **options))
    serving = asyncio.create_task(server.serve([listener]))
    while not server.started:
        if serving.done():
            await serving
        await asyncio.sleep(0.01)
    pipe.send(listener.getsockname()[1])
    while count := await asyncio.to_thread(pipe.recv):
        if publish is not None:
            await publish(count)
    server.should_exit = True
    await serving


def _alone(core: int, run: Callable[[], Any]) -> None:
    os.sched_setaffinity(0, {core})
    _many_files()
    asyncio.run(run())


def _many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65_536)), hard))


def resident(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


# --- the readers: they count bytes and do nothing else


class Readers:
    """`count` joined sockets."""

    def __init__(self, port: int, count: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._sockets: list[socket.socket] = []
        key = base64.b64encode(os.urandom(16)).decode()
        hello = (
            f"GET {PATH} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        join = json.dumps(["1", "1", "realtime:bench", "phx_join", {"config": {}}]).encode()
        mask = b"\0\0\0\0"
        frame = bytes((0x81, 0x80 | len(join))) + mask + join
        for _ in range(count):
            one = socket.create_connection(("127.0.0.1", port), timeout=30)
            one.sendall(hello.encode())
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += one.recv(4096)
            assert answer.startswith(b"HTTP/1.1 101"), answer[:200]
            one.sendall(frame)
            one.recv(4096)
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ)
            self._sockets.append(one)

    def drain(self, until: int | None, quiet: float = 1.0) -> int:
        """Read until so many bytes came in all, or (None) until nothing comes for `quiet` seconds."""
        total = 0
        while until is None or total < until:
            ready = self._selector.select(quiet if until is None else 60)
            if not ready:
                if until is None:
                    return total
                raise TimeoutError(f"{total} of {until} bytes came")
            for key, _ in ready:
                chunk = key.fileobj.recv(1 << 20)  # type: ignore[union-attr]
                if not chunk:
                    raise ConnectionError("the server closed a reader")
                total += len(chunk)
        return total

    def close(self) -> None:
        for one in self._sockets:
            one.close()
        self._selector.close()


class Contestant:
    """One server in its process with all its readers; `take` times a burst."""

    def __init__(self, serve: Callable[..., None], dsn: str, core: int, connections: int) -> None:
        self._dsn = dsn if serve is serve_ours else None
        self.fastest = float("inf")
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there, dsn, core), daemon=True)
        self._process.start()
        assert self._process.pid is not None
        port = self._pipe.recv()
        before = resident(self._process.pid)
        self._readers = Readers(port, connections)
        self.bytes_per_connection = (resident(self._process.pid) - before) / connections
        self._publish(1)
        self._size = self._readers.drain(None)

    def take(self, messages: int) -> float:
        """Seconds of processor time for a burst that every reader has all of; `fastest` keeps the wall clock's."""
        start, spent = time.perf_counter(), self._spent()
        self._publish(messages)
        self._readers.drain(self._size * messages)
        self.fastest = min(self.fastest, time.perf_counter() - start)
        return self._spent() - spent

    def _spent(self) -> float:
        """Seconds, user and system; the kernel counts in hundredths."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def _publish(self, count: int) -> None:
        if self._dsn is None:
            self._pipe.send(count)
            return
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(
                "select realtime.send(jsonb_build_object('x', %s::text), 'x', 'bench', false)"
                " from generate_series(1, %s)",
                [PAYLOAD, count],
            )

    def close(self) -> None:
        self._readers.close()
        self._pipe.send(0)
        self._process.join(20)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def run(quick: bool) -> Sequence[Row]:
    """Throughput and memory at 2,000 connections each."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise Unmeasurable("the servers and their readers need a core each")
    _many_files()
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 4 * CONNECTIONS:
        raise Unmeasurable(f"{4 * CONNECTIONS} open files are needed (ulimit -n)")
    messages, rounds = (20, 3) if quick else (50, 7)
    kinds = {"ours": serve_ours, "starlette": serve_starlette, "websockets": serve_websockets}
    running: dict[str, Contestant] = {}
    with tempfile.TemporaryDirectory(prefix="preview-bench-") as directory, asyncio.Runner() as runner:
        server = EmbeddedPostgres(Path(directory) / "data")
        dsn = runner.run(server.start())
        try:
            runner.run(bootstrap(dsn))
            os.sched_setaffinity(0, set(cores[1:]))
            for name, serve in kinds.items():
                running[name] = Contestant(serve, dsn, cores[0], CONNECTIONS)
            seconds = in_turn({name: partial(one.take, messages) for name, one in running.items()}, rounds)
        finally:
            for one in running.values():
                one.close()
            os.sched_setaffinity(0, set(cores))
            runner.run(server.stop())
    deliveries = CONNECTIONS * messages
    rates = {name: [deliveries / taken for taken in each] for name, each in seconds.items()}
    fan_out = f"fan-out, {CONNECTIONS} connections"
    rows = [
        Row(
            fan_out, median(rates["ours"]), "deliveries/s", sense="speed", at_least=WANTED, samples=rounds,
            note=f"best by the wall clock {deliveries / running['ours'].fastest:,.0f}",
        )
    ]  # fmt: skip
    for peer in ("starlette", "websockets"):
        rows.append(
            Row(
                f"{fan_out}, to {peer}", median(rates["ours"]), "deliveries/s", peer, median(rates[peer]),
                ratio_of(rates["ours"], rates[peer]), "speed", samples=rounds,
            )
        )  # fmt: skip
    kib = {name: one.bytes_per_connection / 1024 for name, one in running.items()}
    note = ", ".join(f"{name} {kib[name]:.1f}" for name in ("starlette", "websockets"))
    rows.append(Row("memory per connection", kib["ours"], "KiB", sense="memory", samples=1, note=note))
    return rows
