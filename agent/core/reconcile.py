"""What to do about an event, an answer or a manifest, decided whole before anything is done. Pure.

`step`, `catch_up` and `reconcile` each take the tree as it is and return a `Plan`: the operations, the tree once
they are done, and the gap if one was seen. `settle` corrects that tree by what really happened. Nothing else in
the agent decides what the disk should hold.

The rules, by the names the tests use:

- *one revision lands whole*: a commit whose bytes are not all here is not begun; it is a gap.
- *newer version wins per path*: a change below the entry's version is stale, whatever its revision.
- *a hole is a gap, not a stop*: a commit above a hole is applied at once and kept as an island of the cursor.
- *another epoch is another history*: nothing of it is applied until a full snapshot of it is here.
- *an answer outranks an event*: at equal version, catch-up and manifests correct the tree; a live event does not.
- *absence speaks only for its own time*: a full manifest deletes what it does not list, unless that came later.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from enum import StrEnum

from immutables import Map
from msgspec import Struct, structs

from agent.core.messages import Changes
from agent.core.model import (
    Change,
    Commit,
    Cursor,
    Entry,
    Manifest,
    Operation,
    Problem,
    RelPath,
    Remove,
    Tree,
    Write,
)


class Outcome(StrEnum):
    """What became of one event; the label of `events_total`."""

    APPLIED = "applied"
    PROVISIONAL = "provisional"
    DUPLICATE = "duplicate"
    STALE = "stale"
    WAITING = "waiting"
    EPOCH = "epoch"
    UNREVISIONED = "unrevisioned"


class Reason(StrEnum):
    """Why a catch-up is needed; the label of `resyncs_total` and the `reason` of a sync request."""

    GAP = "gap"
    EPOCH = "epoch"
    REFERENCE = "reference"
    HASH_MISMATCH = "hash_mismatch"
    DOORBELL = "doorbell"
    CONFLICT = "conflict"
    UNKNOWN_CURSOR = "unknown_cursor"
    UNREVISIONED = "unrevisioned"
    UNCONFIRMED = "unconfirmed"
    JOIN = "join"
    OVERFLOW = "overflow"
    HEAD = "head"
    TREE_HASH = "tree_hash"
    SNAPSHOT_READY = "snapshot_ready"
    DISK = "disk"
    DRIFT = "drift"


@dataclass(frozen=True, slots=True)
class Gap:
    """Something is missing that only the database can tell. `paths`: what must be in the answer whatever the cursor."""

    reason: Reason
    paths: frozenset[RelPath] = frozenset()


class Plan(Struct, frozen=True, gc=False):
    """Every operation, in no particular order, and the `tree` once all of them are done."""

    operations: tuple[Operation, ...]
    tree: Tree
    outcome: Outcome
    gap: Gap | None = None
    problems: tuple[Problem, ...] = ()
    eager: bool = False
    """Applied above a hole: what fails now may be possible once the hole is filled."""


class _Judgement(StrEnum):
    WRITE = "write"
    SAME = "same"
    STALE = "stale"
    CONFLICT = "conflict"


def _judge(entry: Entry | None, change: Change, *, answer: bool) -> _Judgement:
    """What one change means for one path. `answer`: it comes from the database on request, not from an event."""
    if entry is None:
        return _Judgement.SAME if change.is_delete else _Judgement.WRITE
    same = entry.digest == change.digest and (change.is_delete or entry.executable == change.executable)
    if change.version is None:
        return _Judgement.SAME if same else _Judgement.WRITE
    if change.version < entry.version:
        return _Judgement.STALE
    if same:
        return _Judgement.SAME
    if change.version == entry.version and not entry.provisional and not answer:
        return _Judgement.CONFLICT
    return _Judgement.WRITE


def _entry(change: Change, before: Entry | None, revision: int) -> Entry:
    version = change.version if change.version is not None else (before.version if before else 0)
    size = len(change.content) if change.content is not None else (change.size or 0)
    return Entry(version, change.digest, size, change.executable, revision)


def _operation(change: Change, entry: Entry) -> Operation:
    return Remove(change.path, entry) if change.is_delete else Write(change.path, entry, change.content)


def step(tree: Tree, commit: Commit, *, optimistic: bool = False) -> Plan:
    """What a live commit asks for.

    `optimistic`: events without a revision on a project that counts them come from a front end ahead of the
    database and are applied as provisional; otherwise such an event only rings (a sync tells the truth).
    """
    cursor = tree.cursor
    if commit.revision is None and cursor.epoch is not None:
        if not optimistic:
            return Plan((), tree, Outcome.UNREVISIONED, Gap(Reason.UNREVISIONED), commit.problems)
        return _provisional(tree, commit)
    if cursor.epoch is not None and commit.revision is not None:
        if commit.epoch is not None and commit.epoch != cursor.epoch:
            return Plan((), tree, Outcome.EPOCH, Gap(Reason.EPOCH), commit.problems)
        if commit.revision <= cursor.revision or commit.revision in cursor.islands:
            return Plan((), tree, Outcome.DUPLICATE)
    if not commit.complete:
        return Plan((), tree, Outcome.WAITING, Gap(Reason.DOORBELL), commit.problems)
    folded = _fold(tree.entries, commit.changes, commit.revision or 0, answer=False)
    problems = commit.problems
    if folded.missing:
        return _without_bytes(tree, folded.missing, problems)
    if folded.conflicts:
        return Plan((), tree, Outcome.WAITING, Gap(Reason.CONFLICT, folded.conflicts), problems)
    outcome = Outcome.APPLIED if folded.fresh or not commit.changes else Outcome.STALE
    if cursor.epoch is None:
        unknown = Gap(Reason.UNKNOWN_CURSOR) if commit.revision is not None else None
        return Plan(
            folded.operations, structs.replace(tree, entries=folded.entries), outcome, unknown, problems
        )
    assert commit.revision is not None
    after = cursor.with_revision(commit.revision)
    eager = commit.revision != cursor.revision + 1
    hole = Gap(Reason.GAP) if after.islands else None
    return Plan(folded.operations, Tree(after, folded.entries), outcome, hole, problems, eager)


def _without_bytes(tree: Tree, missing: frozenset[RelPath], problems: tuple[Problem, ...]) -> Plan:
    """Nothing is begun: the bytes of `missing` have to be fetched."""
    mismatch = any(problem.kind == "hash_mismatch" for problem in problems)
    gap = Gap(Reason.HASH_MISMATCH if mismatch else Reason.REFERENCE, missing)
    return Plan((), tree, Outcome.WAITING, gap, problems)


def _provisional(tree: Tree, commit: Commit) -> Plan:
    """A front end's own word, ahead of the database: shown, and remembered as unconfirmed."""
    operations: list[Operation] = []
    entries = tree.entries
    for change in commit.changes:
        before = entries.get(change.path)
        if change.by_reference or (before.digest if before else None) == change.digest:
            continue
        entry = structs.replace(
            _entry(structs.replace(change, version=None), before, before.revision if before else 0),
            provisional=True,
        )
        operations.append(_operation(change, entry))
        entries = entries.set(change.path, entry)
    return Plan(
        tuple(operations), structs.replace(tree, entries=entries), Outcome.PROVISIONAL, None, commit.problems
    )


class _Folded(Struct, frozen=True, gc=False):
    operations: tuple[Operation, ...]
    entries: Map[RelPath, Entry]
    missing: frozenset[RelPath]
    conflicts: frozenset[RelPath]
    fresh: bool


def _fold(entries: Map[RelPath, Entry], changes: Iterable[Change], revision: int, *, answer: bool) -> _Folded:
    operations: list[Operation] = []
    missing: set[RelPath] = set()
    conflicts: set[RelPath] = set()
    fresh = False
    for change in changes:
        path = change.path
        before = entries.get(path)
        judgement = _judge(before, change, answer=answer)
        if judgement is _Judgement.STALE:
            continue
        if judgement is _Judgement.CONFLICT:
            conflicts.add(path)
            continue
        fresh = True
        if judgement is _Judgement.WRITE and change.by_reference:
            missing.add(path)
            continue
        entry = _entry(change, before, revision)
        if judgement is _Judgement.SAME and before is not None:
            entry = structs.replace(entry, size=before.size)
        entries = entries.set(path, entry)
        if judgement is _Judgement.WRITE:
            operations.append(_operation(change, entry))
    return _Folded(tuple(operations), entries, frozenset(missing), frozenset(conflicts), fresh)


def catch_up(tree: Tree, answer: Changes) -> Plan:
    """What the database's own list of changes asks for: one batch, whatever number of revisions it covers."""
    cursor = tree.cursor
    if cursor.epoch != answer.epoch:
        return Plan((), tree, Outcome.EPOCH, Gap(Reason.EPOCH))
    if answer.base_revision > cursor.revision:
        return Plan((), tree, Outcome.WAITING, Gap(Reason.GAP))
    folded = _fold(tree.entries, answer.changes, answer.revision, answer=True)
    if folded.missing:
        return _without_bytes(tree, folded.missing, answer.problems)
    after = Tree(cursor.at_least(answer.revision), folded.entries)
    hole = Gap(Reason.GAP) if after.cursor.islands else None
    return Plan(folded.operations, after, Outcome.APPLIED, hole, answer.problems)


def reconcile(
    tree: Tree, manifest: Manifest, staged: Mapping[RelPath, str], *, forgotten: bool = False
) -> Plan:
    """What a verified snapshot asks for. `staged` names, per path, where its bytes wait.

    A full one speaks for every path, a delta (`base_revision`) for those it lists. A snapshot older than the tree
    takes nothing back: what a later revision made so stays. But of its own time a full one knows all, so a higher
    version from then is one that the database has forgotten (a failover that lost commits), and goes. A file equal
    when the fetch began is not staged; if it changed since, that is a gap.

    `forgotten`: the database says that it has lost commits which we have applied. Then the snapshot is another history,
    though its epoch is ours, and the cursor goes back to its revision.
    """
    cursor = tree.cursor
    other_history = forgotten or cursor.epoch != manifest.epoch
    if manifest.base_revision is not None and (other_history or cursor.revision < manifest.base_revision):
        return Plan((), tree, Outcome.WAITING, Gap(Reason.EPOCH if other_history else Reason.GAP))
    operations: list[Operation] = []
    missing: set[RelPath] = set()
    entries: Map[RelPath, Entry] = Map() if other_history else tree.entries
    with entries.mutate() as draft:
        for path, file in manifest.files.items():
            before = tree.entries.get(path)
            if before is not None and not other_history and _outlasts(before, file.version, manifest):
                continue
            draft[path] = file
            if before is None or before.digest != file.digest or before.executable != file.executable:
                if path not in staged:
                    missing.add(path)
                    continue
                operations.append(Write(path, file, staged=staged[path]))
        for path, version in _departed(tree, manifest, other_history=other_history):
            before = tree.entries.get(path)
            tombstone = Entry(version, None, revision=manifest.revision)
            if not other_history:
                draft[path] = tombstone
            if before is not None and before.is_file:
                operations.append(Remove(path, tombstone))
        entries = draft.finish()
    if missing:
        return Plan((), tree, Outcome.WAITING, Gap(Reason.REFERENCE, frozenset(missing)))
    after = Cursor(manifest.epoch, manifest.revision) if other_history else cursor.at_least(manifest.revision)
    hole = Gap(Reason.GAP) if after.islands else None
    return Plan(tuple(operations), Tree(after, entries), Outcome.APPLIED, hole, manifest.problems)


def _departed(tree: Tree, manifest: Manifest, *, other_history: bool) -> Iterable[tuple[RelPath, int]]:
    """The paths a manifest says are gone, with the version at which they went."""
    for path, version in manifest.deleted.items():
        before = tree.entries.get(path)
        if path not in manifest.files and (
            before is None or other_history or not _outlasts(before, version, manifest)
        ):
            yield path, version
    if manifest.base_revision is not None:
        return
    for path, before in tree.entries.items():
        if not before.is_file or path in manifest.files or path in manifest.deleted:
            continue
        if other_history or before.provisional or before.revision <= manifest.revision:
            yield path, before.version


def _outlasts(before: Entry, version: int, manifest: Manifest) -> bool:
    """Whether what we hold at a path is newer than a snapshot's `version` of it."""
    forgotten = manifest.base_revision is None and 0 < before.revision <= manifest.revision
    return before.version > version and not forgotten


def settle(before: Tree, plan: Plan, failed: Set[RelPath]) -> Tree:
    """The tree that is true after the disk did what it could: entries of `failed` paths are as they were.

    The cursor goes on past a path that this disk cannot hold (asking again would not help), unless the plan was
    eager: then the path may be possible once the hole below is filled, and the cursor waits for that.
    """
    if not failed:
        return plan.tree
    with plan.tree.entries.mutate() as draft:
        for path in failed:
            old = before.entries.get(path)
            if old is not None:
                draft[path] = old
            else:
                draft.pop(path, None)
        entries = draft.finish()
    return Tree(before.cursor if plan.eager else plan.tree.cursor, entries)


LARGE_TREE = 20
"""Files from which on a snapshot may not remove more than `MOST_REMOVED` of them at once."""
MOST_REMOVED = 0.5


def brake(before: Tree, plan: Plan) -> Problem | None:
    """The `mass_delete` problem when a snapshot would empty the tree, or take most of a large one.

    One wrong answer must not wipe what a person is looking at; a second, independent one is asked for first.
    """
    files = sum(1 for entry in before.entries.values() if entry.is_file)
    removed = sum(1 for operation in plan.operations if isinstance(operation, Remove))
    left = any(entry.is_file for entry in plan.tree.entries.values())
    if removed and (not left or (files >= LARGE_TREE and removed > files * MOST_REMOVED)):
        return Problem(
            "mass_delete",
            f"a snapshot would delete {removed} of {files} files; waiting until a second fetch says the same",
        )
    return None
