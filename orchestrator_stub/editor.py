"""The editor's side of the local stack: a directory whose saves become RPCs.

It does what the product's editor does, over the same HTTP endpoints and with a user's token: a save is
`upsert_project_file`, a removal `delete_project_file`, several at once `apply_project_files`; binary files go to the
`project-assets` bucket first. What was last sent is kept in a *baseline* file, so that at the next start only what
changed in the directory meanwhile is sent, and what changed in the database meanwhile is left alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
import time
import unicodedata
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
import tenacity
from watchfiles import awatch
from watchfiles._rust_notify import WatchfilesRustInternalError

from orchestrator_stub.tokens import Keyring

IGNORED_DIRECTORIES: Final = frozenset(
    {
        ".cache",
        ".git",
        ".hg",
        ".idea",
        ".parcel-cache",
        ".preview-sync",
        ".svn",
        ".turbo",
        ".vite",
        ".vscode",
        "build",
        "coverage",
        "dist",
        "node_modules",
    }
)
"""What a project's .gitignore names anyway: made from the source, or a tool's own."""

IGNORED_FILES: Final = frozenset({".DS_Store", "Thumbs.db", "4913"})
"""The last one is Vim's probe of the directory."""

IGNORED_SUFFIXES: Final = ("~", ".swp", ".swx", ".swo", ".log", ".tsbuildinfo", ".crswap", ".tmp")

MAX_TEXT: Final = 10 * 2**20
"""Bytes of one file in the database (its `max_file_bytes`); larger ones are assets."""

MAX_ASSET: Final = 50 * 2**20
"""Bytes of one object: Supabase's default."""

BATCH_FILES: Final = 2000
BATCH_BYTES: Final = 32 * 2**20
"""One `apply_project_files`: below the database's 5,000 files and 64 MB, with room for JSON's escapes."""

QUIET: Final = 10
"""Milliseconds without a further change after which a batch of saves is sent: what a person cannot notice, and
enough for the write, rename and touch of one editor's save to arrive together."""

RENEW_SECONDS: Final = 0.2
"""Between a watch that failed and the next: a program may make names that it cannot say without end."""

RENEW_REST: Final = 2
"""The same, as a multiple of what the last look at everything took: a third of the time goes into looking at most."""

TOKEN_LIFE: Final = 300
"""Seconds. A user's token is made for each request; it need only outlive the request."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """What the directory holds at one path."""

    digest: str
    executable: bool


UNCERTAIN: Final = LocalFile("", False)
"""What the database holds at a path when the answer to a save was lost: equal to nothing."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What one push sent: how many files changed and how many were removed, and what was left out, with reasons."""

    updated: int = 0
    deleted: int = 0
    skipped: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.updated or self.deleted or self.skipped)


class SaveRefused(Exception):
    """The database turned a save away for good; its sentence is the message."""


class UserAuth(httpx.Auth):
    """Signs each request as the user that the keyring's project knows by `user_id`."""

    def __init__(self, keys: Keyring, user_id: UUID, clock: Callable[[], float]) -> None:
        self._keys = keys
        self._user_id = user_id
        self._clock = clock

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        now = int(self._clock())
        claims = {
            "role": "authenticated",
            "aud": "authenticated",
            "sub": str(self._user_id),
            "iat": now,
            "exp": now + TOKEN_LIFE,
        }
        request.headers["Authorization"] = f"Bearer {self._keys.sign(claims)}"
        yield request


class Editor:
    """One directory and the project it is sent to. `http` has the stack's base URL, API key and a user's auth."""

    def __init__(self, root: Path, project_id: UUID, http: httpx.AsyncClient, baseline: Path) -> None:
        self._root = root.resolve()
        self._project_id = project_id
        self._http = http
        self._baseline_path = baseline
        self._baseline = _read_baseline(baseline, project_id)
        self._said: set[str] = set()
        self.renewals = 0
        """How often the watch had to be made again."""

    async def send_all(self) -> Sent:
        """Send what the directory has that was not sent yet, and the removal of what it has no more.

        Raises `httpx.HTTPError` when the stack does not answer.
        """
        found = await asyncio.to_thread(lambda: set(scan(self._root)))
        return await self.send(found | set(self._baseline))

    async def watch(self) -> AsyncIterator[Sent]:
        """Send every save from now on, for ever; yields what each batch sent.

        Raises `httpx.HTTPError` when the stack does not answer for longer than a few tries.
        """
        deep = True
        while True:
            first = True
            try:
                async with aclosing(self._changes(deep)) as turns:
                    async for places in turns:
                        # The first turn proves that the watch is in place: what came before is found by a scan.
                        sent = await (self._send_all_again() if first else self.send(self._touched(places)))
                        first = False
                        if sent:
                            yield sent
                        if not deep and any(map(os.path.isdir, places)):
                            break
                continue
            except ExceptionGroup as failed:
                # A name that is not UTF-8, anywhere below: watchfiles fails, with whatever else it had seen.
                if failed.split(WatchfilesRustInternalError)[1] is not None:
                    raise
            # A directory of such a name lets no watch over all that is below be made: this one is over each by itself.
            deep = deep and not first
            self.renewals += 1
            began = time.monotonic()
            if sent := await self._send_all_again():
                yield sent
            await asyncio.sleep(max(RENEW_SECONDS, RENEW_REST * (time.monotonic() - began)))

    async def _changes(self, deep: bool) -> AsyncGenerator[list[str], None]:
        """Where something changed, or nowhere: that shows that the watch is there. `deep`: new directories too."""
        async for changes in awatch(
            *([self._root] if deep else directories(self._root)),
            watch_filter=None,
            step=QUIET,
            debounce=10 * QUIET,
            rust_timeout=250,
            yield_on_timeout=True,
            recursive=deep,
        ):
            yield [path for _, path in changes]

    async def _send_all_again(self) -> Sent:
        """As `send_all`; what was left out before is not said again."""
        said = set(self._said)
        sent = await self.send_all()
        return replace(sent, skipped=tuple(line for line in sent.skipped if line not in said))

    def _touched(self, paths: Iterable[str]) -> set[str]:
        """The project's paths that the watcher's may stand for: a directory stands for all below it."""
        touched: set[str] = set()
        for path in paths:
            relative = _relative(self._root, path)
            if relative is None:
                continue
            if os.path.isdir(path) and not os.path.islink(path):
                touched.update(scan(self._root, relative))
            elif not ignored(relative):
                touched.add(relative)
            touched.update(known for known in self._baseline if known.startswith(relative + "/"))
        return touched

    async def send(self, paths: set[str]) -> Sent:
        """Send what became of these paths since they were last sent. Raises as `send_all`."""
        updates: dict[str, tuple[LocalFile, bytes]] = {}
        deletes: list[str] = []
        skipped: list[str] = []
        sent = Sent()
        size = 0
        for path in sorted(paths):
            if problem := path_problem(path):
                if _stands(self._root / path):
                    skipped.append(f"{shown(path)}: {problem}")
                continue
            read = await asyncio.to_thread(_read, self._root / path)
            if read is None:
                if path in self._baseline:
                    deletes.append(path)
                continue
            file, content = read
            if self._baseline.get(path) == file:
                continue
            if len(content) > MAX_ASSET:
                skipped.append(f"{shown(path)}: larger than 50 MB")
                continue
            updates[path] = (file, content)
            size += len(content)
            if size >= BATCH_BYTES or len(updates) >= BATCH_FILES:
                sent = _sum(sent, await self._commit(updates, deletes))
                updates, deletes, size = {}, [], 0
        if updates or deletes:
            sent = _sum(sent, await self._commit(updates, deletes))
        self._said.update(skipped)
        return _sum(sent, Sent(skipped=tuple(skipped)))

    async def _commit(self, updates: Mapping[str, tuple[LocalFile, bytes]], deletes: Sequence[str]) -> Sent:
        """One batch: one RPC, and the baseline moved on. What is refused whole is tried again one by one."""
        try:
            await self._rpc(await self._call_for(updates, deletes))
        except httpx.HTTPError:
            # It may have been done all the same: whatever stands there next is to be sent, the old content too.
            self._baseline.update(dict.fromkeys([*updates, *deletes], UNCERTAIN))
            await self._keep()
            raise
        except SaveRefused as refused:
            if len(updates) + len(deletes) > 1:
                sent = Sent()
                for path in deletes:
                    sent = _sum(sent, await self._commit({}, [path]))
                for path, update in updates.items():
                    sent = _sum(sent, await self._commit({path: update}, []))
                return sent
            path = next(iter([*updates, *deletes]))
            for refused_path, (file, _) in updates.items():
                self._baseline[refused_path] = file
            return Sent(skipped=(f"{shown(path)}: {refused}",))
        for path, (file, _) in updates.items():
            self._baseline[path] = file
        for path in deletes:
            self._baseline.pop(path, None)
        await self._keep()
        return Sent(len(updates), len(deletes))

    async def _keep(self) -> None:
        await asyncio.to_thread(_write_baseline, self._baseline_path, self._project_id, dict(self._baseline))

    async def _call_for(
        self, updates: Mapping[str, tuple[LocalFile, bytes]], deletes: Sequence[str]
    ) -> tuple[str, dict[str, Any]]:
        """The RPC that says it all, assets uploaded: its name and arguments."""
        project = {"project_uuid": str(self._project_id)}
        if not updates and len(deletes) == 1:
            return "delete_project_file", {**project, "p_file_path": deletes[0]}
        if len(updates) == 1 and not deletes:
            [(path, (file, content))] = updates.items()
            known = self._baseline.get(path)
            text = as_text(content)
            same_mode = file.executable == (known is not None and known.executable)
            if text is not None and same_mode and known != UNCERTAIN:
                return "upsert_project_file", {**project, "p_file_path": path, "p_content": text}
        changes: list[dict[str, Any]] = [{"action": "delete", "file_path": path} for path in deletes]
        for path, (file, content) in updates.items():
            change: dict[str, Any] = {
                "action": "update",
                "file_path": path,
                "content_hash": file.digest,
                "executable": file.executable,
            }
            text = as_text(content)
            if text is not None:
                change["content"] = text
            else:
                await self._upload(file.digest, content)
                change["encoding"] = "base64"
            changes.append(change)
        return "apply_project_files", {**project, "changes": changes}

    async def _rpc(self, call: tuple[str, dict[str, Any]]) -> None:
        name, arguments = call
        # A removal of what never came to be there, as after a save that was not taken, is done.
        known = frozenset({"PT404"} if name == "delete_project_file" else ())
        await self._post(f"/rest/v1/rpc/{name}", json=arguments, known=known)

    async def _upload(self, digest: str, content: bytes) -> None:
        """An object is its hash: one that is there already is the same."""
        await self._post(
            f"/storage/v1/object/project-assets/{self._project_id}/{digest}",
            content=content,
            headers={"Content-Type": "application/octet-stream"},
            known=frozenset({"409"}),
        )

    async def _post(self, path: str, *, known: frozenset[str] = frozenset(), **body: Any) -> None:
        """POST, tried again while the stack is unreachable or overloaded. Raises `SaveRefused`, `httpx.HTTPError`."""
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(5),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            retry=tenacity.retry_if_exception_type(httpx.HTTPError),
            reraise=True,
        ):
            with attempt:
                response = await self._http.post(path, **body)
                if response.is_success:
                    return
                if response.status_code == 429 or response.status_code >= 500:
                    response.raise_for_status()
                answer = _object(response)
                if known.isdisjoint({str(answer.get("statusCode")), str(answer.get("code"))}):
                    raise SaveRefused(str(answer.get("message") or response.status_code))


def scan(root: Path, below: str = "") -> Iterable[str]:
    """The paths of the project's files in `root`, relative, `/`-separated; links and ignored names left out.

    Of a directory whose name is not UTF-8 only itself is given: opening it would be an event that the watch fails at.
    """
    for relative, names in _walk(root, below):
        prefix = relative + "/" if relative else ""
        for name in names:
            if not ignored(prefix + name):
                yield prefix + name


def directories(root: Path) -> list[Path]:
    """The directories in which the project's files are, its root among them."""
    return [root, *(root / relative for relative, _ in _walk(root) if relative)]


def _walk(root: Path, below: str = "") -> Iterator[tuple[str, list[str]]]:
    """Each directory that may hold files of the project, relative, and the names that are no directories to enter."""
    for directory, names, files in os.walk(root / below):
        relative = _relative(root, directory)
        if relative is None:
            names.clear()
            continue
        names[:] = [
            name
            for name in names
            if name not in IGNORED_DIRECTORIES and not os.path.islink(os.path.join(directory, name))
        ]
        unsayable = [name for name in names if not _is_utf8(name)]
        names[:] = [name for name in names if _is_utf8(name)]
        yield relative, [*files, *unsayable]


def ignored(path: str) -> bool:
    """Whether a file is no part of the project."""
    *directories, name = path.split("/")
    return (
        not IGNORED_DIRECTORIES.isdisjoint(directories)
        or name in IGNORED_FILES
        or name.startswith(".#")
        or name.endswith(IGNORED_SUFFIXES)
    )


def path_problem(path: str) -> str | None:
    """Why the database would not take this path (protocol: `file_path`), or None."""
    if not _is_utf8(path):
        return "its name is not UTF-8"
    if len(path.encode()) > 1024 or any(len(segment.encode()) > 255 for segment in path.split("/")):
        return "its name is too long"
    if path.count("/") >= 64:
        return "it lies below more than 63 directories"
    if "\\" in path or any(unicodedata.category(c) == "Cc" for c in path):
        return "its name has a backslash or a control character"
    if not unicodedata.is_normalized("NFC", path):
        return "its name is not in Unicode's composed form (NFC)"
    return None


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stands(path: Path) -> bool:
    """Whether a file or a directory is there, without opening it: that would be an event, and the watch fails at it."""
    try:
        mode = path.lstat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


def shown(path: str) -> str:
    """`path` with nothing in it that a terminal cannot show or would act on."""
    text = os.fsencode(path).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def as_text(content: bytes) -> str | None:
    """The text of a file that the database keeps as text; None for a binary or very large one."""
    if len(content) > MAX_TEXT or b"\0" in content:
        return None
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _relative(root: Path, path: str) -> str | None:
    """`path` below `root`, or None when it is elsewhere or in an ignored directory."""
    relative = os.path.relpath(path, root).replace(os.sep, "/")
    if relative == ".":
        return ""
    if relative.startswith("../") or not IGNORED_DIRECTORIES.isdisjoint(relative.split("/")):
        return None
    return relative


def _read(path: Path) -> tuple[LocalFile, bytes] | None:
    """A regular file's content, as it is now; None when there is none (any more)."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return None
            content = file.read(MAX_ASSET + 1)
    except OSError:
        return None
    return LocalFile(hashlib.sha256(content).hexdigest(), bool(status.st_mode & stat.S_IXUSR)), content


def _read_baseline(path: Path, project_id: UUID) -> dict[str, LocalFile]:
    """What was sent before; empty when nothing was, or to another project."""
    try:
        kept = json.loads(path.read_text())
        if kept["project_id"] != str(project_id):
            return {}
        return {name: LocalFile(digest, executable) for name, (digest, executable) in kept["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write_baseline(path: Path, project_id: UUID, files: Mapping[str, LocalFile]) -> None:
    kept = {
        "project_id": str(project_id),
        "files": {name: [file.digest, file.executable] for name, file in files.items()},
    }
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(kept))
    draft.rename(path)


def _object(response: httpx.Response) -> dict[str, Any]:
    try:
        answer = response.json()
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _sum(one: Sent, other: Sent) -> Sent:
    return Sent(one.updated + other.updated, one.deleted + other.deleted, one.skipped + other.skipped)
