"""Injects faults into the realtime server, on one that was started with `faults=True`.

Two kinds: a *setting* stays until it is used up or cleared, and stands in the way of traffic; an *action* happens
once, to the sockets that are open now (`Realtime.act`).

    settings   drop N, duplicate N, reorder N          the next N broadcasts
               join_delay S, mute_joins, mute_heartbeats
               refuse STATUS with ERROR, N times       handshakes answered 401, 429 …
               blackout S                              every frame of both ways is lost, sockets stay open
    actions    close CODE, abort, oversize BYTES, rate_limit, expire_tokens, crash
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from orchestrator_stub.local_supabase.realtime.frames import Broadcast

ACTIONS = frozenset({"close", "abort", "oversize", "rate_limit", "expire_tokens", "crash"})


class BadFault(Exception):
    """A fault that does not exist, or whose parameter is of the wrong kind."""


@dataclass(slots=True)
class Faults:
    """The settings in force. Times in seconds; `blackout_until` on the loop's clock."""

    drop: int = 0
    duplicate: int = 0
    reorder: int = 0
    join_delay: float = 0.0
    mute_joins: bool = False
    mute_heartbeats: bool = False
    refuse: int = 0
    refuse_status: int = 429
    refuse_error: str = "Too many connected users"
    blackout_until: float = 0.0
    held: list[tuple[Broadcast, bool]] = field(default_factory=list)
    """Broadcasts kept back by `reorder`, released newest first when the last one is in."""

    def passing(self, message: Broadcast, private: bool) -> list[tuple[Broadcast, bool]]:
        """What becomes of one broadcast."""
        one = (message, private)
        if self.drop > 0:
            self.drop -= 1
            return []
        if self.reorder > 0:
            self.reorder -= 1
            self.held.append(one)
            if self.reorder:
                return []
            released, self.held = self.held[::-1], []
            return released
        if self.duplicate > 0:
            self.duplicate -= 1
            return [one, one]
        return [one]

    def turn_away(self) -> tuple[int, str] | None:
        """The refusal for the handshake at hand, if it is to be refused."""
        if self.refuse <= 0:
            return None
        self.refuse -= 1
        return self.refuse_status, self.refuse_error

    def set(self, wanted: dict[str, Any], *, now: float) -> None:
        """Take settings as the admin endpoint sends them. Raises `BadFault` and then changes nothing."""
        new: dict[str, Any] = {}
        for name, value in wanted.items():
            match name, value:
                case "blackout", int() | float():
                    new["blackout_until"] = now + value
                case "join_delay", int() | float():
                    new[name] = float(value)
                case (("mute_joins" | "mute_heartbeats"), bool()):
                    new[name] = value
                case (("drop" | "duplicate" | "reorder" | "refuse" | "refuse_status"), int()) if value >= 0:
                    new[name] = value
                case "refuse_error", str():
                    new[name] = value
                case _:
                    raise BadFault(f"no fault {name!r} with the value {value!r}")
        for name, value in new.items():
            setattr(self, name, value)

    def report(self) -> dict[str, Any]:
        """The settings in force, as JSON."""
        whole = asdict(self)
        whole["held"] = len(self.held)
        return whole
