"""When a catch-up is made: what single steps say that the state machine would not name."""

from __future__ import annotations

import pytest

from agent.core.model import Change, Commit, Cursor, RelPath, Tree
from agent.core.reconcile import Reason
from agent.core.scheduler import Follower


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
