"""Answers what is asked of the wrong database's orchestrator: 421, and where the right one is.

Not a redirect: clients drop the Authorization header on the way to another host, and a session's token has no business
on an address that an answer names. It is answered before anybody is asked who they are, for an id says no more.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Final
from urllib.parse import parse_qs
from uuid import UUID

import orjson
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orchestrator_stub.http.problems import Refusal, render
from orchestrator_stub.http.requests import BODY_SECONDS
from orchestrator_stub.shards.placement import Shards

NAMED: Final = re.compile(r"/v1/(?:sessions|projects)/([^/]+)")


class Misdirected:
    """ASGI: `app` for what is on the database `shards.own`. `origins`: whose pages may read the answer, as of CORS."""

    def __init__(self, app: ASGIApp, shards: Shards, *, origins: Sequence[str], body_limit: int) -> None:
        self._app = app
        self._shards = shards
        self._origins = origins
        self._body_limit = body_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        ids = list(_ids_of(scope))
        if scope["method"] == "POST" and scope["path"] == "/v1/sessions":
            receive, body = await self._read(receive)
            ids += _ids(_project_of(body))
        shard = self._shards.elsewhere(ids)
        app = self._app if shard is None else self._refused(shard)
        await app(scope, receive, send)

    def _refused(self, shard: int) -> ASGIApp:
        url = self._shards.url_of(shard)
        where = f"ask {url}" if url else "of which nothing is known here"
        detail = f"That is on database {shard}, {where}. This is {self._shards.own}."
        answer = render(Refusal(421, "misdirected", detail, extra={"shard": shard, "url": url}))
        return CORSMiddleware(answer, allow_origins=self._origins) if self._origins else answer

    async def _read(self, receive: Receive) -> tuple[Receive, bytes]:
        """The body as far as it is read, and a `receive` that gives it once more.

        What comes too late or is too large is for the route to refuse.
        """
        messages: list[Message] = []
        body = b""
        with suppress(TimeoutError):
            async with asyncio.timeout(BODY_SECONDS):
                while len(body) <= self._body_limit:
                    messages.append(await receive())
                    body += messages[-1].get("body", b"")
                    if not messages[-1].get("more_body", False):
                        break

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        return again, body


def _ids_of(scope: Scope) -> Iterator[UUID]:
    """The ids that path and query name."""
    if named := NAMED.match(scope["path"]):
        yield from _ids(named[1])
    for text in parse_qs(scope["query_string"].decode("latin-1")).get("project_id", []):
        yield from _ids(text)


def _ids(text: object) -> list[UUID]:
    """The id that `text` is; none where it is not one, which the route refuses."""
    with suppress(ValueError):
        return [UUID(text)] if isinstance(text, str) else []
    return []


def _project_of(body: bytes) -> object:
    with suppress(orjson.JSONDecodeError):
        said = orjson.loads(body)
        return said.get("project_id") if isinstance(said, dict) else None
    return None
