"""Storage's further doors: forms, signed uploads, moves, listings, buckets; and what is refused is refused by name."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import pytest

from tests.fakes.serving import Local

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUCKET = "project-snapshots"
V1 = "/storage/v1"
OBJECT = f"{V1}/object/{BUCKET}"


async def put(local: Local, name: str, content: bytes = b"x", **headers: str) -> None:
    headers = {"content-type": "text/plain", **headers}
    answer = await local.http.post(f"{OBJECT}/{name}", content=content, headers=headers)
    assert answer.status_code == 200, answer.text


async def post(local: Local, at: str, **body: Any) -> httpx.Response:
    return await local.http.post(f"{V1}/{at}", json=body)


def refusal(answer: httpx.Response) -> tuple[int, str, str]:
    body = answer.json()
    assert set(body) == {"statusCode", "error", "code", "message"}
    return answer.status_code, body["statusCode"], body["code"]


async def test_a_form_is_an_upload(local: Local) -> None:
    """As browsers send a Blob: the fields first, the file's own type."""
    said = {"cacheControl": "60", "metadata": json.dumps({"by": "me"})}
    content = bytes(range(256)) * 2000
    answer = await local.http.post(f"{OBJECT}/a.bin", data=said, files={"": ("blob", content, "image/png")})
    assert answer.json()["Key"] == f"{BUCKET}/a.bin"
    got = await local.http.get(f"{OBJECT}/a.bin")
    assert got.content == content
    assert (got.headers["content-type"], got.headers["cache-control"]) == ("image/png", "max-age=60")
    info = (await local.http.get(f"{V1}/object/info/{BUCKET}/a.bin")).json()
    assert (info["size"], info["metadata"], info["content_type"]) == (len(content), {"by": "me"}, "image/png")


async def test_forms_that_are_none(local: Local) -> None:
    small = {"name": "forms", "file_size_limit": 100, "allowed_mime_types": ["image/*"]}
    await post(local, "bucket", **small)
    at = f"{V1}/object/forms/x"
    image = ("x.png", b"x" * 100, "image/png")
    for content, expected in (
        ({"files": {"a": (None, "b")}}, "InvalidRequest"),
        ({"files": {"": ("x", b"x", "text/plain")}}, "InvalidMimeType"),
        ({"files": {"": ("x.png", b"x" * 101, "image/png")}}, "EntityTooLarge"),
        ({"data": {"a": "b" * 2_000_000}, "files": {"": image}}, "EntityTooLarge"),
        (
            {"content": b"--b\r\nno form", "headers": {"content-type": "multipart/form-data; boundary=b"}},
            "InvalidRequest",
        ),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "InvalidRequest"),
    ):
        answer = await local.http.post(at, **content)
        assert refusal(answer)[2] == expected, content
    cut = (
        b'--b\r\nContent-Disposition: form-data; name=""; filename="x"\r\nContent-Type: image/png\r\n\r\nhalf'
    )
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert refusal(await local.http.post(at, content=cut, headers=headers))[2] == "InvalidRequest"
    assert list(local.storage.iterdir()) == []
    assert (await local.http.post(at, files={"": image})).status_code == 200


async def test_a_bucket_takes_what_it_names(local: Local) -> None:
    await post(local, "bucket", name="typed", allowed_mime_types=["text/plain", "image/*"])
    at = f"{V1}/object/typed"
    for kind, taken in (("text/plain; charset=utf-8", True), ("image/webp", True), ("text/html", False)):
        answer = await local.http.post(
            f"{at}/{kind[:4]}{taken}", content=b"x", headers={"content-type": kind}
        )
        assert answer.is_success is taken, answer.text
    assert refusal(answer) == (400, "415", "InvalidMimeType")


async def test_the_client_s_metadata(local: Local) -> None:
    said = base64.b64encode(b'{"a": 1}').decode()
    await put(local, "m", **{"x-metadata": said})
    info = (await local.http.get(f"{V1}/object/info/authenticated/{BUCKET}/m")).json()
    assert info["metadata"] == {"a": 1}
    await put(local, "n", **{"x-metadata": "no base64!"})
    assert (await local.http.get(f"{V1}/object/info/{BUCKET}/n")).json()["metadata"] is None
    assert refusal(await local.http.get(f"{V1}/object/info/{BUCKET}/nothing")) == (400, "404", "NoSuchKey")


async def test_many_links_at_once(local: Local) -> None:
    await put(local, "a b.txt", b"ab")
    answer = await post(local, f"object/sign/{BUCKET}", expiresIn="60", paths=["a b.txt", "nothing"])
    there, missing = answer.json()
    assert (there["path"], there["error"]) == ("a b.txt", None)
    assert (missing["path"], missing["signedURL"]) == ("nothing", None)
    assert "does not exist" in missing["error"]
    async with httpx.AsyncClient(base_url=local.url) as nobody:
        assert (await nobody.get(f"{V1}{there['signedURL']}")).content == b"ab"


async def test_a_signed_upload_stores_one_object(local: Local) -> None:
    at = f"{V1}/object/upload/sign/{BUCKET}"
    made = (await local.http.post(f"{at}/new.txt")).json()
    async with httpx.AsyncClient(base_url=local.url) as nobody:
        url = f"{V1}{made['url']}"
        up = await nobody.put(url, content=b"new", headers={"content-type": "text/plain"})
        assert up.json() == {"Key": f"{BUCKET}/new.txt"}
        assert refusal(await nobody.put(url, content=b"again"))[2] == "KeyAlreadyExists"
        other = await nobody.put(f"{at}/other.txt?token={made['token']}", content=b"x")
        assert refusal(other)[2] == "InvalidSignature"
        assert refusal(await nobody.put(f"{at}/new.txt", content=b"x"))[2] == "InvalidRequest"
        # Neither link is the other.
        reading = (await post(local, f"object/sign/{BUCKET}/new.txt", expiresIn=60)).json()["signedURL"]
        token = reading.partition("token=")[2]
        assert refusal(await nobody.put(f"{at}/new.txt?token={token}", content=b"x"))[2] == "InvalidSignature"
        wrong = await nobody.get(f"{V1}/object/sign/{BUCKET}/new.txt?token={made['token']}")
        assert refusal(wrong)[2] == "InvalidSignature"
        upsert = (await local.http.post(f"{at}/new.txt", headers={"x-upsert": "true"})).json()["url"]
        assert (await nobody.put(f"{V1}{upsert}", content=b"newer")).status_code == 200
    assert (await local.http.get(f"{OBJECT}/new.txt")).content == b"newer"
    assert refusal(await local.http.post(f"{at}/new.txt"))[2] == "KeyAlreadyExists"


async def test_nobody_signs_an_upload_they_may_not_make(local: Local) -> None:
    anonymous = {"authorization": f"Bearer {local.keys.anon_key}"}
    answer = await local.http.post(f"{V1}/object/upload/sign/{BUCKET}/x", headers=anonymous)
    assert refusal(answer) == (400, "403", "AccessDenied")


async def test_moving_and_copying(local: Local) -> None:
    await put(local, "a", b"one")
    moved = await post(local, "object/move", bucketId=BUCKET, sourceKey="a", destinationKey="b/c")
    assert moved.json()["message"] == "Successfully moved"
    assert refusal(await local.http.get(f"{OBJECT}/a"))[2] == "NoSuchKey"
    copied = await post(local, "object/copy", bucketId=BUCKET, sourceKey="b/c", destinationKey="d")
    assert copied.json()["Key"] == f"{BUCKET}/d"
    await local.http.delete(f"{OBJECT}/b/c")
    assert (await local.http.get(f"{OBJECT}/d")).content == b"one", "the copy has bytes of its own"
    await put(local, "e", b"two")
    for way in ("move", "copy"):
        again = await post(local, f"object/{way}", bucketId=BUCKET, sourceKey="d", destinationKey="e")
        assert refusal(again)[1:] == ("409", "KeyAlreadyExists")
        missing = await post(local, f"object/{way}", bucketId=BUCKET, sourceKey="a", destinationKey="f")
        assert refusal(missing)[1:] == ("404", "NoSuchKey")
        nowhere = await post(
            local,
            f"object/{way}",
            bucketId=BUCKET,
            sourceKey="d",
            destinationKey="f",
            destinationBucket="none",
        )
        assert refusal(nowhere)[1:] == ("404", "NoSuchBucket")
    over = await local.http.post(
        f"{V1}/object/copy", headers={"x-upsert": "true"},
        json={"bucketId": BUCKET, "sourceKey": "d", "destinationKey": "e", "metadata": {"n": 1}, "copyMetadata": False},
    )  # fmt: skip
    assert over.json()["user_metadata"] == {"n": 1}
    assert len(list(local.storage.iterdir())) == 2


async def test_a_page_of_a_listing(local: Local) -> None:
    for name in ("p/1.txt", "p/2.txt", "p/deep/3.txt", "p/deep/4.txt", "q"):
        await put(local, name)
    listed = await post(
        local,
        f"object/list/{BUCKET}",
        prefix="p",
        limit=2,
        offset=1,
        sortBy={"column": "name", "order": "desc"},
    )
    assert [e["name"] for e in listed.json()] == ["2.txt", "1.txt"]
    searched = await post(local, f"object/list/{BUCKET}", prefix="p", search="DE")
    assert [(e["name"], e["id"]) for e in searched.json()] == [("deep", None)]


async def test_every_page_of_list_v2(local: Local) -> None:
    for name in ("p/1", "p/2", "p/deep/3", "p/deep/4", "p/z", "q"):
        await put(local, name)
    for sort in ("name", "created_at"):
        for order, turned in (("asc", 1), ("desc", -1)):
            found, cursor = [], None
            while True:
                body = {"prefix": "p/", "limit": 2, "sortBy": {"column": sort, "order": order}}
                page = (await post(local, f"object/list-v2/{BUCKET}", **body, **cursor or {})).json()
                found += [e["name"] for e in page["objects"]]
                if not page["hasNext"]:
                    break
                cursor = {"cursor": page["nextCursor"]}
            assert found == ["p/1", "p/2", "p/deep/3", "p/deep/4", "p/z"][::turned]
    page = (await post(local, f"object/list-v2/{BUCKET}", prefix="p/", with_delimiter=True)).json()
    assert [(e["name"], e["key"]) for e in page["folders"]] == [("p/deep/", "deep")]
    assert [(e["name"], e["key"]) for e in page["objects"]] == [("p/1", "1"), ("p/2", "2"), ("p/z", "z")]
    assert refusal(await post(local, f"object/list-v2/{BUCKET}", cursor="bm8="))[2] == "InvalidParameter"


async def test_a_bucket_changes_and_is_emptied(local: Local) -> None:
    await post(local, "bucket", name="mine", file_size_limit="20KB")
    bucket = (await local.http.get(f"{V1}/bucket/mine")).json()
    assert (bucket["file_size_limit"], bucket["public"], bucket["owner"]) == (20_000, False, "")
    changed = await local.http.put(
        f"{V1}/bucket/mine", json={"public": True, "allowed_mime_types": ["image/png"]}
    )
    assert changed.json() == {"message": "Successfully updated"}
    bucket = (await local.http.get(f"{V1}/bucket/mine")).json()
    assert (bucket["file_size_limit"], bucket["public"], bucket["allowed_mime_types"]) == (
        20_000,
        True,
        ["image/png"],
    )
    headers = {"content-type": "image/png"}
    assert (await local.http.post(f"{V1}/object/mine/x", content=b"x", headers=headers)).status_code == 200
    assert (await local.http.post(f"{V1}/bucket/mine/empty")).status_code == 200
    assert list(local.storage.iterdir()) == []
    assert (await local.http.delete(f"{V1}/bucket/mine")).status_code == 200
    for answer in (
        await local.http.get(f"{V1}/bucket/mine"),
        await local.http.put(f"{V1}/bucket/mine", json={}),
        await local.http.post(f"{V1}/bucket/mine/empty"),
        await local.http.delete(f"{V1}/bucket/mine"),
    ):
        assert refusal(answer)[1:] == ("404", "NoSuchBucket")


@pytest.mark.parametrize(
    ("at", "body", "status"),
    [
        (f"object/sign/{BUCKET}/x", {"expiresIn": 10**15}, "400"),
        (f"object/sign/{BUCKET}/x", {"expiresIn": 1e15}, "400"),
        (f"object/sign/{BUCKET}/x", {"expiresIn": 10**30}, "400"),
        (f"object/sign/{BUCKET}/x", {"expiresIn": "soon"}, "400"),
        (f"object/sign/{BUCKET}/x", {"expiresIn": 0}, "400"),
        (f"object/sign/{BUCKET}", {"expiresIn": 60, "paths": []}, "400"),
        (f"object/sign/{BUCKET}", {"expiresIn": 60, "paths": ["a\0b"]}, "400"),
        (f"object/list/{BUCKET}", {"limit": "a"}, "400"),
        (f"object/list/{BUCKET}", {"limit": 10**30}, "400"),
        (f"object/list/{BUCKET}", {"offset": -1}, "400"),
        (f"object/list/{BUCKET}", {"prefix": "a\0b"}, "400"),
        (f"object/list/{BUCKET}", {"prefix": 7}, "400"),
        (f"object/list/{BUCKET}", {"sortBy": {"column": "id; drop"}}, "400"),
        (f"object/list-v2/{BUCKET}", {"prefix": "a\0b"}, "400"),
        ("object/move", {"bucketId": BUCKET, "sourceKey": "a\0b", "destinationKey": "c"}, "400"),
        ("object/copy", {"bucketId": BUCKET, "sourceKey": "a", "destinationKey": "a\0b"}, "400"),
        ("object/move", {"bucketId": BUCKET}, "400"),
        ("bucket", {"name": "a\0b"}, "400"),
        ("bucket", {"name": "a/b"}, "400"),
        ("bucket", {"name": "big", "file_size_limit": "1 apple"}, "422"),
        ("bucket", {"name": "big", "file_size_limit": "1mb and more"}, "422"),
        ("bucket", {"name": "big", "file_size_limit": 10**30}, "413"),
        ("bucket", {"name": "big", "file_size_limit": "999999999999999gb"}, "413"),
        ("bucket", {"name": "big", "file_size_limit": -1}, "400"),
        ("bucket", {"name": "big", "allowed_mime_types": ["no type"]}, "415"),
    ],
)  # fmt: skip
async def test_what_is_malformed_is_a_400(local: Local, at: str, body: dict[str, Any], status: str) -> None:
    await put(local, "x")
    answer = await local.http.post(f"{V1}/{at}", content=json.dumps(body))
    assert refusal(answer)[:2] == (400, status), answer.text


async def test_a_limit_in_words_is_bytes(local: Local) -> None:
    """The original reads `1mb` in any case of its letters."""
    assert (await post(local, "bucket", name="worded", file_size_limit="1mb")).status_code == 200
    assert (await local.http.get(f"{V1}/bucket/worded")).json()["file_size_limit"] == 1_000_000


@pytest.mark.parametrize(
    ("method", "at", "name"),
    [
        ("POST", "upload/resumable", "resumable uploads"),
        ("GET", f"render/image/public/{BUCKET}/x.png", "image transformation"),
        ("GET", "s3/x", "S3"),
        ("POST", "vector/CreateIndex", "vector buckets"),
        ("POST", "iceberg/bucket", "analytics buckets"),
        ("DELETE", f"cdn/{BUCKET}/x", "CDN"),
        ("GET", f"bucket/{BUCKET}/lifecycle", f"/bucket/{BUCKET}/lifecycle"),
        ("GET", f"object/{BUCKET}/x?versionId=1", "versions"),
    ],
)
async def test_what_is_not_served_says_its_name(local: Local, method: str, at: str, name: str) -> None:
    answer = await local.http.request(method, f"{V1}/{at}")
    assert refusal(answer) == (501, "501", "NotImplemented")
    assert name in answer.json()["message"]
