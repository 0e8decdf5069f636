"""The dev server's keeper: asks `devserver.state` what to do, does it, and tells it what came of it.

The shell round the pure table. It starts and stops the process, looks whether a preview is served, runs
installs, and keeps the last lines of output. Nothing here decides when to restart or when to give up.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Mapping

import httpx

from agent import net
from agent.config import Settings
from agent.core.errors import DevServerFailed
from agent.core.model import Problem, ProblemKind, RelPath
from agent.devserver import probe, project, state
from agent.devserver.install import How, Installer, Result
from agent.devserver.probe import Seen, Verdict
from agent.devserver.process import Child
from agent.devserver.project import Project, ProjectUnreadable
from agent.devserver.reaper import Reaper
from agent.devserver.sandbox import Launch, Rights, environment, find_user
from agent.devserver.state import (
    Answered,
    Command,
    Edited,
    Exited,
    Hydrated,
    Input,
    Installed,
    Machine,
    Missed,
    Outdated,
    Policy,
    Served,
    State,
    Stop,
    Tick,
)
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics, show_state

LOG_LINES = 200
LOG_RATE = 100
"""Lines a second that go to the log; a loop that prints must not become the agent's main work."""
FIRST_LOOKS = 0.03
"""Seconds between looks at a server that does not answer yet. Vite needs about 0.4 s, a look under 1 ms."""
LATER_LOOKS = 0.25
"""Seconds between looks at one that answers without serving a preview: somebody has to fix something."""
SOCKET_PATIENCE = 10.0
"""Seconds after which a preview without its socket counts as served: the project may have turned it off."""
PROCESSES_OF_A_USER = 512
ANYWHERE = frozenset({"", "::", "0.0.0.0"})  # noqa: S104 - compared with, not bound to


class Supervisor:
    """Keeps the project's dev server up. `run` until cancelled; the rest may be called at any time."""

    def __init__(
        self,
        settings: Settings,
        *,
        environ: Mapping[str, str] | None = None,
        reaper: Reaper | None = None,
        metrics: Metrics | None = None,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """`environ` is what the child's allow-list picks from (default: the agent's own).

        Raises `SettingsError` when DEV_USER is nobody.
        """
        self._settings = settings
        self._environ = os.environ if environ is None else environ
        self._reaper = reaper
        self._metrics = metrics
        self._policy = policy or Policy()
        self._clock = clock
        self._chance = chance
        self._log = get_logger("supervisor")
        self._host = net.listening_host(settings.dev_host)
        self._rights, self._isolation = rights(settings)
        self._installer = Installer(
            settings, environ=self._environ, rights=self._rights, on_line=self._heard, reaper=reaper
        )
        self._machine = Machine()
        self._inputs: asyncio.Queue[Input] = asyncio.Queue()
        self._group: asyncio.TaskGroup | None = None
        self._work: set[asyncio.Task[None]] = set()
        self._child: Child | None = None
        self._argv: tuple[str, ...] = ()
        self._prefix = ""
        self._seen: Seen | None = None
        self._install: Result | None = None
        self._install_problem: Problem | None = None
        self._start_problem: Problem | None = None
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._second = 0
        self._in_second = 0
        self._silenced = 0
        self.restarts = 0

    # --- what others see and say

    @property
    def state(self) -> State:
        return self._machine.state

    @property
    def ready(self) -> bool:
        """The preview is served."""
        return self.state is State.READY

    @property
    def installing(self) -> bool:
        return self._machine.installing

    @property
    def url(self) -> str:
        """Where the agent itself reaches the dev server."""
        name = "127.0.0.1" if self._host in ANYWHERE else self._host
        name = f"[{name}]" if ":" in name else name
        return f"http://{name}:{self._settings.dev_port}"

    def project_ready(self) -> None:
        """The tree is whole: find out what it is, install, start."""
        self._inputs.put_nowait(Hydrated(self._runnable()))

    def files_changed(self, paths: Collection[RelPath]) -> None:
        """These were written or removed."""
        dependencies = any(project.decides_install(path, self._prefix) for path in paths)
        relevant = dependencies or project.may_cure(paths)
        if relevant:
            runnable = self.state is not State.ABSENT or self._runnable()
            self._inputs.put_nowait(Edited(dependencies, relevant, runnable))

    def problems(self) -> tuple[Problem, ...]:
        """What is wrong now."""
        found = [self._install_problem, self._start_problem]
        if self.state in (State.FAILED, State.BACKOFF) and self._machine.reason != "install":
            said = list(self._lines)[-10:] or ["no output"]
            if self._machine.reason == "late":
                elsewhere = "if it listens elsewhere, set DEV_COMMAND to start it with this host and port"
                said.insert(
                    0, f"nothing answered at {self.url} in {self._policy.start_timeout:g} s; {elsewhere}"
                )
            failed = self.state is State.FAILED
            kind: ProblemKind = "dev_server_failed" if failed else "dev_server_backoff"
            found.append(Problem(kind, "\n".join(said), rule=self._machine.reason))
        if self.ready and self._seen and self._seen.verdict is Verdict.SOCKETLESS:
            found.append(Problem("hmr_unreachable", self._seen.detail))
        return tuple(problem for problem in found if problem)

    def report(self, *, log: bool = True) -> dict[str, object]:
        """For status. `log`: with the last lines of output."""
        machine, installed = self._machine, self._install
        told: dict[str, object] = {
            "state": machine.state.value,
            "reason": machine.reason or None,
            "seconds_in_state": round(self._clock() - machine.since, 3) if machine.since else None,
            "restarts": self.restarts,
            "url": self.url,
            "pid": self._child.pid if self._child else None,
            "command": list(self._argv) or None,
            "detail": self._seen.detail if self._seen else None,
            "entry": self._seen.entry if self._seen else None,
            "user": self._rights.user.name if self._rights.user else None,
            "isolation": self._isolation,
            "installing": machine.installing,
            "install": {"result": installed.how.value, "seconds": round(installed.seconds, 3)}
            if installed
            else None,
        }
        if log:
            told["log"] = list(self._lines)
        return told

    def hurry(self) -> None:
        """Kill instead of waiting for the grace to pass."""
        if self._child and self._group:
            self._spawn(self._kill(self._child), "dev-kill")

    # --- the loop

    async def run(self) -> None:
        """Until cancelled; then the dev server and any install are gone within `DEV_STOP_SECONDS`.

        Raises `DevServerFailed` when the server failed for good and the settings call it essential, and
        `OSError` when the directory for installs cannot be made.
        """
        await self._installer.open()
        self._show()
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                while True:
                    self._take(await self._next())
                    if self.state is State.FAILED and self._settings.dev_essential:
                        raise DevServerFailed(f"the dev server failed for good ({self._machine.reason})")
            finally:
                await self._shut_down()
                self._group = None

    async def _next(self) -> Input:
        due = self._machine.next_due
        wait = None if due is None else max(0.0, due - self._clock())
        try:
            async with asyncio.timeout(wait):
                return await self._inputs.get()
        except TimeoutError:
            return Tick()

    def _take(self, given: Input) -> None:
        before = self._machine
        self._machine, commands = state.step(
            before, given, self._clock(), policy=self._policy, jitter=self._chance()
        )
        if self._machine.state is not before.state:
            self._show()
            self._log.info(
                "dev_server.state",
                state=self.state.value,
                previous=before.state.value,
                reason=self._machine.reason,
            )
        for command in commands:
            match command:
                case Command.INSTALL:
                    self._spawn(self._do_install(), "install")
                case Command.START | Command.START_FRESH:
                    generation = self._machine.generation
                    if generation > 1:
                        self.restarts += 1
                        if self._metrics:
                            self._metrics.dev_server_restarts.labels(self._machine.reason or "change").inc()
                    self._spawn(self._do_start(generation, command is Command.START_FRESH), "dev-server")
                case Command.TERMINATE:
                    if self._child:
                        self._spawn(self._stop(self._child), "dev-stop")

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        assert self._group is not None
        task = self._group.create_task(work, name=name)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _shut_down(self) -> None:
        self._machine, _ = state.step(self._machine, Stop(), self._clock(), policy=self._policy, jitter=0.0)
        self._show()
        for task in list(self._work):
            if task.get_name() != "dev-kill":
                task.cancel()
        running = self._child
        if running:
            await running.stop(self._settings.dev_stop_seconds)
            self._child = None
        ended = Exited(self._machine.generation, "exit")
        self._machine, _ = state.step(self._machine, ended, self._clock(), policy=self._policy, jitter=0.0)
        self._show()

    # --- the commands

    async def _do_install(self) -> None:
        result, argv = None, self._argv
        try:
            wanted = self._find()
        except ProjectUnreadable as error:
            self._install_problem = Problem("install_failed", str(error), rule="package_json")
            self._inputs.put_nowait(Installed(ok=False, restart=False, usable=bool(argv)))
            return
        if wanted:
            self._prefix = "" if wanted.root == self._settings.project_dir else f"{wanted.root.name}/"
            result = await self._installer.install(wanted)
            self._install, self._install_problem = result, result.problem
            if self._metrics:
                self._metrics.installs.labels(result.how.value).inc()
            self._log.info(
                "install.done", result=result.how.value, seconds=round(result.seconds, 3),
                problem=result.problem.rule if result.problem else None,
            )  # fmt: skip
        else:
            self._install_problem = None
        now = self._command(wanted, fresh=False)
        usable = bool(now) and (result is None or result.usable)
        failed = result is not None and result.how is How.FAILED
        restart = (result is not None and result.swapped) or (bool(argv) and bool(now) and argv != now)
        self._inputs.put_nowait(Installed(ok=not failed, restart=restart, usable=usable))

    async def _do_start(self, generation: int, fresh: bool) -> None:
        try:
            wanted = self._find()
        except ProjectUnreadable:
            wanted = None
        argv = self._command(wanted, fresh=False) or self._argv
        running = self._command(wanted, fresh=True) if fresh else argv
        self._argv, self._seen, self._start_problem = argv, None, None
        port = self._settings.dev_port
        more = {"PORT": str(port), "BROWSER": "none"}
        if self._settings.preview_host:
            more["__VITE_ADDITIONAL_SERVER_ALLOWED_HOSTS"] = self._settings.preview_host
        env = environment(self._environ, user=self._rights.user, more=more)
        root = wanted.root if wanted else self._settings.project_dir
        launch = Launch(running, str(root), env, self._rights)
        killed_before = net.out_of_memory_kills()
        if not net.port_is_free(self._host, port):
            self._start_problem = Problem("port_taken", f"something else listens on port {port}")
            self._inputs.put_nowait(Exited(generation, "port_taken"))
            return
        running_child = await Child.start(launch, on_line=self._heard, reaper=self._reaper)
        self._child = running_child
        looking = asyncio.create_task(self._look(generation), name=f"look-{generation}")
        try:
            code = await running_child.wait()
        finally:
            looking.cancel()
        why = "exit" if code < 128 else "signal"
        if code == 137 and net.out_of_memory_kills() > killed_before:
            why = "oom"
        if not running_child.asked_to_stop:
            self._log.warning("dev_server.exited", code=code, why=why)
        self._child = None
        self._inputs.put_nowait(Exited(generation, why))

    async def _stop(self, running: Child) -> None:
        await running.stop(self._settings.dev_stop_seconds)

    async def _kill(self, running: Child) -> None:
        await running.kill()

    async def _look(self, generation: int) -> None:
        """Look until it is served, then ask now and then whether it still answers."""
        patience, every = self._settings.dev_probe_seconds, FIRST_LOOKS
        without_socket: float | None = None
        async with httpx.AsyncClient(trust_env=False, timeout=patience) as http:
            while True:
                self._seen = seen = await probe.look(http, self.url, timeout=patience)
                if seen.verdict is not Verdict.SILENT:
                    self._inputs.put_nowait(Answered(generation))
                    every = LATER_LOOKS
                if seen.verdict is Verdict.SOCKETLESS:
                    without_socket = without_socket or self._clock()
                if seen.verdict is Verdict.OUTDATED:
                    self._inputs.put_nowait(Outdated(generation))
                if seen.verdict is Verdict.SERVED or (
                    without_socket and self._clock() - without_socket >= SOCKET_PATIENCE
                ):
                    break
                await asyncio.sleep(every)
            self._inputs.put_nowait(Served(generation))
            while True:
                await asyncio.sleep(patience)
                seen = await probe.look(http, self.url, timeout=patience, socket=False)
                if seen.verdict is not Verdict.SILENT or await probe.ping(http, self.url, timeout=patience):
                    self._inputs.put_nowait(
                        Outdated(generation) if seen.verdict is Verdict.OUTDATED else Answered(generation)
                    )
                    self._seen = seen
                else:
                    self._inputs.put_nowait(Missed(generation))

    # --- small things

    def _find(self) -> Project | None:
        return project.find(self._settings.project_dir, scripts=self._settings.install_scripts)

    def _runnable(self) -> bool:
        if self._settings.dev_command:
            return True
        with contextlib.suppress(ProjectUnreadable):
            return self._find() is not None
        return True

    def _command(self, wanted: Project | None, *, fresh: bool) -> tuple[str, ...]:
        if self._settings.dev_command:
            return self._settings.dev_command
        return wanted.dev_argv(host=self._host, port=self._settings.dev_port, fresh=fresh) if wanted else ()

    def _heard(self, line: str) -> None:
        self._lines.append(line)
        second = int(self._clock())
        if second != self._second:
            if self._silenced:
                self._log.warning("dev_server.output_silenced", source="dev", lines=self._silenced)
            self._second, self._in_second, self._silenced = second, 0, 0
        self._in_second += 1
        if self._in_second > LOG_RATE:
            self._silenced += 1
        elif line.strip():
            self._log.info("dev_server.output", source="dev", line=line)

    def _show(self) -> None:
        if self._metrics:
            show_state(self._metrics.dev_server_state, [s.value for s in State], self.state.value)


def rights(settings: Settings) -> tuple[Rights, str]:
    """What the project's programs may do, and one sentence about it for status. Raises `SettingsError`."""
    files = settings.dev_files
    if settings.dev_user is None:
        same = "the project's code runs as the agent's own user and could read what the agent can"
        return Rights(None, settings.dev_processes, files), f"none: DEV_USER is not set, {same}"
    user = find_user(settings.dev_user)
    if os.geteuid() == user.uid:
        return Rights(None, settings.dev_processes, files), f"none: the agent itself runs as {user.name}"
    if os.geteuid() != 0:
        return (
            Rights(None, settings.dev_processes, files),
            f"none: the agent is not root and cannot become {user.name}",
        )
    return Rights(user, settings.dev_processes or PROCESSES_OF_A_USER, files), f"runs as {user.name}"
