"""Measures a project's opening: from the session's creation to the first page, against `npm ci && vite` by hand.

The project is `examples/typical-app` (62 dependencies, 257 MB of node_modules). Ours is a new session on an empty
machine, whose layer an earlier session sent; by hand it is a fresh copy of the same files, with npm's cache empty or
filled. *One dependency more* gives ours a layer that lacks one package, so that npm installs on top of it. Contestants
take turns; each asks from outside for `/` until it answers 200.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import structlog

from bench.cases.idle import REPOSITORY
from bench.cases.start import first_page, free_port, plane, said
from bench.harness.results import Row, Unmeasurable, ratio_of
from tests.system.plane import Plane, Project, eventually

EXAMPLE = REPOSITORY / "examples" / "typical-app"
LEFT_OUT = "zod"
"""The dependency that is one more."""
PATIENCE = 600.0
"""Seconds for a page: an install on a cold cache and a busy machine takes minutes."""
FLAGS = ("--no-audit", "--no-fund", "--ignore-scripts")


def _files(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "node_modules" not in path.parts
    }


def _by_hand(files: Mapping[str, str], directory: Path, cache: Path) -> float:
    """Seconds of `npm ci && vite` in a fresh copy, to the first page."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    port = free_port()
    began = time.monotonic()
    install = ["npm", "ci", *FLAGS, "--prefer-offline", f"--cache={cache}"]
    subprocess.run(install, cwd=directory, check=True, capture_output=True)
    vite = subprocess.Popen(
        [directory / "node_modules/.bin/vite", "--host", "127.0.0.1", "--port", str(port), "--strictPort"],
        cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return first_page(port, lambda: vite.poll() is not None, PATIENCE) - began
    finally:
        os.killpg(vite.pid, signal.SIGKILL)
        vite.wait()
        shutil.rmtree(directory)


def _home() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in ("HOME", "npm_config_registry")}


async def _session(project: Project, directory: Path, cache: Path, until: str) -> float:
    """Seconds from asking for a session to its first page. Stays until the agent's log has `until`."""
    began = time.monotonic()
    agent = await project.session(directory, LOG_FORMAT="json", npm_config_cache=str(cache), **_home())
    agent.environ["DEV_PORT"] = str(port := free_port())
    agent.start()
    try:
        assert agent.process is not None
        gone = partial(_is_gone, agent.process)
        taken = await asyncio.to_thread(first_page, port, gone, PATIENCE) - began
        await eventually(until, partial(said, agent, until), PATIENCE)
    finally:
        await agent.stop()
        shutil.rmtree(directory)
    return taken


def _is_gone(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


def _without(files: Mapping[str, str], directory: Path) -> dict[str, str]:
    """The same project with one dependency less, its lock file too."""
    directory.mkdir()
    for name in ("package.json", "package-lock.json"):
        (directory / name).write_text(files[name])
    remove = ["npm", "uninstall", LEFT_OUT, "--package-lock-only", *FLAGS]
    subprocess.run(remove, cwd=directory, check=True, capture_output=True)
    return {**files, **_files(directory)}


async def _changed(one: Plane, files: Mapping[str, str], directory: Path, cache: Path) -> float:
    """Seconds to the first page of a project that has a layer, and then one dependency more."""
    project = await one.project(_without(files, directory / "less"))
    shutil.rmtree(directory / "less")
    await _session(project, directory / "before", cache, '"modules.sent"')
    await project.bulk({name: files[name] for name in ("package.json", "package-lock.json")})
    return await _session(project, directory / "after", cache, '"head_start"')


async def _measure(quick: bool) -> list[Row]:
    rounds = 1 if quick else 7
    files = _files(EXAMPLE)
    ours: list[float] = []
    changed: list[float] = []
    cold: list[float] = []
    warm: list[float] = []
    with tempfile.TemporaryDirectory(prefix="preview-bench-") as name:
        directory = Path(name)
        async with plane(directory) as one:
            project = await one.project(files)
            filled = directory / "cache"
            await _session(project, directory / "first", filled, '"modules.sent"')
            await asyncio.to_thread(_by_hand, files, directory / "hand", filled)
            for number in range(rounds):
                empty = directory / f"cache-{number}"
                ours.append(await _session(project, directory / "ours", empty, '"modules.used"'))
                cold.append(await asyncio.to_thread(_by_hand, files, directory / "hand", empty))
                shutil.rmtree(empty)
                warm.append(await asyncio.to_thread(_by_hand, files, directory / "hand", filled))
                changed.append(await _changed(one, files, directory, filled))
    note = "62 dependencies, 257 MB"
    return [
        Row(
            "creation to first page, cold cache", median(ours), "s", "npm ci && vite", median(cold),
            ratio_of(ours, cold), at_most=0.25, samples=rounds, note=note,
        ),
        Row(
            "creation to first page, warm cache", median(ours), "s", "npm ci && vite", median(warm),
            ratio_of(ours, warm), at_most=0.4, samples=rounds, note=note,
        ),
        Row(
            "the same with one dependency more", median(changed), "s", "npm ci && vite", median(warm),
            ratio_of(changed, warm), at_most=0.5, samples=rounds, note="warm cache",
        ),
    ]  # fmt: skip


def run(quick: bool) -> Sequence[Row]:
    """Creation to first page. Raises `Unmeasurable` without Node and npm."""
    if shutil.which("npm") is None:
        raise Unmeasurable("Node and npm are needed")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    assert json.loads((EXAMPLE / "package.json").read_text())["dependencies"][LEFT_OUT]
    return asyncio.run(_measure(quick))
