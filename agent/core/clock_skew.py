"""How far the orchestrator's clock is ahead of ours, from the `Date` of its answers. Pure; both clocks are passed in.

`Date` (RFC 9110, 6.6.1) is the other clock cut to whole seconds, read somewhere between our sending and our receiving:
so its offset from ours lies in

    date − received  …  date + 1 − sent

and of several answers in what all of them allow. That interval is never wrong while both clocks run evenly, and gets
narrower with each answer that falls near the turn of a second. Clocks do not run quite evenly, so it also gets wider
with time. An answer that contradicts it says that a clock was set; so does our own wall clock when it parts from the
steady one: then everything before is forgotten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RESOLUTION: Final = 1.0
"""Seconds between two values of `Date`."""

DRIFT: Final = 100e-6
"""Seconds a second by which two clocks may part: the crystals of common machines keep within 50 ppm each."""

JUMP: Final = 0.1
"""Seconds by which our wall clock may leave the steady one between two readings before it was set, not slewed: the
kernel slews by at most 500 ppm (adjtimex(2)), which is 15 ms between two heartbeats."""


@dataclass(frozen=True, slots=True)
class Moment:
    """One instant on our two clocks: `wall` in Unix seconds, `steady` in monotonic seconds."""

    wall: float
    steady: float

    @property
    def lead(self) -> float:
        """Of the wall clock over the steady one; changes only when somebody sets a clock, or the machine sleeps."""
        return self.wall - self.steady


@dataclass(frozen=True, slots=True)
class Bounds:
    """The other clock minus ours, in seconds, is between `low` and `high`; of `answers` since the last reset."""

    low: float
    high: float
    answers: int

    @property
    def estimate(self) -> float:
        """0 while the clocks may be equal, as clocks that are kept in time mostly are: without evidence nothing is
        corrected. The middle otherwise.
        """
        return 0.0 if self.low <= 0.0 <= self.high else (self.low + self.high) / 2

    @property
    def uncertainty(self) -> float:
        """The most by which `estimate` may be wrong."""
        return max(self.high - self.estimate, self.estimate - self.low)


class ClockSkew:
    """What is known now. `resets` counts how often a clock was set since the start."""

    def __init__(self) -> None:
        self._bounds: Bounds | None = None
        self._at = Moment(0.0, 0.0)
        self.resets = 0

    def answered(self, date: float, sent: Moment, received: Moment) -> None:
        """Take the `Date` of an answer (Unix seconds), the question sent and its head received at these moments."""
        drift = DRIFT * max(0.0, received.steady - sent.steady)
        fresh = Bounds(date - received.wall - drift, date + RESOLUTION - sent.wall + drift, 1)
        if fresh.low > fresh.high or abs(received.lead - sent.lead) > JUMP:
            return  # our clock was set under way: such an answer says nothing
        known = self.bounds(received)
        if known is not None:
            both = Bounds(max(known.low, fresh.low), min(known.high, fresh.high), known.answers + 1)
            if both.low <= both.high:
                fresh = both
            else:
                self.resets += 1
        self._bounds, self._at = fresh, received

    def bounds(self, now: Moment) -> Bounds | None:
        """What the answers so far allow, as good as it still is at `now`. None: nothing is known."""
        if self._bounds is None:
            return None
        if abs(now.lead - self._at.lead) > JUMP:
            self._bounds = None
            self.resets += 1
            return None
        margin = DRIFT * max(0.0, now.steady - self._at.steady)
        return Bounds(self._bounds.low - margin, self._bounds.high + margin, self._bounds.answers)

    def since(self, timestamp: float, now: Moment) -> float:
        """Seconds from `timestamp` on the other clock to `now`, never negative."""
        known = self.bounds(now)
        return max(0.0, now.wall + (known.estimate if known else 0.0) - timestamp)
