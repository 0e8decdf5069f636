"""Measures receiving and decoding 1 KB broadcasts by our link against the official `realtime` client.

One server process sends the same number of the same broadcasts to each client, as fast as it takes them: to ours as
vsn 2 binary frames (what the database's broadcasts are), to the official client as vsn 1 text, which is all it speaks.
Each runs in its own process and is measured in its own processor time from the first delivery to the last, so that a
busy machine slows both alike; rounds alternate.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.harness.results import Row, in_turn, ratio_of

DISTINCT = 5_000
COUNTS = {"ours": 60_000, "official": 10_000}
"""How many each is sent: about as much work for the one as for the other."""

TOPIC = "realtime:project:p1"
CONTENT = (
    """import { useState } from "react";
import "./App.css";

export default function App() {
  const [count, setCount] = useState(0);
  return (
    <main className="app">
      <h1>{"Hello, preview"}</h1>
      <button type="button" onClick={() => setCount((n) => n + 1)}>
        {`clicked ${count} times`}
      </button>
      <p>
        Edit <code>src/App.tsx</code> and save: the preview follows, and so does every
        other reader of this page, without a reload.
      </p>
    </main>
  );
}
"""
    + "// padding that a comment would be\n" * 5
)
"""A source file, as broadcasts carry; makes the whole payload 1 KB."""


def payload(number: int) -> dict[str, Any]:
    return {
        "file_path": "src/App.tsx", "content": CONTENT, "content_hash": "0" * 64, "version": number,
        "timestamp": "2026-11-23T00:00:00Z", "sender": "bench", "revision": number,
    }  # fmt: skip


async def serve_broadcasts() -> None:
    """The server process: prints its port; sends to whoever joins, in the dialect it asked for."""
    from websockets.asyncio.server import ServerConnection, serve
    from websockets.exceptions import ConnectionClosed
    from websockets.frames import Frame, Opcode

    def wire(version: int) -> list[bytes]:
        """All frames as they stand on the wire, in blocks, so that the server is never what is measured."""
        head = bytes((4, len(TOPIC), len("file:update"), 0, 1)) + TOPIC.encode() + b"file:update"
        blocks, block = [], bytearray()
        for n in range(DISTINCT):
            if version == 1:
                body = {"type": "broadcast", "event": "file:update", "payload": payload(n)}
                message = {"topic": TOPIC, "event": "broadcast", "ref": None, "payload": body}
                frame = Frame(Opcode.TEXT, json.dumps(message).encode())
            else:
                frame = Frame(Opcode.BINARY, head + json.dumps(payload(n)).encode())
            block += frame.serialize(mask=False)
            if len(block) > 65536 or n == DISTINCT - 1:
                blocks.append(bytes(block))
                block.clear()
        return blocks

    ready = {1: wire(1), 2: wire(2)}

    async def talk(socket: ServerConnection) -> None:
        assert socket.request is not None
        version = 2 if "vsn=2.0.0" in socket.request.path else 1
        async for message in socket:
            push = json.loads(message)
            join_ref, ref, topic, event, _ = (
                push if version == 2 else (None, push["ref"], push["topic"], push["event"], 0)
            )
            answer = {"status": "ok", "response": {"postgres_changes": []}}
            reply: Any = [join_ref, ref, topic, "phx_reply", answer]
            if version == 1:
                reply = {"topic": topic, "event": "phx_reply", "payload": answer, "ref": ref}
            with contextlib.suppress(ConnectionClosed):
                await socket.send(json.dumps(reply))
            if event == "phx_join" and topic == TOPIC:
                for _ in range(COUNTS["ours" if version == 2 else "official"] // DISTINCT):
                    for block in ready[version]:
                        socket.transport.write(block)
                        await socket.drain()

    async with serve(talk, "127.0.0.1", 0, compression=None, ping_interval=None) as server:
        print(next(iter(server.sockets)).getsockname()[1], flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


async def receive_ours(port: int) -> float:
    """Our link, consumed as sync does it. Returns messages per second."""
    import structlog

    from agent.link.realtime import realtime_link
    from agent.link.source import Received, Signal
    from agent.tokens import Tokens
    from tests.fakes.realtime import jwt

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    tokens = Tokens(jwt(time.time() + 600, time.time()))
    link = realtime_link(f"ws://127.0.0.1:{port}/realtime/v1", "key", TOPIC, tokens)
    running = asyncio.create_task(link.run())
    count, wanted = 0, COUNTS["ours"]
    began = 0.0
    while count < wanted:
        signal: Signal | None = await link.receive()
        while signal is not None:
            if isinstance(signal, Received):
                began = began or time.process_time()
                count += 1
            signal = link.receive_now()
    took = time.process_time() - began
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert link.report()["overflows"] == 0
    return wanted / took


async def receive_official(port: int) -> float:
    """The `realtime` package with a callback that only counts. Returns messages per second."""
    from realtime import AsyncRealtimeClient

    client = AsyncRealtimeClient(f"ws://127.0.0.1:{port}/realtime/v1", "key", auto_reconnect=False)
    done = asyncio.Event()
    count, wanted = 0, COUNTS["official"]
    began = 0.0

    def on_broadcast(_: Any) -> None:
        nonlocal count, began
        began = began or time.process_time()
        count += 1
        if count == wanted:
            done.set()

    channel = client.channel("project:p1")
    channel.on_broadcast("file:update", on_broadcast)
    await channel.subscribe()
    await done.wait()
    took = time.process_time() - began
    await client.close()
    return wanted / took


def measure(who: str, port: int) -> list[float]:
    """One measurement in a process of its own."""
    command = [sys.executable, "-m", "bench.cases.link", who, str(port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"bench.cases.link {who} failed:\n{done.stderr[-2000:]}")
    return [float(word) for word in done.stdout.split()[-2:]]


def run(quick: bool) -> Sequence[Row]:
    """Ours and the official client in turn."""
    command = [sys.executable, "-m", "bench.cases.link", "server"]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        contestants = {
            "ours": lambda: measure("ours", port)[0],
            "official": lambda: measure("official", port)[0],
        }
        samples = in_turn(contestants, 3 if quick else 15)
    finally:
        server.communicate("")
    ours, official = samples["ours"], samples["official"]
    return [
        Row(
            "receive + decode, 1 KB broadcasts", median(ours), "messages per core-second", "realtime",
            median(official), ratio_of(ours, official), sense="speed", at_least=5.0, samples=len(ours),
        ),
    ]  # fmt: skip


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["server"]:
            asyncio.run(serve_broadcasts())
        case ["ours", port]:
            print(asyncio.run(receive_ours(int(port))), 0)
        case ["official", port]:
            print(asyncio.run(receive_official(int(port))), 0)
        case _:
            raise SystemExit("run as: python -m bench link")
