"""Puts Storage's endpoints together: their routes, in order, and what becomes of a refusal.

What the original serves and this does not is answered 501 with its name (`NOT_SERVED`).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg
from psycopg.errors import InsufficientPrivilege
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orchestrator_stub.local_supabase.access import Pool
from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.local_supabase.storage.buckets import Buckets
from orchestrator_stub.local_supabase.storage.errors import StorageError, denied, malformed, not_served
from orchestrator_stub.local_supabase.storage.listing import Listing
from orchestrator_stub.local_supabase.storage.objects import Objects
from orchestrator_stub.local_supabase.storage.store import Store
from orchestrator_stub.local_supabase.storage.uploads import Uploads

Endpoint = Callable[[Request], Awaitable[Response]]

NOT_SERVED = {
    "upload": "resumable uploads (TUS)",
    "render": "image transformation",
    "s3": "the S3 protocol",
    "vector": "vector buckets",
    "iceberg": "analytics buckets",
    "cdn": "purging the CDN",
}
"""By the first segment after `/storage/v1`."""

ANY = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class Storage:
    """The `/storage/v1` endpoints. Files live in `directory`; `clock` gives Unix seconds."""

    def __init__(
        self, pool: Pool, keys: ProjectKeys, directory: Path, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = Store(pool, keys, directory, clock)

    def open(self) -> None:
        """Make the directory, and clear uploads that a stop cut short. Raises `OSError`."""
        directory = self._store.directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in directory.glob("*.part"):
            leftover.unlink()

    def routes(self) -> list[Route]:
        buckets, objects = Buckets(self._store), Objects(self._store)
        listing, uploads = Listing(self._store), Uploads(self._store)
        one, named = "bucket/{bucket}", "{bucket}/{name:path}"
        table: list[tuple[str, Endpoint, list[str]]] = [
            ("bucket", buckets.list_all, ["GET"]),
            ("bucket", buckets.create, ["POST"]),
            (one, buckets.get, ["GET"]),
            (one, buckets.update, ["PUT"]),
            (one, buckets.delete, ["DELETE"]),
            (f"{one}/empty", buckets.empty, ["POST"]),
            ("object/list/{bucket}", listing.list_folder, ["POST"]),
            ("object/list-v2/{bucket}", listing.list_v2, ["POST"]),
            ("object/move", objects.move, ["POST"]),
            ("object/copy", objects.copy, ["POST"]),
            ("object/sign/{bucket}", objects.sign_many, ["POST"]),
            (f"object/sign/{named}", objects.sign, ["POST"]),
            (f"object/sign/{named}", objects.signed, ["GET"]),
            (f"object/upload/sign/{named}", uploads.sign, ["POST"]),
            (f"object/upload/sign/{named}", uploads.signed, ["PUT"]),
            (f"object/info/public/{named}", objects.public_info, ["GET"]),
            (f"object/info/authenticated/{named}", objects.info, ["GET"]),
            (f"object/info/{named}", objects.info, ["GET"]),
            (f"object/public/{named}", objects.public, ["GET"]),
            (f"object/authenticated/{named}", objects.read, ["GET"]),
            (f"object/{named}", objects.read, ["GET"]),
            (f"object/{named}", uploads.upload, ["POST", "PUT"]),
            (f"object/{named}", objects.remove_one, ["DELETE"]),
            ("object/{bucket}", objects.remove_many, ["DELETE"]),
            ("{rest:path}", self._rest, ANY),
        ]
        return [Route(f"/storage/v1/{at}", _answer(endpoint), methods=ways) for at, endpoint, ways in table]

    async def _rest(self, request: Request) -> Response:
        rest: str = request.path_params["rest"]
        raise not_served(NOT_SERVED.get(rest.partition("/")[0], f"{request.method} /storage/v1/{rest[:200]}"))


def _answer(endpoint: Endpoint) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        try:
            if "versionId" in request.query_params:
                raise not_served("versions of objects")
            return await endpoint(request)
        except StorageError as error:
            return error.response()
        except InsufficientPrivilege:
            return denied().response()
        except (psycopg.DataError, UnicodeEncodeError) as error:
            # What no column holds, such as a NUL in a text.
            return malformed(" ".join(str(error).split())).response()
        except psycopg.OperationalError:
            # 544 is Storage's own number for this.
            return StorageError(544, "DatabaseTimeout", "The connection to the database timed out").response()
        except psycopg.Error as error:
            return StorageError(500, "DatabaseError", " ".join(str(error).split())).response()

    return answer
