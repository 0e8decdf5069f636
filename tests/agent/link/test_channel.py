"""The channel protocol: deadlines, tokens, junk, and one theorem: silence always ends a socket."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.link.channel import PhoenixChannel
from agent.link.types import (
    TRANSITIONS,
    WITH_SOCKET,
    Cause,
    Dropped,
    Joined,
    LinkState,
    LinkStateMachine,
    Received,
    Refused,
    ReplicationReady,
    Timing,
    TokenExpired,
)
from tests.agent.link.frames import TOPIC, frame, opened, reply, system
from tests.fakes.realtime import type4
from tests.profiles import examples

TIMING = Timing()
WORST_SILENCE = TIMING.heartbeat_every + TIMING.heartbeat_within


def joined(at: float = 0.0) -> PhoenixChannel:
    link = opened(at)
    link.outgoing()
    assert link.receive(reply("1"), at) == Joined()
    return link


def live(at: float = 0.0) -> PhoenixChannel:
    link = joined(at)
    link.receive(system("ok", "Replication connection established"), at)
    link.machine.caught_up()
    assert link.machine.state is LinkState.LIVE
    return link


# --- the server's documented exchanges


def test_an_unanswered_heartbeat_ends_the_socket() -> None:
    link = live()
    assert link.tick(20.0) is None
    assert link.next_deadline() == 30.0
    assert link.tick(29.99) is None
    dropped = link.tick(30.0)
    assert isinstance(dropped, Dropped)
    assert dropped.cause == "heartbeat_timeout"
    assert link.machine.state is LinkState.BACKOFF


def test_only_the_reply_to_the_latest_heartbeat_counts() -> None:
    link = live()
    link.tick(20.0)
    for ref in (None, "1", "99", 2, []):
        link.receive(frame(None, ref, "phoenix", "phx_reply", {"status": "ok", "response": {}}), 21.0)
    assert isinstance(link.tick(30.0), Dropped)


def test_broadcasts_do_not_stand_in_for_a_heartbeat_reply() -> None:
    link = live()
    link.tick(20.0)
    for second in range(21, 30):
        assert link.receive(type4(TOPIC, "file:update", {}), second) is not None
    assert isinstance(link.tick(30.0), Dropped)


def test_a_late_tick_reads_before_it_judges() -> None:
    """Our own loop stalled for a minute; the reply lies unread in the socket."""
    link = live()
    link.tick(20.0)
    ref = json.loads(link.outgoing()[-1])[1]
    assert link.tick(90.0) is None
    link.receive(reply(ref, topic="phoenix"), 90.5)
    assert link.tick(91.0) is None
    assert link.machine.state is LinkState.LIVE


def test_a_late_tick_still_ends_a_dead_socket() -> None:
    link = live()
    link.tick(20.0)
    assert link.tick(90.0) is None
    assert isinstance(link.tick(91.0), Dropped)


def test_a_join_without_reply_ends_the_socket() -> None:
    link = opened()
    assert link.tick(19.0) is None
    dropped = link.tick(20.0)
    assert isinstance(dropped, Dropped)
    assert dropped.cause == "join_timeout"
    assert link.receive(reply("1"), 21.0) is None, "a late reply finds nothing to join"


def test_a_server_that_never_says_replication_ready_is_live_all_the_same() -> None:
    link = joined()
    link.machine.caught_up()
    assert link.machine.state is LinkState.CATCHING_UP
    assert link.next_deadline() == TIMING.replication_within
    link.tick(TIMING.replication_within)
    assert link.machine.state is LinkState.LIVE


def test_late_replication_means_behind_again() -> None:
    link = joined()
    link.machine.caught_up()
    link.tick(TIMING.replication_within)
    assert link.receive(system("ok", "Replication connection established"), 9.0) == ReplicationReady()
    assert link.machine.state is LinkState.CATCHING_UP
    link.machine.caught_up()
    assert link.machine.state is LinkState.LIVE


def test_replication_ready_before_the_join_reply_counts() -> None:
    link = opened()
    assert link.receive(system("ok", "Replication connection established"), 0.0) is None
    assert link.receive(reply("1"), 0.0) == Joined()
    link.machine.caught_up()
    assert link.machine.state is LinkState.LIVE


def test_replication_readiness_is_of_one_join() -> None:
    link = live()
    link.receive(system("error", "Token has expired 0 seconds ago"), 1.0)
    link.new_token("JWT2", 1.0)
    link.receive(reply("2"), 1.0)
    link.machine.caught_up()
    assert link.machine.state is LinkState.CATCHING_UP


# --- tokens


def test_a_token_that_comes_during_the_join_follows_its_reply() -> None:
    link = opened()
    link.outgoing()
    link.new_token("JWT2", 1.0)
    assert link.outgoing() == []
    link.receive(reply("1"), 2.0)
    assert [json.loads(text)[3:] for text in link.outgoing()] == [["access_token", {"access_token": "JWT2"}]]


def test_a_second_expiry_in_a_row_is_a_refusal() -> None:
    link = opened()
    error = {"reason": "InvalidJWTToken: Token has expired 3600 seconds ago"}
    assert isinstance(link.receive(reply("1", "error", error), 0.0), TokenExpired)
    link.new_token("JWT2", 0.0)
    assert isinstance(link.receive(reply("2", "error", error), 0.0), Refused)
    assert link.machine.state is LinkState.REFUSED


def test_an_expired_link_keeps_its_heartbeat_while_it_waits_for_a_token() -> None:
    link = live()
    link.receive(system("error", "Token has expired 0 seconds ago"), 5.0)
    assert link.machine.state is LinkState.JOINING
    assert link.next_deadline() == 20.0
    link.tick(20.0)
    assert isinstance(link.tick(30.0), Dropped)


def test_what_an_old_join_says_late_is_not_about_ours() -> None:
    link = live()
    link.receive(system("error", "Token has expired 0 seconds ago"), 5.0)
    link.new_token("JWT2", 5.0)
    link.receive(reply("2"), 5.0)
    for late in (
        system("error", "Token has expired 0 seconds ago", "1"),
        frame("1", "1", TOPIC, "phx_close", {}),
        frame("1", "1", TOPIC, "phx_error", {}),
        frame(None, "1", TOPIC, "phx_reply", {"status": "error", "response": {"reason": "unmatched topic"}}),
    ):
        assert link.receive(late, 6.0) is None
    assert link.machine.state is LinkState.CATCHING_UP


# --- the table


def test_the_table_has_a_way_out_of_every_state_and_a_way_to_live() -> None:
    """From everywhere the link can come back to live."""
    reach = {LinkState.LIVE}
    while more := {source for (source, _), target in TRANSITIONS.items() if target in reach} - reach:
        reach |= more
    assert reach == set(LinkState)


def test_every_state_with_a_socket_can_lose_it_and_no_other_row_leaves_a_socket_unowned() -> None:
    for state in LinkState:
        ends = {(state, Cause.LOST) in TRANSITIONS, (state, Cause.REFUSED) in TRANSITIONS}
        assert ends == {state in WITH_SOCKET or state is LinkState.CONNECTING}
        assert ((state, Cause.RETRY) in TRANSITIONS) == (state in (LinkState.BACKOFF, LinkState.REFUSED))


def test_late_inputs_are_ignored() -> None:
    link = PhoenixChannel(TOPIC, LinkStateMachine())
    link.machine.caught_up()
    link.machine.behind("overflow")
    assert not link.machine.move(Cause.RETRY, "retry")
    link.new_token("JWT", 0.0)
    assert link.tick(1e9) is None
    assert link.receive(reply("1"), 0.0) is None
    assert link.machine.state is LinkState.CONNECTING
    assert link.outgoing() == []


# --- junk

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
json_values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v)
)
refs = st.sampled_from([None, "0", "1", "2", "3", "99999999999999999999999", "²", "-1", ""]) | scalars
topics = st.sampled_from([TOPIC, "phoenix", "realtime:project:p2", ""]) | st.text(max_size=8)
events = st.sampled_from(
    ["phx_reply", "phx_close", "phx_error", "system", "broadcast", "presence_state", "access_token"]
) | st.text(max_size=8)
words = st.sampled_from(
    ["ok", "error", "system", "Token has expired", "Unauthorized: no", "Too many joins", "unmatched topic",
     "Replication connection established"]
) | json_values  # fmt: skip
payloads = (
    st.fixed_dictionaries(
        {},
        optional={
            name: words | st.fixed_dictionaries({"reason": words})
            for name in ("status", "response", "message", "extension", "event", "payload", "meta", "type")
        },
    )
    | json_values
)
near_frames = st.tuples(refs, refs, topics, events, payloads).map(lambda fields: frame(*fields))
binaries = st.builds(
    lambda head, lengths, encoding, tail: bytes((head, *lengths, encoding)) + tail,
    st.sampled_from([3, 4, 4, 4, 5]),
    st.tuples(*[st.integers(0, 255)] * 3),
    st.integers(0, 3),
    st.binary(max_size=64) | st.just(TOPIC.encode() + b"file:update{}"),
)
bytes_of_text = st.text(max_size=200).map(lambda text: text.encode(errors="surrogatepass"))
no_frames = (
    st.binary(max_size=200) | bytes_of_text | json_values.map(lambda value: json.dumps(value).encode())
)
junk = no_frames | near_frames | binaries


@given(st.lists(junk, max_size=20))
def test_junk_never_raises_and_the_machine_stays_whole(frames: list[bytes]) -> None:
    link = live()
    for number, raw in enumerate(frames):
        link.receive(raw, float(number))
        assert (link.machine.state in WITH_SOCKET) == (link.next_deadline() is not None)


@pytest.mark.parametrize(
    "raw",
    [
        b'[null,null,"realtime:project:p1","system",{}]',
        b'[null,null,"realtime:project:p1","system",{"message":""}]',
    ],
)
def test_an_error_without_a_word_is_a_loss_with_a_reason(raw: bytes) -> None:
    dropped = live().receive(raw, 1.0)
    assert isinstance(dropped, Dropped)
    assert dropped.reason


@pytest.mark.parametrize("field", ["reason", "response", "message", "event", "extension"])
def test_what_is_nested_as_deep_as_json_is_read_never_raises(field: str) -> None:
    deep = "[" * 1000 + "]" * 1000
    for link in (opened(), live()):
        said = {
            "reason": ["phx_reply", f'{{"status": "error", "response": {{"reason": {deep}}}}}'],
            "response": ["phx_reply", f'{{"status": "error", "response": {deep}}}'],
            "message": ["system", f'{{"status": "error", "message": {deep}}}'],
            "event": ["broadcast", f'{{"event": {deep}, "payload": {{}}}}'],
            "extension": ["system", f'{{"status": "error", "extension": {deep}}}'],
        }[field]
        event = link.receive(f'["1", "1", "{TOPIC}", "{said[0]}", {said[1]}]'.encode(), 1.0)
        assert len(getattr(event, "reason", "")) < 1000
        assert len(link.machine.why) < 1000


@given(st.lists(no_frames, max_size=20))
def test_what_is_no_frame_never_ends_a_live_link(frames: list[bytes]) -> None:
    link = live()
    for raw in frames:
        assert link.receive(raw, 1.0) is None
    assert link.machine.state is LinkState.LIVE


@given(near_frames.filter(lambda text: json.loads(text)[2] != TOPIC))
def test_other_topics_never_end_a_live_link(raw: bytes) -> None:
    link = live()
    assert link.receive(raw, 1.0) is None
    assert link.machine.state is LinkState.LIVE


@given(st.binary(min_size=0, max_size=300), st.integers(0, 400))
def test_a_torn_binary_frame_is_junk(body: bytes, cut: int) -> None:
    whole = type4(TOPIC, "file:update", {"content": body.hex()}, {"id": "1"})
    link = live()
    event = link.receive(whole[:cut], 1.0)
    assert event is None or cut >= len(whole)
    assert link.machine.state is LinkState.LIVE


characters = st.text(st.characters(codec="utf-8"), max_size=20)
sane = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | characters,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(characters, v, max_size=4),
)  # fmt: skip


@given(st.dictionaries(characters, sane, max_size=5), st.booleans())
def test_a_payload_arrives_as_it_was_sent(payload: dict[str, Any], binary: bool) -> None:
    body = {"event": "file:update", "payload": payload}
    raw = type4(TOPIC, "file:update", payload) if binary else frame(None, None, TOPIC, "broadcast", body)
    assert live().receive(raw, 1.0, 2.0) == Received("file:update", payload, 2.0)


# --- the theorem


class AnyHistory(RuleBasedStateMachine):
    """Whatever happened before: every move is in the table, and silence ends the socket in 30 seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.machine = LinkStateMachine(self.observe)
        self.link = PhoenixChannel(TOPIC, self.machine)
        self.sent: list[list[Any]] = []
        self.behind_since_catch_up = True

    def observe(self, source: LinkState, cause: Cause, target: LinkState, why: str) -> None:
        assert TRANSITIONS[source, cause] is target
        assert why

    @initialize()
    def connect(self) -> None:
        self.link.opened(self.now, "JWT")

    def take(self) -> None:
        self.sent += [json.loads(text) for text in self.link.outgoing()]

    @rule(seconds=st.floats(0, 25))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        while (at := self.link.next_deadline()) is not None and at <= end:
            self.now = max(self.now, at)
            self.link.tick(self.now)
            self.take()
        self.now = end

    @rule()
    def heartbeats_are_answered(self) -> None:
        self.take()
        for fields in self.sent:
            if fields[3] == "heartbeat":
                self.link.receive(reply(fields[1], topic="phoenix"), self.now)
        self.sent = [fields for fields in self.sent if fields[3] != "heartbeat"]

    @rule(
        status=st.sampled_from(["ok", "error"]),
        reason=st.sampled_from(
            ["Token has expired", "Unauthorized: no", "Too many joins per second", "other"]
        ),
    )
    def joins_are_answered(self, status: str, reason: str) -> None:
        self.take()
        for fields in self.sent:
            if fields[3] == "phx_join":
                self.link.receive(reply(fields[1], status, {"reason": reason}), self.now)
        self.sent = [fields for fields in self.sent if fields[3] != "phx_join"]

    @rule(raw=junk)
    def junk_comes(self, raw: bytes) -> None:
        self.link.receive(raw, self.now)

    @rule(
        status=st.sampled_from(["ok", "error"]),
        message=st.sampled_from(
            ["Replication connection established", "Token has expired 0 seconds ago", "Too many"]
        ),
    )
    def system_message(self, status: str, message: str) -> None:
        self.link.receive(system(status, message, None), self.now)

    @rule()
    def new_token(self) -> None:
        self.link.new_token("JWT2", self.now)

    @rule()
    def catches_up(self) -> None:
        self.machine.caught_up()

    @rule()
    def falls_behind(self) -> None:
        self.machine.behind("overflow")
        assert self.machine.state is not LinkState.LIVE

    @rule()
    def socket_breaks(self) -> None:
        self.link.close()
        self.machine.move(Cause.LOST, "reset")

    @precondition(lambda self: self.machine.state not in WITH_SOCKET)
    @rule()
    def opens_again(self) -> None:
        self.machine.move(Cause.RETRY, "retry")
        self.sent.clear()
        self.link = PhoenixChannel(TOPIC, self.machine)
        self.link.opened(self.now, "JWT")
        self.take()
        assert [fields[3] for fields in self.sent] == ["phx_join"]

    @invariant()
    def a_socket_has_a_deadline(self) -> None:
        assert (self.machine.state in WITH_SOCKET) == (self.link.next_deadline() is not None)

    @invariant()
    def refs_never_repeat(self) -> None:
        seen = [fields[1] for fields in self.sent]
        assert len(set(seen)) == len(seen)

    def teardown(self) -> None:
        """The server falls silent here, whatever the history."""
        fell_silent = self.now
        while (at := self.link.next_deadline()) is not None:
            assert at <= fell_silent + WORST_SILENCE, "a silent link would be kept"
            self.now = max(self.now, at)
            self.link.tick(self.now)
        assert self.machine.state in (LinkState.BACKOFF, LinkState.REFUSED, LinkState.CONNECTING)


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = examples(100, 1_000)
