"""The project directory and what is recorded of it, moved as one: disk, stats, ledger, problems.

`apply` makes the disk follow operations and remembers each file's stat; the ledger follows a moment later, and then
what was replaced is removed, so that nobody who waits for a save waits for bookkeeping or cleaning. A kill in between
costs reading those files on the next start, never truth: what the ledger says is held against the disk before it is
believed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from immutables import Map
from msgspec import structs

from agent.core.model import (
    ENVIRONMENT_PROBLEMS,
    Cursor,
    Entry,
    Operation,
    Problem,
    RelPath,
    Remove,
    Tree,
    Write,
)
from agent.fs.dirfd import environment_problem
from agent.fs.inspect import Drift, FileStat
from agent.fs.project_dir import ProjectDir
from agent.fs.transaction import Done, TransactionResult
from agent.fs.turns import in_thread, in_turns
from agent.sync.drift import Observed
from agent.sync.ledger import Ledger, LedgerFailed, LedgerState
from agent.telemetry.logging import get_logger
from agent.telemetry.status import Problems

log = get_logger("workspace")

MOST_NAMED = 20
"""Drifted files of one transaction that have a line of their own in the log, at 0.1 ms each; the rest is counted."""


@dataclass(frozen=True, slots=True)
class ApplyResult:
    """What became of a plan's operations. `undone`: the environment failed and everything was taken back.

    `done`: paths that are as they should be; when all was undone, those where the undoing failed. `failed`: paths that
    this disk cannot hold.
    """

    done: frozenset[RelPath] = frozenset()
    failed: frozenset[RelPath] = frozenset()
    undone: bool = False


class Workspace:
    """One project directory. Not thread-safe; every method is one step that nothing else sees half done, but for
    `audit`, which is for the start.
    """

    def __init__(self, disk: ProjectDir, ledger: Ledger, problems: Problems) -> None:
        self.disk = disk
        self._ledger = ledger
        self._problems = problems.owned_by("sync.workspace")
        self.stats: dict[RelPath, FileStat] = {}
        """The stat of each of our files when it was put there."""
        self.failure = ""
        """Why the latest operations were undone."""
        self._unrecorded: Problem | None = None
        """Why the ledger lags behind the disk, while it does."""
        self.swept = True
        """Nothing that was replaced is left to be removed."""
        self.ledger_lost = False
        """The ledger's file was damaged and is gone: the whole tree must be recorded (`record_anew`)."""

    # --- start and end

    def open(self) -> LedgerState | None:
        """Take the directory. Returns what an earlier run recorded, if it can be gone on from. Raises `RootUnusable`.

        Leftovers are removed: staged files, and files that were announced and never recorded.
        """
        loaded = self._ledger.load()
        self.disk.open(loaded.directories if loaded else ())
        if loaded is None:
            return None
        self.disk.discard(loaded.leftovers)
        return loaded if loaded.tree.cursor.epoch is not None else None

    async def audit(
        self, loaded: LedgerState, exempt: Callable[[Drift], bool] = lambda drift: False
    ) -> tuple[Tree, tuple[Drift, ...]]:
        """The recorded tree, corrected by what the disk holds: what differs is unconfirmed, but for what is `exempt`.

        Of files that all look different everything is read; health answers meanwhile.
        """
        audit = await in_turns(self.disk.audit_steps(loaded.tree, loaded.stats))
        self.stats = dict(audit.stats)
        drifts = []
        for drift in audit.drifts:
            if not exempt(drift):
                drifts.append(drift)
            elif drift.path in loaded.stats:
                self.stats[drift.path] = loaded.stats[drift.path]
        return self.unconfirmed(loaded.tree, drifts), tuple(drifts)

    def found(self) -> set[RelPath]:
        """The files that are in the directory already."""
        return set(self.disk.scan())

    def discard(self, paths: Iterable[RelPath]) -> None:
        """Remove files that an earlier run wrote and that are in the project no more."""
        for problem in self.disk.discard(paths).problems:
            log.warning("workspace.not_discarded", file_path=problem.path, why=problem.detail)

    def close(self, cursor: Cursor) -> None:
        """Leave nothing in staging and everything in the ledger."""
        self.disk.clear_staging()
        self.record(cursor)

    def release(self) -> None:
        """Close the directories and the ledger; nothing can be done with them any more."""
        self.disk.close()
        self._ledger.close()

    # --- following operations

    def apply(self, operations: Sequence[Operation], entries: Map[RelPath, Entry]) -> ApplyResult:
        """Do operations, all or nothing. `entries`: what the disk is believed to hold now."""
        return self._applied(operations, self._write(operations, entries)) if operations else ApplyResult()

    async def apply_in_thread(
        self, operations: Sequence[Operation], entries: Map[RelPath, Entry]
    ) -> ApplyResult:
        """As `apply`, for a first tree, which has as many files as the project likes. Nothing else may be called."""
        return self._applied(operations, await in_thread(lambda: self._write(operations, entries)))

    def _write(
        self, operations: Sequence[Operation], entries: Map[RelPath, Entry]
    ) -> TransactionResult | LedgerFailed:
        new = [each.path for each in operations if isinstance(each, Write) and each.path not in self.stats]
        try:
            self._ledger.intend(new)
        except LedgerFailed as error:
            return error
        return self.disk.apply(operations, self.stats, tree=entries, sweep=False)

    def _applied(
        self, operations: Sequence[Operation], outcome: TransactionResult | LedgerFailed
    ) -> ApplyResult:
        if isinstance(outcome, LedgerFailed):
            self._ledger_failed(outcome)
            return ApplyResult(undone=True)
        overwritten = [problem for problem in outcome.problems if problem.kind == "drift"]
        for problem in overwritten[:MOST_NAMED]:
            log.warning("drift.overwritten", file_path=problem.path, detail=problem.detail)
        if len(overwritten) > MOST_NAMED:
            log.warning("drift.overwritten", more_files=len(overwritten) - MOST_NAMED)
        for problem in outcome.problems:
            if problem.kind != "drift":
                self._problems.add(problem)
        for each in outcome.done:
            path = each.operation.path
            if each.stat is None:
                self.stats.pop(path, None)
            else:
                self.stats[path] = each.stat
        self._ledger.note(outcome.done, made=outcome.made, gone=outcome.gone)
        done = frozenset(each.operation.path for each in outcome.done)
        if outcome.rolled_back:
            # What is done now is what could not be undone, and its problem was opened a moment ago.
            self.failure = "; ".join(problem.detail for problem in outcome.problems)
            return ApplyResult(done, undone=True)
        self._problems.clear(paths=done)
        self._problems.clear(*ENVIRONMENT_PROBLEMS, but=[self._unrecorded] if self._unrecorded else ())
        return ApplyResult(done, frozenset(each.path for each in operations) - done)

    def confirmed(self, unusable: Collection[RelPath]) -> None:
        """Close the problems of paths that are as the database has them now: all but the `unusable` ones."""
        over = [p.path for p in self._problems.open("path_unusable") if p.path not in unusable]
        if over:
            self._problems.clear("path_unusable", paths=[path for path in over if path is not None])

    def undone_is_over(self) -> None:
        """Note that the database has been asked about everything that an undoing may have left."""
        self._problems.clear("undo_failed")

    def staging_failed(self, error: OSError) -> None:
        """Report that the disk did not take what a snapshot unpacked."""
        self._problems.add(environment_problem(error, None, self.disk.staging_descriptor))

    def record(self, cursor: Cursor) -> bool:
        """Let the ledger catch up with the disk, and remove what was replaced since the last record.

        What the ledger cannot take now goes with the next record. Returns False when there is something such.
        """
        self.swept = self.disk.sweep()
        return self._recorded(_failure_of(partial(self._ledger.record, (), cursor)))

    def record_anew(self, tree: Tree) -> bool:
        """Record the whole tree in place of everything recorded before. Returns False when it has to wait."""
        return self._recorded_anew(
            _failure_of(partial(self._ledger.replace, tree, self.stats, self.disk.made))
        )

    def record_whole(self, tree: Tree) -> bool:
        """As `record_anew`; what is still staged goes with the next records."""
        self.disk.drop_staged()
        return self.record_anew(tree)

    async def record_in_thread(self, tree: Tree) -> bool:
        """As `record_whole`, for a first tree. Nothing else may be called meanwhile."""
        self.disk.drop_staged()
        write = partial(self._ledger.replace, tree, self.stats, self.disk.made)
        return self._recorded_anew(await in_thread(lambda: _failure_of(write)))

    def _recorded_anew(self, error: LedgerFailed | None) -> bool:
        written = self._recorded(error)
        self.ledger_lost = self.ledger_lost and not written
        return written

    def _recorded(self, error: LedgerFailed | None) -> bool:
        if error is not None:
            self._ledger_failed(error)
            return False
        if self._unrecorded is not None:
            self._problems.close(self._unrecorded)
            self._unrecorded = None
        return True

    def _ledger_failed(self, error: LedgerFailed) -> None:
        self.failure = str(error)
        self.ledger_lost = self.ledger_lost or error.lost
        self._unrecorded = Problem(error.kind, self.failure, rule="ledger", waiting=True)
        self._problems.add(self._unrecorded)

    def confirm(self, moved: Mapping[RelPath, tuple[Entry, FileStat | None]]) -> None:
        """Note for the next record what the database has confirmed of files that others wrote here."""
        for path, (entry, stat) in moved.items():
            if stat is not None:
                self.stats[path] = stat
            elif not entry.is_file:
                self.stats.pop(path, None)
            operation = Write(path, entry) if entry.is_file else Remove(path, entry)
            self._ledger.note([Done(operation, self.stats.get(path))])

    # --- what other processes did

    def remember_stats(self, observed: Observed) -> None:
        """Remember the new stat of files that were touched and hold what they should."""
        self.stats.update(observed.touched)

    def unconfirmed(self, tree: Tree, drifts: Iterable[Drift]) -> Tree:
        """`tree` with what really stands at the drifted paths, marked as not confirmed by the database."""
        entries = tree.entries
        for drift in drifts:
            before = entries.get(drift.path, Entry(0, None))
            size = before.size if drift.stat is None else drift.stat.size
            found = structs.replace(before, digest=drift.digest, size=size, provisional=True)
            entries = entries.set(drift.path, found)
            self.stats.pop(drift.path, None)
            if drift.stat is not None:
                self.stats[drift.path] = drift.stat
        return structs.replace(tree, entries=entries)

    def expected(self, tree: Tree) -> tuple[Mapping[RelPath, Entry], Mapping[RelPath, FileStat]]:
        """What should be on disk, for the drift watch to compare with."""
        return tree.entries, self.stats


def _failure_of(write: Callable[[], None]) -> LedgerFailed | None:
    try:
        write()
    except LedgerFailed as error:
        return error
    return None
