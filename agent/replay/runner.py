"""Run a scenario against a directory with the agent's own loop, disk and ledger, and say whether it ended as it should.

Only the two ends are other than in a container: events come from the scenario instead of a socket, and the session API
is answered by the scenario's log. Everything between is the code that runs in production. As fast as it goes means in
simulated time: the recorded pace and what the loop waits for (a hole's patience, a backoff, the next look of a
heartbeat) are waited for on a clock that jumps, so a replay costs what its work costs, and ends the same on a busy
machine. In real time, and with the dev server, which is a process of its own, the clock is the real one.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import random
import socket
import tempfile
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import orjson

from agent.config import Settings, SnapshotLimits, read_settings
from agent.core.errors import AgentError, MalformedMessage, SettingsError
from agent.core.messages import MANIFEST_PATH, read_head
from agent.core.model import PROTECTED, RelPath, Tree, digest_of, tree_hash
from agent.core.scheduler import Follower, SchedulerSettings
from agent.devserver.state import State
from agent.devserver.supervisor import Supervisor
from agent.link.source import Received, Resync
from agent.replay.faults import AWAY, DELTAS, PAUSES, Broken, Committed, Delivered, Happening, Mischief, play
from agent.replay.harness import FullDisk, Killable, Life, Noted, ScenarioSource
from agent.replay.result import Result, as_json, as_junit, compare
from agent.replay.scenario import Log
from agent.replay.scenario_file import Loaded, load
from agent.replay.simulated_clock import SimulatedLoop
from agent.session_api import PROBLEM_MEDIA_TYPE, PROBLEM_TYPE, SessionApi
from agent.sync.catchup import CatchUp
from agent.sync.engine import Sync
from agent.sync.ledger import Ledger
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import SyncStatus
from agent.tokens import Tokens

HOST = "http://scenario"
SETTLE_SECONDS = 180.0
"""How long the end may take, on the clock of the replay: the longest patience of the loop is 60 s, and two of them may
follow each other."""
DEV_SECONDS = 400.0
"""How long the dev server may take to serve the end: an install has 300 s, a start 60."""
QUIET = 1.0
"""Seconds for which the dev server must want nothing: longer than its debounce of saves."""

NONE = Mischief()
"""The scenario as it is."""


@dataclass(frozen=True, slots=True)
class Manner:
    """How to replay. `environ`: of the dev server, when there is to be one."""

    mischief: Mischief = NONE
    real_time: bool = False
    optimistic: bool = False
    environ: Mapping[str, str] | None = None

    @property
    def simulated(self) -> bool:
        """Whether the clock jumps."""
        return not self.real_time and self.environ is None

    @property
    def paced(self) -> bool:
        """Whether things happen when they were recorded; what is shuffled has a time of its own."""
        return self.real_time or (self.simulated and not self.mischief.shuffle)


class Replay:
    """One run of one scenario in `directory`, which will hold project, staging and ledger."""

    def __init__(self, loaded: Loaded, directory: Path, manner: Manner) -> None:
        self._scenario = loaded.scenario
        self._directory = directory
        self._manner = manner
        scenario = loaded.scenario
        self._log = Log(scenario.project_id, scenario.epoch, scenario.revision, loaded.files)
        self._first = loaded.archive if loaded.archive is not None else self._zip()
        self._offered: dict[str, bytes] = {}
        self._tokens = 0
        self._now: Life | None = None
        self._settings = None if manner.environ is None else _dev_settings(manner.environ, directory)
        self._dice = random.Random(manner.mischief.seed)  # noqa: S311 - a reproducible disorder is the point
        self.shown: set[str] = set()
        self.catch_ups = 0
        self.delivered = self.committed = self.faults = 0
        self.dev_server: str | None = None
        self._unserved: tuple[str, ...] = ()

    @property
    def project(self) -> Path:
        """The directory that is compared at the end."""
        return self._directory / "project"

    @property
    def _life(self) -> Life:
        assert self._now is not None
        return self._now

    async def run(self) -> None:
        """Play all steps, then wait until nothing is left to do. Raises what ended the loop, and `TimeoutError`."""
        async with httpx.AsyncClient(
            transport=httpx.MockTransport(self._respond), trust_env=False
        ) as self._http:
            await self._begin_life()
            clock = asyncio.get_running_loop().time
            started = clock()
            try:
                for happening in play(self._scenario.steps, self._manner.mischief):
                    if self._manner.paced and isinstance(happening, Committed | Broken) and happening.step:
                        await asyncio.sleep(max(0.0, started + happening.step.at_ms / 1000 - clock()))
                    await self._happen(happening)
                await self._settle()
                await self._serve()
            finally:
                await self._life.end()

    async def _happen(self, happening: Happening) -> None:
        if isinstance(happening, Committed):
            self._log.commit(happening.step)
            self.committed += 1
        elif isinstance(happening, Broken):
            self.faults += 1
            await self._break(happening.fault)
        elif isinstance(happening, Delivered):
            step = happening.step
            assert step.event is not None
            self._life.source.waiting.put_nowait(Received(step.event, dict(step.payload), time.time()))
            self.delivered += 1
            await asyncio.sleep(0)
        else:
            await asyncio.sleep(happening.seconds)

    async def _break(self, fault: str) -> None:
        life = self._life
        match fault:
            case "disconnect":
                life.source.waiting.put_nowait(Resync("joined"))
            case "expire_token":
                # What the link does then: the next token, and a join with it.
                self._tokens += 1
                await life.api.renew_token()
                life.source.waiting.put_nowait(Resync("joined"))
            case "disk_full":
                life.disk.failures += 1
            case "restart_agent":
                await life.end()
                await self._begin_life()
            case "crash":
                life.workspace.killed = True
                await life.end()
                await self._begin_life()

    async def _begin_life(self) -> None:
        source = ScenarioSource()
        metrics = Metrics()
        problems = Noted(metrics, self.shown)
        disk = FullDisk(self.project, self._directory / "staging")
        ledger = Ledger(self._directory / "ledger.sqlite")
        follower = Follower(Tree(), SchedulerSettings(optimistic=self._manner.optimistic))
        workspace = Killable(disk, ledger, problems)
        api = SessionApi(HOST, "replay", Tokens(self._token()), self._http)
        dev = None
        if self._settings is not None:
            dev = Supervisor(self._settings, environ=self._manner.environ)
        catch_up = CatchUp(
            api,
            disk,
            self._http,
            SnapshotLimits(),
            self._scenario.project_id,
            problems,
            lambda: follower.tree.entries,
        )
        hydrated = asyncio.Event()

        def on_hydrated() -> None:
            hydrated.set()
            if dev is not None:
                dev.project_ready()

        sync = Sync(
            follower,
            workspace,
            source,
            catch_up,
            problems,
            metrics,
            SyncStatus(),
            snapshot_url=f"{HOST}/snapshot.zip",
            on_tree=dev.files_changed if dev is not None else lambda _: None,
            on_hydrated=on_hydrated,
            drift_policy="off" if self._manner.simulated else "report",
            clock=asyncio.get_running_loop().time,
        )
        source.waiting.put_nowait(Resync("joined"))
        self._now = Life(source, disk, ledger, workspace, follower, sync, api, dev)
        life = asyncio.create_task(sync.run(), name="replayed-sync")
        self._now.tasks.append(life)
        if dev is not None:
            self._now.tasks.append(asyncio.create_task(dev.run(), name="replayed-dev-server"))
            self._now.tasks.append(asyncio.create_task(self._note(dev), name="replayed-looks"))
        ready = asyncio.create_task(hydrated.wait())
        await asyncio.wait([ready, life], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        self._now.look()

    async def _note(self, dev: Supervisor) -> None:
        while True:
            self.shown.update(problem.kind for problem in dev.problems())
            await asyncio.sleep(0.05)

    async def _settle(self) -> None:
        """Until the loop is at rest at the log's head, asked as a heartbeat asks."""
        life, wait, at_rest = self._life, 0.02, 0
        async with asyncio.timeout(SETTLE_SECONDS):
            # Once more after it was first at rest: what the last question finds must be seen to as well.
            while at_rest < 2:
                life.look()
                life.sync.hear(read_head(self._log.head()))
                await asyncio.sleep(wait)
                cursor = life.sync.tree.cursor
                there = (cursor.epoch, cursor.revision) == (self._log.epoch, self._log.revision)
                at_rest = (
                    at_rest + 1 if there and life.source.waiting.empty() and life.follower.settled else 0
                )
                wait = min(wait * 1.2, 1.0)

    async def _serve(self) -> None:
        """Until the dev server serves the end, or will not."""
        dev = self._life.dev
        if dev is None:
            return
        clock = asyncio.get_running_loop().time
        deadline, quiet_since = clock() + DEV_SECONDS, clock()
        while clock() < min(deadline, quiet_since + QUIET):
            self._life.look()
            await asyncio.sleep(0.05)
            if dev.state not in (State.READY, State.ABSENT, State.FAILED) or dev.installing:
                quiet_since = clock()
        self.dev_server = dev.state.value
        problems = dev.problems()
        if problems or dev.state not in (State.READY, State.ABSENT):
            said = [line for problem in problems for line in problem.detail.splitlines()]
            self._unserved = (f"the dev server is {dev.state} at the end", *(f"    {line}" for line in said))

    # --- the scenario's orchestrator and storage

    async def _respond(self, request: httpx.Request) -> httpx.Response:
        """The answer; when things are shuffled it is of a moment ago when it arrives, or there is none."""
        answer = self._answer(request)
        if self._manner.mischief.shuffle and not request.url.path.endswith("/token"):
            await asyncio.sleep(self._dice.choice(PAUSES))
            if self._dice_says(AWAY):
                return httpx.Response(503, stream=httpx.ByteStream(b"away for a moment"))
        return answer

    def _answer(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        if name == "snapshot.zip":
            return httpx.Response(200, stream=httpx.ByteStream(self._first))
        if name in self._offered:
            return httpx.Response(200, stream=httpx.ByteStream(self._offered[name]))
        if name == "token":
            return _json(200, {"realtime_token": self._token(), "expires_at": None})
        self.catch_ups += 1
        question = orjson.loads(request.content)
        self.shown.add(question["reason"])
        if request.headers["authorization"] != f"Bearer {self._token()}":
            return _json(
                401, {"type": f"{PROBLEM_TYPE}token_expired", "title": "token expired", "status": 401}
            )
        name = f"{self.catch_ups}.zip"
        answer = self._log.answer(question, f"{HOST}/{name}")
        if answer["kind"] == "changes" and self._dice_says(DELTAS) and not question.get("paths"):
            self._offered[name] = self._zip(base=question["revision"])
            answer = {"kind": "snapshot", "snapshot_url": f"{HOST}/{name}", "manifest": None}
        elif answer["kind"] == "snapshot":
            self._offered[name] = self._zip()
        return _json(200, answer)

    def _token(self) -> str:
        claims = json.dumps({"role": "preview_agent", "jti": self._tokens}).encode()
        return f"eyJhbGciOiJub25lIn0.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.eA"

    def _dice_says(self, share: float) -> bool:
        return self._manner.mischief.shuffle and self._dice.random() < share

    def _zip(self, base: int | None = None) -> bytes:
        manifest, files = self._log.manifest(base), self._log.files()
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MANIFEST_PATH, json.dumps(manifest))
            for item in manifest["files"]:
                archive.writestr(item["file_path"], files[item["file_path"]])
        return whole.getvalue()

    # --- the end

    def verdict(self, name: str, seconds: float, problems: Sequence[str]) -> Result:
        """How it ended; `problems`: why it did not end by itself."""
        expect, here = self._scenario.expect, self._files()
        wanted = self._log.files()
        expected_hash = str(self._log.head()["tree_hash"])
        if expect is not None:
            expected_hash = expect.tree_hash
            if expect.files is not None:
                wanted = {path: text.encode() for path, text in expect.files.items()}
        found = tree_hash({path: digest_of(content) for path, content in here.items()})
        differences = [*problems, *compare(here, wanted), *self._unserved]
        if not differences and found != expected_hash:
            differences = [
                f"the tree is what the scenario's events say, {found[:12]}…, and expect says {expected_hash[:12]}…"
            ]
        return Result(
            name,
            seconds,
            self.delivered,
            self.committed,
            self.faults,
            self.catch_ups,
            found,
            expected_hash,
            self.dev_server,
            tuple(sorted(self.shown)),
            tuple(differences),
        )

    def _files(self) -> dict[RelPath, bytes]:
        """What is on disk, but for what the project's own programs put there."""
        here: dict[RelPath, bytes] = {}
        for above, directories, names in os.walk(self.project):
            directories[:] = [name for name in directories if name not in PROTECTED]
            for name in names:
                path = Path(above, name)
                if path.is_file() and not path.is_symlink():
                    here[RelPath(path.relative_to(self.project).as_posix())] = path.read_bytes()
        if self._life.dev is not None:
            ours = self._life.sync.tree.entries
            here = {path: content for path, content in here.items() if path in ours}
        return here


def _json(status: int, body: Mapping[str, object]) -> httpx.Response:
    """As an answer comes from a socket: its body not read yet."""
    media = "application/json" if status < 400 else PROBLEM_MEDIA_TYPE
    stream = httpx.ByteStream(orjson.dumps(body))
    return httpx.Response(status, headers={"content-type": media}, stream=stream)


def _dev_settings(environ: Mapping[str, str], directory: Path) -> Settings:
    """The settings of the dev server: the environment's, but for where things are."""
    nobody = "00000000-0000-0000-0000-000000000000"
    given = {key: value for key, value in environ.items() if key.upper() not in ("PROJECT_ID", "SESSION_ID")}
    settings = read_settings({**given, "PROJECT_ID": nobody, "SESSION_ID": nobody})
    port = settings.dev_port
    if "DEV_PORT" not in environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    return settings.model_copy(
        update={
            "project_dir": directory / "project",
            "state_dir": directory,
            "modules_dir": settings.modules_dir or directory / "modules",
            "dev_host": environ.get("DEV_HOST") or "127.0.0.1",
            "dev_port": port,
        }
    )


def replay(path: Path, directory: Path | None = None, manner: Manner | None = None) -> Result:
    """Replay the scenario at `path`. `directory`: an empty or new one; None: a temporary one.

    Raises `MalformedMessage` for a scenario that cannot be read.
    """
    loaded, manner = load(path), manner or Manner()
    with tempfile.TemporaryDirectory(prefix="preview-replay-") as temporary:
        run = Replay(loaded, directory or Path(temporary), manner)
        started = time.monotonic()
        problems: list[str] = []
        try:
            with asyncio.Runner(loop_factory=SimulatedLoop if manner.simulated else None) as runner:
                runner.run(run.run())
        except TimeoutError:
            problems = [f"not at rest after {SETTLE_SECONDS:.0f} s"]
        except AgentError as error:
            problems = [f"the loop ended: {error}"]
        return run.verdict(path.stem, time.monotonic() - started, problems)


def replay_all(
    paths: Sequence[Path],
    directory: Path | None,
    say: Callable[[str], None],
    *,
    manner: Manner,
    json_report: Path | None,
    junit: Path | None,
) -> int:
    """Replay every scenario, say one line for each and a diff where one fails.

    Returns 0 when all ended as they should, 1 when one did not, 64 when one could not be read. Raises `SettingsError`
    when there is nowhere to work or to report.
    """
    places = _places(paths, directory)
    for report in (json_report, junit):
        if report is not None and (report.is_dir() or not report.parent.is_dir()):
            raise SettingsError([f"cannot write {report}: it is a directory, or there is none for it"])
    results = []
    for path, place in zip(paths, places, strict=True):
        try:
            result = replay(path, place, manner)
        except MalformedMessage as error:
            result = Result(path.stem, unreadable=str(error))
        results.append(result)
        for line in result.lines():
            say(line)
    if json_report is not None:
        json_report.write_bytes(as_json(results, manner.mischief))
    if junit is not None:
        junit.write_text(as_junit(results, manner.mischief), encoding="utf-8")
    if any(result.differences for result in results):
        return 1
    return 0 if all(result.ok for result in results) else 64


def _places(paths: Sequence[Path], directory: Path | None) -> list[Path | None]:
    """Where each scenario is run: `directory` itself for one, one below it for each of several."""
    if directory is None:
        return [None] * len(paths)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise SettingsError([f"cannot replay into {directory}: it is not an empty directory; name a new one"])
    if len(paths) == 1:
        return [directory]
    taken: set[str] = set()
    places: list[Path | None] = []
    for path in paths:
        name, number = path.stem, 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        places.append(directory / name)
    return places
