"""Serves one browser in a room, from its code to its last message. What ends it is said in the close of the socket."""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Final
from uuid import UUID

import psycopg
import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect

from orchestrator_stub.rooms.document import MOST_TEXT_BYTES, BadMessage
from orchestrator_stub.rooms.room import Person, Room
from orchestrator_stub.rooms.store import digest_of

if TYPE_CHECKING:
    from orchestrator_stub.rooms.service import Rooms

log = structlog.get_logger("rooms")

MOST_MESSAGE_BYTES: Final = 2 * MOST_TEXT_BYTES
"""A paste of the largest text, and what Yjs says around it."""
MESSAGES_A_SECOND: Final = 100.0
"""Of one browser; a person's keys and cursor are some thirty."""
BURST: Final = 400.0
SEND_SECONDS: Final = 20.0
"""For a browser to take one message."""
QUIET_SECONDS: Final = 60.0
"""Without a word. A browser repeats its cursor every 15 s."""

CLOSES: Final = {
    "code": 4401, "removed": 4403, "gone": 4404, "elsewhere": 4409, "lost": 4409,
    "unfit": 4413, "refused": 4413, "too_large": 4413, "bad": 4400,
    "fast": 4429, "slow": 4429, "full": 4429, "quiet": 4408,
    "idle": 4503, "stopped": 4503, "unsaved": 4503, "unreachable": 4503, "failed": 4500,
}  # fmt: skip
"""Codes of the close, by why. 4400, 4401, 4408, 4409, 4429 and 4503: come again with another code · 4403: you may not ·
4404, 4413 and 4500: edit without a room."""


async def serve(rooms: Rooms, socket: WebSocket, project_id: UUID, path: str, code: str) -> None:
    """Serve one browser. Whatever the database does, it is told."""
    await socket.accept()
    try:
        user = await rooms.store.take_code(digest_of(code), project_id, path)
        if user is None or user not in await rooms.store.members(project_id, [user]):
            await _close(socket, "code")
            return
        room = await rooms.enter(project_id, path)
    except (psycopg.Error, OSError) as error:
        log.warning("rooms.database_away", reason=type(error).__name__)
        await _close(socket, "unreachable")
        return
    if not isinstance(room, Room):
        await _close(socket, "elsewhere" if room is not None else "full")
        return
    person = Person(user)
    if not room.join(person):
        await _close(socket, room.why or "full")
        return
    hearing = asyncio.create_task(_hear(socket, room, person), name="room hears")
    sending = asyncio.create_task(_send(socket, person), name="room sends")
    try:
        await asyncio.wait([hearing, sending], return_when=asyncio.FIRST_COMPLETED)
        if not sending.done() and person.ended is not None:
            await asyncio.wait([sending], timeout=SEND_SECONDS)
    finally:
        room.leave(person)
        for task in (hearing, sending):
            task.cancel()
        await asyncio.gather(hearing, sending, return_exceptions=True)


async def _close(socket: WebSocket, why: str) -> None:
    try:
        async with asyncio.timeout(SEND_SECONDS):
            await socket.close(CLOSES[why], why)
    except (RuntimeError, OSError, WebSocketDisconnect):
        pass  # it has gone


async def _send(socket: WebSocket, person: Person) -> None:
    """Send what waits, then the close."""
    try:
        while (message := await person.out.get()) is not None:
            async with asyncio.timeout(SEND_SECONDS):
                if isinstance(message, bytes):
                    await socket.send_bytes(message)
                else:
                    await socket.send_text(json.dumps(message))
    except (RuntimeError, OSError, WebSocketDisconnect):  # a TimeoutError is an OSError
        return
    assert person.ended is not None
    await _close(socket, person.ended)


async def _hear(socket: WebSocket, room: Room, person: Person) -> None:
    """Take what comes, within bounds."""
    left, since = BURST, time.monotonic()
    try:
        while person.ended is None:
            async with asyncio.timeout(QUIET_SECONDS):
                message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            data = message.get("bytes")
            now = time.monotonic()
            left, since = min(BURST, left + (now - since) * MESSAGES_A_SECOND) - 1, now
            if left < 0:
                person.end("fast")
            elif data is None or len(data) > MOST_MESSAGE_BYTES:
                person.end("bad")
            elif person.ended is None and room.why is None:
                room.heard(person, data)
    except TimeoutError:
        person.end("quiet")
    except BadMessage:
        person.end("bad")
    except (RuntimeError, OSError, WebSocketDisconnect):
        return
