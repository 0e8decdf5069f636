"""Reports the agent's state to the orchestrator, and passes on what the answer says of the database.

A report is sent at once when the state changes, or what is on the disk or on the screen; else every HEARTBEAT_SECONDS.
The answer names the database's head: one that disagrees with the tree starts a catch-up, so even the loss of the very
last event heals.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from dataclasses import dataclass, field

from agent.core.errors import CredentialRejected, MalformedMessage, TooLarge, Unavailable
from agent.core.messages import Head
from agent.devserver.screen import News
from agent.health.report import Report
from agent.health.status_body import MOST_BYTES
from agent.link.run_settings import RunSettingsFollower
from agent.session_api import SessionApi
from agent.sync.catchup import BACKOFF
from agent.sync.engine import Sync
from agent.telemetry.logging import get_logger
from agent.telemetry.status import AgentState
from agent.telemetry.timeline import process_age
from agent.tokens import spread

log = get_logger("heartbeat")

POLL_STARTING = 0.1
"""Seconds between two readings of the state while the agent starts and somebody waits for it."""

POLL_SETTLED = 0.5
"""The same once it serves: a reading costs a quarter of a millisecond, and an idle agent should cost nothing."""

LEAST_ROOM = 1024
"""Bytes of a report, below which no problem fits."""

WHOLE_AGAIN = 120
"""Reports accepted after one was refused for its size, until the whole is tried again: an hour of them."""

SLEPT = 2.0
"""Seconds by the wall clock that a wait of half a second took: the machine slept. Whoever woke it wants a report."""

MOST_A_SECOND = 4
"""Reports, however fast the state flaps; a save is two of them, on the disk and on the screen, 50 ms apart.

While a page is open, what is on the disk alone takes half of them: so what is shown waits for none.
"""


@dataclass(slots=True, kw_only=True)
class Heartbeat:
    """One report at a time, until cancelled.

    Attributes:
        every: seconds between two reports when nothing changes, spread by a fifth either way.
        api: None without SESSION_API_URL; then changes of state are logged and nothing is sent.
        run_settings: told which revision of the run settings the orchestrator has.
        stop: set when the orchestrator tells the agent to stop.
    """

    every: float
    report: Report
    api: SessionApi | None
    sync: Sync
    stop: asyncio.Event
    run_settings: RunSettingsFollower

    # when the latest reports went out (the loop's time)
    _latest: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_A_SECOND))

    # what was logged last
    _state: AgentState | None = None
    _was_ready: bool = False

    # the report sent last, and when the next is due (the loop's time)
    _sent: tuple[object, News] | None = field(default=None, repr=False)
    _due: float = 0.0
    _failures: int = 0

    # the machine has slept, and no report was accepted since
    _woken: bool = False

    # how much a report may hold, after one was refused for its size, and how many were accepted since
    _room: int = MOST_BYTES
    _accepted: int = 0

    async def run(self) -> None:
        """Report for ever. Raises `SessionGone` or `Superseded` when the orchestrator says that it is over."""
        clock = asyncio.get_running_loop().time
        while True:
            self.report.screen.changed.clear()
            state, ready = self.report.state, self.report.ready()
            self._log_changes(state, ready)
            current = ((state, self.report.dev.state, ready), self.report.screen.news)
            due = clock() >= self._due
            # After a failure a change waits for the backoff like everything else.
            wanted = self.api is not None and (due or (current != self._sent and not self._failures))
            wait = self._until_room(current, due=due) - clock() if wanted else math.inf
            if self.api is not None and wait <= 0:
                whole = due or self._sent is None or current[0] != self._sent[0]
                self._sent = current
                self._latest.append(clock())
                await self._beat(self.api, whole=whole)
            else:
                settled = state in (AgentState.SERVING, AgentState.DEGRADED)
                began = time.time()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(wait, POLL_SETTLED if settled else POLL_STARTING)):
                        await self.report.screen.changed.wait()
                if time.time() - began > SLEPT:
                    self._woken, self._due = True, 0.0

    def _until_room(self, current: tuple[object, News], *, due: bool) -> float:
        """When the next report may go out (the loop's time)."""
        sent = self._sent
        on_disk = sent is not None and (current[0], current[1][1:]) == (sent[0], sent[1][1:])
        most = MOST_A_SECOND // 2 if on_disk and not due and self.report.screen.shown else MOST_A_SECOND
        return self._latest[-most] + 1.0 if len(self._latest) >= most else 0.0

    def _log_changes(self, state: AgentState, ready: bool) -> None:
        if state is not self._state:
            before = self._state.value if self._state else None
            log.info("agent.state", state=state.value, before=before)
            self._state = state
        if ready and not self._was_ready:
            self._was_ready = True
            age = process_age()
            self.report.problems.metrics.session_start.set(age)
            log.info("agent.ready", seconds=round(age, 3), **self.report.problems.metrics.start.report())

    async def _beat(self, api: SessionApi, *, whole: bool) -> None:
        """Send one report; act on the answer, or plan the next try.

        One that is not whole says what is on the disk and on the screen: where the database is by then is no news, a
        commit is on its way more often than not.
        """
        clock = asyncio.get_running_loop().time
        asked_at = self.sync.tree.cursor
        if whole:
            self._due = clock() + self.every * (0.8 + 0.4 * spread())
        try:
            head = await self._send(api, whole)
        except (Unavailable, MalformedMessage) as error:
            self._failures += 1
            self._due = clock() + BACKOFF.delay(self._failures, error)
            return
        except CredentialRejected:
            self._failures += 1
            # The next token is on its way to one that slept longer than its last one lived.
            self._due = clock() + (BACKOFF.delay(self._failures) if self._woken else self.every)
            return
        self._failures, self._woken = 0, False
        if head.action == "stop":
            log.info("agent.told_to_stop")
            self.stop.set()
        self.run_settings.hear(head.run_revision)
        if not whole:
            return
        self.sync.hear(head, asked_at)
        if head.action == "sync":
            self.sync.hurry()

    async def _send(self, api: SessionApi, whole: bool) -> Head:
        """Send the report; without its problems where a peer takes less: the state alone keeps the lease.

        What was refused is not sent again as it was: half as much is tried the next time, and the whole after an hour.
        """
        try:
            head = await api.report_status(self.report.heartbeat(self._room, hashed=whole))
        except TooLarge as error:
            log.warning("heartbeat.too_large", why=str(error), room=self._room)
            self._room, self._accepted = (self._room // 2 if self._room > LEAST_ROOM else 0), 0
            return await api.report_status(self.report.heartbeat(0))
        self._accepted += 1
        if self._room < MOST_BYTES and self._accepted >= WHOLE_AGAIN:
            self._room, self._accepted = MOST_BYTES, 0
        return head
