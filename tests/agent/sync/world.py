"""A world for the loop: a database, an orchestrator that can fail in every way, a link, and a directory on a real disk.

The loop, its disk and its ledger are the production ones. Time is simulated: what the loop waits for is passed over.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import orjson

from agent.config import SnapshotLimits
from agent.core.globs import Rule
from agent.core.messages import Head
from agent.core.model import Problem, ProblemKind, RelPath, Tree, digest_of, tree_hash
from agent.core.scheduler import Follower
from agent.fs.project_dir import ProjectDir
from agent.link.source import Received, Resync, Signal
from agent.link.types import LinkState
from agent.replay.simulated_clock import simulate
from agent.session_api import SessionApi
from agent.snapshot.download import Downloader
from agent.sync.catchup import CatchUp
from agent.sync.engine import Sync
from agent.sync.ledger import Ledger, LedgerState
from agent.sync.workspace import Workspace
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems, SyncStatus
from agent.tokens import Tokens
from agent.write_back.flow import WriteBack
from tests.agent.disks import in_staging, seen
from tests.fakes.realtime import jwt
from tests.fakes.zips import EPOCH, PROJECT, snapshot

HOST = "http://orchestrator.test"
DEADLINE = 300.0
"""Simulated seconds until a condition counts as never coming."""
REAL_DEADLINE = 60.0
"""The same on the real clock."""

Answer = Exception | Mapping[str, Any] | Callable[[dict[str, Any]], Any]
"""What the orchestrator does once: fail on the way, answer with a body, or as a function of the question says."""


def simulated(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in simulated time."""

    @functools.wraps(test)
    def run(*args: Any, **named: Any) -> None:
        simulate(test(*args, **named))

    run.__signature__ = inspect.signature(test)  # type: ignore[attr-defined]
    return run


def plain(
    status: int, body: bytes, media: str = "text/html", **headers: str
) -> Callable[[object], httpx.Response]:
    """A response, as it comes from a socket: its body not read yet."""

    def respond(_: object) -> httpx.Response:
        return httpx.Response(
            status, headers={"content-type": media, **headers}, stream=httpx.ByteStream(body)
        )

    return respond


def refused(status: int, **headers: str) -> Callable[[object], httpx.Response]:
    """A refusal of the orchestrator's own."""
    body = {"type": "urn:preview-sync:problem:x", "title": "no", "status": status}
    return plain(status, orjson.dumps(body), "application/problem+json", **headers)


@dataclass(slots=True)
class Database:
    """What was committed, and what it says of it."""

    files: dict[str, str | None] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    revisions: dict[str, int] = field(default_factory=dict)
    revision: int = 1
    epoch: str = EPOCH
    past: list[tuple[dict[str, str | None], dict[str, int], dict[str, int]]] = field(default_factory=list)
    """Files, versions and revisions before each commit, oldest first."""

    def forget(self, commits: int) -> None:
        """Lose the latest commits, as a failover to a replica that was behind; the epoch stays."""
        for _ in range(commits):
            self.files, self.versions, self.revisions = self.past.pop()
            self.revision -= 1

    def begin_anew(self, files: Mapping[str, str]) -> None:
        """Another history, whose first commit has these files."""
        self.epoch, self.revision = f"{self.epoch}-again", 0
        self.files, self.versions, self.revisions, self.past = {}, {}, {}, []
        self.commit(files)

    def commit(self, changes: Mapping[str, str | None]) -> Received:
        """Commit (None deletes); the event that tells of it."""
        self.past.append((dict(self.files), dict(self.versions), dict(self.revisions)))
        self.revision += 1
        items: list[dict[str, Any]] = []
        for path, content in changes.items():
            self.files[path] = content
            self.versions[path] = self.versions.get(path, 0) + 1
            self.revisions[path] = self.revision
            items.append(self._item(path))
        payload = {"files": items, "revision": self.revision, "epoch": self.epoch}
        return Received("bulk:apply", payload, time.time())

    def _item(self, path: str) -> dict[str, Any]:
        content = self.files.get(path)
        item: dict[str, Any] = {"file_path": path, "version": self.versions.get(path, 0)}
        if content is None:
            return {**item, "action": "delete"}
        return {**item, "action": "update", "content": content, "content_hash": _sha(content)}

    def current(self) -> dict[str, Any]:
        return {"kind": "current", "epoch": self.epoch, "revision": self.revision}

    def changes(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer with what is above the question's revision, and the paths that it names."""
        asked = set(question.get("paths") or ())
        paths = {path for path, revision in self.revisions.items() if revision > question["revision"]} | asked
        items = [self._item(path) for path in sorted(paths)]
        return {**self.current(), "kind": "changes", "base_revision": question["revision"], "changes": items}

    def answer(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """What an orchestrator answers in good order."""
        if question["epoch"] != self.epoch or question["reason"] in ("tree_hash", "snapshot_rejected"):
            return self.offer()
        if question["revision"] > self.revision:
            return {**self.offer(), "reason": "ahead"}
        found = self.changes(question)
        return found if found["changes"] else self.current()

    def offer(self) -> dict[str, Any]:
        return {"kind": "snapshot", "snapshot_url": f"{HOST}/snapshot.zip", "manifest": None}

    def archive(self) -> bytes:
        """A full snapshot of now."""
        files = {path: content.encode() for path, content in self.files.items() if content is not None}
        listed = [
            {
                "file_path": path,
                "content_hash": hashlib.sha256(content).hexdigest(),
                "size": len(content),
                "version": self.versions[path],
            }
            for path, content in files.items()
        ]
        gone = [
            {"file_path": path, "version": self.versions[path]}
            for path, content in self.files.items()
            if content is None
        ]
        said = {"format": 1, "project_id": PROJECT, "epoch": self.epoch, "revision": self.revision}
        return snapshot(files, said={**said, "files": listed, "deleted": gone})

    @property
    def wanted(self) -> dict[str, str]:
        """The files there should be."""
        return {path: content for path, content in self.files.items() if content is not None}


def _sha(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()


@dataclass(slots=True)
class Orchestrator:
    """Answers from the database, once its `script` is over. `asked`: every question about what was missed."""

    database: Database
    script: list[Answer] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    archives: list[bytes | Callable[[object], httpx.Response]] = field(default_factory=list)
    """What is fetched as snapshots, in turn; then what the database holds."""
    fetched: int = 0
    limit: int = 65_536
    """Bytes of a question that are read, as the real one's BODY_LIMIT."""
    other: Callable[[str, dict[str, Any]], Any] | None = None
    """Answers what is no question about what was missed, by the last word of its path."""
    hang: asyncio.Event | None = None
    """Until it is set, nothing is answered."""

    @property
    def reasons(self) -> list[str]:
        return [str(question["reason"]) for question in self.asked]

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith(".zip"):
            self.fetched += 1
            body = self.archives.pop(0) if self.archives else self.database.archive()
            if callable(body):
                return body(request)
            return httpx.Response(200, stream=httpx.ByteStream(body))
        question: dict[str, Any] = orjson.loads(request.content)
        if self.other is not None and not request.url.path.endswith("/sync"):
            other = self.other(request.url.path.rpartition("/")[2], question)
            if isinstance(other, httpx.Response):
                return other
            return httpx.Response(200, stream=httpx.ByteStream(orjson.dumps(other)))
        self.asked.append(question)
        if self.hang is not None:
            await self.hang.wait()
        if len(request.content) > self.limit:
            return refused(413)(request)
        answer: Any = self.script.pop(0) if self.script else self.database.answer(question)
        if callable(answer):
            answer = answer(question)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, httpx.Response):
            return answer
        return httpx.Response(200, stream=httpx.ByteStream(orjson.dumps(answer)))


@dataclass(slots=True)
class Source:
    """An `EventSource` whose other end is the test."""

    waiting: asyncio.Queue[Signal] = field(default_factory=asyncio.Queue)
    state: LinkState = LinkState.LIVE
    since: float = 0.0
    caught_up_count: int = 0
    suspected: list[str] = field(default_factory=list)

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def receive(self) -> Signal:
        return await self.waiting.get()

    def receive_now(self) -> Signal | None:
        return None if self.waiting.empty() else self.waiting.get_nowait()

    def caught_up(self) -> None:
        self.caught_up_count += 1

    def suspect(self, reason: str) -> None:
        self.suspected.append(reason)

    def problems(self) -> tuple[Problem, ...]:
        return ()

    def report(self) -> dict[str, object]:
        return {}


@dataclass(slots=True)
class Run:
    """One run of the agent's loop, from its start to its end."""

    sync: Sync
    source: Source
    disk: ProjectDir
    workspace: Workspace
    catch_up: CatchUp
    follower: Follower
    problems: Problems
    status: SyncStatus
    task: asyncio.Task[None]
    changed: list[set[str]]
    """What `on_tree` was called with."""
    hydrated: asyncio.Event
    write_back: WriteBack | None = None

    def send(self, *signals: Signal) -> None:
        for signal in signals:
            self.source.waiting.put_nowait(signal)

    async def until(self, condition: Callable[[], object], deadline: float = DEADLINE) -> None:
        """Until `condition` holds; raises what ended the loop."""
        async with asyncio.timeout(deadline):
            while not condition():
                if self.task.done():
                    self.task.result()
                    raise AssertionError("the loop ended by itself")
                await asyncio.sleep(0.005)

    async def at_rest(self) -> None:
        """Until nothing waits and nothing is wanted."""
        await self.until(lambda: self.source.waiting.empty() and self.follower.settled)

    @property
    def kinds(self) -> list[ProblemKind]:
        """The open problems' kinds, the session API's included."""
        api = self.catch_up.api
        return sorted([p.kind for p in [*self.problems.open.values(), *(api.problems() if api else ())]])


class World:
    """Everything outside the loop. `run` begins a run of it; what the next run finds is what the last one left."""

    def __init__(self, place: Path, files: Mapping[str, str] | None = None) -> None:
        self.place = place
        self.root = place / "project"
        self.database = Database()
        for path, content in (files if files is not None else {"a": "1", "src/b": "1"}).items():
            self.database.files[path] = content
            self.database.versions[path] = self.database.revisions[path] = 1
        self.orchestrator = Orchestrator(self.database)

    @property
    def on_disk(self) -> dict[str, str]:
        return seen(self.root)

    @property
    def in_staging(self) -> list[str]:
        return in_staging(self.place / "staging")

    def recorded(self) -> LedgerState:
        """What the ledger holds, once the run is over."""
        ledger = Ledger(self.place / "ledger.sqlite")
        try:
            loaded = ledger.load()
        finally:
            ledger.close()
        assert loaded is not None
        return loaded

    @asynccontextmanager
    async def run(
        self,
        *,
        api: bool = True,
        disk: type[ProjectDir] = ProjectDir,
        drift_policy: Literal["report", "restore", "keep", "off"] = "off",
        wait: bool = True,
        url: str | None = f"{HOST}/snapshot.zip",
        rules: Sequence[Rule] | None = None,
    ) -> AsyncIterator[Run]:
        """A run for as long as the block lasts; `wait`: the block begins when there is a tree. `rules`: what tools may
        give back; None: there is no such part.

        Raises what ended the loop, unless the block did.
        """
        metrics = Metrics()
        problems, status, source = Problems(metrics), SyncStatus(), Source()
        follower = Follower(Tree())
        place = disk(self.root, self.place / "staging")
        ledger = Ledger(self.place / "ledger.sqlite")
        workspace = Workspace(place, ledger, problems)
        changed: list[set[str]] = []
        hydrated = asyncio.Event()
        transport = httpx.MockTransport(self.orchestrator)
        async with httpx.AsyncClient(transport=transport, trust_env=False) as http:
            session = SessionApi(HOST, "session", Tokens(jwt(2_000_000_000)), http) if api else None
            limits = SnapshotLimits(snapshot_retry_seconds=0.1, snapshot_retry_max_seconds=1.0)
            catch_up = CatchUp(
                session, Downloader(place, http, limits, PROJECT), problems, lambda: follower.tree.entries
            )
            write_back = None if rules is None else WriteBack(
                self.place / "write-back.sqlite", place, session, problems, tree=lambda: follower.tree,
                stats=lambda: workspace.stats, confirm=lambda moved, at: sync.confirm(moved, at),
                clock=asyncio.get_running_loop().time,
            )  # fmt: skip
            sync = Sync(
                follower,
                workspace,
                source,
                catch_up,
                problems,
                metrics,
                status,
                snapshot_url=url,
                on_tree=lambda paths: changed.append(set(paths)),
                on_hydrated=hydrated.set,
                drift_policy=drift_policy,
                write_back=write_back,
                clock=asyncio.get_running_loop().time,
            )
            task = asyncio.create_task(sync.run())
            run = Run(
                sync, source, place, workspace, catch_up, follower, problems, status, task, changed, hydrated,
                write_back,
            )  # fmt: skip
            try:
                if wait:
                    await run.until(hydrated.is_set)
                    if write_back is not None:
                        write_back.configure(rules or ())
                yield run
            finally:
                if write_back is not None:
                    write_back.close()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                place.close()
                ledger.close()
            if not task.cancelled():
                task.result()


def joined() -> Resync:
    """The link's order after each join."""
    return Resync("joined")


def paths(*names: str) -> frozenset[RelPath]:
    return frozenset(map(RelPath, names))


def undone_disk(failures: int, kind: ProblemKind = "disk_full", done: Sequence[str] = ()) -> type[ProjectDir]:
    """A disk that undoes the next `failures` transactions; at `done` not even the undoing is possible."""

    class Undone(ProjectDir):
        left = failures

        def apply(self, operations: Any, known: Any, **options: Any) -> Any:
            if not operations or not type(self).left:
                return super().apply(operations, known, **options)
            type(self).left -= 1
            stuck = [each for each in operations if each.path in done]
            outcome = super().apply(stuck, known, **options)
            problems = (Problem(kind, "the test says so"), *outcome.problems)
            return type(outcome)(outcome.done, problems, rolled_back=True)

    return Undone


def head(world: World, **other: Any) -> Head:
    """Where the database is, as the heartbeat's answer has it."""
    return Head(world.database.epoch, world.database.revision, **other)


def whole_head(world: World) -> Head:
    """The same with the tree's hash."""
    files = world.database.wanted.items()
    return head(world, tree_hash=tree_hash({RelPath(path): digest_of(text.encode()) for path, text in files}))


def offered(world: World) -> Answer:
    return lambda _: world.database.offer()
