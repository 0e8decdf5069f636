"""What `record` writes from a live channel, `replay` reads, and it ends equal."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from pathlib import Path

import pytest

from agent.mischief import Mischief
from agent.replay import Manner, replay
from tests.system.plane import eventually, running_plane

pytestmark = pytest.mark.system


async def test_a_recording_replays_to_the_same_tree(database: str, tmp_path: Path) -> None:
    async with running_plane(database, tmp_path) as plane:
        project = await plane.project({"src/a.ts": "a\n", "readme.md": "# hello\n"})
        machine = await project.session(tmp_path / "machine")
        path = tmp_path / "scenario.jsonl"
        recorder = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "agent", "record", str(path),
            env={"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1", **machine.environ},
            stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        assert recorder.stdout is not None
        heard: list[str] = []

        async def listen() -> None:
            assert recorder.stdout is not None
            async for line in recorder.stdout:
                heard.append(line.decode())

        listening = asyncio.create_task(listen())

        numbers = itertools.count()

        async def events() -> bool:
            # Another content each time: a repeat is no commit, and says nothing.
            await project.save("src/probe.ts", f"{next(numbers)}\n")
            return any("file:update" in line for line in heard)

        await eventually("the recorder is on the channel", events, 30)
        await project.save("src/big.txt", "x" * 300_000)
        await project.bulk({"src/a.ts": None, "src/b.ts": "b\n"})
        await project.save("readme.md", "# the end\n")

        async def all_heard() -> bool:
            return sum("bulk:apply" in line for line in heard) == 1 and "file:update" in heard[-1]

        await eventually("all of it is heard", all_heard)
        recorder.send_signal(signal.SIGINT)
        assert await asyncio.wait_for(recorder.wait(), 20) == 0, "".join(heard)
        await listening
        expected = await project.rpc("project_tree_hash")
    result = await asyncio.to_thread(replay, path, tmp_path / "replayed")
    assert result.differences == ()
    assert result.tree_hash == expected
    rough = Mischief(7, shuffle=True, duplicate=0.5, drop=0.5, disconnect=2, crash=1)
    assert (await asyncio.to_thread(replay, path, tmp_path / "rough", Manner(rough))).differences == ()
