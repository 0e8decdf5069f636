"""Holds a websocket to Supabase Realtime, joined to one topic, until it ends: a transport of `link.loop`.

The protocol is in `link.channel`; here are the socket and its two tasks, of which one reads, and the other is the only
one that writes and closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.protocol import State

from agent.link.channel import PhoenixChannel
from agent.link.loop import ConnectionEnd, LinkLoop
from agent.link.types import (
    DEFAULTS,
    ChannelEvent,
    Dropped,
    Joined,
    LinkSettings,
    Received,
    Refused,
    ReplicationReady,
    TokenExpired,
)
from agent.retry import retry_after
from agent.tokens import Token, TokenSource

VSN: Final = "2.0.0"
"""The version of the channel protocol's frames that `link.channel` speaks."""


def realtime_link(
    url: str,
    api_key: str | None,
    topic: str,
    tokens: TokenSource,
    *,
    settings: LinkSettings = DEFAULTS,
    wall: Callable[[], float] = time.time,
) -> LinkLoop:
    """Make an `EventSource` on Supabase Realtime.

    Args:
        url: As for the official clients (`wss://host/realtime/v1`, also http(s)).
        api_key: The publishable key, which the server's gateway asks for; None where there is no gateway.
        topic: The topic as it stands on the wire.
        tokens: Has the token that the channel is joined with.
        settings: Deadlines, bounds and waits.
        wall: The clock of tokens and reports, Unix seconds.

    Raises:
        ValueError: `url` is not ws, wss, http or https.
    """
    return LinkLoop(RealtimeStream(url, api_key, topic, settings), tokens, settings=settings, wall=wall)


def endpoint(url: str, api_key: str | None) -> str:
    """Build the websocket's address from the realtime URL, as both official clients do.

    Raises:
        ValueError: `url` is not ws, wss, http or https, or has no host.
    """
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}.get(parts.scheme)
    try:
        parts.port  # noqa: B018 - raises when it is none
    except ValueError:
        scheme = None
    if scheme is None or not parts.hostname:
        raise ValueError("the realtime URL must be ws(s):// or http(s):// with a host and a possible port")
    path = parts.path.rstrip("/")
    if not path.endswith("/websocket"):
        path += "/websocket"
    query = [(k, v) for k, v in parse_qsl(parts.query) if k not in ("apikey", "vsn")]
    query += [("apikey", api_key)] if api_key else []
    return urlunsplit((scheme, parts.netloc, path, urlencode([*query, ("vsn", VSN)]), ""))


class RealtimeStream:
    """Makes and holds connections to Supabase Realtime. Arguments as for `realtime_link`."""

    def __init__(self, url: str, api_key: str | None, topic: str, settings: LinkSettings = DEFAULTS) -> None:
        self.topic = topic
        self._url = endpoint(url, api_key)
        self._settings = settings

    async def hold(self, link: LinkLoop, token: Token) -> ConnectionEnd:
        """Connect, join the topic and stay until the socket ends (`link.loop.Transport`)."""
        try:
            socket = await _Connect(
                self._url,
                compression=None,
                max_size=self._settings.max_frame,
                ping_interval=None,
                open_timeout=self._settings.open_within,
                close_timeout=self._settings.close_within,
                user_agent_header="preview-agent",
                logger=_NO_LOG,
                proxy=None,
            )
        except InvalidStatus as error:
            return _handshake_refused(error, link.wall())
        except (OSError, TimeoutError, WebSocketException, EOFError, UnicodeError) as error:
            # The class, not the text: the URL carries the key.
            return ConnectionEnd("unreachable", f"cannot connect: {type(error).__name__}")
        channel = PhoenixChannel(self.topic, link.machine, self._settings.timing, link.ignored)
        return await _Connection(socket, channel, link, self._settings).run(token)


class _Connection:
    """One open socket, from the join to its end."""

    def __init__(
        self, socket: ClientConnection, channel: PhoenixChannel, link: LinkLoop, settings: LinkSettings
    ) -> None:
        self._socket = socket
        self._channel = channel
        self._link = link
        self._settings = settings

    async def run(self, token: Token) -> ConnectionEnd:
        """Join with `token` and stay until the socket ends. Returns how it ended; it is closed then."""
        self._channel.opened(_now(), token.value)
        async with asyncio.TaskGroup() as tasks:
            # In a group, so that a bug in the reading task ends the agent instead of leaving a socket that is not read.
            reading = tasks.create_task(self._read(), name="link-read")
            reading.add_done_callback(lambda _: self._link.interrupt())
            try:
                return await self._write(reading)
            except asyncio.CancelledError:
                await self._leave()
                raise
            finally:
                reading.cancel()
                self._channel.close()
                self._socket.transport.abort()

    async def _read(self) -> ConnectionEnd:
        """Read and handle frames until the socket is closed. Returns how it was closed.

        Never waits for the consumer: `SignalQueue` bounds what waits, and the library stops reading from the network
        at 16 frames that wait for this task.
        """
        link, now, receive = self._link, asyncio.get_running_loop().time, self._channel.receive
        try:
            while True:
                frame = await self._socket.recv(decode=False)
                link.last_frame_at = at = link.wall()
                event = receive(frame, now(), at)
                if type(event) is Received:
                    link.deliver(event, len(frame))
                elif event is not None:
                    self._handle(event)
        except ConnectionClosed as error:
            return _closed(error)

    def _handle(self, event: ChannelEvent) -> None:
        link = self._link
        match event:
            case Joined():
                link.interrupt()  # a token that came during the join is sent now
            case ReplicationReady():
                link.resync("replication_ready")
            case TokenExpired(reason):
                link.token_expired(reason)
            case Refused(reason):
                link.interrupt(ConnectionEnd("refused", reason, refused=True, refusal="join"))
            case Dropped(cause, reason):
                link.interrupt(ConnectionEnd(cause, reason))

    async def _write(self, reading: asyncio.Task[ConnectionEnd]) -> ConnectionEnd:
        """Write what is due and wait until something is, until the socket ends or is to be ended."""
        link, channel, socket = self._link, self._channel, self._socket
        try:
            while True:
                if (token := link.newer_token()) is not None:
                    channel.new_token(token.value, _now())
                for text in channel.outgoing():
                    async with asyncio.timeout(self._settings.timing.heartbeat_within):
                        await socket.send(text)
                await link.interrupted(self._next_check())
                if socket.state is not State.OPEN:
                    # A closing handshake began. `recv` waits for the end of the TCP connection, which a peer that is
                    # gone never sends; `close` waits for it `close_within` and then cuts the connection.
                    await socket.close()
                    return link.ending or await reading
                if link.ending is None and (dropped := channel.tick(_now())) is not None:
                    self._handle(dropped)
                if link.ending is not None:
                    return link.ending
        except ConnectionClosed as error:
            return link.ending or _closed(error)
        except TimeoutError:
            return ConnectionEnd("stalled", "the socket takes no more frames")

    def _next_check(self) -> float:
        """Return when the deadlines and the state of the socket are checked next, in the event loop's time."""
        check = _now() + self._settings.check_every
        deadline = self._channel.next_deadline()
        return check if deadline is None else min(deadline, check)

    async def _leave(self) -> None:
        """Leave the channel and close the socket, within a bound: a dead peer must not hold up the drain."""
        self._channel.leave()
        with contextlib.suppress(ConnectionClosed, TimeoutError, OSError):
            async with asyncio.timeout(self._settings.close_within):
                for text in self._channel.outgoing():
                    await self._socket.send(text)
                await self._socket.close()


class _Connect(connect):
    """Connects without following redirects: the token goes to the host of the settings or to nobody."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        """Treat a redirect like any other answer that is not 101."""
        return exc


_NO_LOG: Final = logging.Logger("agent.link.realtime.websockets", logging.CRITICAL)  # noqa: LOG001
"""The library logs frames and URLs at debug level, and both carry credentials. Not in the tree of loggers, so that no
level set at its root applies to this one."""


def _handshake_refused(error: InvalidStatus, now: float) -> ConnectionEnd:
    """Return what an HTTP answer other than 101 means. `now`: Unix seconds, for a `Retry-After` that is a date."""
    status = error.response.status_code
    return ConnectionEnd(
        "rate_limited" if status == 429 else "handshake",
        f"the handshake was answered with HTTP {status}",
        refused=status in (401, 403),
        wait=retry_after(error.response.headers.get("retry-after"), now) or 0.0,
        refusal=str(status),
    )


def _closed(error: ConnectionClosed) -> ConnectionEnd:
    """Return how the connection ended."""
    if error.rcvd is not None:
        code = int(error.rcvd.code)
        return ConnectionEnd(f"closed_{code}", f"closed with {code} {error.rcvd.reason}".rstrip())
    if error.sent is not None and error.sent.code == CloseCode.MESSAGE_TOO_BIG:
        return ConnectionEnd("oversize", "a frame larger than the largest the server is known to send")
    return ConnectionEnd("reset", "the connection broke")


def _now() -> float:
    return asyncio.get_running_loop().time()
