"""Plays sessions without a machine: the agent's own link and session client, and what an agent says and when.

Each beats every 30 s, spread by a fifth; reports each save twice, when it is on the disk and when it is on the screen;
catches up after every join; and renews its token, all as an agent with one open page does. Each request is a connection
of its own, as an agent's are: it keeps one for five seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Final
from uuid import UUID

import httpx
import psycopg

from agent.core.errors import AgentError
from agent.core.messages import Current
from agent.link.loop import ConnectionEnd
from agent.link.realtime import realtime_link
from agent.link.source import Resync
from agent.link.types import JOINED_STATES
from agent.session_api import SessionApi
from agent.tokens import Tokens
from bench.capacity.stack import FILES, Row, Stack

HEARTBEAT: Final = 30.0
"""Seconds, the agent's default."""

SAVES: Final = 0.05
"""A second and session: one every 20 s, somebody who works."""

TURNS: Final = 0.02
"""Share of saves that are an agent's turn, of `TURN_FILES` files in one commit."""

TURN_FILES: Final = 40

PAINTED: Final = 0.05
"""Seconds between a save on the disk and on the screen."""

WRITERS: Final = 4
"""Connections that save."""

LINES: Final = "".join(
    f"export const value{n} = compute({n * 7919 % 1000}, 'item-{n}');\n" for n in range(40)
)


class LightSession:
    """One of them. `done` counts what all of them did, by kind."""

    def __init__(
        self, stack: Stack, row: Row, http: httpx.AsyncClient, done: Counter[str], beating: asyncio.Event
    ) -> None:
        self.api = SessionApi(stack.control_url, row.id, Tokens(stack.token(row)), http)
        url = stack.url.replace("http", "ws", 1) + "/realtime/v1"
        self.link = realtime_link(url, stack.keys.anon_key, f"realtime:project:{row.project_id}", self.api)
        self._epoch: str | None = None
        self._revision = 1
        self._done = done
        self._beating = beating
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def joined(self) -> bool:
        return self.link.state in JOINED_STATES

    def start(self) -> None:
        self._tasks = [asyncio.create_task(each) for each in (self.link.run(), self._listen(), self._beat())]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose_socket(self) -> None:
        """As when a node of Realtime goes."""
        self.link.interrupt(ConnectionEnd("lost", "the run ended it"))

    async def beat(self) -> None:
        """One heartbeat."""
        await self._report(whole=True)

    async def sync(self) -> None:
        """One question what was missed."""
        answer = await self.api.sync(self._epoch, self._revision, "join")
        self._done["syncs"] += 1
        if isinstance(answer, Current):
            self._epoch, self._revision = answer.epoch, answer.revision

    async def report_save(self) -> None:
        """What an agent says when a save is on its disk."""
        await self._report(whole=False)

    async def _beat(self) -> None:
        await asyncio.sleep(random.uniform(0, HEARTBEAT))
        while True:
            await self._beating.wait()
            await self._try(self.beat())
            await asyncio.sleep(HEARTBEAT * random.uniform(0.8, 1.2))

    async def _listen(self) -> None:
        while True:
            signal = await self.link.receive()
            if isinstance(signal, Resync):
                if await self._try(self.sync()):
                    self.link.caught_up()
                continue
            self._done["delivered"] += 1
            revision = signal.payload.get("revision")
            if isinstance(revision, int):
                self._revision = max(self._revision, revision)
                await self._try(self._report(whole=False))
                await asyncio.sleep(PAINTED)
                await self._try(self._report(whole=False))

    async def _report(self, *, whole: bool) -> None:
        body: dict[str, object] = {
            "state": "serving", "revision": self._revision, "epoch": self._epoch, "dev_server": "ready",
            "problems": [], "problems_left_out": 0, "agent_version": "0.1.0", "run_revision": 0,
            "observed": True, "checked": self._revision, "errors": [],
            "shown": {"revision": self._revision, "how": "update", "pages": {"visible": 1, "hidden": 0}},
        }  # fmt: skip
        if not whole:
            body["tree_hash"] = None
        head = await self.api.report_status(body)
        self._epoch = head.epoch
        self._done["heartbeats" if whole else "reports"] += 1

    async def _try(self, step: object) -> bool:
        try:
            await step  # type: ignore[misc]
        except AgentError as error:
            self._done[f"failed: {type(error).__name__}"] += 1
            return False
        return True


class Crowd:
    """Light sessions that grow, and the editors that save to their projects."""

    def __init__(self, stack: Stack) -> None:
        self.sessions: list[LightSession] = []
        self.done: Counter[str] = Counter()
        self.beating = asyncio.Event()
        """Cleared, no session beats by itself."""
        self.beating.set()
        self._stack = stack
        # An agent keeps a connection for five seconds and asks every thirty: each request makes its own.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self.http = httpx.AsyncClient(limits=limits, trust_env=False, timeout=30)
        self._editors: list[asyncio.Task[None]] = []

    async def grow_to(self, count: int, *, at_once: int = 50) -> None:
        """Have so many, all joined."""
        rows = await self._stack.grow_to(count)
        for place in range(0, len(rows), at_once):
            some = [
                LightSession(self._stack, row, self.http, self.done, self.beating)
                for row in rows[place : place + at_once]
            ]
            for session in some:
                session.start()
            await until_joined(some)
            self.sessions.extend(some)

    def edit(self) -> None:
        """Save to them from now on."""
        self._editors = [asyncio.create_task(self._edit()) for _ in range(WRITERS)]

    async def rest(self) -> None:
        """Save no more."""
        for task in self._editors:
            task.cancel()
        await asyncio.gather(*self._editors, return_exceptions=True)
        self._editors = []

    async def close(self) -> None:
        await self.rest()
        await asyncio.gather(*(session.stop() for session in self.sessions))
        await self.http.aclose()

    async def _edit(self) -> None:
        async with await editor(self._stack) as connection:
            due = asyncio.get_running_loop().time()
            while True:
                due += random.expovariate(SAVES / WRITERS * max(len(self.sessions), 1))
                await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
                turn = random.random() < TURNS
                row = random.choice(self._stack.rows[: len(self.sessions)])
                await (save_turn if turn else save)(connection, row.project_id)
                self.done["turns" if turn else "saves"] += 1


async def until_joined(sessions: Sequence[LightSession], within: float = 120.0) -> None:
    """Raises `TimeoutError`."""
    async with asyncio.timeout(within):
        while not all(session.joined for session in sessions):  # noqa: ASYNC110 - it watches from outside
            await asyncio.sleep(0.02)


async def editor(stack: Stack) -> psycopg.AsyncConnection[tuple[object, ...]]:
    """A connection as PostgREST makes one for the projects' owner."""
    connection = await psycopg.AsyncConnection.connect(stack.dsn, autocommit=True, prepare_threshold=0)
    claims = json.dumps({"role": "authenticated", "sub": str(stack.owner)})
    await connection.execute("select set_config('request.jwt.claims', %s, false)", [claims])
    await connection.execute("set role authenticated")
    return connection


async def save(connection: psycopg.AsyncConnection[tuple[object, ...]], project_id: UUID) -> None:
    """One file of 2 KB."""
    path, content = f"src/file{random.randrange(FILES)}.ts", text()
    await connection.execute(
        "select public.upsert_project_file(%s, %s, %s, 'typescript')", [project_id, path, content]
    )


async def save_turn(connection: psycopg.AsyncConnection[tuple[object, ...]], project_id: UUID) -> None:
    """A turn of an AI: so many files in one commit."""
    changes = [
        {"action": "update", "file_path": f"src/turn{n}.ts", "content": text()} for n in range(TURN_FILES)
    ]
    with contextlib.suppress(psycopg.errors.SerializationFailure):
        await connection.execute(
            "select public.apply_project_files(%s, %s::jsonb)", [project_id, json.dumps(changes)]
        )


def text() -> str:
    """2 KB of TypeScript that was never there before."""
    return (f"// {random.randrange(10**12)}\n" + LINES)[:2000]
