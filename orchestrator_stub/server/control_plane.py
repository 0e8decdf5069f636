"""Puts one control plane together, for `serve` and `dev` both: pool, storage, snapshots, sessions and routes.

Beside it, what single settings name: keys, the machine driver, the door, how machines reach NATS.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import httpx
import structlog
from prometheus_client import CollectorRegistry
from starlette.routing import BaseRoute

from orchestrator_stub.config import DoorSettings, RelaySettings, Settings
from orchestrator_stub.door.decision import Address, Behind
from orchestrator_stub.door.passes import Passes, door_keys
from orchestrator_stub.door.service import Door
from orchestrator_stub.door.store import Access, DoorStore
from orchestrator_stub.http import operations
from orchestrator_stub.http.operations import Metrics
from orchestrator_stub.http.requests import Requests, RouteGroup
from orchestrator_stub.http.routes.agents import AgentRoutes
from orchestrator_stub.http.routes.door import DoorRoutes
from orchestrator_stub.http.routes.modules import ModuleRoutes
from orchestrator_stub.http.routes.run import RunRoutes
from orchestrator_stub.http.routes.sessions import SessionRoutes
from orchestrator_stub.http.routes.shown import ShownRoutes
from orchestrator_stub.http.routes.sleep import SleepRoutes
from orchestrator_stub.machines.container import ContainerMachines
from orchestrator_stub.machines.driver import Installation, MachineDriver, MachineRefused
from orchestrator_stub.machines.fly import FlyMachines, FlyShape
from orchestrator_stub.machines.fly_api import WRITES, FlyApi, Rate
from orchestrator_stub.machines.fly_apps import FlyApps
from orchestrator_stub.machines.local import LocalMachines
from orchestrator_stub.modules.layers import ModuleLayers
from orchestrator_stub.modules.upkeep import ModuleUpkeep, kept_of
from orchestrator_stub.platform.database import Pool, pool_of
from orchestrator_stub.platform.limits import differences, limits_of
from orchestrator_stub.platform.sealing import SealingKeys
from orchestrator_stub.platform.storage import StorageClient
from orchestrator_stub.platform.tokens import Keyring
from orchestrator_stub.process import CannotServe
from orchestrator_stub.relay.accounts import MachineNats, NatsKeys
from orchestrator_stub.relay.service import Relay, relay_of
from orchestrator_stub.rooms.routes import RoomRoutes, kept, rooms_of
from orchestrator_stub.sessions.catchup import Catchup
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.run_settings import RunSettings
from orchestrator_stub.sessions.shown import Screens
from orchestrator_stub.sessions.store import SessionStore, Unmigrated
from orchestrator_stub.sessions.template import Template
from orchestrator_stub.snapshots.allowance import Allowance
from orchestrator_stub.snapshots.builder import SnapshotBuilder
from orchestrator_stub.snapshots.cache import CacheStore, PostgresCacheStore, RedisCacheStore, SnapshotCache
from orchestrator_stub.snapshots.turns import Turns
from orchestrator_stub.snapshots.upkeep import Upkeep
from orchestrator_stub.snapshots.worker import SnapshotWorker
from orchestrator_stub.write_back.changes import Offers
from orchestrator_stub.write_back.routes import WriteBackRoutes, WriteTokens
from orchestrator_stub.write_back.tokens import write_keys
from orchestrator_stub.write_back.upkeep import KeptUpkeep

log = structlog.get_logger("serve")


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """The parts of a running control plane that the process around it needs."""

    routes: list[BaseRoute]
    controller: SessionController
    worker: SnapshotWorker
    store: SessionStore
    metrics: Metrics
    pool: Pool
    installation: Installation
    access: Access | None
    relay: Relay | None


@asynccontextmanager
async def control_plane(
    settings: Settings, keys: Keyring, driver: MachineDriver
) -> AsyncIterator[ControlPlane]:
    """Everything but the socket and the background tasks (`controller`, `worker`, `relay`), which are the caller's.

    Raises `psycopg.OperationalError` without a database, `Unmigrated`, `CannotServe`.
    """
    dsn = settings.database_url.get_secret_value()
    service_key = settings.supabase_service_role_key.get_secret_value()
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    async with AsyncExitStack() as ends:
        ends.push_async_callback(driver.close)
        pool = await ends.enter_async_context(pool_of(dsn))
        http = await ends.enter_async_context(httpx.AsyncClient(timeout=30))
        store = SessionStore(pool)
        installation = await store.installation()
        await _check_limits(pool)
        limit = settings.storage_object_limit
        storage = StorageClient(settings.storage_url, service_key, http, object_limit=limit)
        builder = SnapshotBuilder(pool, storage, registry=registry)
        snapshots = await ends.enter_async_context(_snapshots(settings, pool, builder, registry))
        access = access_of(settings, pool)
        runs = RunSettings(pool, sealing_keys_of(settings), access)
        layers = ModuleLayers(pool, storage, kept_of(settings), url_ttl=int(settings.snapshot_url_ttl))
        controller = SessionController(
            settings, store, snapshots, driver, keys, runs=runs, installation=installation, layers=layers,
            template=Template(settings.template_dir, pool, storage), nats=machine_nats_of(settings),
            on_part=metrics.part_took, on_suspend=metrics.suspends.inc,
        )  # fmt: skip
        ends.push_async_callback(controller.close)
        metrics.last_sweep.set_function(lambda: controller.swept_at)
        metrics.watch_keys(keys.problems)
        screens = await ends.enter_async_context(_screens(dsn, store))
        rooms = await ends.enter_async_context(kept(rooms_of(settings, pool, registry)))
        requests, for_writing = Requests(settings, store, keys), write_keys(service_key)
        groups: list[RouteGroup] = [
            SessionRoutes(requests, settings, controller, store, snapshots, runs, screens),
            ShownRoutes(requests, store, screens),
            SleepRoutes(requests, controller.sleep),
            RunRoutes(requests, settings, runs),
            DoorRoutes(requests, access),
            RoomRoutes(requests, rooms),
            AgentRoutes(
                requests, settings, controller, store,
                Catchup(pool, snapshots, storage, inline_limit=settings.inline_limit), screens,
                more_tokens=[WriteTokens(runs, for_writing).of],
                on_ready=metrics.ready_seconds.observe, on_wake=metrics.wakes_seconds.observe,
            ),
            ModuleRoutes(requests, layers),
            WriteBackRoutes(
                requests, store, Offers(pool, frozenset(settings.write_back_registries.split())),
                for_writing, registry=registry,
            ),
        ]  # fmt: skip
        routes = [route for group in groups for route in group.routes()] + operations.routes(pool, metrics)
        worker = _worker(settings, pool, builder, storage, registry)
        yield ControlPlane(
            routes, controller, worker, store, metrics, pool, installation, access,
            relay=relay_of(settings, nats_keys_of(settings), registry),
        )  # fmt: skip


@asynccontextmanager
async def _snapshots(
    settings: Settings, pool: Pool, builder: SnapshotBuilder, registry: CollectorRegistry
) -> AsyncIterator[SnapshotCache]:
    """Signed snapshots, remembered where the settings say."""
    redis_url = settings.redis_url
    cache: CacheStore = (
        RedisCacheStore(redis_url.get_secret_value()) if redis_url else PostgresCacheStore(pool)
    )
    try:
        yield SnapshotCache(
            pool, builder, cache, url_ttl=int(settings.snapshot_url_ttl), scope=settings.storage_url,
            registry=registry, allowance=Allowance(pool, settings.session_stored_bytes),
            since_bytes=settings.inline_limit // 4,
        )  # fmt: skip
    finally:
        await cache.close()


@asynccontextmanager
async def _screens(dsn: str, store: SessionStore) -> AsyncIterator[Screens]:
    """What is on the screens, and who waits for it, while the block runs."""
    screens = Screens(dsn, store)
    waking = asyncio.create_task(screens.run(), name="screens")
    try:
        yield screens
    finally:
        waking.cancel()
        await asyncio.gather(waking, return_exceptions=True)
        await screens.close()


def _worker(
    settings: Settings,
    pool: Pool,
    builder: SnapshotBuilder,
    storage: StorageClient,
    registry: CollectorRegistry,
) -> SnapshotWorker:
    """What builds snapshots in the background, and clears away what nobody needs."""
    return SnapshotWorker(
        settings.database_url.get_secret_value(), pool, builder, storage,
        url_ttl=int(settings.snapshot_url_ttl), turns=Turns(pool, registry=registry),
        upkeep=Upkeep(pool, storage, registry=registry),
        also=[ModuleUpkeep(pool, storage, kept_of(settings), registry=registry), KeptUpkeep(pool)],
    )  # fmt: skip


async def _check_limits(pool: Pool) -> None:
    """Log where the database's limits are not the agents'. Raises `Unmigrated`: it has none of this release's."""
    limits = await limits_of(pool)
    if "project.files" not in limits:
        raise Unmigrated(
            "the database lacks migrations of this release; run `preview-orchestrator migrate` first"
        )
    for sentence in differences(limits):
        log.warning("limits.differ", detail=sentence)


def keyring_of(settings: Settings) -> Keyring:
    """The keys that sign session tokens. Raises `OSError`, `ValueError`."""
    if settings.jwt_keys_file is not None:
        return Keyring.open(settings.jwt_keys_file)
    if settings.supabase_jwt_secret is None:
        raise ValueError("neither SUPABASE_JWT_SECRET nor JWT_KEYS_FILE is set")
    return Keyring.from_secret(settings.supabase_jwt_secret.get_secret_value())


def sealing_keys_of(settings: Settings) -> SealingKeys:
    """The keys that run settings are encrypted with. Raises `CannotServe`."""
    keys = settings.run_settings_keys
    try:
        return SealingKeys.read(keys.get_secret_value() if keys else "")
    except ValueError as error:
        raise CannotServe(f"RUN_SETTINGS_KEYS: {error}") from None


def nats_keys_of(settings: RelaySettings) -> NatsKeys | None:
    """What tokens for NATS are signed with; None without NATS. Raises `CannotServe`."""
    if settings.nats_keys_file is None:
        return None
    try:
        return NatsKeys.read(settings.nats_keys_file)
    except (OSError, ValueError) as error:
        raise CannotServe(f"NATS_KEYS_FILE: cannot read {settings.nats_keys_file}: {error}") from None


def machine_nats_of(settings: Settings) -> MachineNats | None:
    """How machines reach NATS; None: they do not. Raises `CannotServe`."""
    keys, url = nats_keys_of(settings), settings.nats_url_of_agents
    return MachineNats(keys, url, settings.agent_transport) if keys and url else None


def door_keyring(settings: DoorSettings) -> Keyring:
    """The keys that codes and cookies of the door are signed with. Raises `CannotServe`."""
    keys = settings.door_keys
    try:
        return door_keys(keys.get_secret_value() if keys else "")
    except ValueError as error:
        raise CannotServe(f"DOOR_KEYS: {error}") from None


def access_of(settings: Settings, pool: Pool) -> Access | None:
    """What lets people in; None without a door. Raises `CannotServe`."""
    if settings.preview_domain is None:
        return None
    passes = Passes(door_keyring(settings), time.time)
    return Access(DoorStore(pool), passes, Address(settings.preview_domain))


def door_of(
    settings: DoorSettings,
    pool: Pool,
    metrics: CollectorRegistry,
    address: Address | None = None,
    *,
    controller: SessionController | None = None,
) -> Door:
    """The door that the settings name; `controller` wakes what sleeps behind it. Raises `CannotServe`."""

    async def wake(session: Behind) -> None:
        assert controller is not None
        controller.sleep.wake_soon(session.session_id)

    assert settings.preview_domain is not None
    return Door(
        DoorStore(pool), settings.database_url.get_secret_value(), door_keyring(settings),
        address or Address(settings.preview_domain), metrics=metrics, replay=settings.door_replay,
        wake=wake if controller else None,
    )  # fmt: skip


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
            http = httpx.AsyncClient()
            apps = {app: _fly_app(settings, app, http) for app in settings.fly_app}
            return FlyApps(apps) if len(apps) > 1 else next(iter(apps.values()))


def _fly_app(settings: Settings, app: str, http: httpx.AsyncClient) -> FlyMachines:
    assert settings.fly_api_token is not None
    token = settings.fly_api_token.get_secret_value()
    writes = Rate(settings.fly_per_second, WRITES.burst)
    shape = FlyShape(
        app, settings.agent_image, settings.fly_cpus, settings.fly_memory_mb, settings.fly_preview_url,
        # Whoever names a public address of the machines has a proxy of their own in front of them.
        services=settings.door_replay is not None or settings.fly_preview_url.startswith("https:"),
    )  # fmt: skip
    return FlyMachines(FlyApi(str(settings.fly_api_url), app, token, http, writes=writes), shape, http)
