"""The container driver against an engine of our own; `make test-image` runs the same on a real one."""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from orchestrator_stub.machines.container import ContainerMachines
from orchestrator_stub.machines.driver import MachineRefused, MachineState
from tests.fakes import engine as fake_engine
from tests.orchestrator.machines.driver_contract import DriverContract, spec_for

IMAGE = "localhost/preview-sync-test-sleep"


def rootfs(*programs: str) -> bytes:
    """A root file system of these programs and the libraries they need."""
    files = {Path(str(shutil.which(program))) for program in programs}
    for program in tuple(files):
        for word in subprocess.run(["ldd", program], capture_output=True, text=True).stdout.split():
            if word.startswith("/"):
                files.add(Path(word))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for file in files:
            archive.add(file.resolve(), arcname=str(file).lstrip("/"))
    return packed.getvalue()


LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1000:1000")
"""Podman asks for a million open files and processes when root runs it. Root without CAP_SYS_RESOURCE may not raise
its hard limits, and runc ends with `error setting rlimit type 7` (files), then 6 (processes): not permitted."""


def working_engine() -> tuple[str, tuple[str, ...]] | str:
    """An engine that runs containers here and the options it needs, with the image imported; else why there is none."""
    why = "neither podman nor docker is here"
    for cli in ("podman", "docker"):
        if shutil.which(cli) is None:
            continue
        packed = rootfs("sleep", "sh")
        done = subprocess.run([cli, "import", "-", IMAGE], input=packed, capture_output=True, timeout=60)
        for options in ((), LIMITS) if done.returncode == 0 else ():
            tried = ["run", "--rm", "--pull", "never", "--publish", "127.0.0.1::5173", *options, IMAGE]
            done = subprocess.run([cli, *tried, "sleep", "0"], capture_output=True, timeout=60)
            if done.returncode == 0:
                return cli, options
        why = f"{cli}: {done.stderr.decode(errors='replace').strip()[-300:]}"
    return why


@dataclass(frozen=True)
class Engine:
    """A container engine's command, and the options without which it runs nothing here."""

    cli: str
    options: tuple[str, ...] = ()


@pytest.fixture(scope="module", params=["fake", "fake, with docker's hints", "real"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """The fake engine, and a real one where one works."""
    if request.param == "real":
        if os.environ.get("PREVIEW_TEST_IMAGE") != "build":
            pytest.skip("`make test-image` runs these on a real engine")
        found = working_engine()
        if isinstance(found, str):
            pytest.skip(f"no container engine runs containers here: {found}")
        yield Engine(*found)
        subprocess.run([found[0], "rmi", "--force", IMAGE], capture_output=True, timeout=60)
        return
    hints = request.param != "fake"
    yield Engine(fake_engine.install(tmp_path_factory.mktemp("engine"), hints=hints))


@pytest.fixture
async def driver(engine: Engine) -> AsyncIterator[ContainerMachines]:
    # The shell is PID 1 and ends on SIGTERM; `sleep` alone would have to be killed.
    script = "trap 'exit 0' TERM; while :; do sleep 0.1; done"
    made = ContainerMachines(IMAGE, cli=engine.cli, options=engine.options, command=("sh", "-c", script))
    yield made
    for machine in await made.list():
        await made.destroy(machine.id)


async def call(engine: Engine, *arguments: str, **environ: str) -> str:
    process = await asyncio.create_subprocess_exec(
        engine.cli, *arguments, stdout=asyncio.subprocess.PIPE, env={**os.environ, **environ}
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


class TestContainer(DriverContract):
    """The suite of every driver. `driver` is the module's."""


async def test_the_secrets_are_in_the_container_and_on_no_command_line(
    engine: Engine, driver: ContainerMachines
) -> None:
    spec = spec_for(REALTIME_TOKEN="a-token-that-ps-must-not-show")
    assert "a-token-that-ps-must-not-show" not in " ".join(driver._creation(spec))
    machine = await driver.create(spec)
    [shown] = json.loads(await call(engine, "inspect", machine.id))
    assert "REALTIME_TOKEN=a-token-that-ps-must-not-show" in shown["Config"]["Env"]
    assert machine.preview_url is not None
    assert machine.health_url is not None
    assert machine.state is MachineState.RUNNING


async def test_an_image_that_is_not_there_is_refused(engine: Engine) -> None:
    driver = ContainerMachines("localhost/no-such-image-of-ours", cli=engine.cli)
    with pytest.raises(MachineRefused):
        await driver.create(spec_for())


async def test_a_machine_s_own_image_is_the_one_it_is_made_of(engine: Engine) -> None:
    driver = ContainerMachines("localhost/no-such-image-of-ours", cli=engine.cli, options=engine.options,
                               command=("sleep", "100"))  # fmt: skip
    machine = await driver.create(replace(spec_for(), image=IMAGE))
    assert machine.state is MachineState.RUNNING
    await driver.destroy(machine.id)


async def test_an_adopted_container_that_stands_still_is_started(
    engine: Engine, driver: ContainerMachines
) -> None:
    spec = spec_for()
    machine = await driver.create(spec)
    await call(engine, "stop", "--time", "1", machine.id)
    assert (await driver.create(spec)).state is MachineState.RUNNING


async def test_a_container_that_never_started_is_started_at_the_next_try(
    engine: Engine, driver: ContainerMachines
) -> None:
    """What is left when the engine made a container and could not start it, or was killed between the two."""
    spec = spec_for(REALTIME_TOKEN="t")
    creation = [word for word in driver._creation(spec) if word != "--detach"][1:]
    await call(engine, "create", *creation, **spec.env)
    left = await driver.inspect(spec.name)
    assert left is not None
    assert left.state is MachineState.STOPPED
    assert (await driver.create(spec)).state is MachineState.RUNNING


def test_no_engine_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MachineRefused, match="neither podman nor docker"):
        ContainerMachines("image")
