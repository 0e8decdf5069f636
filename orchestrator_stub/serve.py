"""`preview-orchestrator serve`: the control plane over hosted parts, until told to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import httpx
import psycopg
import structlog
import uvicorn

from orchestrator_stub.config import Settings
from orchestrator_stub.http.operations import Measured
from orchestrator_stub.http.routes import application
from orchestrator_stub.machines.container import ContainerMachines
from orchestrator_stub.machines.driver import MachineDriver, MachineRefused
from orchestrator_stub.machines.fly import FlyMachines, FlyShape
from orchestrator_stub.machines.fly_api import WRITES, FlyApi, Rate
from orchestrator_stub.machines.local import LocalMachines
from orchestrator_stub.platform.redaction import Redactor, secrets_of
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.server import Server, configure_logs, control_plane
from orchestrator_stub.sessions.store import Unmigrated

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
