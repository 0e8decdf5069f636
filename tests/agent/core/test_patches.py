"""Splices in the agent: what they make, and that they are chained where saves come close together."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent.core.model import Change, Commit, Cursor, Entry, Patch, RelPath, Tree, Write, digest_of
from agent.core.patches import MOST_BYTES, Patches, PatchOutcome
from agent.core.reconcile import Reason
from agent.core.scheduler import SPACING, Follower
from tests.agent.core.test_scheduler_machine import patch_of
from tests.profiles import examples

PATH = RelPath("a.ts")
EPOCH = "e"


@given(before=st.binary(max_size=40), after=st.binary(max_size=40))
@examples(200, 10_000)
def test_a_patch_makes_what_it_was_made_for(before: bytes, after: bytes) -> None:
    assert patch_of(before, after).applied_to(before) == after


@given(
    base=st.binary(max_size=8),
    splices=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10), st.binary(max_size=3)), max_size=4),
)
@examples(200, 10_000)
def test_splices_that_do_not_fit_make_nothing(base: bytes, splices: list[tuple[int, int, bytes]]) -> None:
    made = Patch(digest_of(base), tuple(splices)).applied_to(base)
    ends = [0, *(at + removed for at, removed, _ in splices)]
    fits = all(before <= at for before, (at, _, _) in zip(ends, splices, strict=False)) and ends[-1] <= len(
        base
    )
    assert (made is not None) == fits
    if made is not None:
        assert len(made) == len(base) + sum(len(insert) - removed for _, removed, insert in splices)


def update(revision: int, before: bytes, after: bytes) -> Commit:
    """The event of a save that says how its content differs from the one before."""
    change = Change(PATH, digest_of(after), revision, None, len(after), patch=patch_of(before, after))
    return Commit("file:update", (change,), revision, EPOCH)


class Agent:
    """A follower of one file and its disk."""

    def __init__(self, content: bytes) -> None:
        entry = Entry(1, digest_of(content), len(content), revision=1)
        tree = Tree(Cursor(EPOCH, 1))
        self.follower = Follower(Tree(tree.cursor, tree.entries.set(PATH, entry)))
        self.disk: bytes | None = content
        self.written: list[bytes] = []

    def receive(self, commit: Commit, now: float) -> None:
        changes = self.follower.patched(commit.changes, lambda path, size: self.disk)
        self.follower.receive(Commit(commit.event, changes, commit.revision, commit.epoch), now)
        while (ready := self.follower.ready(now)) is not None:
            for operation in ready.plan.operations:
                assert isinstance(operation, Write)
                assert operation.content is not None
                self.disk = operation.content
                self.written.append(operation.content)
            self.follower.settle(ready.plan, now)

    @property
    def outcomes(self) -> dict[PatchOutcome, int]:
        return dict(self.follower.patches.outcomes)


def test_saves_within_the_spacing_are_chained() -> None:
    agent = Agent(b"v1")
    for revision, now in ((2, 0.0), (3, 0.01), (4, 0.02), (5, 0.03)):
        agent.receive(update(revision, b"v%d" % (revision - 1), b"v%d" % revision), now)
    assert agent.written == [b"v2"], "the others wait"
    agent.receive(Commit("bulk:apply", (), 6, EPOCH), SPACING)
    assert agent.written == [b"v2", b"v5"]
    assert (agent.follower.needs, agent.outcomes) == ((), {PatchOutcome.APPLIED: 4})
    assert agent.follower.tree.cursor.revision == 6


def test_what_is_not_the_base_is_fetched_and_nothing_else_is_lost() -> None:
    agent = Agent(b"v1")
    agent.receive(update(3, b"v2", b"v3"), 0.0)  # the second was lost
    assert (agent.written, agent.outcomes) == ([], {PatchOutcome.NO_BASE: 1})
    assert Reason.REFERENCE in agent.follower.needs
    assert agent.follower.pending_paths == {PATH}


def test_a_file_that_something_else_changed_is_fetched() -> None:
    agent = Agent(b"v1")
    for disk in (b"changed meanwhile", None):
        agent.disk = disk
        agent.receive(update(2, b"v1", b"v2"), 0.0)
        assert agent.disk == disk
    assert agent.outcomes == {PatchOutcome.MISMATCH: 1, PatchOutcome.NO_BASE: 1}
    assert agent.follower.pending_paths == {PATH}


def test_one_commit_reads_a_bounded_number_of_bytes() -> None:
    """A bulk of splices is short; what they are of need not be."""
    content = bytes(MOST_BYTES // 2 - 1)
    entry = Entry(1, digest_of(content), len(content), revision=1)
    paths = [RelPath(f"{n}.bin") for n in range(3)]
    changes = [
        Change(path, digest_of(content + b"!"), 2, patch=patch_of(content, content + b"!")) for path in paths
    ]
    patches = Patches()
    made = patches.made(changes, dict.fromkeys(paths, entry), [], lambda path, size: content)
    assert [change.by_reference for change in made] == [False, False, True]


def test_a_repeat_is_not_counted_and_saved_bytes_are() -> None:
    agent = Agent(b"0123456789" * 100)
    commit = update(2, b"0123456789" * 100, b"0123456789" * 100 + b"!")
    agent.receive(commit, 0.0)
    agent.receive(commit, 1.0)
    assert agent.outcomes == {PatchOutcome.APPLIED: 1}
    assert agent.follower.patches.saved_bytes == 1000
