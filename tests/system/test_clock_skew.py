"""Two machines whose clocks differ by minutes: the lag is told as what it is, and how far it may be off is told too."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.system.plane import eventually, running_plane

pytestmark = pytest.mark.system

AHEAD = "import time; _time = time.time; time.time = lambda: _time() + {ahead}"
"""A sitecustomize: to this process it is later, or earlier, than to the others."""


@pytest.mark.parametrize("ahead", [200.0, -200.0], ids=["agent-ahead", "agent-behind"])
async def test_the_lag_is_honest_across_machines(database: str, tmp_path: Path, ahead: float) -> None:
    place = tmp_path / "clock"
    place.mkdir()
    (place / "sitecustomize.py").write_text(AHEAD.format(ahead=ahead))
    async with running_plane(database, tmp_path) as plane:
        project = await plane.project({"src/a.ts": "a\n"})
        agent = await project.session(
            tmp_path / "machine", PYTHONPATH=f"{place}:{Path(__file__).parents[2]}", HEARTBEAT_SECONDS="0.2"
        )
        agent.start()
        try:
            await agent.equal()

            async def narrowed() -> bool:
                report = await agent.status()
                return bool(report and report["clock"] and report["clock"]["uncertainty_seconds"] < 0.3)

            await eventually("some heartbeats have told the clocks apart", narrowed)
            await project.save("src/a.ts", "b\n")
            report = await agent.equal()
            metrics = await agent.metrics()
        finally:
            agent.kill()
    clock = report["clock"]
    assert clock["at_least_seconds"] <= -ahead <= clock["at_most_seconds"]
    assert clock["resets"] == 0
    assert 0 <= report["last_applied"]["lag"] < 60, "not two hundred"
    (shown,) = re.findall(r"^preview_agent_clock_skew_seconds (\S+)$", metrics, re.MULTILINE)
    assert float(shown) == pytest.approx(-ahead, abs=0.5)
