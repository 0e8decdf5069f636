"""Write a scenario from a live channel: the snapshot to begin with, and every event as it came.

Needs what `run` needs of the environment. What an event does not carry is fetched at once, so that the scenario stands
by itself. It ends with Ctrl-C or after `seconds`, and only then is the expectation known and the header written.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import orjson

from agent.config import Settings
from agent.errors import CredentialRejected, MalformedMessage, Unavailable
from agent.model import Commit, RelPath
from agent.replay import files_of, manifest_of
from agent.scenario import FORMAT, Log, Scenario, read_scenario
from agent.session import SessionApi
from agent.signals import Received, Resync
from agent.stream import RealtimeStream
from agent.tokens import Tokens
from agent.wire import Changes, SnapshotOffer, read_event


class Recorder:
    """One recording into `path`, with its snapshot beside it as `<name>.zip`."""

    def __init__(self, settings: Settings, path: Path, say: Callable[[str], None]) -> None:
        self._settings = settings
        self._path = path
        self._say = say
        self._steps: list[dict[str, object]] = []

    async def run(self, seconds: float | None) -> Scenario:
        """Record until cancelled or for `seconds`; the scenario that was written.

        Raises `Unavailable` or `CredentialRejected` when there is no snapshot to begin with.
        """
        settings = self._settings
        if settings.session_api_url is None or settings.realtime_url is None:
            raise CredentialRejected("recording needs SESSION_API_URL and REALTIME_URL")
        first = settings.realtime_token
        key = settings.realtime_api_key
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            tokens = Tokens(first.reveal() if first else None, settings.realtime_token_file)
            api = SessionApi(settings.session_api_url, settings.session_id, tokens, http)
            topic = f"realtime:project:{settings.project_id}"
            link = RealtimeStream(settings.realtime_url, key.reveal() if key else None, topic, api)
            joined = asyncio.create_task(link.run(), name="link")
            try:
                async with asyncio.timeout(60):
                    await link.receive()
                archive = await self._snapshot(api, http)
                await self._listen(link, api, seconds)
            finally:
                joined.cancel()
                await asyncio.gather(joined, return_exceptions=True)
            return self._write(archive)

    async def _snapshot(self, api: SessionApi, http: httpx.AsyncClient) -> bytes:
        offer = await api.sync(None, 0, "snapshot_missing")
        if not isinstance(offer, SnapshotOffer):
            raise MalformedMessage("sync answer", "no snapshot was offered")
        answer = await http.get(offer.snapshot_url)
        if not answer.is_success:
            raise Unavailable("the snapshot", f"HTTP {answer.status_code}")
        return answer.content

    async def _listen(self, link: RealtimeStream, api: SessionApi, seconds: float | None) -> None:
        started = time.monotonic()
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(seconds):
                while True:
                    heard = await link.receive()
                    at_ms = round((time.monotonic() - started) * 1000)
                    if isinstance(heard, Resync):
                        self._steps.append({"at_ms": at_ms, "fault": "disconnect"})
                        self._say(f"{at_ms / 1000:8.3f} s  rejoined ({heard.reason})")
                        continue
                    step: dict[str, object] = {"at_ms": at_ms, "event": heard.event, "payload": heard.payload}
                    if contents := await self._contents(heard, api):
                        step["bytes"] = contents
                    self._steps.append(step)
                    self._say(f"{at_ms / 1000:8.3f} s  {heard.event}")

    async def _contents(self, received: Received, api: SessionApi) -> dict[RelPath, str]:
        """The bytes that the event only refers to, as they are in the database now."""
        try:
            read = read_event(received.event, received.payload)
        except MalformedMessage:
            return {}
        wanted = (
            [change.path for change in read.changes if change.by_reference]
            if isinstance(read, Commit)
            else []
        )
        if not wanted or not isinstance(read, Commit) or read.epoch is None or read.revision is None:
            return {}
        answer = await api.sync(read.epoch, read.revision, "reference", wanted)
        if not isinstance(answer, Changes):
            raise Unavailable("the content of a file by reference", "the answer was no list of changes")
        return {
            change.path: base64.b64encode(change.content).decode()
            for change in answer.changes
            if change.path in wanted and change.content is not None
        }

    def _write(self, archive: bytes) -> Scenario:
        manifest = manifest_of(archive)
        snapshot = self._path.with_suffix(".zip")
        header: dict[str, object] = {
            "scenario": FORMAT,
            "project_id": manifest["project_id"],
            "epoch": manifest["epoch"],
            "revision": manifest["revision"],
            "snapshot": snapshot.name,
        }
        lines = [header, *self._steps]
        scenario = read_scenario("\n".join(orjson.dumps(line).decode() for line in lines))
        log = Log(scenario.project_id, scenario.epoch, scenario.revision, files_of(archive))
        for step in scenario.steps:
            if step.event is not None:
                log.commit(step)
        header["expect"] = {"tree_hash": log.head()["tree_hash"]}
        snapshot.write_bytes(archive)
        self._path.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
        return scenario


def record(settings: Settings, path: Path, seconds: float | None, say: Callable[[str], None]) -> int:
    """The command: record until Ctrl-C or for `seconds`; 0 when a scenario was written."""

    async def until_stopped() -> Scenario:
        recording = asyncio.create_task(Recorder(settings, path, say).run(seconds))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, recording.cancel)
        return await recording

    say(f"recording into {path}; Ctrl-C ends it")
    scenario = asyncio.run(until_stopped())
    say(f"{len(scenario.steps)} steps in {path}; replay it with: preview-agent replay {path}")
    return 0
