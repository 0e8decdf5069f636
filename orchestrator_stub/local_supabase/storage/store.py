"""What Storage's endpoints share: the database, the keys, the directory of files, and how a request is read.

A file is named by its row's `version`, never by its path: an overwrite is a new file and a changed row, so a
reader in the middle of a download keeps what it began with, and no path can climb out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from orchestrator_stub.local_supabase.access import Claims, Pool, read_claims
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.storage.errors import StorageError, malformed, no_bucket
from orchestrator_stub.platform.tokens import TokenRejected

MAX_OBJECT_BYTES = 50 * 1024 * 1024
"""The hosted default of one upload; a bucket's `file_size_limit` can only lower it."""

LAST_SECOND = 253_402_300_799
"""The end of the year 9999, Unix seconds: no date header goes beyond."""

Body = TypeVar("Body", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Store:
    """`directory` holds the files; `clock` gives Unix seconds."""

    pool: Pool
    keys: ProjectKeys
    directory: Path
    clock: Callable[[], float]

    def file(self, version: str) -> Path:
        return self.directory / version

    def claims(self, request: Request) -> Claims:
        """Who asks. Raises `StorageError`."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise malformed("headers must have required property 'authorization'")
        try:
            return read_claims(self.keys.keyring, token, now=self.clock())
        except TokenRejected as error:
            raise StorageError(403, "AccessDenied", jwt_text(error), "Unauthorized") from None

    async def limits(self, bucket: str) -> tuple[int, Sequence[str]]:
        """Bytes of an object, and the MIME types that the bucket takes (none: all). Raises `StorageError`."""
        async with self.pool.connection() as connection:
            query = "select file_size_limit, allowed_mime_types from storage.buckets where id = %s"
            row = await (await connection.execute(query, [bucket])).fetchone()
        if row is None:
            raise no_bucket()
        return MAX_OBJECT_BYTES if row[0] is None else min(row[0], MAX_OBJECT_BYTES), row[1] or ()

    def sign(self, scope: str, at: str, seconds: int, **claims: object) -> str:
        """A token for the object at `at` (`bucket/name`), to `download` or to `upload`. Raises `StorageError`."""
        now = int(self.clock())
        if now + seconds > LAST_SECOND:
            raise malformed(f"body/expiresIn must be <= {LAST_SECOND - now}")
        return self.keys.keyring.sign({"url": at, "scope": scope, "iat": now, "exp": now + seconds, **claims})

    def signature(self, request: Request, scope: str) -> Claims:
        """The claims of the token in the URL, which is for this object and this use of it. Raises `StorageError`."""
        token = request.query_params.get("token")
        if not token:
            raise malformed("querystring must have required property 'token'")
        try:
            claims = read_claims(self.keys.keyring, token, now=self.clock())
        except TokenRejected as error:
            raise StorageError(400, "InvalidJWT", jwt_text(error)) from None
        if claims.get("scope", "download") != scope or claims.get("url") != "/".join(address(request)):
            raise StorageError(400, "InvalidSignature", "Invalid signature")
        return claims


async def read_body(request: Request, model: type[Body]) -> Body:
    """The JSON body, with the original's leniency (`"60"` is a number). Raises `StorageError`."""
    try:
        return model.model_validate_json(await request.body() or b"{}")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise malformed("/".join(["body", *map(str, first["loc"])]) + f": {first['msg']}") from None


def address(request: Request) -> tuple[str, str]:
    """Bucket and name of the URL. Raises `StorageError`."""
    name: str = request.path_params["name"]
    return request.path_params["bucket"], key(name)


def key(name: str) -> str:
    """The name, if an object can have it. Raises `StorageError`."""
    if not name or len(name.encode("utf-8", "surrogatepass")) > 1024 or any(ord(c) < 32 for c in name):
        raise StorageError(400, "InvalidKey", f"Invalid key: {name!r}")
    return name


def jwt_text(error: TokenRejected) -> str:
    """The sentence of the library the original verifies with (jose)."""
    match error.reason:
        case "expired":
            return '"exp" claim timestamp check failed'
        case "signature" | "key":
            return "signature verification failed"
        case _:
            return "Invalid Compact JWS"
