"""`build` puts a whole agent together and starts nothing; `close` releases what it took."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import pwd
import signal
import zipfile
from pathlib import Path

import httpx
import pytest

from agent.core.errors import RootUnusable
from agent.daemon import Agent, build
from agent.devserver.reaper import Reaper
from agent.fs.project_dir import ProjectDir
from agent.link.loop import LinkLoop
from agent.link.source import Resync
from agent.replay.harness import ScenarioSource
from agent.sync.workspace import Workspace
from agent.telemetry.spans import Spans
from agent.telemetry.status import SyncPhase
from tests.agent.built import answer, built, settings, source_of
from tests.agent.test_config import GOOD

ROOT_TASKS = ["link", "sync", "dev-server", "health", "heartbeat", "run-settings", "memory"]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def released(before: int) -> None:
    """Wait for it: the thread of a watch closes its descriptors a moment after, that of an earlier test too."""
    async with asyncio.timeout(10):
        while descriptors() > before:
            gc.collect()
            await asyncio.sleep(0.01)


async def test_everything_is_wired_and_nothing_is_started(tmp_path: Path) -> None:
    before, handler = descriptors(), signal.getsignal(signal.SIGCHLD)
    async with httpx.AsyncClient() as http:
        agent = build(settings(tmp_path), environ={}, http=http)
        assert list(agent.tasks()) == ROOT_TASKS
        assert asyncio.all_tasks() == {asyncio.current_task()}, "no task"
        assert list(tmp_path.iterdir()) == [], "no file"
        assert descriptors() == before, "no socket"
        assert signal.getsignal(signal.SIGCHLD) is handler
        assert not agent.hydrated.is_set()
        assert not agent.stop.is_set()
        assert isinstance(agent.source, LinkLoop)
        report, heartbeat = agent.report, agent.heartbeat
        assert (report.sync, report.link, report.dev) == (agent.sync, agent.source, agent.supervisor)
        assert (heartbeat.report, heartbeat.sync, heartbeat.api) == (report, agent.sync, agent.api)
        assert heartbeat.stop is agent.stop
        assert report.catch_up.api is agent.api is not None
        assert report.catch_up.snapshots.disk is agent.workspace.disk
        assert agent.sync.tree is agent.follower.tree
        sample = report.problems.metrics.registry.get_sample_value
        assert sample("preview_agent_revision") == 0.0, "the report is on the registry that is served"
        agent.close()


def snapshot(files: dict[str, str]) -> httpx.Response:
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return httpx.Response(200, stream=httpx.ByteStream(whole.getvalue()))


async def respond(request: httpx.Request) -> httpx.Response:
    if request.method == "GET":
        return snapshot({"src/a.ts": "a\n"})
    return answer(200, {"kind": "current", "epoch": "e", "revision": 1})


async def hydrate(agent: Agent) -> asyncio.Task[None]:
    source_of(agent).waiting.put_nowait(Resync("joined"))
    task = asyncio.create_task(agent.sync.run())
    hydrated = asyncio.create_task(agent.hydrated.wait())
    await asyncio.wait([task, hydrated], timeout=20, return_when=asyncio.FIRST_COMPLETED)
    hydrated.cancel()
    if task.done():
        task.result()
    assert agent.hydrated.is_set()
    return task


async def stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_the_dev_server_is_told_of_the_first_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    async with built(settings(tmp_path), respond) as agent:
        monkeypatch.setattr(type(agent.supervisor), "project_ready", lambda self: heard.append("ready"))
        task = await hydrate(agent)
        assert heard == ["ready"]
        assert (tmp_path / "project" / "src" / "a.ts").read_text() == "a\n"
        assert agent.report.sync_status.phase is SyncPhase.FOLLOWING
        await stop(task)


async def test_shadow_mode_runs_no_dev_server_and_leaves_the_project_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "theirs.ts").write_text("another flow's\n")
    heard: list[str] = []
    async with built(settings(tmp_path, SYNC_MODE="shadow"), respond) as agent:
        for name in ("project_ready", "files_changed"):
            monkeypatch.setattr(type(agent.supervisor), name, lambda *_: heard.append("told"))
        assert list(agent.tasks()) == [name if name != "dev-server" else "shadow" for name in ROOT_TASKS]
        assert agent.shadow is not None
        assert agent.shadow is agent.report.shadow
        assert not agent.report.ready()
        task = await hydrate(agent)
        shadowing = asyncio.create_task(agent.shadow.run())
        async with asyncio.timeout(20):
            while not agent.report.ready():
                await asyncio.sleep(0.01)
        assert heard == [], "nothing is installed, started or told of saves"
        assert (tmp_path / ".preview-shadow" / "src" / "a.ts").read_text() == "a\n"
        assert [path.name for path in (tmp_path / "project").iterdir()] == ["theirs.ts"]
        assert (tmp_path / "state" / "shadow.sqlite").exists()
        assert not (tmp_path / "state" / "ledger.sqlite").exists()
        await stop(shadowing)
        await stop(task)


async def test_without_a_session_api_there_is_none_to_ask(tmp_path: Path) -> None:
    async with built(settings(tmp_path, SESSION_API_URL="")) as agent:
        assert agent.api is agent.heartbeat.api is agent.report.catch_up.api is None
        assert agent.report.status()["session_api"] == "absent: no catch-up"


class Collector(Spans):
    """Spans that go nowhere: their names, and whether they were closed."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.closed = 0

    def record(self, name: str, *_: object, **__: object) -> None:
        self.names.append(name)

    def close(self) -> None:
        self.closed += 1


async def test_close_releases_the_directories_the_ledger_the_signal_and_the_spans(tmp_path: Path) -> None:
    spans, before = Collector(), descriptors()
    async with httpx.AsyncClient(transport=httpx.MockTransport(respond)) as http:
        agent = build(settings(tmp_path), environ={}, http=http, spans=spans, source=ScenarioSource())
        agent.reaper.adopt()
        assert signal.getsignal(signal.SIGCHLD) not in (signal.SIG_DFL, signal.SIG_IGN, None)
        await stop(await hydrate(agent))
        assert descriptors() > before
        agent.close()
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        assert (spans.names, spans.closed) == (["preview.hydrate"], 1)
        await released(before)
        again = build(settings(tmp_path), environ={}, http=http, source=ScenarioSource())
        task = await hydrate(again)
        assert again.sync.tree.files().keys() == {"src/a.ts"}, (
            "the next agent has the directory and the ledger"
        )
        await stop(task)
        again.close()
        await released(before)


async def test_a_replay_s_parts_take_the_place_of_the_settings(tmp_path: Path) -> None:
    disk, source = ProjectDir(tmp_path / "elsewhere", tmp_path / "staging"), ScenarioSource()

    class Kept(Workspace):
        pass

    async with httpx.AsyncClient() as http:
        agent = build(
            settings(tmp_path), environ={}, http=http, disk=disk, source=source, workspace_type=Kept
        )
        assert isinstance(agent.workspace, Kept)
        assert agent.workspace.disk is disk
        assert agent.source is source
        assert isinstance(agent.reaper, Reaper)
        agent.close()


async def test_directories_that_the_dev_user_could_replace_are_refused(open_path: Path) -> None:
    nobody = pwd.getpwnam("nobody")
    os.chown(open_path, nobody.pw_uid, nobody.pw_gid)
    async with httpx.AsyncClient() as http:
        with pytest.raises(RootUnusable, match="nobody can put a link there instead"):
            build(settings(open_path, DEV_USER="nobody"), environ=GOOD, http=http)
        shadow = build(settings(open_path, DEV_USER="nobody", SYNC_MODE="shadow"), environ=GOOD, http=http)
        shadow.close()
