"""The one place where everything is wired, started, watched and stopped.

Every root task has a name and runs until the end; the first to end ends all. A signal, the orchestrator's `stop`
and a failure take the same way out: the sync stops between two batches, the dev server's group is stopped, what
remains is cut off when the grace is over.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Callable, Collection, Coroutine, Mapping

import httpx

from agent import memory
from agent.config import Settings
from agent.core.clock_skew import ClockSkew
from agent.core.divergence import Comparison
from agent.core.errors import (
    AgentError,
    CredentialRejected,
    MalformedMessage,
    RootUnusable,
    Superseded,
    TooLarge,
    Unavailable,
)
from agent.core.messages import Head
from agent.core.model import RelPath, Tree
from agent.core.scheduler import Follower, SchedulerSettings
from agent.devserver.reaper import Reaper, stop_signals
from agent.devserver.supervisor import Supervisor, rights
from agent.fs.inspect import Sight
from agent.fs.places import weaknesses
from agent.fs.project_dir import Disk
from agent.health import server
from agent.health.report import Report
from agent.link.realtime import realtime_link
from agent.link.source import EventSource
from agent.session_api import SessionApi
from agent.sync.catchup import BACKOFF, CatchUp
from agent.sync.engine import Sync
from agent.sync.ledger import Ledger
from agent.sync.shadow import Shadow
from agent.sync.workspace import Workspace
from agent.telemetry.metrics import (
    Metrics,
    configure_logs,
    get_logger,
    log_uncaught,
    process_age,
    redactor_for,
)
from agent.telemetry.spans import credentials, open_spans
from agent.telemetry.status import AgentState, Problems, SyncStatus
from agent.tokens import Tokens, spread

log = get_logger("daemon")

EARLY_LOOK = 0.1
"""Seconds between looks at whether the state changed, while the agent starts and somebody waits for it."""

SETTLED_LOOK = 0.5
"""The same once it serves: a look costs a quarter of a millisecond, and an idle agent should cost nothing."""

QUICK = 0.25
"""Least seconds between two reports, however fast the state flaps."""


async def run(settings: Settings, environ: Mapping[str, str]) -> int:
    """Run the agent until it is told to stop; the exit code of the process (protocol: Commands and exits)."""
    redactor = redactor_for(settings)
    for secret in credentials(environ):
        redactor.add(secret)
    configure_logs(settings, redactor)
    log_uncaught()
    spans = open_spans(environ, settings.project_id, settings.session_id)
    reaper = Reaper()
    reaper.adopt()
    metrics = Metrics()
    problems = Problems(metrics)
    status = SyncStatus()
    skew = ClockSkew()
    limits = httpx.Limits(max_connections=16, max_keepalive_connections=4)
    async with httpx.AsyncClient(limits=limits, trust_env=False) as http:
        first = settings.realtime_token
        tokens = Tokens(first.get_secret_value() if first else None, settings.realtime_token_file)
        api = (
            SessionApi(settings.session_api_url, settings.session_id, tokens, http, skew=skew)
            if settings.session_api_url
            else None
        )
        key = settings.realtime_api_key
        assert settings.realtime_url is not None, "read_environment requires it"
        link: EventSource = realtime_link(
            settings.realtime_url,
            key.get_secret_value() if key else None,
            f"realtime:project:{settings.project_id}",
            api or tokens,
        )
        user = None if settings.shadow else rights(settings)[0].user
        if user is not None and (weak := weaknesses(settings, user.name, user.uid, user.gid)):
            raise RootUnusable("\n".join(weak))
        disk = Disk(
            settings.tree_dir, settings.staging, owner=(user.uid, user.gid) if user is not None else None
        )
        ledger = Ledger(settings.ledger)
        follower = Follower(Tree(), SchedulerSettings(optimistic=settings.optimistic_events))
        supervisor = Supervisor(settings, environ=environ, reaper=reaper, metrics=metrics)
        catch_up = CatchUp(
            api, disk, http, settings, str(settings.project_id), problems, lambda: follower.tree.entries
        )

        shadow = _shadow(settings, problems, follower) if settings.shadow else None

        def on_tree(paths: Collection[RelPath]) -> None:
            if shadow is None:
                supervisor.files_changed(paths)

        def on_hydrated() -> None:
            gc.collect()
            memory.trim()
            if shadow is None:
                supervisor.project_ready()
            else:
                shadow.hydrated()

        sync = Sync(
            follower,
            Workspace(disk, ledger, problems),
            link,
            catch_up,
            problems,
            metrics,
            status,
            snapshot_url=settings.snapshot_url.get_secret_value() if settings.snapshot_url else None,
            on_tree=on_tree,
            on_hydrated=on_hydrated,
            drift_policy=settings.drift_policy,
            skew=skew,
            spans=spans,
        )
        report = Report(
            settings, sync, status, catch_up, link, supervisor, problems, metrics, redactor, skew, shadow
        )
        metrics.registry.register(report)
        stop = asyncio.Event()
        tasks: dict[str, Callable[[], Coroutine[None, None, None]]] = {
            "link": link.run,
            "sync": sync.run,
            **({"dev-server": supervisor.run} if shadow is None else {"shadow": shadow.run}),
            "health": lambda: server.serve(
                settings, report.status, metrics.registry, report.ready, why=report.why
            ),
            "heartbeat": lambda: _heartbeat(settings.heartbeat_seconds, report, api, sync, stop),
            "memory": lambda: memory.trim_every(settings.heartbeat_seconds),
        }
        try:
            return await _until_stopped(tasks, settings, report, supervisor, stop)
        finally:
            disk.close()
            ledger.close()
            reaper.release()
            if spans is not None:
                spans.close()


def _shadow(settings: Settings, problems: Problems, follower: Follower) -> Shadow:
    """What compares the other flow's directory with our tree."""
    comparison = Comparison(settings.shadow_settle_seconds, settings.shadow_ignore)
    log.info("shadow.begun", live_dir=str(settings.project_dir), shadow_dir=str(settings.tree_dir))
    return Shadow(Sight(settings.project_dir), comparison, problems, lambda: follower.tree.entries)


async def _until_stopped(
    root: Mapping[str, Callable[[], Coroutine[None, None, None]]],
    settings: Settings,
    report: Report,
    supervisor: Supervisor,
    stop: asyncio.Event,
) -> int:
    """Run the root tasks until one of them ends or somebody asks; drain; say how the process should end."""

    def asked(number: signal.Signals, count: int) -> None:
        log.info("agent.signal", signal=number.name, count=count)
        if count > 1:
            supervisor.hurry()
        stop.set()

    with stop_signals(asked):
        tasks = {asyncio.create_task(start(), name=name): name for name, start in root.items()}
        waiting = asyncio.create_task(stop.wait(), name="stop")
        log.info("agent.started", version=report.heartbeat()["agent_version"])
        await asyncio.wait([*tasks, waiting], return_when=asyncio.FIRST_COMPLETED)
        ended = [task for task in tasks if task.done()]
        report.draining = True
        log.info("agent.draining", grace=settings.stop_grace)
        waiting.cancel()
        for task in tasks:
            task.cancel()
        _, hanging = await asyncio.wait(tasks, timeout=settings.stop_grace)
        for task in hanging:
            log.error("agent.cut_off", task=tasks[task])
        code = _exit_code(ended, tasks)
        log.info("agent.stopped", exit=code)
        return code


def _exit_code(ended: Collection[asyncio.Task[None]], names: Mapping[asyncio.Task[None], str]) -> int:
    """0 when somebody asked, a newer machine of the session included; else what the first task to end died of."""
    for task in ended:
        if task.cancelled():
            continue
        error = task.exception()
        if error is None:
            log.error("agent.task_ended", task=names[task])
            return 1
        cause = _first_cause(error)
        if isinstance(cause, Superseded):
            log.info("agent.superseded", why=str(cause))
            return 0
        if isinstance(cause, AgentError):
            log.error("agent.failed", task=names[task], why=str(cause), exit=cause.exit_code)
            return cause.exit_code
        log.error("agent.bug", task=names[task], exc_info=cause)
        return 1
    return 0


def _first_cause(error: BaseException) -> BaseException:
    """The first error inside a group of them."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _said(api: SessionApi, report: Report) -> Head:
    """Say how we are. What is wrong is left out when a peer reads less than we cut it to: the state keeps the lease."""
    try:
        return await api.report_status(report.heartbeat())
    except TooLarge as error:
        log.warning("heartbeat.too_large", why=str(error))
        return await api.report_status(report.heartbeat(bare=True))


async def _heartbeat(
    every: float, report: Report, api: SessionApi | None, sync: Sync, stop: asyncio.Event
) -> None:
    """Tell the orchestrator how we are, at once on a change; hear where the database is.

    A head that disagrees with the tree heals even the loss of the last event.
    """
    sent: object = None
    due = 0.0
    was: AgentState | None = None
    started = False
    attempt = 0
    while True:
        state = report.state
        if state is not was:
            log.info("agent.state", state=state.value, before=was.value if was else None)
            was = state
        if not started and report.ready():
            started = True
            report.metrics.session_start.set(process_age())
            log.info("agent.ready", seconds=round(process_age(), 3))
        now = time.monotonic()
        seen = (state, report.dev.state, report.ready())
        if api is not None and (now >= due or (seen != sent and attempt == 0)):
            sent = seen
            due = now + every * (0.8 + 0.4 * spread())
            try:
                head = await _said(api, report)
            except (Unavailable, MalformedMessage) as error:
                attempt += 1
                due = time.monotonic() + BACKOFF.delay(attempt, error)
            except CredentialRejected:
                attempt += 1
                due = time.monotonic() + every
            else:
                attempt = 0
                if head.action == "stop":
                    log.info("agent.told_to_stop")
                    stop.set()
                sync.hear(head)
                if head.action == "sync":
                    sync.hurry()
            await asyncio.sleep(QUICK)
        else:
            settled = state in (AgentState.SERVING, AgentState.DEGRADED)
            await asyncio.sleep(SETTLED_LOOK if settled else EARLY_LOOK)
