"""Answers what is on the screen of a session: what its agent said last, and what becomes of a revision.

An agent's status is its word, and the errors in it are the project's: a form is read out of it, and what does not fit
is left out. Whoever waits shares one LISTEN of this process and reads again when it is woken, or after two seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal
from uuid import UUID

import psycopg
import structlog
import tenacity

from orchestrator_stub.platform.recent import Recent
from orchestrator_stub.sessions.lifecycle import ENDED, Session
from orchestrator_stub.sessions.store import SessionStore

log = structlog.get_logger("shown")

CHANNEL: Final = "preview_shown"
REREAD_SECONDS: Final = 2.0
"""For a wake that was lost, and a session that ended meanwhile."""
MOST_WAITERS: Final = 4
"""Of one session, in this process."""

Outcome = Literal["shown", "error", "no_viewer", "applied", "behind"]


class TooManyWaiters(Exception):
    """As many as may already wait for the session."""


@dataclass(frozen=True, slots=True)
class Screen:
    """What an agent said last. `age`: seconds since then. `checked`: the revision whose modules can be built."""

    epoch: str | None
    applied: int
    observed: bool
    checked: int
    shown: Mapping[str, Any] | None
    errors: tuple[Mapping[str, Any], ...]
    agent: Mapping[str, object]
    """Its state, its link's and the dev server's, its problems, and when which part of its start was done."""
    age: float

    @property
    def failed(self) -> bool:
        """Whether an error is open; what the console says is none."""
        return any(error.get("kind") != "console" for error in self.errors)

    def form(self) -> dict[str, object]:
        """As it travels."""
        return {"applied": self.applied, "shown": self.shown, "errors": list(self.errors)}


def read_screen(status: Mapping[str, Any] | None, age: float) -> Screen:
    """Read the screen out of a status, whatever it is."""
    said = status or {}
    shown = said.get("shown")
    shown = shown if isinstance(shown, dict) and _whole(shown.get("revision")) is not None else None
    errors = said.get("errors")
    kept = tuple(each for each in errors if isinstance(each, dict)) if isinstance(errors, list) else ()
    epoch = said.get("epoch")
    return Screen(
        epoch if isinstance(epoch, str) else None,
        _whole(said.get("revision")) or 0,
        said.get("observed") is True,
        _whole(said.get("checked")) or 0,
        shown,
        kept,
        _agent(said),
        age,
    )


def _agent(said: Mapping[str, Any]) -> Mapping[str, object]:
    states = {key: said.get(key) for key in ("state", "link", "dev_server")}
    start, problems = said.get("start"), said.get("problems")
    ends = start.items() if isinstance(start, dict) else ()
    return {
        **{key: state if isinstance(state, str) else None for key, state in states.items()},
        "start": {part: end for part, end in ends if isinstance(end, int | float)},
        "problems": [each for each in problems if isinstance(each, dict)]
        if isinstance(problems, list)
        else [],
    }


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def viewers(status: Mapping[str, Any] | None) -> int | None:
    """Count the open pages of a preview; None: nobody knows, as where the dev server is not observed."""
    screen = read_screen(status, 0.0)
    if not screen.observed:
        return None
    pages = screen.shown.get("pages") if screen.shown else None
    if not isinstance(pages, dict):
        return 0
    return sum(_whole(pages.get(each)) or 0 for each in ("visible", "hidden"))


def judge(screen: Screen, epoch: str | None, revision: int) -> tuple[Outcome, bool]:
    """Say what became of a revision, and whether that is the end of it; `shown` ends after a quiet time."""
    if screen.applied < revision or (epoch is not None and epoch != screen.epoch):
        return "behind", False
    seen = screen.shown["revision"] if screen.shown else -1
    for error in screen.errors:
        # An older error counts when it is still there at the revision: its module was checked, or its page has painted.
        # A page that could not load a module is loaded anew within a second, and then says something newer.
        at = {"build": screen.checked, "module": -1}.get(str(error.get("kind")), seen)
        known = at >= revision
        if error.get("kind") != "console" and (known or (_whole(error.get("revision")) or 0) >= revision):
            return "error", True
    if seen >= revision and not screen.failed:
        return "shown", True
    if screen.shown is None and screen.observed and screen.checked >= revision:
        return "no_viewer", True
    return "applied", False


class Screens:
    """The screens of all sessions. `run` listens until cancelled; without it waiting is only slower."""

    def __init__(self, dsn: str, store: SessionStore, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Make it.

        Args:
            dsn: For LISTEN, which needs a connection with a session of its own.
            store: Where the sessions are.
            clock: Monotonic, seconds.
        """
        self._dsn = dsn
        self._store = store
        self._clock = clock
        self._waiting: defaultdict[UUID, set[asyncio.Event]] = defaultdict(set)
        self._told: Recent[UUID, object] = Recent()
        self._telling: dict[UUID, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Wake waiters for ever. While the database is away, retry."""
        async for attempt in tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type((psycopg.Error, OSError)),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=15),
            before_sleep=lambda state: log.warning("shown.database_lost"),
        ):
            with attempt:
                async with await psycopg.AsyncConnection.connect(self._dsn, autocommit=True) as listener:
                    await listener.execute(f"listen {CHANNEL}".encode())
                    async for notice in listener.notifies():
                        for event in self._waiting.get(_uuid(notice.payload), ()):
                            event.set()

    def waiting(self, session_id: UUID) -> int:
        """How many requests wait for the session."""
        return len(self._waiting.get(session_id, ()))

    async def close(self) -> None:
        """Stop telling."""
        for task in self._telling.values():
            task.cancel()
        await asyncio.gather(*self._telling.values(), return_exceptions=True)

    def heard(self, session_id: UUID, status: Mapping[str, Any]) -> None:
        """A status was kept: tell members, now and when they were told too lately, if it is news."""
        screen = read_screen(status, 0.0)
        failed = sum(error.get("kind") != "console" for error in screen.errors)
        news = (screen.applied, screen.shown and screen.shown["revision"], failed)
        if self._told.get(session_id) == news:
            return
        self._told.put(session_id, news)
        if session_id not in self._telling:
            task = asyncio.create_task(self._tell(session_id), name=f"tell-{session_id}")
            self._telling[session_id] = task
            task.add_done_callback(lambda _: self._telling.pop(session_id, None))

    async def _tell(self, session_id: UUID) -> None:
        try:
            told = None
            while told != self._told.get(session_id):
                told = self._told.get(session_id)
                wait = 1.0
                while wait > 0:
                    wait = await self._store.tell_shown(session_id)
                    await asyncio.sleep(wait)
        except (psycopg.Error, OSError) as error:
            self._told.pop(session_id)
            log.warning("shown.not_told", session_id=str(session_id), reason=type(error).__name__)

    async def now(self, session_id: UUID) -> tuple[Session, Screen] | None:
        """The session and what is on its screen; None: there is no such session."""
        found = await self._store.screen(session_id)
        return found and (found[0], read_screen(found[1], found[2]))

    async def wait(
        self, session_id: UUID, *, epoch: str | None, revision: int, seconds: float, quiet: float
    ) -> tuple[Session, Outcome, Screen] | None:
        """Wait until it is known what became of `revision`, at most `seconds`.

        Args:
            session_id: Whose screen.
            epoch: The revision's history; None: any.
            revision: The one that is waited for, or a later one.
            seconds: At most.
            quiet: Seconds without an error after which a shown revision counts as shown.

        Returns:
            The session, which may have ended meanwhile, what became of the revision, and the screen. None: no such
            session.

        Raises:
            TooManyWaiters: `MOST_WAITERS` wait for this session.
        """
        deadline = self._clock() + seconds
        shown_since: float | None = None
        with self._woken(session_id) as event:
            while True:
                event.clear()
                found = await self.now(session_id)
                if found is None:
                    return None
                session, screen = found
                outcome, known = judge(screen, epoch, revision)
                now = self._clock()
                rest = deadline - now
                if outcome == "shown":
                    shown_since = now - screen.age if shown_since is None else shown_since
                    still = quiet - (now - shown_since)
                    known, rest = still <= 0 or rest <= 0, min(rest, still)
                else:
                    shown_since = None
                if known or rest <= 0 or session.state in ENDED:
                    return session, outcome, screen
                try:
                    async with asyncio.timeout(min(rest, REREAD_SECONDS)):
                        await event.wait()
                except TimeoutError:
                    pass

    @contextmanager
    def _woken(self, session_id: UUID) -> Iterator[asyncio.Event]:
        """An event that is set when something of the session's screen changes."""
        if self.waiting(session_id) >= MOST_WAITERS:
            raise TooManyWaiters
        event = asyncio.Event()
        self._waiting[session_id].add(event)
        try:
            yield event
        finally:
            self._waiting[session_id].discard(event)
            if not self._waiting[session_id]:
                del self._waiting[session_id]


def _uuid(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        return UUID(int=0)
