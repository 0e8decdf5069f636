"""Applies operations to the project's directory, all or nothing, and says what is now true there.

Every content is staged before a name changes, so that a full disk is found first. Then come the removals that stand in
the way of a write, the writes as given, the other removals: a renamed module is there under its new name before the old
one goes. Each step records its inverse; what it replaced waits in staging until the last step, which needs no inverse.

Don't hard-link a backup: the link itself fires inotify, chokidar reads the old content and drops the next event within
5 ms (9 of 2,100 saves stayed stale in Vite 8, none of 3,000 without links). Swap with RENAME_EXCHANGE. Where the file
system cannot exchange, copy the old content; what is no file, or too large to copy on the event loop, is moved to
staging before the write.

Exchange for a single write too, though it needs no backup: a rename onto a file makes ext4 write the new content out at
once (`auto_da_alloc`), 100 µs on an idle disk and milliseconds on a busy one, on the event loop. That would protect
from power loss, which the audit of the ledger covers.

A new directory whose files are all staged (`staging.StagedTree`) appears by one rename. Its inverse is one rename back,
unless another process has put something into it: then it stays, and a problem says so.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from msgspec import Struct

from agent.core.model import Entry, Operation, Problem, RelPath, Remove, Write, parents
from agent.fs.directory_changes import DirectoryChanges, UndoLog
from agent.fs.dirfd import (
    Blocked,
    DirectoryCache,
    DirectoryPermissions,
    environment_problem,
    is_case_twin,
    path_rule,
)
from agent.fs.inspect import Drift, FileStat, drift_steps, lstat
from agent.fs.staging import StagedTree, Staging, TempFile
from agent.fs.syscalls import NO_EXCHANGE, exchange
from agent.fs.turns import at_once

MANY = 1_000
"""From so many operations on they are sorted by directory, so that each directory is opened once: half the processor
time for 20,000 files in 1,261 directories that exist. Fewer keep their order, in which an author may have meant the
imported file to be there before the importing one."""

MAX_READ_BYTES = 64 * 2**20
"""Bytes that one transaction reads of the project's files: a tenth of a second's hashing, on the event loop. Past it a
file whose stat differs is taken for another."""


def in_order(operations: Sequence[Operation]) -> Sequence[Operation]:
    """Sort operations: removals that stand in the way of a write, the writes, the other removals. Pure.

    Paths are compared without case, so that a change of case on a case-insensitive file system is a removal and then a
    write.
    """
    if len(operations) >= MANY:
        operations = sorted(operations, key=lambda operation: operation.path.rpartition("/")[0])
    writes = [operation for operation in operations if isinstance(operation, Write)]
    if len(writes) in (0, len(operations)):
        return operations
    written = {write.path.casefold() for write in writes}
    above = {parent for path in written for parent in parents(RelPath(path))}
    first: list[Operation] = []
    last: list[Operation] = []
    for operation in operations:
        if isinstance(operation, Remove):
            path = RelPath(operation.path.casefold())
            in_the_way = path in written or path in above or not written.isdisjoint(parents(path))
            (first if in_the_way else last).append(operation)
    return [*first, *writes, *last]


class Done(Struct, frozen=True, gc=False):
    """An operation that is now true on disk. `stat` is the file's, None when there is no file."""

    operation: Operation
    stat: FileStat | None


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """What is now true on disk.

    Attributes:
        done: in the order of the operations.
        problems: of single paths; of the environment when it was rolled back.
        rolled_back: the environment failed and everything was undone; `done` has only what could not be.
        made: directories that were made, for `Ledger.record`.
        gone: directories of the agent's that were removed, for `Ledger.record`.
    """

    done: tuple[Done, ...]
    problems: tuple[Problem, ...]
    rolled_back: bool
    made: tuple[RelPath, ...] = ()
    gone: tuple[RelPath, ...] = ()


class _LeftAlone(Exception):
    """A drifted file that the caller wants left alone."""


class Transaction:
    """Runs once: stages contents, applies operations, undoes them.

    Args:
        directories: the project's, opened.
        staging: where contents wait.
        made: the directories that the agent made; changed as they come and go.
        permissions: those of a new directory.
        known: the files that the agent wrote, and their stat then.
        tree: what they held.
        overwrite_drift: whether a file that is not as the agent left it is replaced; otherwise it is left alone.
    """

    def __init__(
        self,
        directories: DirectoryCache,
        staging: Staging,
        made: set[RelPath],
        permissions: DirectoryPermissions,
        known: Mapping[RelPath, FileStat],
        tree: Mapping[RelPath, Entry],
        *,
        overwrite_drift: bool,
    ) -> None:
        self._directories = directories
        self._staging = staging
        self._known = known
        self._tree = tree
        self._overwrite_drift = overwrite_drift

        # The result.
        self._done: dict[RelPath, Done] = {}
        self._problems: list[Problem] = []

        # In staging: files to promote, files replaced.
        self._temps: dict[RelPath, TempFile] = {}
        self._replaced: list[str] = []

        # The staged tree: the writes that wait in it, by directory; the directories that can be promoted whole.
        self._staged_tree: StagedTree | None = None
        self._waiting: dict[RelPath, list[Write]] = {}
        self._whole: set[RelPath] = set()

        # The inverse of each step; the directories made and removed, which put theirs there too.
        self._undo: UndoLog = []
        self._changes = DirectoryChanges(directories, made, permissions, self._undo)

        # The path in hand, for the problem that an error becomes; the bytes that may still be read.
        self._at: RelPath | None = None
        self._readable = MAX_READ_BYTES

    def run(self, operations: Sequence[Operation]) -> TransactionResult:
        """Apply all operations, or none.

        Args:
            operations: at most one a path.

        Raises:
            ValueError: a write has neither content nor a staged file. No error of the file system is raised.
        """
        rolled_back = False
        try:
            for operation in operations:
                if isinstance(operation, Write):
                    self._at = operation.path
                    self._prepare(operation)
            if self._staged_tree is not None:
                self._whole = self._staged_tree.whole(self._waiting)
            order = in_order(operations)
            for operation in order:
                if operation.path not in self._done:
                    self._apply(operation, last=operation is order[-1])
        except OSError as error:
            # Descriptors first: the undoing needs some, and may have failed for want of them.
            self._directories.close()
            self._problems.append(environment_problem(error, self._at, self._staging.descriptor))
            rolled_back = True
            self._roll_back()
        finally:
            self._clean(rolled_back=rolled_back)
        done = tuple([self._done[o.path] for o in operations if o.path in self._done])
        made = tuple([path for path, there in self._changes.changed.items() if there])
        gone = tuple([path for path, there in self._changes.changed.items() if not there])
        return TransactionResult(done, tuple(self._problems), rolled_back, made, gone)

    def _prepare(self, write: Write) -> None:
        path, executable = write.path, write.entry.executable
        if write.content is not None:
            self._temps[path] = self._staging.put([write.content], executable=executable)
            return
        if write.staged is None:
            raise ValueError(f"the write of {path!r} has neither content nor a staged file")
        tree = self._staging.tree(write.staged)
        if tree is None:
            self._temps[path], _ = self._staging.take(write.staged, executable=executable)
        else:
            self._staged_tree = tree
            if path not in self._known:
                self._waiting.setdefault(RelPath(path.rpartition("/")[0]), []).append(write)

    def _apply(self, operation: Operation, *, last: bool) -> None:
        self._at = path = operation.path
        steps_before = len(self._undo)
        try:
            if isinstance(operation, Write):
                self._write(operation, keep=not last)
            else:
                self._remove(operation, keep=not last)
        except _LeftAlone:
            return
        except Blocked as blocked:
            self._refuse(operation, blocked.rule, f"{blocked.rule.replace('_', ' ')} at {blocked.path}")
            if isinstance(operation, Remove):  # true nevertheless: no file of the agent's is there
                self._done[path] = Done(operation, None)
        except OSError as error:
            rule = path_rule(error, self._staging.descriptor)
            if rule is None:
                raise
            for step in [each for each in reversed(self._undo[steps_before:]) if each[0] == path]:
                self._undo.remove(step)
                self._undone(*step)
            self._refuse(operation, rule, f"{rule.replace('_', ' ')}, {error.strerror}")

    def _refuse(self, operation: Operation, rule: str, why: str) -> None:
        """Report that this path alone is unusable."""
        detail = f"cannot use {operation.path}: {why}"
        self._problems.append(Problem("path_unusable", detail, operation.path, rule, waiting=True))
        self._changes.prune(operation.path)

    # --- writing

    def _write(self, write: Write, *, keep: bool) -> None:
        path = write.path
        directory, name = self._directories.parent(path, self._make_directory)
        if path in self._done:  # promoted with its directory
            return
        found = lstat(directory, name)
        if found is not None and stat.S_ISDIR(found.st_mode):
            self._changes.clear(path)
            directory, found = self._directories.parent(path)[0], None
        elif self._already_holds(path, directory, name, found, write.entry):
            assert found is not None
            self._done[path] = Done(write, FileStat.of(found))
            return
        temp = self._temps.get(path) or self._take_from_tree(write)
        undo = self._replace(path, directory, name, temp, found, keep=keep) if found is not None else None
        if undo is None:
            os.rename(temp.name, name, src_dir_fd=self._staging.descriptor, dst_dir_fd=directory)
        if keep:
            self._undo.append((path, partial(undo or self._undo_create, path, temp)))
        self._done[path] = Done(write, self._stat_after(path, directory, name, temp))
        del self._temps[path]

    def _take_from_tree(self, write: Write) -> TempFile:
        name = f"{write.staged}/{write.path}"
        temp, _ = self._staging.take(name, executable=write.entry.executable)
        self._temps[write.path] = temp
        return temp

    def _stat_after(self, path: RelPath, directory: int, name: str, temp: TempFile) -> FileStat | None:
        """Stat the file just written. None when another process has replaced it or written to it already, since that
        stat would then vouch for what the agent did not write; or when it cannot be told.
        """
        try:
            now = lstat(directory, name)
        except OSError:
            return None
        if now is None or not temp.is_whole(now):
            self._problems.append(Drift(path, "missing" if now is None else "changed").problem())
            return None
        return FileStat.of(now)

    def _already_holds(
        self, path: RelPath, directory: int, name: str, found: os.stat_result | None, wanted: Entry
    ) -> bool:
        """Whether `path` holds what is `wanted`, though the agent did not write it. Reports drift."""
        expected = self._known.get(path)
        if found is None:
            if expected is not None:
                self._report_drift(Drift(path, "missing"))
            return False
        if expected is not None and expected.matches(found):
            return False
        if expected is None and is_case_twin(directory, name, found):
            raise Blocked(path, "case_twin")
        entry = self._tree.get(path)
        drift = at_once(drift_steps(path, directory, name, found, expected, entry, wanted, self._may_read))
        if drift is None:
            return False
        runs = found.st_mode & 0o100 != 0
        if drift.digest == wanted.digest and drift.stat == FileStat.of(found) and runs == wanted.executable:
            return True
        self._report_drift(drift)
        return False

    def _report_drift(self, drift: Drift) -> None:
        self._problems.append(drift.problem())
        if not self._overwrite_drift:
            raise _LeftAlone

    def _may_read(self, size: int) -> bool:
        """Whether so many bytes more may be read; counts them."""
        enough = size <= self._readable
        self._readable -= size if enough else 0
        return enough

    def _replace(
        self, path: RelPath, directory: int, name: str, temp: TempFile, found: os.stat_result, *, keep: bool
    ) -> Callable[[RelPath, TempFile], None] | None:
        """Exchange `temp` and what is at `name`, or copy that before it is replaced.

        RACE: a directory may have taken the file's place since it was stat'ed. It is exchanged back at once, and is in
        the way like any other. Worst case: a program that asks between the two finds the file.

        Returns:
            How to undo it. None when a rename has yet to put `temp` there: nothing is at `name` any more, or the file
            system cannot exchange and no copy is needed.
        """
        staging = self._staging.descriptor
        try:
            exchange(temp.name, name, src_dir_fd=staging, dst_dir_fd=directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in NO_EXCHANGE:
                raise
        else:
            self._give_back_directory(path, temp.name, directory, name, exchange)
            self._replaced.append(temp.name)
            return self._undo_exchange
        if not keep:
            return None
        entry, size, copy = self._tree.get(path), found.st_size, None
        as_expected = entry is not None and entry.size == size
        if stat.S_ISREG(found.st_mode) and (as_expected or self._may_read(size)):
            with suppress(BlockingIOError):  # held by a lease: it is moved instead
                copy = self._staging.copy(name, directory, size)
        if copy is None:
            self._move_to_staging(path, directory, name)
            return None
        self._replaced.append(copy)
        os.rename(temp.name, name, src_dir_fd=staging, dst_dir_fd=directory)
        return partial(self._undo_copy, copy)

    def _move_to_staging(self, path: RelPath, directory: int, name: str) -> None:
        moved = self._staging.new_name()
        os.rename(name, moved, src_dir_fd=directory, dst_dir_fd=self._staging.descriptor)
        self._give_back_directory(path, moved, directory, name, os.rename)
        self._replaced.append(moved)
        self._undo.append((path, partial(self._undo_move, path, moved)))

    def _give_back_directory(
        self, path: RelPath, moved: str, directory: int, name: str, how: Callable[..., None]
    ) -> None:
        """Put a directory back that came to staging in a file's place. Raises `Blocked` when one did."""
        found = lstat(self._staging.descriptor, moved)
        if found is not None and stat.S_ISDIR(found.st_mode):
            how(moved, name, src_dir_fd=self._staging.descriptor, dst_dir_fd=directory)
            raise Blocked(path, "directory_in_the_way")

    # --- removing

    def _remove(self, remove: Remove, *, keep: bool) -> None:
        path = remove.path
        try:
            directory, name = self._directories.parent(path)
            found = lstat(directory, name)
        except FileNotFoundError:
            found, directory, name = None, -1, ""
        if found is None:
            if path in self._known:
                self._problems.append(Drift(path, "missing").problem())
        elif path not in self._known:
            self._problems.append(Drift(path, "appeared").problem())
        elif stat.S_ISDIR(found.st_mode):
            self._problems.append(Drift(path, "not_a_file").problem())
        else:
            self._already_holds(path, directory, name, found, remove.entry)
            if keep:
                self._move_to_staging(path, directory, name)
            else:
                os.unlink(name, dir_fd=directory)
        self._done[path] = Done(remove, None)
        self._changes.prune(path, must=keep)

    # --- directories

    def _make_directory(self, above: int, name: str, path: str) -> None:
        """Make one directory, by promoting it from the staged tree where that has all of it."""
        directory = RelPath(path)
        if directory not in self._whole or not self._promote_directory(above, name, directory):
            self._changes.make(above, name, path)

    def _promote_directory(self, above: int, name: str, path: RelPath) -> bool:
        """Rename a whole directory from the staged tree into place; False when it has to be made.

        Its files are stat'ed before: in staging no other process can touch them, and a rename of their directory
        changes no stat of theirs.
        """
        assert self._staged_tree is not None
        directories = list(self._staged_tree.within(path))
        done: list[Done] = []
        for directory in directories:
            for write in self._waiting.get(directory, ()):
                place = self._staged_tree.place(write.path)
                done.append(Done(write, self._staging.take(place, executable=write.entry.executable)[1]))
        try:
            # Onto nothing, or onto an empty directory that was made this moment.
            os.rename(
                self._staged_tree.place(path), name, src_dir_fd=self._staging.descriptor, dst_dir_fd=above
            )
        except OSError:
            return False
        self._undo.append((path, partial(self._undo_promote, path, directories)))
        self._done.update((each.operation.path, each) for each in done)
        self._changes.add(directories)
        return True

    # --- undoing

    def _roll_back(self) -> None:
        stuck = {path for path, undo in reversed(self._undo) if not self._undone(path, undo)}
        stays = {path for path in self._done if path in stuck or not stuck.isdisjoint(parents(path))}
        self._done = {path: done for path, done in self._done.items() if path in stays}

    def _undone(self, path: RelPath | None, undo: Callable[[], None]) -> bool:
        """Take one step back. False, and a problem, when `path` stays changed."""
        try:
            undo()
        except (OSError, Blocked) as error:
            if path is not None:
                detail = f"cannot undo the change of {path}: {error}"
                self._problems.append(Problem("undo_failed", detail, path))
                return False
        return True

    def _undo_create(self, path: RelPath, temp: TempFile) -> None:
        """Move the new file back to staging, unless another process has put something in its place."""
        directory, name = self._directories.parent(path)
        found = lstat(directory, name)
        if found is not None and found.st_ino == temp.inode:
            os.rename(name, temp.name, src_dir_fd=directory, dst_dir_fd=self._staging.descriptor)
        self._temps[path] = temp

    def _undo_exchange(self, path: RelPath, temp: TempFile) -> None:
        directory, name = self._directories.parent(path)
        try:
            exchange(temp.name, name, src_dir_fd=self._staging.descriptor, dst_dir_fd=directory)
        except FileNotFoundError:
            os.rename(temp.name, name, src_dir_fd=self._staging.descriptor, dst_dir_fd=directory)
        self._replaced.remove(temp.name)
        self._temps[path] = temp

    def _undo_copy(self, copy: str, path: RelPath, temp: TempFile) -> None:
        """Let the copy take the new file's place; the new one goes back to staging where a later try needs it."""
        directory, name = self._directories.parent(path)
        staging = self._staging.descriptor
        if temp.prestaged:
            with suppress(OSError):
                os.link(name, temp.name, src_dir_fd=directory, dst_dir_fd=staging, follow_symlinks=False)
        os.rename(copy, name, src_dir_fd=staging, dst_dir_fd=directory)
        self._temps[path] = temp

    def _undo_move(self, path: RelPath, moved: str) -> None:
        directory, name = self._directories.parent(path)
        os.rename(moved, name, src_dir_fd=self._staging.descriptor, dst_dir_fd=directory)

    def _undo_promote(self, path: RelPath, directories: Sequence[RelPath]) -> None:
        """Move a whole directory back to the staged tree, unless another process has put something into it."""
        assert self._staged_tree is not None
        inside = sum(len(os.listdir(self._directories.open(each))) for each in directories)
        if inside != sum(len(self._waiting.get(each, ())) + 1 for each in directories) - 1:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        self._directories.close()
        directory, name = self._directories.parent(path)
        place = self._staged_tree.place(path)
        os.rename(name, place, src_dir_fd=directory, dst_dir_fd=self._staging.descriptor)
        self._changes.take_back(directories)

    def _clean(self, *, rolled_back: bool) -> None:
        """Leave in staging only what a later try can still promote, and what waits for the next sweep."""
        for temp in self._temps.values():
            if not (rolled_back and temp.prestaged):
                self._staging.discard(temp.name)
        if rolled_back:
            for name in self._replaced:
                self._staging.discard(name)
            return
        self._staging.discard_later(self._replaced)
        if self._staged_tree is not None:
            self._staging.drop_tree()
