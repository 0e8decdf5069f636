"""The image people deploy: built, run, edited into, looked into, stopped.

`make test-image` builds it and runs these; elsewhere they are skipped with the reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from agent.project import reading
from tests.agent.conftest import EXAMPLE
from tests.image.engine import TAG, Engine
from tests.package.checkout import copy_checkout, make_wheel
from tests.ports import free_port
from tests.system.plane import Project, eventually, running_plane

pytestmark = pytest.mark.image
UPDATED = "localhost/preview-agent:updated"


@dataclass
class Container:
    """One running container of the image."""

    engine: Engine
    name: str
    dev_port: int
    health_port: int

    def sh(self, script: str, *flags: str, check: bool = True) -> str:
        """Run `script` inside; what it printed on either stream."""
        done = self.engine.call("exec", *flags, self.name, "sh", "-c", f"{{ {script}; }} 2>&1", check=check)
        return done.stdout

    def stop(self, signal: str = "TERM") -> tuple[int, float]:
        """Ask PID 1 to end; its exit code and the seconds it took."""
        began = time.monotonic()
        self.engine.call("kill", "--signal", signal, self.name)
        code = int(self.engine.call("wait", self.name).stdout)
        return code, time.monotonic() - began

    def log(self) -> str:
        done = self.engine.call("logs", self.name, check=False)
        return done.stdout + done.stderr

    async def status(self) -> dict[str, Any]:
        async with httpx.AsyncClient(trust_env=False) as http:
            told: dict[str, Any] = (await http.get(f"http://127.0.0.1:{self.health_port}/status")).json()
            return told

    async def ready(self) -> bool:
        assert (
            self.engine.call("inspect", "--format", "{{.State.Running}}", self.name).stdout.strip() == "true"
        ), self.log()
        try:
            async with httpx.AsyncClient(trust_env=False) as http:
                return (await http.get(f"http://127.0.0.1:{self.health_port}/readyz")).status_code == 200
        except httpx.HTTPError:
            return False

    async def serves(self, path: str, text: str) -> bool:
        async with httpx.AsyncClient(trust_env=False) as http:
            return text in (await http.get(f"http://127.0.0.1:{self.dev_port}{path}")).text


@pytest.fixture
async def edited(database: str, tmp_path: Path, engine: Engine) -> AsyncIterator[Project]:
    """The example as a project in the database, beside everything the agent talks to."""
    files = {
        str(path.relative_to(EXAMPLE)): path.read_text()
        for path in sorted(EXAMPLE.rglob("*"))
        if path.is_file() and not {"node_modules", "dist"} & set(path.parts)
    }
    async with running_plane(database, tmp_path) as plane:
        yield await plane.project(files)


@pytest.fixture
async def container(edited: Project, engine: Engine) -> AsyncIterator[Container]:
    """The image, started as a machine of a session would be."""
    answer = await edited.plane.http.post("/v1/sessions", json={"project_id": str(edited.id)})
    spec = edited.plane.driver.made[answer.json()["machine"]["id"]]
    running = Container(engine, f"preview-test-{uuid4().hex[:8]}", free_port(), free_port())
    environ = {**spec.env, "DEV_PORT": str(running.dev_port), "HEALTH_PORT": str(running.health_port)}
    variables = [word for name, value in environ.items() for word in ("--env", f"{name}={value}")]
    engine.call("run", "--detach", "--name", running.name, *engine.run_flags, *variables, TAG)
    try:
        yield running
    finally:
        engine.call("rm", "--force", running.name, check=False)


def test_what_is_in_it(engine: Engine) -> None:
    (told,) = json.loads(engine.call("image", "inspect", TAG).stdout)
    config = told["Config"]
    assert config["Entrypoint"] == ["/usr/local/bin/entrypoint.sh"]
    assert "DEV_USER=preview" in config["Env"]
    assert not [
        line for line in config["Env"] if any(word in line for word in ("TOKEN", "SECRET", "KEY", "CERT"))
    ]
    assert "/readyz" in json.dumps(told.get("Healthcheck") or config.get("Healthcheck"))
    inside = (
        "for tool in cc gcc g++ make pip pip3; do command -v $tool; done; id -u preview; "
        "stat -c '%U %a' /var/lib/preview-agent /app/project /app/project/node_modules; "
        "cat /app/project/node_modules/.preview-install.json; ls -A /app/project; node --version"
    )
    said = engine.call(
        "run", "--rm", *engine.run_flags, "--entrypoint", "sh", TAG, "-c", inside
    ).stdout.splitlines()
    wanted = reading.dependencies(EXAMPLE)
    assert said[:-1] == [
        "10001", "root 700", "preview 755", "preview 755", f'{{"key": "{wanted.key}"}}', "node_modules",
    ]  # fmt: skip


def test_an_update_of_the_agent_moves_neither_node_nor_the_template(engine: Engine, tmp_path: Path) -> None:
    """A machine that has the image already fetches the layers of the agent, of 30 MB, and nothing else."""

    def layers(tag: str) -> list[str]:
        (told,) = json.loads(engine.call("image", "inspect", tag).stdout)
        return list(told["RootFS"]["Layers"])

    checkout = copy_checkout(tmp_path / "checkout")
    with (checkout / "agent/__init__.py").open("a") as file:
        file.write(f"UPDATE = {str(uuid4())!r}\n")
    engine.build(UPDATED, context=checkout)
    try:
        before, after = layers(TAG), layers(UPDATED)
    finally:
        engine.call("rmi", UPDATED, check=False)
    assert len(before) == len(after)
    assert before[:-1] == after[:-1], "Debian, Node and Python, the template, the entry point"
    assert before[-1] != after[-1]


def test_how_large_it_is(engine: Engine) -> None:
    """Fetched by each machine that has none: 378 MB, of which Debian and Node are 247."""
    assert int(engine.call("image", "inspect", "--format", "{{.Size}}", TAG).stdout) <= 450e6


def test_the_agent_is_the_wheel_and_the_control_plane_is_not_there(engine: Engine, tmp_path: Path) -> None:
    with zipfile.ZipFile(make_wheel(copy_checkout(tmp_path / "checkout"))) as wheel:
        wanted = {name: hashlib.sha256(wheel.read(name)).hexdigest() for name in wheel.namelist()}
    inside = (
        "cd /opt/preview-agent/lib/python3*/site-packages && ls -d orchestrator_stub ../../../bin/preview-orchestrator;"
        " find agent preview_sync-*.dist-info -type f ! -name '*.pyc' -exec sha256sum {} +"
    )
    said = engine.call("run", "--rm", *engine.run_flags, "--entrypoint", "sh", TAG, "-c", inside)
    assert said.stderr.count("No such file or directory") == 2
    installed = {name: digest for digest, name in (line.split() for line in said.stdout.splitlines())}
    written_by_pip = {name for name in installed if name.endswith(("/RECORD", "/INSTALLER", "/REQUESTED"))}
    written_by_pip |= {name for name in installed if name.endswith("/direct_url.json")}
    for names in (wanted, installed):
        for name in [*names]:
            if name in written_by_pip or name.startswith("orchestrator_stub/"):
                del names[name]
    assert installed == wanted
    assert len([name for name in installed if name.startswith("agent/")]) > 50


def test_missing_settings_end_the_start_with_64_and_a_line_each(engine: Engine) -> None:
    done = engine.call("run", "--rm", *engine.run_flags, TAG, check=False)
    assert done.returncode == 64
    said = done.stdout + done.stderr
    assert "PROJECT_ID: is required" in said
    assert "SESSION_ID: is required" in said
    assert "Traceback" not in said


async def test_a_save_reaches_the_screen_and_the_stop_is_clean(container: Container, edited: Project) -> None:
    began = time.monotonic()
    await eventually("the preview is ready", container.ready, 60)
    print(f"\nready after {time.monotonic() - began:.2f} s, seen from outside")
    status = await container.status()
    assert status["dev_server"]["install"]["result"] == "current", "the baked node_modules fits"
    app = (EXAMPLE / "src" / "App.tsx").read_text()
    await edited.save("src/App.tsx", app.replace("Somebody left the light on", "Nobody did"))
    await eventually("the new text is served", lambda: container.serves("/src/App.tsx", "Nobody did"))

    # PID 1 is the agent, and it reaps.
    assert "preview-agent" in container.sh("tr '\\0' ' ' </proc/1/cmdline")
    orphans = "for i in $(seq 200); do (setsid sleep 0.2 &); done; sleep 0.5"
    await asyncio.to_thread(container.sh, orphans)
    count = "cat /proc/[0-9]*/stat 2>/dev/null | grep -c ') Z 1 ' || true"

    async def no_zombies() -> bool:
        return (await asyncio.to_thread(container.sh, count)).strip() == "0"

    await eventually("200 orphans are reaped", no_zombies, 20)

    # The project's user is not the agent, and cannot look at it.
    owners = container.sh("for p in /proc/[0-9]*; do echo $(stat -c %u $p) $(tr '\\0' ' ' <$p/cmdline); done")
    servers = [
        line.split()[0]
        for line in owners.splitlines()
        if "bin/vite" in line and "agent.devserver.guard" not in line
    ]
    assert servers == ["10001"], owners
    for look in ("cat /proc/1/environ", "cat /proc/1/mem", "ls /var/lib/preview-agent", "kill -0 1"):
        refused = container.sh(look, "--user", "preview", check=False)
        assert "denied" in refused or "not permitted" in refused, (look, refused)

    code, seconds = await asyncio.to_thread(container.stop)
    print(f"stopped with {code} after {seconds:.2f} s")
    assert code == 0, container.log()
    assert seconds < 5
    assert "Traceback" not in container.log()


@pytest.mark.parametrize("signal", ["INT", "HUP", "QUIT"])
async def test_every_signal_that_means_stop_stops_it(container: Container, signal: str) -> None:
    await eventually("the preview is ready", container.ready, 60)
    code, seconds = await asyncio.to_thread(container.stop, signal)
    assert (code, seconds < 5) == (0, True), container.log()


async def test_a_restarted_container_goes_on_with_what_it_had(container: Container) -> None:
    await eventually("the preview is ready", container.ready, 60)
    await asyncio.to_thread(container.engine.call, "restart", "--time", "10", container.name)
    began = time.monotonic()
    await eventually("the preview is ready again", container.ready, 60)
    print(f"\nready {time.monotonic() - began:.2f} s after the restart")
    assert "hydrate.resumed" in container.log()


async def test_check_tells_what_there_is(container: Container) -> None:
    await eventually("the preview is ready", container.ready, 60)
    said = await asyncio.to_thread(container.sh, "preview-agent check", check=False)
    for line in (
        "ok    settings",
        "ok    isolation     runs as preview",
        "ok    node",
        "ok    realtime",
        "ok    snapshot",
    ):
        assert line in said, said
    assert "Traceback" not in said
