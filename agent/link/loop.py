"""Holds the link over any transport: reconnects, keeps the token fresh, watches the clock, reports.

`LinkLoop` is the `EventSource` that the rest of the agent sees. A `Transport` holds one connection until its end; the
loop decides when the next one is made and with which token, and ends a connection that only looks alive: because the
clock jumped, so the machine was suspended and its sockets are dead, or because an event is known to be missing.

The link has one state, `LinkStateMachine`'s. The transport moves it while it holds a connection, the loop between two;
what a transition causes (a count, an order to catch up) it causes here, the same for every transport.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Protocol

from agent.core.errors import AgentError, CredentialRejected, SessionGone
from agent.core.model import Problem
from agent.link.source import Received, Signal, SignalQueue
from agent.link.token_refresh import TokenRefresher
from agent.link.types import DEFAULTS, JOINED_STATES, Cause, LinkSettings, LinkState, LinkStateMachine
from agent.retry import Backoff, asked_wait
from agent.telemetry.logging import get_logger
from agent.tokens import Token, TokenSource

log = get_logger("link")


@dataclass(frozen=True, slots=True)
class ConnectionEnd:
    """Why a connection ended, or none came about."""

    cause: str
    """One word, for the counter `losses`."""
    reason: str
    """For a person. Never a token, never a URL."""
    refused: bool = False
    """The credential was refused: the same one is tried again only after a long pause."""
    wait: float = 0.0
    """The least number of seconds that the other side asked to wait."""
    refusal: str | None = None
    """What refused us, for the counter `refusals`: the handshake's HTTP status, or `join`; None: nothing did."""


class Transport(Protocol):
    """Makes and holds one connection at a time to a source of events."""

    @property
    def topic(self) -> str:
        """What it listens to, for `/status`."""

    async def hold(self, link: LinkLoop, token: Token) -> ConnectionEnd:
        """Connect and hold the connection until it ends; it is closed when this returns or is cancelled.

        An implementation moves `link.machine` with what happens, gives every event to `link.deliver`, and waits with
        `link.interrupted`. Each time that returns, `link.newer_token` may have a token for the connection, and
        `link.ending` a reason to end it. What it raises is a bug, and ends the agent.

        Args:
            link: The loop that this connection is for.
            token: The credential to connect with.

        Returns:
            Why the connection ended, or why there was none.
        """


class LinkLoop:
    """An `EventSource` over a `Transport`, with a new connection whenever one ends."""

    def __init__(
        self,
        transport: Transport,
        tokens: TokenSource,
        *,
        settings: LinkSettings = DEFAULTS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Make a link that `run` holds.

        Args:
            transport: Makes the connections.
            tokens: Has the token in force, and gets the next one.
            settings: Deadlines, bounds and waits.
            wall: The clock of tokens and reports, Unix seconds. Deadlines run on the event loop's clock.
        """
        # What the transport reads and writes.
        self.machine = LinkStateMachine(self._on_transition)
        self.wall = wall
        self.last_frame_at: float | None = None
        self.ignored: Counter[str] = Counter()
        """How many messages were ignored, by reason."""

        self._transport = transport
        self._settings = settings
        self._queue = SignalQueue(settings.queue_events, settings.queue_bytes)
        self._backoff = Backoff(settings.backoff_first, settings.backoff_most, settings.backoff_least)
        self._token = TokenRefresher(tokens, settings, self, wall, self._backoff)

        # The connection.
        self._wake = asyncio.Event()
        self._ending: ConnectionEnd | None = None
        self._joined_at: float | None = None
        """When it joined last, in the event loop's time; None: not yet."""
        self._token_expired = False
        """The server reported that its token expired, and has no other yet."""

        # Between two connections.
        self._retry_now = asyncio.Event()
        self._attempt = 0
        self._refused_in_row = 0

        # The report.
        self._since = wall()
        self._last_event_at: float | None = None
        self._last_catch_up_at: float | None = None
        self._losses: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._clock_jumps = 0
        self._sockets = 0
        self._joins = 0

    # --- what the rest of the agent sees (agent.link.source.EventSource)

    @property
    def state(self) -> LinkState:
        """What the link is doing."""
        return self.machine.state

    @property
    def since(self) -> float:
        """Since when it has been doing that, Unix seconds."""
        return self._since

    async def run(self) -> None:
        """Hold the link until cancelled; then leave the channel and close the connection."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._token.run(), name="link-token")
                tasks.create_task(self._watch_clock(), name="link-clock")
                # In the body, not as a third child: a group ignores a child that ends as cancelled, and without
                # this one nothing is received any more.
                await self._reconnect_forever()
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError)
            self.machine.move(Cause.LOST, "stopped" if stopped else "a bug")
            raise

    def receive(self) -> Coroutine[object, object, Signal]:
        """Return the next signal, in order; waits for one. For one consumer."""
        return self._queue.get()

    def receive_now(self) -> Signal | None:
        """Return the next signal if one waits."""
        return self._queue.get_now()

    def caught_up(self) -> None:
        """Note that a catch-up succeeded which began after the last `Resync` was received.

        While another `Resync` waits in the queue the link stays behind, since that one was queued later.
        """
        self._last_catch_up_at = self.wall()
        if not self._queue.resyncs_waiting:
            self.machine.caught_up()

    def suspect(self, reason: str) -> None:
        """Replace a connection that looks live and did not deliver what it should have.

        For the status heartbeat, which compares the tree with the head of the database.
        """
        if self.machine.state is LinkState.LIVE:
            self.interrupt(ConnectionEnd("suspected", reason))

    def problems(self) -> tuple[Problem, ...]:
        """Return what a person should know is wrong with the link now."""
        problem = self._token.problem or self._token.file_problem
        return () if problem is None else (Problem("token_refused", problem),)

    def report(self) -> dict[str, object]:
        """Return what `/status` shows: state and since when, last signs of life (Unix seconds), counters. No secret."""
        token = self._token.current()
        return {
            "state": str(self.machine.state),
            "since": self._since,
            "why": self.machine.why,
            "topic": self._transport.topic,
            "last_frame_at": self.last_frame_at,
            "last_event_at": self._last_event_at,
            "last_catch_up_at": self._last_catch_up_at,
            "token_expires_at": token.expires_at if token else None,
            "attempt": self._attempt,
            "sockets": self._sockets,
            "joins": self._joins,
            "losses": dict(self._losses),
            "refusals": dict(self._refusals),
            "clock_jumps": self._clock_jumps,
            "queue_depth": len(self._queue),
            "overflows": self._queue.overflows,
            "ignored_frames": dict(self.ignored),
            "problems": [problem.detail for problem in self.problems()],
        }

    # --- what the transport calls while it holds a connection

    def deliver(self, event: Received, size: int) -> None:
        """Queue an event of `size` bytes. When the queue is full, a `Resync` replaces all that wait."""
        self._last_event_at = event.at
        if not self._queue.put(event, size):
            self.machine.behind("overflow")

    def dropped(self) -> None:
        """Note that the transport itself dropped an event, one of many perhaps: as when the queue is full."""
        if self._queue.overflow():
            self.machine.behind("overflow")

    def replaced(self) -> None:
        """Note that another connection took the place of the one that is held, and nothing was missed between them."""
        self._sockets += 1

    def token_not_taken(self, end: ConnectionEnd) -> None:
        """Note that a newer token made no other connection; the one that is held goes on."""
        log.warning("link.not_replaced", cause=end.cause, why=end.reason)
        self._token.problem = end.reason if end.refused else self._token.problem

    def resync(self, reason: str) -> None:
        """Queue an order to catch up. A join queues its own."""
        self._queue.resync(reason)

    def newer_token(self) -> Token | None:
        """Return the token in force if the server does not have it yet, for the caller to give it to the server."""
        token = self._token.poll()
        if token is None or token is self._token.sent:
            return None
        self._token.sent = token
        self._token_expired = False
        return token

    def token_expired(self, reason: str) -> None:
        """Renew the token, which the server says expired; end the connection if that is too soon after the join."""
        if self._joined_at is not None and _now() - self._joined_at < self._settings.rejoin_least:
            self.interrupt(ConnectionEnd("token_expired", reason))
        else:
            self._token.renew_now()

    def interrupt(self, end: ConnectionEnd | None = None) -> None:
        """Wake the transport, to end the connection because of `end`. The first reason counts; None: only wake it."""
        if end is not None and self._ending is None:
            self._ending = end
        self._wake.set()

    async def interrupted(self, deadline: float) -> None:
        """Wait for the next `interrupt`, at most until `deadline` in the event loop's time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._wake.wait()
        self._wake.clear()

    @property
    def ending(self) -> ConnectionEnd | None:
        """Why the connection is to be ended; None: it is not."""
        return self._ending

    # --- what the token's refresher calls (agent.link.token_refresh.TokenHolder)

    @property
    def wants_token(self) -> bool:
        """Whether the connection waits for a token, because its last one expired."""
        return self._token_expired and self.machine.state is LinkState.JOINING

    @property
    def joined(self) -> bool:
        """Whether the server accepted the token in force."""
        return self.machine.state in JOINED_STATES

    def token_changed(self) -> None:
        """Have the connection take another token, or try again at once when the last one was refused."""
        if self.machine.state is LinkState.REFUSED:
            self._retry_now.set()
        self.interrupt()

    def token_refused(self, reason: str) -> None:
        """End the connection: it waits for a token, and there is none."""
        self.interrupt(ConnectionEnd("token_refused", reason, refused=True))

    # --- the task that holds one connection after another

    async def _reconnect_forever(self) -> None:
        self.machine.move(Cause.RETRY, "started again")  # late, and nothing, at the first start
        while True:
            token = await self._token_to_connect_with()
            end = token if isinstance(token, ConnectionEnd) else await self._transport.hold(self, token)
            self._ended(end)
            if end.refused:
                await self._wait_for_new_token(end)
            else:
                await asyncio.sleep(end.wait)
                await self._pause(self._backoff.delay(self._attempt))
            self.machine.move(Cause.RETRY, "retry")

    async def _token_to_connect_with(self) -> Token | ConnectionEnd:
        """Return the token in force, renewed if it has expired; or why there is none."""
        token = self._token.poll()
        if token is None or token.expired(self.wall()):
            # A token that is expired by our clock is asked for again first, and used all the same when there is no
            # newer one: the clock that counts is the server's.
            try:
                token = await self._token.renew(token)
            except AgentError as error:
                if token is None:
                    refused = isinstance(error, (CredentialRejected, SessionGone))
                    return ConnectionEnd("no_token", str(error), refused, asked_wait(error))
        self._token.sent = token
        return token

    def _ended(self, end: ConnectionEnd) -> None:
        if self._joined_at is not None and _now() - self._joined_at >= self._settings.stable_after:
            self._attempt = 0
        self._joined_at = None
        self._retry_now.clear()
        self._attempt += 1
        self._losses[end.cause] += 1
        if end.refusal is not None:
            self._refusals[end.refusal] += 1
        self.machine.move(Cause.REFUSED if end.refused else Cause.LOST, end.reason)

    async def _wait_for_new_token(self, end: ConnectionEnd) -> None:
        """Ask for another token after a refusal, and return when it is time for the next attempt.

        That is at once after the first refusal, and half a minute to a minute later after each of those that follow in
        a row, for ever. A token that comes from elsewhere meanwhile, as by a rotated file, ends the wait.
        """
        self._refused_in_row += 1
        await asyncio.sleep(end.wait)
        most = self._settings.refused_retry
        slow = random.uniform(most / 2, most)  # noqa: S311 - spreads load, guards nothing
        refused = self._token.sent
        self._token.problem = end.reason
        waited = self._refused_in_row > 1
        if waited:
            await self._pause(slow)
        try:
            renewed = await self._token.renew(refused) is not refused
        except AgentError as error:
            self._token.problem = f"{end.reason}; {error}"
            renewed = False
        if not renewed and not waited:
            await self._pause(slow)
        await asyncio.sleep(self._backoff.delay(self._attempt))

    async def _pause(self, seconds: float) -> None:
        """Sleep, or until there is a reason to retry at once: a new token after a refusal, a machine that woke up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._retry_now.wait()

    # --- the clock and the transitions

    async def _watch_clock(self) -> None:
        """Check every second whether the clock jumped, and whether the token's file was rotated."""
        offset = self.wall() - _now()
        while True:
            await asyncio.sleep(self._settings.check_every)
            self._token.poll()
            before, offset = offset, self.wall() - _now()
            if abs(offset - before) > self._settings.clock_jump:
                self._clock_jumps += 1
                log.warning("link.clock_jump", seconds=round(offset - before, 1))
                self._attempt = 0
                self.resync("clock_jump")
                self.machine.behind("clock jump")
                self.interrupt(ConnectionEnd("clock_jump", f"the clock jumped by {offset - before:.0f} s"))
                self._retry_now.set()

    def _on_transition(self, source: LinkState, cause: Cause, target: LinkState, why: str) -> None:
        self._since = self.wall()
        level = log.info if target is not LinkState.REFUSED else log.warning
        level("link.state", source=str(source), cause=str(cause), state=str(target), why=why)
        if cause is Cause.OPENED:
            self._sockets += 1
            self._ending = None
            self._token_expired = False
        elif cause is Cause.JOINED:
            self._joins += 1
            self._joined_at = _now()
            self._refused_in_row = 0
            self._token.problem = None
            self._queue.resync("joined")
        elif cause is Cause.EXPIRED:
            self._token_expired = True


def _now() -> float:
    return asyncio.get_running_loop().time()
