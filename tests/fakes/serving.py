"""The real stand-in under the real uvicorn, on a free port of this process's loop. Nothing here is a fake."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import psycopg
import uvicorn
from starlette.applications import Starlette
from websockets.asyncio.client import ClientConnection, connect

from orchestrator_stub.local_supabase.app import StandIn, stand_in
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.realtime.limits import Limits
from orchestrator_stub.local_supabase.realtime.socket import uvicorn_options
from orchestrator_stub.platform.tokens import Keyring

SECRET = "a secret that only this test run knows, and nobody else"
LIMITS = Limits(join_error_delay=0)


@dataclass(frozen=True)
class Local:
    """A running stand-in and how to talk to it."""

    stand_in: StandIn
    keys: ProjectKeys
    port: int
    dsn: str
    storage: Path
    http: httpx.AsyncClient
    """With the service key on every request."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def token(self, role: str = "preview_agent", *, ttl: float = 600, **claims: Any) -> str:
        return self.keys.keyring.sign({"role": role, "exp": int(time.time() + ttl), **claims})

    async def sql(self, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
        async with await psycopg.AsyncConnection.connect(self.dsn, autocommit=True) as connection:
            cursor = await connection.execute(query.encode(), parameters or None)
            return await cursor.fetchall() if cursor.description else []

    async def send(self, topic: str, event: str, payload: Any, *, private: bool = True) -> None:
        """As the product's functions do: from inside the database."""
        await self.sql(
            "select realtime.send(%s::jsonb, %s, %s, %s)", json.dumps(payload), event, topic, private
        )

    async def fault(self, **fault: Any) -> dict[str, Any]:
        answer = await self.http.post("/realtime/v1/faults", json=fault)
        answer.raise_for_status()
        body: dict[str, Any] = answer.json()
        return body

    @asynccontextmanager
    async def socket(
        self, vsn: str = "2.0.0", path: str = "/realtime/v1/websocket", key: str | None = None
    ) -> AsyncIterator[Phoenix]:
        url = f"ws://127.0.0.1:{self.port}{path}?apikey={key or self.keys.anon_key}&vsn={vsn}"
        async with connect(url, compression=None, max_size=None, ping_interval=None) as connection:
            yield Phoenix(connection, vsn)


@dataclass
class Phoenix:
    """A client that hides nothing: frames go out as written and come in as `[join_ref, ref, topic, event, payload]`,
    binary broadcasts with the payload under `binary`."""

    connection: ClientConnection
    vsn: str
    ref: int = 0

    async def push(self, topic: str, event: str, payload: Any, *, join_ref: str | None = None) -> str:
        self.ref += 1
        ref = str(self.ref)
        join_ref = ref if event == "phx_join" else join_ref
        if self.vsn.startswith("2"):
            frame: Any = [join_ref, ref, topic, event, payload]
        else:
            frame = {"topic": topic, "event": event, "payload": payload, "ref": ref, "join_ref": join_ref}
        await self.connection.send(json.dumps(frame))
        return ref

    async def frame(self, timeout: float = 30) -> list[Any]:
        raw = await asyncio.wait_for(self.connection.recv(), timeout)
        if isinstance(raw, bytes):
            assert raw[0] == 4
            topic, event, meta = raw[1], raw[2], raw[3]
            at = 5 + topic
            name = raw[5:at].decode()
            user_event = raw[at : at + event].decode()
            extra = raw[at + event : at + event + meta]
            body = raw[at + event + meta :]
            payload: dict[str, Any] = {
                "type": "broadcast",
                "event": user_event,
                "payload": json.loads(body) if raw[4] else body,
            }
            if extra:
                payload["meta"] = json.loads(extra)
            return [None, None, name, "broadcast", payload]
        data = json.loads(raw)
        if isinstance(data, dict):
            assert set(data) == {"topic", "event", "payload", "ref"}
            return [None, data["ref"], data["topic"], data["event"], data["payload"]]
        assert len(data) == 5
        return list(data)

    async def until(self, wanted: Callable[[list[Any]], bool], timeout: float = 30) -> list[Any]:
        async with asyncio.timeout(timeout):
            while True:
                frame = await self.frame(timeout)
                if wanted(frame):
                    return frame

    async def reply(self, ref: str) -> dict[str, Any]:
        frame = await self.until(lambda f: f[3] == "phx_reply" and f[1] == ref)
        body: dict[str, Any] = frame[4]
        return body

    async def join(
        self, topic: str, token: str | None = None, *, private: bool = True, **config: Any
    ) -> dict[str, Any]:
        payload: dict[str, Any] = {"config": {"private": private, **config}}
        if token is not None:
            payload["access_token"] = token
        return await self.reply(await self.push(f"realtime:{topic}", "phx_join", payload))

    async def broadcast(self, timeout: float = 5) -> dict[str, Any]:
        frame = await self.until(lambda f: f[3] == "broadcast", timeout)
        body: dict[str, Any] = frame[4]
        return body

    async def silent(self) -> bool:
        """Whether nothing comes before the answer to a heartbeat sent now."""
        ref = await self.push("phoenix", "heartbeat", {})
        return (await self.frame())[1] == ref


@asynccontextmanager
async def serve_local(
    dsn: str,
    storage: Path,
    *,
    faults: bool = True,
    limits: Limits = LIMITS,
    keyring: Keyring | None = None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Local]:
    """A running stand-in over the database at `dsn`."""
    keys = ProjectKeys.of(keyring or Keyring.from_secret(SECRET))
    standing = stand_in(dsn, keys, storage, faults=faults, limits=limits, clock=clock)
    # The protocol must be named: only then does asyncio set TCP_NODELAY on what is accepted, and without it each
    # answer waits 40 ms for the other side's acknowledgement.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    app = Starlette(routes=standing.routes, lifespan=standing.lifespan)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=2, **uvicorn_options()
    )
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve([listener]))
    try:
        async with asyncio.timeout(20):
            while not server.started:
                if serving.done():
                    await serving
                    raise RuntimeError("the stand-in did not start")
                await asyncio.sleep(0.005)
        port = listener.getsockname()[1]
        headers = {"apikey": keys.service_key, "authorization": f"Bearer {keys.service_key}"}
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as http:
            yield Local(standing, keys, port, dsn, storage, http)
    finally:
        server.should_exit = True
        await serving
        listener.close()


def quick(**changes: Any) -> Limits:
    """`LIMITS` with changes."""
    return replace(LIMITS, **changes)
