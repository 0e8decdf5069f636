"""One control plane put together, and the process that serves it.

`control_plane` makes pool, storage, snapshots, sessions, sweeper and routes, for `serve` and `dev` both; `run_serve`
is `preview-orchestrator serve`, until told to stop; `run_machines` is `preview-orchestrator machines`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from dataclasses import asdict, dataclass
from email.utils import formatdate
from typing import Any

import httpx
import psycopg
import structlog
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope, Send

from orchestrator_stub.config import Settings
from orchestrator_stub.http import operations
from orchestrator_stub.http.operations import Measured, Metrics
from orchestrator_stub.http.routes import Api, application
from orchestrator_stub.machines.container import ContainerMachines
from orchestrator_stub.machines.driver import Installation, MachineDriver, MachineRefused, owner_of
from orchestrator_stub.machines.fly import FlyMachines, FlyShape
from orchestrator_stub.machines.fly_api import WRITES, FlyApi, Rate
from orchestrator_stub.machines.local import LocalMachines
from orchestrator_stub.platform.database import Pool, pool_of
from orchestrator_stub.platform.redaction import Redactor, secrets_of
from orchestrator_stub.platform.storage import StorageClient
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.sessions.catchup import Catchup
from orchestrator_stub.sessions.controller import Control
from orchestrator_stub.sessions.inventory import judged
from orchestrator_stub.sessions.store import SessionStore, Unmigrated
from orchestrator_stub.sessions.template import Template
from orchestrator_stub.snapshots.builder import Snapshots
from orchestrator_stub.snapshots.cache import KeptSnapshots, OfferCache, PostgresOffers, RedisOffers
from orchestrator_stub.snapshots.turns import Turns
from orchestrator_stub.snapshots.worker import SnapshotJob


@dataclass(frozen=True, slots=True)
class Service:
    """A running control plane."""

    routes: list[BaseRoute]
    control: Control
    job: SnapshotJob
    store: SessionStore
    metrics: Metrics
    pool: Pool
    installation: Installation


@asynccontextmanager
async def control_plane(settings: Settings, keys: Keyring, driver: MachineDriver) -> AsyncIterator[Service]:
    """Everything but the socket and the sweeper. Raises `psycopg.OperationalError` without a database, `Unmigrated`."""
    dsn = settings.database_url.get_secret_value()
    service_key = settings.supabase_service_role_key.get_secret_value()
    async with pool_of(dsn) as pool, httpx.AsyncClient(timeout=30) as http:
        storage = StorageClient(settings.storage_url, service_key, http)
        registry = CollectorRegistry()
        url_ttl = int(settings.snapshot_url_ttl)
        builder = Snapshots(pool, storage, registry=registry)
        redis_url = settings.redis_url
        offers: OfferCache = RedisOffers(redis_url.get_secret_value()) if redis_url else PostgresOffers(pool)
        snapshots = KeptSnapshots(
            pool, builder, offers, url_ttl=url_ttl, scope=settings.storage_url, registry=registry
        )
        store = SessionStore(pool)
        template = Template(settings.template_dir, pool, storage)
        metrics = Metrics(registry)

        def on_part(part: str, seconds: float) -> None:
            metrics.provision_seconds.labels(part).observe(seconds)

        installation = await store.installation()
        control = Control(
            settings, store, snapshots, driver, keys,
            installation=installation, template=template, on_part=on_part,
        )  # fmt: skip
        catchup = Catchup(pool, snapshots, storage, inline_limit=settings.inline_limit)
        metrics.last_sweep.set_function(lambda: control.swept_at)
        metrics.watch_keys(keys.problems)
        api = Api(settings, control, store, catchup, snapshots, keys, on_ready=metrics.ready_seconds.observe)
        try:
            routes = [*api.routes(), *operations.routes(pool, metrics)]
            job = SnapshotJob(
                dsn, pool, builder, storage, url_ttl=url_ttl, turns=Turns(pool, registry=registry)
            )
            yield Service(routes, control, job, store, metrics, pool, installation)
        finally:
            await control.close()
            await driver.close()
            await offers.close()


class Dated:
    """ASGI: every answer says the second it was made in. Agents measure their clocks against it, and uvicorn's own
    `Date` is made ten ticks apart: up to a second too old on top of its resolution.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = formatdate(usegmt=True).encode()
                message = {**message, "headers": [*message.get("headers", ()), (b"date", date)]}
            await send(message)

        await self._app(scope, receive, dated)


class Server(uvicorn.Server):
    """uvicorn with an honest `Date` and without signal handlers: whoever runs it stops it, by `should_exit`."""

    def __init__(self, config: uvicorn.Config) -> None:
        config.app = Dated(config.app)
        config.date_header = False
        super().__init__(config)

    def capture_signals(self) -> Any:
        return nullcontext()


def configure_logs(level: str, form: str, redactor: Redactor) -> None:
    """Structured logs to stderr: JSON lines, or for people on a terminal (`form`: json, console, auto).

    Nothing passes by `redactor`, what libraries warn of through the standard module included.
    """
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    # It reports each failed attempt of its own retries; what comes of them is ours to say.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
    before: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[structlog.typing.Processor] = [
        structlog.processors.format_exc_info,
        redactor,
        structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer(),
    ]
    lines = logging.StreamHandler(sys.stderr)
    remove = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    lines.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=[remove, *last])
    )
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    structlog.configure(
        processors=[*before, *last],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,
    )


log = structlog.get_logger("serve")

STOP_GRACE = 10
"""Seconds for requests under way at a stop: above the slowest honest one, `create_wait`."""


CONNECT_TIMEOUT = 10
"""Seconds for the database to be reached at the start; whoever started us starts us again."""

NO_TEMPLATE = "none: new projects stay empty; TEMPLATE_DIR gives them one"


class CannotServe(Exception):
    """Why the service does not start, in one line."""


async def run_serve(settings: Settings) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, then finish what is under way. Raises `CannotServe`."""
    configure_logs(settings.log_level, settings.log_format, Redactor(secrets_of(settings)))
    try:
        keys = keyring_of(settings)
    except (OSError, ValueError) as error:
        raise CannotServe(f"cannot read the JWT keys: {error}") from None
    listener = _listen(settings)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    try:
        dsn = settings.database_url.get_secret_value()
        async with await psycopg.AsyncConnection.connect(dsn, connect_timeout=CONNECT_TIMEOUT):
            pass
        async with control_plane(settings, keys, driver_of(settings)) as service:
            config = uvicorn.Config(
                Measured(application(service.routes), service.metrics),
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=STOP_GRACE,
            )
            server = Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]), name="server")
            sweeping = asyncio.create_task(service.control.run(), name="sweeper")
            building = asyncio.create_task(service.job.run(), name="snapshot job")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            log.info(
                "serving",
                address="{}:{}".format(*listener.getsockname()[:2]),
                template=str(settings.template_dir or NO_TEMPLATE),
            )
            done, _ = await asyncio.wait(
                [serving, sweeping, building, stopping], return_when=asyncio.FIRST_COMPLETED
            )
            server.should_exit = True
            for task in (sweeping, building, stopping):
                task.cancel()
            await asyncio.gather(serving, sweeping, building, stopping, return_exceptions=True)
            if stopping not in done:
                log.error("ended", part=", ".join(task.get_name() for task in done))
                return 1
    except Unmigrated as error:
        raise CannotServe(str(error)) from None
    except psycopg.OperationalError as error:
        raise CannotServe(f"cannot reach the database: {' '.join(str(error).split())}") from None
    finally:
        listener.close()
    return 0


def keyring_of(settings: Settings) -> Keyring:
    """The keys that sign session tokens. Raises `OSError`, `ValueError`."""
    if settings.jwt_keys_file is not None:
        return Keyring.open(settings.jwt_keys_file)
    if settings.supabase_jwt_secret is None:
        raise ValueError("neither SUPABASE_JWT_SECRET nor JWT_KEYS_FILE is set")
    return Keyring.from_secret(settings.supabase_jwt_secret.get_secret_value())


def driver_of(settings: Settings) -> MachineDriver:
    """The machine driver that the settings name. Raises `CannotServe`."""
    match settings.machine_driver:
        case "local":
            return LocalMachines(settings.machines_dir, environment=os.environ)
        case "container":
            try:
                return ContainerMachines(
                    settings.agent_image, cli=settings.container_cli, options=settings.container_options
                )
            except MachineRefused as error:
                raise CannotServe(str(error)) from None
        case "fly":
            assert settings.fly_app is not None
            assert settings.fly_api_token is not None
            http = httpx.AsyncClient()
            token = settings.fly_api_token.get_secret_value()
            writes = Rate(settings.fly_per_second, WRITES.burst)
            api = FlyApi(str(settings.fly_api_url), settings.fly_app, token, http, writes=writes)
            shape = FlyShape(
                settings.fly_app,
                settings.agent_image,
                settings.fly_cpus,
                settings.fly_memory_mb,
                settings.fly_preview_url,
            )
            return FlyMachines(api, shape, http)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Named, so that asyncio sets TCP_NODELAY on what is accepted: an answer in two writes waits 40 ms without it.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise CannotServe(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    return listener


async def run_machines(settings: Settings, say: Callable[[str], None], *, as_json: bool) -> None:
    """List them all. Raises `CannotServe`, `MachineError`, `Unmigrated`, `psycopg.Error`."""
    configure_logs("warning", settings.log_format, Redactor(secrets_of(settings)))
    dsn = settings.database_url.get_secret_value()
    driver = driver_of(settings)
    try:
        # A pool would try again and again to reach a database that is not there.
        async with await psycopg.AsyncConnection.connect(dsn, connect_timeout=CONNECT_TIMEOUT):
            pass
        async with pool_of(dsn, size=1) as pool:
            store = SessionStore(pool)
            installation = await store.installation()
            machines = await driver.list()
            owners = [owner for machine in machines if (owner := owner_of(machine.name)) is not None]
            sessions = await store.known({owner.session_id for owner in owners})
    finally:
        await driver.close()
    found = [judged(machine, installation, sessions) for machine in machines]
    for each in sorted(found, key=lambda each: (each.whose, each.machine_id)):
        line = f"{each.machine_id}  {each.state:<8}  {each.whose:<9}  {each.detail}"
        say(json.dumps(asdict(each)) if as_json else line)
    if not found and not as_json:
        say("no machines")
