"""What `record` writes from a live channel, `replay` reads, and it ends equal: a channel that was not perfect, too."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from agent.replay.faults import FaultPlan
from agent.replay.runner import ReplayOptions, replay
from tests.fakes.proxy import Proxy
from tests.system.over_nats import over_nats
from tests.system.plane import Agent, Project, eventually, running_plane

pytestmark = pytest.mark.system

ROUGH = FaultPlan(7, shuffle=True, duplicate=0.5, drop=0.5, disconnect=2, crash=1)


@dataclass
class Recording:
    """A recorder's process, and what it has said."""

    process: asyncio.subprocess.Process
    path: Path
    heard: list[str] = field(default_factory=list)

    def count(self, word: str) -> int:
        return sum(word in line for line in self.heard)

    async def until(self, what: str, done: Callable[[], bool]) -> None:
        async def look() -> bool:
            assert self.process.returncode is None, "".join(self.heard)
            return done()

        try:
            await eventually(what, look, 30)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{''.join(self.heard)}") from None

    async def joined(self, project: Project) -> None:
        """Until events arrive. Another content each time: a repeat is no commit, and says nothing."""
        numbers, before = itertools.count(), self.count("file:update")

        async def heard() -> bool:
            await project.save("src/probe.ts", f"{next(numbers)} after {before}\n")
            return self.count("file:update") > before

        await eventually("the recorder is on the channel", heard, 30)

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return await asyncio.wait_for(self.process.wait(), 30)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]


@asynccontextmanager
async def recording(machine: Agent, path: Path, **environ: str) -> AsyncIterator[Recording]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "agent", "record", str(path),
        env={"PATH": os.environ["PATH"], **machine.environ, **environ},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    recorder = Recording(process, path)

    async def listen() -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            recorder.heard.append(line.decode())

    listening = asyncio.create_task(listen())
    try:
        yield recorder
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await listening


async def ends_equal(path: Path, directory: Path, expected: str) -> None:
    result = await asyncio.to_thread(replay, path, directory / "as-it-was")
    assert result.differences == ()
    assert result.tree_hash == expected
    rough = await asyncio.to_thread(replay, path, directory / "rough", ReplayOptions(ROUGH))
    assert rough.differences == ()


@pytest.mark.parametrize("transport", ["realtime", pytest.param("nats", marks=pytest.mark.nightly)])
async def test_a_recording_replays_to_the_same_tree(database: str, tmp_path: Path, transport: str) -> None:
    async with AsyncExitStack() as stack:
        plane = await stack.enter_async_context(running_plane(database, tmp_path))
        project = await plane.project({"src/a.ts": "a\n", "readme.md": "# hello\n"})
        machine = await project.session(tmp_path / "machine")
        if transport == "nats":
            machine.environ |= await stack.enter_async_context(over_nats(database, tmp_path, machine))
        async with recording(machine, tmp_path / "scenario.jsonl") as recorder:
            await recorder.joined(project)
            await project.save("src/big.txt", "x" * 300_000)
            await project.bulk({"src/a.ts": None, "src/b.ts": "b\n"})
            await project.save("readme.md", "# the end\n")
            await recorder.until(
                "all of it is heard",
                lambda: recorder.count("bulk:apply") == 1 and "file:update" in recorder.heard[-1],
            )
            assert await recorder.stop() == 0, recorder.heard
        expected = await project.rpc("project_tree_hash")
    await ends_equal(recorder.path, tmp_path, expected)


async def test_what_the_channel_did_not_bring_stands_in_it_as_lost(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path) as plane:
        project = await plane.project({"src/a.ts": "a\n", "readme.md": "# hello\n"})
        machine = await project.session(tmp_path / "machine")
        there = urlsplit(machine.environ["REALTIME_URL"])
        assert there.hostname is not None
        assert there.port is not None
        async with Proxy(there.hostname, there.port) as proxy:
            url = there._replace(netloc=f"{there.hostname}:{proxy.port}").geturl()
            async with recording(machine, tmp_path / "scenario.jsonl", REALTIME_URL=url) as recorder:
                await recorder.joined(project)
                # A hole, a double, another order.
                for fault in ("drop", "duplicate", "reorder"):
                    await project.faults(**{fault: 2})
                    for n in range(4):
                        await project.save(f"src/{n % 2}.ts", f"{fault} {n}\n")
                    await recorder.joined(project)
                # A break, and commits meanwhile.
                proxy.stop_listening()
                assert proxy.cut() == 1
                await project.save("src/unheard.ts", "1\n")
                await project.bulk({"src/a.ts": None, "src/unheard.ts": "2\n"})
                await proxy.listen()
                await recorder.until("it is back", lambda: recorder.count("joined again") >= 1)
                # By reference, and changed again before anybody could ask.
                for n in range(4):
                    await project.save("src/big.txt", str(n) * 300_000)
                # More than one message holds, so that only the doorbell rings.
                await project.bulk({f"src/{'long' * 40}-{n}.txt": f"{n}\n" for n in range(900)})
                # A restored database: another history with other files.
                await recorder.joined(project)
                async with await psycopg.AsyncConnection.connect(database, autocommit=True) as connection:
                    await connection.execute(
                        "update public.project_heads set epoch = gen_random_uuid() where project_id = %s",
                        (project.id,),
                    )
                await project.save("readme.md", "# after the restore\n")
                # And an end that it never hears.
                await recorder.until("the restore is heard", lambda: recorder.count("announces") >= 2)
                proxy.stop_listening()
                proxy.cut()
                await project.save("readme.md", "# the end\n")
                assert await recorder.stop() == 0, recorder.heard
        expected = await project.rpc("project_tree_hash")
    steps = recorder.lines()[1:]
    lost = [index for index, step in enumerate(steps) if step.get("lost") == 1]
    assert len(lost) >= 5, recorder.heard
    assert all(steps[index + 1]["event"] == "bulk:apply" for index in lost)
    await ends_equal(recorder.path, tmp_path, expected)


async def test_where_it_cannot_be_written_nothing_is_recorded(tmp_path: Path) -> None:
    from tests.agent.test_config import GOOD

    machine = Agent(None, None, tmp_path, GOOD)  # type: ignore[arg-type]
    taken = tmp_path / "taken.jsonl"
    taken.write_text("mine")
    for path, says in (
        (taken, "taken.jsonl exists; remove it or name another"),
        (tmp_path / "no" / "x.jsonl", "there is no directory"),
        (tmp_path / "x.zip", ".zip is the name of the snapshot"),
    ):
        async with recording(machine, path) as recorder:
            assert await asyncio.wait_for(recorder.process.wait(), 30) == 64
        assert says in recorder.heard[-1]
    assert taken.read_text() == "mine"
