"""The parts of `cold` that have no page: memory of unpacking, saves beside packing, many sessions of one template."""

from __future__ import annotations

import asyncio
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from uuid import uuid4

import httpx
from psycopg import AsyncConnection
from psycopg.types.json import Jsonb

from agent.modules import archive
from agent.modules.layers import command
from bench.cases.start import free_port, plane
from bench.harness.results import Row, ratio_of
from orchestrator_stub.machines.driver import MachineSpec
from orchestrator_stub.modules.layers import BUCKET, SHARED
from tests.system.plane import Plane, Project, eventually

SAVES = 150
"""Of each half of a round. The 99th percentile of all of them is of 300 and more."""
KEY = "c" * 40
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Runs a program and prints its peak in KiB. A child's peak begins with that of who started it, so it starts small."""


def aside(directory: Path) -> None:
    """Put what a round made out of the next one's way; it is removed with all that the measurement made.

    Half a minute after 20,000 files were removed, an ext4 without a journal looks through their inodes whenever it
    makes one: unpacking took 20 s in place of one, and npm was as slow.
    """
    directory.rename(tempfile.mkdtemp(dir=directory.parent) + "/done")


def _installed(files: Mapping[str, str], directory: Path) -> Path:
    """The project with its node_modules, as `npm ci` makes them."""
    directory.mkdir()
    for name in ("package.json", "package-lock.json"):
        (directory / name).write_text(files[name])
    flags = ("--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline")
    subprocess.run(["npm", "ci", *flags], cwd=directory, check=True, capture_output=True)
    return directory


async def unpacking(quick: bool, files: Mapping[str, str], directory: Path) -> list[Row]:
    """Peak resident memory of the program that unpacks a layer."""
    return await asyncio.to_thread(_unpacking, 1 if quick else 3, files, directory)


def _unpacking(rounds: int, files: Mapping[str, str], directory: Path) -> list[Row]:
    packed = directory / "layer"
    with packed.open("wb") as file:
        archive.pack(str(_installed(files, directory / "app")), file)
    peaks: list[float] = []
    seconds: list[float] = []
    for number in range(rounds):
        target = directory / f"unpacked-{number}"
        target.mkdir()
        with packed.open("rb") as source:
            began = time.monotonic()
            argv = (sys.executable, "-S", "-c", PEAK, *command("unpack", str(target)))
            done = subprocess.run(argv, stdin=source, capture_output=True, text=True, check=True)
            seconds.append(time.monotonic() - began)
        peaks.append(int(done.stdout) / 1024)
    note = f"{packed.stat().st_size / 1e6:.0f} MB, unpacked in {min(seconds):.1f} s"
    row = Row("memory of unpacking a layer", max(peaks), "MiB", sense="memory", at_most=32.0, note=note)
    return [row]


async def packing(quick: bool, files: Mapping[str, str], directory: Path) -> list[Row]:
    """The 99th percentile from a save to its file, while a layer is packed and while none is."""
    rounds = 2 if quick else 6
    app = await asyncio.to_thread(_installed, files, directory / "app")
    beside: list[float] = []
    alone: list[float] = []
    async with plane(directory) as one:
        project = await one.project({"a.txt": "0"})
        agent = await project.session(directory / "machine", LOG_FORMAT="json", DEV_COMMAND="sleep 600")
        agent.environ["DEV_PORT"] = str(free_port())
        agent.start()
        try:
            path = agent.tree / "a.txt"
            await eventually("the agent follows", partial(asyncio.to_thread, _equal, path, "0"), 60)
            await _saves(project, path, SAVES)
            for _ in range(rounds):
                alone.append(statistics.quantiles(await _saves(project, path, SAVES), n=100)[98])
                packs = asyncio.create_task(_packs(app))
                try:
                    beside.append(statistics.quantiles(await _saves(project, path, SAVES), n=100)[98])
                finally:
                    packs.cancel()
                    await asyncio.wait({packs})
        finally:
            await agent.stop()
    return [
        Row(
            "a save to its file while a layer is packed, p99", 1000 * statistics.median(beside), "ms",
            "while none is", 1000 * statistics.median(alone), ratio_of(beside, alone), at_most=1.2, samples=rounds,
            note=f"{SAVES} saves a round",
        )
    ]  # fmt: skip


def _equal(path: Path, content: str) -> bool:
    return path.exists() and path.read_text() == content


async def _saves(project: Project, path: Path, count: int) -> list[float]:
    """Seconds from each save's sending to its file."""
    taken = []
    for _ in range(count):
        content = uuid4().hex
        began = time.monotonic()
        saved = asyncio.create_task(project.save("a.txt", content))
        while path.read_text() != content:  # noqa: ASYNC110, ASYNC240 - it looks from outside, at a file in memory
            await asyncio.sleep(0.0002)
        taken.append(time.monotonic() - began)
        await saved
    return taken


async def _packs(app: Path) -> None:
    """Pack, and again, until cancelled: as an agent has it done, into a file without a name."""
    stamp = app.parent / "stamp"
    while True:
        stamp.touch()
        with (app.parent / "packed").open("wb") as file:
            program = await asyncio.create_subprocess_exec(*command("pack", str(app), str(stamp)), stdin=file)
            try:
                await program.wait()
            finally:
                if program.returncode is None:
                    program.kill()
                    await program.wait()


async def sessions(quick: bool, files: Mapping[str, str], directory: Path) -> list[Row]:
    """Seconds of a session, from its creation until its machine has read the template's layer, at 20 and 40 a second.

    What a machine does by itself is a processor's of its own; what sessions share is the orchestrator, its database and
    Storage.
    """
    rounds = 1 if quick else 5
    few: list[float] = []
    many: list[float] = []
    # One client stands for all machines: making one costs its processor 17 ms, and here it would be the orchestrator's.
    async with plane(directory) as one, httpx.AsyncClient(trust_env=False) as machine:
        await _share(one, os.urandom(2**20))
        projects = [await one.project({"package.json": files["package.json"]}) for _ in range(40)]
        await _burst(projects[:20], machine)
        for _ in range(rounds):
            few.append(await _burst(projects[:20], machine))
            many.append(await _burst(projects, machine))
    return [
        Row(
            "a session of a template, of 40 begun in a second", 1000 * statistics.median(many), "ms",
            "of 20", 1000 * statistics.median(few), ratio_of(many, few), at_most=2.2, samples=rounds,
            note="created, and the layer's first part read",
        )
    ]  # fmt: skip


async def _share(one: Plane, content: bytes) -> None:
    """A shared layer, as `modules build` makes it."""
    part = io.BytesIO(content)
    async with await AsyncConnection.connect(one.dsn, autocommit=True) as connection:
        kept = Jsonb([{"sha256": "0" * 64, "size": len(content)}])
        query = "insert into preview.modules (key, parts, size_bytes) values (%s, %s, %s) returning id"
        row = await (await connection.execute(query, (KEY, kept, len(content)))).fetchone()
    assert row is not None
    answer = await one.http.post(
        f"/storage/v1/object/{BUCKET}/{SHARED}/{KEY}/{row[0]}.0", content=part.read()
    )
    assert answer.is_success, answer.text


async def _spec(one: Plane, session_id: str) -> MachineSpec | None:
    return next((spec for spec in one.driver.made.values() if str(spec.session_id) == session_id), None)


async def _burst(projects: list[Project], machine: httpx.AsyncClient) -> float:
    """Sessions begun one after the other within a second; the mean of what each took."""

    async def one(project: Project, delay: float) -> float:
        await asyncio.sleep(delay)
        began = time.monotonic()
        http = project.plane.http
        answer = await http.post(
            "/v1/sessions", json={"project_id": str(project.id)}, headers={"Idempotency-Key": uuid4().hex}
        )
        assert answer.is_success, answer.text
        session = answer.json()
        spec = await eventually(
            "its machine is made", partial(_spec, project.plane, session["session_id"]), 60
        )
        bearer = {"authorization": f"Bearer {spec.env['REALTIME_TOKEN']}"}
        path = f"/v1/sessions/{session['session_id']}/modules"
        found = (await http.post(path, json={"key": KEY}, headers=bearer)).json()
        assert (await machine.get(found["parts"][0]["url"])).is_success
        taken = time.monotonic() - began
        assert (await http.delete(f"/v1/sessions/{session['session_id']}")).is_success
        return taken

    step = 1 / len(projects)
    return statistics.mean(await asyncio.gather(*(one(p, n * step) for n, p in enumerate(projects))))
