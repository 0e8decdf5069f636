"""From an event on the wire to the file on disk: how long one takes, and how long five hundred take.

*Event to disk* runs the agent's own link, loop, disk and ledger against a websocket server on loopback, and compares
with the least a websocket can do: one frame there and back over the same library. *Burst* sends 500 commits of one
file each and waits for the last rename, beside lsyncd mirroring 500 files written to a directory at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from statistics import median, quantiles

import httpx
import orjson
import structlog
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve

from agent.catchup import CatchUp
from agent.config import SnapshotLimits
from agent.disk import Disk
from agent.follow import Follower
from agent.ledger import Ledger
from agent.model import Cursor, RelPath, Tree, digest_of
from agent.status import Problems, SyncStatus
from agent.stream import RealtimeStream
from agent.sync import Parts, Sync
from agent.telemetry import Metrics
from agent.tokens import Tokens
from agent.workspace import Workspace
from bench.results import Row, Unmeasurable, in_turn, ratio_of

EPOCH = "00000000-0000-4000-8000-00000000000e"
TOPIC = "realtime:project:bench"
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoicHJldmlld19hZ2VudCIsImV4cCI6NDAwMDAwMDAwMH0.c2ln"
BURST = 500
SIZE = 1_000


class Channel:
    """A server with one channel: it lets the agent in and sends what it is told to."""

    def __init__(self) -> None:
        self.joined = asyncio.Event()
        self._socket: ServerConnection | None = None
        self.revision = 0

    async def serve(self, socket: ServerConnection) -> None:
        """One connection: `echo` frames come back as they are, everything else is Phoenix."""
        async for text in socket:
            if isinstance(text, bytes) or not text.startswith("["):
                await socket.send(text)
                continue
            join_ref, ref, topic, event, _ = orjson.loads(text)
            reply = {"status": "ok", "response": {"postgres_changes": []}}
            await socket.send(orjson.dumps([join_ref, ref, topic, "phx_reply", reply]).decode())
            if event == "phx_join":
                self._socket = socket
                self.joined.set()

    async def commit(self, path: str, content: str) -> None:
        """One file's update, as the database would say it."""
        assert self._socket is not None
        self.revision += 1
        payload = {
            "file_path": path, "content": content, "content_hash": digest_of(content.encode()),
            "version": self.revision, "revision": self.revision, "epoch": EPOCH, "size": len(content),
            "timestamp": "2026-11-20T09:00:00.000000Z", "sender": "bench", "encoding": "utf-8", "file_type": "text",
        }  # fmt: skip
        frame = [
            None,
            None,
            TOPIC,
            "broadcast",
            {"type": "broadcast", "event": "file:update", "payload": payload},
        ]
        await self._socket.send(orjson.dumps(frame).decode())


class Loop:
    """The agent's loop on a directory, following a channel."""

    def __init__(self, channel: Channel, url: str) -> None:
        self.channel, self.url = channel, url
        self.landed: dict[str, float] = {}
        self._changed = asyncio.Event()

    def _on_tree(self, paths: Collection[RelPath]) -> None:
        now = time.perf_counter()
        for path in paths:
            self.landed[path] = now
        self._changed.set()

    async def until(self, path: str, after: float) -> float:
        """When `path` was renamed into place, after the moment `after`."""
        while self.landed.get(path, 0.0) < after:
            self._changed.clear()
            await self._changed.wait()
        return self.landed[path]


@contextlib.asynccontextmanager
async def running(place: Path) -> AsyncIterator[Loop]:
    """Server and loop on one event loop, as two hops over loopback."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    channel = Channel()
    async with serve(channel.serve, "127.0.0.1", 0, compression=None) as server, httpx.AsyncClient() as http:
        port = next(iter(server.sockets)).getsockname()[1]
        loop = Loop(channel, f"ws://127.0.0.1:{port}")
        metrics = Metrics()
        problems = Problems(metrics)
        disk = Disk(place / "project", place / "staging")
        # A ledger to resume from: what is measured is following, not hydrating.
        earlier = Ledger(place / "ledger.sqlite")
        earlier.replace(Tree(Cursor(EPOCH, 0)), {})
        earlier.close()
        ledger = Ledger(place / "ledger.sqlite")
        follower = Follower(Tree())
        stream = RealtimeStream(loop.url, "key", TOPIC, Tokens(TOKEN))
        catch_up = CatchUp(
            None, disk, http, SnapshotLimits(), "bench", problems, lambda: follower.tree.entries
        )
        hydrated = asyncio.Event()
        workspace = Workspace(disk, ledger, problems)
        parts = Parts(
            follower, workspace, stream, catch_up, problems, metrics, SyncStatus(), loop._on_tree, hydrated.set
        )  # fmt: skip
        tasks = [asyncio.create_task(stream.run()), asyncio.create_task(Sync(parts, snapshot_url=None).run())]
        try:
            async with asyncio.timeout(20):
                await hydrated.wait()
                await channel.joined.wait()
            yield loop
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            disk.close()
            ledger.close()


async def _event_to_disk(loop: Loop, events: int) -> list[float]:
    taken = []
    for n in range(events):
        path = f"src/latency/{n % 100}.ts"
        # Spaced writes of one path are 75 ms apart on purpose; a hundred paths keep that out of the figure.
        started = time.perf_counter()
        await loop.channel.commit(path, f"{n:06}".ljust(SIZE, "x"))
        taken.append(await loop.until(path, started) - started)
        await asyncio.sleep(0.001)
    return taken


async def _round_trips(loop: Loop, count: int) -> list[float]:
    taken = []
    async with connect(loop.url, compression=None) as socket:
        frame = "x" * SIZE
        for _ in range(count):
            started = time.perf_counter()
            await socket.send(frame)
            await socket.recv()
            taken.append(time.perf_counter() - started)
            await asyncio.sleep(0.001)
    return taken


def latency(quick: bool, place: Path) -> list[Row]:
    """p50 and p99 of an event, round by round beside a bare round trip."""
    each = 200 if quick else 1_000
    p50: dict[str, list[float]] = {"ours": [], "bare": []}
    p99: dict[str, list[float]] = {"ours": [], "bare": []}

    async def rounds() -> None:
        async with running(place) as loop:
            await _event_to_disk(loop, 200)
            for _ in range(5 if quick else 11):
                for name, taken in (
                    ("bare", await _round_trips(loop, each)),
                    ("ours", await _event_to_disk(loop, each)),
                ):
                    p50[name].append(median(taken) * 1e6)
                    p99[name].append(quantiles(taken, n=100)[98] * 1e6)

    asyncio.run(rounds())
    return [
        Row(
            f"event to disk, {label}", median(figures["ours"]), "µs", "websocket round trip",
            median(figures["bare"]), ratio_of(figures["ours"], figures["bare"]), at_most=bound,
            samples=len(figures["ours"]),
        )
        for label, figures, bound in (("p50", p50, 10.0), ("p99", p99, 15.0))
    ]  # fmt: skip


class Lsyncd:
    """lsyncd with no delay of its own, mirroring one directory to another on this machine."""

    def __init__(self, place: Path) -> None:
        self.source, self.target = place / "from", place / "to"
        self.source.mkdir(parents=True)
        self.target.mkdir()
        config = place / "lsyncd.lua"
        config.write_text(
            "settings { nodaemon = true, insist = true }\n"
            f"sync {{ default.rsync, source = '{self.source}', target = '{self.target}', delay = 0,"
            " rsync = { archive = true, whole_file = true } }\n"
        )
        self.process = subprocess.Popen(
            ["lsyncd", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.rounds = 0
        self.burst()

    def burst(self) -> float:
        """Write 500 files and wait until the last is there; seconds."""
        self.rounds += 1
        names = [f"{self.rounds}-{n}.ts" for n in range(BURST)]
        started = time.perf_counter()
        for n, name in enumerate(names):
            (self.source / name).write_text(f"{n:06}".ljust(SIZE, "x"))
        while not self._landed(names):
            if time.perf_counter() - started > 60:
                raise Unmeasurable("lsyncd did not mirror 500 files in a minute")
            time.sleep(0.001)
        return time.perf_counter() - started

    def _landed(self, names: Sequence[str]) -> bool:
        """Whether every file is there under its own name; rsync writes them under others first."""
        return set(names) <= set(os.listdir(self.target))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


async def _burst(loop: Loop, number: int) -> float:
    started = time.perf_counter()
    for n in range(BURST):
        await loop.channel.commit(f"src/burst{number}/{n}.ts", f"{n:06}".ljust(SIZE, "x"))
    return max([await loop.until(f"src/burst{number}/{n}.ts", started) for n in range(BURST)]) - started


def burst(quick: bool, place: Path) -> list[Row]:
    """Five hundred new files: from the first event to the last rename."""
    if shutil.which("lsyncd") is None or shutil.which("rsync") is None:
        raise Unmeasurable("lsyncd or rsync is not installed; `make bench-peers` installs them")
    peer = Lsyncd(place / "lsyncd")
    numbers = iter(range(1_000))
    try:
        with asyncio.Runner() as runner:
            context = running(place / "ours")
            (place / "ours").mkdir()
            loop = runner.run(context.__aenter__())
            try:
                taken = in_turn(
                    {"ours": lambda: runner.run(_burst(loop, next(numbers))), "lsyncd": peer.burst},
                    5 if quick else 31,
                )
            finally:
                runner.run(context.__aexit__(None, None, None))
    finally:
        peer.stop()
    return [
        Row(
            f"burst of {BURST} files", median(taken["ours"]) * 1e3, "ms", "lsyncd", median(taken["lsyncd"]) * 1e3,
            ratio_of(taken["ours"], taken["lsyncd"]), at_most=0.25, samples=len(taken["ours"]),
        )
    ]  # fmt: skip


def run(quick: bool = False) -> Sequence[Row]:
    """Both measurements."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as name:
        for part in (latency, burst):
            place = Path(name) / part.__name__
            place.mkdir()
            rows += part(quick, place)
    return rows
