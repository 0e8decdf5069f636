"""A signed zip becomes a staged tree: streamed, bounded, verified. Nothing here touches the project itself.

`fetch` is one try: it downloads, unpacks into staging while the bytes arrive, and returns only when the archive
agrees with itself (`snapshot.zip_reader`) and with its manifest, file by file. On any failure the staging area is empty
again. `obtain` is the patience around it: retry what may pass, ask for a fresh URL when it will not, give up when
the budget is spent. What to do with the staged tree is `core.reconcile.reconcile`'s to say and the disk's to do.

Who may be at fault decides the error:

    Unavailable          the way there: network, 429, 5xx, a stream cut short, our own disk full     try again
    CredentialRejected   the URL: expired, altered, not for this object, none at all                 a fresh URL
    SnapshotRejected     the archive: `rule` says which demand it failed                             a fresh build

The URL is a credential. It is in no message, and no exception that carries it is chained.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Final
from urllib.parse import parse_qs, urlsplit

import httpcore
import httpx
import orjson

from agent import memory
from agent.config import SnapshotLimits
from agent.core.errors import (
    CredentialRejected,
    HydrationImpossible,
    MalformedMessage,
    RootUnusable,
    SnapshotRejected,
    Unavailable,
)
from agent.core.model import Entry, RelPath
from agent.fs.project_dir import ProjectDir
from agent.net import coding, exchange, read_start
from agent.retry import Backoff, retry_after, retrying, within
from agent.snapshot.unpack import Assembly, StagingFailed, announced
from agent.snapshot.unpack import Progress as Progress
from agent.snapshot.unpack import StagedSnapshot as StagedSnapshot

WHAT: Final = "the snapshot"

EXPIRY_LEEWAY: Final = 30.0
"""Seconds. A URL that expired this recently by our clock is still asked for: clocks differ, the server decides."""

READ_BYTES: Final = 256 * 1024
"""Of the body at a time (see `_body`): as much as asyncio takes out of a socket in one call."""

BATCH_BYTES: Final = 768 * 1024
"""Unpacked at a time: so much that hashing and writing, which need no interpreter, are seldom interrupted by its being
handed to and fro (by halves it takes a fifth longer), so little that two of them in memory do not count."""

MAX_REFUSAL_BYTES: Final = 64 * 1024
"""Of an error's body: Storage's own are below 200 bytes, a proxy's page may be anything."""

# Storage's codes for "this URL opens nothing" and "there is nothing here" (supabase/storage `codes.ts`); all of
# them arrive as HTTP 400.
_URL_CODES: Final = frozenset(
    {"InvalidJWT", "InvalidSignature", "InvalidToken", "AccessDenied", "ExpiredToken"}
)
_OBJECT_CODES: Final = frozenset(
    {"NoSuchKey", "NoSuchBucket", "EntityTooLarge", "InvalidKey", "TenantNotFound"}
)


async def fetch(
    url: str,
    *,
    disk: ProjectDir,
    http: httpx.AsyncClient,
    limits: SnapshotLimits,
    expected_project: str | None = None,
    progress: Progress | None = None,
    have: Mapping[RelPath, Entry] | None = None,
    wall: Callable[[], float] = time.time,
) -> StagedSnapshot:
    """Download the snapshot at `url` into staging and verify all of it. One try.

    `expected_project`: the only project whose manifest is accepted. `have`: the tree on disk; a listed file equal
    to it is checked but not staged, and when all are equal the download ends with the manifest. `wall` gives Unix
    seconds, to tell an expired URL before asking.

    Raises `Unavailable`, `CredentialRejected` (also for a URL that nobody can be asked at) and `SnapshotRejected`.
    """
    progress = progress if progress is not None else Progress()
    progress.restart()
    expires_at = expiry(url)
    if expires_at is not None and expires_at + EXPIRY_LEEWAY < wall():
        raise CredentialRejected(f"{WHAT}'s signed URL expired {wall() - expires_at:.0f} s ago")
    assembly = Assembly(disk, limits, expected_project, progress, have or {})
    try:
        await _download(url, assembly, http, limits, progress, wall)
        snapshot = assembly.finish()
    except BaseException:
        assembly.abandon()
        raise
    # The buffers and the manifest's text are free: what promoting 20,000 files takes shall not come on top of them.
    del assembly
    memory.trim()
    return snapshot


async def obtain(
    url: str | None,
    *,
    renew: Callable[[str], Awaitable[str | None]] | None,
    on_refusal: Callable[[SnapshotRejected | CredentialRejected], None] = lambda _: None,
    disk: ProjectDir,
    http: httpx.AsyncClient,
    limits: SnapshotLimits,
    expected_project: str | None = None,
    progress: Progress | None = None,
    have: Mapping[RelPath, Entry] | None = None,
) -> StagedSnapshot:
    """`fetch` with patience: full jitter between tries, `Retry-After` obeyed, a fresh URL when this one is no good.

    `renew(reason)` asks the orchestrator for a fresh URL; None when it has none to give. `reason` is one of
    `snapshot_missing` (there was no URL), `snapshot_expired`, `snapshot_unavailable`, `snapshot_rejected`: the last
    wants another archive, not only another URL. `on_refusal` hears of each archive or URL that was no good.

    Raises `CredentialRejected` (URL refused, no fresh one to be had), `RootUnusable` (the disk never took it) and
    `HydrationImpossible` (budget spent), each with one sentence that says why.
    """
    on_this_url = 0
    progress = progress if progress is not None else Progress()
    # After a refused URL there is a fresh one already: nothing to wait for.
    backoff = Backoff(
        limits.snapshot_retry_seconds, limits.snapshot_retry_max_seconds, at_once=(CredentialRejected,)
    )
    patiently = retrying(
        backoff, attempts=limits.snapshot_attempts, on=(Unavailable, SnapshotRejected, CredentialRejected)
    )

    async def once() -> StagedSnapshot:
        nonlocal url, on_this_url
        if url is None:
            url, on_this_url = await _fresh(renew, "snapshot_missing"), 0
        try:
            on_this_url += 1
            return await fetch(
                url,
                disk=disk,
                http=http,
                limits=limits,
                expected_project=expected_project,
                progress=progress,
                have=have,
            )
        except StagingFailed:
            raise
        except Unavailable:
            if on_this_url >= limits.snapshot_attempts_per_url and renew is not None:
                url, on_this_url = await _fresh(renew, "snapshot_unavailable", url), 0
            raise
        except (SnapshotRejected, CredentialRejected) as refused:
            on_refusal(refused)
            if renew is None:
                raise _Final(refused) from None
            rejected = isinstance(refused, SnapshotRejected)
            fresh = await _fresh(renew, "snapshot_rejected" if rejected else "snapshot_expired")
            if fresh == url:
                raise _Final(refused) from None
            url, on_this_url = fresh, 0
            raise

    refused: Unavailable | SnapshotRejected | CredentialRejected
    try:
        async with announced(progress):
            return await patiently(once)
    except _Final as final:
        refused = final.reason
    except (Unavailable, SnapshotRejected, CredentialRejected) as last:
        refused = last
    if isinstance(refused, CredentialRejected):
        raise refused from None
    if isinstance(refused, StagingFailed):
        raise RootUnusable(str(refused)) from None
    attempts = "1 attempt" if progress.attempt == 1 else f"{progress.attempt} attempts"
    raise HydrationImpossible(f"cannot hydrate after {attempts}: {refused}") from None


class _Final(Exception):
    """No further attempt can help. Carries what was wrong."""

    def __init__(self, reason: SnapshotRejected | CredentialRejected) -> None:
        self.reason = reason
        super().__init__()


async def _fresh(
    renew: Callable[[str], Awaitable[str | None]] | None, reason: str, otherwise: str | None = None
) -> str:
    url = await renew(reason) if renew is not None else None
    if url is None:
        url = otherwise
    if url is None:
        raise _Final(CredentialRejected(f"{reason.replace('_', ' ')}, and there is no other URL to be had"))
    return url


def expiry(url: str) -> float | None:
    """When the signed URL's token says it expires, in Unix seconds; None when it does not say."""
    try:
        token = parse_qs(urlsplit(url).query).get("token", [""])[0]
        parts = token.split(".")
        if len(parts) != 3:
            return None
        claims = orjson.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
        exp = claims.get("exp")
    except (ValueError, AttributeError):
        return None
    return float(exp) if isinstance(exp, (int, float)) else None


async def _download(
    url: str,
    assembly: Assembly,
    http: httpx.AsyncClient,
    limits: SnapshotLimits,
    progress: Progress,
    wall: Callable[[], float],
) -> None:
    """Pour the body into `assembly` as it arrives."""
    timeout = httpx.Timeout(limits.snapshot_stall_seconds, connect=limits.snapshot_connect_seconds)
    total = limits.snapshot_total_seconds
    try:
        async with (
            within(total, WHAT, f"total_time: not here after {total:g} s"),
            exchange(http, "GET", url, timeout=timeout) as response,
        ):
            if response.status_code != 200:
                raise await _refusal(response, wall)
            if (encoded := coding(response)) is not None:
                raise Unavailable(WHAT, f"the archive is encoded as {encoded!r}, which was not asked for")
            progress.expected_bytes = _content_length(response)
            if (progress.expected_bytes or 0) > limits.snapshot_max_compressed_bytes:
                raise SnapshotRejected("compressed_size", f"{progress.expected_bytes} bytes are announced")
            unpacking = _Unpacking(assembly)
            async with aclosing(_body(response, limits.snapshot_stall_seconds)) as body:
                async for chunk in body:
                    await unpacking.put(chunk)
                    if assembly.sated:
                        return
            await unpacking.finish()
    except httpx.ReadTimeout:
        raise Unavailable(
            WHAT, f"no_progress: nothing arrived for {limits.snapshot_stall_seconds:g} s"
        ) from None
    except MalformedMessage as malformed:
        raise CredentialRejected(f"{WHAT}'s URL cannot be used: {malformed.reason}") from None
    except httpx.HTTPError as error:
        # The class, not the text: httpx writes URLs into some of its messages.
        raise Unavailable(WHAT, type(error).__name__) from None
    if assembly.sated:
        return
    try:
        assembly.close()
    except SnapshotRejected as refused:
        if refused.rule == "truncated" and progress.expected_bytes is None:
            # No length was announced, so a connection that died looks like an end.
            raise Unavailable(WHAT, str(refused)) from None
        raise


async def _body(response: httpx.Response, patience: float) -> AsyncGenerator[bytes, None]:
    """The body as it arrives; raises as `aiter_raw` does.

    Of a body whose length is known, what follows the first piece is taken from the connection itself, which httpx
    hands out for that (its extension `network_stream`): through httpx, httpcore and h11 it comes in pieces of 64 KB,
    each copied three times. That is 1.30 of the processor time for 50 files of 4 MB that do not compress, 1.09 for
    20,000 of source text (medians of runs in turn). The connection is then of no further use, and closed.
    """
    pieces = response.aiter_raw()
    left = _content_length(response)
    stream = response.extensions.get("network_stream")
    if (
        left is None
        or stream is None
        or response.http_version != "HTTP/1.1"
        or "transfer-encoding" in response.headers
    ):
        async for piece in pieces:
            yield piece
        return
    try:
        # Held until the end: an iterator that is let go of closes the connection.
        async for piece in pieces:
            yield piece
            left -= len(piece)
            break
        while left > 0:
            piece = await stream.read(min(left, READ_BYTES), timeout=patience)
            if not piece:
                raise httpx.RemoteProtocolError("the body is shorter than announced")
            yield piece
            left -= len(piece)
    except httpcore.ReadTimeout:
        raise httpx.ReadTimeout("") from None
    except httpcore.NetworkError:
        raise httpx.ReadError("") from None


class _Unpacking:
    """Unpacks in a thread while the next bytes arrive: a slow disk holds up the download, not the event loop.

    The thread has one batch in hand and another is gathered meanwhile. A batch ends when the thread is free, so a slow
    network is unpacked piece by piece, or at `BATCH_BYTES`.
    """

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._gathered: list[bytes] = []
        self._size = 0
        self._running: asyncio.Future[None] | None = None

    async def put(self, chunk: bytes) -> None:
        """Take a piece of the body. Raises what unpacking an earlier one raised."""
        self._gathered.append(chunk)
        self._size += len(chunk)
        if self._running is None or self._running.done() or self._size >= BATCH_BYTES:
            await self._hand_over()

    async def finish(self) -> None:
        """Everything is unpacked. Raises what unpacking raised."""
        await self._hand_over()
        await self._settle()

    async def _hand_over(self) -> None:
        await self._settle()
        batch, self._gathered, self._size = self._gathered, [], 0
        self._running = asyncio.get_running_loop().run_in_executor(None, self._assembly.take_all, batch)
        # When we are cancelled nobody asks any more; `abandon` waits for the thread.
        self._running.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _settle(self) -> None:
        if self._running is not None:
            await asyncio.shield(self._running)


async def _refusal(response: httpx.Response, wall: Callable[[], float]) -> Exception:
    """What an answer other than 200 means. Storage says what it means in JSON, under HTTP 400."""
    status = response.status_code
    code, stated = _storage_code(await read_start(response, MAX_REFUSAL_BYTES))
    said = f"HTTP {status}" + (f", {code}" if code else "")
    if status == 429 or status >= 500 or status == 408:
        return Unavailable(WHAT, said, retry_after(response.headers.get("retry-after"), wall()))
    if code in _URL_CODES or status in (401, 403, 410) or stated in ("401", "403"):
        return CredentialRejected(f"{WHAT}'s signed URL is expired or was refused: {said}")
    if code in _OBJECT_CODES or status == 404 or stated in ("404", "413"):
        return SnapshotRejected("missing", f"there is no object at the signed URL: {said}")
    return Unavailable(WHAT, f"unexpected answer: {said}")


def _storage_code(body: bytes) -> tuple[str | None, str | None]:
    """Storage's `code` (older: `error`) and `statusCode`, when the body is Storage's JSON."""
    try:
        told = orjson.loads(body)
    except ValueError:
        return None, None
    if not isinstance(told, dict):
        return None, None
    code, stated = told.get("code") or told.get("error"), told.get("statusCode")
    number = str(stated)[:3] if isinstance(stated, (str, int)) else None
    return (code[:50] if isinstance(code, str) else None), number


def _content_length(response: httpx.Response) -> int | None:
    value = response.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() else None
