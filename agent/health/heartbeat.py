"""Reports the agent's state to the orchestrator, and passes on what the answer says of the database.

A report is sent at once when the state changes, else every HEARTBEAT_SECONDS. The answer names the database's head: one
that disagrees with the tree starts a catch-up, so even the loss of the very last event heals.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from agent.core.errors import CredentialRejected, MalformedMessage, TooLarge, Unavailable
from agent.core.messages import Head
from agent.health.report import Report
from agent.health.status_body import MOST_BYTES
from agent.link.run_settings import RunSettingsFollower
from agent.session_api import SessionApi
from agent.sync.catchup import BACKOFF
from agent.sync.engine import Sync
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import process_age
from agent.telemetry.status import AgentState
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

LEAST_PAUSE = 0.25
"""Least seconds between two reports, however fast the state flaps."""


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

    # what was logged last
    _state: AgentState | None = None
    _was_ready: bool = False

    # the report sent last, and when the next is due (the loop's time)
    _sent: object = field(default=None, repr=False)
    _due: float = 0.0
    _failures: int = 0

    # how much a report may hold, after one was refused for its size, and how many were accepted since
    _room: int = MOST_BYTES
    _accepted: int = 0

    async def run(self) -> None:
        """Report for ever. Raises `SessionGone` or `Superseded` when the orchestrator says that it is over."""
        while True:
            state, ready = self.report.state, self.report.ready()
            self._log_changes(state, ready)
            current = (state, self.report.dev.state, ready)
            due = asyncio.get_running_loop().time() >= self._due
            # After a failure a change waits for the backoff like everything else.
            if self.api is not None and (due or (current != self._sent and not self._failures)):
                self._sent = current
                await self._beat(self.api)
                await asyncio.sleep(LEAST_PAUSE)
            else:
                settled = state in (AgentState.SERVING, AgentState.DEGRADED)
                await asyncio.sleep(POLL_SETTLED if settled else POLL_STARTING)

    def _log_changes(self, state: AgentState, ready: bool) -> None:
        if state is not self._state:
            before = self._state.value if self._state else None
            log.info("agent.state", state=state.value, before=before)
            self._state = state
        if ready and not self._was_ready:
            self._was_ready = True
            age = process_age()
            self.report.problems.metrics.session_start.set(age)
            log.info("agent.ready", seconds=round(age, 3))

    async def _beat(self, api: SessionApi) -> None:
        """Send one report; act on the answer, or plan the next try."""
        clock = asyncio.get_running_loop().time
        asked_at = self.sync.tree.cursor
        self._due = clock() + self.every * (0.8 + 0.4 * spread())
        try:
            head = await self._send(api)
        except (Unavailable, MalformedMessage) as error:
            self._failures += 1
            self._due = clock() + BACKOFF.delay(self._failures, error)
            return
        except CredentialRejected:
            self._failures += 1
            self._due = clock() + self.every
            return
        self._failures = 0
        if head.action == "stop":
            log.info("agent.told_to_stop")
            self.stop.set()
        self.sync.hear(head, asked_at)
        self.run_settings.hear(head.run_revision)
        if head.action == "sync":
            self.sync.hurry()

    async def _send(self, api: SessionApi) -> Head:
        """Send the report; without its problems where a peer takes less: the state alone keeps the lease.

        What was refused is not sent again as it was: half as much is tried the next time, and the whole after an hour.
        """
        try:
            head = await api.report_status(self.report.heartbeat(self._room))
        except TooLarge as error:
            log.warning("heartbeat.too_large", why=str(error), room=self._room)
            self._room, self._accepted = (self._room // 2 if self._room > LEAST_ROOM else 0), 0
            return await api.report_status(self.report.heartbeat(0))
        self._accepted += 1
        if self._room < MOST_BYTES and self._accepted >= WHOLE_AGAIN:
            self._room, self._accepted = MOST_BYTES, 0
        return head
