"""The HTTP client of Supabase Storage: upload, download, sign, list, delete. Hosted and local alike.

Storage hides what it means behind HTTP 400 and says it in a JSON body (`code`, `statusCode`); here that becomes one
exception that says whether trying again can help. The service key is sent with every call and is in no message.

Storage answers an upload that it refuses without reading it, and keeps the connection: whatever comes next on it waits
behind the unread body until a timeout (bodies from 150 KB; from 4 MB the upload itself). So a connection carries one
upload and nothing after it, and what is named by its hash is asked for before it is sent (`StorageClient.ensure`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import quote

import httpx
import orjson

ASSETS: Final = "project-assets"
"""The bucket of binary files, each named by its project and its SHA-256."""

TIMEOUT: Final = httpx.Timeout(10.0, read=60.0, write=60.0)
"""Seconds. Storage answers an upload only once the object is stored, hence the longer read."""

MAX_ERROR_BYTES: Final = 64 * 1024

TOO_LARGE: Final = "EntityTooLarge"

OBJECT_LIMIT: Final = 50 * 1024 * 1024
"""Bytes of one object: what a hosted project takes until somebody raises it."""


class StorageFailure(Exception):
    """Storage did not do what it was asked.

    `code` is Storage's own word (`NoSuchKey`, `KeyAlreadyExists` …) or `HTTP 502`, or the network error's class.
    `transient`: the same call may succeed later. `missing`: there is no such object, or bucket. `too_large`: the object
    is larger than Storage, or its bucket, takes.
    """

    def __init__(
        self,
        what: str,
        code: str,
        *,
        transient: bool,
        missing: bool = False,
        too_large: bool = False,
        detail: str | None = None,
    ) -> None:
        self.too_large = too_large
        self.code = code
        self.transient = transient
        self.missing = missing
        super().__init__(f"cannot {what}: {code}" + (f" ({detail})" if detail else ""))


class StorageClient:
    """`base_url` ends in `/storage/v1`; signed URLs begin with `public_url` when agents reach it by another name.

    `object_limit`: bytes of one object that the service takes (STORAGE_OBJECT_LIMIT). A larger one is not begun.
    """

    def __init__(
        self,
        base_url: str,
        service_key: str,
        http: httpx.AsyncClient,
        *,
        public_url: str | None = None,
        object_limit: int = OBJECT_LIMIT,
    ) -> None:
        self._limit = object_limit
        self._base = base_url.rstrip("/")
        self._public = (public_url or base_url).rstrip("/")
        self._headers = {"authorization": f"Bearer {service_key}", "apikey": service_key}
        self._http = http

    async def upload(
        self,
        bucket: str,
        path: str,
        content: bytes | AsyncIterator[bytes],
        size: int,
        *,
        content_type: str = "application/octet-stream",
        cache_seconds: int = 3600,
        replace: bool = False,
    ) -> None:
        """Store an object. One that is there is replaced, or else left alone and is `KeyAlreadyExists`.

        One above the limit is `EntityTooLarge`, whoever says so: we before it is sent, or Storage by a lower limit.
        """
        if size > self._limit:
            raise _too_large(path, f"{size} bytes, and STORAGE_OBJECT_LIMIT is {self._limit}")
        headers = {
            "content-type": content_type,
            "content-length": str(size),
            "cache-control": f"max-age={cache_seconds}",
            "x-upsert": str(replace).lower(),
            "connection": "close",
        }
        try:
            await self._call("POST", f"object/{_at(bucket, path)}", f"upload {path}", content, headers)
        except StorageFailure as failure:
            if failure.code != TOO_LARGE:
                raise
            raise _too_large(
                path,
                f"{size} bytes are above the limit of the bucket {bucket}, or of the whole service; raise it there, "
                "and give STORAGE_OBJECT_LIMIT the same number",
            ) from None

    async def ensure(
        self,
        bucket: str,
        path: str,
        content: bytes | AsyncIterator[bytes],
        size: int,
        *,
        content_type: str = "application/octet-stream",
    ) -> None:
        """Have an object stored whose name ends in its hash: one that is there has these bytes, and is not sent again.

        Who stores the same at the same moment is replaced by it, since a replacing upload is read to its end: a refused
        one would hold up the connection of a gateway in between, which closing ours does not reach (nginx, measured).
        """
        if await self.exists(bucket, path):
            return
        try:
            await self.upload(bucket, path, content, size, content_type=content_type, replace=True)
        except StorageFailure as failure:
            if failure.code == TOO_LARGE:
                raise
            # It may be there all the same: the answer was lost, or another upload of the same object won.
            try:
                stored = await self.exists(bucket, path)
            except StorageFailure:
                stored = False
            if not stored:
                raise

    async def exists(self, bucket: str, path: str) -> bool:
        """Whether the object is stored."""
        try:
            await self.sign(bucket, path, 1)
        except StorageFailure as failure:
            if failure.missing:
                return False
            raise
        return True

    async def sign(self, bucket: str, path: str, expires_in: int) -> str:
        """A URL that opens this object, and nothing else, for `expires_in` seconds."""
        what = f"sign {path}"
        body = orjson.dumps({"expiresIn": expires_in})
        answer = await self._call(
            "POST", f"object/sign/{_at(bucket, path)}", what, body, {"content-type": "application/json"}
        )
        url = answer.get("signedURL") if isinstance(answer, dict) else None
        if not isinstance(url, str) or not url.startswith("/"):
            raise StorageFailure(what, "the answer has no signedURL", transient=False)
        return self._public + url

    async def sign_upload(self, bucket: str, path: str) -> str:
        """A URL at which this object can be stored with a PUT, for two hours, unless it is there already."""
        what = f"sign the upload of {path}"
        headers = {"content-type": "application/json"}
        answer = await self._call("POST", f"object/upload/sign/{_at(bucket, path)}", what, b"{}", headers)
        url = answer.get("url") if isinstance(answer, dict) else None
        if not isinstance(url, str) or not url.startswith("/"):
            raise StorageFailure(what, "the answer has no url", transient=False)
        return self._public + url

    async def download(self, bucket: str, path: str) -> bytes:
        """The whole object."""
        async with self.stream(bucket, path) as chunks:
            return b"".join([chunk async for chunk in chunks])

    @asynccontextmanager
    async def stream(self, bucket: str, path: str) -> AsyncIterator[AsyncIterator[bytes]]:
        """The object as it arrives. Reading raises `StorageFailure` too."""
        what = f"download {path}"
        url = f"{self._base}/object/authenticated/{_at(bucket, path)}"
        try:
            async with self._http.stream("GET", url, headers=self._headers, timeout=TIMEOUT) as response:
                if response.status_code != 200:
                    raise await _failure(response, what)
                yield response.aiter_bytes()
        except httpx.HTTPError as error:
            raise StorageFailure(what, type(error).__name__, transient=True) from None

    async def list(self, bucket: str, prefix: str, *, limit: int = 1000) -> list[dict[str, Any]]:
        """The objects directly below `prefix`, as Storage describes them (`name`, `created_at` …)."""
        body = orjson.dumps({"prefix": prefix, "limit": limit, "offset": 0})
        headers = {"content-type": "application/json"}
        answer = await self._call("POST", f"object/list/{quote(bucket)}", f"list {prefix}", body, headers)
        return [item for item in answer if isinstance(item, dict)] if isinstance(answer, list) else []

    async def delete(self, bucket: str, paths: Sequence[str]) -> None:
        """Remove objects; those that are not there are no error."""
        body = orjson.dumps({"prefixes": list(paths)})
        headers = {"content-type": "application/json"}
        await self._call("DELETE", f"object/{quote(bucket)}", f"delete {len(paths)} objects", body, headers)

    async def _call(
        self, method: str, at: str, what: str, content: bytes | AsyncIterator[bytes], headers: dict[str, str]
    ) -> Any:
        try:
            response = await self._http.request(
                method,
                f"{self._base}/{at}",
                content=content,
                headers={**self._headers, **headers},
                timeout=TIMEOUT,
            )
        except httpx.HTTPError as error:
            # The class, not the text: httpx writes URLs into some of its messages.
            raise StorageFailure(what, type(error).__name__, transient=True) from None
        if not response.is_success:
            raise await _failure(response, what)
        try:
            return orjson.loads(response.content)
        except orjson.JSONDecodeError:
            raise StorageFailure(what, "the answer is not JSON", transient=True) from None


def _too_large(path: str, detail: str) -> StorageFailure:
    return StorageFailure(f"upload {path}", TOO_LARGE, transient=False, too_large=True, detail=detail)


def _at(bucket: str, path: str) -> str:
    return quote(f"{bucket}/{path}")


async def _failure(response: httpx.Response, what: str) -> StorageFailure:
    """What an unsuccessful answer means: JSON with a code below 500 is final, everything else may pass."""
    body = bytearray()
    if response.is_stream_consumed:
        body += response.content[:MAX_ERROR_BYTES]
    else:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_ERROR_BYTES:
                break
    try:
        told = orjson.loads(body)
    except orjson.JSONDecodeError:
        told = None
    code = (told.get("code") or told.get("error")) if isinstance(told, dict) else None
    status = response.status_code
    if isinstance(told, dict) and str(told.get("statusCode", "")).isdigit():
        status = int(told["statusCode"])
    if not isinstance(code, str):
        return StorageFailure(what, f"HTTP {status}", transient=True)
    return StorageFailure(
        what, code, transient=status == 429 or status >= 500, missing=status == 404, too_large=status == 413
    )
