"""The agent's lives during a replay: its own loop and disk between ends that a scenario plays.

A life is begun and ended as a process is: what the next one knows is what this one left on the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agent.core.model import Cursor, Operation, Problem, RelPath
from agent.core.scheduler import Follower
from agent.devserver.supervisor import Supervisor
from agent.fs.inspect import FileStat
from agent.fs.project_dir import ProjectDir
from agent.fs.transaction import TransactionResult
from agent.link.source import Signal
from agent.link.types import LinkState
from agent.session_api import SessionApi
from agent.sync.engine import Sync
from agent.sync.ledger import Ledger
from agent.sync.workspace import Workspace
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems


@dataclass(slots=True)
class ScenarioSource:
    """An `EventSource` whose other end is the replay: always live, it loses what the scenario says."""

    waiting: asyncio.Queue[Signal] = field(default_factory=asyncio.Queue)
    state: LinkState = LinkState.LIVE
    since: float = field(default_factory=time.time)

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

    def suspect(self, reason: str) -> None:
        """Nothing: the link is never deaf here."""

    def problems(self) -> tuple[Problem, ...]:
        """None."""
        return ()

    def report(self) -> dict[str, object]:
        """As a real link's, as far as there is one."""
        return {
            "state": "replay",
            "why": "a scenario is played",
            "queue_depth": self.waiting.qsize(),
            "clock_jumps": 0,
            "refusals": {},
        }


class FullDisk(ProjectDir):
    """A disk that is full for the next `failures` batches: everything is undone, as `ENOSPC` has it."""

    failures = 0

    def apply(
        self, operations: Sequence[Operation], known: Mapping[RelPath, FileStat], **options: Any
    ) -> TransactionResult:
        """As `ProjectDir.apply`, unless it is full."""
        if operations and self.failures:
            self.failures -= 1
            return TransactionResult((), (Problem("disk_full", "the scenario says so"),), rolled_back=True)
        return super().apply(operations, known, **options)


class Noted(Problems):
    """Problems of which is remembered that they were there; `kinds` outlives the life."""

    def __init__(self, metrics: Metrics, kinds: set[str]) -> None:
        super().__init__(metrics)
        self.kinds = kinds

    def add(self, problem: Problem) -> None:
        """Raise it, and remember its kind."""
        self.kinds.add(problem.kind)
        super().add(problem)


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


@dataclass(slots=True)
class Life:
    """One life of the agent, from its start to its end."""

    source: ScenarioSource
    disk: FullDisk
    ledger: Ledger
    workspace: Killable
    follower: Follower
    sync: Sync
    api: SessionApi
    dev: Supervisor | None
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def look(self) -> None:
        """Raise what ended one of its tasks."""
        for task in self.tasks:
            if task.done():
                task.result()

    async def end(self) -> None:
        """Stop it. Raises what it had died of."""
        for task in self.tasks:
            task.cancel()
        results = await asyncio.gather(*self.tasks, return_exceptions=True)
        self.disk.close()
        self.ledger.close()
        for result in results:
            if isinstance(result, Exception):
                raise result
