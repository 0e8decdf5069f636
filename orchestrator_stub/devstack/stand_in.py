"""Serves the stand-in for Supabase alone: `preview-orchestrator stand-in`, for a deployment on one machine.

The database is any PostgreSQL, as a superuser. It is given what Supabase's has and the migrations, as `dev` does it:
the orchestrator beside it, from the same image, finds the schema that it knows.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

import psycopg
import structlog
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orchestrator_stub.config import StandInSettings
from orchestrator_stub.http.application import application
from orchestrator_stub.local_supabase.app import stand_in
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.realtime.socket import uvicorn_options
from orchestrator_stub.platform.database import AGAIN_SECONDS, reached
from orchestrator_stub.platform.migrations import MigrationError, MigrationRefused, bootstrap, migrate
from orchestrator_stub.platform.redaction import Redactor
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.process import CannotServe, Server, configure_logs, listen, stop_event, unless_stopped

log = structlog.get_logger(__name__)

STOP_GRACE: Final = 2
"""Seconds for requests under way; sockets are told to come again (1012)."""


async def run_stand_in(settings: StandInSettings) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; the exit code. Raises `CannotServe`."""
    dsn = settings.database_url.get_secret_value()
    secret = settings.supabase_jwt_secret.get_secret_value()
    try:
        keys = ProjectKeys.of(Keyring.from_secret(secret))
    except ValueError as error:
        raise CannotServe(f"SUPABASE_JWT_SECRET: {error}") from None
    configure_logs(settings.log_level, settings.log_format, Redactor([secret, dsn]))
    try:
        listener = listen(settings.host, settings.port)
    except OSError as error:
        raise CannotServe(f"cannot listen on {settings.host}:{settings.port}: {error.strerror}") from None
    stop = stop_event()
    applied = await unless_stopped(stop, _prepare(dsn, settings.database_wait))
    if applied is None:
        listener.close()
        return 0
    local = stand_in(dsn, keys, settings.storage_dir)
    config = uvicorn.Config(
        application([Route("/livez", _livez), *local.routes], lifespan=local.lifespan),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=STOP_GRACE,
        **uvicorn_options(),
    )
    server = Server(config)
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="server")
    stopping = asyncio.create_task(stop.wait(), name="stop")
    log.info("serving", address="{}:{}".format(*listener.getsockname()[:2]), migrations_applied=applied)
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    stopping.cancel()
    ended = not stop.is_set()
    await asyncio.gather(serving, stopping, return_exceptions=True)
    return 1 if ended else 0


async def _livez(_: Request) -> Response:
    return JSONResponse({"alive": True})


async def _prepare(dsn: str, wait: float) -> int:
    """Wait for the database and bring its schema up to date; how many migrations that were. Raises `CannotServe`."""
    deadline = time.monotonic() + wait
    while True:
        try:
            await reached(dsn, wait=deadline - time.monotonic())
        except psycopg.OperationalError as error:
            raise CannotServe(f"cannot reach the database: {' '.join(str(error).split())}") from None
        try:
            await bootstrap(dsn)
            return len(await migrate(dsn))
        except psycopg.OperationalError as error:
            # A new one may be stopped once more, when its data directory is made.
            if time.monotonic() > deadline:
                raise CannotServe(f"cannot reach the database: {' '.join(str(error).split())}") from None
        except (MigrationError, MigrationRefused, psycopg.Error) as error:
            raise CannotServe(f"cannot use the database: {' '.join(str(error).split())}") from None
        await asyncio.sleep(AGAIN_SECONDS)
