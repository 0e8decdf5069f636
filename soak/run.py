"""One soak from start to stop: work and faults, and every so often a pause in which all has to be equal.

    work ──check_every──▶ pause: editors finish, faults end, all is brought back ──▶ last saves ──▶ equal? ──▶ work …

Beside it a look at every process each few seconds, and a keeper that does what a platform and its users do: a program
of the stack that ended is started again, a session whose machine is gone gets its next one. What the keeper had to do
is in the report, and what should not have needed it is a failure.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import httpx
import psutil

from orchestrator_stub.local_supabase.postgres import EmbeddedPostgresError
from soak import equality, schedule
from soak.editors import ProjectEditor
from soak.equality import Check
from soak.faults import Faults
from soak.logs import Findings, read_logs
from soak.program import CannotRun
from soak.schedule import Fault, Settings
from soak.stack import READY_SECONDS, Stack, processes_of
from soak.watch import ProcessRun, Tick, Watch

LOOK_EVERY = 5.0
"""Seconds between two looks at the processes."""

GONE_FOR = 20.0
"""Seconds after which a machine is not coming back by itself: the local driver starts an agent again within 8.5."""


@dataclass
class Outcome:
    """Everything that is known in the end. `wrong`: why the soak failed, one sentence each."""

    settings: Settings
    seconds: float = 0.0
    interrupted: bool = False
    faults: list[tuple[float, Fault, str]] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    lives: list[ProcessRun] = field(default_factory=list)
    ticks: list[Tick] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)
    lag_buckets: Counter[float] = field(default_factory=Counter)
    edits: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    """What the keeper had to do."""
    logs: Findings = field(default_factory=Findings)
    wrong: list[str] = field(default_factory=list)


class Soak:
    """One soak. `say` gets a line of progress now and then; `stop` set means: finish now, and say how it is."""

    def __init__(
        self, settings: Settings, state: Path, say: Callable[[str], None], stop: asyncio.Event
    ) -> None:
        self._settings = settings
        self._say = say
        self._stop = stop
        self._stack = Stack(state)
        self._watch = Watch(self._stack)
        self._editors: dict[int, ProjectEditor] = {}
        self._outcome = Outcome(settings)
        self._working = asyncio.Event()
        self._striking: set[asyncio.Task[None]] = set()
        self._began = 0.0
        self._worked = 0.0
        self._resumed = 0.0
        self._missing: dict[int, float] = {}

    async def run(self) -> Outcome:
        """All of it. Whatever happens, the stack is stopped and looked for, and the outcome says what went wrong."""
        outcome = self._outcome
        try:
            await self._start()
            await self._soak()
        except (CannotRun, EmbeddedPostgresError, httpx.HTTPError, OSError) as error:
            outcome.wrong.append(f"the soak could not go on: {type(error).__name__}: {error}")
        except asyncio.CancelledError:
            outcome.interrupted = True
            outcome.wrong.append("the soak was cut off before it could look at equality")
        finally:
            await self._end()
        return outcome

    # --- start

    async def _start(self) -> None:
        settings, stack = self._settings, self._stack
        await stack.start()
        self._say(f"the stack is up; making {len(schedule.projects(settings))} projects")
        projects: dict[int, UUID] = {}
        for number in schedule.projects(settings):
            projects[number], owner = uuid4(), uuid4()
            await stack.project(projects[number], owner)
            self._editors[number] = ProjectEditor(
                stack, number, projects[number], owner, seed=settings.seed, vite=number < settings.vite
            )
        await asyncio.gather(*(editor.begin() for editor in self._editors.values()))
        self._faults = Faults(stack, projects, settings.seed)
        self._say(f"starting {settings.agents} agents, {min(settings.vite, settings.agents)} with Vite")
        for number in range(settings.agents):
            await stack.open(number, projects[schedule.project_of(number)])
        await self._all_ready()

    async def _all_ready(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while True:
            for number in self._stack.sessions:
                # The machine's directory goes with the session; what was said in it is wanted afterwards.
                _keep_log(self._stack.directory(number), self._stack.state / f"agent-{number}.log")
            rows = await self._stack.rows("select state, problem from preview.sessions")
            ready = sum(row["state"] == "ready" for row in rows)
            if ready == len(rows):
                return
            if time.monotonic() > deadline or self._stop.is_set():
                raise CannotRun(
                    f"{ready} of {len(rows)} sessions are ready after {READY_SECONDS:.0f} s: {rows}"
                )
            await asyncio.sleep(0.25)

    # --- work

    async def _soak(self) -> None:
        self._began = self._resumed = time.monotonic()
        tasks = [
            asyncio.create_task(each, name=name)
            for name, each in (
                *(
                    (f"editor {n}", e.work(self._working, self._settings.pause))
                    for n, e in self._editors.items()
                ),
                ("faults", self._strike()),
                ("watch", self._look()),
                ("keeper", self._keep()),
                ("progress", self._tell()),
            )
        ]
        try:
            end = self._began + self._settings.minutes * 60
            while time.monotonic() < end and not self._stop.is_set():
                await self._work(min(self._settings.check_every, end - time.monotonic()), tasks)
                over = time.monotonic() >= end or self._stop.is_set()
                if not await self._check(last=over):
                    break
            self._outcome.interrupted = self._stop.is_set()
        finally:
            self._outcome.seconds = self._at()
            for task in [*tasks, *self._striking]:
                task.cancel()
            await asyncio.gather(*tasks, *self._striking, return_exceptions=True)

    async def _work(self, seconds: float, tasks: list[asyncio.Task[None]]) -> None:
        self._resumed = time.monotonic()
        self._working.set()
        stopping = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait([*tasks, stopping], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in done - {stopping}:
            raise CannotRun(f"the soak's own {task.get_name()} ended: {task.exception()!r}")
        self._working.clear()
        self._worked += time.monotonic() - self._resumed

    def _at(self) -> float:
        return time.monotonic() - self._began

    async def _strike(self) -> None:
        for fault in schedule.draw(self._settings):
            while self._worked + (time.monotonic() - self._resumed) < fault.at or not self._working.is_set():
                await self._working.wait()
                await asyncio.sleep(0.1)
            task = asyncio.create_task(self._strike_one(fault), name=f"fault {fault.kind}")
            self._striking.add(task)
            task.add_done_callback(self._striking.discard)

    async def _strike_one(self, fault: Fault) -> None:
        at = self._at()
        try:
            self._outcome.faults.append((at, fault, await self._faults.strike(fault)))
        except CannotRun as error:
            self._outcome.wrong.append(f"after the fault {fault.kind}: {error}")

    async def _look(self) -> None:
        while True:
            began = time.monotonic()
            await self._watch.look(self._at())
            await asyncio.sleep(max(0.5, LOOK_EVERY - (time.monotonic() - began)))

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(1)
            for program in self._stack.programs:
                if program.wanted and not program.alive:
                    self._outcome.wrong.append(
                        f"{program.name} ended by itself, exit {program.code}: {program.tail(3)}"
                    )
                    await program.start()
            for number, session in self._stack.sessions.items():
                if self._stack.process(number) is not None:
                    self._missing.pop(number, None)
                elif time.monotonic() - self._missing.setdefault(number, time.monotonic()) > GONE_FOR:
                    with suppress(httpx.HTTPError):
                        await self._stack.replace(session)
                        self._outcome.kept["machines replaced because nobody started them again"] += 1
                        self._missing.pop(number)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(1)
            commits = sum(editor.done["commits"] for editor in self._editors.values())
            tick = self._watch.ticks[-1] if self._watch.ticks else None
            memory = [life.samples[-1][1] / 1e6 for life in self._watch.current("agent")]
            self._say(
                f"{self._at():5.0f} s  {commits} commits, {len(self._outcome.faults)} faults"
                + (f", {tick.live}/{self._settings.agents} live, {tick.behind} behind" if tick else "")
                + (f", agents {min(memory):.0f}-{max(memory):.0f} MB" if memory else "")
                + ("" if self._working.is_set() else f"  ({self._looking()})")
            )

    def _looking(self) -> str:
        check = self._outcome.checks[-1]
        for number, why in check.waiting.items():
            return f"equal: {len(check.took)}; agent {number}: {why}"
        return "looking at equality"

    # --- equality

    async def _check(self, *, last: bool) -> bool:
        """A pause in which everything has to become equal; whether it did."""
        settings, stack = self._settings, self._stack
        check = Check(self._at(), last or self._word_due())
        self._outcome.checks.append(check)
        for editor in self._editors.values():
            async with editor.busy:
                pass
        if self._striking:
            await asyncio.wait(set(self._striking))
        await self._faults.clear()
        for number, paths in self._faults.drifted.items():
            editor = self._editors[schedule.project_of(number)]
            await editor.say(editor.writing.touch(sorted(paths)))
            paths.clear()
        text = f"seen-{settings.seed}-{len(self._outcome.checks)}"
        for editor in self._editors.values():
            await (editor.say(editor.writing.last_word(text)) if check.spoken else editor.finish())
            check.wrong += [f"project {editor.number}: a save was refused: {why}" for why in editor.refused]
            editor.refused.clear()
        want = {}
        for number, editor in self._editors.items():
            marker = text if check.spoken else None
            want[number], wrong = await equality.wanted(stack, editor.id, editor.directory, marker)
            check.wrong += [f"project {number}: {each}" for each in wrong]
        by_agent = {number: want[schedule.project_of(number)] for number in stack.sessions}
        await equality.settle(stack, check, by_agent, self._faults.strays, settings.patience)
        self._outcome.wrong += check.wrong
        return not check.wrong

    def _word_due(self) -> bool:
        share = self._settings.last_word
        number = len(self._outcome.checks)
        return int((number + 1) * share) > int(number * share)

    # --- the end

    async def _end(self) -> None:
        outcome, stack = self._outcome, self._stack
        self._say("stopping: sessions, orchestrator, stand-in, database")
        for editor in self._editors.values():
            outcome.edits += editor.done
            await editor.close()
        await self._watch.close()
        outcome.lives, outcome.ticks = self._watch.lives, self._watch.ticks
        outcome.totals, outcome.lag_buckets = self._watch.totals, self._watch.lag_buckets
        for number in stack.sessions:
            await asyncio.to_thread(_copy_log, stack.directory(number), stack.state / f"agent-{number}.log")
        try:
            outcome.wrong += await stack.not_forgotten()
            outcome.wrong += await stack.close_sessions()
        except (CannotRun, httpx.HTTPError, AttributeError) as error:
            outcome.wrong.append(f"the sessions could not be ended: {type(error).__name__}: {error}")
        outcome.wrong += await stack.stop()
        for pid, command in processes_of(stack.state).items():
            outcome.wrong.append(f"left behind: process {pid}, {command[:200]}")
            with suppress(psutil.Error):
                psutil.Process(pid).kill()
        machines = stack.state / "machines"
        outcome.wrong += [f"left behind: {path}" for path in machines.glob("*")]
        await asyncio.to_thread(stack.disk.unmount)
        outcome.logs = await asyncio.to_thread(read_logs, stack.state)
        outcome.wrong += outcome.logs.wrong


def _keep_log(machine: Path, to: Path) -> None:
    if not to.exists():
        with suppress(OSError):  # not there yet, or on a disk of its own
            os.link(machine / "agent.log", to)


def _copy_log(machine: Path, to: Path) -> None:
    if not to.exists():
        with suppress(OSError):
            shutil.copyfile(machine / "agent.log", to)
