"""A whole agent process, and a first snapshot that comes slowly, is wrong, or is not to be had."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.agent.test_tokens import jwt
from tests.fakes.origin import Answer, Origin, origin
from tests.fakes.zips import PROJECT, manifest, snapshot
from tests.ports import free_port

FILES = {f"src/file{number}.bin": Random(number).randbytes(20_000) for number in range(20)}
LAST = list(FILES)[-1]


def started(place: Path, url: str, **more: str) -> subprocess.Popen[str]:
    environ = {
        "PROJECT_ID": PROJECT, "SESSION_ID": str(uuid4()), "SNAPSHOT_URL": url, "REALTIME_URL": "ws://127.0.0.1:9",
        "REALTIME_TOKEN": jwt(4_000_000_000), "PATH": os.environ["PATH"], "PROJECT_DIR": str(place / "project"),
        "STATE_DIR": str(place / "state"), "HEALTH_HOST": "127.0.0.1", "HEALTH_PORT": "0", "DEV_HOST": "127.0.0.1",
        "PYTHONPATH": str(Path(__file__).parents[3]), **more,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "agent", "run"], env=environ, cwd=place, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def base(server: Origin) -> str:
    return server.url.partition("/storage")[0]


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


PAGE = Answer(b"<html><h1>Nothing here</h1></html>", 404, [("Content-Type", "text/html")])
OTHER = Answer(b'{"error":"not_found"}', 404, [("Content-Type", "application/json")])


def refusal(status: int, kind: str) -> Answer:
    document = {"type": f"urn:preview-sync:problem:{kind}", "title": kind, "status": status, "detail": "over"}
    return Answer(json.dumps(document).encode(), status, [("Content-Type", "application/problem+json")])


IN_FRONT = {
    "404": (PAGE, refusal(404, "session_unknown"), 70),
    "410": (replace(PAGE, status=410), refusal(410, "session_over"), 70),
    "409": (replace(PAGE, status=409), refusal(409, "generation_superseded"), 0),
    "401": (replace(PAGE, status=401), refusal(410, "session_over"), 70),
    "403": (replace(PAGE, status=403), refusal(410, "session_over"), 70),
    "200": (replace(PAGE, status=200), refusal(410, "session_over"), 70),
    "another's JSON": (OTHER, refusal(404, "session_unknown"), 70),
}
"""What answers for the orchestrator, then what it answers itself, and what the agent ends with."""


async def outlive(in_front: Answer, own: Answer, place: Path) -> tuple[set[str], int]:
    """An agent's problems while `in_front` answers, and its exit code once `own` does."""
    port = free_port()
    place.mkdir()
    async with (
        origin(Answer(snapshot(FILES))) as storage,
        origin(in_front) as api,
        httpx.AsyncClient() as http,
    ):
        process = started(
            place, storage.url, SESSION_API_URL=base(api), HEALTH_PORT=str(port), HEARTBEAT_SECONDS="0.2"
        )
        try:
            kinds: set[str] = set()
            async with asyncio.timeout(60):
                while "session_api_unreachable" not in kinds or len(api.requests) < 4:
                    assert process.poll() is None, await end_of(process)
                    await asyncio.sleep(0.02)
                    with contextlib.suppress(httpx.TransportError):
                        said = (await http.get(f"http://127.0.0.1:{port}/status")).json()
                        kinds = {problem["kind"] for problem in said["problems"]}
            api.answers[:] = [own]
            ended, _ = await end_of(process)
            return kinds, ended
        finally:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def outlived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[set[str], int] | BaseException]:
    """What became of an agent for each of `IN_FRONT`: all at once, since they mostly wait."""
    place = tmp_path_factory.mktemp("outlived")

    async def all_of_them() -> list[tuple[set[str], int] | BaseException]:
        runs = (
            outlive(in_front, own, place / str(number))
            for number, (in_front, own, _) in enumerate(IN_FRONT.values())
        )
        return await asyncio.gather(*runs, return_exceptions=True)

    return dict(zip(IN_FRONT, asyncio.run(all_of_them()), strict=True))


@pytest.mark.parametrize("name", IN_FRONT)
def test_the_orchestrator_alone_ends_an_agent(
    name: str, outlived: dict[str, tuple[set[str], int] | BaseException]
) -> None:
    """Whatever stands in front of it may answer for it, with the same numbers, for a while."""
    run = outlived[name]
    if isinstance(run, BaseException):
        raise run
    kinds, ended = run
    assert "token_refused" not in kinds
    assert ended == IN_FRONT[name][2]


async def test_at_a_start_too_the_orchestrator_is_waited_for(tmp_path: Path) -> None:
    """Without a snapshot's URL the session API is asked first, and by then may be behind a page."""
    async with origin(Answer(snapshot(FILES))) as storage, origin(PAGE) as api:
        process = started(
            tmp_path, "", SESSION_API_URL=base(api), HEARTBEAT_SECONDS="60", SNAPSHOT_RETRY_SECONDS="0.01"
        )
        try:
            async with asyncio.timeout(30):
                while len([head for head in api.requests if "/sync " in head]) < 3:
                    assert process.poll() is None, await end_of(process)
                    await asyncio.sleep(0.01)
            offer = {"kind": "snapshot", "snapshot_url": storage.url, "manifest": None}
            api.answers[:] = [Answer(json.dumps(offer).encode())]
            async with asyncio.timeout(30):
                while not (tmp_path / "project" / LAST).exists():
                    assert process.poll() is None, await end_of(process)
                    await asyncio.sleep(0.01)
        finally:
            process.kill()
            process.wait()
