"""Holds a connection to NATS, subscribed to one project, until it ends: a transport of `link.loop`.

The library's client connects, speaks the protocol and pings; it does not reconnect (`allow_reconnect=False`), since
its own reconnecting ends for good when a token expires. NATS takes no second token on an open connection, so a newer
one is for another connection, which is subscribed before the former is given up: nothing is missed between the two, and
what both brought is told apart by its revision.

Imported only where REALTIME_URL says nats:// or tls://; needs the extra `nats`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Final

import orjson
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError, SlowConsumerError, StaleConnectionError, UnexpectedEOF
from nats.errors import Error as NatsError

from agent.link.loop import ConnectionEnd, LinkLoop
from agent.link.types import DEFAULTS, Cause, LinkSettings, Received
from agent.tokens import Token, Tokens, TokenSource

PUBLISHED: Final = "pv.in."
"""Where the relay publishes, with the project behind it: what `Nats-Subject` must say of every message."""

HEARD: Final = "pv.out."
"""Where it is heard."""


def nats_link(
    url: str,
    project: str,
    tokens: TokenSource,
    *,
    settings: LinkSettings = DEFAULTS,
    wall: Callable[[], float] = time.time,
) -> LinkLoop:
    """Make an `EventSource` on NATS.

    Args:
        url: `nats://host:port`, or `tls://host:port`, which is given no token unless it speaks TLS.
        project: The project's id.
        tokens: Has the token, whose `nats_jwt` is presented.
        settings: Deadlines, bounds and waits.
        wall: The clock of tokens and reports, Unix seconds.
    """
    return LinkLoop(NatsStream(url, project, settings), tokens, settings=settings, wall=wall)


async def try_connection(
    url: str, project: str, token: Token, settings: LinkSettings = DEFAULTS
) -> ConnectionEnd | None:
    """Connect and subscribe once, as the link does; return why that failed, if it did. Arguments as for `nats_link`."""
    tried = _Connection(nats_link(url, project, Tokens(), settings=settings), project, settings)
    try:
        return await tried.connect(url, token) or await tried.subscribe()
    finally:
        await tried.close()


class NatsStream:
    """Makes and holds connections to NATS. Arguments as for `nats_link`."""

    def __init__(self, url: str, project: str, settings: LinkSettings = DEFAULTS) -> None:
        self.topic = HEARD + project
        self._url = url
        self._project = project
        self._settings = settings

    async def hold(self, link: LinkLoop, token: Token) -> ConnectionEnd:
        """Connect, subscribe and stay until the connection ends (`link.loop.Transport`)."""
        held = _Connection(link, self._project, self._settings)
        try:
            if (failed := await held.connect(self._url, token)) is not None:
                return failed
            link.machine.move(Cause.OPENED, "connected")
            if (failed := await held.subscribe()) is not None:
                return failed
            link.machine.joined("subscribed", feed_ready=True)
            wanted: Token | None = None
            again_at = 0.0
            while True:
                await link.interrupted(_now() + self._settings.check_every)
                if (end := held.end()) is not None:
                    return link.ending or end
                if link.ending is not None:
                    return link.ending
                if (newer := link.newer_token()) is not None:
                    wanted, again_at = newer, 0.0
                if wanted is not None and wanted.nats_jwt != held.jwt and _now() >= again_at:
                    again_at = _now() + self._settings.renew_pause
                    held = await self._replaced(link, held, wanted)
        finally:
            await held.close()

    async def _replaced(self, link: LinkLoop, held: _Connection, token: Token) -> _Connection:
        """Return a connection with a newer token, subscribed before `held` is given up; or `held`, if there is none.

        Then it is tried again. `held` ends with its own token at the latest, and the loop makes the next connection.
        """
        newer = _Connection(link, self._project, self._settings)
        try:
            failed = await newer.connect(self._url, token) or await newer.subscribe()
            if failed is None:
                link.replaced()
                await held.drain()
                return newer
        except BaseException:
            await newer.close()
            raise
        await newer.close()
        link.token_not_taken(failed)
        return held


class _Connection:
    """One connection and its subscription, until it ends."""

    def __init__(self, link: LinkLoop, project: str, settings: LinkSettings) -> None:
        self.jwt: str | None = None
        self._link = link
        self._project = project
        self._settings = settings
        self._client = Client()
        self._said: Exception | None = None
        """What the client reported last."""
        self._bug: Exception | None = None
        self._end: ConnectionEnd | None = None
        self._over = asyncio.Event()
        """The client has closed the connection."""

    async def connect(self, url: str, token: Token) -> ConnectionEnd | None:
        """Connect and present the token; return why that failed, if it did."""
        if token.nats_jwt is None:
            return ConnectionEnd(
                "no_token", "there is no token for NATS", refused=True, refusal="authorization"
            )
        self.jwt = token.nats_jwt
        within = self._settings.open_within
        try:
            connecting = self._client.connect(
                [url],
                name="preview-agent",
                error_cb=self._hear,
                closed_cb=self._closed,
                user_jwt_cb=lambda: self._present(url),
                signature_cb=lambda _: b"",  # a bearer's: whoever has the token is the user
                allow_reconnect=False,
                max_reconnect_attempts=1,
                reconnect_time_wait=0,
                connect_timeout=within,  # type: ignore[arg-type]
                ping_interval=self._settings.timing.heartbeat_within,  # type: ignore[arg-type]
                max_outstanding_pings=1,
            )
            await self._apart(connecting, within)
        except TimeoutError:
            return ConnectionEnd("unreachable", "no connection in time")
        except Exception as error:  # the client trusts a greeting, and raises whatever a wrong one leads to
            return self._why(self._said if self._said is not None else error)
        return None

    def _present(self, url: str) -> bytearray:
        """Give the token to a server that is who the URL says: what speaks no TLS is given none by `tls://`."""
        writer = getattr(self._client._transport, "_io_writer", None)
        if url.startswith("tls:") and (writer is None or writer.get_extra_info("ssl_object") is None):
            raise NatsError("nats: the server speaks no TLS")
        assert self.jwt is not None
        return bytearray(self.jwt, "ascii")

    async def subscribe(self) -> ConnectionEnd | None:
        """Subscribe, and wait until the server has done so; return why it did not, if it did not."""
        try:
            await self._apart(self._subscribe(), self._settings.timing.join_within)
        except TimeoutError:
            return ConnectionEnd("join_timeout", "the subscription was not answered in time")
        except (NatsError, OSError) as error:
            return self.end() or self._why(error)
        if self._said is not None and "permissions violation" in str(self._said):
            return self._why(self._said)
        return self.end()

    async def _subscribe(self) -> None:
        """Subscribe, and wait until the server has read that and we what it sent before."""
        await self._client.subscribe(
            HEARD + self._project,
            cb=self._take,
            pending_msgs_limit=self._settings.queue_events,
            pending_bytes_limit=self._settings.queue_bytes,
        )
        for _ in range(2):  # the client's `flush` writes its PING past what still waits to be written
            await self._client.flush(int(self._settings.timing.join_within) + 1)

    async def _apart(self, work: Coroutine[object, object, None], within: float) -> None:
        """Have the client do something, until it is done or the connection is closed.

        In a task of its own, because the client swallows cancellations: `asyncio.wait_for`, before Python 3.12, those
        that come just as it is done. And it goes on waiting for the answer of a server that closed the connection.

        Raises:
            TimeoutError: It was not done in time.
        """
        doing, over = asyncio.create_task(work), asyncio.create_task(self._over.wait())
        doing.add_done_callback(
            lambda task: task.cancelled() or task.exception()
        )  # also when nobody waits any more
        try:
            await asyncio.wait([doing, over], timeout=within, return_when=asyncio.FIRST_COMPLETED)
            if doing.done() and not doing.cancelled():
                doing.result()
            elif not over.done():
                raise TimeoutError
        finally:
            for task in (doing, over):
                task.cancel()
            await asyncio.wait([doing, over], timeout=self._settings.close_within)

    def end(self) -> ConnectionEnd | None:
        """Return why the connection ended; None: it has not. Raises what went wrong in our own code."""
        if self._bug is not None:
            raise self._bug
        # Its reader ends at what it cannot parse, and the client says it is connected until two pings go unanswered.
        reader = self._client._reading_task
        deaf = reader is not None and reader.done()
        if self._end is None and (deaf or self._client.is_closed or not self._client.is_connected):
            error = self._client.last_error or self._said
            self._end = ConnectionEnd("reset", "the connection broke") if error is None else self._why(error)
        return self._end

    async def drain(self) -> None:
        """Take what is still under way on this connection, then close it."""
        with contextlib.suppress(Exception):
            await self._apart(self._client.drain(), self._settings.close_within)
        await self.close()

    async def close(self) -> None:
        """Close the connection, within a bound: a dead peer must not hold up the drain."""
        writer = getattr(self._client._transport, "_io_writer", None)
        try:
            with contextlib.suppress(Exception):
                await self._apart(self._client.close(), self._settings.close_within)
        finally:
            if writer is not None:
                # The client closes politely: what a dead peer does not take would keep the socket.
                writer.transport.abort()

    # --- what the client calls

    async def _take(self, message: Msg) -> None:
        try:
            self._received(message)
        except Exception as error:
            # The client would report it and go on.
            self._bug = error
            self._link.interrupt()

    def _received(self, message: Msg) -> None:
        link, headers = self._link, message.headers or {}
        link.last_frame_at = at = link.wall()
        if headers.get("Nats-Subject") != PUBLISHED + self._project:
            link.ignored["other_subject"] += 1
            return
        if len(message.data) > self._settings.max_frame:
            link.interrupt(
                ConnectionEnd("oversize", "a message larger than the largest the relay is known to send")
            )
            return
        try:
            payload = orjson.loads(message.data)
        except ValueError:
            payload = None
        event = headers.get("Pv-Event")
        if event is None or not isinstance(payload, dict):
            link.ignored["malformed"] += 1
            return
        link.deliver(Received(event, payload, at), len(message.data))

    async def _hear(self, error: Exception) -> None:
        if isinstance(error, SlowConsumerError):
            self._link.dropped()
            return
        self._said = error
        if "permissions violation" in str(error) and self._end is None:
            self._end = self._why(error)
        self._link.interrupt()

    async def _closed(self) -> None:
        self._over.set()
        self._link.interrupt()

    def _why(self, error: BaseException) -> ConnectionEnd:
        """Return what an error of the client or the server means. The protocol has no codes for errors, only texts."""
        text = str(error).removeprefix("nats: ").strip("' ")
        match error:
            case UnexpectedEOF() | ConnectionClosedError():  # the first is a StaleConnectionError, too
                return ConnectionEnd("closed", "the server closed the connection")
            case StaleConnectionError():
                return ConnectionEnd("heartbeat_timeout", "a ping was not answered in time")
            case OSError():
                return ConnectionEnd("unreachable", type(error).__name__)
        said = text.lower()
        if "expired" in said:
            return ConnectionEnd("token_expired", text)
        if "authorization" in said or "authentication" in said or "permissions violation" in said:
            return ConnectionEnd("refused", text, refused=True, refusal="authorization")
        if "maximum" in said and "connections" in said:
            return ConnectionEnd("rate_limited", text)
        return ConnectionEnd("server_error", text if isinstance(error, NatsError) else type(error).__name__)


def _now() -> float:
    return asyncio.get_running_loop().time()
