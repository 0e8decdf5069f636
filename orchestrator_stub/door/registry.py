"""Caches what stands behind each label for at most a second, and closes connections that are no longer allowed.

Every exchange that is open (a request under way, a socket after a 101) is held here under its label, with why it was
let in. All labels in use are asked for again every second, and at once when the database says that something changed
(`LISTEN`); whatever is not allowed any more is aborted then. What has not been heard of for `STALE_SECONDS` lets nobody
in and is aborted too: a door that cannot ask fails closed. Which sessions are looked at is noted for whoever puts the
idle ones to sleep.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Final
from uuid import UUID

import psycopg
import structlog
import tenacity

from orchestrator_stub.door.decision import Grant, Standing
from orchestrator_stub.door.store import CHANNEL, DoorStore

log = structlog.get_logger("door")

POLL_SECONDS: Final = 1.0
STALE_SECONDS: Final = 5.0
QUERY_SECONDS: Final = 2.0
"""For one query: above a busy database's slowest, and two of them below `STALE_SECONDS`."""
AT_ONCE: Final = 1_000
"""Labels in one query."""
NOBODYS_MOST: Final = 10_000
"""Labels that are remembered as nobody's, for `POLL_SECONDS`: one is 96 random bits, which nobody asks for by chance
before it is given."""
VIEWED_SECONDS: Final = 30.0
"""Between two notes that a session is looked at; below what is set as idle, which is minutes."""
KEPT_SECONDS: Final = 60.0
"""A label is followed for so long after its last request."""
MOST_HELD: Final = 500
"""Exchanges of one label: some eighty browsers, six connections each."""
GAP_SECONDS: Final = 0.05
"""Between two polls, however much changes."""


class Away(Exception):
    """The database does not say what stands behind the label."""


@dataclass(slots=True)
class _Question:
    """Labels that are asked for together, and the task that asks."""

    labels: set[str]
    asking: asyncio.Task[None]


class TooMany(Exception):
    """As many exchanges of the label are open as may be."""


@dataclass(slots=True)
class _Entry:
    standing: Standing | None
    at: float
    """When it was asked for (monotonic)."""
    used: float


@dataclass(eq=False, slots=True)
class Held:
    """One open exchange: why it was let in, and how it is ended."""

    grant: Grant
    abort: Callable[[], None]


class Registry:
    """What stands behind labels. `run` until cancelled; `open` as `Address.open`.

    `on_closed` is told of each exchange that is aborted because it is no longer allowed.
    """

    def __init__(
        self,
        store: DoorStore,
        dsn: str,
        *,
        open: bool = False,
        on_closed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._dsn = dsn
        self._open = open
        self._on_closed = on_closed
        self._clock = clock
        self._now = now
        self._entries: dict[str, _Entry] = {}
        self._nobodys: dict[str, float] = {}
        """Labels that were nobody's, and when that was asked; the oldest first."""
        self._next: _Question | None = None
        self._one_question = asyncio.Lock()
        self._viewed: set[UUID] = set()
        """Sessions that somebody was let into since the last note."""
        self._held: defaultdict[str, set[Held]] = defaultdict(set)
        self._changed = asyncio.Event()
        self._heard = 0.0
        """When the database last answered."""

    @property
    def fresh(self) -> bool:
        """Whether the database has answered lately."""
        return self._clock() - self._heard <= STALE_SECONDS

    async def of(self, label: str) -> Standing | None:
        """What stands behind a label; None: it is nobody's. Raises `Away`."""
        entry = self._entries.get(label)
        if entry is None and self._clock() - self._nobodys.get(label, -POLL_SECONDS) < POLL_SECONDS:
            return None
        if entry is None or self._stale(entry):
            try:
                # One that leaves does not take the answer from the others.
                await asyncio.shield(self._ask_with(label))
            except (psycopg.Error, OSError) as error:
                raise Away from error
            entry = self._entries.get(label)
            if entry is None:
                return None
        entry.used = self._clock()
        return entry.standing

    def _ask_with(self, label: str) -> asyncio.Task[None]:
        """Ask for a label together with all that come before the question goes out: one is under way at a time.

        So names that are guessed cost the database no more queries than one after the other. Raises `Away`.
        """
        question = self._next
        if question is None:
            asking = asyncio.create_task(self._ask_next(), name="door labels")
            asking.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left
            question = self._next = _Question(set(), asking)
        if len(question.labels) >= AT_ONCE:
            raise Away
        question.labels.add(label)
        return question.asking

    async def _ask_next(self) -> None:
        async with self._one_question:
            question, self._next = self._next, None
            assert question is not None
            await self._ask(list(question.labels))

    async def anew(self, label: str) -> Standing | None:
        """The same, asked for now: for who shows something newer than what is known. Raises `Away`."""
        try:
            await self._ask([label])
        except (psycopg.Error, OSError) as error:
            raise Away from error
        entry = self._entries.get(label)
        return entry.standing if entry else None

    @contextmanager
    def hold(self, label: str, grant: Grant, abort: Callable[[], None]) -> Iterator[None]:
        """Have `abort` called when the grant ends while the block runs. Raises `TooMany`."""
        if len(self._held[label]) >= MOST_HELD:
            raise TooMany
        self._viewed.add(grant.session_id)
        held = Held(grant, abort)
        self._held[label].add(held)
        try:
            yield
        finally:
            self._held[label].discard(held)
            if not self._held[label]:
                del self._held[label]

    async def run(self) -> None:
        """Follow what changes, for ever."""
        self._changed.set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._poll(), name="door poll")
            tasks.create_task(self._listen(), name="door listen")
            tasks.create_task(self._watch(), name="door watch")
            tasks.create_task(self._note_views(), name="door views")

    async def _poll(self) -> None:
        while True:
            try:
                async with asyncio.timeout(POLL_SECONDS):
                    await self._changed.wait()
                    await asyncio.sleep(GAP_SECONDS)
            except TimeoutError:
                pass
            self._changed.clear()
            now = self._clock()
            for label, entry in list(self._entries.items()):
                if label not in self._held and entry.used + KEPT_SECONDS < now:
                    del self._entries[label]
            try:
                labels = iter(list(self._entries))
                await self._ask(
                    list(islice(labels, AT_ONCE))
                )  # also of none: it says that the database is there
                while more := list(islice(labels, AT_ONCE)):
                    await self._ask(more)
            except (psycopg.Error, OSError) as error:
                log.warning("door.database_lost", reason=type(error).__name__)

    async def _ask(self, labels: Sequence[str]) -> None:
        asked = self._clock()
        async with asyncio.timeout(QUERY_SECONDS):
            found = await self._store.standing(labels)
        self._heard = asked
        self._take(labels, found, asked)

    def _take(self, labels: Sequence[str], found: Mapping[str, Standing], asked: float) -> None:
        for label in labels:
            known = self._entries.get(label)
            if known is not None and known.at > asked:
                continue  # answered by a later question
            self._nobodys.pop(label, None)
            if label in found or label in self._held:
                used = known.used if known else asked
                self._entries[label] = _Entry(found.get(label), asked, used)
            else:
                self._entries.pop(label, None)
                self._nobodys[label] = asked
            for held in list(self._held.get(label, ())):
                if not held.grant.holds(found.get(label) or (), self._now(), open=self._open):
                    self._end(held)

        while len(self._nobodys) > NOBODYS_MOST:
            del self._nobodys[next(iter(self._nobodys))]

    async def _note_views(self) -> None:
        """Note which sessions are looked at: somebody was let in since the last note, or has something open still."""
        while True:
            await asyncio.sleep(VIEWED_SECONDS)
            seen, self._viewed = self._viewed, set()
            seen |= {each.grant.session_id for held in self._held.values() for each in held}
            try:
                if seen:
                    await self._store.viewed(list(seen))
            except (psycopg.Error, OSError) as error:
                self._viewed |= seen
                log.warning("door.view_not_noted", reason=type(error).__name__)

    async def _watch(self) -> None:
        """End what has not been heard of for too long."""
        while True:
            await asyncio.sleep(STALE_SECONDS / 10)
            for label, held in list(self._held.items()):
                entry = self._entries.get(label)
                if entry is None or self._stale(entry):
                    for each in list(held):
                        self._end(each)

    async def _listen(self) -> None:
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((psycopg.Error, OSError)),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=15),
        ):
            with attempt:
                async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as listener:
                    await listener.execute(f"listen {CHANNEL}".encode())
                    async for _ in listener.notifies():
                        self._changed.set()

    def _stale(self, entry: _Entry) -> bool:
        return self._clock() - entry.at > STALE_SECONDS

    def _end(self, held: Held) -> None:
        held.abort()
        self._on_closed()
