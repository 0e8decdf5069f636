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
import websockets

from agent.config import Settings
from agent.core.model import RelPath
from agent.devserver.screen import Screen
from agent.devserver.state import Phase
from agent.devserver.supervisor import Supervisor
from agent.telemetry.metrics import Metrics
from tests.agent.conftest import EXAMPLE
from tests.agent.processes import running, until
from tests.ports import free_port

ANY_ID = UUID(int=1)

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")


@pytest.fixture
def settings(tmp_path: Path, installed: Path) -> Settings:
    project = tmp_path / "project"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("node_modules", "dist"))
    return Settings(
        project_id=ANY_ID,
        session_id=ANY_ID,
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
        assert supervisor.state is Phase.ABSENT
        supervisor.project_ready()
        await until(lambda: supervisor.ready, 120)
        async with httpx.AsyncClient(base_url=supervisor.url, timeout=30) as http:
            page = (await http.get("/")).text
            assert "/src/main.tsx" in page
            app = settings.project_dir / "src" / "App.tsx"
            new = app.with_name("App.tsx.new")
            new.write_text(app.read_text().replace("Somebody left the light on", "Anybody home?"))
            new.rename(app)

            async def served() -> bool:
                return "Anybody home?" in (await http.get("/src/App.tsx")).text

            async with asyncio.timeout(60):
                while not await served():
                    await asyncio.sleep(0.01)
        report = supervisor.report()
        assert report["entry"] == "/src/main.tsx"
        assert any("ready in" in line for line in report["log"])  # type: ignore[union-attr, attr-defined]
        program = next(iter(running(f"{settings.project_dir}/node_modules/.bin/vite")))
        given = Path(f"/proc/{program}/environ").read_bytes().split(b"\0")
        assert b"VITE_HI=there" in given
        assert not any(b"secret" in line or b"TOKEN" in line for line in given)
    assert supervisor.state is Phase.ABSENT
    assert running(str(settings.project_dir)) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", settings.dev_port)) != 0


async def test_what_vite_does_itself_about_its_config_and_env_is_left_to_it(settings: Settings) -> None:
    """Both make Vite restart inside its own process; the supervisor does nothing."""
    supervisor = Supervisor(settings)
    async with kept(supervisor):
        supervisor.project_ready()
        await until(lambda: supervisor.ready, 120)
        pid = supervisor.report()["pid"]
        (settings.project_dir / ".env").write_text("VITE_TOLD=by-the-env-file\n")
        supervisor.files_changed({RelPath(".env")})
        config = settings.project_dir / "vite.config.ts"
        config.write_text(config.read_text() + "\nconsole.log('read', 'again')\n")
        supervisor.files_changed({RelPath("vite.config.ts")})
        await until(lambda: "read again" in supervisor.report()["log"])  # type: ignore[operator]
        app = settings.project_dir / "src" / "App.tsx"
        app.write_text(app.read_text() + "\nexport const told = import.meta.env.VITE_TOLD\n")

        async def told() -> bool:
            async with httpx.AsyncClient(base_url=supervisor.url, timeout=30) as http:
                with contextlib.suppress(httpx.HTTPError):
                    return "by-the-env-file" in (await http.get("/src/App.tsx")).text
            return False

        async with asyncio.timeout(30):
            while not await told():
                await asyncio.sleep(0.05)
        assert (supervisor.state, supervisor.restarts) == (Phase.READY, 0)
        assert supervisor.report()["pid"] == pid


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


async def test_a_broken_package_json_and_installs_that_fail_or_hang_leave_the_preview_as_it_is(
    settings: Settings, tmp_path: Path
) -> None:
    """Whatever becomes of the install, the running preview answers, byte for byte as before."""
    settings = settings.model_copy(update={"install_seconds": 0.5})
    async with kept(Supervisor(settings.model_copy(update={"install_seconds": 120.0}))) as first:
        first.project_ready()
        await until(lambda: first.ready, 120)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    npm = binaries / "npm"
    npm.write_text("#!/bin/sh\necho working\nsleep 60\n")
    npm.chmod(0o755)
    environ = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}"}
    manifest = settings.project_dir / "package.json"
    good = manifest.read_text()
    async with kept(Supervisor(settings, environ=environ)) as supervisor:
        supervisor.project_ready()
        await until(lambda: supervisor.ready, 60)
        async with httpx.AsyncClient(base_url=supervisor.url, timeout=30) as http:
            paths = ("/", "/src/App.tsx", "/src/App.css", "/lighthouse.svg")
            before = [(await http.get(path)).content for path in paths]

            async def complains(rule: str) -> None:
                supervisor.files_changed({RelPath("package.json")})
                await until(lambda: [problem.rule for problem in supervisor.problems()] == [rule])
                assert [(await http.get(path)).content for path in paths] == before
                assert (supervisor.state, supervisor.restarts) == (Phase.READY, 0)

            manifest.write_text(good[:-20])
            await complains("package_json")
            manifest.write_text(good.replace('"react":', '"no-such-thing": "1.0.0",\n    "react":'))
            await complains("timeout")
            npm.write_text("#!/bin/sh\necho there is no such thing >&2\nexit 1\n")
            await complains("exit")
            assert "there is no such thing" in supervisor.problems()[0].detail
            manifest.write_text(good)
            supervisor.files_changed({RelPath("package.json")})
            await until(lambda: supervisor.problems() == ())
            assert supervisor.restarts == 0


async def test_behind_a_proxy_that_ends_tls_the_preview_and_its_socket_work(settings: Settings) -> None:
    """PREVIEW_HOST is allowed, no other host is, and the hot-update client follows the page's own origin."""
    behind = settings.model_copy(update={"preview_host": "p1.preview.example .own.example"})
    supervisor = Supervisor(behind, screen=Screen(settings.project_dir, metrics=Metrics()))
    async with kept(supervisor):
        supervisor.project_ready()
        await until(lambda: supervisor.ready, 120)
        async with httpx.AsyncClient(base_url=supervisor.url, timeout=30) as http:
            allowed = ("p1.preview.example", "own.example", "www.own.example")
            for name, status in (*((name, 200) for name in allowed), ("rebound.example", 403)):
                assert (await http.get("/src/App.tsx", headers={"Host": name})).status_code == status
            client = (await http.get("/@vite/client", headers={"Host": "p1.preview.example"})).text
        # What the browser computes: wss when the page is https, and the page's own port.
        assert re.search(
            r'socketProtocol = null \|\| \(importMetaUrl\.protocol === "https:" \? "wss" : "ws"\)', client
        )
        assert re.search(r"hmrPort = null", client)
        token = re.search(r'wsToken = "([^"]+)"', client)
        assert token is not None

        def connect(name: str) -> websockets.connect:
            return websockets.connect(
                f"ws://{name}:{settings.dev_port}/?token={token[1]}", host="127.0.0.1", proxy=None,
                origin=websockets.Origin(f"https://{name}"), subprotocols=[websockets.Subprotocol("vite-hmr")],
            )  # fmt: skip

        async with connect("p1.preview.example") as hot:
            assert '"connected"' in str(await hot.recv())
        with pytest.raises(websockets.InvalidHandshake):
            await connect("rebound.example")


async def test_a_project_that_is_broken_when_it_is_opened_is_ready_and_says_what_is_broken(
    settings: Settings,
) -> None:
    entry = settings.project_dir / "src" / "main.tsx"
    good = entry.read_text()
    entry.write_text("import { gone } from './missing'\nconst y = \n")
    supervisor = Supervisor(settings)
    async with kept(supervisor):
        supervisor.project_ready()
        await until(lambda: supervisor.ready, 120)
        await until(supervisor.problems)
        (problem,) = supervisor.problems()
        assert (problem.kind, problem.rule) == ("preview_error", "entry")
        assert "/src/main.tsx answers 500" in problem.detail
        entry.write_text(good)
        await until(lambda: supervisor.problems() == ())
        assert (supervisor.state, supervisor.restarts) == (Phase.READY, 0)


async def test_vites_bundled_dev_mode_is_looked_at_once_it_has_bundled(settings: Settings) -> None:
    config = settings.project_dir / "vite.config.ts"
    text = config.read_text()
    config.write_text(text.replace("defineConfig({", "defineConfig({ experimental: { bundledDev: true },", 1))
    assert config.read_text() != text
    supervisor = Supervisor(settings)
    async with kept(supervisor):
        supervisor.project_ready()
        await until(lambda: supervisor.ready, 120)
        await until(lambda: supervisor.report()["detail"] == "page and entry module are served")
        assert supervisor.problems() == ()
        assert str(supervisor.report()["entry"]).startswith("/assets/")


async def test_a_hot_update_socket_that_refuses_is_said_in_the_bundled_dev_mode_too(
    settings: Settings,
) -> None:
    config = settings.project_dir / "vite.config.ts"
    without = "experimental: { bundledDev: true }, server: { ws: false },"
    config.write_text(config.read_text().replace("defineConfig({", f"defineConfig({{ {without}", 1))
    supervisor = Supervisor(settings)
    async with kept(supervisor):
        supervisor.project_ready()
        await until(lambda: [problem.kind for problem in supervisor.problems()] == ["hmr_unreachable"], 60)
