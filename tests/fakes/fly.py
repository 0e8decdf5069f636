"""A Fly Machines API with a memory: lifecycle, latency, limits, conflicts, capacity errors and lost replies.

It keeps time by the clock it is given and holds every request against Fly's own OpenAPI document, tightened. What it
was asked, and whether its limits were ever exceeded, can be looked at afterwards.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tests.fakes.openapi import OpenApi

TOKEN = "fo1_the-token-of-the-tests"
APP = "previews"
DOCUMENT = Path(__file__).parents[3] / "shared" / "data" / "fly-machines-openapi.json"
"""Fly's document, when it lies beside the checkout; without it requests are not validated."""


@dataclass
class Fly:
    """One Fly app. `start_seconds`: from creation to `started`. `per_second`, `burst`: the limit of each action."""

    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    latency: float = 0.0
    start_seconds: float = 0.0
    per_second: float = 1.0
    burst: int = 3
    name: str = APP
    """The app's."""
    full_is: int = 422
    """The status of a creation for which there is no room."""
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)
    leases: dict[str, tuple[str, float]] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    answers: Counter[int] = field(default_factory=Counter)
    invalid: list[str] = field(default_factory=list)
    script: list[int | str] = field(default_factory=list)
    """What the next requests get instead of an answer: a status, `full`, or `lost` (done, but the reply is lost)."""
    _taken: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    _made: int = 0
    _openapi: OpenApi | None = None

    def __post_init__(self) -> None:
        if DOCUMENT.exists():
            self._openapi = OpenApi(DOCUMENT)

    @property
    def validates(self) -> bool:
        return self._openapi is not None

    def app(self) -> Starlette:
        base = f"/v1/apps/{self.name}/machines"
        one = base + "/{id}"
        routes = {
            ("create", "POST", base): self._create,
            ("list", "GET", base): self._list,
            ("get", "GET", one): self._get,
            ("destroy", "DELETE", one): self._destroy,
            ("start", "POST", one + "/start"): self._start,
            ("stop", "POST", one + "/stop"): self._stop,
            ("suspend", "POST", one + "/suspend"): self._suspend,
            ("wait", "GET", one + "/wait"): self._wait,
            ("lease", "POST", one + "/lease"): self._lease,
            ("release", "DELETE", one + "/lease"): self._release,
            ("metadata", "POST", one + "/metadata/{key}"): self._metadata,
        }
        return Starlette(
            routes=[
                Route(path, self._endpoint(action, answer), methods=[method])
                for (action, method, path), answer in routes.items()
            ]
        )

    def transport(self) -> httpx.AsyncBaseTransport:
        """The way to it in process; a lost reply is a connection that ends without one."""
        return _Losing(httpx.ASGITransport(self.app(), raise_app_exceptions=True))

    def live(self) -> list[dict[str, Any]]:
        return [m for m in self.machines.values() if m["state"] not in ("destroyed", "destroying")]

    def _endpoint(
        self, action: str, answer: Callable[[Request, Any], Awaitable[tuple[int, Any]]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            if self.latency:
                await self.sleep(self.latency)
            status, body = await self._answered(action, answer, request)
            self.answers[status] += 1
            headers = {"x-lost": "1"} if status == 0 else {"retry-after": "1"} if status == 429 else {}
            return Response(orjson.dumps(body), status or 200, headers, "application/json")

        return endpoint

    async def _answered(
        self, action: str, answer: Callable[[Request, Any], Awaitable[tuple[int, Any]]], request: Request
    ) -> tuple[int, Any]:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _error(401, "unauthorized")
        raw = await request.body()
        body = orjson.loads(raw) if raw else None
        if self._openapi is not None:
            path = request.url.path.removeprefix("/v1")
            self.invalid += self._openapi.problems(request.method, path, body, dict(request.query_params))
        machine_id = request.path_params.get("id", self.name)
        self.asked.append((action, machine_id))
        if self._too_often(action, machine_id):
            return _error(429, "rate limit exceeded")
        planned = self.script.pop(0) if self.script else None
        if isinstance(planned, int):
            return _error(planned, "planned")
        if planned == "full" and action == "create":
            return _error(
                self.full_is, "could not reserve resource for machine: insufficient memory available"
            )
        status, said = await answer(request, body)
        return (0, said) if planned == "lost" else (status, said)

    def _too_often(self, action: str, of: str) -> bool:
        """Over any window, more than the burst and what time has given back since."""
        now = self.clock()
        rate, burst = (5.0, 5) if action in ("get", "list") else (self.per_second, self.burst)
        taken = self._taken[action, of]
        taken[:] = [t for t in taken if now - t < burst / rate + 60]
        taken.append(now)
        # Each turn's allowance, checked from every earlier turn on; forgiving a tenth of a second of jitter.
        return any(len(taken) - n > burst + (now - start + 0.1) * rate for n, start in enumerate(taken))

    def _aged(self, machine: dict[str, Any]) -> dict[str, Any]:
        if machine["state"] == "created" and self.clock() - machine["_since"] >= self.start_seconds:
            machine["state"] = "started"
        return {k: v for k, v in machine.items() if not k.startswith("_")}

    async def _create(self, request: Request, body: Any) -> tuple[int, Any]:
        if any(machine["name"] == body["name"] for machine in self.live()):
            return _error(
                409, f"unique machine name violation, machine ID … already exists with name {body['name']!r}"
            )
        self._made += 1
        # Ids are unique in all of Fly.
        machine_id = f"{zlib.crc32(self.name.encode()):08x}{self._made:06x}"
        machine = {
            "id": machine_id,
            "name": body["name"],
            "state": "created",
            "region": body.get("region", "ams"),
            "config": body["config"],
            "created_at": datetime.now(UTC).isoformat(),
            "_since": self.clock(),
        }
        self.machines[machine_id] = machine
        return 200, self._aged(machine)

    async def _list(self, request: Request, _: Any) -> tuple[int, Any]:
        left_out = ("config",) if request.query_params.get("summary") == "true" else ()
        listed = [self._aged(machine) for machine in self.live()]
        return 200, [{k: v for k, v in machine.items() if k not in left_out} for machine in listed]

    async def _get(self, request: Request, _: Any) -> tuple[int, Any]:
        machine = self.machines.get(request.path_params["id"])
        return _error(404, "machine not found") if machine is None else (200, self._aged(machine))

    async def _destroy(self, request: Request, _: Any) -> tuple[int, Any]:
        return self._change(request, "destroyed")

    async def _start(self, request: Request, _: Any) -> tuple[int, Any]:
        return self._change(request, "started")

    async def _stop(self, request: Request, _: Any) -> tuple[int, Any]:
        return self._change(request, "stopped")

    async def _suspend(self, request: Request, _: Any) -> tuple[int, Any]:
        return self._change(request, "suspended")

    def _change(self, request: Request, state: str) -> tuple[int, Any]:
        machine_id = request.path_params["id"]
        machine = self.machines.get(machine_id)
        if machine is None or machine["state"] == "destroyed":
            return _error(404, "machine not found")
        nonce, until = self.leases.get(machine_id, ("", 0.0))
        if until > self.clock() and request.headers.get("fly-machine-lease-nonce") != nonce:
            return _error(409, "machine is leased")
        machine["state"] = state
        return 200, {"ok": True}

    async def _wait(self, request: Request, _: Any) -> tuple[int, Any]:
        machine = self.machines.get(request.path_params["id"])
        if machine is None:
            return _error(404, "machine not found")
        deadline = self.clock() + float(request.query_params.get("timeout", "60"))
        while self._aged(machine)["state"] != request.query_params.get("state", "started"):
            if self.clock() >= deadline:
                return _error(408, "deadline_exceeded")
            await self.sleep(0.01)
        return 200, {"ok": True}

    async def _lease(self, request: Request, body: Any) -> tuple[int, Any]:
        machine_id = request.path_params["id"]
        nonce, until = self.leases.get(machine_id, ("", 0.0))
        if until > self.clock() and request.headers.get("fly-machine-lease-nonce") != nonce:
            return _error(409, "machine is leased")
        nonce = nonce if until > self.clock() else f"nonce-{len(self.asked)}"
        self.leases[machine_id] = (nonce, self.clock() + body["ttl"])
        return 201, {"status": "success", "data": {"nonce": nonce, "expires_at": 0}}

    async def _release(self, request: Request, _: Any) -> tuple[int, Any]:
        return (200, {}) if self.leases.pop(request.path_params["id"], None) else _error(404, "no lease")

    async def _metadata(self, request: Request, body: Any) -> tuple[int, Any]:
        machine = self.machines[request.path_params["id"]]
        machine["config"]["metadata"][request.path_params["key"]] = body["value"]
        return 204, None


class _Losing(httpx.AsyncBaseTransport):
    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await self._inner.handle_async_request(request)
        if "x-lost" in response.headers:
            raise httpx.ReadError("the connection ended", request=request)
        return response


def _error(status: int, text: str) -> tuple[int, Any]:
    return status, {"error": text, "status": "error"}
