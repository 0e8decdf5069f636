"""The only writer under the project root: decide elsewhere, act here, say what is now true.

A file appears by rename and in no other way, from a staging directory on the same file system and outside the
watched tree, so no reader ever meets half a file. A batch lands all or nothing. Two kinds of failure are told apart:

- *this path is unusable here* (a link or a file where a directory is needed, a case twin): a `Problem`, the rest
  of the batch lands;
- *the environment fails* (disk full, no permission, read-only, no descriptors): everything is undone.

What stands at a path is looked at before it is replaced or removed, by stat and, where that differs from what the
caller knows, by hash. A difference is reported as drift; the database wins unless the caller says otherwise. A file
that the caller does not know is replaced when the database has that path, and never removed.

Files are not synced one by one (it makes hydration six times slower): `sync.ledger` says why that is safe.
All calls block for microseconds to milliseconds and are meant for the event loop's own thread: handing each event
to another thread costs three times as much as the write.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from agent.core.errors import RootUnusable
from agent.core.model import Entry, Operation, RelPath, Remove
from agent.fs.dirfd import DirectoryPermissions
from agent.fs.inspect import DirectoryView, FileStat
from agent.fs.staging import StagedFileWriter, Staging
from agent.fs.transaction import Transaction, TransactionResult

_NOTHING: Mapping[RelPath, Entry] = {}


class ProjectDir(DirectoryView):
    """One project root and its staging directory.

    `owner` (uid, gid), `file_mode` and `dir_mode` hold for everything made here, whatever the umask; an executable gets
    the execute bit wherever `file_mode` lets read.
    """

    def __init__(
        self,
        root: Path,
        staging: Path,
        *,
        owner: tuple[int, int] | None = None,
        file_mode: int = 0o644,
        dir_mode: int = 0o755,
    ) -> None:
        super().__init__(root, make_root=self._make_root)
        self._staging_path = staging
        self._permissions = DirectoryPermissions(dir_mode, owner)
        self._staging = Staging(staging, file_mode=file_mode, permissions=self._permissions)
        self._made: set[RelPath] = set()

    @property
    def made(self) -> Collection[RelPath]:
        """The directories that this life and earlier ones made."""
        return self._made

    def open(self, made: Iterable[RelPath] = ()) -> None:
        """Make sure of root and staging, and lock them against a second agent.

        `made`: directories that an earlier life made (`LedgerState.directories`); they go when their last file goes.
        Raises `RootUnusable` with a sentence for the operator.
        """
        self._made = set(made)
        try:
            if not self._root.exists():
                self._make_root()
            root = self._directories.open("")
        except OSError as error:
            raise RootUnusable(f"cannot use the project directory {self._root}: {error.strerror}") from error
        try:
            self._check_places(root)
            self._staging.open(root)
        except BaseException:
            self._directories.close()
            raise

    def close(self) -> None:
        """Let go of every descriptor and of the lock. What is staged stays for nobody: the next `open` clears it."""
        super().close()
        self._staging.close()

    def stage(self, path: RelPath | None = None) -> StagedFileWriter:
        """Begin a file in staging; `Write.staged` names it once finished. Raises `OSError`.

        With the `path` at which it is going to stand, a directory that is new appears at once with all that is in it.
        """
        return self._staging.stage(path)

    def stage_whole(self, content: bytes, path: RelPath | None = None) -> str:
        """As `stage`, for a file in one piece: the name for `Write.staged`. Raises `OSError`."""
        return self._staging.stage_whole(content, path)

    def clear_staging(self) -> int:
        """Remove everything that waits in staging; how many things there were."""
        return self._staging.clear()

    def apply(
        self,
        operations: Sequence[Operation],
        known: Mapping[RelPath, FileStat],
        *,
        tree: Mapping[RelPath, Entry] = _NOTHING,
        overwrite_drift: bool = True,
        sweep: bool = True,
    ) -> TransactionResult:
        """Do a batch, all or nothing, and say what is now true. Of several operations on a path the last counts.

        `known`: the files the agent put there and how they looked then. `tree`: what they held, so that a file that was
        only touched is told from one that was changed. With `overwrite_drift` False a drifted path is reported, left
        alone and not in `done`. A file that already holds what a write wants is not written again.

        With `sweep` False what was replaced stays in staging until `sweep` is called, as removing a file takes as long
        as making one. Where a batch lacks the very room, it goes at once and the batch is tried again.

        Raises `ValueError` for a write with no content; nothing of the file system's.
        """
        if len(operations) > 1:
            operations = list({operation.path: operation for operation in operations}.values())
        outcome = self._run(operations, known, tree, overwrite_drift)
        if outcome.rolled_back and not outcome.done and self._staging.sweep():
            outcome = self._run(operations, known, tree, overwrite_drift)
        if sweep:
            self._staging.sweep()
        return outcome

    def sweep(self) -> None:
        """Remove what was replaced by batches that did not wait for that."""
        self._staging.sweep()

    def discard(self, paths: Iterable[RelPath]) -> TransactionResult:
        """Remove files that an earlier life may have left behind (`LedgerState.leftovers`), whatever they hold."""
        found = {path: seen for path in paths if (seen := self.stat(path)) is not None}
        return self.apply([Remove(path, Entry(0, None)) for path in found], found)

    def _run(
        self,
        operations: Sequence[Operation],
        known: Mapping[RelPath, FileStat],
        tree: Mapping[RelPath, Entry],
        overwrite_drift: bool,
    ) -> TransactionResult:
        batch = Transaction(
            self._directories,
            self._staging,
            self._made,
            self._permissions,
            known,
            tree,
            overwrite_drift=overwrite_drift,
        )
        return batch.run(operations)

    def _make_root(self) -> None:
        self._root.mkdir(mode=self._permissions.mode, parents=True, exist_ok=True)
        self._permissions.set_on(str(self._root))

    def _check_places(self, root: int) -> None:
        """Root writable, staging outside of it and it outside of staging."""
        real = self._root.resolve()
        staging = self._staging_path.resolve()
        if staging.is_relative_to(real) or real.is_relative_to(staging):
            raise RootUnusable(
                f"the staging directory {staging} and the project {real} must not contain each other"
            )
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=root, effective_ids=True):
            raise RootUnusable(f"cannot write in the project directory {self._root}: permission denied")
