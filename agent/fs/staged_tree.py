"""Files that wait in staging in the directories they are to have, so that a new directory appears by one rename.

A hydration makes thousands of files. Each under a name of its own in one directory, they would all be renamed one by
one, and a file system that keeps a file near its directory would put them all near the wrong one. Here they are made
where they belong, only under another root; a directory that the project does not have yet is then renamed with all that
is in it: of 20,000 files in 1,261 new directories below one, one rename instead of 20,000.

The tree stands in staging, where nobody but us can put anything, so paths in it are handed to the kernel whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sized
from contextlib import suppress
from dataclasses import dataclass, field

from agent.core.model import RelPath, parents
from agent.fs.dirfd import DirectoryForm, dress_directory
from agent.fs.places import OPEN_DIRECTORY

CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class _Directory:
    """What was put into one: so many whole files, and these directories."""

    files: int = 0
    below: list[RelPath] = field(default_factory=list)


class StagedTree:
    """One tree below the directory `staging`, filled by one thread and then promoted from.

    `form` is that of the project's directories: a renamed one keeps it.
    """

    def __init__(self, staging: int, name: str, form: DirectoryForm) -> None:
        self._staging = staging
        self._form = form
        self._directories: dict[RelPath, _Directory] = {}
        self._at: str | None = None
        self._descriptor = -1
        self.name = name
        os.mkdir(name, 0o700, dir_fd=staging)

    def place(self, path: RelPath) -> str:
        """Where `path` waits, seen from the staging directory."""
        return f"{self.name}/{path}"

    def create(self, path: RelPath, mode: int) -> int:
        """A descriptor of a new file at `path`. Raises `OSError`, also for what only another path's twin prevents."""
        above, _, name = path.rpartition("/")
        if above != self._at:
            self._enter(RelPath(above))
        return os.open(name, CREATE, mode, dir_fd=self._descriptor)

    def count(self, path: RelPath) -> None:
        """The file at `path` is whole."""
        self._directories[RelPath(path.rpartition("/")[0])].files += 1

    def whole(self, promoted: Mapping[RelPath, Sized]) -> set[RelPath]:
        """The directories in which nothing waits, at any depth, that is not `promoted` (files, by directory)."""
        partial: set[RelPath] = {RelPath("")}
        for path, directory in self._directories.items():
            if len(promoted.get(path, ())) != directory.files:
                partial.update(parents(path), (path,))
        return self._directories.keys() - partial

    def within(self, path: RelPath) -> Iterator[RelPath]:
        """The directory `path` and all below it, each before those in it."""
        yield path
        for below in self._directories[path].below:
            yield from self.within(below)

    def close(self) -> None:
        """Let go of the directory in hand."""
        self._at = None
        if self._descriptor != -1:
            os.close(self._descriptor)
            self._descriptor = -1

    def _enter(self, path: RelPath) -> None:
        self.close()
        for directory in (*parents(path), path) if path else ():
            if directory not in self._directories:
                os.mkdir(self.place(directory), self._form.mode, dir_fd=self._staging)
                self._add(directory)
                dress_directory(self._staging, self.place(directory), self._form)
        self._directories.setdefault(path, _Directory())
        self._descriptor = os.open(self.place(path), OPEN_DIRECTORY, dir_fd=self._staging)
        self._at = path

    def _add(self, path: RelPath) -> None:
        self._directories[path] = _Directory()
        above = self._directories.get(RelPath(path.rpartition("/")[0]))
        if above is not None:
            above.below.append(path)


def remove_tree(name: str, staging: int) -> None:
    """Remove the directory `name` with all that is in it, as far as that goes."""
    with suppress(OSError):
        descriptor = os.open(name, OPEN_DIRECTORY, dir_fd=staging)
        try:
            with os.scandir(descriptor) as listing:
                found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing]
            for each, is_directory in found:
                if is_directory:
                    remove_tree(each, descriptor)
                else:
                    with suppress(OSError):
                        os.unlink(each, dir_fd=descriptor)
        finally:
            os.close(descriptor)
        os.rmdir(name, dir_fd=staging)
