"""Storage's client and servers that refuse an upload without reading it, as Supabase Storage does a stored key's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.platform.storage import StorageClient, StorageFailure
from orchestrator_stub.platform.tokens import Keyring
from tests.fakes.gateway import nginx, node_storage
from tests.fakes.serving import SECRET, serve_local

BUCKET = "project-snapshots"
KEY = ProjectKeys.of(Keyring.from_secret(SECRET)).service_key
SIZES = [200_000, 2_000_000]
SMALL, LARGE = 60_000, 8_000_000
"""What server and sockets take in by themselves, and what stalls whoever sends it."""

PATIENCE = 20
"""Seconds, a third of the client's own patience: whoever needs them was held up."""

Serving = Callable[[], AbstractAsyncContextManager[int]]


@pytest.fixture(params=["node", "stand-in"])
def serving(request: pytest.FixtureRequest, tmp_path: Path) -> Serving:
    """A running Storage's port: on Storage's own HTTP server, and ours."""
    if request.param == "node":
        return node_storage
    dsn: str = request.getfixturevalue("database")

    @asynccontextmanager
    async def stand_in() -> AsyncIterator[int]:
        async with serve_local(dsn, tmp_path / "storage") as local:
            yield local.port

    return stand_in


def bytes_of(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(content), 256 * 1024):
        yield content[at : at + 256 * 1024]


@asynccontextmanager
async def reached(serving: Serving, behind_nginx: bool) -> AsyncIterator[tuple[int, int]]:
    """The port of the server, and the one that a client uses."""
    async with serving() as behind:
        if not behind_nginx:
            yield behind, behind
            return
        async with nginx(behind) as port:
            yield behind, port


@asynccontextmanager
async def client(port: int) -> AsyncIterator[StorageClient]:
    async with httpx.AsyncClient(trust_env=False) as http:
        yield StorageClient(f"http://127.0.0.1:{port}/storage/v1", KEY, http)


@pytest.mark.parametrize("size", [SMALL, *SIZES, LARGE])
async def test_what_a_refused_upload_left_unread_is_in_nobody_s_way(serving: Serving, size: int) -> None:
    content = bytes_of(size)
    async with serving() as port, client(port) as storage, asyncio.timeout(PATIENCE):
        await storage.upload(BUCKET, "p/x.zip", pieces(content), size)
        with pytest.raises(StorageFailure) as refused:
            await storage.upload(BUCKET, "p/x.zip", pieces(content), size)
        # A connection that is closed over unread bytes may be reset before the answer is read.
        assert refused.value.code == "KeyAlreadyExists" or refused.value.transient
        for _ in range(3):
            await storage.sign(BUCKET, "p/x.zip", 60)
        assert await storage.download(BUCKET, "p/x.zip") == content


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("behind_nginx", [False, True])
async def test_what_is_stored_is_not_sent_again(serving: Serving, behind_nginx: bool, size: int) -> None:
    content = bytes_of(size)
    async with reached(serving, behind_nginx) as (_, port), client(port) as storage:
        async with asyncio.timeout(PATIENCE):
            sent = 0

            async def counted() -> AsyncIterator[bytes]:
                nonlocal sent
                async for piece in pieces(content):
                    sent += len(piece)
                    yield piece

            for _ in range(3):
                await storage.ensure(BUCKET, "p/x.zip", counted(), size)
                await storage.sign(BUCKET, "p/x.zip", 60)
            assert sent == size
            assert await storage.download(BUCKET, "p/x.zip") == content


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("behind_nginx", [False, True])
async def test_who_asked_at_the_same_moment_holds_up_nobody(
    serving: Serving, behind_nginx: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody stores the same between our question and our upload. A gateway keeps connections of its own, which
    closing ours does not reach."""
    content = bytes_of(size)
    async with reached(serving, behind_nginx) as (behind, port), client(port) as storage:
        async with asyncio.timeout(PATIENCE):
            asked = storage.exists

            async def asked_before_them(bucket: str, path: str) -> bool:
                there = await asked(bucket, path)
                async with client(behind) as other:
                    await other.ensure(bucket, path, pieces(content), size)
                return there

            monkeypatch.setattr(storage, "exists", asked_before_them)
            await storage.ensure(BUCKET, "p/x.zip", pieces(content), size)
            for _ in range(3):
                await storage.sign(BUCKET, "p/x.zip", 60)
            assert await storage.download(BUCKET, "p/x.zip") == content


async def test_an_upload_whose_answer_was_lost_is_there() -> None:
    class Lossy(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            answer = await super().handle_async_request(request)
            if "/object/sign/" not in str(request.url):
                await answer.aclose()
                raise httpx.ReadError("the connection broke before the answer", request=request)
            return answer

    async with node_storage() as port, httpx.AsyncClient(transport=Lossy()) as http:
        storage = StorageClient(f"http://127.0.0.1:{port}/storage/v1", KEY, http)
        await storage.ensure(BUCKET, "p/x.zip", b"once", 4)
        assert await storage.exists(BUCKET, "p/x.zip")


async def test_what_is_not_there_and_what_cannot_be_stored(serving: Serving) -> None:
    async with serving() as port, client(port) as storage:
        assert not await storage.exists(BUCKET, "p/nothing.zip")
    async with client(port) as storage:
        with pytest.raises(StorageFailure) as failed:
            await storage.ensure(BUCKET, "p/x.zip", b"x", 1)
        assert failed.value.transient


async def test_an_archive_above_the_limit_is_refused_with_the_limit_s_name(
    database: str, tmp_path: Path
) -> None:
    """By us before a byte is sent, by Storage where its own limit is lower: either way it says what to raise."""
    async with (
        serve_local(database, tmp_path / "storage") as local,
        httpx.AsyncClient(trust_env=False) as http,
    ):
        base = f"{local.url}/storage/v1"
        storage = StorageClient(base, KEY, http, object_limit=1_000_000)
        for store in (storage.upload, storage.ensure):
            sent = False

            async def never() -> AsyncIterator[bytes]:
                nonlocal sent
                sent = True
                yield b""

            with pytest.raises(
                StorageFailure, match=r"1000001 bytes, and STORAGE_OBJECT_LIMIT is 1000000"
            ) as error:
                await store(BUCKET, "p/a.zip", never(), 1_000_001)
            assert (error.value.code, error.value.transient, sent) == ("EntityTooLarge", False, False)
        await storage.ensure(BUCKET, "p/b.zip", pieces(bytes_of(1_000_000)), 1_000_000)

        await local.sql("update storage.buckets set file_size_limit = 100000 where id = %s", BUCKET)
        with pytest.raises(
            StorageFailure, match=r"limit of the bucket project-snapshots.*STORAGE_OBJECT_LIMIT"
        ) as error:
            await storage.ensure(BUCKET, "p/c.zip", bytes_of(100_001), 100_001)
        assert (error.value.code, error.value.transient) == ("EntityTooLarge", False)
