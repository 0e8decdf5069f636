"""Runs the agent that the daemon runs, between a source, a disk and a workspace that a replay can make fail.

One run begins and ends as a process does: what the next run knows is what this one left on the disk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from agent.config import Settings
from agent.core.model import Cursor, Operation, Problem, RelPath
from agent.daemon import Agent, build
from agent.fs.inspect import FileStat
from agent.fs.project_dir import ProjectDir
from agent.fs.transaction import TransactionResult
from agent.link.source import Resync, Signal
from agent.link.types import LinkState
from agent.sync.workspace import Workspace

POLL = 0.05
"""Seconds between two readings of the dev server's problems and state."""


@dataclass(slots=True)
class ScenarioSource:
    """An `EventSource` that a replay feeds: always live, it loses the events that the scenario does."""

    waiting: asyncio.Queue[Signal] = field(default_factory=asyncio.Queue)
    state: LinkState = LinkState.LIVE
    since: float = field(default_factory=time.time)

    async def run(self) -> None:
        """Wait: there is no connection to hold."""
        await asyncio.Event().wait()

    async def receive(self) -> Signal:
        """Return the next signal; waits for one."""
        return await self.waiting.get()

    def receive_now(self) -> Signal | None:
        """Return the next signal if one waits."""
        return None if self.waiting.empty() else self.waiting.get_nowait()

    def caught_up(self) -> None:
        """Do nothing: the state does not change."""

    def suspect(self, reason: str) -> None:
        """Do nothing: there is no connection to replace."""

    def problems(self) -> tuple[Problem, ...]:
        """Return no problem."""
        return ()

    def report(self) -> dict[str, object]:
        """Return what every source reports."""
        return {
            "state": "replay",
            "why": "a scenario is played",
            "queue_depth": self.waiting.qsize(),
            "clock_jumps": 0,
            "refusals": {},
        }


class FullDisk(ProjectDir):
    """A disk that is full for the next `failures` transactions: each is undone, as after `ENOSPC`."""

    failures = 0

    def apply(
        self, operations: Sequence[Operation], known: Mapping[RelPath, FileStat], **options: Any
    ) -> TransactionResult:
        """Apply as `ProjectDir` does, unless it is full."""
        if operations and self.failures:
            self.failures -= 1
            return TransactionResult((), (Problem("disk_full", "the scenario says so"),), rolled_back=True)
        return super().apply(operations, known, **options)


class KillableWorkspace(Workspace):
    """A workspace that records nothing once it is `killed`, as after SIGKILL."""

    killed = False

    def close(self, cursor: Cursor) -> None:
        """Record and clear the staging directory, unless killed."""
        if not self.killed:
            super().close(cursor)

    def record(self, cursor: Cursor) -> bool:
        """Record, unless killed."""
        return self.killed or super().record(cursor)


@dataclass(slots=True)
class AgentRun:
    """One run of the agent, from its start to its end. `dev_server`: whether the project's is run too."""

    agent: Agent
    source: ScenarioSource
    disk: FullDisk
    kinds: set[str]
    dev_server: bool
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    @classmethod
    async def start(
        cls,
        settings: Settings,
        *,
        http: httpx.AsyncClient,
        kinds: set[str],
        environ: Mapping[str, str] | None,
        simulated: bool,
    ) -> AgentRun:
        """Start the agent and wait until its tree is whole.

        Args:
            settings: of the agent.
            http: answers its requests.
            kinds: gets the kinds of all problems that were ever open.
            environ: of the dev server; None: none is run.
            simulated: whether the event loop's clock jumps.

        Raises:
            AgentError: what ended it before the tree was whole.
        """
        source, disk = ScenarioSource(), FullDisk(settings.project_dir, settings.staging)
        source.waiting.put_nowait(Resync("joined"))
        agent = build(
            settings,
            environ=environ or {},
            http=http,
            source=source,
            disk=disk,
            workspace_type=KillableWorkspace,
            drift_policy="off" if simulated else None,
            clock=asyncio.get_running_loop().time,
        )
        run = cls(agent, source, disk, kinds, dev_server=environ is not None)
        run.tasks.append(asyncio.create_task(agent.sync.run(), name="sync"))
        if run.dev_server:
            run.tasks.append(asyncio.create_task(agent.supervisor.run(), name="dev-server"))
            run.tasks.append(asyncio.create_task(run._remember_problems(), name="problems"))
        hydrated = asyncio.create_task(agent.hydrated.wait())
        await asyncio.wait([hydrated, *run.tasks], return_when=asyncio.FIRST_COMPLETED)
        hydrated.cancel()
        run.check()
        return run

    async def _remember_problems(self) -> None:
        while True:
            self.kinds.update(problem.kind for problem in self.agent.supervisor.problems())
            await asyncio.sleep(POLL)

    def check(self) -> None:
        """Raise what ended one of its tasks."""
        for task in self.tasks:
            if task.done():
                task.result()

    async def end(self, *, killed: bool = False) -> None:
        """Stop it, `killed` without recording anything. Raises what it had died of."""
        workspace = self.agent.workspace
        assert isinstance(workspace, KillableWorkspace)
        workspace.killed = killed
        for task in self.tasks:
            task.cancel()
        results = await asyncio.gather(*self.tasks, return_exceptions=True)
        self.agent.close()
        opened = self.agent.report.problems.metrics.problems_opened.collect()
        self.kinds.update(sample.labels["kind"] for family in opened for sample in family.samples)
        for result in results:
            if isinstance(result, Exception):
                raise result
