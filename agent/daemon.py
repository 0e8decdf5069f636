"""Puts an agent together, runs its root tasks, and stops them.

Every root task has a name and runs until the end; the first to end ends all. A signal, the orchestrator's `stop` and a
failure take the same way out: the sync stops between two batches, the dev server's group is stopped, and what remains
when STOP_GRACE is over is cut off.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, TextIO, cast

import httpx

from agent import __version__, memory
from agent.config import NATS_SCHEMES, Settings
from agent.core.clock_skew import ClockSkew
from agent.core.divergence import Comparison
from agent.core.errors import AgentError, RootUnusable, Superseded
from agent.core.globs import Rule
from agent.core.model import RelPath, Tree
from agent.core.scheduler import Follower
from agent.devserver.reaper import Reaper, stop_signals
from agent.devserver.sandbox import project_rights, project_secrets
from agent.devserver.screen import Screen
from agent.devserver.supervisor import Supervisor
from agent.fs.inspect import DirectoryView
from agent.fs.places import weaknesses
from agent.fs.project_dir import ProjectDir
from agent.health import server
from agent.health.heartbeat import Heartbeat
from agent.health.report import Report
from agent.link.realtime import realtime_link
from agent.link.run_settings import RunSettings, RunSettingsFollower
from agent.link.source import EventSource
from agent.modules.layers import LayerStore, given_layer
from agent.project.locks import Locks
from agent.session_api import SessionApi
from agent.snapshot.download import Downloader
from agent.sync.catchup import CatchUp
from agent.sync.engine import Sync
from agent.sync.ledger import Ledger
from agent.sync.shadow import Shadow
from agent.sync.workspace import Workspace
from agent.telemetry.log_writer import LogWriter
from agent.telemetry.logging import Redactor, configure_logs, get_logger, log_uncaught, redactor_for
from agent.telemetry.loop import stalls_of_running_loop
from agent.telemetry.metrics import Metrics
from agent.telemetry.spans import Spans, credentials, open_spans
from agent.telemetry.status import Problems, SyncStatus
from agent.tokens import Tokens, TokenSource
from agent.write_back.flow import Confirm, WriteBack

log = get_logger("daemon")

Task = Callable[[], Coroutine[None, None, None]]


@dataclass(slots=True, kw_only=True, eq=False)
class Agent:
    """The parts of one agent, put together and not started.

    Attributes:
        shadow: None unless SYNC_MODE=shadow; then there is no dev server, and `supervisor` is only asked for its state.
        hydrated: set when the first tree is whole.
        stop: set to have the agent drain and end.
    """

    settings: Settings

    # what the tree is made from, and where it stands
    source: EventSource
    api: SessionApi | None
    workspace: Workspace
    follower: Follower
    sync: Sync

    # the project's programs, or the comparison that stands in their place
    reaper: Reaper
    supervisor: Supervisor
    screen: Screen
    shadow: Shadow | None
    write_back: WriteBack | None

    # what is reported
    report: Report
    heartbeat: Heartbeat
    run_settings: RunSettingsFollower
    spans: Spans | None

    hydrated: asyncio.Event
    stop: asyncio.Event

    def tasks(self) -> dict[str, Task]:
        """Return the root tasks by name; each runs until it is cancelled or fails.

        A bug that ends one of them has it started again (`Errors.keep_running`), but for `sync`, which is the loop
        itself, and the dev server's, which contains its own.
        """
        keep = self.report.problems.errors.keep_running
        registry = self.report.problems.metrics.registry
        dev = {"dev-server": self.supervisor.run}
        return {
            "link": lambda: keep("link", self.source.run),
            "sync": self.sync.run,
            **({"shadow": partial(keep, "shadow", self.shadow.run)} if self.shadow else dev),
            "health": lambda: keep("health", lambda: server.serve(self.settings, self.report, registry)),
            "heartbeat": lambda: keep("heartbeat", self.heartbeat.run),
            "run-settings": lambda: keep("run-settings", self.run_settings.run),
            "memory": lambda: keep("memory", self._trim_memory),
        }

    def close(self) -> None:
        """Release the directories, the ledger, SIGCHLD and the collector of spans."""
        self.screen.close()
        if self.write_back is not None:
            self.write_back.close()
        self.workspace.release()
        self.reaper.release()
        if self.spans is not None:
            self.spans.close()

    async def _trim_memory(self) -> None:
        await self.hydrated.wait()
        gc.collect()
        memory.trim()
        await memory.trim_every(self.settings.heartbeat_seconds)


@dataclass(frozen=True, slots=True)
class Programs:
    """The project's programs and who gives back what they make, or in shadow mode the comparison in their place."""

    reaper: Reaper
    supervisor: Supervisor
    screen: Screen
    write_back: WriteBack | None
    shadow: Shadow | None


class ProjectStart:
    """Has the project's programs follow its tree, once the tree is whole and its run settings are known.

    In shadow mode there are no programs: the comparison is told instead.
    """

    def __init__(self, programs: Programs, metrics: Metrics) -> None:
        self.run_settings: RunSettingsFollower | None = None
        """Who calls `configure`; set before anything runs."""
        self.hydrated = asyncio.Event()
        """Set when the first tree is whole."""
        self._supervisor = programs.supervisor
        self._shadow = programs.shadow
        self._write_back = programs.write_back
        self._metrics = metrics
        self._rules: tuple[Rule, ...] = ()

    def tree_changed(self, paths: Collection[RelPath]) -> None:
        """Paths of the tree were written or removed."""
        if self._shadow is None:
            self._supervisor.files_changed(paths)

    def tree_whole(self) -> None:
        """The first tree is whole."""
        self.hydrated.set()
        self._metrics.start.mark("hydrated")
        if self._shadow is not None:
            self._shadow.hydrated()
        self._when_both_are_there()

    def configure(self, run: RunSettings) -> None:
        """Take the project's run settings, the first or later ones."""
        self._supervisor.configure(run)
        self._rules = run.write_back
        self._when_both_are_there()

    def _when_both_are_there(self) -> None:
        known = self.run_settings is not None and self.run_settings.known.is_set()
        if known and self.hydrated.is_set() and self._shadow is None:
            if self._write_back is not None:
                self._write_back.configure(self._rules)
            self._supervisor.project_ready()


def build(
    settings: Settings,
    *,
    environ: Mapping[str, str],
    http: httpx.AsyncClient,
    redactor: Redactor | None = None,
    spans: Spans | None = None,
    source: EventSource | None = None,
    disk: ProjectDir | None = None,
    workspace_type: Callable[[ProjectDir, Ledger, Problems], Workspace] = Workspace,
    drift_policy: Literal["off"] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Agent:
    """Put an agent together. Nothing is started: no task, no socket, no program, no file.

    A replay runs the same agent between ends of its own, which is what most of the arguments are for.

    Args:
        settings: as `config.read_environment` gives them.
        environ: what the dev server's allow-list picks from.
        http: the client for snapshots and the session API.
        redactor: takes secrets out of what is reported. Default: one that knows those of the settings.
        spans: where spans go.
        source: where events come from. Default: the Realtime link of the settings.
        disk: the project directory. Default: that of the settings, owned by DEV_USER.
        workspace_type: makes the workspace of disk, ledger and problems.
        drift_policy: "off" where nothing else can touch the directory. Default: the settings'.
        clock: monotonic seconds, as the event loop waits by.

    Raises:
        RootUnusable: DEV_USER could replace a directory of the agent's.
        SettingsError: there is no such DEV_USER.
    """
    problems = Problems(Metrics())
    metrics, status, skew = problems.metrics, SyncStatus(), ClockSkew()
    redactor = redactor or redactor_for(settings)
    tokens = tokens_of(settings, redactor.add_renewed)
    api = session_api(settings, tokens, http, skew)
    source = source or realtime(settings, api or tokens)
    workspace = workspace_type(disk or _disk(settings), Ledger(settings.ledger), problems)
    follower = Follower(Tree(), optimistic=settings.optimistic_events)
    programs = _programs(
        settings, environ, http, api, workspace, follower, problems, status, clock,
        confirm=lambda moved, at: sync.confirm(moved, at),
    )  # fmt: skip
    snapshots = Downloader(workspace.disk, http, settings, str(settings.project_id))
    catch_up = CatchUp(api, snapshots, problems, lambda: follower.tree.entries)
    start = ProjectStart(programs, metrics)
    run_settings = start.run_settings = RunSettingsFollower(
        api, settings.run_revision, on_settings=start.configure, on_secret=redactor.add
    )
    url = settings.snapshot_url
    sync = Sync(
        follower, workspace, source, catch_up, problems, metrics, status,
        snapshot_url=url.get_secret_value() if url else None, on_tree=start.tree_changed,
        on_hydrated=start.tree_whole, preview=programs.screen, drift_policy=drift_policy or settings.drift_policy,
        skew=skew, spans=spans, write_back=programs.write_back, clock=clock,
    )  # fmt: skip
    report = Report(
        settings=settings, sync=sync, sync_status=status, catch_up=catch_up, link=source, dev=programs.supervisor,
        screen=programs.screen, problems=problems, redactor=redactor, run_settings=run_settings, skew=skew,
        shadow=programs.shadow, write_back=programs.write_back, stalls=stalls_of_running_loop(),
    )  # fmt: skip
    metrics.registry.register(report)
    stop = asyncio.Event()
    heartbeat = Heartbeat(
        every=settings.heartbeat_seconds, report=report, api=api, sync=sync, stop=stop, run_settings=run_settings
    )  # fmt: skip
    return Agent(
        settings=settings, source=source, api=api, workspace=workspace, follower=follower, sync=sync,
        reaper=programs.reaper, supervisor=programs.supervisor, screen=programs.screen, shadow=programs.shadow,
        write_back=programs.write_back, report=report, heartbeat=heartbeat, run_settings=run_settings,
        spans=spans, hydrated=start.hydrated, stop=stop,
    )  # fmt: skip


def _programs(
    settings: Settings,
    environ: Mapping[str, str],
    http: httpx.AsyncClient,
    api: SessionApi | None,
    workspace: Workspace,
    follower: Follower,
    problems: Problems,
    status: SyncStatus,
    clock: Callable[[], float],
    *,
    confirm: Confirm,
) -> Programs:
    """Make what runs the project. `confirm`: the loop's, which is told what the database has taken."""
    metrics, reaper = problems.metrics, Reaper()
    screen = Screen(settings.project_dir, metrics=metrics, last_applied=lambda: status.last_applied)
    write_back = None if settings.shadow or api is None else WriteBack(
        settings.state_dir / "write-back.sqlite", workspace.disk, api, problems, tree=lambda: follower.tree,
        stats=lambda: workspace.stats, confirm=confirm, clock=clock,
    )  # fmt: skip
    supervisor = Supervisor(
        settings, environ=environ, reaper=reaper, metrics=metrics, errors=problems.errors, screen=screen,
        layers=layer_store(settings, api, http),
        locks=Locks(write_back.takes, write_back.hand_over) if write_back else None,
    )  # fmt: skip
    shadow = _shadow(settings, problems, follower) if settings.shadow else None
    return Programs(reaper, supervisor, screen, write_back, shadow)


def tokens_of(settings: Settings, on_token: Callable[[str], None] = lambda token: None) -> Tokens:
    """Hold the session's token: the environment's, or that of REALTIME_TOKEN_FILE. `on_token` hears of later ones."""
    first = settings.realtime_token
    given = first.get_secret_value() if first else None
    nats = settings.nats_jwt
    return Tokens(
        given, settings.realtime_token_file, on_token=on_token,
        nats_jwt=nats.get_secret_value() if nats else None,
    )  # fmt: skip


def session_api(
    settings: Settings, tokens: Tokens, http: httpx.AsyncClient, skew: ClockSkew | None = None
) -> SessionApi | None:
    """Make the client of the session API; None without SESSION_API_URL."""
    url = settings.session_api_url
    return None if url is None else SessionApi(url, settings.session_id, tokens, http, skew=skew)


def layer_store(settings: Settings, api: SessionApi | None, http: httpx.AsyncClient) -> LayerStore:
    """Make the store of dependency layers, with the one that the environment names."""
    parts = settings.modules_parts
    given = given_layer(settings.modules_key, parts.get_secret_value() if parts else None)
    return LayerStore(api, http, given)


def realtime(settings: Settings, tokens: TokenSource) -> EventSource:
    """Make the link to the project's events, over what REALTIME_URL names; it must be set."""
    assert settings.realtime_url is not None, "read_environment requires it"
    if settings.realtime_url.partition(":")[0] in NATS_SCHEMES:
        # Its library is an extra.
        from agent.link.nats import nats_link

        return nats_link(settings.realtime_url, str(settings.project_id), tokens)
    key, topic = settings.realtime_api_key, f"realtime:project:{settings.project_id}"
    return realtime_link(settings.realtime_url, key.get_secret_value() if key else None, topic, tokens)


def _disk(settings: Settings) -> ProjectDir:
    user = None if settings.shadow else project_rights(settings)[0].user
    if user is not None and (weak := weaknesses(settings, user.name, user.uid, user.gid)):
        raise RootUnusable("\n".join(weak))
    return ProjectDir(settings.tree_dir, settings.staging, owner=(user.uid, user.gid) if user else None)


def _shadow(settings: Settings, problems: Problems, follower: Follower) -> Shadow:
    """Compare the other flow's directory with our tree."""
    comparison = Comparison(settings.shadow_settle_seconds, settings.shadow_ignore)
    log.info("shadow.begun", live_dir=str(settings.project_dir), shadow_dir=str(settings.tree_dir))
    return Shadow(DirectoryView(settings.project_dir), comparison, problems, lambda: follower.tree.entries)


async def run(settings: Settings, environ: Mapping[str, str]) -> int:
    """Run the agent until it is told to stop; return the process's exit code (protocol: Commands and exits)."""
    redactor = redactor_for(settings)
    for secret in (*credentials(environ), *project_secrets(environ)):
        redactor.add(secret)
    lines = LogWriter(sys.stdout.fileno())
    configure_logs(settings, redactor, cast("TextIO", lines))
    log_uncaught()
    spans = open_spans(environ, settings.project_id, settings.session_id)
    limits = httpx.Limits(max_connections=16, max_keepalive_connections=4)
    async with httpx.AsyncClient(limits=limits, trust_env=False) as http:
        agent = build(settings, environ=environ, http=http, redactor=redactor, spans=spans)
        agent.report.lines = lines
        if spans is not None:
            agent.report.problems.metrics.start.on_part = partial(_start_span, spans)
        try:
            agent.reaper.adopt()
            return await _until_stopped(agent)
        finally:
            agent.close()


def _start_span(spans: Spans, part: str, since: float, until: float) -> None:
    spans.record(f"start {part}", since, until, {})


async def _until_stopped(agent: Agent) -> int:
    """Run the root tasks until one of them ends or a stop is asked for; drain; return the exit code."""
    grace = agent.settings.stop_grace

    def asked(number: signal.Signals, count: int) -> None:
        if count > 1:
            agent.supervisor.kill_now()
        agent.stop.set()
        log.info("agent.signal", signal=number.name, count=count)

    with stop_signals(asked):
        tasks = [asyncio.create_task(start(), name=name) for name, start in agent.tasks().items()]
        waiting = asyncio.create_task(agent.stop.wait(), name="stop")
        log.info("agent.started", version=__version__)
        await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
        ended = [task for task in tasks if task.done()]
        agent.report.draining = True
        log.info("agent.draining", grace=grace)
        waiting.cancel()
        for task in tasks:
            task.cancel()
        _, hanging = await asyncio.wait(tasks, timeout=grace)
        for task in hanging:
            log.error("agent.cut_off", task=task.get_name())
        code = _exit_code(ended)
        log.info("agent.stopped", exit=code)
        return code


def _exit_code(ended: Collection[asyncio.Task[None]]) -> int:
    """Return 0 for a stop that was asked for, or a newer machine of the session; else the first failure's code."""
    for task in ended:
        if task.cancelled():
            continue
        cause: BaseException | None = task.exception()
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        name = task.get_name()
        if isinstance(cause, Superseded):
            log.info("agent.superseded", why=str(cause))
            return 0
        if isinstance(cause, AgentError):
            log.error("agent.failed", task=name, why=str(cause), exit=cause.exit_code)
            return cause.exit_code
        if cause is None:
            log.error("agent.task_ended", task=name)
        else:
            log.error("agent.bug", task=name, exc_info=cause)
        return 1
    return 0
