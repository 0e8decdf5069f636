"""The local driver with real processes: what they are given, how they end, what stays."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from orchestrator_stub.machines.driver import Machine, MachineState, owner_of
from orchestrator_stub.machines.local import ALLOCATOR, LocalMachines, free_port
from tests.orchestrator.machines.driver_contract import INSTALLATION, DriverContract, spec_for

AGENT = """
    import json, os, signal, subprocess, sys, time
    with open("env.json", "w") as file:
        json.dump(dict(os.environ), file)
    mode = os.environ.get("MODE", "")
    if mode == "fails":
        sys.exit(1)
    if mode == "bad settings":
        sys.exit(64)
    # A dev server: a process group of its own below PROJECT_DIR, deaf to SIGTERM.
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", deaf], cwd=os.environ["PROJECT_DIR"], start_new_session=True)
    def stop(*_):
        # A parent of several threads that is killed has its death told once for each: a second `wait` inside the
        # first would hang on its lock.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child.kill()
        child.wait()
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop if mode != "deaf" else signal.SIG_IGN)
    with open("up.new", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    os.rename("up.new", "up")
    while True:
        # Short: a signal that comes between the interpreter's last look and the system call does not end it.
        time.sleep(0.1)
"""


class Place:
    """A root of machines, and drivers on it."""

    def __init__(self, root: Path) -> None:
        self.root = root / "machines"
        self.agent = root / "agent.py"
        self.agent.write_text(textwrap.dedent(AGENT))
        self.exits: list[int] = []

    def driver(self, **options: Any) -> LocalMachines:
        return LocalMachines(
            self.root,
            environment={**os.environ, "SECRET_OF_OURS": "x", "AWS_KEY": "y"},
            command=(sys.executable, str(self.agent)),
            on_exit=lambda _, code: self.exits.append(code),
            **options,
        )

    def directory(self, machine: Machine) -> Path:
        [directory] = [p for p in self.root.iterdir() if p.name.replace("-", "") in machine.name]
        return directory.resolve()

    async def pids(self, machine: Machine) -> list[int]:
        """The agent's and its child's, once they are up."""
        path = self.directory(machine) / "up"
        await until(path.exists)
        return [int(pid) for pid in path.read_text().split()]


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
async def driver(place: Place) -> AsyncIterator[LocalMachines]:
    made = place.driver()
    yield made
    for machine in await made.list():
        await made.destroy(machine.id)
    await made.close()


class TestLocal(DriverContract):
    """The suite of every driver. `driver` is the module's."""


async def test_an_agent_sees_the_protocol_s_environment_and_nothing_of_ours(
    place: Place, driver: LocalMachines
) -> None:
    machine = await driver.create(spec_for(REALTIME_TOKEN="t"))
    await place.pids(machine)
    env = json.loads((place.directory(machine) / "env.json").read_text())
    inherited = {"PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "USER", "LOGNAME"}
    assert set(env) - inherited == {
        "PROJECT_ID", "SESSION_ID", "REALTIME_TOKEN", "PROJECT_DIR", "STATE_DIR", "STAGING_DIR", "DEV_HOST",
        "DEV_PORT", "HEALTH_HOST", "HEALTH_PORT", "LOG_FORMAT", *ALLOCATOR,
    }  # fmt: skip
    assert os.stat(env["PROJECT_DIR"]).st_dev == os.stat(Path(env["STAGING_DIR"]).parent).st_dev


async def test_a_project_is_in_the_same_directory_again(place: Place, driver: LocalMachines) -> None:
    """As in a container: Vite throws away what it has bundled in another one. Two sessions at once have two."""
    project = uuid4()
    first, second, third = (replace(spec_for(), project_id=project) for _ in range(3))
    machine = await driver.create(first)
    await driver.create(second)
    one, other = driver.project_dir(first.session_id), driver.project_dir(second.session_id)
    assert one != other
    assert not any(path.is_symlink() for path in (one, *one.parents) if path.is_relative_to(place.root))
    (one / "file").write_text("the first's")
    await driver.destroy(machine.id)
    assert not one.exists()
    await driver.create(third)
    assert driver.project_dir(third.session_id) == one
    assert list(one.iterdir()) == []
    assert driver.project_dir(second.session_id) == other
    assert {machine.name for machine in await driver.list()} == {second.name, third.name}


async def test_a_port_is_given_to_one_machine_though_nobody_listens_on_it_yet(
    place: Place, driver: LocalMachines
) -> None:
    """Nor while a dev server is down; the session's next machine has it again, and so has who comes after the end."""

    def ports(machine: Machine) -> tuple[int, int]:
        record = json.loads((place.directory(machine) / "machine.json").read_text())
        return record["dev_port"], record["health_port"]

    wanted = free_port("127.0.0.1")
    preferring, restarted = place.driver(dev_port=wanted), place.driver(dev_port=wanted)
    session = uuid4()
    first = await preferring.create(spec_for(session))
    second = await preferring.create(spec_for())
    after_a_restart = await restarted.create(spec_for())
    assert ports(first)[0] == wanted
    assert len({*ports(first), *ports(second), *ports(after_a_restart)}) == 6
    await preferring.retire(first.id)
    third = await preferring.create(spec_for())
    assert ports(third)[0] != wanted
    assert (await preferring.create(spec_for(session, 2))).preview_url == first.preview_url
    await preferring.destroy(spec_for(session, 2).name)
    fourth = await preferring.create(spec_for())
    assert ports(fourth)[0] == wanted
    await preferring.close()
    await restarted.close()


async def test_the_end_leaves_no_process(place: Place, driver: LocalMachines) -> None:
    machine = await driver.create(spec_for())
    agent, child = await place.pids(machine)
    await driver.retire(machine.id)
    assert gone(agent)
    assert gone(child)
    seen = await driver.inspect(machine.id)
    assert seen is not None, "what the session keeps is kept"
    assert seen.state is MachineState.STOPPED
    await driver.destroy(machine.id)
    assert list(place.root.iterdir()) == []


async def test_a_deaf_agent_and_its_children_are_killed(
    place: Place, driver: LocalMachines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator_stub.machines.processes.STOP_GRACE", 0.2)
    machine = await driver.create(spec_for(MODE="deaf"))
    agent, child = await place.pids(machine)
    await driver.destroy(machine.id)
    assert gone(agent)
    assert gone(child)


async def test_a_killed_agent_is_started_again_and_its_orphans_are_not_left(
    place: Place, driver: LocalMachines
) -> None:
    machine = await driver.create(spec_for())
    agent, child = await place.pids(machine)
    (place.directory(machine) / "up").unlink()
    os.kill(agent, signal.SIGKILL)
    again, other_child = await place.pids(machine)
    assert (again, other_child) != (agent, child)
    assert gone(child)
    assert place.exits == [-signal.SIGKILL]
    seen = await driver.inspect(machine.id)
    assert seen is not None
    assert seen.state is MachineState.RUNNING
    assert seen.preview_url == machine.preview_url, "the browser's tab stays good"


async def test_an_agent_that_cannot_run_is_given_up(place: Place) -> None:
    driver = place.driver(restarts=2)
    for mode, ends in (("fails", 3), ("bad settings", 1)):
        place.exits.clear()
        machine = await driver.create(spec_for(MODE=mode))

        async def stopped(machine_id: str = machine.id) -> bool:
            seen = await driver.inspect(machine_id)
            return seen is not None and seen.state is MachineState.STOPPED

        async with asyncio.timeout(15):
            while not await stopped():
                await asyncio.sleep(0.02)
        assert len(place.exits) == ends
        await driver.destroy(machine.id)
    await driver.close()


async def test_another_orchestrator_finds_and_ends_the_machines_of_the_first(place: Place) -> None:
    first = place.driver()
    machine = await first.create(spec_for())
    agent, child = await place.pids(machine)
    await first.close()
    second = place.driver()
    assert [m.id for m in await second.list()] == [machine.id]
    owner = owner_of(machine.name)
    assert owner is not None
    assert (await second.create(spec_for(owner[0]))).id == machine.id, "it adopts what runs"
    assert await place.pids(machine) == [agent, child]
    await second.destroy(machine.id)
    assert gone(agent)
    assert gone(child)
    await second.close()


async def test_a_pid_that_was_given_to_somebody_else_is_never_signalled(place: Place) -> None:
    first = place.driver()
    machine = await first.create(spec_for())
    await place.pids(machine)
    await first.retire(machine.id)
    await first.close()
    path = place.directory(machine) / "machine.json"
    record = json.loads(path.read_text())
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    path.write_text(json.dumps({**record, "pid": stranger.pid}))
    second = place.driver()
    await second.destroy(machine.id)
    assert stranger.returncode is None
    assert psutil.pid_exists(stranger.pid)
    stranger.kill()
    await stranger.wait()
    await second.close()


KILLED = """
    import asyncio, os, signal, sys
    from pathlib import Path
    from uuid import UUID
    from orchestrator_stub.machines import local
    from tests.orchestrator.machines.driver_contract import spec_for

    def killed(pid):
        # The process is there, and nothing says so yet.
        while not Path(f"/proc/{pid}/cwd").exists() or not list(Path(sys.argv[1]).glob("*/up")):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

    local.birth = killed
    driver = local.LocalMachines(Path(sys.argv[1]), environment=os.environ, command=(sys.executable, sys.argv[2]))
    asyncio.run(driver.create(spec_for(of=UUID(sys.argv[3]))))
"""


async def test_an_agent_whose_orchestrator_was_killed_before_it_wrote_the_pid_is_found(place: Place) -> None:
    script = place.root.parent / "killed.py"
    script.write_text(textwrap.dedent(KILLED))
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        str(place.root),
        str(place.agent),
        str(INSTALLATION),
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert await parent.wait() == -signal.SIGKILL
    [directory] = [path for path in place.root.iterdir() if path.is_symlink()]
    agent, child = map(int, (directory / "up").read_text().split())
    assert not gone(agent)
    second = place.driver()
    [machine] = await second.list()
    assert machine.state is MachineState.STOPPED
    owner = owner_of(machine.name)
    assert owner is not None
    # The retry is one machine, and so is the end.
    (directory / "up").unlink()
    assert (await second.create(spec_for(owner[0]))).id == machine.id
    assert gone(agent)
    assert gone(child)
    started = await place.pids(machine)
    await second.destroy(machine.id)
    assert all(gone(pid) for pid in started)
    assert not directory.exists()
    await second.close()


PARENT = """
    import asyncio, os, sys
    from pathlib import Path
    from orchestrator_stub.machines.local import LocalMachines
    from tests.orchestrator.machines.driver_contract import spec_for

    async def main():
        driver = LocalMachines(
            Path(sys.argv[1]), environment=os.environ, command=(sys.executable, sys.argv[2]), tied=True
        )
        await driver.create(spec_for())
        await asyncio.sleep(600)

    asyncio.run(main())
"""


async def test_a_tied_machine_ends_with_a_killed_orchestrator(place: Place) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(PARENT), str(place.root), str(place.agent)
    )
    await until(lambda: list(place.root.glob("*/up")))
    [up] = place.root.glob("*/up")
    agent, child = (int(pid) for pid in up.read_text().split())
    parent.kill()
    await parent.wait()
    await until(lambda: gone(agent) and gone(child))
