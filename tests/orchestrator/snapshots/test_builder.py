"""Snapshots of a real database in a real storage, and the agent's own reader as the judge of them."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import random
import resource
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
from psycopg_pool import AsyncConnectionPool

from orchestrator_stub.platform.storage import StorageClient, StorageFailure
from orchestrator_stub.snapshots import builder, newest
from orchestrator_stub.snapshots.builder import BUCKET, SPOOL_BYTES, SnapshotBuilder, StoredSnapshot
from orchestrator_stub.snapshots.cache import PostgresCacheStore, SnapshotCache
from orchestrator_stub.snapshots.model import SnapshotUnavailable
from tests.fakes.gateway import nginx, node_storage
from tests.fakes.serving import Local, serve_local

MANIFEST = ".preview-sync/manifest.json"


class World:
    """A project in a served database, with snapshots over it."""

    def __init__(
        self, local: Local, pool: AsyncConnectionPool[Any], http: httpx.AsyncClient, id_: UUID
    ) -> None:
        self.local = local
        self.pool = pool
        self.http = http
        self.project_id = id_
        self.storage = StorageClient(f"{local.url}/storage/v1", local.keys.service_key, http)
        self.snapshots = SnapshotBuilder(pool, self.storage)

    async def write(self, *changes: dict[str, Any]) -> int:
        """One commit; its revision."""
        rows = await self.local.sql(
            "select public.apply_project_files(%s, %s::jsonb)", self.project_id, json.dumps(changes)
        )
        return int(rows[0][0]["revision"])

    async def put(self, files: dict[str, str]) -> int:
        return await self.write(
            *({"action": "update", "file_path": p, "content": c} for p, c in files.items())
        )

    async def asset(self, content: bytes, *, named: str | None = None) -> str:
        digest = named or hashlib.sha256(content).hexdigest()
        await self.storage.upload("project-assets", f"{self.project_id}/{digest}", content, len(content))
        return digest

    async def archive(self, snapshot: StoredSnapshot) -> zipfile.ZipFile:
        return zipfile.ZipFile(io.BytesIO(await self.storage.download(BUCKET, snapshot.object_path)))


@pytest.fixture
async def world(database: str, tmp_path: Path) -> AsyncIterator[World]:
    async with serve_local(database, tmp_path / "storage") as local, httpx.AsyncClient() as http:
        user = uuid4()
        await local.sql("insert into auth.users (id, email) values (%s, 'a@b.c')", user)
        await local.sql("insert into public.user_profiles (id) values (%s)", user)
        rows = await local.sql("insert into public.projects (owner_id) values (%s) returning id", user)
        async with AsyncConnectionPool(database, min_size=1, max_size=4, open=False) as pool:
            yield World(local, pool, http, rows[0][0])


async def test_an_archive_is_exactly_the_head(world: World) -> None:
    await world.put({"package.json": "{}", "src/App.tsx": "export {}\n" * 500, "leer.txt": "", "ä/ö.md": "ü"})
    image = bytes(range(256)) * 2000
    digest = await world.asset(image)
    revision = await world.write(
        {"action": "update", "file_path": "public/logo.png", "content_hash": digest, "encoding": "base64"},
        {"action": "update", "file_path": "bin/run", "content": "#!/bin/sh\n", "executable": True},
        {"action": "delete", "file_path": "leer.txt"},
    )
    snapshot = await world.snapshots.build(world.project_id)
    with await world.archive(snapshot) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        told = json.loads(archive.read(MANIFEST))
        contents = {name: archive.read(name) for name in names[1:]}
        assert archive.getinfo("bin/run").external_attr >> 16 == 0o100755
    assert names[0] == MANIFEST
    assert contents == {
        "package.json": b"{}",
        "src/App.tsx": b"export {}\n" * 500,
        "ä/ö.md": "ü".encode(),
        "bin/run": b"#!/bin/sh\n",
        "public/logo.png": image,
    }
    listed = {f["file_path"]: f for f in told["files"]}
    assert set(listed) == set(contents)
    for path, content in contents.items():
        assert listed[path]["size"] == len(content)
        assert listed[path]["content_hash"] == hashlib.sha256(content).hexdigest()
    assert listed["bin/run"]["executable"] is True
    assert (told["revision"], told["base_revision"]) == (revision, None)
    assert told["deleted"] == [{"file_path": "leer.txt", "version": 2}]
    assert 0 < snapshot.build_seconds < 60
    assert snapshot.manifest == {**told, "build_seconds": round(snapshot.build_seconds, 6)}
    stored = await world.storage.download(BUCKET, snapshot.object_path)
    assert (len(stored), hashlib.sha256(stored).hexdigest()) == (snapshot.bytes, snapshot.sha256)
    assert snapshot.object_path.startswith(f"{world.project_id}/")


async def test_the_same_revision_gives_the_same_bytes(world: World) -> None:
    await world.put({f"src/file{i}.ts": f"export const n = {i}\n" * i for i in range(200)})
    first = await world.snapshots.build(world.project_id)
    again = await SnapshotBuilder(world.pool, world.storage).build(world.project_id)
    assert (again.sha256, again.object_path) == (first.sha256, first.object_path)
    await world.put({"src/file1.ts": "changed"})
    assert (await world.snapshots.build(world.project_id)).sha256 != first.sha256


@pytest.mark.parametrize("size", [200_000, 2_000_000])
async def test_an_archive_that_is_stored_holds_up_nobody(world: World, size: int) -> None:
    """On Storage's own HTTP server, behind a gateway that keeps connections, as hosted."""
    await world.put({"noise.txt": random.Random(size).randbytes(size).hex()})
    async with node_storage() as behind, nginx(behind) as port, httpx.AsyncClient() as http:
        snapshots = SnapshotBuilder(
            world.pool, StorageClient(f"http://127.0.0.1:{port}/storage/v1", "key", http)
        )
        first = await snapshots.build(world.project_id)
        assert first.bytes > size
        async with asyncio.timeout(20):
            for _ in range(3):
                again = await snapshots.build(world.project_id)
                assert again.object_path == first.object_path
                await snapshots.signed_url(again.object_path, 60)


async def test_a_full_one_says_too_what_is_gone(world: World) -> None:
    """An agent that has lost its ledger knows by that which files were ours."""
    await world.put({"a": "1", "b": "1"})
    await world.write({"action": "delete", "file_path": "b"})
    told = (await world.snapshots.build(world.project_id)).manifest
    assert (told["base_revision"], told["deleted"]) == (None, [{"file_path": "b", "version": 2}])


async def test_more_deletions_than_a_manifest_has_room_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine would refuse a manifest without end: a whole archive names the latest, and no delta is made."""
    monkeypatch.setattr(builder, "TOMBSTONE_BYTES", 3 * (len('"gone0"') + 40))
    await world.put({f"gone{n}": "1" for n in range(5)} | {"stays": "1"})
    base = 1
    for n in range(5):
        await world.write({"action": "delete", "file_path": f"gone{n}"})
    whole = (await world.snapshots.build(world.project_id)).manifest
    assert [entry["file_path"] for entry in whole["deleted"]] == ["gone2", "gone3", "gone4"]
    assert (await world.snapshots.build(world.project_id, base_revision=base)).manifest == {
        **whole, "build_seconds": pytest.approx(0, abs=60)
    }  # fmt: skip
    delta = (await world.snapshots.build(world.project_id, base_revision=base + 2)).manifest
    assert (delta["base_revision"], len(delta["deleted"])) == (base + 2, 3)


async def test_a_delta_has_what_is_newer_and_what_is_gone(world: World) -> None:
    base = await world.put({"a": "1", "b": "1", "c": "1"})
    await world.put({"a": "2", "d": "1"})
    await world.write({"action": "delete", "file_path": "b"})
    snapshot = await world.snapshots.build(world.project_id, base_revision=base)
    told = snapshot.manifest
    assert told["base_revision"] == base
    assert [f["file_path"] for f in told["files"]] == ["a", "d"]
    assert told["deleted"] == [{"file_path": "b", "version": 2}]
    with await world.archive(snapshot) as archive:
        assert archive.namelist() == [MANIFEST, "a", "d"]
    from_the_future = await world.snapshots.build(world.project_id, base_revision=99)
    assert from_the_future.manifest["base_revision"] is None


async def test_the_moment_is_one_although_others_write(world: World) -> None:
    """Every commit writes its number in both files: an archive with two numbers was read at two moments."""
    await world.put({"left": "0", "right": "0"})
    stop = asyncio.Event()

    async def keep_writing() -> None:
        async with await psycopg.AsyncConnection.connect(world.local.dsn, autocommit=True) as connection:
            number = 0
            while not stop.is_set():
                number += 1
                changes = [
                    {"action": "update", "file_path": p, "content": str(number)} for p in ("left", "right")
                ]
                await connection.execute(
                    "select public.apply_project_files(%s, %s::jsonb)",
                    (world.project_id, json.dumps(changes)),
                )

    writing = asyncio.create_task(keep_writing())
    try:
        for _ in range(15):
            snapshot = await world.snapshots.build(world.project_id)
            with await world.archive(snapshot) as archive:
                left, right = archive.read("left"), archive.read("right")
            assert left == right
            assert snapshot.manifest["revision"] == int(left) + 1
    finally:
        stop.set()
        await writing


async def test_an_offer_is_built_once_and_signed_again(world: World) -> None:
    await world.put({"a": "1"})
    kept = SnapshotCache(world.pool, world.snapshots, PostgresCacheStore(world.pool), url_ttl=600)
    first, second = await asyncio.gather(*(kept.signed_snapshot(world.project_id) for _ in range(2)))
    assert first.manifest == second.manifest
    answer = await world.http.get(first.url)
    assert answer.status_code == 200
    assert "apikey" not in answer.request.headers
    assert len(await world.storage.list(BUCKET, str(world.project_id))) == 1

    anew = await kept.signed_snapshot(world.project_id, rebuild=True)
    assert anew.url.partition("?")[0] != first.url.partition("?")[0]
    assert (await kept.signed_snapshot(world.project_id)).url == anew.url

    names = [
        f"{world.project_id}/{o['name']}" for o in await world.storage.list(BUCKET, str(world.project_id))
    ]
    await world.storage.delete(BUCKET, names)
    # The machine's agent finds that its URL leads nowhere, and asks for one that it has not tried.
    again = await kept.signed_snapshot(world.project_id, resign=True)
    assert (await world.http.get(again.url)).status_code == 200


async def test_a_session_begins_with_an_earlier_archive_where_little_was_saved_since(world: World) -> None:
    cache = SnapshotCache(
        world.pool, world.snapshots, PostgresCacheStore(world.pool), url_ttl=600, since_bytes=1000
    )

    async def begins_with() -> int:
        offer = await cache.signed_snapshot(world.project_id, earlier=True)
        assert (await world.http.get(offer.url)).status_code == 200
        return int(offer.manifest["revision"])

    await world.put({"a": "1"})
    assert await begins_with() == 1, "there is none: it is built"
    for number in range(20):
        await world.put({"a": f"{number}"})
    assert await begins_with() == 1
    assert (await cache.signed_snapshot(world.project_id)).manifest["revision"] == 21, "others get the head's"
    assert await begins_with() == 21
    await world.put({"a": "x" * 1001})
    assert await begins_with() == 22, "too much was saved"
    await world.put({f"f{number}": "" for number in range(newest.FILES_SINCE + 1)})
    assert await begins_with() == 23, "too many files were"
    await world.put({"a": "24"})
    await world.local.sql("update public.project_heads set pruned_revision = 24")
    assert await begins_with() == 24, "history is forgotten since"
    await world.put({"a": "25"})
    await world.snapshots.build(world.project_id, base_revision=24)
    assert await begins_with() == 24, "a delta is no beginning"
    await world.local.sql("select public.new_project_epoch()")
    assert await begins_with() == 25, "it is of another history"
    await world.put({"a": "26"})
    names = [
        f"{world.project_id}/{o['name']}" for o in await world.storage.list(BUCKET, f"{world.project_id}/")
    ]
    await world.storage.delete(BUCKET, names)
    assert await begins_with() == 26, "it is gone"
    lost = await world.asset(b"picture")
    await world.write({"file_path": "a.png", "content_hash": lost, "encoding": "base64"})
    await world.storage.delete("project-assets", [f"{world.project_id}/{lost}"])
    assert "unavailable" in (await cache.signed_snapshot(world.project_id)).manifest
    await world.put({"a": "28"})
    assert await begins_with() == 26, "one that lacks files is not for others"


async def test_a_url_expires(world: World) -> None:
    await world.put({"a": "1"})
    snapshot = await world.snapshots.build(world.project_id)
    url = await world.snapshots.signed_url(snapshot.object_path, 1)
    assert (await world.http.get(url)).status_code == 200
    async with asyncio.timeout(10):
        while (answer := await world.http.get(url)).status_code == 200:
            await asyncio.sleep(0.1)
    assert answer.json()["code"] == "InvalidJWT"


async def test_what_cannot_be_built_says_why(world: World) -> None:
    with pytest.raises(SnapshotUnavailable, match="there is no project"):
        await world.snapshots.build(uuid4())


async def test_a_file_whose_bytes_cannot_be_had_is_left_out_and_named(world: World) -> None:
    digest = await world.asset(b"not what the name says", named="0" * 64)
    await world.write(
        {"action": "update", "file_path": "x.png", "content_hash": digest, "encoding": "base64"},
        {"action": "update", "file_path": "a.txt", "content": "there\n"},
    )

    async def left_out() -> object:
        manifest = (await world.snapshots.build(world.project_id)).manifest
        assert [file["file_path"] for file in manifest["files"]] == ["a.txt"]
        return manifest["unavailable"]

    assert await left_out() == [{"file_path": "x.png", "reason": "wrong_bytes"}]
    await world.storage.delete("project-assets", [f"{world.project_id}/{digest}"])
    assert await left_out() == [{"file_path": "x.png", "reason": "lost"}]


async def test_no_room_for_the_archive_is_said_and_passes(world: World) -> None:
    """A file may not grow beyond a size here: what a full disk looks like to whoever writes."""
    content = random.Random(1).randbytes(SPOOL_BYTES + 2**20)
    digest = await world.asset(content)
    await world.write(
        {"action": "update", "file_path": "x.bin", "content_hash": digest, "encoding": "base64"}
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SPOOL_BYTES, limits[1]))
    try:
        with pytest.raises(SnapshotUnavailable, match="File too large"):
            await world.snapshots.build(world.project_id)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (await world.snapshots.build(world.project_id)).bytes > SPOOL_BYTES


async def test_storage_says_whether_trying_again_can_help(world: World) -> None:
    with pytest.raises(StorageFailure) as caught:
        await world.storage.sign(BUCKET, "nothing/here.zip", 60)
    assert (caught.value.code, caught.value.transient) == ("NoSuchKey", False)
    nobody = StorageClient("http://127.0.0.1:9/storage/v1", "secret-key", world.http)
    with pytest.raises(StorageFailure) as caught:
        await nobody.download(BUCKET, "x")
    assert caught.value.transient
    assert "secret-key" not in str(caught.value)
