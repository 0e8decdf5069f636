"""What operators ask: the numbers are of the service, whatever a client sends."""

from __future__ import annotations

import re

import httpx
from prometheus_client import CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from orchestrator_stub.http.operations import Measured, Metrics


async def test_an_invented_method_is_no_series_of_its_own() -> None:
    async def answer(_: Request) -> PlainTextResponse:
        return PlainTextResponse("here")

    metrics = Metrics(CollectorRegistry())
    app = Measured(Starlette(routes=[Route("/here", answer, methods=["GET"])]), metrics)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://orchestrator.invalid") as http:
        for method in ("GET", "HEAD", "OPTIONS", "BREW", *(f"M{number}" for number in range(200))):
            for path in ("/here", "/nothing"):
                await http.request(method, path)
    counted = re.findall(r'requests_total\{method="([^"]*)"', generate_latest(metrics.registry).decode())
    assert set(counted) == {"GET", "HEAD", "OPTIONS", "other"}
