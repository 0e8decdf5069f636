"""The promise, against a model: whatever is lost, doubled, reordered or broken, the tree ends equal to the database.

`World` is a database that keeps a log and may forget the end of it, a channel that loses things and splices that make
something else than they say, an orchestrator that reads no long question, a disk that fills up and holds what stands in
the way, and a process that dies.
The rules are edits and faults in any order; `quiesce` lets the clock run with everything back in order, and then
disk, tree and database must be the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec import structs

from agent.core.messages import Changes, Current, Head
from agent.core.model import (
    Change,
    Commit,
    Cursor,
    Entry,
    Manifest,
    Operation,
    Patch,
    RelPath,
    Remove,
    Tree,
    digest_of,
    tree_hash,
)
from agent.core.reconcile import Plan, Reason, catch_up, reconcile
from agent.core.scheduler import Follower
from tests.profiles import examples

PATHS = [RelPath(p) for p in ("a.ts", "b.ts", "src/c.ts", "src/d.ts", "src/deep/e.ts", "bin.png")]

FORMS = st.sampled_from(["content", "reference", "splices"])


@dataclass
class Row:
    version: int
    content: bytes | None
    revision: int


@dataclass
class Database:
    """What PostgreSQL promises the agent: gapless revisions, versions per path, tombstones, answers."""

    epoch: str = "e0"
    revision: int = 0
    rows: dict[RelPath, Row] = field(default_factory=dict)
    past: list[dict[RelPath, Row]] = field(default_factory=list)
    """The rows as they were at each revision below the present one of this epoch, oldest first."""

    def commit(
        self, changes: dict[RelPath, bytes | None], *, by_reference: bool = False, by_splices: bool = False
    ) -> Commit | None:
        changes = {p: c for p, c in changes.items() if self.content(p) != c}
        if not changes:
            return None
        self.past.append({p: replace(r) for p, r in self.rows.items()})
        self.revision += 1
        made = []
        for path, content in changes.items():
            version = self.rows[path].version + 1 if path in self.rows else 1
            before = self.content(path)
            self.rows[path] = Row(version, content, self.revision)
            made.append(self._change(path, hide=by_reference, before=before if by_splices else None))
        event = "bulk:apply" if len(made) > 1 else "file:update"
        return Commit(event, tuple(made), self.revision, self.epoch)

    def content(self, path: RelPath) -> bytes | None:
        return self.rows[path].content if path in self.rows else None

    def _change(self, path: RelPath, *, hide: bool = False, before: bytes | None = None) -> Change:
        row = self.rows.get(path)
        if row is None or row.content is None:
            return Change(path, None, row.version if row else 0)
        patch = None if before is None else patch_of(before, row.content)
        content = None if hide or patch else row.content
        return Change(path, digest_of(row.content), row.version, content, len(row.content), patch=patch)

    def files(self) -> dict[RelPath, bytes]:
        return {p: r.content for p, r in self.rows.items() if r.content is not None}

    def head(self) -> Head:
        return Head(self.epoch, self.revision, tree_hash({p: digest_of(c) for p, c in self.files().items()}))

    def snapshot(self) -> Manifest:
        files = {
            p: Entry(r.version, digest_of(r.content), len(r.content), revision=self.revision)
            for p, r in self.rows.items()
            if r.content is not None
        }
        return Manifest("p", self.epoch, self.revision, files, {})

    def sync(self, epoch: str | None, revision: int, reason: str, paths: frozenset[RelPath]) -> object:
        if epoch != self.epoch or reason == "tree_hash":
            return self.snapshot()
        wanted = {p for p, r in self.rows.items() if r.revision > revision} | paths
        if not wanted:
            return Current(self.epoch, self.revision)
        known = self.past[revision - self.revision] if 0 < self.revision - revision <= len(self.past) else {}
        changes = tuple(
            self._change(p, before=known[p].content if p in known and p not in paths else None)
            for p in sorted(wanted)
        )
        return Changes(self.epoch, self.revision, revision, changes)

    def forget(self, commits: int) -> None:
        """A failover to a replica that was behind: the last commits never were, and the epoch is the same."""
        for _ in range(min(commits, len(self.past))):
            self.rows = self.past.pop()
            self.revision -= 1

    def restore(self, rows: dict[RelPath, Row], revision: int) -> None:
        self.rows, self.revision = rows, revision
        self.past.clear()
        self.epoch = f"e{int(self.epoch[1:]) + 1}"


def patch_of(before: bytes, after: bytes) -> Patch:
    """What makes the one of the other: the first byte that differs and all behind it."""
    same = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), None)
    at = min(len(before), len(after)) if same is None else same
    return Patch(digest_of(before), ((at, len(before) - at, after[at:]),))


class World(RuleBasedStateMachine):
    optimistic = False

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.db = Database()
        self.backup: tuple[dict[RelPath, Row], int] = ({}, 0)
        self.now = 100.0
        self.channel: list[Commit] = []
        self.disk: dict[RelPath, bytes] = {}
        self.foreign = {RelPath("theirs.txt"): b"not ours"}
        self.disk |= self.foreign
        self.written_at: dict[RelPath, float] = {}
        self.full = False
        self.down = False
        self.obstacles: set[RelPath] = set()
        self.most_paths = 100
        self.heads: list[tuple[Head, Cursor]] = []
        self.pending: list[tuple[object, bool]] = []
        self.saved: Tree = Tree(Cursor(self.db.epoch, 0))
        self.follower = Follower(self.saved, optimistic=self.optimistic)

    # --- the disk

    def read(self, path: RelPath, size: int) -> bytes | None:
        content = self.disk.get(path)
        return content if content is not None and len(content) == size else None

    def apply(self, plan: Plan, operations: tuple[Operation, ...], bytes_of: dict[str, bytes]) -> bool:
        """All or nothing. True when it landed."""
        if self.full and any(not isinstance(operation, Remove) for operation in operations):
            self.follower.settle(plan, self.now, undone=True)
            return False
        failed = {o.path for o in operations if o.path in self.obstacles and not isinstance(o, Remove)}
        for operation in operations:
            if operation.path in failed:
                continue
            assert operation.path not in self.foreign, "touched what is not ours"
            last = self.written_at.get(operation.path)
            assert last is None or self.now >= last + 0.075, "two writes too close for Vite"
            if isinstance(operation, Remove):
                self.disk.pop(operation.path, None)
            else:
                content = operation.content
                if content is None:
                    assert operation.staged is not None
                    content = bytes_of[operation.staged]
                assert digest_of(content) == operation.entry.digest
                self.disk[operation.path] = content
            self.written_at[operation.path] = self.now
        self.follower.settle(plan, self.now, failed=failed)
        return True

    def work(self) -> None:
        """What the shell does after every wake-up."""
        while (batch := self.follower.ready(self.now)) is not None:
            self.apply(batch.plan, batch.plan.operations, {})
        if (request := self.follower.request(self.now)) is not None:
            if self.down:
                self.follower.failed(self.now, 1.0)
            elif len(request.paths) > self.most_paths:
                self.follower.failed(self.now, 1.0, too_large=True)
            else:
                ahead = request.epoch == self.db.epoch and request.revision > self.db.revision
                reason = "tree_hash" if ahead else request.reason
                answer = self.db.sync(request.epoch, request.revision, reason, request.paths)
                self.pending.append((answer, ahead))
                self.answer_bytes = dict(self.db.files())

    def take_answer(self) -> None:
        answer, ahead = self.pending.pop(0)
        if isinstance(answer, Changes):
            answer = replace(answer, changes=self.follower.patched(answer.changes, self.read))
        if isinstance(answer, Current):
            if answer.epoch != self.follower.tree.cursor.epoch:
                self.follower.failed(self.now, 1.0)
            else:
                self.follower.answered(self.now, answer.revision)
            return
        if isinstance(answer, Changes):
            plan = catch_up(self.follower.tree, answer)
            revision = answer.revision
        else:
            assert isinstance(answer, Manifest)
            staged = {p: str(f.digest) for p, f in answer.files.items()}
            plan = reconcile(
                self.follower.tree, answer, staged, forgotten=ahead or self.follower.holds_forgotten
            )
            revision = answer.revision
        free_at = self.follower.free_at(op.path for op in plan.operations)
        if free_at > self.now:
            self.now = free_at
            self.pending.insert(0, (answer, ahead))
            return
        by_digest = {str(digest_of(c)): c for c in self.answer_bytes.values()}
        if plan.gap is not None and not plan.operations and plan.tree is self.follower.tree:
            self.follower.failed(self.now, 1.0, missing=plan.gap.paths)
        elif self.apply(plan, plan.operations, by_digest):
            self.follower.answered(self.now, revision)
        else:
            self.follower.failed(self.now, 1.0)

    # --- edits

    @rule(path=st.sampled_from(PATHS), content=st.binary(max_size=3), form=FORMS)
    def edit(self, path: RelPath, content: bytes, form: str) -> None:
        self.send(
            self.db.commit({path: content}, by_reference=form == "reference", by_splices=form == "splices")
        )

    @rule(path=st.sampled_from(PATHS))
    def delete(self, path: RelPath) -> None:
        self.send(self.db.commit({path: None}))

    @rule(
        changes=st.dictionaries(st.sampled_from(PATHS), st.none() | st.binary(max_size=3), min_size=2),
        by_splices=st.booleans(),
    )
    def bulk(self, changes: dict[RelPath, bytes | None], by_splices: bool) -> None:
        self.send(self.db.commit(changes, by_splices=by_splices))

    @rule(source=st.sampled_from(PATHS), goal=st.sampled_from(PATHS))
    def rename(self, source: RelPath, goal: RelPath) -> None:
        content = self.db.content(source)
        if content is not None and source != goal:
            self.send(self.db.commit({source: None, goal: content}))

    @rule(path=st.sampled_from(PATHS), content=st.binary(max_size=3))
    def front_end_is_ahead(self, path: RelPath, content: bytes) -> None:
        self.channel.append(
            Commit("file:update", (Change(path, digest_of(content), None, content, len(content)),))
        )

    @rule()
    def back_up(self) -> None:
        self.backup = ({p: replace(r) for p, r in self.db.rows.items()}, self.db.revision)

    @rule()
    def restore(self) -> None:
        rows, revision = self.backup
        self.db.restore({p: replace(r) for p, r in rows.items()}, revision)

    @rule(commits=st.integers(1, 3))
    def database_forgets(self, commits: int) -> None:
        self.db.forget(commits)

    def send(self, commit: Commit | None) -> None:
        if commit is not None:
            self.channel.append(commit)

    # --- the channel and its faults

    @rule(n=st.integers(1, 4))
    def deliver(self, n: int) -> None:
        for _ in range(min(n, len(self.channel))):
            commit = self.channel.pop(0)
            changes = self.follower.patched(commit.changes, self.read)
            self.follower.receive(structs.replace(commit, changes=changes), self.now)
            self.work()

    @precondition(lambda self: self.channel)
    @rule()
    def lose(self) -> None:
        self.channel.pop(self.random.randrange(len(self.channel)))

    @precondition(lambda self: self.channel)
    @rule()
    def spoil(self) -> None:
        """A commit's splices make something else than its hash says, or do not fit."""
        n = self.random.randrange(len(self.channel))
        wrong = (((0, 0, b"?"),), ((0, 99, b""),), ((2, 0, b""), (1, 1, b"")))
        changes = tuple(
            structs.replace(c, patch=Patch(c.patch.base, self.random.choice(wrong))) if c.patch else c
            for c in self.channel[n].changes
        )
        self.channel[n] = structs.replace(self.channel[n], changes=changes)

    @precondition(lambda self: self.channel)
    @rule()
    def duplicate(self) -> None:
        self.channel.append(self.random.choice(self.channel))

    @rule()
    def reorder(self) -> None:
        self.random.shuffle(self.channel)

    @rule()
    def disconnect(self) -> None:
        self.channel.clear()
        self.follower.need(Reason.JOIN, self.now)
        self.work()

    # --- the rest of the world

    @rule(seconds=st.sampled_from([0.01, 0.05, 0.08, 0.3, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.work()

    @precondition(lambda self: self.pending)
    @rule()
    def answer_arrives(self) -> None:
        self.take_answer()
        self.work()

    @precondition(lambda self: self.pending)
    @rule()
    def answer_is_lost(self) -> None:
        """The connection, or the download of the snapshot that was offered, fails half way."""
        self.pending.pop(0)
        self.follower.failed(self.now, 1.0)
        self.work()

    @rule()
    def heartbeat(self) -> None:
        self.follower.compare(self.db.head(), self.now)
        self.work()

    @rule()
    def heartbeat_begins(self) -> None:
        self.heads.append((self.db.head(), self.follower.tree.cursor))

    @precondition(lambda self: self.heads)
    @rule()
    def heartbeat_ends(self) -> None:
        head, asked_at = self.heads.pop(0)
        self.follower.compare(head, self.now, asked_at)
        self.work()

    @rule(most=st.integers(0, 3))
    def orchestrator_reads_less(self, most: int) -> None:
        self.most_paths = most

    @rule(path=st.sampled_from(PATHS))
    def obstacle_comes(self, path: RelPath) -> None:
        if path not in self.disk:
            self.obstacles.add(path)

    @precondition(lambda self: self.obstacles)
    @rule(seen=st.booleans())
    def obstacle_goes(self, seen: bool) -> None:
        path = min(self.obstacles)
        self.obstacles.remove(path)
        if seen:
            self.follower.obstacle_moved([path], self.now)
            self.work()

    @rule(full=st.booleans())
    def fill_disk(self, full: bool) -> None:
        self.full = full

    @rule(down=st.booleans())
    def orchestrator(self, down: bool) -> None:
        self.down = down

    @rule()
    def ledger_is_saved(self) -> None:
        self.saved = self.follower.tree

    @rule()
    def crash(self) -> None:
        """SIGKILL: the disk is ahead of the ledger; what differs is looked at and taken as unconfirmed."""
        tree = self.saved
        for path in set(tree.entries) | (set(self.disk) - set(self.foreign)):
            entry, content = tree.entries.get(path), self.disk.get(path)
            actual = None if content is None else digest_of(content)
            if entry is None or entry.digest != actual:
                base = entry or Entry(0, None)
                tree = structs.replace(
                    tree,
                    entries=tree.entries.set(
                        path, structs.replace(base, digest=actual, size=len(content or b""), provisional=True)
                    ),
                )
        self.pending.clear()
        self.channel.clear()
        self.heads.clear()
        self.now += 0.2
        self.follower = Follower(tree, optimistic=self.optimistic)
        self.follower.doubt((p for p, e in tree.entries.items() if e.provisional), self.now)
        self.follower.need(Reason.JOIN, self.now)
        self.work()

    # --- what must hold

    @invariant()
    def tree_is_the_disk(self) -> None:
        files = {p: e.digest for p, e in self.follower.tree.entries.items() if e.is_file}
        assert files == {p: digest_of(c) for p, c in self.disk.items() if p not in self.foreign}

    @invariant()
    def not_ours_is_not_touched(self) -> None:
        assert all(self.disk[p] == c for p, c in self.foreign.items())

    def teardown(self) -> None:
        if hasattr(self, "db"):
            self.quiesce()

    def quiesce(self) -> None:
        """Everything works again: within a bounded time and number of questions, all is equal and at rest."""
        self.full = self.down = False
        self.obstacles.clear()
        self.follower.obstacle_moved(list(self.follower.unusable), self.now)
        self.disconnect()
        for _ in range(200):
            while self.pending:
                self.take_answer()
                self.work()
            self.follower.compare(self.db.head(), self.now)
            self.now += 1.0
            self.work()
            if self.follower.settled and not self.pending and self.equal:
                break
        ours = {p: c for p, c in self.disk.items() if p not in self.foreign}
        assert ours == self.db.files()
        assert self.follower.tree.hash() == self.db.head().tree_hash
        assert self.follower.tree.cursor == Cursor(self.db.epoch, self.db.revision)
        assert self.follower.settled, self.follower.needs
        assert (set(self.follower.unusable), self.follower.behind) == (set(), None)

    @property
    def equal(self) -> bool:
        return {p: c for p, c in self.disk.items() if p not in self.foreign} == self.db.files()


class OptimisticWorld(World):
    optimistic = True


TestAuthoritative = World.TestCase
TestOptimistic = OptimisticWorld.TestCase
TestAuthoritative.settings = examples(300, 10_000)
TestOptimistic.settings = examples(300, 10_000)
