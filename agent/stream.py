"""The live link: one socket, never deaf for longer than its deadlines, replaced for ever.

A shell round `agent.phoenix`. One task owns the socket and is the only one that writes to it or closes it, a second
reads it; a third keeps the token fresh (`agent.linktoken`); a fourth looks at the clock once a second, because a
machine that was suspended has sockets that look alive and are dead. What the rest of the agent sees is an
`EventSource`: signals that are either an event or the order to catch up, and nothing that could be lost without such
an order.

Timings are judgement; each has its reason in `agent.linksettings` and `phoenix.Timing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Final

from tenacity import RetryCallState, Retrying, wait_random
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.protocol import State

from agent.errors import AgentError, CredentialRejected, SessionGone
from agent.linksettings import DEFAULTS, LinkSettings, endpoint
from agent.linkstate import Cause, LinkState
from agent.linktoken import TokenKeeper, asked_wait
from agent.meanings import Broadcast, Dropped, Joined, Meaning, Refused, ReplicationReady, TokenExpired
from agent.model import Problem
from agent.phoenix import Phoenix
from agent.session import retry_after
from agent.signals import Signal, SignalQueue
from agent.telemetry import get_logger
from agent.tokens import Token, TokenSource

log = get_logger("link")


class _Connect(connect):
    """`websockets.connect` that follows no redirect: what comes after the handshake is a credential, and it goes to the
    host of the settings or to nobody.
    """

    def process_redirect(self, exc: Exception) -> Exception | str:
        """A redirect is an answer like any other that is not 101."""
        return exc


@dataclass(frozen=True, slots=True)
class _End:
    """Why a socket ended, or none came about. `wait`: the least number of seconds the other side asked for."""

    cause: str
    reason: str
    refused: bool = False
    wait: float = 0.0


class RealtimeStream:
    """An `EventSource` on Supabase Realtime.

    `url` as for the official clients (`wss://host/realtime/v1`, also http(s)); `topic` the wire topic. `wall` is the
    clock of tokens and reports; deadlines run on the event loop's clock.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        topic: str,
        tokens: TokenSource,
        *,
        settings: LinkSettings = DEFAULTS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._url = endpoint(url, api_key)
        self._settings = settings
        self._wall = wall
        self._phoenix = Phoenix(topic, settings.timing, self._observe)
        self._queue = SignalQueue(settings.queue_events, settings.queue_bytes)
        self._backoff = settings.backoff()
        self._hurry = asyncio.Event()
        self._wake = asyncio.Event()
        self._end_because: _End | None = None
        self._token = TokenKeeper(tokens, settings, self, wall)
        self._attempt = 0
        self._refused_in_row = 0
        self._joined_at: float | None = None
        self._last_frame_at: float | None = None
        self._last_event_at: float | None = None
        self._last_catch_up_at: float | None = None
        self._state_since = wall()
        self._losses: Counter[str] = Counter()
        self._refusals: Counter[str] = Counter()
        self._clock_jumps = 0
        self._sockets = 0
        self._joins = 0

    # --- what the rest of the agent sees

    @property
    def state(self) -> LinkState:
        """What the link is doing."""
        return self._phoenix.state

    @property
    def since(self) -> float:
        """Since when it has been doing that, Unix seconds."""
        return self._state_since

    async def run(self) -> None:
        """Own the link until cancelled; then leave the channel and close the socket."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._token.run(), name="link-token")
            tasks.create_task(self._look_around(), name="link-clock")
            # In the body, not as a third child: a group takes no notice of a child that ends as cancelled, and a
            # link without this one is deaf.
            await self._own_socket()

    def receive(self) -> Coroutine[object, object, Signal]:
        """The next signal, in order. One consumer."""
        return self._queue.get()

    def receive_now(self) -> Signal | None:
        """The next signal if one is waiting."""
        return self._queue.get_now()

    def caught_up(self) -> None:
        """One catch-up succeeded that began after the last `Resync` was received; a newer one is still to come
        when the queue holds it, and then the link stays behind.
        """
        self._last_catch_up_at = self._wall()
        if not self._queue.resyncs_waiting:
            self._phoenix.caught_up()

    def doubt(self, reason: str) -> None:
        """Somebody knows that the link should have delivered something and did not: replace the socket.

        For the status heartbeat, which compares with the head in the database while the link looks live.
        """
        if self._phoenix.state is LinkState.LIVE:
            self._interrupt(_End("doubted", reason))

    def problems(self) -> tuple[Problem, ...]:
        """What a person should see of the link now."""
        if self._token.problem is None:
            return ()
        return (Problem("token_refused", self._token.problem),)

    def report(self) -> dict[str, object]:
        """For `/status`: state and since when, last signs of life (Unix seconds), counters. No secret."""
        token = self._token.current()
        return {
            "state": str(self._phoenix.state),
            "since": self._state_since,
            "why": self._phoenix.why,
            "topic": self._phoenix.topic,
            "last_frame_at": self._last_frame_at,
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
            "ignored_frames": dict(self._phoenix.ignored),
            "problems": [problem.detail for problem in self.problems()],
        }

    # --- the task that owns the socket

    async def _own_socket(self) -> None:
        while True:
            end = await self._one_socket()
            self._ended(end)
            if end.refused:
                await self._until_trusted_again(end)
            else:
                await asyncio.sleep(end.wait)
                await self._pause(self._delay())
            self._phoenix.retry()

    def _ended(self, end: _End) -> None:
        if self._joined_at is not None and _now() - self._joined_at >= self._settings.stable_after:
            self._attempt = 0
        self._joined_at = None
        self._hurry.clear()
        self._attempt += 1
        self._losses[end.cause] += 1
        if end.refused:
            self._phoenix.refused(end.reason)
        else:
            self._phoenix.lost(end.reason)

    def _delay(self) -> float:
        state = RetryCallState(Retrying(), None, (), {})
        state.attempt_number = self._attempt
        return self._backoff(state)

    async def _pause(self, seconds: float) -> None:
        """Sleep, unless there is a reason to hurry: a new token after a refusal, a machine that woke up."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    async def _until_trusted_again(self, end: _End) -> None:
        """After a refusal: another token and another try at once; after more of them, slowly, for ever.

        A token that comes from elsewhere meanwhile, as by a rotated file, ends the wait.
        """
        self._refused_in_row += 1
        most = self._settings.refused_retry
        await asyncio.sleep(end.wait)
        slow = wait_random(most / 2, most)(RetryCallState(Retrying(), None, (), {}))
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
        await asyncio.sleep(self._delay())

    async def _one_socket(self) -> _End:
        """From connecting to the end of the socket."""
        token = self._token.look()
        if token is None or token.expired(self._wall()):
            # A token that is expired by our clock is asked for again first, and used all the same when there is no
            # newer one: the clock that counts is the server's.
            try:
                token = await self._token.renew(token)
            except AgentError as error:
                if token is None:
                    refused = isinstance(error, (CredentialRejected, SessionGone))
                    return _End("no_token", str(error), refused, asked_wait(error))
        self._token.sent = token
        try:
            socket = await _Connect(
                self._url,
                compression=None,
                max_size=self._settings.max_frame,
                ping_interval=None,
                open_timeout=self._settings.open_within,
                close_timeout=self._settings.close_within,
                user_agent_header="preview-agent",
                logger=_SILENT,
                proxy=None,
            )
        except InvalidStatus as error:
            return self._handshake_refused(error)
        except (OSError, TimeoutError, WebSocketException, EOFError, UnicodeError) as error:
            # The class, not the text: the URL carries the key.
            return _End("unreachable", f"cannot connect: {type(error).__name__}")
        self._sockets += 1
        async with asyncio.TaskGroup() as tasks:
            # In a group: a bug in the reading must end the agent loudly, not leave a link that nobody reads.
            reading = tasks.create_task(self._read(socket), name="link-read")
            reading.add_done_callback(lambda _: self._wake.set())
            try:
                return await self._hold(socket, reading, token)
            except asyncio.CancelledError:
                await self._goodbye(socket)
                raise
            finally:
                reading.cancel()
                socket.transport.abort()

    def _handshake_refused(self, error: InvalidStatus) -> _End:
        response = error.response
        self._refusals[str(response.status_code)] += 1
        wait = retry_after(response.headers.get("retry-after"), self._wall()) or 0.0
        said = f"the handshake was answered with HTTP {response.status_code}"
        cause = "rate_limited" if response.status_code == 429 else "handshake"
        return _End(cause, said, response.status_code in (401, 403), wait)

    async def _hold(self, socket: ClientConnection, reading: asyncio.Task[_End], token: Token) -> _End:
        """Write what is due and wait until something is, from an open socket to its end."""
        phoenix = self._phoenix
        self._end_because = None
        phoenix.opened(_now(), token.value)
        try:
            while True:
                self._use_newest_token()
                for text in phoenix.outgoing():
                    async with asyncio.timeout(self._settings.timing.heartbeat_within):
                        await socket.send(text)
                if self._end_because is None and not reading.done():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(self._next_look()):
                            await self._wake.wait()
                self._wake.clear()
                if socket.state is not State.OPEN:
                    # A closing handshake began. `recv` waits for the end of the TCP connection, which a peer that is
                    # gone never sends; `close` waits for it `close_within` and then cuts the connection.
                    await socket.close()
                    return self._end_because or await reading
                end = self._end_because or _dropped(phoenix.tick(_now()))
                if end is not None:
                    return end
        except ConnectionClosed as error:
            return self._end_because or _closed(error)
        except TimeoutError:
            return _End("stalled", "the socket takes no more frames")

    def _next_look(self) -> float:
        """When to look at the socket again at the latest, in the loop's time."""
        look = _now() + self._settings.look_every
        deadline = self._phoenix.next_deadline()
        return look if deadline is None else min(deadline, look)

    async def _read(self, socket: ClientConnection) -> _End:
        """Read and handle messages until the socket is closed; returns how it was.

        Never waits for the consumer, so the library's own queue stays short (it stops reading from the network at 16
        frames); `SignalQueue` is what bounds memory.
        """
        now, receive = asyncio.get_running_loop().time, self._phoenix.receive
        try:
            while True:
                frame = await socket.recv(decode=False)
                self._last_frame_at = at = self._wall()
                meaning = receive(frame, now(), at)
                if type(meaning) is Broadcast:
                    self._last_event_at = at
                    if not self._queue.put(meaning, len(frame)):
                        self._phoenix.behind("overflow")
                elif meaning is not None:
                    self._meant(meaning)
                    self._wake.set()
        except ConnectionClosed as error:
            return _closed(error)

    def _meant(self, meaning: Meaning) -> None:
        match meaning:
            case Joined():
                self._joins += 1
                self._joined_at = _now()
                self._refused_in_row = 0
                self._token.problem = None
                self._queue.resync("joined")
            case ReplicationReady():
                self._queue.resync("replication_ready")
            case TokenExpired(reason):
                if self._joined_at is not None and _now() - self._joined_at < self._settings.rejoin_least:
                    self._interrupt(_End("token_expired", reason))
                else:
                    self._token.renew_now()
            case Refused(reason):
                self._refusals["join"] += 1
                self._interrupt(_End("refused", reason, refused=True))
            case Dropped(cause, reason):
                self._interrupt(_End(cause, reason))

    def _interrupt(self, end: _End | None = None) -> None:
        """Wake the owner of the socket, to end it or to see the new token."""
        if end is not None and self._end_because is None:
            self._end_because = end
        self._wake.set()

    async def _goodbye(self, socket: ClientConnection) -> None:
        self._phoenix.leave()
        with contextlib.suppress(ConnectionClosed, TimeoutError, OSError):
            async with asyncio.timeout(self._settings.close_within):
                for text in self._phoenix.outgoing():
                    await socket.send(text)
                await socket.close()
        self._phoenix.lost("stopped")

    # --- what the token's keeper asks and tells (agent.linktoken.Holder)

    @property
    def wants_token(self) -> bool:
        """Whether the channel waits for a token, its last one having expired."""
        return self._phoenix.wants_token

    @property
    def joined(self) -> bool:
        """Whether the channel is joined."""
        return self._joined_at is not None

    def token_changed(self) -> None:
        """There is another token in force."""
        if self._phoenix.state is LinkState.REFUSED:
            self._hurry.set()
        self._interrupt()

    def token_refused(self, reason: str) -> None:
        """The channel waits for a token, and none is to be had."""
        self._interrupt(_End("token_refused", reason, refused=True))

    def _use_newest_token(self) -> None:
        token = self._token.look()
        if token is not None and token is not self._token.sent:
            self._token.sent = token
            self._phoenix.new_token(token.value, _now())

    # --- the clock

    async def _look_around(self) -> None:
        """Once a second: has the machine been asleep, has the token's file been rotated?"""
        offset = self._wall() - _now()
        while True:
            await asyncio.sleep(self._settings.look_every)
            self._token.look()
            before, offset = offset, self._wall() - _now()
            if abs(offset - before) > self._settings.clock_jump:
                self._clock_jumps += 1
                log.warning("link.clock_jump", seconds=round(offset - before, 1))
                self._attempt = 0
                self._queue.resync("clock_jump")
                self._phoenix.behind("clock jump")
                self._interrupt(_End("clock_jump", f"the clock jumped by {offset - before:.0f} s"))
                self._hurry.set()

    def _observe(self, source: LinkState, cause: Cause, target: LinkState, why: str) -> None:
        self._state_since = self._wall()
        level = log.info if target is not LinkState.REFUSED else log.warning
        level("link.state", source=str(source), cause=str(cause), state=str(target), why=why)


_SILENT: Final = logging.Logger("agent.stream.websockets", logging.CRITICAL)  # noqa: LOG001
"""The library logs frames and URLs at debug level, and both carry credentials. Outside the tree of loggers, so that no
level set at its root wakes this one."""


def _now() -> float:
    return asyncio.get_running_loop().time()


def _closed(error: ConnectionClosed) -> _End:
    """How the connection ended."""
    if error.rcvd is not None:
        code = int(error.rcvd.code)
        return _End(f"closed_{code}", f"closed with {code} {error.rcvd.reason}".rstrip())
    if error.sent is not None and error.sent.code == CloseCode.MESSAGE_TOO_BIG:
        return _End("oversize", "a frame larger than the largest the server is known to send")
    return _End("reset", "the connection broke")


def _dropped(dropped: Dropped | None) -> _End | None:
    return _End(dropped.cause, dropped.reason) if dropped else None
