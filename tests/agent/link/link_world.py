"""A whole world around the link in simulated time: database, realtime server, broken network, and a consumer.

The consumer is the least that a correct one must do: apply what comes, catch up when told to or when a revision is
missing, compare with the head every 30 s. Everything between it and the server is real: websockets over TCP through
a proxy. The settings are the production defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from agent.core.errors import CredentialRejected, Unavailable
from agent.link.loop import LinkLoop
from agent.link.source import Received
from agent.link.types import DEFAULTS, LinkState
from agent.tokens import Token, Tokens
from tests.agent.link.one_link import TRANSPORTS, Server, stream_to
from tests.fakes.proxy import Proxy
from tests.fakes.realtime import jwt

EPOCH = 1_800_000_000.0
"""Unix seconds at the simulation's start."""

TOKEN_LIFE = 600.0
STATUS_EVERY = 30.0
STATUS_GRACE = 2.0
"""What was committed just before the comparison may still be on its way."""


def now() -> float:
    return asyncio.get_running_loop().time()


class World:
    """`async with World.made() as world`. Times in simulated seconds."""

    def __init__(self, server: Server, proxy: Proxy) -> None:
        self.server = server
        self.proxy = proxy
        self.asleep = 0.0
        self.head = 0
        self.applied: set[int] = set()
        self.by_socket: set[int] = set()
        self.api_down = False
        self.token_refused = False
        self.catch_ups: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.tokens_made = 0
        first = self._mint()
        self.tokens = Tokens(first, nats_jwt=first)
        self.states: list[tuple[float, LinkState]] = []
        self.link = self._link()

    def _link(self) -> LinkLoop:
        url = self.server.url.replace(f":{self.server.port}", f":{self.proxy.port}")
        return stream_to(self.server, self, DEFAULTS, self.wall, url)

    @classmethod
    @asynccontextmanager
    async def made(cls, transport: str) -> AsyncIterator[World]:
        loop = asyncio.get_running_loop()
        async with TRANSPORTS[transport]() as server, Proxy("127.0.0.1", server.port) as proxy:
            world = cls(server, proxy)
            server.wall = lambda: EPOCH + loop.time()
            tasks = world.tasks = [
                asyncio.create_task(coroutine, name=name)
                for name, coroutine in {
                    "link": world.link.run(), "sync": world._sync(), "status": world._status(),
                }.items()
            ]  # fmt: skip
            try:
                yield world
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def wall(self) -> float:
        return EPOCH + now() + self.asleep

    # --- the TokenSource

    def _mint(self) -> str:
        self.tokens_made += 1
        at = EPOCH + (now() if self.tokens_made > 1 else 0.0)
        return jwt(at + TOKEN_LIFE, at, name=f"token-{self.tokens_made}")

    def current(self) -> Token | None:
        return self.tokens.current()

    @property
    def problem(self) -> str | None:
        return None

    async def renew_token(self) -> Token:
        await asyncio.sleep(0.02)
        if self.api_down:
            raise Unavailable("session API (token)", "ConnectError")
        if self.token_refused:
            raise CredentialRejected("session API (token) refused the token: HTTP 401")
        token = self._mint()
        return self.tokens.accept(token, token)

    # --- the database

    async def commit(self) -> int:
        """One revision, broadcast to every connection."""
        self.head += 1
        with contextlib.suppress(
            Exception
        ):  # a socket may be going down: at most once is all that is promised
            await self.server.broadcast("file:update", {"revision": self.head}, binary=self.head % 2 == 0)
        return self.head

    # --- the consumer

    @property
    def cursor(self) -> int:
        return next(n for n in range(self.head + 2) if n + 1 not in self.applied)

    async def _sync(self) -> None:
        while True:
            signal = await self.link.receive()
            if isinstance(signal, Received):
                revision: Any = signal.payload["revision"]
                self.applied.add(revision)
                self.by_socket.add(revision)
                if self.cursor < revision:
                    await self._catch_up("gap")
            else:
                await self._catch_up(signal.reason)

    async def _catch_up(self, reason: str) -> None:
        self.catch_ups.append(reason)
        while True:
            await asyncio.sleep(0.05)
            if not self.api_down:
                self.applied.update(range(1, self.head + 1))
                self.link.caught_up()
                return
            await asyncio.sleep(1.0)

    async def _status(self) -> None:
        while True:
            await asyncio.sleep(STATUS_EVERY)
            head = self.head
            if self.api_down or self.cursor >= head:
                continue
            await asyncio.sleep(STATUS_GRACE)
            if self.cursor < head:
                self.link.suspect(f"the head was {head}, the link brought {self.cursor}")
                await self._catch_up("status")

    # --- what is asserted

    async def until(self, condition: Callable[[], bool], what: str, within: float) -> float:
        """Wait in simulated time; returns how long it took."""
        began = now()
        while not condition():
            for task in self.tasks:
                assert not task.done(), f"{task.get_name()} ended: {task.exception()!r}"
            assert now() - began <= within, (
                f"waited {within:g} simulated seconds for {what}: {self.link.report()}"
            )
            await asyncio.sleep(0.05)
        return now() - began

    async def live(self, within: float) -> float:
        return await self.until(lambda: self.link.state is LinkState.LIVE, "a live link", within)

    async def hears(self, within: float) -> float:
        """Live, equal, and the next commit comes through the socket. Returns how long that took."""
        began = now()
        await self.live(within)
        while not await self._heard(await self.commit()):
            assert now() - began <= within, (
                f"nothing received for {within:g} simulated seconds: {self.link.report()}"
            )
        await self.until(lambda: self.cursor == self.head, "an equal tree", 5.0)
        return now() - began

    async def _heard(self, revision: int) -> bool:
        with contextlib.suppress(AssertionError):
            await self.until(lambda: revision in self.by_socket, "the commit", 3.0)
        return revision in self.by_socket
