"""Five clients behind one small face, so that one scenario can be run through all of them.

realtime       the official Python client, vsn 1
realtime-js    the official JavaScript client in Node, vsn 2 with binary broadcasts
supabase-js    the same through the front door that applications use
ours           `agent.link.realtime.realtime_link`, which only listens, to one private topic
raw            none: frames as written, to show that the scenario itself is sound
"""

from __future__ import annotations

import asyncio
import json
import subprocess
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from realtime import AsyncRealtimeChannel, AsyncRealtimeClient, RealtimeSubscribeStates

from agent.core.errors import Unavailable
from agent.link.realtime import realtime_link
from agent.link.source import Received, Resync
from agent.link.types import LinkSettings, LinkState, Timing
from agent.tokens import Token, Tokens
from tests.fakes.serving import Local, Phoenix

NODE = Path(__file__).parent / "node"
ENDED = frozenset({"closed", "error"})
"""How a channel that the server ended may show itself, depending on the library."""


class Client(ABC):
    """One client with at most one channel. What it tells is kept in order, by kind."""

    can: frozenset[str]

    def __init__(self, local: Local) -> None:
        self.local = local
        self.told: dict[str, deque[Any]] = {}
        self._news = asyncio.Event()

    def tell(self, kind: str, what: Any) -> None:
        self.told.setdefault(kind, deque()).append(what)
        self._news.set()

    async def heard(self, kind: str, wanted: Callable[[Any], bool], timeout: float = 10) -> Any:
        """The next thing of this kind that is wanted; what came before it is forgotten."""
        async with asyncio.timeout(timeout):
            while True:
                waiting = self.told.setdefault(kind, deque())
                while waiting:
                    if wanted(what := waiting.popleft()):
                        return what
                self._news.clear()
                await self._news.wait()

    @abstractmethod
    async def start(self) -> None:
        """Before the first command."""

    @abstractmethod
    async def join(self, topic: str, token: str | None, config: dict[str, Any]) -> None: ...

    @abstractmethod
    async def renew(self, token: str) -> None: ...

    async def rejoin(self, topic: str, token: str, config: dict[str, Any]) -> None:
        """After the server ended the channel: as an application would, with a new token and a new channel."""
        await self.renew(token)
        self.told.pop("status", None)
        await self.join(topic, None, config)

    async def send(self, event: str, payload: Any) -> str:
        raise NotImplementedError

    async def track(self, payload: Any) -> None:
        raise NotImplementedError

    @abstractmethod
    async def leave(self) -> None: ...

    @abstractmethod
    async def stop(self) -> None: ...


class OfficialPython(Client):
    can = frozenset({"public", "send", "replay", "system", "presence"})
    _channel: AsyncRealtimeChannel

    async def start(self) -> None:
        self._client = AsyncRealtimeClient(
            f"{self.local.url}/realtime/v1", token=self.local.keys.anon_key, initial_backoff=0.05, timeout=5
        )

    async def join(self, topic: str, token: str | None, config: dict[str, Any]) -> None:
        if token is not None:
            await self._client.set_auth(token)
        whole: Any = {
            "broadcast": {"ack": False, "self": False},
            "presence": {"key": "", "enabled": False},
            "private": False,
            **config,
        }
        self._channel = self._client.channel(topic, {"config": whole})
        self._channel.on_broadcast("*", lambda message: self.tell("broadcast", message))
        self._channel.on_system(lambda message: self.tell("system", message.model_dump()))
        if whole["presence"]["enabled"]:
            self._channel.on_presence_sync(lambda: self.tell("presence", self._channel.presence_state()))
        await self._channel.subscribe(self._status)

    def _status(self, status: RealtimeSubscribeStates, error: Exception | None) -> None:
        words = {"SUBSCRIBED": "joined", "CHANNEL_ERROR": "error", "CLOSED": "closed", "TIMED_OUT": "timeout"}
        self.tell("status", {"status": words[status.value], "error": str(error) if error else None})

    async def renew(self, token: str) -> None:
        await self._client.set_auth(token)

    async def send(self, event: str, payload: Any) -> str:
        done: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def answered(word: str) -> Callable[..., None]:
            return lambda *_: done.done() or done.set_result(word)  # type: ignore[func-returns-value]

        from realtime.types import ChannelEvents, RealtimeAcknowledgementStatus

        body = {"type": "broadcast", "event": event, "payload": payload}
        push = await self._channel.push(ChannelEvents.broadcast, body, timeout=1)
        push.receive(RealtimeAcknowledgementStatus.Ok, answered("ok"))
        push.receive(RealtimeAcknowledgementStatus.Error, answered("error"))
        push.receive(RealtimeAcknowledgementStatus.Timeout, answered("timed out"))
        return await done

    async def track(self, payload: Any) -> None:
        await self._channel.track(payload)

    async def leave(self) -> None:
        await self._channel.unsubscribe()

    async def stop(self) -> None:
        with suppress(Exception):
            await self._client.close()


class OfficialNode(Client):
    """One of the JavaScript libraries, in a process of its own."""

    library: str
    can = frozenset({"public", "send", "replay", "system", "presence"})

    async def start(self) -> None:
        self._answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._process = await asyncio.create_subprocess_exec(
            "node", str(NODE / "client.mjs"), self.library, self.local.url, self.local.keys.anon_key,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, limit=1 << 24,
        )  # fmt: skip
        self._reading = asyncio.create_task(self._read())
        assert await self._answer() == "ready"

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            message = json.loads(line)
            if "answer" in message:
                self._answers.put_nowait(message)
            elif "status" in message:
                self.tell("status", message)
            else:
                for kind, what in message.items():
                    self.tell(kind, what)

    async def command(self, command: str, **parameters: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"command": command, **parameters}).encode() + b"\n")
        await self._process.stdin.drain()
        return await self._answer()

    async def _answer(self) -> Any:
        async with asyncio.timeout(30):
            answer = await self._answers.get()
        assert "failure" not in answer, answer["failure"]
        return answer["answer"]

    async def join(self, topic: str, token: str | None, config: dict[str, Any]) -> None:
        if token is not None:
            await self.command("auth", token=token)
        await self.command("join", topic=topic, config=config)

    async def renew(self, token: str) -> None:
        await self.command("auth", token=token)

    async def send(self, event: str, payload: Any) -> str:
        return str(await self.command("send", event=event, payload=payload, timeout=1000))

    async def track(self, payload: Any) -> None:
        assert await self.command("track", payload=payload) == "ok"

    async def leave(self) -> None:
        await self.command("leave")

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), 10)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()
        await self._reading


class RealtimeJs(OfficialNode):
    library = "realtime-js"


class SupabaseJs(OfficialNode):
    library = "supabase-js"


class Ours(Client):
    """The agent's own link. It renews by itself, so `renew` only says with what."""

    can: frozenset[str] = frozenset()
    problem: str | None = None
    """What is wrong with the token's file; there is none."""
    _SETTINGS = LinkSettings(
        timing=Timing(replication_within=2.0),
        backoff_first=0.05, backoff_most=0.1, backoff_least=0.01, rejoin_least=0.1, renew_pause=0.1, check_every=0.05,
    )  # fmt: skip

    async def start(self) -> None:
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self, topic: str, token: str | None, config: dict[str, Any]) -> None:
        assert token is not None
        self._next: str | None = None
        self._tokens = Tokens(token)
        self._stream = realtime_link(
            f"{self.local.url}/realtime/v1", self.local.keys.anon_key, f"realtime:{topic}", self,
            settings=self._SETTINGS,
        )  # fmt: skip
        self._tasks = [asyncio.create_task(self._stream.run()), asyncio.create_task(self._listen())]
        self._tasks.append(asyncio.create_task(self._watch()))

    def current(self) -> Token | None:
        return self._tokens.current()

    async def renew_token(self) -> Token:
        if self._next is None:
            raise Unavailable("the issuer", "no newer token yet")
        return self._tokens.accept(self._next)

    async def _listen(self) -> None:
        while True:
            signal = await self._stream.receive()
            if isinstance(signal, Received):
                self.tell("broadcast", {"event": signal.event, "payload": signal.payload})
            elif isinstance(signal, Resync):
                self._stream.caught_up()

    async def _watch(self) -> None:
        before: tuple[object, object] = (None, None)
        while True:
            state = self._stream.state
            now = (state, self._stream.report()["joins"])
            if now != before:
                live, before = before[0] is LinkState.LIVE, now
                if state is LinkState.LIVE:
                    self.tell("status", {"status": "joined", "error": None})
                elif state is LinkState.JOINING and live:
                    self.tell("status", {"status": "closed", "error": self._stream.report()["why"]})
                elif state in (LinkState.REFUSED, LinkState.BACKOFF):
                    self.tell("status", {"status": "error", "error": self._stream.report()["why"]})
            await asyncio.sleep(0.005)

    async def renew(self, token: str) -> None:
        self._next = token

    async def rejoin(self, topic: str, token: str, config: dict[str, Any]) -> None:
        await self.renew(token)

    async def leave(self) -> None:
        await self.stop()
        self.tell("status", {"status": "closed", "error": None})

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Raw(Client):
    """Frames as written."""

    can = frozenset({"public", "send", "replay", "system"})
    _phoenix: Phoenix | None = None

    async def start(self) -> None:
        self._token: str | None = None
        self._reading: asyncio.Task[None] | None = None

    async def join(self, topic: str, token: str | None, config: dict[str, Any]) -> None:
        self._token = token or self._token
        self._topic, self._config = f"realtime:{topic}", config
        if self._reading is None:
            self._reading = asyncio.create_task(self._stay())
        elif self._phoenix is not None:
            await self._join(self._phoenix)

    async def _join(self, phoenix: Phoenix) -> None:
        self._ref = await phoenix.push(
            self._topic, "phx_join", {"config": self._config, "access_token": self._token}
        )

    async def _stay(self) -> None:
        while True:
            with suppress(OSError, Exception):
                async with self.local.socket() as self._phoenix:
                    await self._join(self._phoenix)
                    while True:
                        self._take(await self._phoenix.frame(timeout=60))
            await asyncio.sleep(0.02)

    def _take(self, frame: list[Any]) -> None:
        _, ref, _, event, payload = frame
        if event == "broadcast":
            self.tell("broadcast", payload)
        elif event == "system":
            self.tell("system", payload)
        elif event == "phx_close":
            self.tell("status", {"status": "closed", "error": None})
        elif event == "phx_reply" and ref == self._ref:
            ok = payload["status"] == "ok"
            self.tell(
                "status", {"status": "joined" if ok else "error", "error": payload["response"].get("reason")}
            )
        elif event == "phx_reply":
            self.tell("reply", {"ref": ref, "status": payload["status"]})

    async def renew(self, token: str) -> None:
        self._token = token
        assert self._phoenix is not None
        await self._phoenix.push(self._topic, "access_token", {"access_token": token}, join_ref=self._ref)

    async def send(self, event: str, payload: Any) -> str:
        assert self._phoenix is not None
        body = {"type": "broadcast", "event": event, "payload": payload}
        ref = await self._phoenix.push(self._topic, "broadcast", body, join_ref=self._ref)
        try:
            return str((await self.heard("reply", lambda r: r["ref"] == ref, timeout=1))["status"])
        except TimeoutError:
            return "timed out"

    async def leave(self) -> None:
        assert self._phoenix is not None
        await self._phoenix.push(self._topic, "phx_leave", {}, join_ref=self._ref)

    async def stop(self) -> None:
        assert self._reading is not None
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


CLIENTS: dict[str, type[Client]] = {
    "raw": Raw,
    "realtime": OfficialPython,
    "realtime-js": RealtimeJs,
    "supabase-js": SupabaseJs,
    "ours": Ours,
}
