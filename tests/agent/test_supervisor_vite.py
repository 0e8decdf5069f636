"""The dev server's keeper against the real Vite, on the example project."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from agent.config import Settings
from agent.devserver import State
from agent.model import RelPath
from agent.supervisor import Supervisor
from tests.agent.conftest import EXAMPLE
from tests.agent.processes import free_port, running, until

SOMEBODY = UUID(int=1)

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")


@pytest.fixture
def settings(tmp_path: Path, installed: Path) -> Settings:
    project = tmp_path / "project"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("node_modules", "dist"))
    return Settings(
        project_id=SOMEBODY,
        session_id=SOMEBODY,
        project_dir=project,
        dev_port=free_port(),
        dev_host="127.0.0.1",
        modules_dir=installed,
    )


@contextlib.asynccontextmanager
async def kept(supervisor: Supervisor) -> AsyncIterator[Supervisor]:
    task = asyncio.create_task(supervisor.run())
    try:
        yield supervisor
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_a_preview_is_installed_started_served_and_gone(settings: Settings) -> None:
    supervisor = Supervisor(
        settings, environ={**os.environ, "REALTIME_TOKEN": "secret", "DEV_ENV_VITE_HI": "there"}
    )
    async with kept(supervisor):
        assert supervisor.state is State.ABSENT
        supervisor.project_ready()
        await until(lambda: supervisor.ready, 120)
        async with httpx.AsyncClient(base_url=supervisor.url) as http:
            page = (await http.get("/")).text
            assert "/src/main.tsx" in page
            app = settings.project_dir / "src" / "App.tsx"
            new = app.with_name("App.tsx.new")
            new.write_text(app.read_text().replace("Somebody left the light on", "Anybody home?"))
            new.rename(app)

            async def served() -> bool:
                return "Anybody home?" in (await http.get("/src/App.tsx")).text

            async with asyncio.timeout(5):
                while not await served():
                    await asyncio.sleep(0.01)
        report = supervisor.report()
        assert report["entry"] == "/src/main.tsx"
        assert any("ready in" in line for line in report["log"])  # type: ignore[union-attr, attr-defined]
        program = next(iter(running(f"--port\0{settings.dev_port}\0--strictPort\0")))
        told = Path(f"/proc/{program}/environ").read_bytes().split(b"\0")
        assert b"VITE_HI=there" in told
        assert not any(b"secret" in line or b"TOKEN" in line for line in told)
    assert supervisor.state is State.ABSENT
    assert running(str(settings.dev_port)) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", settings.dev_port)) != 0


async def test_a_lock_change_is_one_install_and_one_restart(settings: Settings) -> None:
    supervisor = Supervisor(settings)
    async with kept(supervisor):
        supervisor.project_ready()
        await until(lambda: supervisor.ready, 120)
        manifest = settings.project_dir / "package.json"
        manifest.write_text(re.sub(r'"typescript": "[^"]+",', "", manifest.read_text()))
        for _ in range(3):
            supervisor.files_changed({RelPath("package.json"), RelPath("package-lock.json")})
        await until(lambda: supervisor.restarts == 1 and supervisor.ready, 120)
        assert not (settings.project_dir / "node_modules" / "typescript").exists()
        assert supervisor.problems() == ()
        assert list(settings.modules.glob("stage-*")) == []
