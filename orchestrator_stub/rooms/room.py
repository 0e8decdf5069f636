"""Runs one room: does what `state` decides and sends updates to its people.

The people's messages are applied as they come; loading, saving and reading are steps of one task, which ends the room
and tells everybody when anything unforeseen happens: a debounce cannot die without a word.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable
from typing import Any, Final
from uuid import UUID

import psycopg
import structlog

from orchestrator_stub.rooms.document import (
    MOST_STATE_BYTES,
    MOST_TEXT_BYTES,
    BadMessage,
    Cursor,
    Document,
    cursor_of,
)
from orchestrator_stub.rooms.merge import splices_of
from orchestrator_stub.rooms.state import Load, Over, Read, RoomState, Save, Wait, Why
from orchestrator_stub.rooms.store import RoomStore

log = structlog.get_logger("rooms")

MOST_PEOPLE: Final = 32
"""In one room. Each key goes to all of them."""
MOST_WAITING: Final = 1_000
"""Messages for one browser that it has not taken; it joins anew after that."""
IDLE_SECONDS: Final = 30.0
"""Without anybody: a page that is loaded again finds its room."""
AWARENESS: Final = 1

Message = bytes | dict[str, Any]


class Person:
    """One browser in a room. What is to be sent waits in `out`; None ends it with `ended`."""

    def __init__(self, user: UUID) -> None:
        self.user = user
        self.out: asyncio.Queue[Message | None] = asyncio.Queue(MOST_WAITING + 1)
        self.ended: Why | str | None = None
        self.cursor: Cursor | None = None

    def send(self, message: Message) -> None:
        """Have it sent; a browser that takes too little is ended instead."""
        if self.ended is None:
            if self.out.qsize() >= MOST_WAITING:
                self.end("slow")
            else:
                self.out.put_nowait(message)

    def end(self, why: Why | str) -> None:
        """End it. What waits to be sent is sent before, but for one that is slow."""
        if self.ended is None:
            self.ended = why
            if why == "slow":
                while not self.out.empty():
                    self.out.get_nowait()
            self.out.put_nowait(None)


class Room:
    """One room. `run` is its task; the other methods are called by its people's tasks on the same loop."""

    def __init__(
        self, store: RoomStore, project_id: UUID, path: str, generation: int,
        *, idle_seconds: float = IDLE_SECONDS, clock: Callable[[], float] = time.monotonic,
        on_save: Callable[[str], None] = lambda _: None,
    ) -> None:  # fmt: skip
        self._on_save = on_save
        self.project_id = project_id
        self.path = path
        self.state = RoomState(generation)
        self.people: set[Person] = set()
        self.open = asyncio.Event()
        """Set when the text is there, or the room has ended."""
        self.why: Why | None = None
        self._store = store
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._document: Document | None = None
        self._update = b""
        self._woken = asyncio.Event()
        self._empty_since: float | None = clock()

    # --- the task

    async def run(self) -> None:
        """Live until the room is over; everybody in it is told why."""
        why: Why = "failed"
        try:
            why = await self._live()
        except asyncio.CancelledError:
            why = "stopped"
            raise
        except Exception:
            log.exception("room.failed", project_id=str(self.project_id))
        finally:
            self.why = why
            self.open.set()
            for person in list(self.people):
                person.end(why)

    async def _live(self) -> Why:
        while True:
            self._woken.clear()
            if self._empty_since is not None and self._clock() >= self._empty_since + self._idle_seconds:
                self.state.close(self._clock(), "idle")
            try:
                match self.state.next(self._clock()):
                    case Over(why):
                        return why
                    case Wait(seconds):
                        await self._wait(seconds)
                    case Load():
                        await self._load()
                    case Read():
                        await self._read()
                    case Save():
                        await self._save()
            except (psycopg.OperationalError, OSError) as error:
                self.state.unreachable(self._clock())
                log.warning("room.database_away", reason=type(error).__name__)
                self.tell({"type": "unsaved"} if self.state.dirty else {"type": "away"})

    async def _wait(self, seconds: float | None) -> None:
        if self._empty_since is not None:
            idle = max(0.0, self._empty_since + self._idle_seconds - self._clock())
            seconds = idle if seconds is None else min(seconds, idle)
        try:
            async with asyncio.timeout(seconds):
                await self._woken.wait()
        except TimeoutError:
            pass

    async def _load(self) -> None:
        file = await self._store.file(self.project_id, self.path)
        if file is None:
            self.state.end("gone")
        elif (text := shareable(file.content)) is None:
            self.state.end("unfit")
        else:
            self._document = Document(self.state.generation, text)
            self.state.loaded(file.version)
            self.open.set()

    async def _read(self) -> None:
        document = self._document
        assert document is not None
        self.state.begin_read()
        file = await self._store.file(self.project_id, self.path, self.state.version)
        if file is None:
            self.state.end("gone")
            return
        if file.version != self.state.version:
            text = shareable(file.content)
            if text is None:
                self.state.end("unfit")
                return
            splices = await asyncio.to_thread(splices_of, document.base, text)
            update = document.merge(splices)
            if update is not None:
                self._pass_on(update)
            self._announce(file.version)
        self.state.read(self._clock(), file.version, differs=document.text != document.base)

    async def _save(self) -> None:
        document = self._document
        assert document is not None
        text = ""
        if self.state.sending is None:
            text, self._update = document.pending()
            if document.text_bytes > MOST_TEXT_BYTES:
                self.state.end("too_large")  # the browsers keep it
                return
            if shareable(text) is None:
                self.state.end("unfit")
                return
            if document.state_bytes > MOST_STATE_BYTES:
                self.state.close(self._clock(), "stopped")
        sent = self.state.begin_save(text)
        answer = await self._store.save(self.project_id, self.path, self.state.generation, sent)
        self._on_save("saved" if isinstance(answer, int) else answer)
        match answer:
            case int():
                document.was_saved(self._update)
                self.state.saved(answer)
                self._announce(answer)
            case "conflict":
                self.state.conflict(self._clock())
            case "fenced":
                self.state.end("lost")
            case "nobody":
                users = sorted({person.user for person in self.people})
                members = await self._store.members(self.project_id, users)
                self.state.nobody(self._clock(), str(min(members)) if members else None)
            case "refused":
                self.state.end("refused")
        await self.check_members()

    # --- what its people do

    def join(self, person: Person) -> bool:
        """Let a browser in; False: the room is full, or over."""
        if len(self.people) >= MOST_PEOPLE or self.why is not None or self._document is None:
            return False
        self.people.add(person)
        self._empty_since = None
        self.state.reopened()
        self._woken.set()
        person.send({
            "type": "welcome", "generation": self.state.generation, "root": self._document.root,
            "version": self.state.version, "loaded": self.state.loaded_version,
            "snapshot": base64.b64encode(self._document.snapshot()).decode(),
        })  # fmt: skip
        person.send(self._document.greeting())
        for other in self.people:
            if other.cursor is not None and other.cursor.state is not None:
                person.send(other.cursor.message())
        return True

    def leave(self, person: Person) -> None:
        """A browser went."""
        if person not in self.people:
            return
        self.people.discard(person)
        if person.cursor is not None:
            self._pass_on(Cursor(person.cursor.client_id, person.cursor.clock + 1).message())
        if not self.people:
            self._empty_since = self._clock()
            self._woken.set()

    def heard(self, person: Person, message: bytes) -> None:
        """Take a message. Raises `BadMessage`."""
        assert self._document is not None
        if message[:1] == bytes([AWARENESS]):
            self._moved(person, cursor_of(message, {"id": str(person.user)}))
            return
        handled = self._document.handle(message)
        if handled.reply is not None:
            person.send(handled.reply)
        if handled.others is not None:
            self._pass_on(handled.others, but=person)
        if handled.changed:
            self.state.edited(self._clock(), str(person.user))
            self._woken.set()

    def _moved(self, person: Person, cursor: Cursor) -> None:
        if person.cursor is None and any(
            other.cursor is not None and other.cursor.client_id == cursor.client_id for other in self.people
        ):
            raise BadMessage
        if person.cursor is not None and person.cursor.client_id != cursor.client_id:
            return  # it repeats what it heard of others
        person.cursor = cursor
        self._pass_on(cursor.message(), but=person)

    # --- what others do

    def outside(self) -> None:
        """Somebody may have saved the file past the room."""
        self.state.outside()
        self._woken.set()

    def lost(self) -> None:
        """Another orchestrator has the room now."""
        self.state.end("lost")
        self._woken.set()

    def close(self) -> None:
        """Save what is left, and end."""
        self.state.close(self._clock(), "stopped")
        self._woken.set()

    async def check_members(self) -> None:
        """End those who may not write any more."""
        users = list({person.user for person in self.people})
        if users:
            members = await self._store.members(self.project_id, users)
            for person in list(self.people):
                if person.user in users and person.user not in members:
                    person.end("removed")
                    self.leave(person)

    def tell(self, message: dict[str, Any]) -> None:
        """Tell everybody, in words and not in Yjs."""
        for person in list(self.people):
            person.send(message)

    def _announce(self, version: int) -> None:
        """What the file's version is; the snapshot says which text of the document that was."""
        assert self._document is not None
        snapshot = base64.b64encode(self._document.snapshot()).decode()
        self.tell({"type": "saved", "version": version, "snapshot": snapshot})

    def _pass_on(self, message: bytes, but: Person | None = None) -> None:
        for person in list(self.people):
            if person is not but:
                person.send(message)


def shareable(content: str | None) -> str | None:
    """The text if it can be shared. Editors count a line's end as one character, so one of two cannot be."""
    if content is None or "\r" in content or len(content.encode()) > MOST_TEXT_BYTES:
        return None
    return content
