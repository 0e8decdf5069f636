"""Replays a scenario against a directory with the agent's own loop, disk and ledger, and compares how it ends.

Only the two ends differ from a container: events come from the scenario instead of a socket, and the session API is
answered from the scenario's log. Unless a dev server or real time is asked for, the clock is simulated: waits (the
recorded pace, a hole's grace, a backoff, a heartbeat's interval) take none, and a busy machine changes no result.
"""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
from pydantic import SecretStr

from agent.config import Settings, read_settings
from agent.core.errors import AgentError, MalformedMessage, SettingsError
from agent.core.messages import read_head
from agent.core.model import PROTECTED, RelPath, digest_of, tree_hash
from agent.devserver.state import Phase
from agent.link.source import Received, Resync
from agent.replay.faults import NO_FAULTS, Committed, Delivered, Fault, FaultPlan, Occurrence, Pause, inject
from agent.replay.harness import POLL, AgentRun
from agent.replay.orchestrator import FIRST_SNAPSHOT, HOST, ScenarioOrchestrator
from agent.replay.result import Result, as_json, as_junit, compare
from agent.replay.scenario import Log
from agent.replay.scenario_file import Loaded, load
from agent.replay.simulated_clock import SimulatedLoop

SETTLE_SECONDS = 180.0
"""How long the end may take, by the replay's clock: the longest wait of the loop is 60 s, and two may follow each
other."""
DEV_SECONDS = 400.0
"""How long the dev server may take to serve the end: an install has 300 s, a start 60."""
QUIET = 1.0
"""Seconds for which the dev server must want nothing: longer than its debounce of saves."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """How to replay. `environ`: of the dev server; None: none is run."""

    faults: FaultPlan = NO_FAULTS
    real_time: bool = False
    optimistic: bool = False
    environ: Mapping[str, str] | None = None

    @property
    def simulated(self) -> bool:
        """Whether the clock jumps."""
        return not self.real_time and self.environ is None

    @property
    def paced(self) -> bool:
        """Whether things happen when they were recorded; what is shuffled has pauses of its own."""
        return self.real_time or (self.simulated and not self.faults.shuffle)


class Replay:
    """One replay of one scenario in `directory`, which will hold project, staging and ledger."""

    def __init__(self, name: str, loaded: Loaded, directory: Path, options: ReplayOptions) -> None:
        """Raises `SettingsError` when the dev server's environment is wrong."""
        scenario = loaded.scenario
        self.result = Result(name)
        """Filled in on the way, and whole after `finish`."""
        self._scenario = scenario
        self._options = options
        self._log = Log(scenario.project_id, scenario.epoch, scenario.revision, loaded.files)
        self._orchestrator = ScenarioOrchestrator(self._log, loaded.archive, options.faults)
        self._settings = _settings(scenario.project_id, directory, options)
        self._run: AgentRun
        self._kinds: set[str] = set()

    async def run(self) -> None:
        """Play all steps, then wait until nothing is left to do. Raises what ended the loop, and `TimeoutError`."""
        transport = httpx.MockTransport(self._orchestrator.respond)
        async with httpx.AsyncClient(transport=transport, trust_env=False) as self._http:
            await self._start()
            clock = asyncio.get_running_loop().time
            started = clock()
            try:
                for occurrence in inject(self._scenario.steps, self._options.faults):
                    if self._options.paced and isinstance(occurrence, Committed | Fault) and occurrence.step:
                        await asyncio.sleep(max(0.0, started + occurrence.step.at_ms / 1000 - clock()))
                    await self._play(occurrence)
                await self._settle()
                if self._run.dev_server:
                    await self._serve()
            finally:
                await self._run.end()

    async def _start(self) -> None:
        token = SecretStr(self._orchestrator.token())
        self._run = await AgentRun.start(
            self._settings.model_copy(update={"realtime_token": token}),
            http=self._http,
            kinds=self._kinds,
            environ=self._options.environ,
            simulated=self._options.simulated,
        )

    async def _play(self, occurrence: Occurrence) -> None:
        match occurrence:
            case Committed(step):
                self._log.commit(step)
                self.result.committed += 1
            case Delivered(step):
                assert step.event is not None
                self._run.source.waiting.put_nowait(Received(step.event, dict(step.payload), time.time()))
                self.result.delivered += 1
                await asyncio.sleep(0)
            case Pause(seconds):
                await asyncio.sleep(seconds)
            case Fault(kind):
                self.result.faults += 1
                await self._fail(kind)

    async def _fail(self, kind: str) -> None:
        match kind:
            case "disconnect":
                self._run.source.waiting.put_nowait(Resync("joined"))
            case "expire_token":
                # What the link does then: the next token, and a join with it.
                self._orchestrator.expire_token()
                assert self._run.agent.api is not None
                await self._run.agent.api.renew_token()
                self._run.source.waiting.put_nowait(Resync("joined"))
            case "disk_full":
                self._run.disk.failures += 1
            case "restart_agent" | "crash":
                await self._run.end(killed=kind == "crash")
                await self._start()

    async def _settle(self) -> None:
        """Wait until the loop is at rest at the log's head, asked as a heartbeat asks."""
        run, wait, at_rest = self._run, 0.02, 0
        sync, follower = run.agent.sync, run.agent.follower
        async with asyncio.timeout(SETTLE_SECONDS):
            # Once more after it was first at rest: what the last question finds must be seen to as well.
            while at_rest < 2:
                run.check()
                sync.hear(read_head(self._log.head()))
                await asyncio.sleep(wait)
                cursor = sync.tree.cursor
                there = (cursor.epoch, cursor.revision) == (self._log.epoch, self._log.revision)
                at_rest = at_rest + 1 if there and run.source.waiting.empty() and follower.settled else 0
                wait = min(wait * 1.2, 1.0)

    async def _serve(self) -> None:
        """Wait until the dev server serves the end, or will not."""
        dev = self._run.agent.supervisor
        clock = asyncio.get_running_loop().time
        deadline, quiet_since = clock() + DEV_SECONDS, clock()
        while clock() < min(deadline, quiet_since + QUIET):
            self._run.check()
            await asyncio.sleep(POLL)
            if dev.state not in (Phase.READY, Phase.ABSENT, Phase.FAILED) or dev.installing:
                quiet_since = clock()
        self.result.dev_server = dev.state.value
        problems = dev.problems()
        if problems or dev.state not in (Phase.READY, Phase.ABSENT):
            said = [f"    {line}" for problem in problems for line in problem.detail.splitlines()]
            self.result.differences = (f"the dev server is {dev.state} at the end", *said)

    def finish(self, seconds: float, problem: str | None) -> None:
        """Compare the end with what was expected; `problem`: why it did not end by itself."""
        result, expect, here, wanted = self.result, self._scenario.expect, self._files(), self._log.files()
        result.seconds, result.catch_ups = seconds, self._orchestrator.catch_ups
        result.shown = tuple(sorted(self._kinds | self._orchestrator.reasons))
        result.tree_hash = tree_hash({path: digest_of(content) for path, content in here.items()})
        result.expected_hash = str(self._log.head()["tree_hash"]) if expect is None else expect.tree_hash
        if expect is not None and expect.files is not None:
            wanted = {path: text.encode() for path, text in expect.files.items()}
        result.differences = (*([problem] if problem else []), *compare(here, wanted), *result.differences)
        if not result.differences and result.tree_hash != result.expected_hash:
            found, expected = result.tree_hash[:12], result.expected_hash[:12]
            said = f"the tree is what the scenario's events say, {found}…, and expect says {expected}…"
            result.differences = (said,)

    def _files(self) -> dict[RelPath, bytes]:
        """Read what is on disk, but for what the project's own programs put there."""
        here: dict[RelPath, bytes] = {}
        root = self._settings.project_dir
        for above, directories, names in os.walk(root):
            directories[:] = [name for name in directories if name not in PROTECTED]
            for name in names:
                path = Path(above, name)
                if path.is_file() and not path.is_symlink():
                    here[RelPath(path.relative_to(root).as_posix())] = path.read_bytes()
        if self.result.dev_server is not None:
            ours = self._run.agent.sync.tree.entries
            here = {path: content for path, content in here.items() if path in ours}
        return here


def _settings(project_id: str, directory: Path, options: ReplayOptions) -> Settings:
    """The agent's settings: those of the dev server from its environment, the rest as a replay has them."""
    nobody = {"PROJECT_ID": str(UUID(int=0)), "SESSION_ID": str(UUID(int=0))}
    environ = options.environ or {}
    settings = read_settings({**environ, **nobody})
    port = settings.dev_port
    if options.environ is not None and "DEV_PORT" not in environ:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    return settings.model_copy(
        update={
            "project_id": project_id,
            "session_api_url": HOST,
            "snapshot_url": SecretStr(FIRST_SNAPSHOT),
            "realtime_token_file": None,
            "sync_mode": "live",
            "drift_policy": "report",
            "optimistic_events": options.optimistic,
            "project_dir": directory / "project",
            "staging_dir": directory / "staging",
            "state_dir": directory,
            "modules_dir": settings.modules_dir or directory / "modules",
            "dev_host": environ.get("DEV_HOST") or "127.0.0.1",
            "dev_port": port,
        }
    )


def replay(path: Path, directory: Path | None = None, options: ReplayOptions | None = None) -> Result:
    """Replay the scenario at `path`.

    Args:
        path: of the scenario.
        directory: an empty or a new one; None: a temporary one.
        options: how; None: as it was recorded, in simulated time.

    Raises:
        MalformedMessage: the scenario cannot be read.
        SettingsError: the dev server's environment is wrong.
    """
    loaded, options = load(path), options or ReplayOptions()
    with tempfile.TemporaryDirectory(prefix="preview-replay-") as temporary:
        run = Replay(path.stem, loaded, directory or Path(temporary), options)
        started, problem = time.monotonic(), None
        try:
            with asyncio.Runner(loop_factory=SimulatedLoop if options.simulated else None) as runner:
                runner.run(run.run())
        except TimeoutError:
            problem = f"not at rest after {SETTLE_SECONDS:.0f} s"
        except AgentError as error:
            problem = f"the loop ended: {error}"
        run.finish(time.monotonic() - started, problem)
        return run.result


def replay_all(
    paths: Sequence[Path],
    directory: Path | None,
    say: Callable[[str], None],
    *,
    options: ReplayOptions,
    json_report: Path | None,
    junit: Path | None,
) -> int:
    """Replay every scenario, say one line for each and a diff where one fails.

    Args:
        paths: of the scenarios.
        directory: where to work; None: in temporary ones.
        say: prints a line.
        options: how to replay them.
        json_report: where to write the results as JSON.
        junit: where to write them as JUnit XML.

    Returns:
        The exit code: 0 when all ended as they should, 1 when one did not, 64 when one could not be read.

    Raises:
        SettingsError: there is nowhere to work or to report.
    """
    places = _places(paths, directory)
    for report in (json_report, junit):
        if report is not None and (report.is_dir() or not report.parent.is_dir()):
            raise SettingsError([f"cannot write {report}: it is a directory, or there is none for it"])
    results = []
    for path, place in zip(paths, places, strict=True):
        try:
            result = replay(path, place, options)
        except MalformedMessage as error:
            result = Result(path.stem, unreadable=str(error))
        results.append(result)
        for line in result.lines():
            say(line)
    if json_report is not None:
        json_report.write_bytes(as_json(results, options.faults))
    if junit is not None:
        junit.write_text(as_junit(results, options.faults), encoding="utf-8")
    if any(result.differences for result in results):
        return 1
    return 0 if all(result.ok for result in results) else 64


def _places(paths: Sequence[Path], directory: Path | None) -> list[Path | None]:
    """Name where each scenario is run: `directory` itself for one, one below it for each of several."""
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
