"""A whole agent process, and a first snapshot that comes slowly, is wrong, or is not to be had."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.agent.processes import free_port
from tests.agent.test_tokens import jwt
from tests.fakes.origin import Answer, origin
from tests.fakes.zips import PROJECT, manifest, snapshot

FILES = {f"src/file{number}.bin": Random(number).randbytes(20_000) for number in range(20)}
LAST = list(FILES)[-1]


def started(place: Path, url: str, **more: str) -> subprocess.Popen[str]:
    environ = {
        "PROJECT_ID": PROJECT, "SESSION_ID": str(uuid4()), "SNAPSHOT_URL": url, "REALTIME_URL": "ws://127.0.0.1:9",
        "REALTIME_TOKEN": jwt(4_000_000_000), "PATH": os.environ["PATH"], "PROJECT_DIR": str(place / "project"),
        "STATE_DIR": str(place / "state"), "HEALTH_HOST": "127.0.0.1", "HEALTH_PORT": "0", "DEV_HOST": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parents[2]), **more,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "agent", "run"], env=environ, cwd=place, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


async def end_of(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    said, _ = await asyncio.to_thread(process.communicate, timeout=60)
    return process.returncode, said.splitlines()


async def test_status_says_how_far_it_is(tmp_path: Path) -> None:
    data = snapshot(FILES)
    port = free_port()
    async with origin(Answer(data, cut=len(data) // 2, how="stall")) as server, httpx.AsyncClient() as http:
        process = started(tmp_path, server.url, HEALTH_PORT=str(port))
        try:
            said: dict[str, Any] = {}
            async with asyncio.timeout(30):
                while not said.get("files"):
                    await asyncio.sleep(0.05)
                    try:
                        said = (await http.get(f"http://127.0.0.1:{port}/status")).json()["hydrate"]
                    except httpx.TransportError:
                        continue
        finally:
            process.terminate()
            code, _ = await end_of(process)
    assert code == 0
    assert (said["attempt"], said["files_total"], said["expected_bytes"]) == (1, len(FILES), len(data))
    assert said["unpacked_total"] == sum(map(len, FILES.values()))
    assert 0 < said["files"] < len(FILES)
    assert 0 < said["unpacked_bytes"] < said["unpacked_total"]
    assert 0 < said["received_bytes"] <= len(data) // 2


@pytest.mark.parametrize(
    ("answer", "code", "why"),
    [
        (
            Answer(snapshot(FILES, said=manifest({**FILES, LAST: bytes(20_000)}))),
            69,
            "cannot hydrate after 1 attempt: snapshot refused (hash_mismatch):"
            f" {LAST!r} is not what the manifest says",
        ),
        (Answer(b"", 503), 69, "cannot hydrate after 2 attempts: the snapshot is unavailable: HTTP 503"),
        (
            Answer(b'{"statusCode":"400","error":"InvalidJWT"}', 400),
            70,
            "the snapshot's signed URL is expired or was refused: HTTP 400, InvalidJWT",
        ),
    ],
    ids=["not what it says", "away", "expired"],
)
async def test_what_cannot_succeed_ends_the_process_with_one_line_that_says_why(
    answer: Answer, code: int, why: str, tmp_path: Path
) -> None:
    async with origin(answer) as server:
        process = started(
            tmp_path, server.url, SNAPSHOT_ATTEMPTS="2", SNAPSHOT_RETRY_SECONDS="0.01", LOG_FORMAT="json"
        )
        ended, lines = await end_of(process)
    assert ended == code
    (failed,) = [said for line in lines if (said := json.loads(line))["level"] == "error"]
    assert (failed["event"], failed["exit"], failed["why"]) == ("agent.failed", code, why)
    assert "SECRET" in server.url
    assert "SECRET" not in "".join(lines)
    assert os.listdir(tmp_path / "project") == []
