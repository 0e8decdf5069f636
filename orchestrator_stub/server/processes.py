"""Runs the processes that serve until they are told to stop: the control plane, the door, the relay.

`run_serve` is `preview-orchestrator serve`, `run_door` and `run_relay` the two alone; `run_machines` lists machines.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict

import psycopg
import structlog
import uvicorn
from prometheus_client import CollectorRegistry, start_http_server
from starlette.types import ASGIApp

from orchestrator_stub.config import DoorSettings, ProcessSettings, RelaySettings, Settings
from orchestrator_stub.http.application import application
from orchestrator_stub.http.operations import Measured
from orchestrator_stub.machines.driver import owner_of
from orchestrator_stub.platform.database import pool_of, reached
from orchestrator_stub.platform.redaction import Redactor, secrets_of
from orchestrator_stub.process import (
    BoundedHttp,
    CannotServe,
    Server,
    configure_logs,
    listen,
    stop_event,
    unless_stopped,
)
from orchestrator_stub.relay.service import relay_of
from orchestrator_stub.server.control_plane import control_plane, door_of, driver_of, keyring_of, nats_keys_of
from orchestrator_stub.sessions.inventory import age_of, describe
from orchestrator_stub.sessions.store import SessionStore, Unmigrated
from orchestrator_stub.shards.misdirected import Misdirected
from orchestrator_stub.shards.placement import shards_of

log = structlog.get_logger("serve")

STOP_GRACE = 10
"""Seconds for requests under way at a stop: above the slowest honest one, `create_wait`."""

DOOR_POOL = 4
"""Connections of a door to the database: one query a second, and one for each name that is new."""

NO_TEMPLATE = "none: new projects stay empty; TEMPLATE_DIR gives them one"


def placed(app: ASGIApp, settings: Settings) -> ASGIApp:
    """`app` for the projects of this database, where there are several. Raises `CannotServe`."""
    try:
        shards = shards_of(settings.shards, settings.agent_facing_url)
    except ValueError as error:
        raise CannotServe(str(error)) from None
    if shards is None:
        return app
    return Misdirected(app, shards, origins=settings.cors_origins, body_limit=settings.body_limit)


async def run_serve(settings: Settings) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP, then finish what is under way. Raises `CannotServe`."""
    configure_logs(settings.log_level, settings.log_format, Redactor(secrets_of(settings)))
    try:
        keys = keyring_of(settings)
    except (OSError, ValueError) as error:
        raise CannotServe(f"cannot read the JWT keys: {error}") from None
    listener = _listen(settings.host, settings.port)
    door_listener = _listen(settings.door_host, settings.door_port) if settings.preview_domain else None
    stop = stop_event()
    try:
        if not await _database_reached(settings, stop):
            return 0
        async with control_plane(settings, keys, driver_of(settings)) as service:
            config = uvicorn.Config(
                Measured(placed(application(service.routes), settings), service.metrics),
                http=BoundedHttp,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=STOP_GRACE,
            )
            server = Server(config)
            serving = asyncio.create_task(server.serve(sockets=[listener]), name="server")
            sweeping = asyncio.create_task(service.controller.run(), name="sweeper")
            building = asyncio.create_task(service.worker.run(), name="snapshot worker")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            log.info(
                "serving",
                address="{}:{}".format(*listener.getsockname()[:2]),
                template=str(settings.template_dir or NO_TEMPLATE),
            )
            tasks = [sweeping, building, stopping]
            if door_listener is not None:
                door = door_of(
                    settings, service.pool, service.metrics.registry, controller=service.controller
                )
                tasks.append(asyncio.create_task(door.run(door_listener), name="door"))
            if service.relay is not None:
                tasks.append(asyncio.create_task(service.relay.run(), name="relay"))
            done, _ = await asyncio.wait([serving, *tasks], return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            for task in tasks:
                task.cancel()
            await asyncio.gather(serving, *tasks, return_exceptions=True)
            if stopping not in done:
                log.error("ended", part=", ".join(task.get_name() for task in done))
                return 1
    except Unmigrated as error:
        raise CannotServe(str(error)) from None
    except psycopg.OperationalError as error:
        raise _no_database(error) from None
    finally:
        listener.close()
        if door_listener is not None:
            door_listener.close()
    return 0


async def run_door(settings: DoorSettings) -> int:
    """Serve the door alone until SIGTERM, SIGINT or SIGHUP, then end what is open. Raises `CannotServe`."""
    secrets = (settings.database_url, settings.door_keys)
    configure_logs(
        settings.log_level, settings.log_format, Redactor([s.get_secret_value() for s in secrets if s])
    )
    listener = _listen(settings.door_host, settings.door_port)
    stop = stop_event()
    try:
        if not await _database_reached(settings, stop):
            return 0
        async with pool_of(settings.database_url.get_secret_value(), size=DOOR_POOL) as pool:
            registry = CollectorRegistry()
            if settings.door_metrics_port is not None:
                start_http_server(settings.door_metrics_port, settings.door_host, registry)
            door = asyncio.create_task(door_of(settings, pool, registry).run(listener), name="door")
            stopping = asyncio.create_task(stop.wait(), name="stop")
            log.info("door.open", address="{}:{}".format(*listener.getsockname()[:2]))
            done, _ = await asyncio.wait([door, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in (door, stopping):
                task.cancel()
            ended = await asyncio.gather(door, stopping, return_exceptions=True)
            if stopping not in done:
                log.error("ended", part="door", reason=repr(ended[0]))
                return 1
    except psycopg.OperationalError as error:
        raise _no_database(error) from None
    finally:
        listener.close()
    return 0


async def run_relay(settings: RelaySettings) -> int:
    """Relay events to NATS until SIGTERM, SIGINT or SIGHUP. Raises `CannotServe`."""
    configure_logs(
        settings.log_level, settings.log_format, Redactor([settings.database_url.get_secret_value()])
    )
    registry = CollectorRegistry()
    relay = relay_of(settings, nats_keys_of(settings), registry)
    assert relay is not None, "the settings require NATS_URL"
    stop = stop_event()
    if settings.relay_metrics_port is not None:
        start_http_server(settings.relay_metrics_port, "127.0.0.1", registry)
    if not await _database_reached(settings, stop):
        return 0
    tasks = [
        asyncio.create_task(relay.run(), name="relay"), asyncio.create_task(stop.wait(), name="stop")
    ]  # fmt: skip
    log.info("relaying", nats=settings.nats_url)
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    if not stop.is_set():
        log.error("ended", part="relay", reason=repr(ended[0]))
        return 1
    return 0


async def _database_reached(settings: ProcessSettings, stop: asyncio.Event) -> bool:
    """Wait for the database as the settings say; False when a stop came first. Raises `CannotServe`."""
    dsn = settings.database_url.get_secret_value()
    try:
        await unless_stopped(stop, reached(dsn, wait=settings.database_wait))
    except psycopg.OperationalError as error:
        raise _no_database(error) from None
    return not stop.is_set()


def _no_database(error: psycopg.OperationalError) -> CannotServe:
    return CannotServe(f"cannot reach the database: {' '.join(str(error).split())}")


def _listen(host: str, port: int) -> socket.socket:
    """As `listen`. Raises `CannotServe`."""
    try:
        return listen(host, port)
    except OSError as error:
        raise CannotServe(f"cannot listen on {host}:{port}: {error.strerror}") from None


async def run_machines(settings: Settings, say: Callable[[str], None], *, as_json: bool) -> None:
    """Print every machine of the platform and whose it is.

    Raises `CannotServe`, `MachineError`, `Unmigrated`, `psycopg.Error`.
    """
    configure_logs("warning", settings.log_format, Redactor(secrets_of(settings)))
    dsn = settings.database_url.get_secret_value()
    driver = driver_of(settings)
    try:
        # A pool would retry for ever when there is no database.
        await reached(dsn, wait=0)
        async with pool_of(dsn, size=1) as pool:
            store = SessionStore(pool)
            installation = await store.installation()
            machines = await driver.list()
            owners = [owner for machine in machines if (owner := owner_of(machine.name)) is not None]
            sessions = await store.known({owner.session_id for owner in owners})
    finally:
        await driver.close()
    found = [describe(machine, installation, sessions, time.time()) for machine in machines]
    for each in sorted(found, key=lambda each: (each.whose, each.machine_id)):
        age = age_of(each.age_seconds)
        line = f"{each.machine_id}  {each.state:<8}  {age:<6}  {each.whose:<9}  {each.detail}"
        say(json.dumps(asdict(each)) if as_json else line)
    if not found and not as_json:
        say("no machines")
