"""Prints a project's events as they happen: the command `tail PROJECT`.

Beside a `dev` whose agent hears NATS they are read there, else through the official `realtime` client, which shows what
code of the product would get. That gives up after a few reconnects and says so at most in its log, so its state is
polled once a second, and a client that went deaf is replaced.

    12:01:07.412  file:update   r12 v3  src/App.tsx  (1,204 bytes)
    12:01:09.001  file:delete   r13 v4  src/old.ts
    12:01:10.550  bulk:apply    r14     3 files: +src/a.ts +src/b.ts -src/c.ts
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from realtime import AsyncRealtimeClient, RealtimeSubscribeStates

from orchestrator_stub.config import SettingsError
from orchestrator_stub.devstack.state_directory import StateDirectory, running_dev
from orchestrator_stub.relay.accounts import OUT, NatsKeys

LOOK_EVERY = 1.0
"""Seconds between looks at whether the client is still connected and joined."""

JOIN_TIMEOUT = 10
"""Seconds; the client's own default."""

NATS_SECONDS = 8 * 3600.0
"""How long one connection to NATS lasts."""

SHOWN_FILES = 6
"""Of a bulk; the rest is a number."""


@dataclass(frozen=True, slots=True)
class Channel:
    """What to listen to, and with which key."""

    realtime_url: str
    service_key: str
    project_id: UUID
    nats_url: str | None = None
    nats_keys: Path | None = None


def find_channel(project: str, state: Path) -> Channel:
    """The channel of `project` on the running local stack; `-` is the project that stack made.

    Raises `SettingsError` when no stack runs there, or the id is no UUID.
    """
    path = state / "dev.json"
    try:
        info = running_dev(state)
        url, key, made = info["orchestrator_url"], info["service_key"], info["project_id"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SettingsError(
            [f"cannot read {path}: is `preview-orchestrator dev` running? (--state says where)"]
        ) from None
    try:
        listened = UUID(made if project == "-" else project)
    except ValueError:
        raise SettingsError([f"PROJECT must be a project's UUID, or `-`; it is {project!r}"]) from None
    nats = info.get("nats_url")
    return Channel(
        f"{url}/realtime/v1", key, listened, nats, StateDirectory(state).nats_keys if nats else None
    )


def describe(event: str, payload: dict[str, Any]) -> str:
    """One event on one line, without its content. Whatever the payload holds, this does not raise."""
    revision = f"r{payload['revision']}" if "revision" in payload else ""
    head = f"{event:<13} {revision:<6}"
    files = payload.get("files")
    if event == "bulk:apply" and isinstance(files, list):
        if payload.get("complete") is False:
            return f"{head} too many files to name; ask sync"
        signs = [
            f"{'-' if file.get('action') == 'delete' else '+'}{_plain(file.get('file_path'))}"
            for file in files
            if isinstance(file, dict)
        ]
        more = f" … {len(signs) - SHOWN_FILES} more" if len(signs) > SHOWN_FILES else ""
        return f"{head} {len(signs)} files: {' '.join(signs[:SHOWN_FILES])}{more}"
    if "file_path" not in payload:
        return head.rstrip()
    content, size = payload.get("content"), payload.get("size")
    if size is None and isinstance(content, str):
        size = len(content.encode())
    detail = ""
    if event == "file:update":
        detail = f"  ({size:,} bytes)" if isinstance(size, int) else "  (size unknown)"
        if content is None:
            splices = payload.get("splices")
            form = f"{len(splices)} splices" if isinstance(splices, list) else "by reference"
            detail = f"{detail[:-1]}, {form})"
    return f"{head} v{payload.get('version', '?')}  {_plain(payload['file_path'])}{detail}"


def _plain(text: object) -> str:
    """Fit for a terminal: a file's name must not move the cursor."""
    return "".join(c if c.isprintable() else "�" for c in str(text))


async def run_tail(project: str, state: Path, *, out: TextIO | None = None, as_json: bool = False) -> int:
    """Print until cancelled; `as_json`: the events whole, one JSON object a line. Raises `SettingsError`."""
    channel, screen = find_channel(project, state), out or sys.stdout
    # It logs each message it cannot deliver; what matters of that is said here.
    logging.getLogger("realtime").setLevel(logging.CRITICAL)

    def heard(message: Any) -> None:
        # The client's listener ends for good when a callback raises.
        with suppress(Exception):
            event, payload = str(message["event"]), dict(message["payload"])
            if as_json:
                line = json.dumps({"event": event, "payload": payload}, ensure_ascii=False)
            else:
                line = f"{datetime.now():%H:%M:%S.%f}"[:-3] + f"  {describe(event, payload)}"
            screen.write(line + "\n")
            screen.flush()

    while True:
        reason = await (_listen(channel, heard) if channel.nats_url is None else _listen_nats(channel, heard))
        sys.stderr.write(f"preview-orchestrator tail: {reason}; connecting again\n")
        await asyncio.sleep(LOOK_EVERY)


async def _listen(channel: Channel, heard: Callable[[Any], None]) -> str:
    """Until the client is of no use any more; says why."""
    client = AsyncRealtimeClient(
        channel.realtime_url, token=channel.service_key, timeout=JOIN_TIMEOUT, max_retries=1
    )
    told: list[str] = []

    def status(state: RealtimeSubscribeStates, error: Exception | None) -> None:
        if state is not RealtimeSubscribeStates.SUBSCRIBED:
            told.append(f"{state.value.lower().replace('_', ' ')}{f' ({error})' if error else ''}")

    try:
        subscribed = client.channel(f"project:{channel.project_id}", {"config": {
            "broadcast": {"ack": False, "self": False}, "presence": {"key": "", "enabled": False}, "private": True,
        }})  # fmt: skip
        subscribed.on_broadcast("*", heard)
        await subscribed.subscribe(status)
        while client.is_connected and subscribed.is_joined and not told:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(LOOK_EVERY)
        return told[0] if told else "the connection is lost"
    except Exception as error:
        return f"cannot listen: {error}"
    finally:
        with suppress(Exception):
            await client.close()


async def _listen_nats(channel: Channel, heard: Callable[[Any], None]) -> str:
    """Until the connection ends, as it does with its token; says why."""
    assert channel.nats_url is not None
    assert channel.nats_keys is not None
    client = Client()

    async def take(message: Msg) -> None:
        with suppress(ValueError):
            event = (message.headers or {}).get("Pv-Event", "")
            heard({"event": event, "payload": json.loads(message.data)})

    async def unsaid(_: Exception) -> None:
        """What it meets comes out below."""

    try:
        keys = NatsKeys.read(channel.nats_keys)
        token = keys.listener_token(channel.project_id, time.time() + NATS_SECONDS)
        await client.connect(
            channel.nats_url, user_jwt_cb=lambda: bytearray(token, "ascii"), signature_cb=lambda _: b"",
            allow_reconnect=False, max_reconnect_attempts=1, connect_timeout=JOIN_TIMEOUT, error_cb=unsaid,
        )  # fmt: skip
        await client.subscribe(f"{OUT}{channel.project_id}", cb=take)
        while client.is_connected:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(LOOK_EVERY)
        return "the connection is lost"
    except (NatsError, OSError, ValueError) as error:
        return f"cannot listen: {error}"
    finally:
        with suppress(NatsError, OSError):
            await client.close()
