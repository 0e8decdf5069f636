"""Both sides' `/metrics`, as they are while a preview is served: what tests of metrics and dashboards read."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as read_openmetrics
from prometheus_client.parser import text_string_to_metric_families as read_text

from tests.system.plane import eventually, running_plane

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@dataclass(frozen=True)
class Scrape:
    """One side's answers: the classic text form, and OpenMetrics."""

    text: str
    openmetrics: str

    def families(self) -> dict[str, Metric]:
        """By name, without `_total`; read strictly."""
        return {family.name: family for family in read_openmetrics(self.openmetrics)}

    def series(self) -> dict[str, set[str]]:
        """Every name that a query can select, with its labels; of a family that has no sample yet, the bare names."""
        found: dict[str, set[str]] = {}
        for family in read_text(self.text):
            suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(
                family.type, ("",)
            )
            for suffix in suffixes:
                found.setdefault(family.name + suffix, set())
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
        return found


@dataclass(frozen=True)
class Scraped:
    """A session's agent and its orchestrator."""

    agent: Scrape
    orchestrator: Scrape


def scrape(dsn: str) -> Scraped:
    """Both sides of a session whose agent has followed a few saves, one of them by reference."""
    return asyncio.run(_scrape(dsn))


async def _scrape(dsn: str) -> Scraped:
    with tempfile.TemporaryDirectory(prefix="preview-scrape-") as name:
        place = Path(name)
        async with running_plane(dsn, place) as plane:
            project = await plane.project({"src/a.ts": "a\n"})
            agent = await project.session(place / "machine")
            agent.start()
            try:
                await agent.equal()
                await project.save("src/a.ts", "b\n")
                await project.save("src/big.txt", "x" * 300_000)
                await agent.equal()

                async def told() -> bool:
                    text = (await plane.http.get("/metrics")).text
                    return 'preview_orchestrator_agents{state="degraded"} 1.0' in text

                await eventually("the orchestrator has heard of it", told)
                async with httpx.AsyncClient(trust_env=False) as http:
                    sides = [
                        Scrape(
                            (await http.get(f"{url}/metrics")).text,
                            (await http.get(f"{url}/metrics", headers={"accept": OPENMETRICS})).text,
                        )
                        for url in (f"http://127.0.0.1:{agent.port}", plane.url)
                    ]
            finally:
                await agent.stop()
    return Scraped(*sides)
