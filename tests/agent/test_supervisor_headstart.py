"""The dev server of the last time, started before the agent is awake: adopted when it fits, gone when it does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

from agent import headstart
from agent.config import Settings, read_settings
from agent.headstart import LEDGER, RECORD, HeadStart, begin
from agent.model import RelPath
from agent.supervisor import Supervisor
from tests.agent.processes import free_port, running, until

SERVER = Path(__file__).with_name("dev_server.py")


class Machine:
    """One machine's directories, and the environment that its agent is given each time."""

    def __init__(self, tmp_path: Path) -> None:
        self.project, self.state = tmp_path / "project", tmp_path / "state"
        binaries = self.project / "node_modules" / ".bin"
        binaries.mkdir(parents=True)
        self.state.mkdir()
        (self.project / "package.json").write_text('{"scripts": {"dev": "vite"}}')
        (binaries / "vite").write_text(f'#!/bin/sh\nexec {sys.executable} {SERVER} good "$@" # {tmp_path}\n')
        (binaries / "vite").chmod(0o755)
        self.environ = {
            "PATH": os.environ["PATH"], "HOME": "/", "PROJECT_DIR": str(self.project), "STATE_DIR": str(self.state),
            "DEV_PORT": str(free_port()), "DEV_HOST": "127.0.0.1", "REALTIME_TOKEN": "secret",
        }  # fmt: skip

    @contextlib.asynccontextmanager
    async def agent(self, early: HeadStart | None = None, **more: str) -> AsyncIterator[Supervisor]:
        environ = {**self.environ, **more}
        settings = read_settings({"PROJECT_ID": str(UUID(int=1)), "SESSION_ID": str(UUID(int=1)), **environ})
        supervisor = Supervisor(settings, environ=environ, early=early)
        task = asyncio.create_task(supervisor.run())
        try:
            yield supervisor
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def has_been_ready(self) -> None:
        async with self.agent() as supervisor:
            supervisor.project_ready()
            await until(lambda: supervisor.ready)
        (self.state / LEDGER).touch()

    @property
    def processes(self) -> list[int]:
        return running(self.environ["DEV_PORT"])


def environment_of(pid: int) -> bytes:
    """What /proc shows of it; nothing to anybody but root."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().strip(b"\0")
    except PermissionError:
        return b""


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    made = Machine(tmp_path)
    yield made
    await until(lambda: made.processes == [], 5)


def test_its_defaults_are_those_of_the_settings() -> None:
    settings = Settings(project_id=UUID(int=1), session_id=UUID(int=1))
    assert settings.project_dir == Path(headstart.PROJECT_DIR)
    assert settings.state_dir == Path(headstart.STATE_DIR)


async def test_what_was_ready_is_started_early_and_adopted(machine: Machine) -> None:
    await machine.has_been_ready()
    assert "secret" not in (machine.state / RECORD).read_text()
    early = begin(machine.environ)
    assert early is not None
    await until(lambda: machine.processes)
    assert environment_of(early.pid) == b"", (
        "the guard is a fork of the agent, and keeps nothing of what it was given"
    )
    async with machine.agent(early) as supervisor:
        supervisor.project_ready()
        await until(lambda: supervisor.ready)
        assert supervisor.report()["pid"] == early.pid
        assert supervisor.restarts == 0
    assert machine.processes == []


async def test_an_adopted_server_that_dies_is_started_again(machine: Machine) -> None:
    await machine.has_been_ready()
    early = begin(machine.environ)
    assert early is not None
    async with machine.agent(early) as supervisor:
        supervisor.project_ready()
        await until(lambda: supervisor.ready)
        os.killpg(early.pid, 9)
        await until(lambda: supervisor.restarts == 1 and supervisor.ready)
        assert supervisor.report()["pid"] != early.pid


async def test_one_that_is_not_what_would_be_started_is_replaced(machine: Machine) -> None:
    await machine.has_been_ready()
    early = begin(machine.environ)
    assert early is not None
    (machine.project / "package.json").write_text('{"scripts": {"dev": "vite --mode staging"}}')
    async with machine.agent(early) as supervisor:
        supervisor.project_ready()
        await until(lambda: supervisor.ready)
        assert not Path(f"/proc/{early.pid}").exists()
        assert "staging" in str(supervisor.report()["command"])


async def test_one_that_nobody_asks_for_goes_with_the_agent(machine: Machine) -> None:
    await machine.has_been_ready()
    early = begin(machine.environ)
    assert early is not None
    await until(lambda: machine.processes)
    async with machine.agent(early) as supervisor:
        await until(lambda: supervisor._group is not None)  # its loop turns
        assert not supervisor.ready
    assert machine.processes == []


@pytest.mark.parametrize("package", [None, "{"], ids=["gone", "broken"])
async def test_one_whose_project_has_changed_in_the_meantime_is_not_left_running(
    machine: Machine, package: str | None
) -> None:
    """The catch-up after a restart may leave nothing that could be started."""
    await machine.has_been_ready()
    early = begin(machine.environ)
    assert early is not None
    await until(lambda: machine.processes)
    manifest = machine.project / "package.json"
    manifest.unlink() if package is None else manifest.write_text(package)
    async with machine.agent(early) as supervisor:
        supervisor.project_ready()
        await until(lambda: machine.processes == [], 5)
        assert not supervisor.ready


async def test_a_save_that_needs_no_install_costs_no_head_start(machine: Machine) -> None:
    manifest = machine.project / "package.json"
    async with machine.agent() as supervisor:
        supervisor.project_ready()
        await until(lambda: supervisor.ready)
        before = (machine.state / RECORD).read_bytes()
        manifest.write_text('{"scripts": {"dev": "vite"}, "description": "new"}')
        supervisor.files_changed([RelPath("package.json")])
        await until(lambda: (machine.state / RECORD).read_bytes() != before)
    (machine.state / LEDGER).touch()
    early = begin(machine.environ)
    assert early is not None
    async with machine.agent(early) as supervisor:
        await until(
            lambda: supervisor._group is not None
        )  # only a supervisor that runs ends what it was given


async def test_a_port_that_somebody_has_is_left_alone(machine: Machine) -> None:
    await machine.has_been_ready()
    with socket.create_server(("127.0.0.1", int(machine.environ["DEV_PORT"]))):
        assert begin(machine.environ) is None
    assert machine.processes == []


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="needs root and setpriv, to be without rights",
)
async def test_the_agent_is_closed_before_it_is_awake(machine: Machine) -> None:
    """Code of the project runs long before `Reaper.adopt`."""
    await machine.has_been_ready()
    server = machine.project / "node_modules" / ".bin" / "vite"
    looks = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/environ | sed 's/^/saw /'; done 2>&1"
    server.write_text(f"#!/bin/sh\n{{ echo uid $(id -u); {looks}; }} >seen; mv seen seen.txt\n")
    source = "import os, sys; from agent.headstart import begin; assert begin(os.environ); sys.stdin.read()"
    agent = await asyncio.create_subprocess_exec(
        "setpriv", "--bounding-set", "-sys_ptrace,-perfmon,-sys_admin", sys.executable, "-c", source,
        env={**machine.environ, "REALTIME_TOKEN": "needle-in-the-haystack"}, stdin=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        await until((machine.project / "seen.txt").exists)
        seen = (machine.project / "seen.txt").read_text()
    finally:
        agent.kill()
        await agent.wait()
    assert seen.startswith("uid 0\n")
    assert "saw " in seen, "it could look"
    assert "needle" not in seen


async def test_an_agent_that_never_wakes_leaves_none(machine: Machine) -> None:
    """Bad settings end the agent right after the head start."""
    await machine.has_been_ready()
    source = "import os; from agent.headstart import begin; assert begin(os.environ); print('begun')"
    done = await asyncio.create_subprocess_exec(sys.executable, "-c", source, env=machine.environ)
    assert await done.wait() == 0
    await until(lambda: machine.processes == [], 5)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: (m.state / LEDGER).unlink(),
        lambda m: (m.state / RECORD).unlink(),
        lambda m: (m.state / RECORD).write_text("{"),
        lambda m: (m.state / RECORD).write_text("[]"),
        lambda m: (m.state / RECORD).write_text(json.dumps({"argv": [], "more": {}, "user": None})),
        lambda m: (m.project / "package.json").write_text('{"scripts": {"dev": "vite"}, "dependencies": {"a": "1"}}'),
        lambda m: (m.project / "package.json").write_text("{"),
        lambda m: m.environ.update(PROJECT_DIR="/nonexistent"),
        lambda m: m.environ.update(SYNC_MODE="shadow"),
        lambda m: m.environ.update(DEV_USER="nobody") if os.geteuid() == 0 else m.environ.update(STATE_DIR="/"),
    ],
)  # fmt: skip
async def test_nothing_is_started_early_when_there_is_a_doubt(machine: Machine, spoil: object) -> None:
    await machine.has_been_ready()
    assert callable(spoil)
    spoil(machine)
    assert begin(machine.environ) is None
