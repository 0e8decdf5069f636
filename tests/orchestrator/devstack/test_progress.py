"""What `dev` says while the preview is not served yet."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from orchestrator_stub.devstack.terminal import progress
from tests.docs.reading import ROOT


@pytest.mark.parametrize(
    ("report", "lines"),
    [
        ([], []),
        ({"state": "installing", "problems": []}, ["the agent is installing"]),
        (
            {
                "state": "degraded",
                "problems": [{"kind": "install_failed", "detail": "log\nnpm ended with 1\n"}],
            },
            ["the agent is degraded", "install_failed: npm ended with 1"],
        ),
        (
            {"state": "degraded", "problems": [{"kind": "drift", "file_path": "a.ts", "detail": None}]},
            ["the agent is degraded", "drift: a.ts"],
        ),
    ],
)
def test_each_problem_is_a_line(report: object, lines: list[str]) -> None:
    assert progress(report) == lines


async def test_without_npm_it_says_that_npm_is_missing(tmp_path: Path) -> None:
    """Node is there and npm is not, as in a slim image: the agent alone knows, and nobody reads its log."""
    (tmp_path / "bin").mkdir()
    node = await asyncio.create_subprocess_exec("which", "node", stdout=asyncio.subprocess.PIPE)
    (tmp_path / "bin" / "node").symlink_to((await node.communicate())[0].decode().strip())
    dev = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orchestrator_stub", "dev", str(ROOT / "examples" / "react-app"),
        "--port", "0", "--no-editor", "--state", str(tmp_path / "state"),
        env={**os.environ, "PATH": str(tmp_path / "bin")}, cwd=ROOT,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    assert dev.stdout is not None
    said = ""
    try:
        async with asyncio.timeout(60):
            while "the agent's log is" not in said:
                line = await dev.stdout.readline()
                assert line, said
                said += line.decode()
    finally:
        dev.send_signal(signal.SIGINT)
        await dev.communicate()
    assert "install_failed: npm" in said
    assert dev.returncode == 0
