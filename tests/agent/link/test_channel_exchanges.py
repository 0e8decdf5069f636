"""The server's documented exchanges, step by step, as `golden_frames.json` has them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from agent.link.channel import PhoenixChannel
from agent.link.types import Dropped, Joined, Received
from tests.agent.link.frames import GOLDEN, opened, reply
from tests.fakes.realtime import type4


@pytest.mark.parametrize("name", GOLDEN["exchanges"])
def test_golden_exchange(name: str) -> None:
    """Every documented exchange, frame by frame, both ways."""
    link, now = opened(), 0.0
    sent = [json.loads(text) for text in link.outgoing()]
    for step in GOLDEN["exchanges"][name]:
        if "join" in step or "us_join" in step:
            assert sent.pop(0)[3] == "phx_join"
        if "join" in step:
            assert link.receive(reply("1"), now) == Joined()
        if "after" in step:
            now = advance(link, now, step["after"], sent)
        if "token" in step:
            link.new_token(step["token"], now)
        if "leave" in step:
            link.leave()
        sent += [json.loads(text) for text in link.outgoing()]
        if "us" in step:
            assert sent.pop(0) == step["us"]
        if "it" in step or "it_binary" in step:
            expect(link, step, now)


def expect(link: PhoenixChannel, step: dict[str, Any], now: float) -> None:
    """The server's frame means what the golden file says."""
    before = link.ignored.total()
    if "it_binary" in step:
        fields = step["it_binary"]
        raw = type4(
            fields["topic"], fields["event"], fields["payload"], fields.get("meta"), fields.get("encoding", 1)
        )
    else:
        raw = json.dumps(step["it"]).encode()
    event = link.receive(raw, now)
    assert (type(event).__name__ if event is not None else None) == step["means"]
    if isinstance(event, Received):
        assert (event.event, event.payload) == (step["event"], step["payload"])
    if isinstance(event, Dropped):
        assert event.cause == step["cause"]
    if "ignored" in step:
        assert link.ignored[step["ignored"]] == 1
        assert link.ignored.total() == before + 1
    if "state" in step:
        assert link.machine.state == step["state"]


def advance(link: PhoenixChannel, now: float, seconds: float, sent: list[Any]) -> float:
    """Let time pass, every heartbeat answered; what is written at the very end goes to `sent` unanswered."""
    end = now + seconds
    while (at := link.next_deadline()) is not None and at <= end:
        assert link.tick(at) is None
        for fields in map(json.loads, link.outgoing()):
            if at == end:
                sent.append(fields)
            else:
                assert fields[3] == "heartbeat"
                link.receive(reply(fields[1], topic="phoenix"), at)
    return end


# --- deadlines
