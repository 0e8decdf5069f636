"""A hostile project against the real agent: root, with the project's programs as another user.

A Vite plugin, a postinstall and the dev script do everything of `acts` at once, in random order from a seed, while an
editor saves. Meanwhile `/livez` answers, and memory stays within its bound. In the end the tree is the database's, and
SIGTERM leaves nothing. HOSTILE_SEED repeats a run; a failure names its seed and what was done last.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from agent.core.model import RelPath, parents
from tests.agent.processes import of_user, until
from tests.agent.processes import running as named
from tests.ports import free_port
from tests.system.plane import Agent, Project, eventually, running_plane

HERE = Path(__file__).parent
MEMORY = 192 << 20
"""Bytes that the agent may have at any time. It starts with 60 MB; one immense file read whole is more than this."""
SILENT = 10.0
"""Seconds for an answer of `/livez`. A busy machine is slow, and a stuck loop is silent for minutes."""
GRACE = 15.0
"""Seconds for the end: STOP_GRACE is four, and the machine is busy."""

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc and leases are Linux's"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can run the project as somebody else"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm"),
]


def remove(path: Path) -> None:
    """Remove it, however deep it became; `shutil.rmtree` cannot."""
    subprocess.run(["rm", "-rf", path], check=True)


def somebody() -> str:
    """A user of this machine that nothing else runs as."""
    for name in ("games", "irc", "backup", "news", "uucp"):
        with contextlib.suppress(KeyError):
            if not of_user(pwd.getpwnam(name).pw_uid):
                return name
    pytest.skip("this machine has no user that nothing runs as")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that other users may look into and only root may change; removed however deep it became."""
    name = tempfile.mkdtemp(prefix="preview-hostile-")
    Path(name).chmod(0o755)
    yield Path(name)
    remove(Path(name))


class Run:
    """One run of the hostile project, and what was seen of its agent from outside."""

    def __init__(self, agent: Agent, place: Path, seed: int) -> None:
        self.agent = agent
        self.log = place / "acts.log"
        self.dice = random.Random(seed)
        self.wrong: list[str] = []
        self.peak = 0
        self.saves = 0

    @property
    def project(self) -> Project:
        return self.agent.project

    def done(self) -> Counter[str]:
        """How often each act was done."""
        return Counter(line.split()[1] for line in self.log.read_text().splitlines() if line.count(" ") == 2)

    async def watch(self) -> None:
        """Ask `/livez` and look at memory until cancelled."""
        assert self.agent.process is not None
        process = psutil.Process(self.agent.process.pid)
        async with httpx.AsyncClient(trust_env=False, timeout=SILENT) as http:
            while True:
                try:
                    answer = await http.get(f"http://127.0.0.1:{self.agent.port}/livez")
                    if answer.status_code != 200:
                        self.wrong.append(f"/livez answered {answer.status_code}")
                except httpx.HTTPError as error:
                    self.wrong.append(f"/livez: {error!r}")
                self.peak = max(self.peak, process.memory_info().rss)
                await asyncio.sleep(0.2)

    async def edit(self, over: Callable[[], bool], within: float) -> None:
        """Save as an editor does, some files together, until it is over. Fails after `within` seconds."""
        deadline = time.monotonic() + within
        while not over():
            assert time.monotonic() < deadline, self.agent.log()[-4000:]
            paths = self.dice.choices(sorted(FILES), k=self.dice.choice([1, 1, 1, 5]))
            text = f"export default {self.saves}\n" * self.dice.randrange(1, 200)
            with contextlib.suppress(
                httpx.TransportError
            ):  # a connection that rested too long: the next save is one more
                await self.project.bulk(dict.fromkeys(paths, text))
                self.saves += 1
            await asyncio.sleep(self.dice.uniform(0, 0.2))

    async def put_right(self) -> None:
        """Do as a person would: remove what stands in the way, and save every file once more."""
        files = await self.project.files()
        tree = self.agent.tree
        tree.chmod(0o755)
        for path in files:
            for each in (*parents(RelPath(path)), path):
                here = tree / each
                wanted = here.is_file() if each == path else here.is_dir()
                if os.path.lexists(here) and (here.is_symlink() or not wanted):
                    remove(here)
        await self.project.bulk(
            {
                path: f"// the last word\n{text.decode()}"
                for path, text in files.items()
                if path.startswith("src/")
            }
        )

        async def equal() -> bool:
            now = await self.project.files()
            return all(_content(tree / path) == text for path, text in now.items())

        try:
            await eventually("the tree is the database's", equal, 60)
        except AssertionError as error:
            now = await self.project.files()
            differ = [path for path, text in now.items() if _content(tree / path) != text]
            raise AssertionError(f"{error}; differing: {differ}; {await self.agent.status()}") from None


def _content(path: Path) -> bytes | None:
    if path.is_symlink() or not path.is_file() or path.stat().st_size > 1 << 20:
        return None
    return path.read_bytes()


FILES = {
    **{f"src/f{number}.ts": "export default 1\n" for number in range(30)},
    **{f"src/deep/er/d{number}.ts": "export default 2\n" for number in range(10)},
}


def own_files() -> dict[str, str]:
    """The project's own files, which nobody edits."""
    root = HERE / "project"
    return {str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()}


@asynccontextmanager
async def running(database: str, place: Path, seed: int) -> AsyncIterator[Run]:
    """An agent whose project is hostile until `place` has a file `over`."""
    user = somebody()
    log = place / "acts.log"
    log.touch()
    acts = shutil.copy(HERE / "acts.py", place / "acts.py")
    cache = place / "npm"
    cache.mkdir()
    for each in (log, cache):
        shutil.chown(each, user)
    async with running_plane(database, place / "plane") as plane:
        project = await plane.project({**own_files(), **FILES})
        machine = place / "machine"
        health = free_port()
        agent = await project.session(
            machine,
            DEV_USER=user, INSTALL_SCRIPTS="true", DRIFT_POLICY="restore", HEALTH_PORT=str(health),
            npm_config_cache=str(cache), DEV_PROCESSES="400",
            DEV_ENV_HOSTILE=str(acts), DEV_ENV_HOSTILE_SEED=str(seed), DEV_ENV_HOSTILE_LOG=str(log),
            DEV_ENV_HOSTILE_OVER=str(place / "over"), DEV_ENV_HOSTILE_HEALTH=str(health),
            DEV_ENV_HOSTILE_PROJECT=str(machine / "project"),
            DEV_ENV_HOSTILE_MODULES=str(machine / ".preview-modules"),
        )  # fmt: skip
        agent.start()
        agent.port = health
        run = Run(agent, place, seed)
        watching = None
        try:
            await eventually("health answers", agent.status)
            watching = asyncio.create_task(run.watch())
            yield run
        finally:
            if watching is not None:
                watching.cancel()
            if agent.process is not None and agent.process.poll() is None:
                agent.kill()
            await until(lambda: not of_user(pwd.getpwnam(user).pw_uid))


async def survives(database: str, place: Path, seed: int, seconds: float) -> Counter[str]:
    """Run it once; return how often each act was done."""
    async with running(database, place, seed) as run:
        agent, uid = run.agent, pwd.getpwnam(run.agent.environ["DEV_USER"]).pw_uid
        await run.edit(lambda: run.log.stat().st_size > 0, 120)
        deadline = time.monotonic() + seconds
        await run.edit(lambda: time.monotonic() > deadline, seconds + 60)
        (place / "over").touch()
        await until(lambda: not named(str(place / "acts.py")), 60)
        assert agent.process is not None
        assert agent.process.poll() is None, agent.log()[-3000:]
        await run.put_right()
        assert run.wrong == []
        assert run.peak < MEMORY
        asked = time.monotonic()
        assert await agent.stop() == 0
        assert time.monotonic() - asked < GRACE
        assert "agent.cut_off" not in agent.log()
        assert "agent.bug" not in agent.log(), [x for x in agent.log().splitlines() if "agent.bug" in x][-1]
        assert of_user(uid) == []
        assert os.listdir(agent.directory / ".preview-sync") == []
        return run.done()


async def test_nothing_that_a_project_does_stops_the_agent(database: str, place: Path) -> None:
    seed = int(os.environ.get("HOSTILE_SEED", "1"))
    done = await survives(database, place, seed, 6)
    assert len(done) > 5, f"it hardly acted: {done}"


@pytest.mark.nightly
async def test_nothing_does_for_half_an_hour_with_many_seeds(database: str, tmp_path: Path) -> None:
    end = time.monotonic() + float(os.environ.get("HOSTILE_MINUTES", "30")) * 60
    seed, done = int(os.environ.get("HOSTILE_SEED", str(time.time_ns() % 10**6))), Counter[str]()
    while time.monotonic() < end:
        place = Path(tempfile.mkdtemp(prefix="preview-hostile-"))
        place.chmod(0o755)
        try:
            done += await survives(database, place, seed, min(60.0, end - time.monotonic() + 10))
        except BaseException:
            print(f"HOSTILE_SEED={seed}; kept in {place}")
            raise
        remove(place)
        seed += 1
    assert len(done) > 20, done
