"""Every command that asks over HTTP: nothing is unpacked or read without end, no URL raises what nobody expects."""

from __future__ import annotations

import asyncio
import gzip
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from agent.cli import status
from agent.cli.status import read_status
from agent.config import Settings
from agent.core.errors import TooLarge, Unavailable
from agent.replay.record import Recorder
from tests.agent.cli.test_check import asked, environment
from tests.agent.test_tokens import jwt
from tests.fakes.origin import Answer, Origin, origin

BOMB = Answer(gzip.compress(gzip.compress(bytes(40_000_000))), headers=[("Content-Encoding", "gzip, gzip")])


@contextmanager
def in_little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def base(server: Origin) -> str:
    return server.url.partition("/storage")[0]


def recorder(place: Path, http: httpx.AsyncClient, most: int = 1_000_000) -> Recorder:
    settings = Settings(
        project_id=UUID(int=1), session_id=UUID(int=1), session_api_url="http://127.0.0.1:1",
        realtime_url="ws://127.0.0.1:1", snapshot_max_compressed_bytes=most,
    )  # fmt: skip
    return Recorder(settings, place / "scenario.jsonl", lambda line: None, http)


async def test_a_check_unpacks_nothing(tmp_path: Path) -> None:
    async with origin(BOMB) as server:
        environ = environment(
            tmp_path, SESSION_API_URL=base(server), SNAPSHOT_URL=server.url, REALTIME_TOKEN=jwt(4e9)
        )
        with in_little_memory():
            _, told = await asked(environ)
    assert told["session api"].startswith("ok: ")
    assert told["snapshot"].startswith("ok: ")
    assert all("accept-encoding: identity" in head.lower() for head in server.requests)


async def test_a_check_of_a_url_that_nobody_can_be_asked_at_says_so(tmp_path: Path) -> None:
    nowhere = "http://xn--a-ecp.invalid/a.zip?token=abcdefghijk"
    code, told = await asked(environment(tmp_path, SESSION_API_URL=nowhere, SNAPSHOT_URL=nowhere))
    assert code == 69
    for subject, setting in (("session api", "SESSION_API_URL"), ("snapshot", "SNAPSHOT_URL")):
        assert told[subject].startswith(f"fail: {setting}: "), told[subject]


async def test_a_recording_unpacks_nothing_and_reads_so_much_and_no_more(tmp_path: Path) -> None:
    async with httpx.AsyncClient(trust_env=False) as http:
        async with origin(BOMB) as server:
            with in_little_memory(), pytest.raises(Unavailable, match="encoded as 'gzip, gzip'"):
                await recorder(tmp_path, http)._fetch(server.url)
        async with origin(Answer(bytes(8_000_000), announced=False)) as server:
            with in_little_memory(), pytest.raises(TooLarge, match="larger than 1000000 bytes"):
                await recorder(tmp_path, http)._fetch(server.url)
        async with origin(Answer(bytes(1_000_000))) as server:
            assert await recorder(tmp_path, http)._fetch(server.url) == bytes(1_000_000)


async def test_a_status_unpacks_nothing_and_reads_so_much_and_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = b'{"agent_version": "1"}'
    monkeypatch.setattr(status, "MOST_BYTES", 1_000_000)
    for answer in (BOMB, Answer(bytes(8_000_000)), Answer(report, 503), Answer(b"<html>"), Answer(b"[]")):
        async with origin(answer) as server:
            with in_little_memory(), pytest.raises(Unavailable, match="the agent at http://127"):
                await asyncio.to_thread(read_status, base(server))
    async with origin(Answer(report + b" " * (1_000_000 - len(report)))) as server:
        assert await asyncio.to_thread(read_status, base(server)) == {"agent_version": "1"}
    for nowhere in ("http://127.0.0.1:99999", "http://xn--/", "http://\0", "127.0.0.1:9464", "http://[::1"):
        with pytest.raises(Unavailable):
            read_status(nowhere)
