"""Publishes events to the stream: each project's in order, one of them unacknowledged at a time, projects side by side.

A publication that fails is tried again in place, for ever: what comes behind it must not overtake it. A second delivery
is none, because the stream knows the message's id (`Nats-Msg-Id`) for two minutes.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, NamedTuple, Protocol

import structlog
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js import JetStreamContext
from nats.js.api import RePublish, StreamConfig
from nats.js.errors import APIError, NotFoundError

from orchestrator_stub.relay.accounts import IN, OUT, STREAM, NatsKeys

log = structlog.get_logger("relay")

RETRY_SECONDS: Final = 0.2
"""Between two tries of one message. A leader is elected within seconds."""

ACK_WITHIN: Final = 5.0
"""Seconds for the stream to store one message; three replicas on disks take a few milliseconds."""

CONNECT_WITHIN: Final = 5

TOKEN_SECONDS: Final = 3600.0
"""Of the relay's own token; at its end the server closes the connection, and the next has another."""

KEPT_SECONDS: Final = 120
"""How long the stream keeps and knows a message. No machine reads it from there: what was missed is in the database."""

KEPT_EACH: Final = 1000
"""Messages of one project that the stream keeps for regions that are cut off meanwhile: 25 turns of 40 files. A project
that writes more than that in `KEPT_SECONDS` takes no more of the disk."""

TOO_LARGE: Final = 10054
"""JetStream's number for a message above the limit of its stream."""


class Event(NamedTuple):
    """One row of the outbox."""

    id: int
    bucket: int
    project: str
    name: str
    message_id: str
    payload: str


class Refused(Exception):
    """NATS will never take this message; the message says why in one line."""


class Stream(Protocol):
    """Where events are published."""

    async def publish(self, event: Event) -> bool:
        """Store one event; False: it was stored before. Raises `Refused`, and `OSError` for what may pass."""

    async def close(self) -> None:
        """End what is open."""


class NatsStream:
    """The stream in NATS, over a connection that is made again whenever it ended.

    nats-py's own reconnecting gives up for good when a token expires, so each of its clients has one connection here.
    """

    def __init__(self, url: str, keys: NatsKeys, *, replicas: int = 1) -> None:
        """`url`: of one server or several, separated by commas; `replicas`: of the stream, over a cluster."""
        self._servers = [server.strip() for server in url.split(",")]
        self._keys = keys
        self._replicas = replicas
        self._client: Client | None = None
        self._stream: JetStreamContext | None = None
        self._connecting = asyncio.Lock()
        self._failed_at = float("-inf")

    async def publish(self, event: Event) -> bool:
        try:
            stream = await self._connected()
            acknowledged = await stream.publish(
                f"{IN}{event.project}",
                event.payload.encode(),
                timeout=ACK_WITHIN,
                headers={"Nats-Msg-Id": event.message_id, "Pv-Event": event.name},
            )
        except MaxPayloadError:
            raise Refused("it is larger than the server's max_payload") from None
        except APIError as error:
            if error.err_code == TOO_LARGE:
                raise Refused("it is larger than the stream takes") from None
            raise OSError(f"JetStream: {error.description}") from None
        except Exception as error:  # the client raises whatever a connection that ends under it leads to
            raise OSError(str(error) or type(error).__name__) from None
        return not acknowledged.duplicate

    async def prepare(self) -> None:
        """Connect, and make the stream where it is not. Raises `OSError`."""
        try:
            await self._connected()
        except APIError as error:
            raise OSError(f"JetStream: {error.description}") from None
        except (NatsError, TimeoutError) as error:
            raise OSError(str(error) or type(error).__name__) from None

    async def close(self) -> None:
        client, self._client, self._stream = self._client, None, None
        if client is not None:
            await close(client)

    async def _connected(self) -> JetStreamContext:
        """The stream, over a connection that is open as far as is known. Raises `OSError`, `NatsError`."""
        async with self._connecting:
            if self._client is not None and self._stream is not None and self._client.is_connected:
                return self._stream
            if time.monotonic() - self._failed_at < RETRY_SECONDS:
                raise OSError("NATS was not reached a moment ago")
            await self.close()
            try:
                async with asyncio.timeout(CONNECT_WITHIN * 2):
                    self._client, self._stream = await self._connect()
            except Exception:
                self._failed_at = time.monotonic()
                raise
            return self._stream

    async def _connect(self) -> tuple[Client, JetStreamContext]:
        inbox = f"_INBOX.relay-{time.time_ns():x}"
        token = self._keys.relay_token(inbox, time.time() + TOKEN_SECONDS)
        client = Client()
        try:
            await connect(client, self._servers, "relay", token, inbox)
            stream = client.jetstream(timeout=ACK_WITHIN)
            await ensure(
                stream,
                stream_config(
                    self._replicas, subjects=[f"{IN}*"], duplicate_window=KEPT_SECONDS, allow_direct=True
                ),
            )
        except BaseException:
            await close(client)
            raise
        return client, stream


def stream_config(replicas: int, **more: Any) -> StreamConfig:
    """What the stream and its mirrors have in common, and `more`."""
    return StreamConfig(
        name=STREAM,
        num_replicas=replicas,
        max_msgs_per_subject=KEPT_EACH,
        max_age=KEPT_SECONDS,
        republish=RePublish(src=f"{IN}*", dest=f"{OUT}{{{{wildcard(1)}}}}"),
        **more,
    )


async def connect(client: Client, servers: list[str], who: str, token: str, inbox: str) -> None:
    """Connect to one of the servers, with a token and an inbox that it allows. Raises `NatsError`, `OSError`."""
    await client.connect(
        servers,
        name=f"preview-sync {who}",
        error_cb=_unsaid,
        user_jwt_cb=lambda: bytearray(token, "ascii"),
        signature_cb=lambda _: b"",
        inbox_prefix=inbox.encode(),
        allow_reconnect=False,
        max_reconnect_attempts=1,
        reconnect_time_wait=0,
        connect_timeout=CONNECT_WITHIN,
        ping_interval=10,
        max_outstanding_pings=1,
    )


async def ensure(stream: JetStreamContext, wanted: StreamConfig) -> None:
    """Make a stream, or give it the configuration of this release. Raises `APIError`."""
    try:
        found = (await stream.stream_info(STREAM)).config
    except NotFoundError:
        await stream.add_stream(wanted)
        return
    names = (
        "subjects", "num_replicas", "max_msgs_per_subject", "max_age", "duplicate_window", "allow_direct",
        "republish",
    )  # fmt: skip
    if any((getattr(found, name) or None) != (getattr(wanted, name) or None) for name in names):
        await stream.update_stream(wanted)


async def _unsaid(_: Exception) -> None:
    """nats-py logs what it meets, with addresses; what matters of it comes out of the call that fails."""


async def close(client: Client) -> None:
    """Close a connection, within a second."""
    with suppress(NatsError, OSError, TimeoutError):
        async with asyncio.timeout(1.0):
            await client.close()


class Lanes:
    """One lane for each project that has something to publish; it ends when it is empty."""

    def __init__(
        self,
        stream: Stream,
        *,
        may_publish: Callable[[], bool],
        done: Callable[[Event], None],
        count: Callable[[str], None],
    ) -> None:
        """Publish to `stream`.

        Args:
            stream: Where.
            may_publish: Whether the buckets are ours for certain; while they are not, nothing is published.
            done: Is called with each event that the stream has, or never will have.
            count: Is called with what came of each try: new, duplicate, retry, dropped.
        """
        self._stream = stream
        self._may_publish = may_publish
        self._done = done
        self._count = count
        self._lanes: dict[str, deque[Event]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    def put(self, event: Event) -> None:
        """Add the next event of its project."""
        lane = self._lanes.get(event.project)
        if lane is not None:
            lane.append(event)
            return
        self._lanes[event.project] = deque([event])
        task = asyncio.create_task(self._run(event.project), name="relay lane")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Publish no more. What was under way may have arrived or not.

        A lane ends by itself, too: nats-py may swallow a cancellation, as `asyncio.wait_for` does before Python 3.12.
        """
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, project: str) -> None:
        lane = self._lanes[project]
        while lane and await self._publish(lane[0]):
            self._done(lane.popleft())
        del self._lanes[project]

    async def _publish(self, event: Event) -> bool:
        """Publish one event, however long it takes; False: the lanes were closed meanwhile."""
        complained = False
        while not self._closed:
            try:
                if self._may_publish():
                    self._count("new" if await self._stream.publish(event) else "duplicate")
                    return True
            except Refused as error:
                self._count("dropped")
                log.error("relay.dropped", reason=str(error), bytes=len(event.payload))
                return True
            except OSError as error:
                self._count("retry")
                if not complained:
                    complained = True
                    log.warning("relay.retry", reason=str(error))
            await asyncio.sleep(RETRY_SECONDS)
        return False
