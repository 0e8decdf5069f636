"""A control plane to be tested: a real database, a machine platform in memory, any number of orchestrators."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast
from uuid import UUID, uuid4

import httpx

from orchestrator_stub.config import Settings
from orchestrator_stub.door.decision import Address
from orchestrator_stub.door.passes import Passes, door_keys
from orchestrator_stub.door.store import Access, DoorStore
from orchestrator_stub.http.application import application
from orchestrator_stub.http.requests import Requests, RouteGroup
from orchestrator_stub.http.routes.agents import AgentRoutes
from orchestrator_stub.http.routes.door import DoorRoutes
from orchestrator_stub.http.routes.modules import ModuleRoutes
from orchestrator_stub.http.routes.run import RunRoutes
from orchestrator_stub.http.routes.sessions import SessionRoutes
from orchestrator_stub.http.routes.shown import ShownRoutes
from orchestrator_stub.http.routes.sleep import SleepRoutes
from orchestrator_stub.machines.driver import Installation, machine_name
from orchestrator_stub.modules.layers import ModuleLayers
from orchestrator_stub.modules.upkeep import kept_of
from orchestrator_stub.platform.database import Pool, pool_of
from orchestrator_stub.platform.sealing import SealingKeys
from orchestrator_stub.platform.storage import StorageClient
from orchestrator_stub.platform.tokens import Keyring, mint_session, new_es256, new_hs256
from orchestrator_stub.rooms.routes import RoomRoutes, rooms_of
from orchestrator_stub.sessions.catchup import Catchup
from orchestrator_stub.sessions.controller import SessionController
from orchestrator_stub.sessions.run_settings import RunSettings
from orchestrator_stub.sessions.shown import Screens
from orchestrator_stub.sessions.store import SessionStore
from orchestrator_stub.snapshots.model import SignedSnapshot, SnapshotUnavailable
from orchestrator_stub.write_back.changes import Offers
from orchestrator_stub.write_back.routes import WriteBackRoutes, WriteTokens
from orchestrator_stub.write_back.tokens import mint_write, write_keys
from tests.fakes.machines import FakeMachines, Platform

SERVICE_KEY = "sb_secret_the-service-key-of-the-tests"
WRITE_KEYS = write_keys(SERVICE_KEY)


class PaperSnapshots:
    """Offers that say what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int | None, bool]] = []
        self.resigned = 0
        self.broken = False

    async def signed_snapshot(
        self,
        project_id: UUID,
        *,
        base_revision: int | None = None,
        rebuild: bool = False,
        resign: bool = False,
        payer: UUID | None = None,
        earlier: bool = False,
    ) -> SignedSnapshot:
        if self.broken:
            raise SnapshotUnavailable("the storage is away")
        self.asked.append((base_revision, rebuild))
        self.resigned += resign
        return SignedSnapshot(
            f"https://storage.invalid/{project_id}.zip?token=t", {"files": [], "revision": 1}
        )


class PaperAssets:
    """Binary files by path."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    async def download(self, bucket: str, path: str) -> bytes:
        return self.objects[f"{bucket}/{path}"]


class PaperStorage:
    """Signs whatever it is asked to; nothing is ever stored."""

    async def sign(self, bucket: str, path: str, expires_in: int) -> str:
        return f"https://storage.invalid/{bucket}/{path}?token=t"

    async def sign_upload(self, bucket: str, path: str) -> str:
        return f"https://storage.invalid/upload/{bucket}/{path}?token=t"


@dataclass
class World:
    """Everything outside of the orchestrators, and one orchestrator's parts."""

    settings: Settings
    pool: Pool
    keys: Keyring
    platform: Platform
    snapshots: PaperSnapshots
    assets: PaperAssets
    store: SessionStore
    controller: SessionController
    http: httpx.AsyncClient
    installation: Installation
    screens: Screens

    async def sql(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        async with self.pool.connection() as connection:
            cursor = await connection.execute(query.encode(), values)
            return await cursor.fetchall() if cursor.description else []

    async def user(self) -> UUID:
        """A new user."""
        user_id = uuid4()
        await self.sql("insert into auth.users (id) values (%s)", user_id)
        await self.sql("insert into public.user_profiles (id) values (%s)", user_id)
        return user_id

    async def project(self, owner: UUID | None = None) -> UUID:
        """A new, empty project."""
        rows = await self.sql(
            "insert into public.projects (owner_id) values (%s) returning id", owner or await self.user()
        )
        return UUID(str(rows[0][0]))

    async def write(self, project_id: UUID, path: str, content: str) -> int:
        """One save; its revision."""
        rows = await self.sql("select public.upsert_project_file(%s, %s, %s)", project_id, path, content)
        return int(rows[0][0]["revision"])

    async def pass_time(self, seconds: float) -> None:
        """Make everything that is kept `seconds` older: the database's clock is not ours to move."""
        await self.sql(
            "update preview.sessions set created_at = created_at - %(s)s, expires_at = expires_at - %(s)s,"
            " state_since = state_since - %(s)s, claimed_until = claimed_until - %(s)s,"
            " lease_until = lease_until - %(s)s, status_at = status_at - %(s)s, viewed_at = viewed_at - %(s)s".replace(
                "%(s)s", f"interval '{seconds} seconds'"
            )
        )

    @property
    def runs(self) -> RunSettings:
        return RunSettings(self.pool, SEALING)

    def controller_of(self, driver: Any = None, store: Any = None, **settings: Any) -> SessionController:
        """Another orchestrator on the same database and platform, with other settings."""
        return SessionController(
            self.settings.model_copy(update=settings),
            store or self.store,
            self.snapshots,
            driver or FakeMachines(self.platform),
            self.keys,
            runs=self.runs,
            installation=self.installation,
        )

    def name_of(self, session_id: UUID, generation: int = 1) -> str:
        """What the session's machine is called."""
        return machine_name(self.installation.mark, session_id, generation)

    def token(
        self, session: dict[str, Any], *, generation: int | None = None, ttl: float = 600, **other: Any
    ) -> str:
        """A session's token, right unless told otherwise."""
        claims = {
            "project_id": UUID(session["project_id"]),
            "session_id": UUID(session["session_id"]),
            "generation": generation or session["generation"],
            "role": "preview_agent",
            "now": time.time(),
            "ttl": ttl,
            **other,
        }
        return mint_session(self.keys, **claims)

    def user_token(self, user_id: UUID) -> str:
        """What a signed-in user shows."""
        claims = {
            "role": "authenticated",
            "sub": str(user_id),
            "aud": "authenticated",
            "exp": time.time() + 60,
        }
        return self.keys.sign(claims)

    async def create(
        self, project_id: UUID, *, key: str | None = None, generation: int | None = None
    ) -> httpx.Response:
        """`POST /v1/sessions` as the service."""
        headers = bearer(SERVICE_KEY) | ({"Idempotency-Key": key} if key else {})
        body: dict[str, Any] = {"project_id": str(project_id)}
        if generation is not None:
            body["generation"] = generation
        return await self.http.post("/v1/sessions", json=body, headers=headers)

    async def session(self) -> dict[str, Any]:
        """A session of a new project, as the service is told of it."""
        answer = await self.create(await self.project())
        assert answer.status_code == 201, answer.text
        form: dict[str, Any] = answer.json()
        return form


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def settings_for(dsn: str, **changed: Any) -> Settings:
    return Settings.of(
        {
            "database_url": dsn,
            "supabase_url": "https://project.supabase.invalid",
            "supabase_anon_key": "sb_publishable_tests",
            "supabase_service_role_key": SERVICE_KEY,
            "public_url": "https://orchestrator.invalid",
            "template_dir": None,
            "create_wait": 5,
            **changed,
        }
    )


def in_process(*groups: RouteGroup) -> httpx.ASGITransport:
    """Answers the requests of a client with the routes of `groups`; a bug is a 500, as it is to the world."""
    routes = [route for group in groups for route in group.routes()]
    return httpx.ASGITransport(application(routes), raise_app_exceptions=False)


DOOR_KEYS = "d:" + "A" * 43 + "="

SEALING = SealingKeys({"k1": bytes(32)})
"""What run settings are encrypted with in these tests."""


@asynccontextmanager
async def control_world(
    dsn: str,
    *,
    platform: Platform | None = None,
    on_ready: Callable[[float], None] = lambda seconds: None,
    **changed: Any,
) -> AsyncIterator[World]:
    """One orchestrator over the database at `dsn` and `platform`, or one of its own, answering in process."""
    settings = settings_for(dsn, **changed)
    keys = Keyring.from_jwks({"keys": [new_es256("e1"), new_hs256("h1")]})
    platform, snapshots, assets = platform or Platform(), PaperSnapshots(), PaperAssets()
    async with pool_of(dsn, size=6, timeout=5) as pool:
        store = SessionStore(pool)
        installation = await store.installation()
        controller = SessionController(
            settings,
            store,
            snapshots,
            FakeMachines(platform),
            keys,
            runs=RunSettings(pool, SEALING),
            installation=installation,
        )
        catchup = Catchup(pool, snapshots, assets, inline_limit=settings.inline_limit)
        screens = Screens(dsn, store)
        waking = asyncio.create_task(screens.run())
        runs = RunSettings(pool, SEALING)
        passes = Passes(door_keys(DOOR_KEYS), time.time)
        access = Access(DoorStore(pool), passes, Address("preview.invalid"))
        layers = ModuleLayers(pool, cast("StorageClient", PaperStorage()), kept_of(settings), url_ttl=600)
        requests = Requests(settings, store, keys)
        groups: list[RouteGroup] = [
            SessionRoutes(requests, settings, controller, store, snapshots, runs, screens),
            ShownRoutes(requests, store, screens),
            SleepRoutes(requests, controller.sleep),
            RunRoutes(requests, settings, runs),
            DoorRoutes(requests, access),
            RoomRoutes(requests, rooms_of(settings, pool)),
            AgentRoutes(
                requests, settings, controller, store, catchup, screens,
                more_tokens=[WriteTokens(runs, WRITE_KEYS).of], on_ready=on_ready,
            ),
            ModuleRoutes(requests, layers),
            WriteBackRoutes(requests, store, Offers(pool), WRITE_KEYS),
        ]  # fmt: skip
        transport = in_process(*groups)
        async with httpx.AsyncClient(transport=transport, base_url="https://orchestrator.invalid") as http:
            world = World(
                settings,
                pool,
                keys,
                platform,
                snapshots,
                assets,
                store,
                controller,
                http,
                installation,
                screens,
            )
            try:
                yield world
            finally:
                waking.cancel()
                await screens.close()
                await controller.close()


ROUTES = [
    ("POST", "/v1/sessions"),
    ("GET", "/v1/sessions"),
    ("GET", "/v1/sessions/{id}"),
    ("DELETE", "/v1/sessions/{id}"),
    ("POST", "/v1/sessions/{id}/snapshot"),
    ("POST", "/v1/sessions/{id}/suspend"),
    ("POST", "/v1/sessions/{id}/wake"),
    ("GET", "/v1/sessions/{id}/shown"),
    ("POST", "/v1/projects/{project}/rooms"),
    ("POST", "/v1/sessions/{id}/door"),
    ("POST", "/v1/sessions/{id}/door/revoke"),
    ("GET", "/v1/sessions/{id}/run"),
    ("POST", "/v1/sessions/{id}/modules"),
    ("PUT", "/v1/sessions/{id}/modules"),
    ("POST", "/v1/sessions/{id}/sync"),
    ("POST", "/v1/sessions/{id}/token"),
    ("PUT", "/v1/sessions/{id}/status"),
    ("POST", "/v1/sessions/{id}/changes"),
]
AGENTS = ("run", "modules", "sync", "token", "status", "changes")
"""The last words of the routes that are the agent's; the others are the product's."""


def write_token(session: dict[str, Any], *, now: float | None = None, **changed: Any) -> str:
    """What an offer of the session's machine needs, as the orchestrator mints it."""
    claims = {
        "project_id": UUID(session["project_id"]),
        "session_id": UUID(session["session_id"]),
        "generation": session["generation"],
        "now": time.time() if now is None else now,
    }
    return mint_write(WRITE_KEYS, **{**claims, **changed})


def assert_problem(answer: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["type"] == f"urn:preview-sync:problem:{kind}", body
    assert body["status"] == status
    assert body["detail"]
    return body


def status_report(head: dict[str, Any], **changed: Any) -> dict[str, Any]:
    report = {"state": "serving", "revision": head["revision"], "epoch": head["epoch"], "problems": []}
    return {**report, "dev_server": "ready", "agent_version": "0.1.0", **changed}


async def report(world: World, session: dict[str, Any], token: str, **changed: Any) -> httpx.Response:
    return await world.http.put(
        f"/v1/sessions/{session['session_id']}/status",
        # `json.dumps` writes NaN, as lax clients do; `json=` would not.
        content=json.dumps(status_report({"revision": 0, "epoch": None}, **changed)),
        headers=bearer(token),
    )


async def sync(world: World, session: dict[str, Any], **body: Any) -> httpx.Response:
    return await world.http.post(
        f"/v1/sessions/{session['session_id']}/sync",
        json={"epoch": None, "revision": 0, "reason": "join", **body},
        headers=bearer(world.token(session)),
    )


async def head_of(world: World, session: dict[str, Any]) -> dict[str, Any]:
    answer = await report(world, session, world.token(session))
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body
