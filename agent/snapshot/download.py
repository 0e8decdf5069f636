"""Downloads a signed zip into a staged tree: streamed, bounded, verified. The project itself is not touched.

`Downloader.fetch` is one attempt: it unpacks into staging while the bytes arrive, and returns only when the archive
agrees with itself (`snapshot.zip_reader`) and, file by file, with its manifest. After a failure the staging area is
empty again. `obtain` calls it until it succeeds or the budget is spent, and gets a fresh URL when that may help. What
is done with the staged tree, `core.reconcile.reconcile` decides.

The error says what was at fault:

    Unavailable          the way there: network, 429, 5xx, a stream cut short, a full disk           try again
    CredentialRejected   the URL: expired, altered, not for this object, none at all                 a fresh URL
    SnapshotRejected     the archive: `rule` says which demand it failed                             a fresh build

The URL is a credential. It is in no message, and no exception that contains it is chained.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
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
from agent.fs.turns import in_turns
from agent.net import coding, exchange, read_start
from agent.retry import Backoff, retry_after, retrying, within
from agent.snapshot.unpack import Progress as Progress
from agent.snapshot.unpack import StagedSnapshot as StagedSnapshot
from agent.snapshot.unpack import StagingFailed, Unpacker, reported
from agent.tokens import read_token

WHAT: Final = "the snapshot"

EXPIRY_LEEWAY: Final = 30.0
"""Seconds. A URL that expired this recently by our clock is still tried: clocks differ, and the server decides."""

READ_BYTES: Final = 256 * 1024
"""Bytes of the body that are read at a time (see `_body`), as many as asyncio takes out of a socket in one call."""

BATCH_BYTES: Final = 768 * 1024
"""Bytes unpacked at a time: so many that hashing and writing, which release the interpreter's lock, seldom wait
for it (with half as many it takes a fifth longer), and so few that two batches in memory do not matter."""

LEAST_RATE: Final = 1024
"""Bytes a second, over the stall time: a body that only trickles would hold up every other catch-up until the total
time is over. A line that is ten times slower than a modem is not waited for."""

MAX_REFUSAL_BYTES: Final = 64 * 1024
"""Bytes of an error's body that are read. Storage's own have less than 200, a proxy's page may have any number."""

# Storage's codes for "this URL opens nothing" and "there is nothing here" (supabase/storage `codes.ts`); all of
# them arrive as HTTP 400.
_URL_CODES: Final = frozenset(
    {"InvalidJWT", "InvalidSignature", "InvalidToken", "AccessDenied", "ExpiredToken"}
)
_OBJECT_CODES: Final = frozenset(
    {"NoSuchKey", "NoSuchBucket", "EntityTooLarge", "InvalidKey", "TenantNotFound"}
)


@dataclass(frozen=True, slots=True)
class Downloader:
    """Gets snapshots into staging.

    Attributes:
        disk: Where files are staged.
        http: The client.
        limits: The bounds on bytes, files and seconds.
        expected_project: The only project whose manifest is accepted; None: any.
        progress: Is kept up to date.
        wall: Unix seconds, to see that a URL expired before it is tried.
    """

    disk: ProjectDir
    http: httpx.AsyncClient
    limits: SnapshotLimits
    expected_project: str | None = None
    progress: Progress = field(default_factory=Progress)
    wall: Callable[[], float] = time.time

    async def fetch(self, url: str, have: Mapping[RelPath, Entry] | None = None) -> StagedSnapshot:
        """Download the snapshot at `url` into staging and verify all of it, in one attempt.

        Args:
            url: The signed URL.
            have: The tree on disk. A listed file that is equal there is checked but not staged; when all are equal, the
                download ends with the manifest.

        Raises:
            Unavailable: It may work later.
            CredentialRejected: The URL was refused, or is none.
            SnapshotRejected: The archive is no good.
        """
        self.progress.restart()
        expires_at, now = expiry(url), self.wall()
        if expires_at is not None and expires_at + EXPIRY_LEEWAY < now:
            raise CredentialRejected(f"{WHAT}'s signed URL expired {now - expires_at:.0f} s ago")
        unpacker = Unpacker(self.disk, self.limits, self.expected_project, self.progress, have or {})
        try:
            await self._download(url, unpacker)
            snapshot = unpacker.finish()
        except BaseException:
            unpacker.abandon()
            await in_turns(self.disk.removal())
            raise
        # Free the buffers and the manifest's text before 20,000 files are promoted, which takes memory too.
        del unpacker
        memory.trim()
        return snapshot

    async def obtain(
        self,
        url: str | None,
        *,
        renew: Callable[[str], Awaitable[str | None]] | None,
        on_refusal: Callable[[SnapshotRejected | CredentialRejected], None] = lambda _: None,
    ) -> StagedSnapshot:
        """Call `fetch` until it succeeds, with full jitter in between, and with a fresh URL when this one is no good.

        Args:
            url: The signed URL to begin with; None: there is none yet.
            renew: Asks the orchestrator for a fresh URL; returns None when it has none. Its argument is the reason, one
                of `snapshot_missing` (there was no URL), `snapshot_expired`, `snapshot_unavailable`, and
                `snapshot_rejected`, which needs another archive and not only another URL.
            on_refusal: Called with each refusal of an archive or URL.

        Raises:
            CredentialRejected: The URL was refused, or the archive, and the orchestrator has no other.
            RootUnusable: The disk did not take the files in any attempt.
            HydrationImpossible: The budget is spent, or the archive was refused and there is nobody to ask for another.
        """
        limits = self.limits
        signed = _SignedUrl(url, renew, on_refusal, limits.snapshot_attempts_per_url)
        # After a refusal there is a fresh URL already: nothing to wait for.
        backoff = Backoff(
            limits.snapshot_retry_seconds, limits.snapshot_retry_max_seconds, at_once=(CredentialRejected,)
        )
        retry = retrying(
            backoff, attempts=limits.snapshot_attempts, on=(Unavailable, SnapshotRejected, CredentialRejected)
        )
        failure: Unavailable | SnapshotRejected | CredentialRejected
        try:
            async with reported(self.progress):
                return await retry(signed.attempt, self.fetch)
        except _Final as final:
            failure = final.reason
        except (Unavailable, SnapshotRejected, CredentialRejected) as last:
            failure = last
        if isinstance(failure, _RenewalRefused):
            raise failure.refused from None
        if isinstance(failure, CredentialRejected):
            raise failure from None
        if isinstance(failure, StagingFailed):
            raise RootUnusable(str(failure)) from None
        made = self.progress.attempt
        attempts = "1 attempt" if made == 1 else f"{made} attempts"
        raise HydrationImpossible(f"cannot hydrate after {attempts}: {failure}") from None

    async def _download(self, url: str, unpacker: Unpacker) -> None:
        """Give the body to `unpacker` as it arrives."""
        timeout = httpx.Timeout(
            self.limits.snapshot_stall_seconds, connect=self.limits.snapshot_connect_seconds
        )
        total = self.limits.snapshot_total_seconds
        try:
            async with (
                within(total, WHAT, f"total_time: not here after {total:g} s"),
                exchange(self.http, "GET", url, timeout=timeout) as response,
            ):
                if response.status_code != 200:
                    raise await _refusal(response, self.wall)
                if (encoded := coding(response)) is not None:
                    raise Unavailable(WHAT, f"the archive is encoded as {encoded!r}, which was not asked for")
                self.progress.expected_bytes = _content_length(response)
                if (self.progress.expected_bytes or 0) > self.limits.snapshot_max_compressed_bytes:
                    raise SnapshotRejected(
                        "compressed_size", f"{self.progress.expected_bytes} bytes are announced"
                    )
                unpacking = _UnpackThread(unpacker)
                async with aclosing(_body(response, self.limits.snapshot_stall_seconds)) as body:
                    async for chunk in _not_trickling(body, self.limits.snapshot_stall_seconds):
                        await unpacking.put(chunk)
                        if unpacker.up_to_date:
                            return
                await unpacking.finish()
        except httpx.ReadTimeout:
            raise Unavailable(
                WHAT, f"no_progress: nothing arrived for {self.limits.snapshot_stall_seconds:g} s"
            ) from None
        except MalformedMessage as malformed:
            raise CredentialRejected(f"{WHAT}'s URL cannot be used: {malformed.reason}") from None
        except httpx.HTTPError as error:
            # The class, not the text: httpx writes URLs into some of its messages.
            raise Unavailable(WHAT, type(error).__name__) from None
        if unpacker.up_to_date:
            return
        try:
            unpacker.close()
        except SnapshotRejected as refused:
            if refused.rule == "truncated" and self.progress.expected_bytes is None:
                # No length was announced, so a connection that died looks like an end.
                raise Unavailable(WHAT, str(refused)) from None
            raise


class _RenewalRefused(Unavailable):
    """The orchestrator refused our token when it was asked for a URL: asked again after a wait, since another token may
    come, and `refused` at last.
    """

    def __init__(self, refused: CredentialRejected) -> None:
        self.refused = refused
        super().__init__("a fresh URL of the snapshot", str(refused))


class _Final(Exception):
    """No further attempt can help, because of `reason`."""

    def __init__(self, reason: SnapshotRejected | CredentialRejected) -> None:
        self.reason = reason
        super().__init__()


@dataclass(slots=True)
class _SignedUrl:
    """The URL in use, and who has another one. `uses` counts the attempts with this one, of at most `most_uses`."""

    url: str | None
    renew: Callable[[str], Awaitable[str | None]] | None
    on_refusal: Callable[[SnapshotRejected | CredentialRejected], None]
    most_uses: int
    uses: int = 0

    async def attempt(self, once: Callable[[str], Awaitable[StagedSnapshot]]) -> StagedSnapshot:
        """Call `once` with the URL, and get another one when that may help. Raises `_Final` when nothing can."""
        if self.url is None and not await self._replace("snapshot_missing"):
            raise _Final(CredentialRejected(f"{WHAT} has no URL, and there is none to be had"))
        assert self.url is not None
        self.uses += 1
        try:
            return await once(self.url)
        except StagingFailed:
            raise
        except Unavailable:
            if self.uses >= self.most_uses:
                await self._replace("snapshot_unavailable")
            raise
        except (SnapshotRejected, CredentialRejected) as refused:
            self.on_refusal(refused)
            rejected = isinstance(refused, SnapshotRejected)
            if not await self._replace("snapshot_rejected" if rejected else "snapshot_expired"):
                if self.renew is not None:
                    refused = CredentialRejected(f"{refused}, and the orchestrator has no other")
                raise _Final(refused) from None
            raise

    async def _replace(self, reason: str) -> bool:
        """Ask for another URL. Returns False when there is no other, and keeps this one."""
        try:
            fresh = await self.renew(reason) if self.renew is not None else None
        except CredentialRejected as refused:
            raise _RenewalRefused(refused) from None
        except MalformedMessage as malformed:
            raise Unavailable("a fresh URL of the snapshot", str(malformed)) from None
        self.uses = 0
        if fresh is None or fresh == self.url:
            return False
        self.url = fresh
        return True


def expiry(url: str) -> float | None:
    """Return when the token in a signed URL expires, in Unix seconds; None when it does not say."""
    try:
        return read_token(parse_qs(urlsplit(url).query)["token"][0]).expires_at
    except (KeyError, ValueError, MalformedMessage):
        return None


async def _not_trickling(body: AsyncGenerator[bytes, None], over: float) -> AsyncGenerator[bytes, None]:
    """Yield `body`. Raises `Unavailable` when less than `LEAST_RATE` arrives while `over` seconds are waited for it;
    what its consumer takes, a slow disk above all, does not count.
    """
    clock = asyncio.get_running_loop().time
    waited, received, since = 0.0, 0, clock()
    async for chunk in body:
        waited += clock() - since
        received += len(chunk)
        if waited >= over:
            if received < LEAST_RATE * over:
                raise Unavailable(WHAT, f"no_progress: {received} bytes arrived in {waited:.0f} s")
            waited, received = 0.0, 0
        yield chunk
        since = clock()


async def _body(response: httpx.Response, stall_seconds: float) -> AsyncGenerator[bytes, None]:
    """Yield the body as it arrives; raises as `aiter_raw` does.

    A body of known length is read, after its first piece, from the connection itself, which httpx offers for that (its
    extension `network_stream`): through httpx, httpcore and h11 it comes in pieces of 64 KB, each copied three times,
    which takes 1.30 of the processor time for 50 files of 4 MB that do not compress, and 1.09 for 20,000 of source
    text (medians of runs in turn). The connection cannot be used again, and is closed.
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
        # `pieces` is held until the end: the connection is closed when the iterator is released.
        async for piece in pieces:
            yield piece
            left -= len(piece)
            break
        while left > 0:
            piece = await stream.read(min(left, READ_BYTES), timeout=stall_seconds)
            if not piece:
                raise httpx.RemoteProtocolError("the body is shorter than announced")
            yield piece
            left -= len(piece)
    except httpcore.ReadTimeout:
        raise httpx.ReadTimeout("") from None
    except httpcore.NetworkError:
        raise httpx.ReadError("") from None


class _UnpackThread:
    """Unpacks in a thread while the next bytes arrive, so that a slow disk delays the download, not the event loop.

    While the thread unpacks one batch, the next is collected. A batch ends when the thread is free, so what a slow
    network brings is unpacked piece by piece, or when it has `BATCH_BYTES`.
    """

    def __init__(self, unpacker: Unpacker) -> None:
        self._unpacker = unpacker
        self._batch: list[bytes] = []
        self._size = 0
        self._running: asyncio.Future[None] | None = None

    async def put(self, chunk: bytes) -> None:
        """Unpack a piece of the body. Raises what unpacking an earlier one raised."""
        self._batch.append(chunk)
        self._size += len(chunk)
        if self._running is None or self._running.done() or self._size >= BATCH_BYTES:
            await self._hand_over()

    async def finish(self) -> None:
        """Wait until everything is unpacked. Raises what unpacking raised."""
        await self._hand_over()
        await self._settle()

    async def _hand_over(self) -> None:
        await self._settle()
        batch, self._batch, self._size = self._batch, [], 0
        self._running = asyncio.get_running_loop().run_in_executor(None, self._unpacker.feed, batch)
        # Retrieves the exception, which is not awaited after a cancellation; `abandon` waits for the thread.
        self._running.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _settle(self) -> None:
        if self._running is not None:
            await asyncio.shield(self._running)


async def _refusal(response: httpx.Response, wall: Callable[[], float]) -> Exception:
    """Return the error that an answer other than 200 means. Storage answers most errors with HTTP 400 and JSON."""
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
    """Return Storage's `code` (in older releases `error`) and `statusCode`; None where there is none."""
    try:
        answer = orjson.loads(body)
    except ValueError:
        return None, None
    if not isinstance(answer, dict):
        return None, None
    code, stated = answer.get("code") or answer.get("error"), answer.get("statusCode")
    number = str(stated)[:3] if isinstance(stated, (str, int)) else None
    return (code[:50] if isinstance(code, str) else None), number


def _content_length(response: httpx.Response) -> int | None:
    value = response.headers.get("content-length", "")
    return int(value) if value.isascii() and value.isdigit() else None
