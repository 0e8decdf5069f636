"""Decides when commits are applied and when the database is asked. Pure; time is passed in, in monotonic seconds.

A `Follower` holds the tree, the commits that wait, and the needs that only a catch-up can meet. `sync.engine` gives it
what arrives, does what it says, and tells it what became of that:

    receive(commit)  →  ready() gives ReadyCommits  →  the disk applies their plan  →  settle(plan, …)
    need(reason)     →  request() gives a Request  →  the orchestrator answers  →  answered() / failed()

- *spacing*: a change lands at once, the next one on the same path not before `spacing`, the last one always. Vite
  serves the older of two writes within 50 ms of each other (measured), so 75 ms are kept between them.
- *order per path*: a commit that touches a path of a waiting commit waits behind it.
- *stragglers*: a hole is given `grace` to close by itself before the database is asked.
- *one at a time, coalesced*: needs that arise during a catch-up are met by the next one.
- *splices are chained*: a change that came as a patch is made whole from what waits or is on disk (`core.patches`).
- *no loop*: a catch-up that does not move the cursor makes the next one for the same reason wait longer.
- *no hurry*: after one that failed nothing is asked before its wait is over, unless the link has joined anew.
- *nothing is given up*: a path that the disk could not hold is asked for again when what stood there moved, and
  otherwise at growing intervals. A question that is too large is asked as one for a snapshot of everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from math import inf

from msgspec import structs

from agent.core.messages import Head
from agent.core.model import (
    Change,
    Commit,
    Cursor,
    Entry,
    Operation,
    Problem,
    RelPath,
    TraceParent,
    Tree,
    tree_hash,
)
from agent.core.patches import Patches, Read
from agent.core.reconcile import Gap, Outcome, Plan, Reason, settle, step

SPACING = 0.075
"""Seconds between two writes of one path: stale 8/8 at 15 ms, 1/8 at 45 ms, 0/8 at 60 ms with Vite 8."""

GRACE = 0.25
"""Seconds a hole may stay open before the database is asked: reordering closes sooner, a loss does not."""

CONFIRM = 5.0
"""Seconds an optimistic write may stay unconfirmed."""

DISK_RETRY = 1.0
"""Seconds before operations that the disk could not do are fetched and tried again; doubles up to `FUTILE_MAX`."""

MAX_WAITING = 1_000
"""Commits held for spacing; past it they are dropped and one catch-up brings the latest of each path."""

MAX_WAITING_BYTES = 32 * 2**20
"""Bytes of content of those commits: saves that arrive while nothing may be applied must not fill memory."""

FUTILE_MAX = 30.0
"""Longest wait between catch-ups that change nothing."""

MOST_PATHS = 500
MOST_PATH_BYTES = 24 * 1024
"""Paths that one question names, and their bytes. The session API reads 64 KB; past this a snapshot is asked for,
which costs less than so many files one by one."""

UNUSABLE_FIRST, UNUSABLE_MAX = 5.0, 300.0
"""Seconds until a path that the disk could not hold is tried again although nothing was seen to move there: first, and
at most, since each try fetches its content."""

MISMATCH_FIRST, MISMATCH_MAX = 60.0, 3600.0
"""Seconds between full snapshots that leave the tree hash different: first, and at most. One cures nearly all."""

DRIFT_QUIET = 5.0
"""Seconds without a question about drift after which the next is asked without a growing wait."""


@dataclass(frozen=True, slots=True)
class ReadyCommits:
    """Commits to apply now as one plan, of which each path's latest change stands. `steps`: what each of them means."""

    plan: Plan
    steps: tuple[tuple[Commit, Outcome], ...]

    @property
    def trace(self) -> TraceParent | None:
        """Of the latest commit that has one."""
        return next((commit.trace for commit, _ in reversed(self.steps) if commit.trace is not None), None)


@dataclass(frozen=True, slots=True)
class Request:
    """One catch-up to make: where we are, why we ask, and paths that must be in the answer.

    `epoch` None asks for everything, as one who knows nothing would. `rebuild`: a full snapshot did not help, and
    another build of it may, since a kept one can be of commits that the database has lost.
    """

    epoch: str | None
    revision: int
    reason: Reason
    paths: frozenset[RelPath]
    rebuild: bool = False


@dataclass(slots=True)
class _Need:
    due: float
    paths: set[RelPath] = field(default_factory=set)
    revision: int | None = None
    """Met without asking once the cursor is here."""


@dataclass(slots=True)
class _Unusable:
    """A path that this disk could not hold. `wanted`: what the database has there. `due` infinite: being asked for."""

    wanted: Entry
    due: float
    wait: float


class Follower:
    """See the module's text. `tree` is what is true on disk; it changes only in `settle` and `adopt`.

    `optimistic`: show a front end's events before the database has confirmed them.
    """

    def __init__(self, tree: Tree, *, optimistic: bool = False) -> None:
        self._optimistic = optimistic

        # The tree, and the commits that are not in it yet.
        self.tree = tree
        self.waiting: list[Commit] = []
        self._waiting_bytes = 0
        self.patches = Patches()
        self.head_revision = tree.cursor.revision
        """The highest revision heard of."""
        self._written: dict[RelPath, float] = {}
        """When each path was written, in order of time, for as long as the spacing holds."""
        self._unconfirmed: dict[RelPath, float] = {}
        """Optimistic writes, and until when each may stay unconfirmed."""

        # What is to be asked, and what is being asked.
        self._needs: dict[Reason, _Need] = {}
        self._not_before = 0.0
        """No question before this time: the last one failed."""
        self._asked: dict[Reason, _Need] | None = None
        self._asked_at: Tree = tree
        """The tree when the question was asked."""
        self._futile = 0
        """Catch-ups in a row that changed nothing."""
        self._mismatches = 0
        """Full snapshots in a row that were asked for because the tree hash differs."""
        self._mismatch_due = 0.0
        """No full snapshot for that reason before this time."""
        self._ask_whole = False
        """The question as it was is too large: the next asks for everything."""
        self._drift_asked = -inf
        self._drift_wait = 0.0
        """When drift was asked about last, and how long that question had waited."""

        # What could not be done, and what the database seems to have lost.
        self._unusable: dict[RelPath, _Unusable] = {}
        self.holds_forgotten = False
        """Something of a commit that never was is in the tree: the next full snapshot is taken for another history."""
        self.behind: int | None = None
        """The head's revision while it is lower than what we have applied of the same history; None: it is not."""

    # --- events

    def patched(self, changes: Iterable[Change], read: Read) -> tuple[Change, ...]:
        """Make what came as splices whole. What cannot be stays by reference."""
        return self.patches.made(changes, self.tree.entries, self.waiting, read)

    def receive(self, commit: Commit, now: float) -> None:
        """Take a commit, patched; it is applied by the next `ready` that finds its paths free."""
        if commit.revision is not None and commit.epoch in (None, self.tree.cursor.epoch):
            self.head_revision = max(self.head_revision, commit.revision)
        size = _size(commit)
        if len(self.waiting) >= MAX_WAITING or self._waiting_bytes + size > MAX_WAITING_BYTES:
            self.waiting.clear()
            self._waiting_bytes = 0
            self.need(Reason.OVERFLOW, now)
            return
        self.waiting.append(commit)
        self._waiting_bytes += size

    def ready(self, now: float) -> ReadyCommits | None:
        """The commits whose paths are free now; None when there is nothing to do."""
        if not self.waiting:
            return None
        self._forget_old_writes(now)
        behind: set[RelPath] = set()
        free: list[Commit] = []
        held: list[Commit] = []
        for commit in self.waiting:
            paths = [change.path for change in commit.changes]
            if any(path in self._written or path in behind for path in paths):
                held.append(commit)
                behind.update(paths)
            else:
                free.append(commit)
        if not free:
            return None
        self.waiting = held
        self._waiting_bytes -= sum(map(_size, free))
        return self._fold(free, now)

    def _fold(self, commits: Iterable[Commit], now: float) -> ReadyCommits:
        operations: dict[RelPath, Operation] = {}
        problems: list[Problem] = []
        steps: list[tuple[Commit, Outcome]] = []
        gaps: list[Gap] = []
        tree, eager = self.tree, False
        for commit in commits:
            plan = step(tree, commit, optimistic=self._optimistic)
            tree, eager = plan.tree, eager or plan.eager
            for operation in plan.operations:
                operations.pop(operation.path, None)
                operations[operation.path] = operation
            problems += plan.problems
            steps.append((commit, plan.outcome))
            if plan.gap is not None and plan.gap.reason is not Reason.GAP:
                gaps.append(plan.gap)
            if plan.outcome is Outcome.PROVISIONAL:
                for operation in plan.operations:
                    self._unconfirmed[operation.path] = now + CONFIRM
        for gap in gaps:
            self.need(gap.reason, now, gap.paths)
        plan = Plan(tuple(operations.values()), tree, steps[-1][1], None, tuple(problems), eager)
        return ReadyCommits(plan, tuple(steps))

    def settle(
        self, plan: Plan, now: float, *, failed: Set[RelPath] = frozenset(), undone: bool = False
    ) -> None:
        """Tell what became of a plan: the paths this disk cannot hold, or that the whole was undone."""
        if undone:
            self._futile += 1
            self.need(Reason.DISK, now + self._wait_after_futile(DISK_RETRY))
            return
        before = self.tree.cursor
        self.tree = settle(self.tree, plan, failed)
        after = self.tree.cursor
        same = before.epoch == after.epoch and before.revision <= after.revision
        self.head_revision = max(self.head_revision, after.revision) if same else after.revision
        if not same:
            self.behind = None
        for operation in plan.operations:
            if operation.path not in failed:
                self._unusable.pop(operation.path, None)
                self._written.pop(operation.path, None)
                self._written[operation.path] = now
            else:
                self._retry_later(operation.path, operation.entry, now)
        if self._unconfirmed:
            entries = self.tree.entries
            self._unconfirmed = {
                path: deadline
                for path, deadline in self._unconfirmed.items()
                if (entry := entries.get(path)) is not None and entry.provisional
            }
        self._find_gaps(now)

    def adopt(self, tree: Tree) -> None:
        """Take another tree for the truth: what a start, or a look at the disk, has found."""
        same = tree.cursor.epoch == self.tree.cursor.epoch
        self.head_revision = max(tree.cursor.revision, self.head_revision if same else 0)
        self.tree = tree

    def _retry_later(self, path: RelPath, wanted: Entry, now: float) -> None:
        known = self._unusable.get(path)
        wait = UNUSABLE_FIRST if known is None else min(known.wait * 2, UNUSABLE_MAX)
        self._unusable[path] = _Unusable(wanted, now + wait, wait)

    @property
    def unusable(self) -> Set[RelPath]:
        """The paths that the disk could not hold and that are tried again."""
        return self._unusable.keys()

    def obstacle_moved(self, paths: Iterable[RelPath], now: float) -> None:
        """What stood in the way of these paths is not what it was: try them again at once."""
        for path in paths:
            known = self._unusable.get(path)
            if known is not None:
                known.wait = UNUSABLE_FIRST
                known.due = min(known.due, now) if known.due < inf else inf

    def _find_gaps(self, now: float) -> None:
        cursor = self.tree.cursor
        top = max(cursor.islands, default=cursor.revision)
        waiting = {commit.revision for commit in self.waiting if commit.revision is not None}
        here = cursor.islands | {revision for revision in waiting if cursor.revision < revision < top}
        if len(here) < top - cursor.revision:
            self.need(Reason.GAP, now + self._wait_after_futile(GRACE))
        else:
            self._needs.pop(Reason.GAP, None)
        head = self._needs.get(Reason.HEAD)
        if head is not None and head.revision is not None and head.revision <= cursor.revision:
            del self._needs[Reason.HEAD]

    def free_at(self, paths: Iterable[RelPath]) -> float:
        """From when on all of `paths` may be written: an answer's operations keep the spacing too."""
        written = [at for path in paths if (at := self._written.get(path)) is not None]
        return max(written) + SPACING if written else 0.0

    def _forget_old_writes(self, now: float) -> None:
        """Forget writes that are old enough to be followed by another; `_written` is in order of time."""
        for path, at in list(self._written.items()):
            if now < at + SPACING:
                break
            del self._written[path]

    # --- catch-up

    def need(
        self, reason: Reason, due: float, paths: Iterable[RelPath] = (), revision: int | None = None
    ) -> None:
        """Ask for a catch-up not before `due`. Asking twice for one reason keeps the earlier time.

        After a failure the wait holds for every reason but a join: the connection is new, and so may be the token.
        """
        if reason is Reason.JOIN:
            self._not_before = min(self._not_before, due)
        known = self._needs.get(reason)
        if known is None:
            self._needs[reason] = _Need(due, set(paths), revision)
            return
        known.due = min(known.due, due)
        known.paths.update(paths)
        if revision is not None:
            known.revision = max(revision, known.revision or 0)

    def doubt(self, paths: Iterable[RelPath], now: float) -> None:
        """These paths hold something the database has not confirmed: ask what they should hold."""
        doubted = tuple(paths)
        if not doubted:
            return
        if Reason.DRIFT not in self._needs:
            again = now - self._drift_asked < max(DRIFT_QUIET, 2 * self._drift_wait)
            self._drift_wait = min(self._drift_wait * 2, FUTILE_MAX) if again else GRACE
        self.need(Reason.DRIFT, now + self._drift_wait, doubted)

    def compare(self, head: Head, now: float, asked_at: Cursor | None = None) -> None:
        """Hold the tree against what the orchestrator says of the database.

        `asked_at`: our cursor when the head was asked for; None: as it is now. A head below that has lost commits; one
        below the present cursor may only have been read before the latest.
        """
        cursor = self.tree.cursor
        if head.epoch != cursor.epoch:
            self.behind = None
            self.need(Reason.EPOCH, now)
            return
        asked_at = asked_at or cursor
        forgot = asked_at.epoch == head.epoch and head.revision < asked_at.revision
        self.behind = head.revision if forgot else None
        self.head_revision = max(self.head_revision, head.revision)
        if forgot:
            self.need(Reason.HEAD, now + self._wait_after_futile(GRACE))
        elif head.revision > cursor.revision:
            self.need(Reason.HEAD, now + GRACE, revision=head.revision)
        elif head.tree_hash and head.revision == cursor.revision:
            self._compare_hash(head.tree_hash, now)

    def _compare_hash(self, wanted: str, now: float) -> None:
        """Ask for everything when the tree is another. What waits or is asked about already says nothing of the rest;
        of a path that the disk cannot hold counts what it should be.
        """
        asking = Reason.TREE_HASH in self._needs or Reason.TREE_HASH in (self._asked or {})
        if self.waiting or self._unconfirmed or asking or self.pending_paths:
            return
        entries = self.tree.entries.update({path: each.wanted for path, each in self._unusable.items()})
        if wanted == tree_hash({p: each.digest for p, each in entries.items() if each.digest is not None}):
            self._mismatches, self._mismatch_due = 0, 0.0
        elif now >= self._mismatch_due:
            self._mismatch_due = now + min(MISMATCH_FIRST * 2 ** min(self._mismatches, 16), MISMATCH_MAX)
            self._mismatches += 1
            if any(each.revision > self.tree.cursor.revision for each in entries.values()):
                self.holds_forgotten = True  # the head stands where we do: what is above it never was
            self.need(Reason.TREE_HASH, now)

    def request(self, now: float) -> Request | None:
        """The catch-up to make now, if one is due and none is under way. It must end in `answered` or `failed`."""
        late = [path for path, deadline in self._unconfirmed.items() if deadline <= now]
        if late:
            self.need(Reason.UNCONFIRMED, now, late)
            for path in late:
                del self._unconfirmed[path]
        if self._asked is not None or now < self._not_before:
            return None
        again = [path for path, each in self._unusable.items() if each.due <= now]
        if again:
            self.need(Reason.DISK, now, again)
        if not any(need.due <= now for need in self._needs.values()):
            return None
        asked, self._needs = self._needs, {}
        self._asked, self._asked_at = asked, self.tree
        first = min(asked, key=lambda reason: (reason is not Reason.TREE_HASH, asked[reason].due))
        paths = frozenset().union(*(need.paths for need in asked.values()))
        for path in paths & self._unusable.keys():
            self._unusable[path].due = inf
        if Reason.DRIFT in asked:
            self._drift_asked = now
        if (
            self._ask_whole
            or len(paths) > MOST_PATHS
            or sum(len(p.encode()) for p in paths) > MOST_PATH_BYTES
        ):
            return Request(None, 0, first, frozenset())
        cursor = self.tree.cursor
        rebuild = first is Reason.TREE_HASH and (self._mismatches > 1 or self.holds_forgotten)
        return Request(cursor.epoch, cursor.revision, first, paths, rebuild)

    def answered(self, now: float, revision: int | None = None, *, by_nobody: bool = False) -> None:
        """The catch-up is done: its answer, good up to `revision`, is in the tree, or there was nothing to do.

        `by_nobody`: there is nobody to ask, so that nothing was learned of a path that could not be written.

        A revision is visible before its event is sent, so an event seen before the question with a revision above
        the answer never happened: its island is forgotten, lest the true commit be taken for a duplicate, and a full
        snapshot asked for, which takes back what it brought.
        """
        asked, self._asked = self._asked or {}, None
        self._ask_whole = False
        if Reason.TREE_HASH in asked:
            self.holds_forgotten = False
        for need in asked.values():
            for path in need.paths & self._unusable.keys():
                if by_nobody:
                    self._retry_later(path, self._unusable[path].wanted, now)
                elif self._unusable[path].due == inf:  # what the database has there now was no trouble
                    del self._unusable[path]
        if revision is not None:
            false = frozenset(r for r in self._asked_at.cursor.islands if r > revision)
            if false:
                self.holds_forgotten = True
                cursor = self.tree.cursor
                self.tree = structs.replace(
                    self.tree, cursor=structs.replace(cursor, islands=cursor.islands - false)
                )
                self.need(Reason.TREE_HASH, now)
        moved = self.tree.cursor != self._asked_at.cursor or self.tree.entries is not self._asked_at.entries
        self._futile = 0 if moved else self._futile + 1
        self._find_gaps(now)

    def failed(
        self, now: float, wait: float, *, too_large: bool = False, missing: Set[RelPath] = frozenset()
    ) -> None:
        """The catch-up could not be made. What it was for is due again in `wait` seconds, and nothing else sooner.

        `too_large`: the next question asks for everything. `missing`: it names these, whose bytes did not come.
        """
        asked, self._asked = self._asked or {}, None
        self._ask_whole = self._ask_whole or too_large
        self._not_before = now + wait
        for reason, need in asked.items():
            self.need(reason, self._not_before, need.paths, need.revision)
        if missing:
            self.need(Reason.REFERENCE, self._not_before, missing)

    def _wait_after_futile(self, base: float) -> float:
        return float(min(base * 2**self._futile, FUTILE_MAX)) if self._futile < 16 else FUTILE_MAX

    @property
    def settled(self) -> bool:
        """Nothing waits, nothing is needed, nothing is under way."""
        return not (
            self.waiting or self._needs or self._unconfirmed or self._asked or self.tree.cursor.islands
        )

    @property
    def needs(self) -> tuple[Reason, ...]:
        """Why a catch-up is wanted, for status."""
        return tuple(self._needs)

    @property
    def pending_paths(self) -> frozenset[RelPath]:
        """Paths whose content only an answer of the database can bring."""
        needs = [*self._needs.values(), *(self._asked or {}).values()]
        return frozenset().union(*(need.paths for need in needs))

    def next_deadline(self) -> float | None:
        """When `ready` or `request` may have something to say without anything arriving."""
        times: list[float] = []
        if self._asked is None:
            times += [max(need.due, self._not_before) for need in self._needs.values()]
            times += [max(each.due, self._not_before) for each in self._unusable.values() if each.due < inf]
        times += self._unconfirmed.values()
        if self.waiting and self._written:
            times.append(next(iter(self._written.values())) + SPACING)
        return min(times, default=None)


def _size(commit: Commit) -> int:
    return sum(len(change.content) for change in commit.changes if change.content is not None)
