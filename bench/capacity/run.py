"""Measures at each size, then each kind of request by itself, then the storms.

What is measured is kept as it is; `report` judges it and carries it on.
"""

from __future__ import annotations

import asyncio
import random
import resource
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import psycopg

from bench.capacity.estimate import Size
from bench.capacity.measure import Used, read
from bench.capacity.sessions import (
    HEARTBEAT,
    SAVES,
    Crowd,
    LightSession,
    editor,
    save,
    save_turn,
    until_joined,
)
from bench.capacity.stack import Stack, running
from bench.harness.machine import Others

ONE_THREAD: Final = ("orchestrator", "realtime")
"""Processes that wait for themselves when they are busy; PostgreSQL has as many as it has connections."""

FOLLOWS: Final = 0.3
"""Seconds after the last request for what follows from it: a save is delivered, and reported twice."""

LOST: Final = 3
"""Every so-manieth session loses its socket in a storm: a node of three."""


@dataclass(frozen=True, slots=True)
class Profile:
    """How long and how large. Seconds.

    settle: Between the last join and the first window. window: One; `windows` of them at each size. each: Requests of
    one block of a kind, `blocks` of them.
    """

    sizes: tuple[int, ...] = (500, 1_000, 2_000, 4_000)
    settle: float = 20.0
    window: float = 15.0
    windows: int = 6
    each: int = 100
    blocks: int = 6


WHOLE: Final = Profile()
QUICK: Final = Profile((100, 200, 300, 400), settle=2.0, window=4.0, windows=4, each=25, blocks=3)


@dataclass
class Measured:
    """All that was measured.

    windows: (sessions, what was used in one window). memory: (sessions, bytes by process). kinds: what one request
    took, by kind, for each block of them. storms: what was used for each session, by name.
    """

    sizes: list[Size] = field(default_factory=list)
    windows: list[tuple[int, Used]] = field(default_factory=list)
    memory: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    kinds: dict[str, list[Used]] = field(default_factory=dict)
    storms: dict[str, Used] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Run:
    """One run of a profile; `say` is told how far it is."""

    def __init__(self, stack: Stack, profile: Profile, say: Callable[[str], None]) -> None:
        self._stack = stack
        self._profile = profile
        self._say = say
        self._crowd = Crowd(stack)
        self._admin = psycopg.connect(stack.dsn, autocommit=True)
        self.measured = Measured()

    async def all(self) -> Measured:
        """Measure. Raises `TimeoutError` when sessions do not join."""
        try:
            for size in self._profile.sizes:
                await self._size(size)
            self._crowd.beating.clear()
            self.measured.failures = {k: n for k, n in self._crowd.done.items() if k.startswith("failed")}
            await self._kinds()
            await self._storms()
        finally:
            await self._crowd.close()
            self._admin.close()
        return self.measured

    async def _size(self, size: int) -> None:
        profile, done = self._profile, self._crowd.done
        self._say(f"{size} sessions join")
        await self._crowd.grow_to(size)
        self._crowd.edit()
        await asyncio.sleep(profile.settle)
        others, windows = Others(), []
        before, first = self._read(), Counter(done)
        memory = before.memory
        for _ in range(profile.windows):
            await asyncio.sleep(profile.window)
            after = self._read()
            windows.append(Used.between(before, after))
            before, memory = after, after.memory
        taken = others.share()
        await self._crowd.rest()
        seconds = sum(each.seconds for each in windows)
        busy = {name: sum(each.cpu[name] for each in windows) / seconds for name in ONE_THREAD}
        did = Counter(done)
        did.subtract(first)
        # All that is due: the beats of every session, and the saves.
        due = size * seconds * (1 / HEARTBEAT + SAVES)
        late = max(0.0, 1 - (did["heartbeats"] + did["saves"] + did["turns"]) / due)
        # By chance alone a small number of saves is off by more than is allowed for.
        late = max(0.0, late - 3 / due**0.5)
        self.measured.sizes.append(Size(size, taken, busy, late))
        self.measured.windows += [(size, each) for each in windows]
        self.measured.memory.append((size, dict(memory)))
        self._say(
            f"{size} sessions: {did['heartbeats']} heartbeats, {did['reports']} reports, {did['saves']} saves,"
            f" {did['turns']} turns in {seconds:.0f} s; "
            + ", ".join(f"{name} {share:.0%} busy" for name, share in busy.items())
            + f"; others took {taken:.0%}"
        )

    async def _kinds(self) -> None:
        """Each kind of request by itself, one after the other on a few connections, and what the rest takes off."""
        sessions = self._crowd.sessions
        await _one_by_one(sessions, LightSession.beat)  # of everybody is remembered what can be
        async with await editor(self._stack) as connection:

            def project() -> Any:
                return random.choice(self._stack.rows).project_id

            kinds: dict[str, Callable[[LightSession], Awaitable[object]]] = {
                "heartbeat": LightSession.beat,
                "report of a save": LightSession.report_save,
                "sync, nothing missed": LightSession.sync,
                "token renewed": lambda session: session.api.renew_token(),
                "save of 2 KB, delivered": lambda _: save(connection, project()),
                "turn of 40 files, delivered": lambda _: save_turn(connection, project()),
            }
            for kind, ask in kinds.items():
                self._say(f"each by itself: {kind}")
                for _ in range(self._profile.blocks):
                    some = random.choices(sessions, k=self._profile.each)
                    used = await self._used(partial(_one_by_one, some, ask))
                    self.measured.kinds.setdefault(kind, []).append(_each(used, len(some)))

    async def _storms(self) -> None:
        """Sockets that are lost at once, and an orchestrator that begins anew; what each session of them takes."""
        sessions = self._crowd.sessions
        lost = sessions[::LOST]
        self._say(f"storm: {len(lost)} of {len(sessions)} lose their sockets")

        async def rejoin() -> None:
            for session in lost:
                session.lose_socket()
            await asyncio.sleep(0.1)
            await until_joined(lost)
            await asyncio.sleep(2.0)  # what a join asks afterwards

        self.measured.storms["socket lost, joined again"] = _each(await self._used(rejoin), len(lost))
        self._say("storm: the orchestrator begins anew, and hears of everybody")
        await self._stack.orchestrator.stop()
        await self._stack.orchestrator.start()
        used = await self._used(lambda: _one_by_one(sessions, LightSession.beat))
        self.measured.storms["first heartbeat to a new orchestrator"] = _each(used, len(sessions))

    async def _used(self, work: Callable[[], Awaitable[object]]) -> Used:
        before = self._read()
        await work()
        return Used.between(before, self._read())

    def _read(self) -> Any:
        return read(self._stack.pids, self._admin)


async def _one_by_one(
    sessions: Sequence[LightSession], ask: Callable[[LightSession], Awaitable[object]], connections: int = 8
) -> None:
    """Ask of each, so many at a time."""
    todo = iter(sessions)

    async def work() -> None:
        for session in todo:
            await ask(session)

    await asyncio.gather(*(work() for _ in range(connections)))
    await asyncio.sleep(FOLLOWS)


def _each(used: Used, count: int) -> Used:
    return Used(used.seconds / count, {k: v / count for k, v in used.cpu.items()}, round(used.wal / count))


async def measure(place: Path, profile: Profile, say: Callable[[str], None]) -> Measured:
    """Start it all, measure, stop it all. Raises `CannotRun`, `EmbeddedPostgresError`, `TimeoutError`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (hard, hard)
    )  # a socket for each session, and its children inherit it
    began = time.monotonic()
    try:
        async with running(place) as stack:
            say(f"up after {time.monotonic() - began:.0f} s")
            return await Run(stack, profile, say).all()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
