"""The plugin in the real Vite, without a browser: what the hot-update socket says while batches land, fail and stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
import websockets

from agent.config import Settings
from agent.core.model import RelPath
from agent.devserver.screen import Screen
from agent.devserver.supervisor import Supervisor
from agent.telemetry.metrics import Metrics
from tests.agent.conftest import EXAMPLE
from tests.agent.processes import until
from tests.ports import free_port

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")

ANY_ID = UUID(int=1)
APP, COAST, HOURS = RelPath("src/App.tsx"), RelPath("src/Coast.tsx"), RelPath("src/hours.ts")


@dataclass
class World:
    screen: Screen
    supervisor: Supervisor
    root: Path
    socket: websockets.ClientConnection

    def write(self, path: RelPath) -> None:
        """One more line, by rename, as the agent writes."""
        new = self.root / "node_modules.new"
        new.write_text((self.root / path).read_text() + "// one more\n")
        new.rename(self.root / path)

    async def frame(self, seconds: float = 20) -> Any:
        """The next that is not of the plugin's own."""
        async with asyncio.timeout(seconds):
            while (frame := json.loads(await self.socket.recv()))["type"] == "custom":
                pass
            return frame

    async def revision(self, revision: int) -> list[str]:
        """The types of all frames until the revision is announced."""
        types = []
        async with asyncio.timeout(20):
            while True:
                frame = json.loads(await self.socket.recv())
                if frame["type"] == "custom" and frame["event"] == "preview:revision":
                    if frame["data"]["revision"] >= revision:
                        return types
                elif frame["type"] != "custom":
                    types.append(frame["type"])


@contextlib.asynccontextmanager
async def serving(root: Path, installed: Path, **environ: str) -> AsyncIterator[World]:
    settings = Settings(
        project_id=ANY_ID, session_id=ANY_ID, project_dir=root, dev_port=free_port(), dev_host="127.0.0.1",
        modules_dir=installed,
    )  # fmt: skip
    screen = Screen(root, metrics=Metrics())
    supervisor = Supervisor(settings, environ={**os.environ, **environ}, screen=screen)
    task = asyncio.create_task(supervisor.run())
    try:
        supervisor.project_ready()
        await until(lambda: supervisor.ready and screen.observed, 120)
        async with httpx.AsyncClient(base_url=supervisor.url) as http:
            for path in ("src/main.tsx", APP, COAST, HOURS):
                assert (await http.get(f"/{path}")).status_code == 200
        address = supervisor.url.replace("http", "ws", 1)
        async with websockets.connect(
            address, subprotocols=[websockets.Subprotocol("vite-hmr")], proxy=None
        ) as socket:
            assert json.loads(await socket.recv())["type"] == "connected"
            yield World(screen, supervisor, root, socket)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        screen.close()


@pytest.fixture
async def world(tmp_path: Path, installed: Path) -> AsyncIterator[World]:
    root = tmp_path / "project"
    shutil.copytree(EXAMPLE, root, ignore=shutil.ignore_patterns("node_modules", "dist"))
    async with serving(root, installed, DEV_ENV_NODE_OPTIONS="--max-old-space-size=700") as running:
        yield running


async def test_a_batch_is_one_update_and_its_revision(world: World) -> None:
    for revision in (1, 2, 3):
        world.screen.begin([APP, COAST])
        world.write(APP)
        world.write(COAST)
        world.screen.commit(revision, {APP: "change", COAST: "change"})
        assert await world.revision(revision) == ["update"]


async def test_an_agent_that_dies_between_begin_and_commit_leaves_no_page_behind(world: World) -> None:
    world.screen.begin([APP, COAST])
    world.write(APP)
    world.screen.close()  # its socket is gone, as after a kill
    assert (await world.frame())["type"] == "update"


async def test_an_agent_that_hangs_between_begin_and_commit_leaves_no_page_behind(world: World) -> None:
    world.screen.begin([APP, COAST])
    world.write(COAST)
    assert (await world.frame())["type"] == "update"


async def test_a_file_of_another_process_that_comes_meanwhile_is_not_lost(world: World) -> None:
    world.screen.begin([APP, COAST])
    world.write(HOURS)
    world.write(APP)
    await asyncio.sleep(0.3)  # for the watcher, which the gate holds
    world.screen.commit(1, {APP: "change"})
    paths: set[str] = set()
    while "/src/App.tsx" not in paths:
        paths |= {update["path"] for update in (await world.frame()).get("updates", ())}
    async with httpx.AsyncClient(base_url=world.supervisor.url) as http:
        await until_served(http, f"/{HOURS}", "one more")


async def until_served(http: httpx.AsyncClient, url: str, text: str) -> None:
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(httpx.TransportError):  # it is starting anew
                if text in (await http.get(url)).text:
                    return
            await asyncio.sleep(0.02)


async def test_a_batch_that_was_undone_says_nothing(world: World) -> None:
    # Nobody waits until a batch was begun: on a busy machine Vite may see the file first. Then it is as without a gate.
    for revision in range(1, 6):
        world.screen.begin([APP, COAST])
        os.utime(world.root / HOURS)
        world.screen.undo()
        world.screen.commit(revision, {})
        if silent := "update" not in await world.revision(revision):
            break
    assert silent
    # The dev server is not deaf: what comes next is seen.
    world.screen.begin([APP])
    world.write(APP)
    world.screen.commit(6, {APP: "change"})
    assert "update" in await world.revision(6)


async def test_a_file_that_is_deleted_and_made_again_is_served_as_it_is(world: World) -> None:
    text = (world.root / HOURS).read_text()
    world.screen.begin([HOURS])
    (world.root / HOURS).unlink()
    world.screen.commit(1, {HOURS: "unlink"})
    await world.revision(1)
    world.screen.begin([HOURS])
    (world.root / HOURS).write_text(text + "// again\n")
    world.screen.commit(2, {HOURS: "add"})
    await world.revision(2)
    async with httpx.AsyncClient(base_url=world.supervisor.url) as http:
        await until_served(http, f"/{HOURS}", "again")


async def test_vite_that_starts_anew_for_its_config_is_observed_again(world: World) -> None:
    config = RelPath("vite.config.ts")
    world.screen.begin([config])
    world.write(config)
    world.screen.commit(1, {config: "change"})
    async with httpx.AsyncClient(base_url=world.supervisor.url) as http:
        await until_served(http, "/@vite/client", "/@preview-sync")
        await until(lambda: world.screen.observed)
        world.screen.begin([HOURS])
        world.write(HOURS)
        world.screen.commit(2, {HOURS: "change"})
        await until_served(http, f"/{HOURS}", "one more")
