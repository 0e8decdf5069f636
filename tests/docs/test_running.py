"""The commands of the documents, run; their queries, asked; their metrics, found on a scrape.

The world is the local stand-in with a project, an agent in shadow mode, and a directory that looks like a checkout.
Only what a reader replaces too is replaced: ports, `…`, the deployed orchestrator's address.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import pytest_asyncio

from tests.docs.commands import Command, Run, all_commands, program_of
from tests.docs.reading import DOCUMENTS, ROOT, Code, blocks
from tests.system.plane import Agent, Plane, Project, eventually, running_plane

pytestmark = [pytest.mark.system, pytest.mark.asyncio(loop_scope="module")]

TO_RUN = list({c.text: c for c in all_commands() if c.ways and isinstance(c.ways[0], Run)}.values())
"""Each once, wherever it stands."""


@dataclass
class World:
    """A project on the stand-in, its agent in shadow mode, and a directory to stand in."""

    plane: Plane
    project: Project
    agent: Agent
    directory: Path
    spare: str
    """A session that a command may end."""

    def told(self, command: str) -> str:
        """`command` as a reader would type it here."""
        environ = self.agent.environ
        for written, real in (
            (r"http://127\.0\.0\.1:(9464|41203)", f"http://127.0.0.1:{self.agent.port}"),
            (r"http://127\.0\.0\.1:5173/\S*", f"http://127.0.0.1:{self.agent.port}/livez"),
            (r"http://127\.0\.0\.1:54321|https://my-orchestrator\.fly\.dev", self.plane.url),
            (r"DATABASE_URL=\S+", "DATABASE_URL=$DATABASE_URL"),
            (r'"project_id": "…"|"project_uuid": "…"', lambda m: m[0].replace("…", environ["PROJECT_ID"])),
            (r"/app/project", str(self.agent.tree)),
            (r"/app(?= |$)", str(self.agent.directory)),
            (r"/var/lib/preview-agent", str(self.agent.directory / "state")),
            # A reader has a .venv of that checkout; one made anew from here would be this directory's for good.
            (r"^make ", "make --old-file=.venv/.ready "),
            (r"my-project\.jsonl", "tests/scenarios/hundred-quick-saves.jsonl"),
        ):
            command = re.sub(written, real, command)  # type: ignore[arg-type, call-overload]
        return command.replace("record tests/scenarios/hundred-quick-saves.jsonl", "record recorded.jsonl")

    def environ(self, command: str) -> dict[str, str]:
        """What the reader's shell has: a machine's environment for the agent, the keys for the rest."""
        base = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.directory),
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
            "DATABASE_URL": self.plane.dsn,
        }
        if "preview-agent" not in command:
            key = self.plane.keys.service_key
            return {**base, "SERVICE_KEY": key, "SUPABASE_SERVICE_ROLE_KEY": key, "SESSION_ID": self.spare}
        machine = {**self.agent.environ, "HEALTH_HOST": "127.0.0.1", "HEALTH_PORT": str(self.agent.port)}
        if "status" in command:
            return base | machine
        # Another machine of the same session's project: its own directories and a port of its own.
        apart = self.directory / "apart"
        dirs = {"PROJECT_DIR": str(apart / "project"), "STATE_DIR": str(apart / "state"), "HEALTH_PORT": "0"}
        mode = {"SYNC_MODE": "shadow", "SUPABASE_SERVICE_ROLE_KEY": "left by the old flow"}
        return base | machine | dirs | (mode if command.startswith("env ") else {"SYNC_MODE": "live"})


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def world(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    directory = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.suffix == ".md":
            shutil.copy(path, directory)
        elif path.name == "docs":
            shutil.copytree(path, directory / "docs")
        elif path.name not in (".git", ".preview-sync"):
            (directory / path.name).symlink_to(path)
    (directory / "scenarios").symlink_to(ROOT / "tests" / "scenarios")
    async with running_plane(module_database, directory) as plane:
        project = await plane.project({"src/App.tsx": "export default 1\n"})
        agent = await project.session(directory / "machine", SYNC_MODE="shadow", SHADOW_SETTLE_SECONDS="1")
        agent.tree.mkdir(parents=True, exist_ok=True)
        agent.environ["PROJECT_DIR"] = str(agent.tree)
        agent.start()
        state = directory / ".preview-sync"
        state.mkdir()
        info = {
            "orchestrator_url": plane.url, "service_key": plane.keys.service_key, "project_id": str(project.id),
        }  # fmt: skip
        (state / "dev.json").write_text(json.dumps(info))

        async def ready() -> bool:
            status = await agent.status()
            return bool(status and status["ready"])

        try:
            await eventually("the agent compares", ready, 30)
            spare = await project.session(directory / "spare")
            yield World(plane, project, agent, directory, str(spare.session_id))
        finally:
            await agent.stop()


async def run(world: World, command: Command, way: Run) -> str:
    """Run it in a shell; what it said. Ctrl-C once it says what it should, if it does not end by itself."""
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", f"exec {world.told(command.text)}" if way.until else world.told(command.text),
        cwd=world.directory, env=world.environ(command.text), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = b""
    try:
        async with asyncio.timeout(60):
            while chunk := await process.stdout.read(65536):
                said += chunk
                if way.until and re.search(way.until, said.decode(errors="replace")):
                    process.send_signal(signal.SIGINT)
            code = await process.wait()
    except TimeoutError:
        raise AssertionError(f"{command.id} did not end; it said: {said.decode(errors='replace')}") from None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    text = said.decode(errors="replace")
    if way.unless and re.search(way.unless, text):
        pytest.skip(f"{command.text}: {text.strip()}")
    if way.until:
        assert code in (0, 130, -signal.SIGINT), text
        assert re.search(way.until, text), text
    else:
        assert code == way.exit, text
    return text


@pytest.mark.parametrize("command", TO_RUN, ids=lambda c: c.id)
async def test_it_runs(world: World, command: Command) -> None:
    way = command.ways[0]
    assert isinstance(way, Run)
    program = program_of(command.text)
    if shutil.which(program) is None and program not in ("preview-agent", "preview-orchestrator"):
        pytest.skip(f"{program} is not installed here")
    saving = asyncio.create_task(keep_saving(world)) if "tail" in command.text else None
    try:
        said = await run(world, command, way)
    finally:
        if saving is not None:
            saving.cancel()
    if way.says:
        assert re.search(way.says, said, re.M), said


async def test_no_command_installs_anything_from_here(world: World) -> None:
    """A package that is installed from this directory stays installed from it when it is gone."""
    ready = ROOT / ".venv" / ".ready"
    if not ready.exists():
        pytest.skip("this environment is not one that make made")
    before = ready.stat().st_mtime_ns
    project = world.directory / "pyproject.toml"
    project.unlink()
    shutil.copyfile(ROOT / "pyproject.toml", project)  # newer than .ready
    [rooms] = [command for command in TO_RUN if command.text == "make rooms"]
    await run(world, rooms, Run())
    assert ready.stat().st_mtime_ns == before


async def keep_saving(world: World) -> None:
    """Somebody types, for those who listen."""
    for number in range(10_000):
        await world.project.save("src/typed.ts", f"{number}\n")
        await asyncio.sleep(0.2)


SQL = [block for path in DOCUMENTS for block in blocks(path) if block.lang == "sql"]
PROMQL = [
    (block.place, line)
    for path in DOCUMENTS
    for block in blocks(path)
    if block.lang == "promql"
    for line in block.text.splitlines()
]


@pytest.mark.parametrize("block", SQL, ids=lambda b: b.place)
async def test_queries_are_answered(world: World, block: Code) -> None:
    async with await psycopg.AsyncConnection.connect(world.plane.dsn) as connection:
        for statement in block.text.rstrip().rstrip(";").split(";\n"):
            cursor = await connection.execute(statement)
            assert cursor.description is not None
        await connection.rollback()


async def test_every_metric_that_is_named_is_served(world: World, tmp_path: Path) -> None:
    live = await world.project.session(tmp_path / "live")
    live.start()
    try:
        await eventually("a live agent follows", live.status, 30)
        served = "\n".join(
            [await world.agent.metrics(), await live.metrics(), (await world.plane.http.get("/metrics")).text]
        )
    finally:
        await live.stop()
    known = set(re.findall(r"(?m)^# TYPE (preview_\w+)", served))
    known |= {name + suffix for name in known for suffix in ("_bucket", "_sum", "_count")}
    named = {
        (path.name, name)
        for path in DOCUMENTS
        for name in re.findall(r"\bpreview_(?:agent|orchestrator)_\w+", path.read_text())
        if not name.endswith("_")
    }
    assert sorted(each for each in named if each[1] not in known) == []


@pytest.mark.parametrize(("place", "query"), PROMQL, ids=[f"{place} {query[:40]}" for place, query in PROMQL])
async def test_prometheus_reads_the_query(place: str, query: str, tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed here")
    rules = {"groups": [{"name": "documents", "rules": [{"alert": "Documented", "expr": query}]}]}
    (tmp_path / "rules.yml").write_text(json.dumps(rules))
    checked = await asyncio.to_thread(
        subprocess.run, ["promtool", "check", "rules", str(tmp_path / "rules.yml")], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert checked.returncode == 0, f"{place}: {checked.stderr}"
