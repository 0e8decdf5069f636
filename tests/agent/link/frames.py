"""A channel whose join is under way, and what the server sends to it."""

from __future__ import annotations

import json
from pathlib import Path

from agent.link.channel import PhoenixChannel
from agent.link.types import LinkStateMachine

GOLDEN = json.loads((Path(__file__).parent / "golden_frames.json").read_text())
TOPIC = GOLDEN["topic"]


def opened(at: float = 0.0) -> PhoenixChannel:
    link = PhoenixChannel(TOPIC, LinkStateMachine())
    link.opened(at, "JWT")
    return link


def frame(*fields: object) -> bytes:
    return json.dumps(fields).encode()


def reply(ref: str | None, status: str = "ok", response: object = None, topic: str = TOPIC) -> bytes:
    return frame(ref, ref, topic, "phx_reply", {"status": status, "response": response or {}})


def system(status: str, message: str, join_ref: str | None = "1") -> bytes:
    body = {"extension": "system", "status": status, "message": message, "channel": "project:p1"}
    return frame(join_ref, None, TOPIC, "system", body)
