"""When a catch-up is made: what single steps say that the state machine would not name."""

from __future__ import annotations

import pytest
from msgspec import structs

from agent.core import scheduler
from agent.core.messages import Changes, Head
from agent.core.model import Change, Commit, Cursor, Manifest, RelPath, Tree, digest_of, tree_hash
from agent.core.reconcile import Reason, catch_up, reconcile
from agent.core.scheduler import MOST_PATHS, Follower

A, B = RelPath("a"), RelPath("b")


def commit(revision: int) -> Commit:
    return Commit("file:update", (Change(RelPath("a"), None, 1),), revision=revision, epoch="e")


@pytest.fixture
def follower() -> Follower:
    return Follower(Tree(Cursor("e", 1)))


def failed(follower: Follower, now: float, wait: float) -> None:
    follower.need(Reason.GAP, now)
    assert follower.request(now) is not None
    follower.failed(now, wait)


@pytest.mark.parametrize("reason", sorted(set(Reason) - {Reason.JOIN}))
def test_a_need_that_arises_during_the_wait_after_a_failure_does_not_shorten_it(
    follower: Follower, reason: Reason
) -> None:
    """The peer may have asked for that wait; and every save would be a question to an orchestrator that is away."""
    failed(follower, 0.0, 60.0)
    follower.need(reason, 1.0)
    assert follower.request(59.9) is None
    assert follower.next_deadline() == 60.0
    assert follower.request(60.0) is not None


def test_a_join_ends_the_wait_as_the_connection_is_new_and_so_may_be_the_token(follower: Follower) -> None:
    failed(follower, 0.0, 60.0)
    follower.need(Reason.JOIN, 1.0)
    assert follower.next_deadline() == 1.0
    request = follower.request(1.0)
    assert request is not None
    assert request.reason is Reason.JOIN
    follower.failed(1.0, 60.0)
    assert follower.request(60.9) is None
    assert follower.request(61.0) is not None


def test_nor_does_an_event_above_the_hole(follower: Follower) -> None:
    failed(follower, 0.0, 60.0)
    follower.receive(commit(5), 1.0)
    ready = follower.ready(1.0)
    assert ready is not None
    follower.settle(ready.plan, 1.0)
    assert follower.request(59.9) is None
    assert follower.request(60.0) is not None


def test_after_an_answer_nothing_is_waited_for(follower: Follower) -> None:
    failed(follower, 0.0, 60.0)
    assert follower.request(60.0) is not None
    follower.answered(60.0)
    follower.need(Reason.JOIN, 60.0)
    assert follower.request(60.0) is not None


# --- a question that is too large


def names(many: int, length: int = 4) -> list[RelPath]:
    return [RelPath(f"{n:0{length}}") for n in range(many)]


@pytest.mark.parametrize(
    ("paths", "whole"),
    [
        (names(MOST_PATHS), False),
        (names(MOST_PATHS + 1), True),
        (names(100, 240), False),
        (names(103, 240), True),
    ],
    ids=["few", "many", "short", "long"],
)
def test_past_some_hundred_paths_everything_is_asked_for(
    follower: Follower, paths: list[RelPath], whole: bool
) -> None:
    follower.doubt(paths, 0.0)
    request = follower.request(1.0)
    assert request is not None
    assert (request.epoch, request.paths) == ((None, frozenset()) if whole else ("e", frozenset(paths)))
    assert request.reason is Reason.DRIFT
    follower.answered(1.0)
    assert follower.settled


def test_a_question_that_is_too_large_is_asked_otherwise_until_it_is_answered(follower: Follower) -> None:
    follower.doubt([A], 0.0)
    assert follower.request(1.0) is not None
    follower.failed(1.0, 1.0, too_large=True)
    for now in (2.0, 4.0):
        request = follower.request(now)
        assert request is not None
        assert (request.epoch, request.revision, request.paths) == (None, 0, frozenset())
        follower.failed(now, 1.0, too_large=True)
    assert follower.request(6.0) is not None
    follower.answered(6.0)
    follower.doubt([A], 60.0)
    again = follower.request(61.0)
    assert again is not None
    assert again.paths == {A}


# --- a path that the disk cannot hold


def write(path: RelPath, version: int = 1, revision: int = 2) -> Commit:
    content = b"%d" % version
    return Commit("file:update", (Change(path, digest_of(content), version, content),), revision, "e")


def fail(follower: Follower, commit: Commit, now: float) -> None:
    follower.receive(commit, now)
    ready = follower.ready(now)
    assert ready is not None
    follower.settle(ready.plan, now, failed={change.path for change in commit.changes})


def test_a_path_that_failed_is_asked_for_at_growing_intervals_and_at_once_when_the_obstacle_moves(
    follower: Follower,
) -> None:
    fail(follower, write(A), 0.0)
    assert (follower.tree.cursor.revision, set(follower.unusable)) == (2, {A})
    now, waits = 0.0, []
    for _ in range(9):
        due = follower.next_deadline()
        assert due is not None
        assert follower.request(due - 0.001) is None
        request = follower.request(due)
        assert request is not None
        assert (request.reason, request.paths) == (Reason.DISK, {A})
        answer = Changes("e", 2, 2, write(A).changes)
        follower.settle(catch_up(follower.tree, answer), due, failed={A})
        follower.answered(due, 2)
        waits.append(due - now)
        now = due
    assert waits == [5, 10, 20, 40, 80, 160, 300, 300, 300]
    follower.obstacle_moved([A, B], now + 1)
    assert follower.next_deadline() == now + 1
    request = follower.request(now + 1)
    assert request is not None
    follower.settle(catch_up(follower.tree, answer), now + 1)
    follower.answered(now + 1, 2)
    assert (set(follower.unusable), follower.next_deadline()) == (set(), None)


def test_a_path_that_is_gone_from_the_database_is_not_tried_again(follower: Follower) -> None:
    fail(follower, write(A), 0.0)
    assert follower.request(5.0) is not None
    answer = Changes("e", 2, 2, (Change(A, None, 0),))
    follower.settle(catch_up(follower.tree, answer), 5.0)
    follower.answered(5.0, 2)
    assert set(follower.unusable) == set()


def test_an_event_that_can_be_written_ends_it_too(follower: Follower) -> None:
    fail(follower, write(A), 0.0)
    follower.receive(write(A, 2, 3), 1.0)
    ready = follower.ready(1.0)
    assert ready is not None
    follower.settle(ready.plan, 1.0)
    assert set(follower.unusable) == set()


# --- the tree hash


def head_of(files: dict[RelPath, bytes], revision: int) -> Head:
    return Head("e", revision, tree_hash({path: digest_of(content) for path, content in files.items()}))


def asked(follower: Follower, head: Head, now: float) -> bool:
    follower.compare(head, now)
    return follower.request(now) is not None


def test_what_is_known_to_be_missing_is_no_other_tree(follower: Follower) -> None:
    """A path in whose way something stands, one that is asked about: neither makes a snapshot of everything."""
    fail(follower, write(A), 0.0)
    assert not asked(follower, head_of({A: b"1"}, 2), 1.0)
    assert asked(follower, head_of({A: b"1", B: b"?"}, 2), 2.0), "but the rest counts"
    follower.answered(2.0, 2)
    follower.doubt([B], 100.0)
    follower.compare(head_of({B: b"?"}, 2), 100.1)
    assert follower.needs == (Reason.DRIFT,)


def test_a_snapshot_that_did_not_help_is_asked_for_ever_less_often_whatever_is_saved(
    follower: Follower,
) -> None:
    times = []
    for now in range(0, 20_000, 30):
        follower.adopt(structs.replace(follower.tree, cursor=Cursor("e", now + 1)))
        if asked(follower, head_of({A: b"never"}, now + 1), now):
            times.append(now)
            follower.answered(now, now + 1)
    assert times == [0, 60, 180, 420, 900, 1860, 3780, 7380, 10980, 14580, 18180]
    assert not asked(follower, head_of({}, follower.tree.cursor.revision), 20_000)
    assert asked(follower, head_of({A: b"x"}, follower.tree.cursor.revision), 20_030), (
        "it was right in between"
    )


# --- a database that forgot commits


def test_a_head_below_what_we_had_when_we_asked_has_forgotten(follower: Follower) -> None:
    follower.adopt(Tree(Cursor("e", 9)))
    follower.compare(Head("e", 7), 0.0, Cursor("e", 7))
    assert follower.behind is None, "it was read before the latest event"
    follower.compare(Head("e", 7), 0.0, Cursor("e", 9))
    assert follower.behind == 7
    request = follower.request(1.0)
    assert request is not None
    assert request.reason is Reason.HEAD
    manifest = Manifest("p", "e", 7, {}, {})
    follower.settle(reconcile(follower.tree, manifest, {}, forgotten=True), 1.0)
    follower.answered(1.0, 7)
    assert (follower.tree.cursor, follower.head_revision, follower.behind) == (Cursor("e", 7), 7, None)
    assert follower.settled


# --- bounds


def test_commits_that_wait_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_WAITING_BYTES", 1000)
    follower = Follower(Tree(Cursor("e", 1)))
    big = Commit("file:update", (Change(A, digest_of(b"x"), 2, b"x" * 400),), revision=2, epoch="e")
    follower.receive(big, 0.0)
    follower.receive(big, 0.0)
    assert (len(follower.waiting), follower.needs) == (2, ())
    follower.receive(big, 0.0)
    assert (len(follower.waiting), follower.needs) == (0, (Reason.OVERFLOW,))
    for _ in range(5):
        follower.receive(big, 0.0)
        assert follower.ready(0.0) is not None, "what is applied does not count"


def test_drift_that_goes_on_is_asked_about_ever_less_often(follower: Follower) -> None:
    """A program that writes our files as fast as they are restored is not a question a moment."""
    times = []
    for tenth in range(600):
        now = tenth / 10
        follower.doubt([A], now)
        if follower.request(now) is not None:
            times.append(now)
            follower.answered(now)
    assert len(times) <= 9
    follower.doubt([A], 200.0)
    assert follower.request(200.3) is not None, "after a rest it is asked at once"
