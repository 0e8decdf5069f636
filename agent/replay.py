"""Run a scenario against a directory with the agent's own loop, disk and ledger, and say whether it ended as it should.

Only the two ends are other than in a container: events come from the scenario instead of a socket, and the session API
is answered by the scenario's log. Everything between is the code that runs in production.
"""

from __future__ import annotations

import asyncio
import io
import json
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

import httpx
import orjson

from agent.batch import Outcome
from agent.catchup import CatchUp
from agent.config import SnapshotLimits
from agent.disk import Disk
from agent.errors import AgentError, MalformedMessage
from agent.follow import Follower
from agent.follow import Settings as Clockwork
from agent.ledger import Ledger
from agent.model import Cursor, Problem, RelPath, Tree, digest_of, tree_hash
from agent.scenario import Broken, Committed, Log, Mischief, Scenario, Step, play, read_scenario
from agent.session import SessionApi
from agent.signals import Received, Resync, Signal
from agent.status import Problems, SyncStatus
from agent.sync import Parts, Sync
from agent.telemetry import Metrics
from agent.tokens import Tokens
from agent.wire import MANIFEST_PATH, read_head
from agent.workspace import Workspace

HOST = "http://scenario"
SETTLE_SECONDS = 30.0
"""How long the end may take: the longest patience of the loop is 30 s, and nothing in a scenario needs it."""

TOKEN = "eyJhbGciOiJub25lIn0.eyJyb2xlIjoicHJldmlld19hZ2VudCJ9.eA"  # noqa: S105 - opens nothing
NONE = Mischief()
"""The scenario as it is."""

MOST_SHOWN = 20
"""Differences printed; a tree that is all wrong needs no thousand lines."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a replay ended. `differences`: one line each, empty when it ended as it should."""

    name: str
    seconds: float
    delivered: int
    committed: int
    faults: int
    catch_ups: int
    tree_hash: str
    expected_hash: str
    differences: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.differences

    def line(self) -> str:
        """One line for a person."""
        what = f"{self.committed} commits, {self.delivered} delivered, {self.faults} faults, {self.catch_ups} catch-ups"
        return f"{'ok' if self.ok else 'NOT EQUAL'}  {self.name}: {what}, {self.seconds:.2f} s"


@dataclass(slots=True)
class ScenarioSource:
    """An `EventSource` whose other end is the replay."""

    waiting: asyncio.Queue[Signal] = field(default_factory=asyncio.Queue)

    async def run(self) -> None:
        """Nothing to own."""
        await asyncio.Event().wait()

    async def receive(self) -> Signal:
        """The next signal, in order."""
        return await self.waiting.get()

    def receive_now(self) -> Signal | None:
        """The next signal if one is waiting."""
        return None if self.waiting.empty() else self.waiting.get_nowait()

    def caught_up(self) -> None:
        """The link has no state here."""

    def doubt(self, reason: str) -> None:
        """The link is never deaf here; it loses what the scenario says."""

    def report(self) -> dict[str, object]:
        """For symmetry with a real link."""
        return {"state": "replay", "queue_depth": self.waiting.qsize()}


class FullDisk(Disk):
    """A disk that is full for the next `failures` batches: everything is undone, as `ENOSPC` has it."""

    failures = 0

    def apply(self, operations, known, **options):  # type: ignore[no-untyped-def]
        """As `Disk.apply`, unless it is full."""
        if operations and self.failures:
            self.failures -= 1
            return Outcome((), (Problem("disk_full", "the scenario says so"),), rolled_back=True)
        return super().apply(operations, known, **options)


class Killable(Workspace):
    """A workspace whose life may end without a farewell."""

    killed = False

    def close(self, cursor: Cursor) -> None:
        """Record, unless this life was killed."""
        if not self.killed:
            super().close(cursor)

    def record(self, cursor: Cursor) -> None:
        """Record, unless this life was killed."""
        if not self.killed:
            super().record(cursor)


class Replay:
    """One run of one scenario in `directory`, which holds project, staging and ledger."""

    def __init__(
        self,
        scenario: Scenario,
        directory: Path,
        archive: bytes | None,
        *,
        mischief: Mischief,
        real_time: bool,
        optimistic: bool = False,
    ) -> None:
        self._scenario = scenario
        self._directory = directory
        self._mischief = mischief
        self._real_time = real_time
        self._optimistic = optimistic
        self._archive = archive
        files = files_of(archive) if archive is not None else scenario.snapshot
        assert not isinstance(files, str)
        self._log = Log(scenario.project_id, scenario.epoch, scenario.revision, files)
        self._source = ScenarioSource()
        self._life: asyncio.Task[None] | None = None
        self._workspace: Killable | None = None
        self._sync: Sync | None = None
        self._follower: Follower | None = None
        self._failures = 0
        self.catch_ups = 0
        self.delivered = self.committed = self.faults = 0

    @property
    def project(self) -> Path:
        """The directory that is compared at the end."""
        return self._directory / "project"

    async def run(self) -> None:
        """Play all steps, then wait until nothing is left to do. Raises what ended the loop, and `TimeoutError`."""
        async with httpx.AsyncClient(transport=httpx.MockTransport(self._respond)) as http:
            self._http = http
            await self._begin_life()
            started = time.monotonic()
            try:
                for happening in play(self._scenario.steps, self._mischief):
                    await self._happen(happening, started)
                await self._settle()
            finally:
                await self._end_life()

    async def _happen(self, happening: Committed | Broken | object, started: float) -> None:
        if isinstance(happening, Committed):
            if self._real_time:
                await asyncio.sleep(max(0.0, started + happening.step.at_ms / 1000 - time.monotonic()))
            self._log.commit(happening.step)
            self.committed += 1
        elif isinstance(happening, Broken):
            self.faults += 1
            await self._break(happening.fault)
        else:
            step: Step = happening.step  # type: ignore[attr-defined]
            assert step.event is not None
            self._source.waiting.put_nowait(Received(step.event, dict(step.payload), time.time()))
            self.delivered += 1
            await asyncio.sleep(0)

    async def _break(self, fault: str) -> None:
        match fault:
            case "disconnect" | "expire_token":
                self._source.waiting.put_nowait(Resync("joined"))
            case "disk_full":
                self._failures = 1
                if isinstance(self._disk, FullDisk):
                    self._disk.failures += 1
            case "restart_agent":
                await self._end_life()
                await self._begin_life()
            case "crash":
                assert self._workspace is not None
                self._workspace.killed = True
                await self._end_life()
                await self._begin_life()

    async def _begin_life(self) -> None:
        self._source = ScenarioSource()
        metrics = Metrics()
        problems = Problems(metrics)
        self._disk = FullDisk(self.project, self._directory / "staging")
        self._ledger = Ledger(self._directory / "ledger.sqlite")
        follower = self._follower = Follower(Tree(), Clockwork(optimistic=self._optimistic))
        tokens = Tokens(TOKEN)
        self._workspace = Killable(self._disk, self._ledger, problems)
        catch_up = CatchUp(
            SessionApi(HOST, "replay", tokens, self._http),
            self._disk,
            self._http,
            SnapshotLimits(),
            self._scenario.project_id,
            problems,
            lambda: follower.tree.entries,
        )
        hydrated = asyncio.Event()
        parts = Parts(
            follower,
            self._workspace,
            self._source,
            catch_up,
            problems,
            metrics,
            SyncStatus(),
            lambda _: None,
            hydrated.set,
        )
        self._sync = Sync(parts, snapshot_url=f"{HOST}/snapshot.zip")
        self._source.waiting.put_nowait(Resync("joined"))
        self._life = asyncio.create_task(self._sync.run(), name="replayed-sync")
        ready = asyncio.create_task(hydrated.wait())
        await asyncio.wait([ready, self._life], return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if self._life.done():
            self._life.result()

    async def _end_life(self) -> None:
        assert self._life is not None
        self._life.cancel()
        result = (await asyncio.gather(self._life, return_exceptions=True))[0]
        self._disk.close()
        self._ledger.close()
        if isinstance(result, Exception):
            raise result

    async def _settle(self) -> None:
        """Until the loop is at rest at the log's head, asked as a heartbeat asks."""
        assert self._sync is not None
        assert self._follower is not None
        assert self._life is not None
        async with asyncio.timeout(SETTLE_SECONDS):
            while not (
                self._source.waiting.empty()
                and self._follower.settled
                and (self._sync.tree.cursor.epoch, self._sync.tree.cursor.revision)
                == (self._log.epoch, self._log.revision)
            ):
                if self._life.done():
                    self._life.result()
                self._sync.hear(read_head(self._log.head()))
                await asyncio.sleep(0.02)
            self._sync.hear(read_head(self._log.head()))

    def _respond(self, request: httpx.Request) -> httpx.Response:
        """The scenario's orchestrator and storage."""
        if request.url.path == "/snapshot.zip":
            first = self._archive is not None and self._log.revision == self._scenario.revision
            archive = self._archive if first and self._archive is not None else self._zip()
            return httpx.Response(200, stream=httpx.ByteStream(archive))
        self.catch_ups += 1
        return httpx.Response(
            200, json=self._log.answer(orjson.loads(request.content), f"{HOST}/snapshot.zip")
        )

    def _zip(self) -> bytes:
        whole = io.BytesIO()
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(MANIFEST_PATH, json.dumps(self._log.manifest()))
            for path, content in self._log.files().items():
                archive.writestr(path, content)
        return whole.getvalue()

    def differences(self) -> list[str]:
        """What is not as it should be, one line each."""
        expect = self._scenario.expect
        wanted = self._log.files()
        if expect is not None and expect.files is not None:
            wanted = {path: text.encode() for path, text in expect.files.items()}
        here = {
            RelPath(path.relative_to(self.project).as_posix()): path.read_bytes()
            for path in self.project.rglob("*")
            if path.is_file() and not path.is_symlink()
        }
        lines = [
            _difference(path, here.get(path), wanted.get(path))
            for path in sorted(here.keys() | wanted.keys())
        ]
        found = [line for line in lines if line]
        if not found and expect is not None and self.tree_hash() != expect.tree_hash:
            found = [f"tree hash {self.tree_hash()[:12]}…, expected {expect.tree_hash[:12]}…"]
        return found

    def tree_hash(self) -> str:
        """Of what is on disk now."""
        return tree_hash(
            {
                RelPath(path.relative_to(self.project).as_posix()): digest_of(path.read_bytes())
                for path in self.project.rglob("*")
                if path.is_file()
            }
        )

    @property
    def expected_hash(self) -> str:
        """Of the expectation, or of the log where there is none."""
        return (
            self._scenario.expect.tree_hash if self._scenario.expect else str(self._log.head()["tree_hash"])
        )


def _difference(path: RelPath, here: bytes | None, wanted: bytes | None) -> str | None:
    if here == wanted:
        return None
    if here is None:
        return f"- {path}: missing"
    if wanted is None:
        return f"+ {path}: should not be there"
    return f"! {path}: {_shown(here)} instead of {_shown(wanted)}"


def _shown(content: bytes) -> str:
    head = content[:40].decode(errors="replace")
    return f"{head!r}{'…' if len(content) > 40 else ''} ({len(content)} bytes)"


def manifest_of(archive: bytes) -> dict[str, Any]:
    """The manifest inside a snapshot that is trusted already."""
    with zipfile.ZipFile(io.BytesIO(archive)) as whole:
        manifest: dict[str, Any] = orjson.loads(whole.read(MANIFEST_PATH))
        return manifest


def files_of(archive: bytes) -> dict[RelPath, bytes]:
    """The files inside a snapshot that is trusted already."""
    with zipfile.ZipFile(io.BytesIO(archive)) as whole:
        return {
            RelPath(name): whole.read(name)
            for name in whole.namelist()
            if name != MANIFEST_PATH and name[-1] != "/"
        }


def load(path: Path) -> tuple[Scenario, bytes | None]:
    """The scenario at `path` and the snapshot beside it. Raises `MalformedMessage`."""
    try:
        scenario = read_scenario(path.read_text())
        archive = (
            (path.parent / scenario.snapshot).read_bytes() if isinstance(scenario.snapshot, str) else None
        )
    except (OSError, UnicodeDecodeError) as error:
        raise MalformedMessage(f"scenario {path}", str(error)) from None
    return scenario, archive


def replay(
    path: Path,
    directory: Path | None = None,
    *,
    mischief: Mischief = NONE,
    real_time: bool = False,
    optimistic: bool = False,
) -> Result:
    """Replay the scenario at `path`. `directory`: where; None: a temporary one.

    Raises `MalformedMessage` for a scenario that cannot be read.
    """
    scenario, archive = load(path)
    with tempfile.TemporaryDirectory(prefix="preview-replay-") as temporary:
        where = directory or Path(temporary)
        run = Replay(scenario, where, archive, mischief=mischief, real_time=real_time, optimistic=optimistic)
        started = time.monotonic()
        problems: list[str] = []
        try:
            asyncio.run(run.run())
        except TimeoutError:
            problems = [f"not at rest after {SETTLE_SECONDS:.0f} s"]
        except AgentError as error:
            problems = [f"the loop ended: {error}"]
        return Result(
            path.stem,
            time.monotonic() - started,
            run.delivered,
            run.committed,
            run.faults,
            run.catch_ups,
            run.tree_hash(),
            run.expected_hash,
            (*problems, *run.differences()),
        )


def replay_all(
    paths: Sequence[Path],
    directory: Path | None,
    say: Callable[[str], None],
    *,
    mischief: Mischief,
    real_time: bool,
    json_report: Path | None,
    junit: Path | None,
) -> int:
    """Replay every scenario, say one line for each and a diff where one fails; 0 when all ended as they should."""
    results = []
    for path in paths:
        result = replay(path, directory, mischief=mischief, real_time=real_time)
        results.append(result)
        say(result.line())
        for line in result.differences[:MOST_SHOWN]:
            say(f"    {line}")
        if len(result.differences) > MOST_SHOWN:
            say(f"    … and {len(result.differences) - MOST_SHOWN} more")
    if json_report is not None:
        body = {"mischief": asdict(mischief), "results": [{**asdict(r), "ok": r.ok} for r in results]}
        json_report.write_bytes(orjson.dumps(body, option=orjson.OPT_INDENT_2))
    if junit is not None:
        junit.write_text(_junit(results))
    return 0 if all(result.ok for result in results) else 1


def _junit(results: Sequence[Result]) -> str:
    """The report in the form that CI services read."""
    suite = Element("testsuite", name="preview-agent replay", tests=str(len(results)))
    suite.set("failures", str(sum(1 for result in results if not result.ok)))
    for result in results:
        case = SubElement(
            suite, "testcase", classname="scenario", name=result.name, time=f"{result.seconds:.3f}"
        )
        if not result.ok:
            failure = SubElement(case, "failure", message=result.differences[0])
            failure.text = "\n".join(result.differences)
    return tostring(suite, encoding="unicode", xml_declaration=True)
