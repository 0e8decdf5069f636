"""The local realtime server's fan-out, beside the two usual ways of doing it in Python.

    python -m bench.realtime_server [--connections 2000] [--messages 100]

Each server runs alone on one core, the readers on another. Every reader joins one topic; then a burst of 1 KB
broadcasts is published and the clock stops when the last reader has the last one. Ours gets them from PostgreSQL
(`realtime.send` in one statement), with topics, tokens and channels in between; the peers only copy bytes:

    starlette     one `await websocket.send_text` per socket, uvicorn with `websockets`
    websockets    `websockets.broadcast`, the library's own fan-out

Prints deliveries per second, their ratio to the better peer, the time of a single message to its last reader, and
resident memory per connection (the server process only; the kernel's socket buffers are not in it).
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable
from dataclasses import dataclass
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

from orchestrator_stub.local import Limits, ProjectKeys, stand_in, uvicorn_options
from orchestrator_stub.local.postgres import EmbeddedPostgres
from orchestrator_stub.migrations import bootstrap
from orchestrator_stub.tokens import Keyring

PAYLOAD = "x" * 1000
KEYS = ProjectKeys.of(Keyring.from_secret("a secret for benchmarks only, nobody's"))
PATH = f"/realtime/v1/websocket?apikey={KEYS.anon_key}&vsn=2.0.0"
WANTED = 30_000
"""Deliveries per second (issue: the live link)."""


@dataclass(frozen=True)
class Result:
    name: str
    per_second: float
    single_ms: float
    bytes_per_connection: float


# --- the servers, each in a process of its own on one core


def serve_ours(pipe: Connection, dsn: str, core: int) -> None:
    async def run() -> None:
        with tempfile.TemporaryDirectory() as storage:
            limits = Limits(connections=None, joins_per_second=None)
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
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
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
                total += len(key.fileobj.recv(1 << 20))  # type: ignore[union-attr]
        return total

    def close(self) -> None:
        for one in self._sockets:
            one.close()
        self._selector.close()


def measure(name: str, serve: Callable[..., None], dsn: str, connections: int, messages: int) -> Result:
    """Run one server and everything that is asked of it."""
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, dsn, cores[0]), name=name)
    process.start()
    assert process.pid is not None
    try:
        port = here.recv()
        os.sched_setaffinity(0, set(cores[1:]) or set(cores))
        before = resident(process.pid)
        readers = Readers(port, connections)
        after = resident(process.pid)

        def publish(count: int) -> None:
            if serve is not serve_ours:
                here.send(count)
                return
            with psycopg.connect(dsn, autocommit=True) as connection:
                connection.execute(
                    "select realtime.send(jsonb_build_object('x', %s::text), 'x', 'bench', false)"
                    " from generate_series(1, %s)",
                    [PAYLOAD, count],
                )

        publish(1)
        size = readers.drain(None)
        singles = []
        for _ in range(10):
            start = time.perf_counter()
            publish(1)
            readers.drain(size)
            singles.append(time.perf_counter() - start)
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            publish(messages)
            readers.drain(size * messages)
            rates.append(connections * messages / (time.perf_counter() - start))
        readers.close()
        here.send(0)
        process.join(20)
    finally:
        os.sched_setaffinity(0, set(cores))
        if process.is_alive():
            process.kill()
            process.join()
    return Result(name, median(rates), median(singles) * 1000, (after - before) / connections)


def main(argv: list[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--messages", type=int, default=100)
    options = parser.parse_args(argv)
    _many_files()
    with tempfile.TemporaryDirectory(prefix="preview-bench-") as directory, asyncio.Runner() as runner:
        server = EmbeddedPostgres(Path(directory) / "data")
        dsn = runner.run(server.start())
        try:
            runner.run(bootstrap(dsn))
            kinds = {"ours": serve_ours, "starlette": serve_starlette, "websockets": serve_websockets}
            results = [
                measure(name, serve, dsn, options.connections, options.messages)
                for name, serve in kinds.items()
            ]
        finally:
            runner.run(server.stop())
    ours, *peers = results
    best = max(peers, key=lambda r: r.per_second)
    print(f"realtime server, {options.connections} connections, 1 KB broadcasts, one core")
    print(f"  ratio to {best.name}: {ours.per_second / best.per_second:.2f} (higher is better)")
    print(f"  wanted {WANTED:,} deliveries/s: {'met' if ours.per_second >= WANTED else 'NOT MET'}")
    for r in results:
        print(
            f"  {r.name:<11}{r.per_second:>10,.0f} deliveries/s   one message to its last reader"
            f" {r.single_ms:6.1f} ms   {r.bytes_per_connection / 1024:6.1f} KiB/connection"
        )
    return results


if __name__ == "__main__":
    main()
