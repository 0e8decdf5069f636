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
- *no loop*: a catch-up that does not move the cursor makes the next one for the same reason wait longer.
- *no hurry*: after one that failed nothing is asked before its wait is over, unless the link has joined anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass, field

from msgspec import structs

from agent.core.messages import Head
from agent.core.model import Commit, Operation, Problem, RelPath, TraceParent, Tree
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

FUTILE_MAX = 30.0
"""Longest wait between catch-ups that change nothing."""


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
    """One catch-up to make: where we are, why we ask, and paths that must be in the answer."""

    epoch: str | None
    revision: int
    reason: Reason
    paths: frozenset[RelPath]


@dataclass(slots=True)
class _Need:
    due: float
    paths: set[RelPath] = field(default_factory=set)
    revision: int | None = None
    """Met without asking once the cursor is here."""


class Follower:
    """See the module's text. `tree` is what is true on disk; it changes only in `settle` and `adopt`.

    `optimistic`: show a front end's events before the database has confirmed them.
    """

    def __init__(self, tree: Tree, *, optimistic: bool = False) -> None:
        self._optimistic = optimistic

        # The tree, and the commits that are not in it yet.
        self.tree = tree
        self.waiting: list[Commit] = []
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
        self._judged: tuple[str, int, str] | None = None
        """Epoch, revision and tree hash of the head that differed last: one full snapshot is all that can be done."""

    # --- events

    def receive(self, commit: Commit, now: float) -> None:
        """Take a commit; it is applied by the next `ready` that finds its paths free."""
        if commit.revision is not None and commit.epoch in (None, self.tree.cursor.epoch):
            self.head_revision = max(self.head_revision, commit.revision)
        if len(self.waiting) >= MAX_WAITING:
            self.waiting.clear()
            self.need(Reason.OVERFLOW, now)
            return
        self.waiting.append(commit)

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
        self.tree = settle(self.tree, plan, failed)
        self.head_revision = max(self.head_revision, self.tree.cursor.revision)
        for operation in plan.operations:
            if operation.path not in failed:
                self._written.pop(operation.path, None)
                self._written[operation.path] = now
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
        if doubted:
            self.need(Reason.DRIFT, now, doubted)

    def compare(self, head: Head, now: float) -> None:
        """Hold the tree against what the orchestrator says of the database."""
        cursor = self.tree.cursor
        if head.epoch != cursor.epoch:
            self.need(Reason.EPOCH, now)
            return
        self.head_revision = max(self.head_revision, head.revision)
        if head.revision > cursor.revision:
            self.need(Reason.HEAD, now + GRACE, revision=head.revision)
        elif (
            head.tree_hash and head.revision == cursor.revision and not self.waiting and not self._unconfirmed
        ):
            judged = (head.epoch, head.revision, head.tree_hash)
            if judged != self._judged and head.tree_hash != self.tree.hash():
                self._judged = judged
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
        if not any(need.due <= now for need in self._needs.values()):
            return None
        asked, self._needs = self._needs, {}
        self._asked, self._asked_at = asked, self.tree
        first = min(asked, key=lambda reason: (reason is not Reason.TREE_HASH, asked[reason].due))
        paths = frozenset().union(*(need.paths for need in asked.values()))
        cursor = self.tree.cursor
        return Request(cursor.epoch, cursor.revision, first, paths)

    def answered(self, now: float, revision: int | None = None) -> None:
        """The catch-up is done: its answer, good up to `revision`, is in the tree, or there was nothing to do.

        A revision is visible before its event is sent, so an event seen before the question with a revision above
        the answer never happened: its island is forgotten, lest the true commit be taken for a duplicate.
        """
        self._asked = None
        if revision is not None:
            false = frozenset(r for r in self._asked_at.cursor.islands if r > revision)
            if false:
                cursor = self.tree.cursor
                self.tree = structs.replace(
                    self.tree, cursor=structs.replace(cursor, islands=cursor.islands - false)
                )
                self.need(Reason.TREE_HASH, now)
        moved = self.tree.cursor != self._asked_at.cursor or self.tree.entries is not self._asked_at.entries
        self._futile = 0 if moved else self._futile + 1
        self._find_gaps(now)

    def failed(self, now: float, wait: float) -> None:
        """The catch-up could not be made. What it was for is due again in `wait` seconds, and nothing else sooner."""
        asked, self._asked = self._asked or {}, None
        self._not_before = now + wait
        for reason, need in asked.items():
            self.need(reason, self._not_before, need.paths, need.revision)

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
        times += self._unconfirmed.values()
        if self.waiting and self._written:
            times.append(next(iter(self._written.values())) + SPACING)
        return min(times, default=None)
