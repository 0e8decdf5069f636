"""A real local session is frozen and wakes: the right page, whatever was saved meanwhile."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest

from orchestrator_stub.machines.local import LocalMachines
from tests.system.plane import eventually, running_plane

pytestmark = pytest.mark.system

SERVER = """
import http.server, os
http.server.test(http.server.SimpleHTTPRequestHandler, port=int(os.environ["PORT"]), bind="127.0.0.1")
"""


def processes_below(directory: Path) -> list[psutil.Process]:
    """The agent's, the guard's and the dev server's."""
    found = []
    for process in psutil.process_iter(["cwd"]):
        if (process.info["cwd"] or "").startswith(str(directory)):
            found.append(process)
    return found


async def test_a_frozen_session_wakes_with_the_page_of_now(database: str, tmp_path: Path) -> None:
    driver = LocalMachines(tmp_path / "machines", environment=os.environ)
    async with (
        running_plane(database, tmp_path / "plane", machines=driver, sweep_seconds=0.2) as plane,
        httpx.AsyncClient(trust_env=False, timeout=30) as browser,
    ):
        sweeping = asyncio.create_task(plane.controller.run())
        project = await plane.project({"index.html": "<p>before</p>", "server.py": SERVER})
        command = f"{sys.executable} server.py"
        made = await plane.http.post(
            "/v1/sessions", json={"project_id": str(project.id), "run": {"dev_command": command}}
        )
        assert made.is_success, made.text
        path = f"/v1/sessions/{made.json()['session_id']}"

        async def ready() -> dict[str, Any] | None:
            form: dict[str, Any] = (await plane.http.get(path)).json()
            return form if form["state"] == "ready" else None

        try:
            session = await eventually("the session is ready", ready, 60)
            assert "before" in (await browser.get(session["preview_url"])).text

            directory = driver.project_dir(UUID(session["session_id"])).parent
            for saved in ("while it slept", None):
                assert (await plane.http.post(f"{path}/suspend")).json()["state"] == "suspended"
                members = processes_below(directory)
                assert len(members) >= 2, "the agent and the dev server"
                assert {each.status() for each in members} == {psutil.STATUS_STOPPED}
                if saved:
                    await project.save("index.html", f"<p>{saved}</p>")
                with pytest.raises(httpx.ReadTimeout):
                    await browser.get(session["preview_url"], timeout=2.5)

                began = time.monotonic()
                woken = await plane.http.post(f"{path}/wake")
                assert woken.json()["state"] in ("provisioning", "ready")
                session = await eventually("it is ready again", ready, 60)
                seconds = time.monotonic() - began
                page = (await browser.get(session["preview_url"])).text
                assert "while it slept" in page, "ready means right"
                assert session["generation"] == 1
                assert {each.pid for each in processes_below(directory)} >= {each.pid for each in members}
                print(f"wake to ready, {'with' if saved else 'without'} a save: {seconds:.3f} s")
            metrics = (await plane.http.get("/metrics")).text
            assert "preview_orchestrator_suspends_total 2.0" in metrics
            assert "preview_orchestrator_wakes_seconds_count 2.0" in metrics

            # Asleep again, and ended: nothing of it is left.
            assert (await plane.http.post(f"{path}/suspend")).is_success
            await plane.http.delete(path)

            async def nothing() -> bool:
                return not await driver.list() and not processes_below(directory)

            await eventually("no process is left", nothing, 30)
        finally:
            sweeping.cancel()
            for machine in await driver.list():
                await driver.destroy(machine.id)
