"""Runs the dev server: starts, probes, stops and restarts its process, and runs installs.

`devserver.state` decides what to do. The supervisor gives it what happened (an exit, the result of a probe or an
install, an edit, time that passed), carries out the commands it returns, and keeps the last lines of output.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import replace

from agent import net
from agent.config import PASSED_ON, Settings
from agent.core.errors import DevServerFailed
from agent.core.model import Problem, ProblemKind, RelPath
from agent.devserver import probe, state
from agent.devserver.forward import Elsewhere
from agent.devserver.install import Installer, InstallOutcome, InstallResult
from agent.devserver.output import OutputLog
from agent.devserver.probe import Inspection, Outcome
from agent.devserver.process import Child, node_version
from agent.devserver.reaper import Reaper
from agent.devserver.sandbox import Launch, environment, project_rights
from agent.devserver.screen import Screen, with_plugin
from agent.devserver.state import (
    Command,
    DevServerState,
    Edited,
    Exited,
    Hydrated,
    Input,
    Installed,
    Phase,
    RestartPolicy,
    Stop,
    Tick,
)
from agent.link.run_settings import RunSettings, merged
from agent.modules.layers import LayerStore
from agent.project import reading
from agent.project.choice import NothingToServe, ProjectUnreadable, choose
from agent.project.locks import Locks
from agent.telemetry.errors import Errors
from agent.telemetry.logging import get_logger
from agent.telemetry.metrics import Metrics, show_state

ENDED = (
    "the command ended by itself, and with it what it had started in the background; a dev server's stays in the "
    'foreground: without "&", nohup, -d or --daemon, or with "wait" as its last word'
)
AFTER_A_BUG = 1.0
"""Seconds of rest after a bug in the loop, so that one which stays is no busy loop."""

log = get_logger("supervisor")


class Supervisor:
    """Runs the project's dev server. `run` until cancelled; everything else may be called at any time."""

    def __init__(
        self,
        settings: Settings,
        *,
        environ: Mapping[str, str] | None = None,
        reaper: Reaper | None = None,
        metrics: Metrics | None = None,
        errors: Errors | None = None,
        screen: Screen | None = None,
        layers: LayerStore | None = None,
        locks: Locks | None = None,
        policy: RestartPolicy | None = None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """Make a supervisor.

        Args:
            settings: The agent's settings.
            environ: The environment that the child's allow-list picks from; None: the agent's own.
            reaper: Who collects orphans in this process.
            metrics: Where starts, installs and the state are counted.
            errors: Where bugs are counted.
            screen: Who knows what is shown; None: nobody.
            layers: Where dependency layers are; None: everything is installed.
            locks: Who takes the lock files that installs make; None: nobody.
            policy: The bounds on starts and restarts.
            clock: Monotonic, seconds.
            chance: Random numbers in [0, 1), for the backoff.

        Raises:
            SettingsError: DEV_USER is not a user, or is root.
        """
        self._settings = self._given = settings
        self._environ = dict(os.environ if environ is None else environ)
        """The agent's own, and with it what the run settings add: one mapping, which installs see too."""
        self._ours = frozenset(self._environ)
        self._reaper = reaper
        self._metrics = metrics or Metrics()
        self._errors = errors or Errors(self._metrics)
        self._screen = screen
        self._policy = policy or RestartPolicy()
        self._clock = clock
        self._chance = chance
        self._output = OutputLog(clock)
        self._host = net.listening_host(settings.dev_host)
        self._rights, self._isolation = project_rights(settings)
        self._installer = Installer(
            settings, environ=self._environ, rights=self._rights, on_line=self._output.add, reaper=reaper,
            layers=layers, metrics=self._metrics, locks=locks,
        )  # fmt: skip

        # The state and what is under way.
        self._state = DevServerState()
        self._inputs: asyncio.Queue[Input] = asyncio.Queue()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[object]] = set()

        # The process.
        self._child: Child | None = None
        self._launched: Launch | None = None
        """What runs, or ran last."""
        self._inspection: Inspection | None = None
        self._start_problem: Problem | None = None
        self._elsewhere: Elsewhere | None = None
        """Where the project's programs listen, of the last start."""
        self.restarts = 0

        # What is previewed, and its install.
        self._wanted: reading.Project | None = None
        self._nothing: Problem | None = None
        """Why nothing is."""
        self._hint = ""
        """Why Node may be the reason for a failure."""
        self._install: InstallResult | None = None
        self._install_problem: Problem | None = None

    # --- what the rest of the agent sees and tells

    @property
    def state(self) -> Phase:
        """What the dev server is doing."""
        return self._state.phase

    @property
    def ready(self) -> bool:
        """Whether the preview is served."""
        return self.state is Phase.READY

    @property
    def installing(self) -> bool:
        """Whether an install runs."""
        return self._state.installing

    @property
    def url(self) -> str:
        """The address at which the dev server answered; until it has, where a visitor will reach it."""
        return (self._inspection and self._inspection.url) or self._bases()[0]

    def _bases(self) -> list[str]:
        names = (f"[{host}]" if ":" in host else host for host in net.visitors_hosts(self._host))
        return [f"http://{name}:{self._settings.dev_port}" for name in names]

    def configure(self, run: RunSettings) -> None:
        """Take the project's run settings; what runs already starts again when they make another start of it."""
        self._settings = merged(self._given, run)
        for name in [name for name in self._environ if name not in self._ours]:
            del self._environ[name]
        self._environ |= {f"{PASSED_ON}{name}": value for name, value in run.env.items()}
        self._installer.configure(self._settings.install_command, run.npmrc)
        self._inputs.put_nowait(Edited(True, True, self._runnable()))

    def project_ready(self) -> None:
        """Install and start: the project's files are all there."""
        self._inputs.put_nowait(Hydrated(self._runnable()))

    def files_changed(self, paths: Collection[RelPath]) -> None:
        """Install again or start a failed server again, if `paths`, written or removed, may make a difference."""
        page = self._wanted is not None and self._wanted.is_page
        dependencies = any(reading.decides_install(path, page=page) for path in paths)
        if dependencies or reading.may_fix(paths):
            runnable = self.state is not Phase.ABSENT or self._runnable()
            self._inputs.put_nowait(Edited(dependencies, True, runnable))

    def problems(self) -> tuple[Problem, ...]:
        """Return what is wrong now."""
        elsewhere = self._elsewhere.problem if self._elsewhere else None
        found = [self._nothing, self._install_problem, self._start_problem, elsewhere]
        covered = ("install", "port_taken")
        if self.state in (Phase.FAILED, Phase.BACKOFF) and self._state.reason not in covered:
            said = list(self._output.lines)[-10:] or ["no output"]
            if self._state.reason == "late":
                nothing = f"nothing answered at {self.url} in {self._policy.start_timeout:g} s"
                said.insert(0, self._elsewhere.why_late(nothing) if self._elsewhere else nothing)
            if self._hint:
                said.insert(0, self._hint)
            failed = self.state is Phase.FAILED
            kind: ProblemKind = "dev_server_failed" if failed else "dev_server_backoff"
            found.append(Problem(kind, "\n".join(said), rule=self._state.reason))
        inspection = self._inspection
        if self.ready and inspection and inspection.outcome is Outcome.SOCKETLESS:
            found.append(Problem("hmr_unreachable", inspection.detail))
        if self.ready and inspection and inspection.outcome is Outcome.BROKEN:
            found.append(Problem("preview_error", inspection.detail, rule=inspection.rule))
        return tuple(problem for problem in found if problem)

    def report(self, *, log: bool = True) -> dict[str, object]:
        """Return what `/status` shows. `log`: with the last lines of output."""
        now, installed, inspection = self._state, self._install, self._inspection
        target = self._elsewhere.target if self._elsewhere else None
        report: dict[str, object] = {
            "state": now.phase.value,
            "reason": now.reason or None,
            "seconds_in_state": round(self._clock() - now.since, 3) if now.since else None,
            "restarts": self.restarts,
            "url": self.url,
            "pid": self._child.pid if self._child else None,
            "command": list(self._launched.argv) if self._launched else None,
            "preview": self._wanted.report() if self._wanted else None,
            "listens_on": str(target) if target else None,
            "detail": inspection.detail if inspection else None,
            "entry": inspection.entry if inspection else None,
            "user": self._rights.user.name if self._rights.user else None,
            "isolation": self._isolation,
            "installing": now.installing,
            "install": installed
            and {"result": installed.outcome.value, "seconds": round(installed.seconds, 3)},
        }
        if log:
            report["log"] = list(self._output.lines)
        return report

    def kill_now(self) -> None:
        """Kill the dev server without waiting for `DEV_STOP_SECONDS` to pass."""
        if self._child and self._group:
            self._spawn(self._child.kill(), "dev-kill")

    # --- the loop

    async def run(self) -> None:
        """Run the dev server until cancelled; then end it and any install within `DEV_STOP_SECONDS`.

        Raises:
            DevServerFailed: The server failed for good, and the settings call it essential.
            RootUnusable: The directory for installs cannot be made.
        """
        await self._installer.open()
        self._show_state()
        async with asyncio.TaskGroup() as group:
            self._group = group
            self._spawn(self._installer.prefetch(), "modules-ahead")
            try:
                while True:
                    given, bugs = await self._next(), self._errors.counts.get("dev-server", 0)
                    with self._errors.contained("dev-server"):
                        self._carry_out(self._apply(given))
                    if self._errors.counts.get("dev-server", 0) > bugs:
                        # What was to be done may not have been begun: nothing else would say that it ended.
                        self._inputs.put_nowait(
                            Installed(ok=False, restart=False, usable=bool(self._launched))
                        )
                        self._inputs.put_nowait(Exited(self._state.generation, "exit"))
                        await asyncio.sleep(AFTER_A_BUG)
                    if self.state is Phase.FAILED and self._settings.dev_essential:
                        raise DevServerFailed(f"the dev server failed for good ({self._state.reason})")
            finally:
                await self._shut_down()
                self._group = None

    async def _next(self) -> Input:
        due = self._state.next_due
        wait = None if due is None else max(0.0, due - self._clock())
        try:
            async with asyncio.timeout(wait):
                return await self._inputs.get()
        except TimeoutError:
            return Tick()

    def _apply(self, given: Input) -> tuple[Command, ...]:
        """Move the state with what happened. Returns what is to be done about it."""
        before = self._state
        self._state, commands = state.step(
            before, given, self._clock(), policy=self._policy, jitter=self._chance()
        )
        if self.state is not before.phase:
            self._show_state()
            if self.ready:
                self._spawn(self._installer.served(), "modules-send")
            log.info(
                "dev_server.state", state=self.state.value, previous=before.phase.value, reason=self._state.reason
            )  # fmt: skip
        return commands

    def _carry_out(self, commands: tuple[Command, ...]) -> None:
        for command in commands:
            match command:
                case Command.INSTALL:
                    failed = Installed(ok=False, restart=False, usable=bool(self._launched))
                    self._spawn(self._do_install(), "install", failed)
                case Command.START | Command.START_FRESH:
                    generation = self._state.generation
                    if generation > 1:
                        self.restarts += 1
                        self._metrics.dev_server_restarts.labels(self._state.reason or "change").inc()
                    start = self._do_start(generation, command is Command.START_FRESH)
                    self._spawn(start, "dev-server", Exited(generation, "exit"))
                case Command.TERMINATE:
                    if self._child:
                        self._spawn(self._child.stop(self._settings.dev_stop_seconds), "dev-stop")

    def _spawn(self, work: Coroutine[object, object, object], name: str, failed: Input | None = None) -> None:
        """Do some work beside the loop; after a bug in it, the loop is given `failed` in place of its result."""
        assert self._group is not None
        task = self._group.create_task(self._contained(work, failed), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _contained(self, work: Coroutine[object, object, object], failed: Input | None) -> None:
        try:
            await work
        except Exception as error:
            self._errors.caught("dev-server", error)
            if isinstance(failed, Exited) and self._child is not None:
                child, self._child = self._child, None
                await child.stop(self._settings.dev_stop_seconds)
            if failed is not None:
                self._inputs.put_nowait(failed)

    async def _shut_down(self) -> None:
        self._apply(Stop())
        for task in list(self._tasks):
            if task.get_name() != "dev-kill":
                task.cancel()
        if self._child:
            await self._child.stop(self._settings.dev_stop_seconds)
            self._child = None
        self._apply(Exited(self._state.generation, "exit"))

    # --- the commands

    async def _do_install(self) -> None:
        result: InstallResult | None = None
        try:
            wanted = self._wanted = await asyncio.to_thread(self._find)
        except ProjectUnreadable as error:
            self._install_problem = Problem("install_failed", str(error), rule="package_json")
            self._inputs.put_nowait(Installed(ok=False, restart=False, usable=bool(self._launched)))
            return
        if wanted:
            self._install = result = await self._installer.install(
                wanted.dependencies, manager_runs=wanted.needs_manager
            )
        failed = result is not None and result.outcome is InstallOutcome.FAILED
        self._install_problem = problem = result.problem if result else None
        if problem and failed and (hint := await self._node_hint(wanted)):
            self._install_problem = replace(problem, detail=f"{hint}\n{problem.detail}")
        now = self._launch(wanted, fresh=False)
        usable = now is not None and (result is None or result.usable)
        swapped = result is not None and result.swapped
        changed = None not in (now, self._launched) and now != self._launched
        reason = "dependencies" if swapped else "settings"
        self._inputs.put_nowait(Installed(not failed, swapped or changed, usable, reason))

    async def _do_start(self, generation: int, fresh: bool) -> None:
        self._inspection = self._start_problem = None
        self._hint = ""
        try:
            wanted = await asyncio.to_thread(self._find)
        except ProjectUnreadable:
            wanted = None
        launch = self._launch(wanted, fresh=fresh) or self._launched
        if launch is None:  # it is gone since the install
            self._inputs.put_nowait(Exited(generation, "exit"))
            return
        self._launched = self._launch(wanted, fresh=False) or launch
        if self._screen is not None:
            env = with_plugin(launch.env, await self._screen.open(self._rights.user))
            launch = replace(launch, env=env)
        self._elsewhere = None
        port = self._port
        killed_before = net.out_of_memory_kills()
        if not net.port_is_free(self._host, port):
            name = "DEV_PORT" if port == self._settings.dev_port else "dev_port in the run settings"
            said = f"port {port} is taken by another program: end that one, or set {name} to a free port"
            self._start_problem = Problem("port_taken", said)
            self._inputs.put_nowait(Exited(generation, "port_taken"))
            return
        child = await Child.start(launch, on_line=self._output.add, reaper=self._reaper)
        self._child = child
        self._metrics.start.mark("dev_server")
        probe = self._contained(self._probe(generation), None)
        probing = asyncio.create_task(probe, name=f"probe-{generation}")
        user = self._rights.user
        elsewhere = self._elsewhere = Elsewhere(
            self._settings, self._host, uid=user.uid if user else None, clock=self._clock
        )
        watch = elsewhere.watch(child.pid, lambda: bool(self._inspection and self._inspection.up))
        looking = asyncio.create_task(self._contained(watch, None), name=f"elsewhere-{generation}")
        try:
            code = await child.wait()
        finally:
            probing.cancel()
            looking.cancel()
            await asyncio.wait({probing, looking})
            await elsewhere.close()
        why = "exit" if code < 128 else "signal"
        if code == 137 and net.out_of_memory_kills() > killed_before:
            why = "oom"
        if not child.asked_to_stop:
            log.warning("dev_server.exited", code=code, why=why)
            self._hint = await self._node_hint(wanted) if code else ENDED
        self._child = None
        self._inputs.put_nowait(Exited(generation, why))

    async def _probe(self, generation: int) -> None:
        timeout = self._settings.dev_probe_seconds
        async with contextlib.aclosing(probe.observe(self._bases(), timeout=timeout)) as observations:
            async for observed, inspection in observations:
                if inspection.up and (
                    self._inspection is None or inspection.detail != self._inspection.detail
                ):
                    log.info(
                        "dev_server.inspected", outcome=inspection.outcome.value, detail=inspection.detail
                    )
                self._inspection = inspection
                if observed is not None:
                    self._inputs.put_nowait(observed(generation))

    # --- the project and the metrics

    def _find(self) -> reading.Project | None:
        """Read the project. None: there is nothing to preview, and without a DEV_COMMAND that is a problem."""
        settings = self._settings
        try:
            found = reading.find(
                settings.project_dir, root=settings.dev_root, scripts=settings.install_scripts
            )
        except NothingToServe as error:
            self._nothing = None if settings.dev_command else Problem("nothing_to_serve", str(error))
            return None
        self._nothing = None
        return found

    def _runnable(self) -> bool:
        """Return whether there is anything to install and start. Quick enough for the event loop."""
        self._nothing = None
        try:
            choose(self._settings.project_dir, self._settings.dev_root)
        except NothingToServe as error:
            if not self._settings.dev_command:
                self._nothing = Problem("nothing_to_serve", str(error))
        except ProjectUnreadable:
            pass  # the install says why
        return self._nothing is None

    @property
    def _port(self) -> int:
        """Where the project's command is to listen."""
        return self._settings.dev_server_port or self._settings.dev_port

    def _launch(self, wanted: reading.Project | None, *, fresh: bool) -> Launch | None:
        """Say how the dev server is started. None: there is nothing to start."""
        settings = self._settings
        more = {"BROWSER": "none"}
        if hosts := (settings.preview_host or "").split():
            # Vite's own variable has room for one; the plugin allows them all.
            more |= {
                "__VITE_ADDITIONAL_SERVER_ALLOWED_HOSTS": hosts[0],
                "PREVIEW_SYNC_HOSTS": " ".join(hosts),
            }
        env = environment(self._environ, user=self._rights.user, more=more)
        argv = settings.dev_command
        if wanted:
            env["PATH"] = path = self._installer.path(
                wanted.dependencies.manager, env.get("PATH", os.defpath)
            )
            env = wanted.environment(
                env, host=self._host, port=self._port, preview_host=settings.preview_host, fresh=fresh
            )
            argv = argv or wanted.command(modules=settings.modules, path=path)
        if not argv:
            return None
        if settings.dev_command:
            env = {"PORT": str(self._port)} | env
        directory = wanted.directory if wanted else settings.project_dir
        return Launch(argv, str(directory), env, self._rights, stdin=True)

    async def _node_hint(self, wanted: reading.Project | None) -> str:
        """Return a sentence if the Node here, or that there is none, may be why something failed; else nothing."""
        if wanted is None or wanted.is_page:
            return ""
        env = environment(self._environ, user=self._rights.user, more={})
        return reading.node_missing(wanted, await node_version(env, self._rights, self._reaper)) or ""

    def _show_state(self) -> None:
        show_state(self._metrics.dev_server_state, [phase.value for phase in Phase], self.state.value)
