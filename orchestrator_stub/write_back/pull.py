"""Writes what came back from containers into the directory of `dev`.

A file in the directory is replaced only if it is what was sent of it last: then nobody has written there since. Where
it is not, the project's is kept beside it as `name.conflict-v7`, as at a start where both sides changed. What is taken
is noted as sent, so that the watch over the directory does not send it once more.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol
from uuid import UUID

import psycopg

from orchestrator_stub.platform.database import Pool
from orchestrator_stub.platform.source_files import (
    LocalFile,
    Unreadable,
    mode_of,
    path_problem,
    read_file,
    shown,
)
from orchestrator_stub.write_back.command import put_in_force
from orchestrator_stub.write_back.presets import rules_of

EVERY: Final = 1.0
"""Seconds between two looks: a tool's output is waited for by nobody."""
AT_ONCE: Final = 50

CAME: Final = """
select file_path, version, revision, content, executable, is_deleted from public.project_files
where project_id = %s and is_current_version and session_id is not null and revision > %s and encoding = 'utf-8'
order by revision, file_path limit %s
"""
"""A session's id stands with what a container made, and with what a member took of it."""

AGAIN: Final = """
select file_path, version, revision, content, executable, is_deleted from public.project_files
where project_id = %s and is_current_version and file_path = any(%s) and encoding = 'utf-8'
"""

WAITS: Final = """
select kept_id, 'conflict', file_path from public.list_conflicts(%s)
union all select kept_id, 'proposal', file_path from public.list_proposals(%s)
"""
MOST_NAMED: Final = 3
"""Of what begins to wait at once; more are counted."""
DECIDE: Final = "`preview-orchestrator write-back -` shows and decides"


async def follow(
    presets: Sequence[str],
    pool: Pool,
    project_id: UUID,
    root: Path,
    sent: SentFiles,
    scratch: Path,
    say: Callable[[str], object],
) -> None:
    """Put presets in force, and bring into `root` what comes back, for ever; `say` is told."""
    try:
        await put_in_force(pool, project_id, rules_of(presets))
    except psycopg.Error as error:
        say(f"write-back stays as it was: {' '.join(str(error).split())}")
    else:
        say(f"write-back is on: what {', '.join(presets)} may make comes back into {root}")
    await Pull(root, project_id, pool, sent, scratch).run(say)


class SentFiles(Protocol):
    """What of the directory was sent last."""

    files: dict[str, LocalFile]

    def keep(self) -> None:
        """Write it down."""


@dataclass(frozen=True, slots=True)
class Came:
    """One version that a container made."""

    path: str
    version: int
    revision: int
    content: str | None
    executable: bool
    is_deleted: bool

    @property
    def file(self) -> LocalFile | None:
        """What the directory is to hold; None: nothing."""
        if self.is_deleted or self.content is None:
            return None
        return LocalFile(hashlib.sha256(self.content.encode()).hexdigest(), self.executable)


class Pull:
    """One directory, and the project whose containers' output it takes. `scratch`: a directory for drafts."""

    def __init__(self, root: Path, project_id: UUID, pool: Pool, sent: SentFiles, scratch: Path) -> None:
        self._root = root.resolve()
        self._project_id = project_id
        self._pool = pool
        self._sent = sent
        self._draft = scratch / "pulled.new"
        self._revision = 0
        self._failed: dict[str, str] = {}
        """By path, why what came back is not in the directory: it is tried again."""
        self._waiting: set[UUID] = set()
        """Conflicts and proposals that were said."""

    async def run(self, say: Callable[[str], object]) -> None:
        """Take what comes, for ever, and say a line of each file. While the database is away, wait."""
        while True:
            with suppress(psycopg.OperationalError):
                for line in [*await self.step(), *await self.waiting()]:
                    say(line)
            await asyncio.sleep(EVERY)

    async def step(self) -> list[str]:
        """Take what came since the last step; a line for each file. Raises `psycopg.OperationalError`."""
        lines: list[str] = []
        if self._failed:
            lines += await self._take_all(
                await self._rows(AGAIN, self._project_id, [*self._failed][:AT_ONCE])
            )
        while True:
            found = await self._rows(CAME, self._project_id, self._revision, AT_ONCE)
            lines += await self._take_all(found)
            if len(found) < AT_ONCE:
                self._revision = max([self._revision, *(came.revision for came in found)])
                return lines
            # Of one commit as much as came; what is left of it is asked for again, and is there already.
            self._revision = max(self._revision + 1, found[-1].revision) - 1

    async def waiting(self) -> list[str]:
        """Say what waits for a decision since the last time. Raises `psycopg.OperationalError`."""
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(WAITS.encode(), [self._project_id] * 2)).fetchall()
        new = [(kind, path) for kept_id, kind, path in rows if kept_id not in self._waiting]
        self._waiting = {row[0] for row in rows}
        if len(new) > MOST_NAMED:
            return [f"{len(new)} files that tools made wait for a decision; {DECIDE}"]
        return [f"{shown(path)} of a tool waits for a decision ({kind}); {DECIDE}" for kind, path in new]

    async def _rows(self, statement: str, *values: object) -> list[Came]:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(statement.encode(), values)
            return [Came(*row) for row in await cursor.fetchall()]

    async def _take_all(self, found: Sequence[Came]) -> list[str]:
        lines: list[str] = []
        for came in found:
            said = self._failed.pop(came.path, None)
            line = await asyncio.to_thread(self._take, came)
            if line is not None and line != said:
                lines.append(line)
        if lines:
            await asyncio.to_thread(self._sent.keep)
        return lines

    def _fails(self, path: str, why: str) -> str:
        self._failed[path] = f"{shown(path)} came back and {why}"
        return self._failed[path]

    def _take(self, came: Came) -> str | None:
        path, wanted = came.path, came.file
        if path_problem(path):
            return None
        try:
            if not self._is_reachable(path):
                return self._fails(path, "is not taken: a link or a file is on the way to it")
            read = read_file(self._root, path)
            mode = mode_of(self._root, path)
        except (Unreadable, OSError) as error:
            return self._fails(path, f"cannot be taken: {error}")
        ours = read[0] if read is not None else None
        before = self._sent.files.get(path)
        if ours is not None and wanted is not None and ours.digest == wanted.digest:
            self._sent.files[path] = ours
            return None
        if ours is None and wanted is None:
            return None
        if ours != before or (mode is not None and not stat.S_ISREG(mode)):
            return self._keep_beside(came, ours is None and mode is None)
        try:
            self._replace(path, came, ours)
        except OSError as error:
            return self._fails(path, f"cannot be written: {error.strerror}")
        if wanted is None:
            self._sent.files.pop(path, None)
            return f"{shown(path)} was removed by a tool"
        self._sent.files[path] = wanted
        return f"{shown(path)} came back"

    def _is_reachable(self, path: str) -> bool:
        """Whether every directory above a path is one, or is not there yet. Raises `OSError`."""
        above = [path[:at] for at, letter in enumerate(path) if letter == "/"]
        modes = (mode_of(self._root, each) for each in above)
        return all(mode is None or stat.S_ISDIR(mode) for mode in modes)

    def _keep_beside(self, came: Came, removed_here: bool) -> str | None:
        """The directory's own stays. What is to be said of it, once."""
        path = shown(came.path)
        if removed_here:
            return f"{path} came back and was removed here: it stays in the project alone"
        if came.content is None:
            return f"{path} was removed by a tool and changed here: it stays here"
        name = f"{came.path}.conflict-v{came.version}"
        try:
            with (self._root / name).open("x", newline="") as file:
                file.write(came.content)
        except FileExistsError:
            return None
        except OSError as error:
            return f"{path} came back and was changed here; the other cannot be kept: {error.strerror}"
        return f"{path} came back and was changed here: the tool's is kept as {shown(name)}"

    def _replace(self, path: str, came: Came, ours: LocalFile | None) -> None:
        """Put a file in place, whole. Raises `OSError`."""
        target = self._root / path
        if came.content is None:
            target.unlink()
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        for draft in (self._draft, target.with_name(f".{target.name}.pulled~")):
            try:
                draft.write_text(came.content, newline="")
                if came.executable:
                    draft.chmod(0o755)
                # Nothing lies between this look and the rename but the rename.
                if (now := read_file(self._root, path)) is not None and now[0] != ours:
                    raise OSError(errno.EBUSY, "it changes now")
                draft.replace(target)
            except OSError as error:
                draft.unlink(missing_ok=True)
                if error.errno != errno.EXDEV:
                    raise
            else:
                return
