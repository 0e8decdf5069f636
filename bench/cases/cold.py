"""Measures a project's opening: from the session's creation to the first page, against `npm ci && vite` by hand.

The project is `examples/typical-app` (62 dependencies, 257 MB of node_modules). Ours is a new session on an empty
machine, whose layer an earlier session sent; by hand it is a fresh copy of the same files, with npm's cache empty or
filled. *One dependency more* gives ours a layer that lacks one package, so that npm installs on top of it. Contestants
take turns; each asks from outside for `/` until it answers 200. `--only` takes the name of a part:

    page      cold and warm cache, and one dependency more
    network   the cold cache again, where everything comes over 100 Mbit/s and 20 ms (the rate alone without netem)
    dev       `preview-orchestrator dev` a second time: to a page whose modules are all there
    unpack    memory of the program that unpacks
    packing   a save to its file while a layer is packed, against the same while none is
    sessions  sessions of one template begun at 20 and 40 a second

Where others remove files on the same disk meanwhile, an ext4 without a journal makes files some twenty times slower:
`TMPDIR=/dev/shm` measures without it.
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
import tempfile
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import httpx
import structlog

from bench.cases.cold_parts import aside, packing, sessions, unpacking
from bench.cases.idle import REPOSITORY
from bench.cases.start import first_page, free_port, plane, said
from bench.harness.far_network import Far, far_network
from bench.harness.results import Row, Unmeasurable, ratio_of
from tests.system.plane import Plane, Project, eventually
from tests.system.stack import Stack

EXAMPLE = REPOSITORY / "examples" / "typical-app"
LEFT_OUT = "zod"
"""The dependency that is one more."""
PATIENCE = 240.0
"""Seconds for a page: an install on a cold cache and a busy machine takes minutes."""
FLAGS = ("--no-audit", "--no-fund", "--ignore-scripts")
NOTE = "62 dependencies, 257 MB"
_MODULE = re.compile(r"""(?:from|import|src=)\s*\(?["'](/[^"']+)["']""")


def _files(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): path.read_text()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and "node_modules" not in path.parts
    }


def _by_hand(files: Mapping[str, str], directory: Path, cache: Path, far: Far | None = None) -> float:
    """Seconds of `npm ci && vite` in a fresh copy, to the first page."""
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(content)
    port, prefix = free_port(), far.prefix if far else ()
    host = far.there if far else "127.0.0.1"
    began = time.monotonic()
    install = [*prefix, "npm", "ci", *FLAGS, "--prefer-offline", f"--cache={cache}"]
    subprocess.run(install, cwd=directory, check=True, capture_output=True)
    vite = subprocess.Popen(
        [*prefix, directory / "node_modules/.bin/vite", "--host", host, "--port", str(port), "--strictPort"],
        cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        return first_page(port, lambda: vite.poll() is not None, PATIENCE, host) - began
    finally:
        os.killpg(vite.pid, signal.SIGKILL)
        vite.wait()
        aside(directory)


def _home() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name in ("HOME", "npm_config_registry")}


async def _session(
    project: Project, directory: Path, cache: Path, until: Sequence[str], far: Far | None = None
) -> float:
    """Seconds from asking for a session to its first page. Stays until the agent's log has all of `until`."""
    began = time.monotonic()
    agent = await project.session(directory, LOG_FORMAT="json", npm_config_cache=str(cache), **_home())
    agent.environ["DEV_PORT"] = str(port := free_port())
    host = "127.0.0.1"
    if far is not None:
        agent.environ["DEV_HOST"] = host = far.there
        agent.python = str(_python_there(directory, far))
    agent.start()
    try:
        assert agent.process is not None
        gone = partial(_is_gone, agent.process)
        taken = await asyncio.to_thread(first_page, port, gone, PATIENCE, host) - began
        for each in until:
            await eventually(each, partial(said, agent, each), PATIENCE)
    except (RuntimeError, AssertionError) as error:
        raise RuntimeError(f"{error or 'no page'}; the agent said:\n{agent.log()[-4000:]}") from None
    finally:
        await agent.stop()
        aside(directory)
    return taken


def _python_there(directory: Path, far: Far) -> Path:
    """An interpreter that runs in the slow network."""
    path = directory / "python"
    path.write_text(f'#!/bin/sh\nexec {" ".join(far.prefix)} {sys.executable} "$@"\n')
    path.chmod(0o755)
    return path


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


SENT = ('"modules.sent"', '"modules.bundle_sent"')


async def _page(quick: bool, files: Mapping[str, str], directory: Path) -> list[Row]:
    rounds = 1 if quick else 5
    ours: list[float] = []
    changed: list[float] = []
    cold: list[float] = []
    warm: list[float] = []
    async with plane(directory) as one:
        project = await one.project(files)
        filled = directory / "cache"
        await _session(project, directory / "first", filled, SENT)
        await asyncio.to_thread(_by_hand, files, directory / "hand", filled)
        near = await _near(one, files, directory, filled)
        for number in range(rounds):
            empty = directory / f"cache-{number}"
            ours.append(await _session(project, directory / "ours", empty, ['"modules.used"']))
            cold.append(await asyncio.to_thread(_by_hand, files, directory / "hand", empty))
            shutil.rmtree(empty)
            warm.append(await asyncio.to_thread(_by_hand, files, directory / "hand", filled))
            # Its agent ends before it has sent what it installed: the next round has the same layer again.
            changed.append(await _session(near, directory / "after", filled, ['"head_start"']))
    return [
        Row(
            "creation to first page, cold cache", median(ours), "s", "npm ci && vite", median(cold),
            ratio_of(ours, cold), at_most=0.25, samples=rounds, note=NOTE,
        ),
        Row(
            "creation to first page, warm cache", median(ours), "s", "npm ci && vite", median(warm),
            ratio_of(ours, warm), at_most=0.4, samples=rounds, note=NOTE,
        ),
        Row(
            "the same with one dependency more", median(changed), "s", "npm ci && vite", median(warm),
            ratio_of(changed, warm), at_most=0.5, samples=rounds, note="warm cache",
        ),
    ]  # fmt: skip


async def _near(one: Plane, files: Mapping[str, str], directory: Path, cache: Path) -> Project:
    """A project that has a layer, and then one dependency more."""
    project = await one.project(_without(files, directory / "less"))
    shutil.rmtree(directory / "less")
    await _session(project, directory / "before", cache, ['"modules.sent"'])
    await project.bulk({name: files[name] for name in ("package.json", "package-lock.json")})
    return project


async def _network(quick: bool, files: Mapping[str, str], directory: Path) -> list[Row]:
    rounds = 1 if quick else 3
    ours: list[float] = []
    cold: list[float] = []
    with far_network() as far:
        async with plane(directory, host=far.here) as one:
            project = await one.project(files)
            await _session(project, directory / "first", directory / "cache", SENT, far)
            for number in range(rounds):
                empty = directory / f"cache-{number}"
                ours.append(await _session(project, directory / "ours", empty, ['"modules.used"'], far))
                cold.append(await asyncio.to_thread(_by_hand, files, directory / "hand", empty, far))
                shutil.rmtree(empty)
    return [
        Row(
            f"the same over {far.what}", median(ours), "s", "npm ci && vite", median(cold),
            ratio_of(ours, cold), at_most=0.25, samples=rounds, note=", ".join(filter(None, ("cold cache", far.note))),
        )
    ]  # fmt: skip


def whole_page(base: str) -> int:
    """Ask for a page and for every module that it imports, as a browser does; return how many."""
    asked: set[str] = set()
    ahead = ["/"]
    with httpx.Client(base_url=base, trust_env=False, timeout=PATIENCE) as http:
        while ahead:
            path = ahead.pop()
            if path in asked:
                continue
            asked.add(path)
            answer = http.get(path, headers={"accept": "text/html" if path == "/" else "*/*"})
            if answer.status_code != 200:
                raise RuntimeError(f"{path} was answered {answer.status_code}")
            if "/.vite/deps/" not in path:
                ahead += _MODULE.findall(answer.text)
    return len(asked)


async def _dev(quick: bool, files: Mapping[str, str], directory: Path) -> list[Row]:
    return await asyncio.to_thread(_dev_again, 1 if quick else 3, files, directory)


def _dev_again(rounds: int, files: Mapping[str, str], directory: Path) -> list[Row]:
    app = directory / "app"
    for name, content in files.items():
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text(content)
    stack = Stack(app, directory / "state")
    taken: list[float] = []
    try:
        for number in range(rounds + 1):
            began = time.monotonic()
            stack.start()
            whole_page(stack.status()["dev_server"]["url"])
            if number:
                taken.append(time.monotonic() - began)
                said = "\n".join(stack.status()["dev_server"]["log"])
                if "optimiz" in said:
                    raise RuntimeError(f"Vite has bundled again:\n{said}")
            else:
                _until_sent(stack)
            stack.interrupt()
            aside(stack.state / "machines")
            (stack.state / "session.json").unlink()
    finally:
        stack.kill()
    note = "a new machine, the layer kept; the page and all its modules"
    return [Row("`dev` again, to the whole page", median(taken), "s", at_most=5.0, samples=rounds, note=note)]


def _until_sent(stack: Stack) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        (log,) = stack.state.glob("machines/*/agent.log")
        if all(each in log.read_text() for each in SENT):
            return
        time.sleep(0.2)
    raise RuntimeError("no layer was sent")


Part = Callable[[bool, Mapping[str, str], Path], Awaitable[list[Row]]]
PARTS: Mapping[str, Part] = {
    "page": _page, "network": _network, "dev": _dev, "unpack": unpacking, "packing": packing, "sessions": sessions,
}  # fmt: skip


async def _measure(quick: bool, only: Collection[str]) -> list[Row]:
    rows: list[Row] = []
    files = _files(EXAMPLE)
    for name, part in PARTS.items():
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory(prefix="preview-bench-") as directory:
            try:
                rows += await part(quick, files, Path(directory))
            except Unmeasurable as reason:
                if only:
                    raise
                print(f"  {name} not measured: {reason}")
    return rows


def run(quick: bool, only: Collection[str] = ()) -> Sequence[Row]:
    """Creation to first page, and what it takes. Raises `Unmeasurable` without Node and npm."""
    if shutil.which("npm") is None:
        raise Unmeasurable("Node and npm are needed")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    assert json.loads((EXAMPLE / "package.json").read_text())["dependencies"][LEFT_OUT]
    return asyncio.run(_measure(quick, only))
