"""What the loop tells of each batch to whoever shows the tree.

Nobody is waited for: a batch lands at the pace of the disk, and a preview that is slow or gone shows it later.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, Protocol

from agent.core.model import Entry, Operation, RelPath, Remove

What = Literal["add", "change", "unlink"]
"""What a watcher calls a change of a path."""


class Preview(Protocol):
    """Who shows the tree."""

    def begin(self, paths: Collection[RelPath]) -> None:
        """These paths are about to change."""

    def undo(self) -> None:
        """They did not: the disk is as it was."""

    def commit(self, revision: int, changes: Mapping[RelPath, What]) -> None:
        """Everything up to `revision` is on the disk; `changes` are new there."""


class Unseen:
    """A preview that nobody shows."""

    def begin(self, paths: Collection[RelPath]) -> None:
        pass

    def undo(self) -> None:
        pass

    def commit(self, revision: int, changes: Mapping[RelPath, What]) -> None:
        pass


def changes_of(
    operations: Sequence[Operation], done: Collection[RelPath], before: Mapping[RelPath, Entry]
) -> dict[RelPath, What]:
    """Say what a watcher would of the operations that were done, by what stood at their paths."""
    return {each.path: _what(each, before) for each in operations if each.path in done}


def files_of(entries: Mapping[RelPath, Entry], before: Mapping[RelPath, Entry]) -> dict[RelPath, What]:
    """Say what a watcher would of files that are on the disk already, by what was known of their paths before.

    Vite's watcher does not say it of a tool that writes within 50 ms of a save; what it did say is not shown twice.
    """
    return {path: _file(path, before) for path, entry in entries.items() if entry.is_file}


def _file(path: RelPath, before: Mapping[RelPath, Entry]) -> What:
    known = before.get(path)
    return "change" if known is not None and known.is_file else "add"


def _what(operation: Operation, before: Mapping[RelPath, Entry]) -> What:
    if isinstance(operation, Remove):
        return "unlink"
    return _file(operation.path, before)
