"""Measures from an event on the wire to the file on disk against a bare websocket round trip of one frame.

The agent's own link, loop, disk and ledger run against a websocket server on loopback; the round trip goes over the
same library. What other programs take for the same is in `bench.cases.mirror`.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from websockets.asyncio.client import connect

from bench.harness.following import Loop, running
from bench.harness.results import Row, ratio_of

SIZE = 1_000


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


def run(quick: bool = False) -> Sequence[Row]:
    """p50 and p99 of an event, against a round trip."""
    with tempfile.TemporaryDirectory(prefix="bench-sync-") as name:
        return latency(quick, Path(name))
