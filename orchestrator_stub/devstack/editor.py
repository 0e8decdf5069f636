"""Turns saves in a directory into RPCs, as the product's editor would.

It does what the product's editor does, over the same HTTP endpoints and with a user's token: a save is
`upsert_project_file`, a removal `delete_project_file`, several at once `apply_project_files`; binary files go to the
`project-assets` bucket first. What was last sent is kept in a *baseline* file, so that at the next start only what
changed in the directory meanwhile is sent, and what changed in the database meanwhile is left alone.

A file is deleted when it is seen to be gone, or to be something else now (a directory, a link). One that cannot be read
(no rights, no descriptors, a failing disk) keeps what the project has of it, is said once, and is tried again.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
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

from orchestrator_stub.platform.source_files import (
    MAX_ASSET,
    LocalFile,
    Unreadable,
    as_text,
    directories,
    ignored,
    in_few_words,
    is_directory,
    list_files,
    path_problem,
    read_file,
    relative_path,
    shown,
    stands,
)
from orchestrator_stub.platform.tokens import Keyring

BATCH_FILES: Final = 2000
BATCH_BYTES: Final = 32 * 2**20
"""One `apply_project_files`: below the database's 5,000 files and 64 MB, with room for JSON's escapes."""

QUIET: Final = 10
"""Milliseconds without a further change after which a batch of saves is sent: what a person cannot notice, and
enough for the write, rename and touch of one editor's save to arrive together."""

TRY_AGAIN: Final = 2.0
"""Seconds until what could not be read is tried again: nothing may announce that it can be."""

RENEW_SECONDS: Final = 0.2
"""Between a watch that failed and the next: a program may make names that it cannot say without end."""

RENEW_REST: Final = 2
"""The same, as a multiple of what the last look at everything took: a third of the time goes into looking at most."""

TOKEN_LIFE: Final = 300
"""Seconds. A user's token is made for each request; it need only outlive the request."""


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
    """One directory and the project it is sent to. `http` has the stack's base URL, API key and a user's auth.

    Raises `OSError` when there is a `baseline` that cannot be read: without it the directory would go over what others
    have saved.
    """

    def __init__(self, root: Path, project_id: UUID, http: httpx.AsyncClient, baseline: Path) -> None:
        self._root = root.resolve()
        self._project_id = project_id
        self._http = http
        self._baseline_path = baseline
        self._baseline = _read_baseline(baseline, project_id)
        self._unread: dict[str, str] = {}
        """What could not be read, and why, as it was said; a directory that could not be listed ends in a slash."""
        self._try_again = 0.0
        self._unkept: str | None = None
        """Why the baseline on the disk is not what was sent."""
        self._said: set[str] = set()
        """What was left out for its name or size, as it was said."""
        self.renewals = 0
        """How often the watch had to be made again."""

    async def send_all(self) -> Sent:
        """Send what the directory has that was not sent yet, and the removal of what it has no more.

        Raises `httpx.HTTPError` when the stack does not answer.
        """
        found, unlisted = await asyncio.to_thread(list_files, self._root)
        return await self.send(found | set(self._baseline) | self._files_unread(), self._note("", unlisted))

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
                        sent = await (self._send_all_again() if first else self._send_changed(places))
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
            except (PermissionError, FileNotFoundError):
                # A directory that must not be watched, or that went while the watch was made.
                pass
            # Such a directory lets no watch over all that is below be made: this one is over each by itself.
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

    async def _send_changed(self, places: Iterable[str]) -> Sent:
        """Send what the watcher named, and what could not be read when it is time to try that again."""
        due = self._due()
        named = {relative_path(self._root, place) for place in places}
        sent = await self._send_touched(due | {path for path in named if path is not None})
        if due:
            self._try_again = asyncio.get_running_loop().time() + TRY_AGAIN
        return sent

    def _due(self) -> set[str]:
        """What could not be read, when it is time to try it again."""
        if asyncio.get_running_loop().time() < self._try_again:
            return set()
        return {path.rstrip("/") for path in self._unread}

    async def _send_touched(self, touched: set[str]) -> Sent:
        """Send what the watcher's paths may stand for: a directory stands for all below it."""
        paths: set[str] = set()
        news: dict[str, str] = {}
        for path in touched:
            if is_directory(self._root, path) and not path_problem(path):
                found, unlisted = list_files(self._root, path)
                paths |= found
                self._unread.pop(path, None)
                news |= self._note(path, unlisted)
            elif path and not ignored(path):
                self._note(path, {})
                paths.add(path)
            paths.update(known for known in self._baseline if known.startswith(path + "/"))
        return await self.send(paths, news)

    def _files_unread(self) -> set[str]:
        return {path for path in self._unread if not path.endswith("/")}

    def _note(self, below: str, unlisted: Mapping[str, str]) -> dict[str, str]:
        """Keep which directories at and below one could not be listed; gives those that were not said yet."""
        at = f"{below}/" if below else ""
        for path in [path for path in self._unread if path.endswith("/") and path.startswith(at)]:
            if path not in unlisted:
                del self._unread[path]
        news = {path: reason for path, reason in unlisted.items() if self._unread.get(path) != reason}
        self._unread.update(unlisted)
        return news

    async def send(self, paths: set[str], unread: Mapping[str, str] | None = None) -> Sent:
        """Send what became of these paths since they were last sent. Raises as `send_all`.

        `unread`: what else could not be read, to be said with it.
        """
        if self._unkept is not None:
            await self._keep()
        unkept = self._unkept
        news = dict(unread or {})
        updates: dict[str, tuple[LocalFile, bytes]] = {}
        deletes: list[str] = []
        skipped: list[str] = []
        sent = Sent()
        size = 0
        for path in sorted(paths):
            if problem := path_problem(path):
                if stands(self._root, path):
                    skipped.append(f"{shown(path)}: {problem}")
                continue
            try:
                read = await asyncio.to_thread(read_file, self._root, path)
            except Unreadable as error:
                if self._unread.get(path) != str(error):
                    self._unread[path] = news[path] = str(error)
                continue
            self._unread.pop(path, None)
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
        if self._unkept not in (None, unkept):
            skipped.append(f"the note of what was sent: {self._unkept}; a start before that sends it again")
        return _sum(sent, Sent(skipped=(*skipped, *in_few_words(news))))

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
        """Write the baseline. Where it cannot be written now, it is with what is sent next."""
        try:
            await asyncio.to_thread(
                _write_baseline, self._baseline_path, self._project_id, dict(self._baseline)
            )
        except OSError as error:
            self._unkept = f"cannot be written now ({error.strerror}); tried again until it can"
        else:
            self._unkept = None

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
        """Have an asset stored. An object is its hash, so one that is there already is the same and is not sent.

        Storage refuses a stored key without reading the body, which then stands in the connection before whatever
        comes next; so an upload is the last of its connection.
        """
        at = f"project-assets/{self._project_id}/{digest}"
        absent = frozenset({"404"})
        if await self._post(f"/storage/v1/object/sign/{at}", json={"expiresIn": 1}, known=absent):
            return
        await self._post(
            f"/storage/v1/object/{at}",
            content=content,
            headers={"Content-Type": "application/octet-stream", "Connection": "close"},
            known=frozenset({"409"}),
        )

    async def _post(self, path: str, *, known: frozenset[str] = frozenset(), **body: Any) -> bool:
        """POST, tried again while the stack is unreachable or overloaded. False: refused with one of the `known` codes.

        Raises `SaveRefused`, `httpx.HTTPError`.
        """
        async for attempt in tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(5),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            retry=tenacity.retry_if_exception_type(httpx.HTTPError),
            reraise=True,
        ):
            with attempt:
                response = await self._http.post(path, **body)
                if response.is_success:
                    return True
                if response.status_code == 429 or response.status_code >= 500:
                    response.raise_for_status()
                answer = _object(response)
                if known.isdisjoint({str(answer.get("statusCode")), str(answer.get("code"))}):
                    raise SaveRefused(str(answer.get("message") or response.status_code))
        return False


def _read_baseline(path: Path, project_id: UUID) -> dict[str, LocalFile]:
    """What was sent before; empty when nothing was, or to another project. Raises `OSError`."""
    try:
        kept = json.loads(path.read_text())
        if kept["project_id"] != str(project_id):
            return {}
        return {name: LocalFile(digest, executable) for name, (digest, executable) in kept["files"].items()}
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
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
