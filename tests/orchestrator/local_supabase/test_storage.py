"""Storage: what goes in comes out, signed links end, and errors look like the original's."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from pathlib import Path

import httpx
import jwt
import pytest

from tests.fakes.serving import Local, serve_local

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUCKET = "project-snapshots"
OBJECT = f"/storage/v1/object/{BUCKET}"

Early = tuple[asyncio.StreamReader, asyncio.StreamWriter, str]


async def put(local: Local, name: str, content: bytes, **headers: str) -> httpx.Response:
    return await local.http.post(
        f"{OBJECT}/{name}", content=content, headers={"content-type": "application/zip", **headers}
    )


async def sign(local: Local, name: str, seconds: int = 60) -> str:
    answer = await local.http.post(f"/storage/v1/object/sign/{BUCKET}/{name}", json={"expiresIn": seconds})
    assert answer.status_code == 200, answer.text
    url: str = answer.json()["signedURL"]
    assert url.startswith(f"/object/sign/{BUCKET}/")
    return f"/storage/v1{url}"


def error(answer: httpx.Response) -> tuple[int, str, str]:
    body = answer.json()
    assert set(body) == {"statusCode", "error", "code", "message"}
    return answer.status_code, body["statusCode"], body["code"]


async def test_upload_sign_and_fetch_without_a_key(local: Local) -> None:
    content = bytes(range(256)) * 4096
    up = await put(local, "p 1/ü.zip", content)
    assert up.status_code == 200
    assert up.json()["Key"] == f"{BUCKET}/p 1/ü.zip"
    url = await sign(local, "p 1/ü.zip")
    claims = jwt.decode(url.partition("token=")[2], options={"verify_signature": False})
    assert claims["url"] == f"{BUCKET}/p 1/ü.zip"
    assert 0 < claims["exp"] - claims["iat"] <= 60
    async with httpx.AsyncClient(base_url=local.url) as nobody:
        got = await nobody.get(url)
        assert got.content == content
        assert got.headers["content-type"] == "application/zip"
        assert got.headers["etag"] == f'"{hashlib.md5(content).hexdigest()}"'
        part = await nobody.get(url, headers={"range": "bytes=10-19"})
        assert (part.status_code, part.content) == (206, content[10:20])
        assert part.headers["content-range"] == f"bytes 10-19/{len(content)}"
        same = await nobody.get(url, headers={"if-none-match": got.headers["etag"]})
        assert (same.status_code, same.content) == (304, b"")
        beyond = await nobody.get(url, headers={"range": f"bytes={len(content)}-"})
        assert beyond.status_code == 416


async def test_links_end_and_bind_to_one_object(local: Local) -> None:
    await put(local, "a.zip", b"a")
    await put(local, "b.zip", b"b")
    ended = local.keys.keyring.sign({"url": f"{BUCKET}/a.zip", "iat": 0, "exp": int(time.time()) - 1})
    good = (await sign(local, "a.zip")).partition("token=")[2]
    at = f"/storage/v1/object/sign/{BUCKET}"
    expired = await local.http.get(f"{at}/a.zip?token={ended}")
    assert error(expired) == (400, "400", "InvalidJWT")
    assert expired.json()["message"] == '"exp" claim timestamp check failed'
    assert error(await local.http.get(f"{at}/a.zip?token={good[:-6]}AAAAAA")) == (400, "400", "InvalidJWT")
    assert error(await local.http.get(f"{at}/b.zip?token={good}")) == (400, "400", "InvalidSignature")
    await local.http.delete(f"{OBJECT}/a.zip")
    assert error(await local.http.get(f"{at}/a.zip?token={good}")) == (400, "404", "NoSuchKey")
    missing = await local.http.post(f"{at}/nothing.zip", json={"expiresIn": 60})
    assert error(missing) == (400, "404", "NoSuchKey")


async def test_an_existing_object_is_replaced_only_on_request(local: Local) -> None:
    await put(local, "x", b"one")
    assert error(await put(local, "x", b"two")) == (400, "409", "KeyAlreadyExists")
    assert (await put(local, "x", b"three", **{"x-upsert": "true"})).status_code == 200
    assert (await local.http.get(f"{OBJECT}/x")).content == b"three"
    assert len(list(local.storage.iterdir())) == 1, "the replaced bytes are gone"


async def early(local: Local, name: str, token: str, *, declared: int, sent: int, extra: str = "") -> Early:
    """An upload of which only so many bytes are sent, and its answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", local.port)
    head = (
        f"POST {OBJECT}/{name} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Length: {declared}\r\n{extra}\r\n"
    )
    writer.write(head.encode() + b"x" * sent)
    async with asyncio.timeout(10):
        answer = await reader.readuntil(b"\r\n\r\n")
        length = int(re.search(rb"content-length: (\d+)", answer)[1])  # type: ignore[index]
        return reader, writer, json.loads(await reader.readexactly(length))["code"]


async def test_a_stored_key_is_refused_before_the_body_is_read_and_the_connection_is_deaf(
    local: Local,
) -> None:
    await put(local, "x", b"one")
    size = 2_000_000
    reader, writer, code = await early(local, "x", local.keys.service_key, declared=size, sent=1000)
    assert code == "KeyAlreadyExists"
    writer.write(b"x" * (size - 1000) + b"GET /storage/v1/bucket HTTP/1.1\r\nHost: x\r\n\r\n")
    following = asyncio.create_task(reader.read(1))
    # Others are served meanwhile, often enough for an answer here to have come.
    for _ in range(20):
        assert (await local.http.get(f"{OBJECT}/x")).content == b"one"
    assert not following.done()
    following.cancel()
    writer.close()


async def test_a_key_that_the_caller_may_not_write_is_refused_as_early(local: Local) -> None:
    _, writer, code = await early(local, "y", local.keys.anon_key, declared=2_000_000, sent=1000)
    assert code == "AccessDenied"
    writer.close()
    assert list(local.storage.iterdir()) == []


async def test_a_small_body_is_in_nobody_s_way_and_neither_is_a_connection_s_last(local: Local) -> None:
    await put(local, "x", b"one")
    key = local.keys.service_key
    reader, writer, code = await early(local, "x", key, declared=60_000, sent=60_000)
    assert code == "KeyAlreadyExists"
    writer.write(b"GET /storage/v1/bucket HTTP/1.1\r\nHost: x\r\n\r\n")
    async with asyncio.timeout(10):
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
    writer.close()
    last = "Connection: close\r\n"
    reader, writer, code = await early(local, "x", key, declared=60_000, sent=60_000, extra=last)
    async with asyncio.timeout(10):
        assert (code, await reader.read()) == ("KeyAlreadyExists", b"")
    writer.close()


async def test_an_overwrite_does_not_tear_a_download(local: Local) -> None:
    old, new = b"o" * 8_000_000, b"n" * 8_000_000
    await put(local, "big", old)
    async with local.http.stream("GET", f"{OBJECT}/big") as download:
        chunks = download.aiter_bytes(1000)
        head = await anext(chunks)
        assert (await put(local, "big", new, **{"x-upsert": "true"})).status_code == 200
        rest = b"".join([chunk async for chunk in chunks])
    assert head + rest == old
    assert (await local.http.get(f"{OBJECT}/big")).content == new


async def test_the_same_bytes_over_the_same_bytes_tear_nobody_s_download(local: Local) -> None:
    """Several who store what is named by its hash replace each other, and others read it meanwhile."""
    content = b"same" * 100_000
    upsert = {"x-upsert": "true"}

    async def write() -> None:
        for _ in range(15):
            assert (await put(local, "hash", content, **upsert)).status_code == 200

    async def read() -> None:
        for _ in range(40):
            assert (await local.http.get(f"{OBJECT}/hash")).content == content

    await put(local, "hash", content, **upsert)
    await asyncio.gather(write(), write(), write(), read(), read())
    await asyncio.gather(*(put(local, "first", content, **upsert) for _ in range(6)))
    assert len(list(local.storage.iterdir())) == 2, "and no bytes are left that nobody names"


async def test_size_limits(local: Local) -> None:
    await local.sql("insert into storage.buckets (id, name, file_size_limit) values ('small', 'small', 10)")
    small = "/storage/v1/object/small/x"
    assert error(await local.http.post(small, content=b"x" * 11)) == (400, "413", "EntityTooLarge")

    async def undeclared():  # type: ignore[no-untyped-def]
        for _ in range(11):
            yield b"x"

    assert error(await local.http.post(small, content=undeclared())) == (400, "413", "EntityTooLarge")
    assert (await local.http.post(small, content=b"x" * 10)).status_code == 200
    assert len(list(local.storage.iterdir())) == 1, "nothing of the refused is left"
    assert error(await local.http.post("/storage/v1/object/nowhere/x", content=b"")) == (
        400,
        "404",
        "NoSuchBucket",
    )


async def test_a_container_reaches_nothing_without_a_link(local: Local) -> None:
    await put(local, "secret", b"s")
    headers = {"authorization": f"Bearer {local.token(project_id='x')}", "apikey": local.keys.anon_key}
    at = f"/storage/v1/object/sign/{BUCKET}/secret"
    for answer in (
        await local.http.get(f"{OBJECT}/secret", headers=headers),
        await local.http.post(at, json={"expiresIn": 60}, headers=headers),
        await local.http.post(f"{OBJECT}/mine", content=b"", headers=headers),
        await local.http.delete(f"{OBJECT}/secret", headers=headers),
        await local.http.post(f"{OBJECT}/mine", content=b"", headers={"authorization": ""}),
    ):
        assert answer.status_code == 400
    assert (await local.http.get(f"{OBJECT}/secret")).content == b"s"
    anonymous = {"authorization": f"Bearer {local.keys.anon_key}"}
    assert error(await local.http.get(f"{OBJECT}/secret", headers=anonymous)) == (400, "404", "NoSuchKey")
    assert error(await local.http.post(f"{OBJECT}/y", content=b"", headers=anonymous)) == (
        400,
        "403",
        "AccessDenied",
    )


async def test_deleting_and_listing(local: Local) -> None:
    for name in ("p/1.zip", "p/2.zip", "p/deep/3.zip", "q/4.zip"):
        await put(local, name, b"x")
    listed = await local.http.post(f"/storage/v1/object/list/{BUCKET}", json={"prefix": "p"})
    assert [(e["name"], e["id"] is None) for e in listed.json()] == [
        ("1.zip", False), ("2.zip", False), ("deep", True),
    ]  # fmt: skip
    gone = await local.http.request("DELETE", OBJECT, json={"prefixes": ["p/1.zip", "q/4.zip", "nothing"]})
    assert sorted(e["name"] for e in gone.json()) == ["p/1.zip", "q/4.zip"]
    assert error(await local.http.delete(f"{OBJECT}/p/1.zip")) == (400, "404", "NoSuchKey")
    assert len(list(local.storage.iterdir())) == 2


async def test_buckets(local: Local) -> None:
    made = await local.http.post("/storage/v1/bucket", json={"name": "mine", "public": True})
    assert made.json() == {"name": "mine"}
    again = await local.http.post("/storage/v1/bucket", json={"name": "mine"})
    assert error(again) == (400, "409", "BucketAlreadyExists")
    assert "mine" in [b["id"] for b in (await local.http.get("/storage/v1/bucket")).json()]
    await local.http.post("/storage/v1/object/mine/x", content=b"x")
    async with httpx.AsyncClient(base_url=local.url) as nobody:
        assert (await nobody.get("/storage/v1/object/public/mine/x")).content == b"x"
        assert error(await nobody.get(f"/storage/v1/object/public/{BUCKET}/x")) == (
            400,
            "404",
            "NoSuchBucket",
        )
    assert error(await local.http.delete("/storage/v1/bucket/mine")) == (400, "409", "ResourceNotEmpty")
    await local.http.delete("/storage/v1/object/mine/x")
    assert (await local.http.delete("/storage/v1/bucket/mine")).status_code == 200


async def test_hostile_names_stay_names(local: Local) -> None:
    outside = local.storage.parent / "outside"
    for name in ("..%2f..%2foutside", "%2fetc%2fpasswd", "a%00b", "x" * 1100):
        await local.http.post(f"{OBJECT}/{name}", content=b"evil")
    assert not outside.exists()
    assert all(len(path.name) == 36 for path in local.storage.iterdir())


async def test_what_was_stored_outlives_a_restart(database: str, tmp_path: Path) -> None:
    async with serve_local(database, tmp_path) as first:
        await put(first, "kept", b"kept")
        (tmp_path / "cut-short.part").write_bytes(b"half")
    async with serve_local(database, tmp_path) as second:
        assert (await second.http.get(f"{OBJECT}/kept")).content == b"kept"
    assert not (tmp_path / "cut-short.part").exists()
