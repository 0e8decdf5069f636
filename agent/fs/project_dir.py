"""Writes the project's directory; nothing else of the agent does. What to write is decided elsewhere.

A file appears by rename or exchange from a staging directory on the same file system and outside the watched tree, so
no reader meets half a file. A transaction is applied whole or undone whole, with two kinds of failure:

- one path is unusable (a link or a file where a directory is needed, a case twin): a `Problem`, the rest is applied;
- the environment fails (disk full, no permission, read-only, no descriptors): everything is undone.

Before a file is replaced or removed it is compared with what the caller knows, by stat and where that differs by hash.
A difference is reported as drift, and the database wins unless the caller says otherwise. A file that the caller does
not know is replaced when the database has that path, and never removed.

Files are not synced one by one, which would make hydration six times slower: `sync.ledger` says why that is safe.
Calls block for microseconds to milliseconds and are meant for the event loop's own thread: handing each event to
another thread costs three times as much as the write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from agent.core.errors import RootUnusable
from agent.core.model import Entry, Operation, RelPath, Remove
from agent.fs.dirfd import Blocked, DirectoryPermissions
from agent.fs.foreign import Growing, Unfit, Whole, read_foreign
from agent.fs.inspect import DirectoryView, FileStat
from agent.fs.staging import StagedFileWriter, Staging
from agent.fs.transaction import Transaction, TransactionResult
from agent.fs.turns import Steps, at_once

SWEEP, SWEEP_FOR_ROOM = 0.02, 0.1
"""Seconds for which one call removes what nobody needs any more: 1,000 files and more."""

_NOTHING: Mapping[RelPath, Entry] = {}


class ProjectDir(DirectoryView):
    """One project root and its staging directory.

    Args:
        root: the project's directory.
        staging: a directory on the same file system, not in `root`.
        owner: (uid, gid) of everything made here; None for the agent's own.
        file_mode: of every file, whatever the umask; an executable gets the execute bit wherever this lets read.
        dir_mode: of every directory, whatever the umask.
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

        self.made: set[RelPath] = set()
        """The directories that this run and earlier ones made; read only."""

    def open(self, made: Iterable[RelPath] = ()) -> None:
        """Make root and staging if need be, check them, and lock them against a second agent.

        Args:
            made: directories that an earlier run made (`LedgerState.directories`); each goes with its last file.

        Raises:
            RootUnusable: with a sentence for the operator.
        """
        self.made = set(made)
        try:
            if not self.root.exists():
                self._make_root()
            root = self._directories.open("")
        except OSError as error:
            raise RootUnusable(f"cannot use the project directory {self.root}: {error.strerror}") from error
        try:
            self._check_places(root)
            self._staging.open(root)
        except BaseException:
            self._directories.close()
            raise

    def close(self) -> None:
        """Close every descriptor and unlock. The next `open` removes what is still staged."""
        super().close()
        self._staging.close()

    def stage(self, path: RelPath | None = None) -> StagedFileWriter:
        """Begin a file in staging; `Write.staged` names it once finished. Raises `OSError`.

        With the `path` at which it is going to stand, a directory that is new appears at once with all that is in it.
        """
        return self._staging.stage(path)

    def stage_whole(self, content: bytes, path: RelPath | None = None) -> str:
        """As `stage`, for a file in one piece: returns the name for `Write.staged`. Raises `OSError`."""
        return self._staging.stage_whole(content, path)

    def read_foreign(self, path: RelPath, most: int) -> Whole | Unfit | Growing | None:
        """Read what a program of the project made at `path`, up to `most` bytes; see `fs.foreign`. None: nothing."""
        owner = self._permissions.owner
        try:
            directory, name = self._directories.parent(path)
        except FileNotFoundError:
            return None
        except (OSError, Blocked):
            return Unfit("not_a_file")
        return read_foreign(directory, name, owner[0] if owner else os.geteuid(), most)

    def clear_staging(self) -> int:
        """Remove everything that is staged; returns how many files and trees."""
        return self._staging.clear()

    def drop_staged(self) -> None:
        """Have `removal` remove everything that is staged."""
        self._staging.drop()

    def removal(self) -> Steps[None]:
        """Remove what was dropped, and what transactions replaced that were applied with `sweep=False`."""
        return self._staging.removal()

    def sweep(self, seconds: float = SWEEP) -> bool:
        """Do `removal` for so long. Returns False when something is left."""
        over = time.monotonic() + seconds
        for _ in self._staging.removal():
            if time.monotonic() >= over:
                break
        return not self._staging.waste

    def apply(
        self,
        operations: Sequence[Operation],
        known: Mapping[RelPath, FileStat],
        *,
        tree: Mapping[RelPath, Entry] = _NOTHING,
        overwrite_drift: bool = True,
        sweep: bool = True,
    ) -> TransactionResult:
        """Apply all operations, or none, and say what is now true. A file that holds what a write wants is left.

        Where there is no space, what earlier transactions replaced is removed, for a moment, and the transaction tried
        again.

        Args:
            operations: of several on one path the last counts.
            known: the files that the agent wrote, and their stat then.
            tree: what they held, so that a file that was only touched is told from one that was changed.
            overwrite_drift: False to report a drifted path and leave it alone; it is not in `done` then.
            sweep: False to leave what was replaced in staging until `removal`, since removing a file takes as long as
                making one.

        Raises:
            ValueError: a write has no content. No error of the file system is raised.
        """
        if len(operations) > 1:
            operations = list({operation.path: operation for operation in operations}.values())

        def run() -> TransactionResult:
            return Transaction(
                self._directories,
                self._staging,
                self.made,
                self._permissions,
                known,
                tree,
                overwrite_drift=overwrite_drift,
            ).run(operations)

        waste = len(self._staging.waste)
        result = run()
        if result.rolled_back and not result.done and waste:
            self.sweep(SWEEP_FOR_ROOM)
            result = run()
        if sweep:
            at_once(self._staging.removal())
        return result

    @property
    def staging_descriptor(self) -> int:
        """The open staging directory, to ask its file system what is wrong; -1 while it is closed."""
        return self._staging.descriptor

    def discard(self, paths: Iterable[RelPath]) -> TransactionResult:
        """Remove files that an earlier run may have left (`LedgerState.leftovers`), whatever they hold."""
        found = {path: seen for path in paths if (seen := self.stat(path)) is not None}
        return self.apply([Remove(path, Entry(0, None)) for path in found], found)

    def _make_root(self) -> None:
        self.root.mkdir(mode=self._permissions.mode, parents=True, exist_ok=True)
        self._permissions.set_on(str(self.root))

    def _check_places(self, root: int) -> None:
        """Refuse a root that is not writable, and a staging directory in it or around it."""
        real = self.root.resolve()
        staging = self._staging_path.resolve()
        if staging.is_relative_to(real) or real.is_relative_to(staging):
            raise RootUnusable(
                f"the staging directory {staging} and the project {real} must not contain each other"
            )
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=root, effective_ids=True):
            raise RootUnusable(f"cannot write in the project directory {self.root}: permission denied")
