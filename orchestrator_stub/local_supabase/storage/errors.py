"""Says no in Storage's form: a JSON body whose `statusCode` says 404 or 409, behind HTTP 400.

(supabase/storage `internal/errors`.) So is the moment: an upload of a stored key, or of one that the caller may not
write, is answered before its body is read.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

READ_AHEAD = 128 * 1024
"""Bytes of a refused body that the original's HTTP server takes in by itself: 100 KB did no harm there, 150 KB did."""

HELD_SECONDS = 72.0
"""For which a connection with an unread body stays open: Fastify's keep-alive timeout."""

AS_THEY_ARE = frozenset({500, 501, 544})
"""Statuses that stand in the HTTP answer too; every other one is behind a 400."""


class StorageError(Exception):
    """An answer in Storage's error form. `status` stands in the body; HTTP says 400 but for `AS_THEY_ARE`.

    `unread`: it is given before the request's body was read.
    """

    unread = False

    def __init__(self, status: int, code: str, message: str, error: str | None = None) -> None:
        self.status = status
        self.body = {"statusCode": str(status), "error": error or code, "code": code, "message": message}
        super().__init__(message)

    def response(self) -> Response:
        form = Unread if self.unread else JSONResponse
        return form(self.body, self.status if self.status in AS_THEY_ARE else 400)


class Unread(JSONResponse):
    """An answer before the request's body was read, which leaves the connection as the original does: open, and deaf.

    What follows a body of any size waits behind it until the client gives up. ASGI has no way to leave the body
    unread; here the answer is whole but not over, so that the next request is not begun, and the body is dropped.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        declared = headers.get("content-length", "")
        small = declared.isdecimal() and int(declared) <= READ_AHEAD
        if small or headers.get("connection", "").lower() == "close":
            await super().__call__(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(HELD_SECONDS):
                while (await receive())["type"] != "http.disconnect":
                    pass
        # Returning without the end closes the connection: a request that waited in it is not done long afterwards.


def no_object() -> StorageError:
    return StorageError(404, "NoSuchKey", "Object not found", "not_found")


def no_bucket() -> StorageError:
    return StorageError(404, "NoSuchBucket", "Bucket not found", "Bucket not found")


def denied() -> StorageError:
    return StorageError(403, "AccessDenied", "new row violates row-level security policy", "Unauthorized")


def exists_already(code: str) -> StorageError:
    return StorageError(409, code, "The resource already exists", "Duplicate")


def too_large() -> StorageError:
    text = "The object exceeded the maximum allowed size"
    return StorageError(413, "EntityTooLarge", text, "Payload too large")


def bad_type(kind: str) -> StorageError:
    return StorageError(415, "InvalidMimeType", f"mime type {kind} is not supported", "invalid_mime_type")


def malformed(text: str) -> StorageError:
    """As Fastify's schema validation answers, before Storage does."""
    return StorageError(400, "InvalidRequest", text, "Error")


def not_served(what: str) -> StorageError:
    text = f"{what}: not served by the local stand-in (docs/stand-in.md)"
    return StorageError(501, "NotImplemented", text, "not_implemented")
