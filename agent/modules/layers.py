"""Fetches a layer from the orchestrator's storage, and sends one there.

What is fetched is streamed into a program that runs as the project's user, and counts only when every part had the size
and the hash that the orchestrator named: until then it lies in a staging directory. Nothing here is needed for a
preview to come up, so whatever goes wrong is a `LayerFailed` with an outcome for the metric, and the install is run.

The URLs are credentials: they are in no message, and no exception that has one is chained.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, Literal

import httpx
import msgspec

from agent.core.errors import AgentError
from agent.net import exchange
from agent.session_api import SessionApi

if sys.version_info < (3, 14):
    from backports import zstd

PART_BYTES: Final = 45 * 2**20
"""Of one object: Supabase Storage takes 50 MB by default."""
MOST_PARTS: Final = 24
"""A gigabyte of archive, some seven of node_modules."""
READ: Final = 128 * 1024
TIMEOUT: Final = httpx.Timeout(10.0, read=20.0, write=60.0)
"""Seconds, between two bytes. A CDN may fetch an object first; Storage answers an upload when it is stored."""
FETCH_SECONDS: Final = 300.0
"""For a whole layer: as long as an install may take, which by then has been started beside it."""
SEND_SECONDS: Final = 900.0

START: Final = (
    "import sys; sys.path[:0] = sys.argv[1].split(':'); "
    "from agent.modules.archive import main; sys.exit(main(sys.argv[2:]))"
)

Key = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{40}$")]
Write = Callable[[bytes], Awaitable[None]]


class Part(msgspec.Struct, frozen=True):
    """One object of a layer, in the order of the archive."""

    url: str
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size: Annotated[int, msgspec.Meta(ge=1, le=2**30)]


class _Found(msgspec.Struct, frozen=True):
    kind: Literal["layer", "missing"]
    parts: Annotated[tuple[Part, ...], msgspec.Meta(max_length=MOST_PARTS)] = ()
    upload_urls: Annotated[tuple[str, ...], msgspec.Meta(max_length=MOST_PARTS)] = ()
    max_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that can be fetched."""

    key: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """There is no layer of that key. `upload_urls`: where one may be sent, a part each; none: it is not wanted."""

    key: str
    upload_urls: tuple[str, ...]
    max_bytes: int
    ahead: bool = True


class LayerFailed(Exception):
    """A layer could not be had or sent. `outcome`: `unavailable`, or `refused` when nothing of it was used.

    `its_fault`: what is stored is no good, and will be no good for the next machine.
    """

    def __init__(
        self, outcome: Literal["unavailable", "refused"], reason: str, *, its_fault: bool = False
    ) -> None:
        self.outcome = outcome
        self.its_fault = its_fault
        super().__init__(reason)


def given_layer(key: str | None, parts: str | None) -> Layer | None:
    """Read MODULES_KEY and MODULES_PARTS; None where they are missing or no good: the orchestrator is asked then."""
    if not key or not parts:
        return None
    try:
        read = msgspec.json.decode(
            parts, type=Annotated[tuple[Part, ...], msgspec.Meta(max_length=MOST_PARTS)]
        )
        return Layer(msgspec.convert(key, Key), read) if read else None
    except (msgspec.DecodeError, ValueError):
        return None


def read_answer(key: str, answer: object) -> Layer | Missing:
    """Read what the orchestrator answers to a key. Raises `LayerFailed`."""
    try:
        found = msgspec.convert(answer, _Found)
    except msgspec.ValidationError as error:
        raise LayerFailed("unavailable", f"the answer cannot be read: {error}") from None
    if found.kind == "layer" and found.parts:
        return Layer(key, found.parts)
    return Missing(key, found.upload_urls, found.max_bytes)


class LayerStore:
    """The layers that this session may fetch and send."""

    def __init__(self, api: SessionApi | None, http: httpx.AsyncClient, given: Layer | None = None) -> None:
        """Make it.

        Args:
            api: Who knows the layers; None: nobody, and only `given` is known.
            http: For the parts.
            given: The layer that was named when the machine was made. Its URLs are good for minutes, and a machine that
                starts again has the same: what it comes to is asked for then.
        """
        self._api = api
        self._http = http
        self.given = given

    async def find(
        self, key: str, *, refused: Layer | None = None, ahead: bool = True, send: bool = True
    ) -> Layer | Missing:
        """Return the layer of that key. Raises `LayerFailed`.

        Args:
            key: Of the layer.
            refused: What was found before and is no good: the orchestrator drops it, if it is this project's own.
            ahead: Whether the project's next machine is to be told of it when it is made.
            send: Whether one that is missing may be sent.
        """
        if self._api is None:
            return Missing(key, (), 0)
        sha256 = refused.parts[0].sha256 if refused else None
        try:
            found = read_answer(
                key, await self._api.find_modules(key, refused=sha256, ahead=ahead, send=send)
            )
        except AgentError as error:
            raise LayerFailed("unavailable", str(error)) from None
        return replace(found, ahead=ahead) if isinstance(found, Missing) else found

    async def fetch(self, layer: Layer, write: Write) -> None:
        """Write the bytes of a layer as they arrive, and check each part's size and hash. Raises `LayerFailed`."""
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                for number, part in enumerate(layer.parts, 1):
                    await self._fetch_part(f"part {number} of {len(layer.parts)}", part, write)
        except TimeoutError:
            raise LayerFailed("unavailable", f"it was not here after {FETCH_SECONDS:g} s") from None

    async def _fetch_part(self, what: str, part: Part, write: Write) -> None:
        digest, left = hashlib.sha256(), part.size
        try:
            async with exchange(self._http, "GET", part.url, timeout=TIMEOUT) as response:
                if response.status_code != 200:
                    raise LayerFailed("unavailable", f"{what}: HTTP {response.status_code}")
                async for piece in response.aiter_raw(READ):
                    left -= len(piece)
                    if left < 0:
                        longer = f"{what} is longer than its {part.size} bytes"
                        raise LayerFailed("refused", longer, its_fault=True)
                    digest.update(piece)
                    await write(piece)
        except httpx.HTTPError as error:
            raise LayerFailed("unavailable", f"{what}: {type(error).__name__}") from None
        except AgentError as error:
            raise LayerFailed("unavailable", f"{what}: {error}") from None
        if left:
            raise LayerFailed("unavailable", f"{what} stopped {left} bytes before its end")
        if digest.hexdigest() != part.sha256:
            raise LayerFailed("refused", f"{what} has another hash", its_fault=True)

    async def send(self, missing: Missing, file: BinaryIO) -> int:
        """Send an archive and have it made visible. Returns its bytes. Raises `LayerFailed`."""
        size = file.seek(0, os.SEEK_END)
        offsets = range(0, size, PART_BYTES)
        if size > missing.max_bytes or len(offsets) > len(missing.upload_urls):
            raise LayerFailed("refused", f"{size} bytes, and {missing.max_bytes} are taken")
        try:
            async with asyncio.timeout(SEND_SECONDS):
                parts = [
                    await self._send_part(url, file, offset, min(PART_BYTES, size - offset))
                    for url, offset in zip(missing.upload_urls, offsets, strict=False)
                ]
                assert self._api is not None, "whoever has no API was given no upload URL"
                await self._api.add_modules(missing.key, parts, ahead=missing.ahead)
        except TimeoutError:
            raise LayerFailed("unavailable", f"it was not sent within {SEND_SECONDS:g} s") from None
        except httpx.HTTPError as error:
            raise LayerFailed("unavailable", type(error).__name__) from None
        except AgentError as error:
            raise LayerFailed("unavailable", str(error)) from None
        return size

    async def _send_part(self, url: str, file: BinaryIO, offset: int, size: int) -> dict[str, Any]:
        digest = hashlib.sha256()

        async def body() -> AsyncIterator[bytes]:
            for at in range(offset, offset + size, READ):
                piece = await asyncio.to_thread(os.pread, file.fileno(), min(READ, offset + size - at), at)
                digest.update(piece)
                yield piece

        headers = {
            "content-length": str(size),
            "content-type": "application/zstd",
            # A refused upload is answered before its body is read: nothing else may come on this connection.
            "connection": "close",
        }
        async with exchange(
            self._http, "PUT", url, content=body(), headers=headers, timeout=TIMEOUT
        ) as response:
            if not response.is_success:
                raise LayerFailed("unavailable", f"the upload was answered HTTP {response.status_code}")
        return {"sha256": digest.hexdigest(), "size": size}


def command(*arguments: str) -> tuple[str, ...]:
    """Return the command line of `agent.modules.archive` for the project's user: under a bare interpreter.

    It imports the standard library, `agent.modules.tar` and the codec alone, from where this process has them.
    """
    roots = [str(Path(__file__).parents[2])]
    if sys.version_info < (3, 14):
        roots.append(str(Path(zstd.__file__).parents[2]))
    return (sys.executable, "-I", "-S", "-X", "utf8", "-c", START, ":".join(roots), *arguments)
