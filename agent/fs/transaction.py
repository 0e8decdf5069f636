"""One batch of operations on the disk: it lands all or nothing, and what it could not do is data.

The order of steps is what makes it safe. Every content is staged first, so a full disk is found before any name
changes. Then: removals that stand in the way of a write (a file that becomes a directory, a directory that becomes
a file), the writes as given, the other removals. So a renamed module is there under its new name before the old
one goes. Each step that changes a name leaves its inverse; what a name stood for waits in staging until the last
step is done. The last step needs no inverse.

Nothing may happen to a file before its new content is there: a second name for it (a hard link to keep it by) would
already be an event, a watcher would look, find the old content, and drop what follows within 5 ms (chokidar does: with
links Vite 8 kept serving 9 of 2,100 files stale, without 0 of 3,000). Therefore old and new change places in one step,
and where the file system cannot do that, the old is copied. Only what is no file, or has become larger than what is
copied on the event loop, is set aside before.

A directory that is new, and waits in staging with all that is to be in it (`fs.staging`), appears by one rename
where it would have been made. Its inverse is one rename as well, which is not done when somebody else has put something
into it: then it stays, and says so.

A batch of one exchanges too, although it keeps nothing: a rename onto a file makes ext4 write the new content out there
and then (`auto_da_alloc`), which takes 100 µs on an idle disk and milliseconds on a busy one, on the event loop. What
that would protect from, a loss of power, is what the ledger's claims are held against the disk for.

In which order the operations of a batch are done. Pure.
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

from agent.core.model import PROTECTED, Entry, Operation, Problem, RelPath, Remove, Write, parents
from agent.fs.dirfd import (
    ENVIRONMENT,
    PATH_RULES,
    Blocked,
    DirectoryCache,
    DirectoryPermissions,
    environment_problem,
    is_case_twin,
)
from agent.fs.inspect import Drift, FileStat, drift_steps, lstat
from agent.fs.staging import StagedTree, Staging, TempFile
from agent.fs.syscalls import NO_EXCHANGE, exchange
from agent.fs.turns import at_once

MANY = 1_000
"""Operations from which on they are done directory by directory, so that each directory is opened once: half the
processor time for 20,000 files in 1,261 directories that stand there already. Smaller batches keep their order, in
which an author may have meant the imported file to be there before the importing one."""


def in_order(operations: Sequence[Operation]) -> Sequence[Operation]:
    """The order in which a batch is done: what stands in the way goes first, what is merely gone goes last.

    Compared without case, so that a change of case on a case-blind file system is a removal and then a write.
    """
    if len(operations) == 1:
        return operations
    if len(operations) >= MANY:
        operations = sorted(operations, key=lambda operation: operation.path.rpartition("/")[0])
    if all(isinstance(operation, Write) for operation in operations):
        return operations
    written = {o.path.casefold() for o in operations if isinstance(o, Write)}
    if not written:
        return operations
    above = {parent for path in written for parent in parents(RelPath(path))}
    first: list[Operation] = []
    writes: list[Operation] = []
    last: list[Operation] = []
    for operation in operations:
        key = RelPath(operation.path.casefold())
        if isinstance(operation, Write):
            writes.append(operation)
        elif key in written or key in above or any(parent in written for parent in parents(key)):
            first.append(operation)
        else:
            last.append(operation)
    return first + writes + last


class Done(Struct, frozen=True, gc=False):
    """An operation that is now true on disk. `stat` is the file's, None when there is none."""

    operation: Operation
    stat: FileStat | None


@dataclass(frozen=True, slots=True)
class TransactionResult:
    """What is now true on disk.

    `done` in the order of the operations. `rolled_back`: the environment failed and everything was undone; `done` then
    holds only what could not be undone. `made` and `gone`: directories, for `Ledger.record`.
    """

    done: tuple[Done, ...]
    problems: tuple[Problem, ...]
    rolled_back: bool
    made: tuple[RelPath, ...] = ()
    gone: tuple[RelPath, ...] = ()


MAX_READ_BYTES = 64 * 2**20
"""Bytes that one batch reads of what stands in the project: a tenth of a second's hashing, on the event loop. Past it a
file that looks different is taken for another."""


class _LeftAlone(Exception):
    """A drifted file that the caller wants left alone."""


class Transaction:
    """One run. `made` is the disk's own set of the directories it made, advanced as they come and go."""

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
        self._made = made
        self._permissions = permissions
        self._known = known
        self._tree = tree
        self._overwrite_drift = overwrite_drift
        self._done: dict[RelPath, Done] = {}
        self._problems: list[Problem] = []
        self._temps: dict[RelPath, TempFile] = {}
        self._saved: list[str] = []
        self._staged_tree: StagedTree | None = None
        self._waiting: dict[RelPath, list[Write]] = {}
        self._whole: set[RelPath] = set()
        self._undo: list[tuple[RelPath | None, Callable[[], None]]] = []
        self._new: dict[RelPath, bool] = {}
        self._at: RelPath | None = None
        self._readable = MAX_READ_BYTES

    def run(self, operations: Sequence[Operation]) -> TransactionResult:
        """Do all of it, or nothing. At most one operation a path. Raises nothing of the file system's."""
        rolled_back = False
        try:
            hold = len(operations) == 1
            for operation in operations:
                if isinstance(operation, Write):
                    self._at = operation.path
                    self._ready(operation, hold)
            if self._staged_tree is not None:
                self._whole = self._staged_tree.whole(self._waiting)
            order = in_order(operations)
            for operation in order:
                if operation.path not in self._done:
                    self._do(operation, last=operation is order[-1])
        except OSError as error:
            # Descriptors first: the undoing needs some, and may have failed for want of them.
            self._directories.close()
            self._problems.append(environment_problem(error, self._at, self._staging.descriptor))
            rolled_back = True
            self._roll_back()
        finally:
            self._clean(rolled_back=rolled_back)
        done = tuple([self._done[o.path] for o in operations if o.path in self._done])
        if not self._new:
            return TransactionResult(done, tuple(self._problems), rolled_back)
        made = tuple(path for path, there in self._new.items() if there)
        gone = tuple(path for path, there in self._new.items() if not there)
        return TransactionResult(done, tuple(self._problems), rolled_back, made, gone)

    def _ready(self, write: Write, hold: bool) -> None:
        path, executable = write.path, write.entry.executable
        if write.content is not None:
            self._temps[path] = self._staging.put(write.content, executable=executable, hold=hold)
            return
        if write.staged is None:
            raise ValueError(f"the write of {path!r} has neither content nor a staged file")
        tree_here = self._staging.tree(write.staged)
        if tree_here is None:
            self._temps[path], _ = self._staging.take(write.staged, executable=executable)
        else:
            self._staged_tree = tree_here
            if path not in self._known:
                self._waiting.setdefault(RelPath(path.rpartition("/")[0]), []).append(write)

    def _do(self, operation: Operation, *, last: bool) -> None:
        self._at = operation.path
        try:
            if isinstance(operation, Write):
                self._write(operation, keep=not last)
            else:
                self._remove(operation, keep=not last)
        except _LeftAlone:
            return
        except Blocked as blocked:
            self._unusable(operation, blocked.path, blocked.rule)
        except OSError as error:
            rule = PATH_RULES.get(error.errno or 0)
            if rule is None:
                raise
            self._unusable(operation, operation.path, rule)

    def _unusable(self, operation: Operation, at: str, rule: str) -> None:
        """This path alone is a problem. A removal is nevertheless true: no file of ours is there."""
        detail = f"cannot use {operation.path}: {rule.replace('_', ' ')} at {at}"
        self._problems.append(Problem("path_unusable", detail, operation.path, rule))
        if isinstance(operation, Remove):
            self._done[operation.path] = Done(operation, None)
        self._prune(operation.path)

    # --- writing

    def _write(self, write: Write, *, keep: bool) -> None:
        path = write.path
        directory, name = self._directories.parent(path, self._make_directory)
        if path in self._done:
            return
        found = lstat(directory, name)
        if found is not None and stat.S_ISDIR(found.st_mode):
            self._clear_directory(path)
            directory, found = self._directories.parent(path)[0], None
        elif self._settle_drift(path, directory, name, found, write.entry):
            assert found is not None
            self._done[path] = Done(write, FileStat.of(found))
            return
        temp = self._temps.get(path) or self._take(write)
        undo = self._replace(path, directory, name, temp, found, keep=keep) if found is not None else None
        if undo is None:
            os.rename(temp.name, name, src_dir_fd=self._staging.descriptor, dst_dir_fd=directory)
        if keep:
            self._undo.append((path, partial(undo or self._take_back, path, temp)))
        self._done[path] = Done(write, self._stat_after(path, directory, name, temp))
        temp.close()
        del self._temps[path]

    def _take(self, write: Write) -> TempFile:
        """A file that waits in the tree and goes alone."""
        name = f"{write.staged}/{write.path}"
        temp, _ = self._staging.take(name, executable=write.entry.executable)
        self._temps[write.path] = temp
        return temp

    def _stat_after(self, path: RelPath, directory: int, name: str, temp: TempFile) -> FileStat | None:
        """How the file we put there looks. None when something else has already replaced it, or nobody can say."""
        try:
            if temp.descriptor is not None:
                return FileStat.of(os.fstat(temp.descriptor))
            now = lstat(directory, name)
        except OSError:
            return None
        if now is None or now.st_ino != temp.inode:
            self._problems.append(Drift(path, "missing" if now is None else "changed").problem())
            return None
        return FileStat.of(now)

    def _settle_drift(
        self, path: RelPath, directory: int, name: str, found: os.stat_result | None, wanted: Entry
    ) -> bool:
        """Whether `path` already holds what is wanted. Reports what is not as the agent left it."""
        expected = self._known.get(path)
        if found is None:
            if expected is not None:
                self._drifted(Drift(path, "missing"))
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
        self._drifted(drift)
        return False

    def _drifted(self, drift: Drift) -> None:
        self._problems.append(drift.problem())
        if not self._overwrite_drift:
            raise _LeftAlone

    def _replace(
        self, path: RelPath, directory: int, name: str, temp: TempFile, found: os.stat_result, *, keep: bool
    ) -> Callable[[RelPath, TempFile], None] | None:
        """Let `temp` and what stands at `name` change places; how to undo it. None: a rename has to do it.

        That is when nothing stands there any more, or where the file system cannot exchange and no copy is needed.

        RACE: a directory may have taken the file's place since it was looked at. Its worst case: it ends up in staging,
        out of the project, where a rename would have failed.
        """
        staging = self._staging.descriptor
        try:
            exchange(temp.name, name, src_dir_fd=staging, dst_dir_fd=directory)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in NO_EXCHANGE:
                raise
            if not keep:
                return None
            entry, size, saved = self._tree.get(path), found.st_size, None
            as_ours = entry is not None and entry.size == size
            if stat.S_ISREG(found.st_mode) and (as_ours or self._may_read(size)):
                saved = self._staging.copy(name, directory, size)
            if saved is None:
                self._set_aside(path, directory, name)
                return None
            self._saved.append(saved)
            os.rename(temp.name, name, src_dir_fd=staging, dst_dir_fd=directory)
            return partial(self._copy_back, saved)
        self._saved.append(temp.name)
        return self._change_back

    def _set_aside(self, path: RelPath, directory: int, name: str) -> None:
        saved = self._staging.new_name()
        os.rename(name, saved, src_dir_fd=directory, dst_dir_fd=self._staging.descriptor)
        self._saved.append(saved)
        self._undo.append((path, partial(self._put_back, path, saved)))

    def _may_read(self, size: int) -> bool:
        """Whether the batch reads so many bytes more of what stands in the project."""
        enough = size <= self._readable
        self._readable -= size if enough else 0
        return enough

    def _clear_directory(self, path: RelPath) -> None:
        """Directories with no file in them give way to a file, however deep; all else is not ours to remove.

        Empty ones may be an earlier life's, killed before it had recorded that it made them.
        """
        directories = [path]
        for each in directories:
            inside = self._directories.open(each)
            for name in os.listdir(inside):
                found = lstat(inside, name)
                if name in PROTECTED or (found is not None and not stat.S_ISDIR(found.st_mode)):
                    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
                directories.append(RelPath(f"{each}/{name}"))
        for each in reversed(directories):
            directory, name = self._directories.parent(each)
            os.rmdir(name, dir_fd=directory)
            self._directories.close(each)
            self._forget_directory(each)

    # --- removing

    def _remove(self, remove: Remove, *, keep: bool) -> None:
        path = remove.path
        try:
            directory, name = self._directories.parent(path)
            found = lstat(directory, name)
        except FileNotFoundError:
            found, directory, name = None, -1, ""
        if found is None:
            self._settle_missing(path)
        elif path not in self._known:
            self._problems.append(Drift(path, "appeared").problem())
        elif stat.S_ISDIR(found.st_mode):
            self._problems.append(Drift(path, "not_a_file").problem())
        else:
            self._settle_drift(path, directory, name, found, remove.entry)
            if keep:
                self._set_aside(path, directory, name)
            else:
                os.unlink(name, dir_fd=directory)
        self._done[path] = Done(remove, None)
        self._prune(path, must=keep)

    def _settle_missing(self, path: RelPath) -> None:
        if path in self._known:
            self._problems.append(Drift(path, "missing").problem())

    # --- directories

    def _make_directory(self, above: int, name: str, path: str) -> None:
        """Make one directory, with the mode and the owner it should have, and with all that waits to be in it."""
        if path in self._whole and self._promote_directory(above, name, RelPath(path)):
            return
        try:
            os.mkdir(name, self._permissions.mode, dir_fd=above)
        except FileExistsError:
            return
        self._new[RelPath(path)] = True
        self._made.add(RelPath(path))
        self._undo.append((None, partial(self._unmake, RelPath(path))))
        self._permissions.set_on(name, above)

    def _promote_directory(self, above: int, name: str, path: RelPath) -> bool:
        """Let a directory that waits in the tree appear with all that is in it; False when it has to be made.

        How its files look is seen before: there nobody else can touch them, and being renamed with it does not.
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
        self._undo.append((path, partial(self._demote_directory, path, directories)))
        self._done.update((each.operation.path, each) for each in done)
        self._made.update(directories)
        self._new.update(dict.fromkeys(directories, True))
        return True

    def _prune(self, path: RelPath, *, must: bool = False) -> None:
        """Remove the directories above `path` that we made and that are empty now.

        `must`: something may have to stand there, so a failure of the environment is one of the batch. Otherwise an
        empty directory that stays is no reason to undo anything.
        """
        for each in reversed(list(parents(path))):
            if each not in self._made:
                return
            try:
                directory, name = self._directories.parent(each)
                os.rmdir(name, dir_fd=directory)
            except FileNotFoundError:
                pass
            except Blocked:
                return
            except OSError as error:
                if must and error.errno in ENVIRONMENT:
                    raise
                return
            self._directories.close(each)
            self._forget_directory(each)

    def _forget_directory(self, path: RelPath) -> None:
        ours = path in self._made
        self._made.discard(path)
        if ours:
            self._new[path] = False
        self._undo.append((None, partial(self._remake, path, ours)))

    # --- undoing

    def _roll_back(self) -> None:
        stuck: set[RelPath] = set()
        for path, undo in reversed(self._undo):
            try:
                undo()
            except (OSError, Blocked) as error:
                if path is not None:
                    detail = f"cannot undo the change of {path}: {error}"
                    self._problems.append(Problem("undo_failed", detail, path))
                    stuck.add(path)
        self._done = {
            path: done
            for path, done in self._done.items()
            if path in stuck or not stuck.isdisjoint(parents(path))
        }

    def _take_back(self, path: RelPath, temp: TempFile) -> None:
        """What we put where nothing was goes back to staging, unless something else has taken its place."""
        directory, name = self._directories.parent(path)
        found = lstat(directory, name)
        if found is not None and found.st_ino == temp.inode:
            os.rename(name, temp.name, src_dir_fd=directory, dst_dir_fd=self._staging.descriptor)
        self._temps[path] = temp

    def _demote_directory(self, path: RelPath, directories: Sequence[RelPath]) -> None:
        """A whole directory goes back to wait, unless something else was put into it meanwhile."""
        assert self._staged_tree is not None
        inside = sum(len(os.listdir(self._directories.open(each))) for each in directories)
        if inside != sum(len(self._waiting.get(each, ())) + 1 for each in directories) - 1:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        self._directories.close()
        directory, name = self._directories.parent(path)
        os.rename(
            name, self._staged_tree.place(path), src_dir_fd=directory, dst_dir_fd=self._staging.descriptor
        )
        self._made.difference_update(directories)
        for each in directories:
            self._new.pop(each, None)

    def _change_back(self, path: RelPath, temp: TempFile) -> None:
        """What stood there and what we put there change places again."""
        directory, name = self._directories.parent(path)
        try:
            exchange(temp.name, name, src_dir_fd=self._staging.descriptor, dst_dir_fd=directory)
        except FileNotFoundError:
            os.rename(temp.name, name, src_dir_fd=self._staging.descriptor, dst_dir_fd=directory)
        self._saved.remove(temp.name)
        self._temps[path] = temp

    def _copy_back(self, saved: str, path: RelPath, temp: TempFile) -> None:
        """The copy of what stood there appears again; what we put there goes back to staging if it is needed there."""
        directory, name = self._directories.parent(path)
        staging = self._staging.descriptor
        if temp.prestaged:
            with suppress(OSError):
                os.link(name, temp.name, src_dir_fd=directory, dst_dir_fd=staging, follow_symlinks=False)
        os.rename(saved, name, src_dir_fd=staging, dst_dir_fd=directory)
        self._temps[path] = temp

    def _put_back(self, path: RelPath, saved: str) -> None:
        directory, name = self._directories.parent(path)
        os.rename(saved, name, src_dir_fd=self._staging.descriptor, dst_dir_fd=directory)

    def _unmake(self, path: RelPath) -> None:
        self._made.discard(path)
        self._new.pop(path, None)
        directory, name = self._directories.parent(path)
        os.rmdir(name, dir_fd=directory)
        self._directories.close(path)

    def _remake(self, path: RelPath, ours: bool) -> None:
        self._directories.open(path, self._make_directory)
        self._new.pop(path, None)
        if not ours:
            self._made.discard(path)

    def _clean(self, *, rolled_back: bool) -> None:
        """Leave nothing in staging but what a later try can still promote, and what waits for the next sweep."""
        for temp in self._temps.values():
            temp.close()
            if not (rolled_back and temp.prestaged):
                self._staging.discard(temp.name)
        if rolled_back:
            for name in self._saved:
                self._staging.discard(name)
        else:
            self._staging.discard_later(self._saved)
        if self._staged_tree is not None and not rolled_back:
            self._staging.drop_tree()
