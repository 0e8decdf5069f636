"""The session's life: the table, and what a sweeper makes of it."""

from __future__ import annotations

import re
from pathlib import Path
from uuid import UUID, uuid4

from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.config import Timing
from orchestrator_stub.machines.driver import Owner, machine_name, mark_of, owner_of
from orchestrator_stub.sessions import lifecycle as sessions_module
from orchestrator_stub.sessions.lifecycle import (
    ENDED,
    KEPT,
    PROBLEMS,
    Action,
    Event,
    Session,
    State,
    judge,
    moves,
)

NOW = 1_000_000.0
TIMING = Timing()
moments = st.floats(NOW - 100_000, NOW + 100_000)

sessions = st.builds(
    Session,
    id=st.uuids(),
    project_id=st.uuids(),
    state=st.sampled_from(State),
    generation=st.integers(1, 5),
    idempotency_key=st.none(),
    created_at=moments,
    expires_at=moments,
    state_since=moments,
    claimed_until=st.none() | moments,
    lease_until=st.none() | moments,
    machine_id=st.none() | st.just("m1"),
    problem=st.none() | st.just("broken"),
    image_next=st.none() | st.just("image:2"),
    rolled=st.booleans(),
    waking=st.booleans(),
    trial=st.booleans(),
)


def test_every_state_that_is_not_over_has_a_way_to_the_end() -> None:
    for state in KEPT:
        assert moves(Event.END).get(state) is State.DRAINING
    assert moves(Event.DESTROYED).get(State.DRAINING) is State.GONE


def test_what_is_over_stays_over_but_for_a_new_generation() -> None:
    assert all(moves(event).get(State.GONE) is None for event in Event)
    assert {e for e in Event if State.FAILED in moves(e)} == {Event.REPLACE}


def test_a_late_word_changes_nothing() -> None:
    assert moves(Event.REPORT)[State.SUSPENDED] is State.SUSPENDED
    assert {state for state in State if state in moves(Event.WAKE)} == {State.SUSPENDED}
    assert moves(Event.REPORT).get(State.DRAINING) is None
    assert moves(Event.REPORT).get(State.REQUESTED) is None
    assert State.DRAINING not in moves(Event.TAKE_UP)


def _claimed(session: Session) -> bool:
    return session.claimed_until is not None and session.claimed_until > NOW


def _at_the_end_of_its_wake(session: Session) -> Action:
    return Action.LEAVE if _claimed(session) else Action.RENEW


@given(sessions)
def test_a_sleeping_one_ends_by_its_own_end_alone_and_its_machine_after_twenty_hours(
    session: Session,
) -> None:
    if session.state is not State.SUSPENDED:
        return
    action = judge(session, NOW, TIMING).action
    if session.expires_at <= NOW:
        assert action is Action.DRAIN
    elif session.state_since + 20 * 3600 <= NOW and session.machine_id and not _claimed(session):
        assert action is Action.UNLOAD
    else:
        assert action is Action.LEAVE


@given(sessions)
def test_nothing_in_between_outlives_its_deadline(session: Session) -> None:
    action = judge(session, NOW, TIMING).action
    overdue = session.state_since + TIMING.provision <= NOW or session.expires_at <= NOW
    if session.state in (State.REQUESTED, State.PROVISIONING) and overdue:
        waking = session.waking and session.state is State.PROVISIONING and session.expires_at > NOW
        assert action is (_at_the_end_of_its_wake(session) if waking else Action.DRAIN)
    if session.state in ENDED:
        assert action is Action.LEAVE
    if session.state is State.DRAINING:
        claimed = session.claimed_until is not None and session.claimed_until > NOW
        assert action is (Action.LEAVE if claimed else Action.DESTROY)
    if session.state is State.READY and session.lease_until is not None and session.lease_until <= NOW:
        assert action is Action.DRAIN


@given(sessions)
def test_a_live_session_in_good_order_is_left_alone(session: Session) -> None:
    silent = session.lease_until is not None and session.lease_until <= NOW
    known = session.machine_id is not None
    if session.state is State.READY and session.expires_at > NOW and not silent and known:
        claimed = session.claimed_until is not None and session.claimed_until > NOW
        wanted = session.image_next is not None and not claimed
        assert judge(session, NOW, TIMING).action is (Action.ROLL if wanted else Action.LEAVE)


@given(sessions)
def test_a_rollout_takes_a_preview_away_no_longer_than_its_own_patience(session: Session) -> None:
    """Where somebody had a preview, and where nobody waits: at most `rollout`; a new session has its whole time."""
    if session.state is not State.PROVISIONING or session.expires_at <= NOW or session.waking:
        return
    patience = TIMING.rollout if session.rolled or session.trial else TIMING.provision
    assert (judge(session, NOW, TIMING).action is Action.DRAIN) == (session.state_since + patience <= NOW)


def test_a_machine_that_reported_before_it_was_written_down_is_found() -> None:
    """Its orchestrator was killed between making it and saying so; the agent came up all the same."""
    orphan = Session(
        uuid4(),
        uuid4(),
        State.READY,
        1,
        None,
        NOW,
        NOW + 600,
        NOW,
        claimed_until=NOW - 1,
        lease_until=NOW + 60,
    )
    assert judge(orphan, NOW, TIMING).action is Action.PROVISION
    assert moves(Event.TAKE_UP).get(State.READY) is State.READY


@given(sessions)
def test_an_ordinary_end_is_no_problem(session: Session) -> None:
    judgement = judge(session, NOW, TIMING)
    if session.expires_at <= NOW:
        assert judgement.problem is None


@given(st.none() | st.uuids(), st.uuids(), st.integers(1, 10**6))
def test_a_machine_s_name_speaks_of_its_owner(
    installation: UUID | None, session_id: UUID, generation: int
) -> None:
    mark = mark_of(installation) if installation else None
    name = machine_name(mark, session_id, generation)
    assert owner_of(name) == Owner(session_id, generation, mark)
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,61}[a-z0-9]", name), "a DNS label, as it becomes on every platform"
    for other in (
        machine_name(mark_of(uuid4()), session_id, generation),
        machine_name(mark, uuid4(), generation),
    ):
        assert name != other


@given(
    st.text()
    | st.from_regex(r"preview-([0-9a-f]{11,13}-)?[0-9a-f]{31,33}-g\d{1,3}", fullmatch=True)
    | st.builds("preview-{}-{}-g1".format, st.text(max_size=14), st.uuids().map(lambda session: session.hex))
)
def test_a_foreign_name_is_nobody_of_ours(name: str) -> None:
    owner = owner_of(name)
    if owner is not None:
        assert re.fullmatch(r"preview-([0-9a-f]{12}-)?[0-9a-f]{32}-g[0-9]+", name)
        assert name.startswith(f"preview-{owner.mark}-" if owner.mark else f"preview-{owner.session_id.hex}-")


def test_every_problem_is_in_the_list_that_metrics_go_by() -> None:
    """A problem begins with its name and a colon, wherever in the package it is made."""
    made = set()
    for path in Path(sessions_module.__file__).parent.glob("*.py"):
        made |= set(re.findall(r'(?:problem=f?|Action\.\w+, )"(\w+):', path.read_text()))
    assert made == set(PROBLEMS)
