"""The pure parts of the realtime server: frames, presence, fault settings, rates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from orchestrator_stub.local_supabase.realtime.faults import BadFault, Faults
from orchestrator_stub.local_supabase.realtime.frames import (
    BadFrame,
    Broadcast,
    Version,
    message,
    read_binary,
    read_text,
    websocket_frame,
)
from orchestrator_stub.local_supabase.realtime.limits import Rate
from orchestrator_stub.local_supabase.realtime.presence import Presence

NAMES = st.text(min_size=1, max_size=40)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
VERSIONS = st.sampled_from(Version)


def opened(wire: bytes) -> Frame:
    """The one frame in these bytes, read by `websockets`."""
    reader = StreamReader()
    reader.feed_data(wire)
    reader.feed_eof()
    parsing = Frame.parse(reader.read_exact, mask=False, max_size=None)
    while True:
        try:
            next(parsing)
        except StopIteration as done:
            assert reader.buffer == b""
            frame: Frame = done.value
            return frame


@given(st.sampled_from([0, 1, 125, 126, 127, 65_535, 65_536, 70_000]), st.sampled_from([0x81, 0x82]))
def test_frames_are_what_websockets_reads(size: int, first: int) -> None:
    frame = opened(websocket_frame(first, b"x" * size))
    assert (frame.opcode, len(frame.data), frame.fin) == (Opcode(first & 15), size, True)


@given(VERSIONS, st.one_of(st.text(), st.binary(), JSON.map(json.dumps)))
def test_junk_is_read_or_is_a_bad_frame(version: Version, junk: str | bytes) -> None:
    try:
        push = read_binary(version, junk) if isinstance(junk, bytes) else read_text(version, junk)
    except BadFrame:
        return
    assert isinstance(push.topic, str)
    assert isinstance(push.event, str)


@given(NAMES, NAMES, JSON, st.none() | NAMES, st.none() | NAMES)
def test_a_push_is_read_alike_in_both_versions(
    topic: str, event: str, payload: Any, ref: str | None, join_ref: str | None
) -> None:
    old = {"topic": topic, "event": event, "payload": payload, "ref": ref, "join_ref": join_ref}
    new = [join_ref, ref, topic, event, payload]
    assert read_text(Version.V1, json.dumps(old)) == read_text(Version.V2, json.dumps(new))


@given(NAMES, NAMES, st.binary(), st.booleans(), NAMES, NAMES)
def test_a_binary_push_keeps_its_parts(
    topic: str, event: str, payload: bytes, is_json: bool, ref: str, join_ref: str
) -> None:
    payload = json.dumps(payload.hex()).encode() if is_json else payload
    parts = [part.encode() for part in (join_ref, ref, topic, event, "")]
    whole = bytes([3, *map(len, parts), int(is_json)]) + b"".join(parts) + payload
    push = read_binary(Version.V2, whole)
    assert (push.topic, push.payload, push.ref, push.join_ref) == (topic, {"event": event}, ref, join_ref)
    assert (push.raw, push.raw_json) == (payload, is_json)
    with pytest.raises(BadFrame):
        read_binary(Version.V2, whole[: 7 + sum(map(len, parts)) - 1])


@given(NAMES, NAMES, JSON, st.none() | NAMES, st.none() | NAMES)
def test_the_server_sends_exactly_four_fields_or_five(
    topic: str, event: str, payload: Any, ref: str | None, join_ref: str | None
) -> None:
    old = json.loads(opened(message(Version.V1, topic, event, payload, ref=ref, join_ref=join_ref)).data)
    assert old == {"topic": topic, "event": event, "payload": payload, "ref": ref}
    new = json.loads(opened(message(Version.V2, topic, event, payload, ref=ref, join_ref=join_ref)).data)
    assert new == [join_ref, ref, topic, event, payload]


@given(NAMES, NAMES, JSON, st.none() | st.fixed_dictionaries({"id": NAMES}))
def test_a_broadcast_says_the_same_in_every_form(
    topic: str, event: str, payload: Any, meta: dict[str, Any] | None
) -> None:
    body = json.dumps(payload).encode()
    binary = opened(Broadcast(topic, event, body, meta=meta).encode(Version.V2) or b"")
    data = binary.data
    assert binary.opcode is Opcode.BINARY
    assert (data[0], data[4]) == (4, 1)
    one, two = 5 + data[1], 5 + data[1] + data[2]
    three = two + data[3]
    said = {
        "topic": data[5:one].decode(),
        "event": data[one:two].decode(),
        "payload": json.loads(data[three:]),
    }
    assert said == {"topic": f"realtime:{topic}", "event": event, "payload": payload}
    assert (json.loads(data[two:three]) if data[3] else None) == meta
    for version in Version:
        text = opened(Broadcast(topic, event, body, meta=meta, as_text=True).encode(version) or b"")
        whole = json.loads(text.data)
        inner = whole["payload"] if version is Version.V1 else whole[4]
        wanted = {"type": "broadcast", "event": event, "payload": payload}
        assert inner == (wanted if meta is None else {**wanted, "meta": meta})


def test_what_a_version_cannot_say_is_left_out() -> None:
    assert Broadcast("t", "e", b"\xff", is_json=False).encode(Version.V1) is None
    assert Broadcast("t" * 300, "e", b"{}").encode(Version.V2) is None
    assert Broadcast("t" * 300, "e", b"{}").encode(Version.V1) is not None


NUMBERS = st.integers(0, 6)


@given(NUMBERS, NUMBERS, NUMBERS, st.integers(0, 20))
def test_faults_only_lose_double_or_reorder(drop: int, duplicate: int, reorder: int, count: int) -> None:
    faults = Faults(drop=drop, duplicate=duplicate, reorder=reorder)
    out = [
        int(message.payload)
        for n in range(count)
        for message, _ in faults.passing(Broadcast("t", "n", str(n).encode()), True)
    ]
    held = [int(message.payload) for message, _ in faults.held]
    seen = Counter(out) + Counter(held)
    assert set(seen) == set(range(min(drop, count), count)), "only what was dropped is missing"
    assert sum(n - 1 for n in seen.values()) <= duplicate
    if not reorder:
        assert out == sorted(out)


@given(
    st.dictionaries(
        st.sampled_from(["drop", "refuse", "nothing", "join_delay", "mute_joins"]), JSON, max_size=3
    )
)
def test_bad_settings_change_nothing(wanted: dict[str, Any]) -> None:
    faults = Faults()
    before = faults.report()
    try:
        faults.set(wanted, now=0.0)
    except BadFault:
        assert faults.report() == before


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab"), st.none() | st.integers(0, 2)), max_size=30)
)
def test_a_client_that_follows_the_diffs_has_the_state(steps: Sequence[tuple[int, str, int | None]]) -> None:
    presence, known, owners = Presence(), {}, [object() for _ in range(4)]
    for owner, key, payload in steps:
        diff = (
            presence.untrack(owners[owner])
            if payload is None
            else presence.track(owners[owner], key, {"n": payload})
        )
        for where, entry in (diff or {"leaves": {}, "joins": {}})["leaves"].items():
            for meta in entry["metas"]:
                del known[where, meta["phx_ref"]]
        for where, entry in (diff or {"joins": {}})["joins"].items():
            for meta in entry["metas"]:
                known[where, meta["phx_ref"]] = meta
    state = {
        (key, meta["phx_ref"]): meta for key, entry in presence.state().items() for meta in entry["metas"]
    }
    assert state == known


def test_a_rate_is_an_average_of_at_most_a_minute() -> None:
    now = [0.0]
    rate = Rate(10, lambda: now[0])
    assert not rate.exceeded(10)
    assert rate.exceeded(1)
    now[0] = 1.0
    assert not rate.exceeded(9), "20 in two seconds"
    assert rate.exceeded(1)
    now[0] = 70.0
    assert not rate.exceeded(10), "the past is forgotten"
    assert rate.exceeded(1)
    assert not Rate(None, lambda: now[0]).exceeded(10**9)
