"""Keeps the rooms of this process: opens them under a lease, prolongs it, and tells them of saves by others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from uuid import UUID, uuid4

import psycopg
import structlog
import tenacity
from prometheus_client import CollectorRegistry, Counter, Gauge
from starlette.websockets import WebSocket

from orchestrator_stub.platform.database import Pool
from orchestrator_stub.rooms import connection
from orchestrator_stub.rooms.room import IDLE_SECONDS, Room
from orchestrator_stub.rooms.state import CLOSE_SECONDS
from orchestrator_stub.rooms.store import CHANNEL, LEASE_SECONDS, RoomStore

log = structlog.get_logger("rooms")

MOST_ROOMS: Final = 1_000
"""Of one process: some 60 KB each for a file of 20 KB."""
MEMBER_SECONDS: Final = 20.0
"""Between two looks at who may still be in: with what else is in a turn, below thirty."""

AGAIN_SECONDS: Final = 1.0

Key = tuple[UUID, str]


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Another orchestrator has the room; a browser reaches it at `address`."""

    address: str


class Rooms:
    """The rooms of one process. `run` keeps them until it is cancelled; `close` saves and gives them up."""

    def __init__(
        self, dsn: str, pool: Pool, address: str, *, lease_seconds: float = LEASE_SECONDS,
        member_seconds: float = MEMBER_SECONDS, idle_seconds: float = IDLE_SECONDS,
        clock: Callable[[], float] = time.monotonic, registry: CollectorRegistry | None = None,
    ) -> None:  # fmt: skip
        """Make it.

        Args:
            dsn: For LISTEN, which needs a connection with a session of its own.
            pool: For everything else.
            address: How a browser reaches this process, as `https://rooms-1.example.com`.
            lease_seconds: After which others may have a room of ours that was not prolonged.
            member_seconds: Between two looks at who may still be in.
            idle_seconds: After which a room without people ends.
            clock: Monotonic, seconds.
            registry: Where the metrics go.
        """
        self.store = RoomStore(pool, uuid4(), address, lease_seconds)
        self._dsn = dsn
        self._lease_seconds = lease_seconds
        self._member_seconds = member_seconds
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._rooms: dict[Key, Room] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._claiming = asyncio.Lock()
        self._closed = False
        prefix = "preview_orchestrator_room"
        self._saves = Counter(
            f"{prefix}_saves",
            "Saves of rooms, by what the database answered.",
            ["outcome"],
            registry=registry,
        )
        counted = Gauge(f"{prefix}s_open", "Rooms open in this process.", registry=registry)
        counted.set_function(lambda: len(self._rooms))
        people = Gauge(f"{prefix}_members", "Browsers in the rooms of this process.", registry=registry)
        people.set_function(lambda: sum(len(room.people) for room in self.rooms))

    @property
    def rooms(self) -> list[Room]:
        """Those that are open."""
        return list(self._rooms.values())

    async def run(self) -> None:
        """Prolong leases, look after members, and listen, for ever. A bug in one is logged, and both begin anew."""
        while True:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._upkeep(), name="rooms upkeep")
                    group.create_task(self._listen(), name="rooms listen")
            except Exception:
                log.exception("rooms.failed")
                await asyncio.sleep(AGAIN_SECONDS)

    async def enter(self, project_id: UUID, path: str) -> Room | Elsewhere | None:
        """The file's room, opened if nobody has it; None: there can be none now."""
        key = (project_id, path)
        async with self._claiming:
            room = self._rooms.get(key)
            if room is None:
                if self._closed or len(self._rooms) >= MOST_ROOMS:
                    return None
                claim = await self.store.claim(project_id, path)
                if claim is None:
                    return None
                if claim.server != self.store.server:
                    return Elsewhere(claim.address)
                room = Room(
                    self.store, project_id, path, claim.generation,
                    idle_seconds=self._idle_seconds, clock=self._clock, on_save=self._count_save,
                )  # fmt: skip
                self._rooms[key] = room
                task = asyncio.create_task(self._host(key, room), name="room")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        await room.open.wait()
        return room

    def _count_save(self, outcome: str) -> None:
        self._saves.labels(outcome).inc()

    async def serve(self, socket: WebSocket, project_id: UUID, path: str, code: str) -> None:
        """Serve one browser until it goes or the room ends."""
        await connection.serve(self, socket, project_id, path, code)

    async def close(self) -> None:
        """Save what is left and give the rooms up, within `CLOSE_SECONDS`."""
        self._closed = True
        for room in self.rooms:
            room.close()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=CLOSE_SECONDS + 1)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _host(self, key: Key, room: Room) -> None:
        try:
            await room.run()
        finally:
            del self._rooms[key]
        log.info("room.over", project_id=str(room.project_id), generation=room.state.generation, why=room.why)
        with suppress(psycopg.Error, OSError):  # the lease ends by itself
            await self.store.leave(room.state.generation)

    async def _upkeep(self) -> None:
        looked = self._clock()
        while True:
            await asyncio.sleep(min(self._lease_seconds / 3, self._member_seconds))
            try:
                await self._renew()
                if self._clock() - looked >= self._member_seconds:
                    for room in self.rooms:
                        await room.check_members()
                    looked = self._clock()
            except (psycopg.Error, OSError) as error:
                log.warning("rooms.database_away", reason=type(error).__name__)

    async def _renew(self) -> None:
        """A room whose lease somebody else has by now is theirs; while the database is away it is still ours."""
        rooms = self.rooms
        if rooms:
            kept = await self.store.renew([room.state.generation for room in rooms])
            for room in rooms:
                if room.state.generation not in kept:
                    room.lost()

    async def _listen(self) -> None:
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((psycopg.Error, OSError)),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=15),
            before_sleep=lambda state: log.warning("rooms.database_lost"),
        ):
            with attempt:
                async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as listener:
                    await listener.execute(f"listen {CHANNEL}".encode())
                    self._heard(None)
                    async for notice in listener.notifies():
                        self._heard(notice.payload)

    def _heard(self, project: str | None) -> None:
        """Somebody saved in a project, or may have in any while nobody listened."""
        for room in self.rooms:
            if project is None or str(room.project_id) == project:
                room.outside()
