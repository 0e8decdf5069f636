"""One orchestrator put together: pool, storage, snapshots, sessions, sweeper, routes. `serve` and `dev` both run it."""

from __future__ import annotations

import logging
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any

import httpx
import structlog
import uvicorn
from prometheus_client import CollectorRegistry
from starlette.routing import BaseRoute
from starlette.types import Message, Receive, Scope, Send

from orchestrator_stub.config import Settings
from orchestrator_stub.http import operations
from orchestrator_stub.http.operations import Metrics
from orchestrator_stub.http.routes import Api
from orchestrator_stub.machines.driver import MachineDriver
from orchestrator_stub.platform.database import Pool, pool_of
from orchestrator_stub.platform.redaction import Redactor
from orchestrator_stub.platform.storage import StorageClient
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.sessions.catchup import Catchup
from orchestrator_stub.sessions.controller import Control
from orchestrator_stub.sessions.lifecycle import Installation
from orchestrator_stub.sessions.store import SessionStore
from orchestrator_stub.sessions.template import Template
from orchestrator_stub.snapshots.builder import Snapshots
from orchestrator_stub.snapshots.cache import KeptSnapshots, OfferCache, PostgresOffers, RedisOffers
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
            job = SnapshotJob(dsn, pool, builder, storage, url_ttl=url_ttl)
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
