"""Writes a scenario from a live channel: the snapshot to begin with, and every event as it came.

Needs what `run` needs of the environment. The scenario must stand by itself, so what the channel did not bring is
fetched from the database and written as a lost event: a hole in the revisions, what was sent while the
connection was down, content by reference that has changed again since, the true files of another epoch. It ends with
Ctrl-C or after `seconds`, and only then is the expectation known and the header written.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from agent.config import Settings
from agent.core.errors import MalformedMessage, PathRefused, SettingsError, Unavailable
from agent.core.messages import Changes, Current, SnapshotOffer, read_event
from agent.core.model import Change, Commit, Manifest, RelPath, digest_of
from agent.daemon import realtime, session_api, tokens_of
from agent.link.source import Received, Resync
from agent.net import exchange, read_whole
from agent.replay.scenario import FORMAT, Expect, Log, Scenario, Step, write_scenario, written
from agent.replay.scenario_file import read_archive

JOIN_SECONDS = 60.0
"""How long the first join may take before the recording is given up."""

PATIENCE = 60.0
"""Seconds without a byte of a snapshot before the recording is given up."""


class Recorder:
    """One recording into `path`, with its snapshot beside it as `<name>.zip`."""

    def __init__(
        self, settings: Settings, path: Path, say: Callable[[str], None], http: httpx.AsyncClient
    ) -> None:
        """Raises `SettingsError` without SESSION_API_URL."""
        api = session_api(settings, tokens_of(settings), http)
        if api is None:
            raise SettingsError(
                ["recording needs SESSION_API_URL, to ask for what the channel does not bring"]
            )
        self._path = path
        self._say = say
        self._http = http
        self._most_bytes = settings.snapshot_max_compressed_bytes
        self._steps: list[Step] = []
        self._behind = False
        self._api = api
        self._link = realtime(settings, api)
        self._log = Log(str(settings.project_id), "", 0, {})
        self._begun = ("", 0)
        self._started = 0.0

    async def run(self, seconds: float | None) -> Scenario:
        """Record until cancelled or for `seconds`; the scenario that was written.

        Raises `Unavailable` or `CredentialRejected` when there is nothing to begin with, or when the end is not known;
        what was heard until then is written in either case, without an expectation.
        """
        joined = asyncio.create_task(self._link.run(), name="link")
        try:
            try:
                async with asyncio.timeout(JOIN_SECONDS):
                    await self._link.receive()
            except TimeoutError:
                why = self._link.report()["why"]
                raise Unavailable("the channel", f"not joined within {JOIN_SECONDS:.0f} s ({why})") from None
            archive = await self._begin()
            self._say(f"listening from revision {self._log.revision}")
            self._started = time.monotonic()
            try:
                async with asyncio.timeout(seconds):
                    while True:
                        await self._take(await self._link.receive())
            except (TimeoutError, asyncio.CancelledError):
                await self._fill("the end")
            except BaseException:
                self._write(archive, known=False)
                raise
        finally:
            joined.cancel()
            await asyncio.gather(joined, return_exceptions=True)
        scenario = self._write(archive, known=not self._behind)
        if self._behind:
            raise Unavailable(f"the end of {self._path}", "the database could not be asked; it has no expect")
        return scenario

    async def _begin(self) -> bytes:
        offer = await self._api.sync(None, 0, "snapshot_missing")
        if not isinstance(offer, SnapshotOffer):
            raise MalformedMessage("sync answer", "no snapshot was offered")
        archive = await self._fetch(offer.snapshot_url)
        manifest, files = _read(archive)
        self._begun = (manifest.epoch, manifest.revision)
        self._log = Log(manifest.project_id, *self._begun, files)
        return archive

    async def _fetch(self, url: str) -> bytes:
        try:
            async with exchange(self._http, "GET", url, timeout=PATIENCE) as answer:
                if not answer.is_success:
                    raise Unavailable("the snapshot", f"HTTP {answer.status_code}")
                return await read_whole(answer, "the snapshot", self._most_bytes)
        except httpx.HTTPError as error:
            raise Unavailable("the snapshot", type(error).__name__) from None

    # --- what the channel brings

    async def _take(self, heard: Received | Resync) -> None:
        if isinstance(heard, Resync):
            await self._fill(f"joined again, {heard.reason}", fault=True)
            self._link.caught_up()
            return
        if self._behind:
            await self._fill("what was missed")
        try:
            read = read_event(heard.event, heard.payload)
        except (MalformedMessage, PathRefused):
            read = None
        contents: dict[RelPath, bytes] = {}
        if isinstance(read, Commit) and read.revision is not None:
            if read.epoch not in (None, self._log.epoch) or not read.complete:
                await self._fill(f"what {heard.event} only announces")
            elif read.revision > self._log.revision + 1:
                await self._fill("a hole", below=read.revision)
            if read.revision > self._log.revision:
                contents = await self._contents(read)
        self._append(Step(self._at_ms(), heard.event, unsigned(heard.payload), contents))
        self._say(f"{self._at_ms() / 1000:8.3f} s  {heard.event}")

    async def _contents(self, read: Commit) -> dict[RelPath, bytes]:
        """Fetch the bytes that an event only refers to.

        Empty when the database has moved on; what it has moved on to is then written first.
        """
        wanted = {
            change.path: change.digest
            for change in read.changes
            if change.by_reference and (change.patch is None or self._log.made(change) is None)
        }
        if not wanted or read.epoch is None or read.revision is None:
            return {}
        found: Mapping[RelPath, bytes] = {}
        try:
            answer = await self._api.sync(read.epoch, read.revision, "reference", sorted(wanted))
            if isinstance(answer, Changes):
                found = {c.path: c.content for c in answer.changes if c.content is not None}
            elif isinstance(answer, SnapshotOffer):
                found = _read(await self._fetch(answer.snapshot_url))[1]
        except (Unavailable, MalformedMessage):
            self._behind = True
        contents = {path: found[path] for path in wanted if path in found}
        if {path: digest_of(content) for path, content in contents.items()} == wanted:
            return contents
        await self._fill("content that has changed again", below=read.revision + 1)
        return {}

    # --- what it did not bring

    async def _fill(self, why: str, *, below: int | None = None, fault: bool = False) -> None:
        """Ask for everything above what is written, and write it as one lost event.

        Args:
            why: for the person who watches.
            below: an event of this revision is to be written next.
            fault: the connection broke; written whatever the answer.
        """
        try:
            changes, epoch, revision = await self._missing()
        except Unavailable as error:
            self._behind = True
            self._say(f"{error}; asking again with the next event")
            changes, epoch, revision = (), self._log.epoch, self._log.revision
        else:
            self._behind = False
        if below is not None and epoch == self._log.epoch:
            revision = min(revision, below - 1)
        lost = (epoch, revision) != (self._log.epoch, self._log.revision)
        if fault or lost:
            self._append(Step(self._at_ms(), fault="disconnect", lost=int(lost)))
        if lost:
            stamp = datetime.now(UTC).isoformat()
            files = [written(change) for change in changes]
            payload = {"files": files, "timestamp": stamp, "revision": revision, "epoch": epoch}
            self._append(Step(self._at_ms(), "bulk:apply", payload))
            why = f"{why}: {len(files)} files up to revision {revision}"
        if fault or lost:
            self._say(f"{self._at_ms() / 1000:8.3f} s  {why}")

    async def _missing(self) -> tuple[Iterable[Change], str, int]:
        """Fetch what the database has above what is written; its epoch and revision."""
        answer = await self._api.sync(self._log.epoch, self._log.revision, "gap")
        if isinstance(answer, Current):
            return (), answer.epoch, answer.revision
        if isinstance(answer, Changes):
            return answer.changes, answer.epoch, answer.revision
        manifest, files = _read(await self._fetch(answer.snapshot_url))
        versions = {path: entry.version for path, entry in manifest.files.items()}
        known = {path: (row.change.version, row.change.content) for path, row in self._log.rows.items()}
        changes = [
            Change(path, digest_of(content), versions[path], content)
            for path, content in files.items()
            if known.get(path) != (versions[path], content)
        ]
        if manifest.base_revision is None:
            gone = self._log.files().keys() - files.keys()
            rows = self._log.rows
            changes += [Change(path, None, (rows[path].change.version or 0) + 1) for path in sorted(gone)]
        else:
            changes += [Change(RelPath(path), None, version) for path, version in manifest.deleted.items()]
        return changes, manifest.epoch, manifest.revision

    # --- what is written

    def _append(self, step: Step) -> None:
        self._steps.append(step)
        if step.event is not None:
            self._log.commit(step, str(self._path))

    def _at_ms(self) -> int:
        return round((time.monotonic() - self._started) * 1000)

    def _write(self, archive: bytes, *, known: bool) -> Scenario:
        """Write the scenario and the snapshot beside it; `known`: whether the end is."""
        snapshot = self._path.with_suffix(".zip")
        expect = Expect(self._log.head()["tree_hash"]) if known else None
        scenario = Scenario(
            FORMAT, self._log.project_id, *self._begun, snapshot.name, expect, tuple(self._steps)
        )
        text = write_scenario(scenario)
        for path, content in ((snapshot, archive), (self._path, text.encode())):
            unfinished = path.with_name(f"{path.name}.part")
            unfinished.write_bytes(content)
            unfinished.replace(path)
        return scenario


def _read(archive: bytes) -> tuple[Manifest, dict[RelPath, bytes]]:
    manifest, files = read_archive(archive)
    if manifest is None:
        raise MalformedMessage("the snapshot", "it has no manifest, so nobody knows its revision")
    return manifest, files


def record(settings: Settings, path: Path, seconds: float | None, say: Callable[[str], None]) -> int:
    """Record until Ctrl-C or for `seconds`; return the exit code, 0 when a scenario was written whole.

    Raises `SettingsError`, before anything is recorded, when it cannot be written to `path`.
    """
    if not path.parent.is_dir():
        raise SettingsError([f"cannot record into {path}: there is no directory {path.parent}"])
    if path.suffix == ".zip":
        raise SettingsError([f"cannot record into {path}: .zip is the name of the snapshot beside it"])
    for each in (path, path.with_suffix(".zip")):
        if each.exists():
            raise SettingsError([f"cannot record into {path}: {each} exists; remove it or name another"])

    async def until_stopped() -> Scenario:
        async with httpx.AsyncClient(trust_env=False) as http:
            recording = asyncio.create_task(Recorder(settings, path, say, http).run(seconds))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, recording.cancel)
            return await recording

    say(f"recording into {path}; Ctrl-C ends it")
    try:
        scenario = asyncio.run(until_stopped())
    except asyncio.CancelledError:
        say("ended before there was anything to record; nothing is written")
        return 130
    except Unavailable as error:
        say(f"preview-agent: {error}")
        return 69
    say(f"{len(scenario.steps)} steps in {path}; replay it with: preview-agent replay {path}")
    return 0


def unsigned(payload: dict[str, Any]) -> dict[str, Any]:
    """Return `payload` without the signature of a snapshot's URL: a scenario is kept and shared."""
    url = payload.get("snapshot_url")
    return {**payload, "snapshot_url": url.partition("?")[0]} if isinstance(url, str) else payload
