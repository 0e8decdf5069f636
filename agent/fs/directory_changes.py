"""Makes and removes directories within a transaction, each with its inverse.

A directory that the agent made is removed with its last file, also after a restart: so the agent remembers those it
made (`made`), and the ledger is told of those that came and went (`changed`). Another directory is removed only where
it is empty and a file has to stand in its place.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TypeAlias

from agent.core.model import MAX_PATH_BYTES, MAX_SEGMENTS, PROTECTED, RelPath, parents
from agent.fs.dirfd import SHARED, Blocked, DirectoryCache, DirectoryPermissions

MOST_CLEARED = 64
"""Empty directories that one transaction removes to make way for files: as many as a path of ours has.
A busy disk takes 3 ms for each, and the project makes 4,000, one in the other, in half a second."""

UndoLog: TypeAlias = list[tuple[RelPath | None, Callable[[], None]]]
"""The inverse of each step so far, in order, with the path that stays changed when it fails."""


class DirectoryChanges:
    """The directories of one transaction.

    Args:
        directories: the project's, opened.
        made: those that the agent made; changed as they come and go.
        permissions: those of a new directory.
        undo: where each step puts its inverse.
    """

    def __init__(
        self,
        directories: DirectoryCache,
        made: set[RelPath],
        permissions: DirectoryPermissions,
        undo: UndoLog,
    ) -> None:
        self._directories = directories
        self._made = made
        self._permissions = permissions
        self._undo = undo

        self._clearable = MOST_CLEARED
        """Directories that may still be removed to make way."""

        self.changed: dict[RelPath, bool] = {}
        """The agent's directories that came (True) and went (False)."""

    def make(self, above: int, name: str, path: str) -> None:
        """Make `name` in the open directory `above`; nothing is done where it exists. Raises `OSError`."""
        try:
            os.mkdir(name, self._permissions.mode, dir_fd=above)
        except FileExistsError:
            return
        self.add([RelPath(path)])
        self._undo.append((None, partial(self._undo_make, RelPath(path))))
        self._permissions.set_on(name, above)

    def add(self, paths: Iterable[RelPath]) -> None:
        """Note directories that appeared. Their inverse is the caller's."""
        for path in paths:
            self._made.add(path)
            self.changed[path] = True

    def take_back(self, paths: Iterable[RelPath]) -> None:
        """Forget what `add` noted."""
        for path in paths:
            self._made.discard(path)
            self.changed.pop(path, None)

    def clear(self, path: RelPath) -> None:
        """Remove a directory that has no file in it to make way for a file.

        An empty one may be an earlier run's that was killed before it had recorded it. Raises `OSError` when there is
        a file in it, when it has more directories than may be removed, or deeper ones than any path of ours.
        """
        directories = [path]
        for each in directories:
            directories += self._empty_directories(each, most=self._clearable - len(directories))
        self._clearable -= len(directories)
        for each in reversed(directories):
            self._remove(each)

    def _empty_directories(self, path: RelPath, *, most: int) -> list[RelPath]:
        """The directories in `path`. Raises `OSError` when anything else is in it, or more than `most` are."""
        found: list[RelPath] = []
        with os.scandir(self._directories.open(path)) as inside:
            for entry in inside:
                below = RelPath(f"{path}/{entry.name}")
                ours = below.count("/") < MAX_SEGMENTS and len(os.fsencode(below)) <= MAX_PATH_BYTES
                is_directory = entry.name not in PROTECTED and entry.is_dir(follow_symlinks=False)
                if not (ours and is_directory and len(found) < most):
                    # What was found counts: a second transaction's worth of searching is not begun.
                    self._clearable -= len(found)
                    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
                found.append(below)
        return found

    def prune(self, path: RelPath, *, must: bool = False) -> None:
        """Remove the directories above `path` that the agent made and that are empty now.

        `must`: a failure that every path shares is the transaction's. Otherwise an empty directory that stays is no
        reason to undo anything; a write that needs its place says so itself.
        """
        for each in reversed(list(parents(path))):
            if each not in self._made:
                return
            try:
                self._remove(each)
            except Blocked:
                return
            except OSError as error:
                if must and error.errno in SHARED:
                    raise
                return

    def _remove(self, path: RelPath) -> None:
        """Remove an empty directory, unless it is gone already."""
        with suppress(FileNotFoundError):
            directory, name = self._directories.parent(path)
            os.rmdir(name, dir_fd=directory)
        self._directories.close(path)
        made_by_agent = path in self._made
        if made_by_agent:
            self._made.discard(path)
            self.changed[path] = False
        self._undo.append((None, partial(self._undo_remove, path, made_by_agent)))

    def _undo_make(self, path: RelPath) -> None:
        self.take_back([path])
        directory, name = self._directories.parent(path)
        os.rmdir(name, dir_fd=directory)
        self._directories.close(path)

    def _undo_remove(self, path: RelPath, made_by_agent: bool) -> None:
        self._directories.open(path, self.make)
        self.changed.pop(path, None)
        if not made_by_agent:
            self._made.discard(path)
