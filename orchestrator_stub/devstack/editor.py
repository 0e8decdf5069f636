"""Turns saves in a directory into saves of a project, as the product's editor would.

It does what the product's editor does, over the same HTTP endpoints and with a user's token (`project_client`). What
was last sent is kept in a *baseline*, so that at the next start only what changed in the directory meanwhile is sent,
and what changed in the project meanwhile is left alone. Where both changed, the directory's file is saved and the
project's is kept beside it as `name.conflict-v7`, named by the version that it was.

A file is deleted when it is seen to be gone, or to be something else now (a directory, a link). One that cannot be read
(no rights, no descriptors, a failing disk) keeps what the project has of it, is said once, and is tried again. What
`ignore_rules` leaves out is said once, with how to have it sent.
"""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final
from uuid import UUID

import httpx
from watchfiles import awatch
from watchfiles._rust_notify import WatchfilesRustInternalError

from orchestrator_stub.devstack.baseline import Baseline
from orchestrator_stub.devstack.project_client import ProjectClient, SaveRefused
from orchestrator_stub.devstack.three_way import UNCERTAIN, Theirs, compare
from orchestrator_stub.platform.ignore_rules import IgnoreRules, LeftOut
from orchestrator_stub.platform.source_files import (
    FEW,
    MAX_ASSET,
    LocalFile,
    Unreadable,
    directories,
    in_few_words,
    is_directory,
    list_files,
    mode_of,
    path_problem,
    read_file,
    relative_path,
    shown,
    stands,
)

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

RULES: Final = ".gitignore"

WHY: Final = {
    LeftOut.GIT: "as git's ignore rules say",
    LeftOut.DEFAULT: "as nothing here says what is the project's",
    LeftOut.SECRET: "for they may hold secrets, and nothing here says that they are shared",
}
"""What is said of paths that are left out; of the other reasons nobody needs to hear."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What one push sent: how many files changed and how many were removed.

    `skipped`: what was left out, with reasons. `said`: what else a person has to know.
    """

    updated: int = 0
    deleted: int = 0
    skipped: tuple[str, ...] = ()
    said: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.updated or self.deleted or self.skipped or self.said)

    def __add__(self, other: Sent) -> Sent:
        return Sent(
            self.updated + other.updated,
            self.deleted + other.deleted,
            self.skipped + other.skipped,
            self.said + other.said,
        )


class Editor:
    """One directory and the project it is sent to. `http` has the stack's base URL, API key and a user's auth.

    `include`: patterns, as git writes them, of what is sent although the rules leave it out.

    Raises `OSError` when there is a `baseline` that cannot be read.
    """

    def __init__(
        self,
        root: Path,
        project_id: UUID,
        http: httpx.AsyncClient,
        baseline: Path,
        *,
        include: Sequence[str] = (),
    ) -> None:
        self._root = root.resolve()
        self._project = ProjectClient(http, project_id)
        self._baseline = Baseline(baseline, project_id)
        self._include = include
        self._rules = IgnoreRules(self._root, include)
        self._unread: dict[str, str] = {}
        """What could not be read, and why, as it was said; a directory that could not be listed ends in a slash."""
        self._try_again = 0.0
        self._said: set[str] = set()
        """What was left out for its name or size, or by the rules, as it was said."""
        self.renewals = 0
        """How often the watch had to be made again."""

    @property
    def baseline(self) -> Baseline:
        """What of the directory was sent last."""
        return self._baseline

    async def begin(self) -> Sent:
        """Send what changed in the directory since it was last watched; where the project changed too, keep both.

        Raises `httpx.HTTPError` when the stack does not answer.
        """
        found, news = await self._scan()
        here = await asyncio.to_thread(self._read_digests, found | set(self._baseline.files))
        base = self._baseline.files
        if all(here.get(path) == base.get(path) for path in here.keys() | base.keys()):
            return await self.send(self._files_unread(), news)
        compared = compare(base, here, await self._project.current())
        for path, file in compared.same.items():
            self._take(path, file)
        said = [
            f"{shown(path)} stays in the project: it was changed there after it was sent, and removed here"
            for path in compared.kept
        ]
        for path in compared.kept:
            base.pop(path, None)
        not_kept = set()
        for path, theirs in compared.conflicts.items():
            line, kept = await self._keep_theirs(path, theirs)
            said.append(line)
            if not kept:
                not_kept.add(path)
        if compared.same or compared.kept:
            await asyncio.to_thread(self._baseline.keep)
        sent = await self.send((found | set(base) | self._files_unread()) - not_kept, news)
        return sent + Sent(said=tuple(said))

    async def send_all(self) -> Sent:
        """Send what the directory has that was not sent yet, and the removal of what it has no more.

        Raises `httpx.HTTPError` when the stack does not answer.
        """
        found, news = await self._scan()
        return await self.send(found | set(self._baseline.files) | self._files_unread(), news)

    async def _scan(self) -> tuple[set[str], dict[str, str]]:
        """The project's files in the directory, and what of it could not be read and was not said yet."""
        self._rules = IgnoreRules(self._root, self._include)
        out: dict[str, LeftOut] = {}
        found, unlisted = await asyncio.to_thread(
            list_files, self._root, rules=self._rules, left_out=out.__setitem__
        )
        return found, {**self._note("", unlisted), **self._note_left_out(out)}

    def _note_left_out(self, out: Mapping[str, LeftOut]) -> dict[str, str]:
        """What the rules leave out and was not said yet: a line for each reason, under the paths that it names."""
        lines = {}
        for reason, why in WHY.items():
            paths = sorted(path for path, said in out.items() if said is reason and path not in self._said)
            if paths:
                self._said.update(paths)
                named = ", ".join(map(shown, paths[:FEW]))
                more = f" and {len(paths) - FEW} more" if len(paths) > FEW else ""
                lines[f"{named}{more}"] = f"{why} (--include sends it)"
        return lines

    def _read_digests(self, paths: Iterable[str]) -> dict[str, LocalFile]:
        """What the directory holds. What cannot be read, or is left out by now, counts as unchanged."""
        found: dict[str, LocalFile] = {}
        for path in paths:
            if path_problem(path):
                continue
            try:
                read = read_file(self._root, path)
            except Unreadable:
                if path in self._baseline.files:
                    found[path] = self._baseline.files[path]
                continue
            if read is not None:
                out = path in self._baseline.files and self._is_left_out(path)
                found[path] = self._baseline.files[path] if out else read[0]
        return found

    def _take(self, path: str, file: LocalFile | None) -> None:
        if file is None:
            self._baseline.files.pop(path, None)
        else:
            self._baseline.files[path] = file

    async def _keep_theirs(self, path: str, theirs: Theirs) -> tuple[str, bool]:
        """Keep what the project has at a path beside the directory's. What to say of it; whether it is kept."""
        name = f"{path}.conflict-v{theirs.version}"
        content = await self._project.content(path, theirs)
        try:
            if content is None:
                raise OSError(0, "it changed again meanwhile")
            # One that is there already is from a start before, of the same version.
            with suppress(FileExistsError), (self._root / name).open("xb") as file:
                file.write(content)
        except OSError as error:
            with suppress(OSError):
                (self._root / name).unlink(missing_ok=True)
            why = error.strerror or str(error)
            return (
                f"{shown(path)} changed here and in the project; not sent, for the other cannot be kept: {why}",
                False,
            )
        return (
            f"{shown(path)} changed here and in the project: this one is sent, the other is kept as {shown(name)}",
            True,
        )

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
            *([self._root] if deep else directories(self._root, self._rules)),
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
        if any(path.rpartition("/")[2] == RULES for path in touched):
            return await self._send_all_again()
        paths: set[str] = set()
        news: dict[str, str] = {}
        for path in touched:
            if is_directory(self._root, path) and not path_problem(path):
                if path and self._is_left_out(path, directory=True):
                    continue
                found, unlisted = list_files(self._root, path, rules=self._rules)
                paths |= found
                self._unread.pop(path, None)
                news |= self._note(path, unlisted)
            elif path:
                self._note(path, {})
                paths.add(path)
            # What was a file and is a directory now, or lies in what was a file, and the other way round.
            above = [path[:at] for at, letter in enumerate(path) if letter == "/"]
            paths.update(known for known in (path, *above) if known in self._baseline.files)
            paths.update(known for known in self._baseline.files if known.startswith(path + "/"))
        return await self.send(paths, news)

    def _is_left_out(self, path: str, *, directory: bool = False) -> bool:
        """Whether the rules leave it out, or cannot be read, which a scan says."""
        try:
            return self._rules.left_out(path, directory=directory) is not None
        except OSError:
            return True

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
        unkept = self._baseline.unkept
        if unkept is not None:
            await asyncio.to_thread(self._baseline.keep)
        news = dict(unread or {})
        updates: dict[str, tuple[LocalFile, bytes]] = {}
        skipped: list[str] = []
        # First, so that a directory may come where a file was, and a file where files lay.
        deletes = [path for path in sorted(paths & self._baseline.files.keys()) if self._is_gone(path)]
        sent = Sent()
        size = 0
        for path in sorted(paths - set(deletes)):
            if problem := path_problem(path):
                if stands(self._root, path):
                    skipped.append(f"{shown(path)}: {problem}")
                continue
            if self._is_left_out(path):
                continue
            try:
                read = await asyncio.to_thread(read_file, self._root, path)
            except Unreadable as error:
                if self._unread.get(path) != str(error):
                    self._unread[path] = news[path] = str(error)
                continue
            self._unread.pop(path, None)
            if read is None:
                if path in self._baseline.files:
                    deletes.append(path)
                continue
            file, content = read
            if self._baseline.files.get(path) == file:
                continue
            if len(content) > MAX_ASSET:
                skipped.append(f"{shown(path)}: larger than 50 MB")
                continue
            updates[path] = (file, content)
            size += len(content)
            if size >= BATCH_BYTES or len(updates) + len(deletes) >= BATCH_FILES:
                sent += await self._commit(updates, deletes)
                updates, deletes, size = {}, [], 0
        if updates or deletes:
            sent += await self._commit(updates, deletes)
        self._said.update(skipped)
        if self._baseline.unkept not in (None, unkept):
            skipped.append(
                f"the note of what was sent: {self._baseline.unkept}; a start before that sends it again"
            )
        return sent + Sent(skipped=(*skipped, *in_few_words(news)))

    def _is_gone(self, path: str) -> bool:
        """Whether it can be seen that no file stands there any more."""
        try:
            mode = mode_of(self._root, path)
        except OSError:
            return False
        return mode is None or not stat.S_ISREG(mode)

    async def _commit(self, updates: Mapping[str, tuple[LocalFile, bytes]], deletes: Sequence[str]) -> Sent:
        """One batch: one commit, and the baseline moved on. One that is refused is tried again in two halves."""
        known = self._baseline.files
        paths = [*updates, *deletes]
        await asyncio.to_thread(self._baseline.begin, paths)
        try:
            await self._project.save(updates, deletes, known)
        except httpx.HTTPError:
            # It may have been done all the same: whatever stands there next is to be sent, the old content too.
            known.update(dict.fromkeys(paths, UNCERTAIN))
            await asyncio.to_thread(self._baseline.keep)
            raise
        except SaveRefused as refused:
            if len(paths) > 1:
                return await self._commit_in_halves(updates, deletes)
            for path, (file, _) in updates.items():
                known[path] = file
            return Sent(skipped=(f"{shown(paths[0])}: {refused}",))
        for path, (file, _) in updates.items():
            known[path] = file
        for path in deletes:
            known.pop(path, None)
        await asyncio.to_thread(self._baseline.keep)
        return Sent(len(updates), len(deletes))

    async def _commit_in_halves(
        self, updates: Mapping[str, tuple[LocalFile, bytes]], deletes: Sequence[str]
    ) -> Sent:
        """The removals before the rest, then each half apart: what is refused is found in a few steps."""
        if deletes and updates:
            return await self._commit({}, deletes) + await self._commit(updates, [])
        half = (len(updates) + len(deletes)) // 2
        items = list(updates.items())
        first = await self._commit(dict(items[:half]), deletes[:half])
        return first + await self._commit(dict(items[half:]), deletes[half:])
