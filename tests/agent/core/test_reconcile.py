"""The planner's rules, one by one, by the names `agent.core.reconcile` gives them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from immutables import Map

from agent.core.messages import Changes
from agent.core.model import (
    Change,
    Commit,
    Cursor,
    Entry,
    Manifest,
    Problem,
    RelPath,
    Remove,
    Tree,
    Write,
    digest_of,
)
from agent.core.reconcile import Gap, Outcome, Plan, Reason, brake, catch_up, reconcile, settle, step

A, B, C = RelPath("a.ts"), RelPath("b.ts"), RelPath("src/c.ts")
EPOCH = "e1"


def entry(content: bytes, version: int = 1, **more: object) -> Entry:
    return Entry(version, digest_of(content), len(content), **more)  # type: ignore[arg-type]


def tree(revision: int = 0, islands: tuple[int, ...] = (), epoch: str | None = EPOCH, **files: Entry) -> Tree:
    """A tree with `a`, `b`, `c` as given."""
    names = {"a": A, "b": B, "c": C}
    return Tree(Cursor(epoch, revision, frozenset(islands)), Map({names[n]: e for n, e in files.items()}))


def update(path: RelPath, content: bytes | None, version: int | None, of: bytes = b"") -> Change:
    """An update; `content` None: by reference to `of`."""
    return Change(path, digest_of(of if content is None else content), version, content, len(content or of))


def delete(path: RelPath, version: int | None) -> Change:
    return Change(path, None, version)


def commit(
    revision: int | None, *changes: Change, epoch: str | None = EPOCH, complete: bool = True
) -> Commit:
    return Commit("bulk:apply", changes, revision, epoch, complete=complete)


def manifest(revision: int, files: dict[RelPath, tuple[bytes, int]], **more: object) -> Manifest:
    listed = {p: Entry(v, digest_of(c), len(c), revision=revision) for p, (c, v) in files.items()}
    values: dict[str, object] = {"epoch": EPOCH, "deleted": {}, **more}
    return Manifest(project_id="p", revision=revision, files=listed, **values)  # type: ignore[arg-type]


def staged(manifest: Manifest) -> dict[RelPath, str]:
    return {path: f"stage-{path}" for path in manifest.files}


def paths(plan: Plan) -> dict[str, str]:
    return {op.path: type(op).__name__.lower() for op in plan.operations}


class TestOneRevisionLandsWhole:
    def test_a_bulk_is_one_plan(self) -> None:
        plan = step(tree(a=entry(b"1")), commit(1, update(A, b"2", 2), update(B, b"b", 1), delete(C, 3)))
        assert paths(plan) == {A: "write", B: "write"}
        assert plan.tree.cursor == Cursor(EPOCH, 1)
        assert plan.tree.entries[C] == Entry(3, None, revision=1)

    def test_bytes_that_are_not_here_hold_up_all_of_it(self) -> None:
        plan = step(tree(), commit(1, update(A, b"here", 1), update(B, None, 1, of=b"elsewhere")))
        assert plan.operations == ()
        assert plan.gap == Gap(Reason.REFERENCE, frozenset({B}))
        assert plan.tree.cursor.revision == 0

    def test_but_nothing_else(self) -> None:
        waiting = step(tree(), commit(1, update(A, None, 1, of=b"x"))).tree
        plan = step(waiting, commit(2, update(B, b"b", 1)))
        assert paths(plan) == {B: "write"}
        assert plan.tree.cursor == Cursor(EPOCH, 0, frozenset({2}))

    def test_a_reference_to_what_is_there_needs_no_bytes(self) -> None:
        plan = step(tree(a=entry(b"same", 1)), commit(1, update(A, None, 2, of=b"same")))
        assert plan.gap is None
        assert plan.operations == ()
        assert plan.tree.entries[A].version == 2

    def test_a_wrong_hash_is_a_gap_with_its_own_name(self) -> None:
        problem = Problem("hash_mismatch", "…", A)
        bad = Commit("file:update", (update(A, None, 1, of=b"truth"),), 1, EPOCH, problems=(problem,))
        assert step(tree(), bad).gap == Gap(Reason.HASH_MISMATCH, frozenset({A}))

    def test_a_doorbell_asks(self) -> None:
        assert step(tree(), commit(1, complete=False)).gap == Gap(Reason.DOORBELL)


class TestNewerVersionWinsPerPath:
    def test_older_is_stale_whatever_its_revision(self) -> None:
        plan = step(tree(4, a=entry(b"new", 5)), commit(5, update(A, b"old", 4)))
        assert plan.operations == ()
        assert plan.outcome is Outcome.STALE
        assert plan.tree.cursor.revision == 5

    def test_a_tombstone_is_a_version_too(self) -> None:
        gone = tree(4, a=Entry(5, None))
        assert step(gone, commit(5, update(A, b"old", 4))).operations == ()
        assert paths(step(gone, commit(5, update(A, b"again", 6)))) == {A: "write"}

    def test_equal_bytes_are_not_written_again(self) -> None:
        plan = step(tree(a=entry(b"same", 1)), commit(1, update(A, b"same", 2)))
        assert plan.operations == ()
        assert plan.tree.entries[A].version == 2

    def test_the_executable_bit_is_content(self) -> None:
        change = Change(A, digest_of(b"x"), 2, b"x", 1, executable=True)
        assert paths(step(tree(a=entry(b"x", 1)), commit(1, change))) == {A: "write"}

    def test_deleting_what_is_not_there_leaves_a_tombstone(self) -> None:
        plan = step(tree(), commit(1, delete(A, 3)))
        assert plan.operations == ()
        assert plan.tree.entries[A] == Entry(3, None, revision=1)


class TestAHoleIsAGapNotAStop:
    def test_above_a_hole_is_applied_and_kept_as_an_island(self) -> None:
        plan = step(tree(3), commit(5, update(A, b"x", 1)))
        assert paths(plan) == {A: "write"}
        assert plan.gap == Gap(Reason.GAP)
        assert plan.eager
        assert plan.tree.cursor == Cursor(EPOCH, 3, frozenset({5}))

    def test_the_straggler_closes_it(self) -> None:
        plan = step(tree(3, (5,)), commit(4, update(A, b"x", 1)))
        assert plan.gap is None
        assert plan.tree.cursor == Cursor(EPOCH, 5)

    def test_a_duplicate_is_nothing(self) -> None:
        for known in (3, 5):
            plan = step(tree(3, (5,)), commit(known, update(A, b"x", 9)))
            assert plan.outcome is Outcome.DUPLICATE
            assert plan.operations == ()


class TestAnotherEpochIsAnotherHistory:
    def test_its_events_only_ask(self) -> None:
        plan = step(tree(3), commit(1, update(A, b"x", 1), epoch="e2"))
        assert plan.outcome is Outcome.EPOCH
        assert plan.gap == Gap(Reason.EPOCH)
        assert plan.tree == tree(3)

    def test_its_changes_are_not_taken(self) -> None:
        assert catch_up(tree(3), Changes("e2", 9, 3, (update(A, b"x", 1),))).gap == Gap(Reason.EPOCH)

    def test_its_full_snapshot_starts_over(self) -> None:
        old = tree(9, (11,), a=entry(b"1", 7), b=entry(b"2", 7))
        new = manifest(2, {A: (b"one", 1)}, epoch="e2")
        plan = reconcile(old, new, staged(new))
        assert paths(plan) == {A: "write", B: "remove"}
        assert plan.tree.cursor == Cursor("e2", 2)
        assert set(plan.tree.entries) == {A}

    def test_so_is_one_that_lost_commits_though_its_epoch_is_the_same(self) -> None:
        old = tree(9, (11,), a=entry(b"1", 7, revision=9), b=entry(b"2", 7, revision=8))
        new = manifest(7, {A: (b"one", 6)})
        assert paths(reconcile(old, new, staged(new))) == {}, "an old snapshot takes nothing back"
        plan = reconcile(old, new, staged(new), forgotten=True)
        assert paths(plan) == {A: "write", B: "remove"}
        assert plan.tree.cursor == Cursor(EPOCH, 7)
        delta = manifest(7, {}, base_revision=3)
        assert reconcile(old, delta, {}, forgotten=True).operations == ()

    def test_its_delta_is_refused(self) -> None:
        delta = manifest(5, {}, epoch="e2", base_revision=3)
        assert reconcile(tree(9), delta, {}).gap == Gap(Reason.EPOCH)


class TestAnAnswerOutranksAnEvent:
    def test_at_equal_version_an_event_asks_and_an_answer_corrects(self) -> None:
        wrong = tree(3, a=entry(b"wrong", 2))
        assert step(wrong, commit(4, update(A, b"right", 2))).gap == Gap(Reason.CONFLICT, frozenset({A}))
        assert paths(catch_up(wrong, Changes(EPOCH, 4, 3, (update(A, b"right", 2),)))) == {A: "write"}

    def test_an_answer_moves_the_cursor_over_islands(self) -> None:
        plan = catch_up(tree(3, (6, 8)), Changes(EPOCH, 6, 3, (update(A, b"x", 1),)))
        assert plan.tree.cursor == Cursor(EPOCH, 6, frozenset({8}))
        assert plan.gap == Gap(Reason.GAP)

    def test_an_answer_for_somewhere_else_is_not_taken(self) -> None:
        assert catch_up(tree(3), Changes(EPOCH, 9, 5, ())).outcome is Outcome.WAITING

    def test_what_was_provisional_is_undone_or_confirmed(self) -> None:
        guess = tree(3, a=entry(b"typed", 2, provisional=True), b=entry(b"new", 0, provisional=True))
        undone = catch_up(guess, Changes(EPOCH, 3, 3, (update(A, b"saved", 2), delete(B, 0))))
        assert paths(undone) == {A: "write", B: "remove"}
        kept = step(guess, commit(4, update(A, b"typed", 3)))
        assert kept.operations == ()
        assert not kept.tree.entries[A].provisional


class TestAbsenceSpeaksOnlyForItsOwnTime:
    def test_a_full_manifest_deletes_what_it_does_not_list(self) -> None:
        full = manifest(5, {A: (b"a", 1)})
        plan = reconcile(tree(3, a=entry(b"a"), b=entry(b"b", revision=2)), full, staged(full))
        assert paths(plan) == {B: "remove"}

    def test_but_not_what_came_later(self) -> None:
        full = manifest(5, {A: (b"a", 1)})
        later = tree(3, (7,), a=entry(b"a"), b=entry(b"b", revision=7))
        assert reconcile(later, full, staged(full)).operations == ()

    def test_an_older_manifest_takes_nothing_back(self) -> None:
        old = manifest(2, {A: (b"old", 1)})
        plan = reconcile(tree(9, a=entry(b"new", 4, revision=9)), old, staged(old))
        assert plan.operations == ()
        assert plan.tree.cursor.revision == 9

    def test_of_its_own_time_it_knows_what_the_database_has_forgotten(self) -> None:
        full = manifest(5, {A: (b"a", 1), B: (b"b", 1)}, deleted={C: 2})
        held = tree(
            5, a=entry(b"lost", 2, revision=4), b=Entry(2, None, revision=5), c=entry(b"lost", 3, revision=4)
        )
        plan = reconcile(held, full, staged(full))
        assert paths(plan) == {A: "write", B: "write", C: "remove"}
        assert plan.tree.entries[A].version == 1

    def test_a_delta_knows_of_no_such_thing(self) -> None:
        delta = manifest(5, {A: (b"a", 1)}, base_revision=3)
        assert reconcile(tree(5, a=entry(b"newer", 2, revision=4)), delta, staged(delta)).operations == ()

    def test_a_delta_speaks_for_what_it_lists(self) -> None:
        delta = manifest(5, {A: (b"2", 2)}, base_revision=3, deleted={B: 4})
        held = tree(3, a=entry(b"1", 1), b=entry(b"b", 3), c=entry(b"c", 1))
        plan = reconcile(held, delta, staged(delta))
        assert paths(plan) == {A: "write", B: "remove"}
        assert plan.tree.cursor.revision == 5

    def test_a_delta_below_its_base_is_refused(self) -> None:
        assert reconcile(tree(2), manifest(5, {}, base_revision=3), {}).gap == Gap(Reason.GAP)

    def test_a_file_that_was_not_staged_and_has_changed_since_is_a_gap(self) -> None:
        full = manifest(5, {A: (b"a", 1)})
        changed = tree(3, a=entry(b"typed", 1, provisional=True))
        assert reconcile(changed, full, {}).gap == Gap(Reason.REFERENCE, frozenset({A}))


class TestEventsWithoutARevision:
    seed = commit(None, update(A, b"x", 2), epoch=None)

    def test_on_a_history_that_counts_them_they_only_ring(self) -> None:
        plan = step(tree(3), self.seed)
        assert (plan.outcome, plan.operations, plan.gap) == (
            Outcome.UNREVISIONED,
            (),
            Gap(Reason.UNREVISIONED),
        )

    def test_optimistic_ones_are_shown_and_remembered_as_unconfirmed(self) -> None:
        plan = step(tree(3, a=entry(b"old", 1)), self.seed, optimistic=True)
        assert plan.outcome is Outcome.PROVISIONAL
        assert plan.tree.entries[A] == entry(b"x", 1, provisional=True)
        assert plan.tree.cursor.revision == 3

    def test_without_a_known_history_they_are_the_truth(self) -> None:
        plain = tree(epoch=None, a=entry(b"old", 1))
        assert paths(step(plain, self.seed)) == {A: "write"}
        assert step(plain, self.seed).gap is None
        assert paths(step(plain, commit(None, delete(A, None), epoch=None))) == {A: "remove"}

    def test_a_revision_on_an_unknown_history_is_applied_and_asks(self) -> None:
        plan = step(tree(epoch=None), commit(7, update(A, b"x", 1)))
        assert paths(plan) == {A: "write"}
        assert plan.gap == Gap(Reason.UNKNOWN_CURSOR)


class TestWhatReallyHappened:
    def test_a_path_this_disk_cannot_hold_stays_as_it_was_and_the_cursor_goes_on(self) -> None:
        before = tree(3, a=entry(b"old", 1))
        after = settle(before, step(before, commit(4, update(A, b"new", 2), update(B, b"b", 1))), {A})
        assert after.entries[A] == entry(b"old", 1)
        assert after.entries[B].is_file
        assert after.cursor.revision == 4

    def test_above_a_hole_the_cursor_waits(self) -> None:
        before = tree(3)
        after = settle(before, step(before, commit(6, update(C, b"c", 1))), {C})
        assert after == before


class TestTheBrake:
    def full(self, count: int) -> Tree:
        return Tree(Cursor(EPOCH, 1), Map({RelPath(f"f{n}"): entry(b"x") for n in range(count)}))

    @pytest.mark.parametrize(
        ("files", "left", "holds"),
        [(1, 0, True), (5, 0, True), (5, 1, False), (30, 16, False), (30, 14, True)],
    )
    def test_it_holds_when_all_or_most_would_go(self, files: int, left: int, holds: bool) -> None:
        new = manifest(2, {RelPath(f"f{n}"): (b"x", 1) for n in range(left)})
        before = self.full(files)
        assert (brake(before, reconcile(before, new, staged(new))) is not None) == holds

    def test_an_empty_tree_that_stays_empty_is_nothing(self) -> None:
        assert brake(tree(), reconcile(tree(), manifest(2, {}), {})) is None


CHANGES = st.lists(
    st.tuples(st.sampled_from([A, B, C]), st.none() | st.binary(max_size=2), st.integers(1, 6)),
    max_size=4,
    unique_by=lambda c: c[0],
)


@given(CHANGES, CHANGES, st.integers(1, 4), st.integers(1, 4))
def test_a_plan_and_its_tree_always_say_the_same(
    first: list[tuple[RelPath, bytes | None, int]],
    second: list[tuple[RelPath, bytes | None, int]],
    r1: int,
    r2: int,
) -> None:
    """Whatever comes: doing a plan's operations on what the tree before says gives what the tree after says."""
    now = tree()
    for revision, changes in ((r1, first), (r2, second)):
        plan = step(
            now, commit(revision, *(delete(p, v) if c is None else update(p, c, v) for p, c, v in changes))
        )
        held = {path: e.digest for path, e in now.entries.items() if e.is_file}
        for operation in plan.operations:
            if isinstance(operation, Remove):
                assert operation.path in held
                del held[operation.path]
            else:
                assert isinstance(operation, Write)
                assert operation.content is not None
                held[operation.path] = digest_of(operation.content)
        assert held == {path: e.digest for path, e in plan.tree.entries.items() if e.is_file}
        assert len({op.path for op in plan.operations}) == len(plan.operations)
        now = plan.tree
