"""The agent's own link, loop, disk and ledger on a directory, following a channel on loopback.

The server has one channel and lets the agent in. What is to be said there comes either from this process (`commit`) or
from an editor's own socket, as a save that another machine makes: two hops to the disk.

    python -m bench.harness.following URL PLACE      the agent's side alone, until its standard input ends
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from pathlib import Path
from uuid import UUID

import httpx
import orjson
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode

from agent.config import Settings, SnapshotLimits
from agent.core.model import Cursor, RelPath, Tree, digest_of
from agent.core.scheduler import Follower
from agent.fs.project_dir import ProjectDir
from agent.link.realtime import realtime_link
from agent.snapshot.download import Downloader
from agent.sync.catchup import CatchUp
from agent.sync.engine import Sync
from agent.sync.ledger import Ledger
from agent.sync.workspace import Workspace
from agent.telemetry.logging import Redactor, configure_logs
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems, SyncStatus
from agent.tokens import Tokens
from orchestrator_stub.machines.local import ALLOCATOR

EPOCH = "00000000-0000-4000-8000-00000000000e"
TOPIC = "realtime:project:bench"
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoicHJldmlld19hZ2VudCIsImV4cCI6NDAwMDAwMDAwMH0.c2ln"


class Channel:
    """A server with one channel: it lets the agent in and sends what it is told to."""

    def __init__(self) -> None:
        self.joined = asyncio.Event()
        self._socket: ServerConnection | None = None
        self.revision = 0

    async def serve(self, socket: ServerConnection) -> None:
        """One connection: `{` is an editor's save, `[` is Phoenix, all else comes back as it is."""
        async for text in socket:
            if isinstance(text, str) and text.startswith("{"):
                save = orjson.loads(text)
                await self.commit(save["path"], save["content"])
                continue
            if isinstance(text, bytes) or not text.startswith("["):
                await socket.send(text)
                continue
            join_ref, ref, topic, event, _ = orjson.loads(text)
            reply = {"status": "ok", "response": {"postgres_changes": []}}
            with contextlib.suppress(ConnectionClosed):  # one that leaves does not wait for the answer
                await socket.send(orjson.dumps([join_ref, ref, topic, "phx_reply", reply]).decode())
            if event == "phx_join":
                self._socket = socket
                self.joined.set()

    async def commit(self, path: str, content: str) -> None:
        """One file's update, as the database would say it."""
        assert self._socket is not None
        await self._socket.send(self.event(path, content))

    def burst(self, files: Mapping[str, str]) -> Callable[[], None]:
        """An event for each file, ready for the wire; calling it puts them there, one behind the other."""
        texts = (self.event(path, content) for path, content in files.items())
        frames = b"".join(Frame(Opcode.TEXT, text.encode()).serialize(mask=False) for text in texts)

        def send() -> None:
            assert self._socket is not None
            self._socket.transport.write(frames)

        return send

    def event(self, path: str, content: str) -> str:
        """The next revision's event."""
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
        return orjson.dumps(frame).decode()


class Loop:
    """The agent's loop on a directory, following a channel."""

    def __init__(self, channel: Channel, url: str) -> None:
        self.channel, self.url = channel, url
        self.landed: dict[str, float] = {}
        self._changed = asyncio.Event()

    def on_tree(self, paths: Collection[RelPath]) -> None:
        """They are in place, since now."""
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
async def serving() -> AsyncIterator[tuple[Channel, str]]:
    """The server, and its URL."""
    channel = Channel()
    async with serve(channel.serve, "127.0.0.1", 0, compression=None) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield channel, f"ws://127.0.0.1:{port}"


@contextlib.asynccontextmanager
async def following(
    url: str, place: Path, on_tree: Callable[[Collection[RelPath]], None]
) -> AsyncIterator[None]:
    """The agent's parts, once they are ready to follow the channel at `url` into `place`."""
    metrics = Metrics()
    problems = Problems(metrics)
    disk = ProjectDir(place / "project", place / "staging")
    # A ledger to resume from: what is measured is following, not hydrating.
    earlier = Ledger(place / "ledger.sqlite")
    earlier.replace(Tree(Cursor(EPOCH, 0)), {})
    earlier.close()
    ledger = Ledger(place / "ledger.sqlite")
    follower = Follower(Tree())
    stream = realtime_link(url, "key", TOPIC, Tokens(TOKEN))
    async with httpx.AsyncClient() as http:
        catch_up = CatchUp(
            None, Downloader(disk, http, SnapshotLimits(), "bench"), problems, lambda: follower.tree.entries
        )
        hydrated = asyncio.Event()
        workspace = Workspace(disk, ledger, problems)
        sync = Sync(
            follower, workspace, stream, catch_up, problems, metrics, SyncStatus(),
            snapshot_url=None, on_tree=on_tree, on_hydrated=hydrated.set,
        )  # fmt: skip
        tasks = [asyncio.create_task(stream.run()), asyncio.create_task(sync.run())]
        try:
            async with asyncio.timeout(20):
                await hydrated.wait()
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            disk.close()
            ledger.close()


@contextlib.asynccontextmanager
async def running(place: Path) -> AsyncIterator[Loop]:
    """Server and agent on one event loop, as two hops over loopback."""
    async with serving() as (channel, url):
        loop = Loop(channel, url)
        async with following(url, place, loop.on_tree):
            await _joined(channel)
            yield loop


@contextlib.asynccontextmanager
async def running_apart(place: Path) -> AsyncIterator[tuple[Channel, str]]:
    """The server here, with its URL, and the agent in a process of its own with its log at the default level, as it
    always is."""
    async with serving() as (channel, url):
        command = (sys.executable, "-m", "bench.harness.following", url, str(place))
        agent = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
            env={**os.environ, **ALLOCATOR},
        )  # fmt: skip
        try:
            await _joined(channel)
            yield channel, url
        finally:
            assert agent.stdin is not None
            agent.stdin.close()
            await agent.wait()


async def _joined(channel: Channel) -> None:
    async with asyncio.timeout(20):
        await channel.joined.wait()


async def _until_told(url: str, place: Path) -> None:
    settings = Settings(project_id=UUID(int=1), session_id=UUID(int=1), project_dir=place / "project")
    configure_logs(settings, Redactor([TOKEN]))
    async with following(url, place, lambda paths: None):
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_until_told(sys.argv[1], Path(sys.argv[2])))
