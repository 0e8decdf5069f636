"""Examines Supabase's services: the keys that sign for them, Realtime as agents meet it, Storage as `serve` uses it."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, Final
from uuid import uuid4

import httpx
import websockets
from websockets.asyncio.client import connect

from orchestrator_stub.config import Settings
from orchestrator_stub.doctor.findings import Report
from orchestrator_stub.platform.storage import StorageClient, StorageFailure
from orchestrator_stub.platform.tokens import CannotSign, Keyring, TokenRejected, mint_session

SECONDS: Final = 8.0
"""For one answer of a service."""

BUCKET: Final = "project-snapshots"

FRAME_LIMIT: Final = 1 << 20
"""Bytes. A reply to a join has some hundred."""

TOKEN_SECONDS: Final = 60.0


async def examine_keys(settings: Settings, keys: Keyring, http: httpx.AsyncClient, report: Report) -> None:
    """Examine what signs session tokens, and whether the project knows it."""
    signer = keys.signer()
    if signer is None:
        report.bad(
            "no key of the set is private, so nothing can be signed",
            "put the private key first in JWT_KEYS_FILE",
        )
        return
    problems = keys.problems()
    report.ok(f"{_named(signer.kid, signer.algorithm)} signs; {len(keys.known())} verify")
    if problems["skipped"]:
        report.warn(
            f"{problems['skipped']} keys of the set cannot be used",
            "its log says which: preview-orchestrator serve",
        )
    if problems["named_twice"]:
        report.warn("several keys of the set have one name", "give each a kid of its own")
    if settings.supabase_jwt_secret is not None and settings.jwt_keys_file is None:
        for name, key in (
            ("SUPABASE_ANON_KEY", settings.supabase_anon_key.get_secret_value()),
            ("SUPABASE_SERVICE_ROLE_KEY", settings.supabase_service_role_key.get_secret_value()),
        ):
            _belongs(keys, name, key, report)
    elif signer.algorithm == "ES256":
        await _published(settings, signer.kid, http, report)


def _belongs(keys: Keyring, name: str, key: str, report: Report) -> None:
    """A key of the older kind is a token that the project's secret signed."""
    if key.count(".") != 2:
        return
    try:
        keys.verify(key)
    except TokenRejected as error:
        if error.reason in ("signature", "key"):
            report.bad(
                f"{name} was not signed with SUPABASE_JWT_SECRET",
                "take both from the same project: Settings, API and JWT keys",
            )


async def _published(settings: Settings, kid: str | None, http: httpx.AsyncClient, report: Report) -> None:
    url = str(settings.supabase_url).rstrip("/") + "/auth/v1/.well-known/jwks.json"
    try:
        answer = await http.get(url, timeout=SECONDS)
        listed = answer.json()["keys"] if answer.status_code == 200 else None
        known = {key.get("kid") for key in listed} if listed is not None else None
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
        known = None
    if known is None:
        report.skip("the keys that the project publishes cannot be read", url)
    elif kid not in known:
        report.bad(
            f"the project does not publish {_named(kid, 'ES256')}: Realtime refuses what it signs",
            "import it first (Authentication, JWT keys), then put it first in JWT_KEYS_FILE",
        )
    else:
        report.ok("the project publishes it")


async def examine_realtime(settings: Settings, keys: Keyring, report: Report) -> None:
    """Join a channel as an agent does, of a project that does not exist, with a token of the kind that agents get."""
    project = uuid4()
    try:
        token = mint_session(
            keys, project_id=project, session_id=uuid4(), generation=1, role=settings.token_role,
            now=time.time(), ttl=TOKEN_SECONDS,
        )  # fmt: skip
    except CannotSign:
        report.skip("nothing signs a token to join with")
        return
    url = (
        f"{settings.realtime_url}/websocket?apikey={settings.supabase_anon_key.get_secret_value()}&vsn=2.0.0"
    )
    topic = f"realtime:project:{project}"
    try:
        async with connect(url, open_timeout=SECONDS, close_timeout=1, max_size=FRAME_LIMIT) as socket:
            refused = await _join(socket, topic, token)
            if refused is not None:
                report.bad(
                    f"an agent cannot join its channel: {refused}", _remedy_of(refused, settings.token_role)
                )
                return
            report.ok(f"an agent joins its channel as {settings.token_role}")
    except websockets.InvalidStatus as error:
        report.bad(
            f"Realtime answers the handshake with HTTP {error.response.status_code}",
            "see SUPABASE_URL and SUPABASE_ANON_KEY: both of one project, and the project awake",
        )
    except TimeoutError:
        report.bad(
            f"Realtime did not answer within {SECONDS:g} s",
            "see whether this network lets websockets through",
        )
    except (OSError, websockets.WebSocketException) as error:
        report.bad(
            f"Realtime cannot be reached: {type(error).__name__}",
            "see SUPABASE_URL, and the network from here",
        )


async def _join(socket: Any, topic: str, token: str) -> str | None:
    """Why the join was refused; None when it was not. Raises as the socket does, and `TimeoutError`."""
    ref = str(uuid4())
    config = {
        "broadcast": {"self": False},
        "presence": {"enabled": False},
        "private": True,
        "postgres_changes": [],
    }
    await socket.send(json.dumps([ref, ref, topic, "phx_join", {"config": config, "access_token": token}]))
    async with asyncio.timeout(SECONDS):
        while True:
            frame = json.loads(await socket.recv(decode=True))
            if isinstance(frame, list) and len(frame) == 5 and frame[1] == ref and frame[3] == "phx_reply":
                break
    reply = frame[4] if isinstance(frame[4], dict) else {}
    if reply.get("status") == "ok":
        return None
    response = reply.get("response")
    return str(response.get("reason", response) if isinstance(response, dict) else response)[:200]


def _remedy_of(reason: str, role: str) -> str:
    lower = reason.lower()
    if "signature" in lower or "jwt" in lower or "token" in lower:
        return "SUPABASE_JWT_SECRET or JWT_KEYS_FILE is not of this project, or not published there yet"
    if "role" in lower:
        return f"grant {role} to authenticator; or TOKEN_ROLE=authenticated"
    return f"apply the migrations to this project's database; if they are: TOKEN_ROLE=authenticated instead of {role}"


async def examine_storage(settings: Settings, http: httpx.AsyncClient, report: Report) -> None:
    """Store, sign, fetch and remove an object of a few bytes, as a snapshot is."""
    storage = StorageClient(
        settings.storage_url,
        settings.supabase_service_role_key.get_secret_value(),
        http,
        object_limit=settings.storage_object_limit,
    )
    path, content = f"doctor/{uuid4()}", b"preview-sync"
    try:
        await storage.upload(BUCKET, path, content, len(content))
        signed = await storage.sign(BUCKET, path, 60)
        fetched = await http.get(signed, timeout=SECONDS)
        await storage.delete(BUCKET, [path])
    except StorageFailure as error:
        report.bad(f"Storage: {error}", _storage_remedy(error))
        return
    except httpx.HTTPError as error:
        report.bad(
            f"a signed URL cannot be fetched: {type(error).__name__}",
            "see SUPABASE_URL, and the network from here",
        )
        return
    if fetched.content != content:
        report.bad(
            f"a signed URL answers HTTP {fetched.status_code} with something else",
            "see what stands before Storage: a proxy or a cache must pass it through",
        )
        return
    report.ok("an object is stored, signed, fetched and removed")


def _storage_remedy(error: StorageFailure) -> str:
    if error.missing:
        return "preview-orchestrator migrate makes the buckets; SUPABASE_URL may be another project's"
    if error.transient:
        return "see SUPABASE_URL, and whether the project is awake"
    return "see SUPABASE_SERVICE_ROLE_KEY: the secret key of the project of SUPABASE_URL"


def _named(kid: str | None, algorithm: str) -> str:
    return f"{algorithm} key {kid}" if kid else f"the {algorithm} secret"
