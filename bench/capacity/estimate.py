"""Fits a line through what was measured at several sizes, says how far it can be trusted, and carries it on. PURE."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

T975: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for an interval of 95 %, by degrees of freedom from 1; the last serves all above."""

BENT: Final = 0.2
"""Share by which the slopes of the lower and the upper sizes may differ, as far as their intervals say at all."""

WIDE: Final = 0.5
"""An interval wider than this share of its slope says nothing: it is refused."""

BUSY: Final = 0.6
"""Of a core. A process that is busier waits for itself: what it does then costs less, for it does more at a time."""

TAKEN: Final = 0.05
"""Of all processors, that others may take while a size is measured."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Interval:
        """The same of `factor` (0 or more) as many."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Line:
    """How a cost grows with the sessions. `fixed`: at none; `bent`: the line is none, in words; None: it is one."""

    slope: Interval
    fixed: float
    bent: str | None = None

    def at(self, sessions: int) -> Interval:
        """The cost of so many sessions. The interval is the slope's: far away nothing else counts."""
        grown = self.slope.times(sessions)
        return Interval(grown.value + self.fixed, grown.low + self.fixed, grown.high + self.fixed)


class Refused(Exception):
    """What was measured is not good enough to say anything; the message says why."""


def mean_of(values: Sequence[float]) -> Interval:
    """The mean of what was measured several times. Raises `Refused` for fewer than two."""
    if len(values) < 2:
        raise Refused("measured once: there is no interval")
    middle = fmean(values)
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (len(values) - 1) / len(values))
    reach = _t(len(values) - 1) * spread
    return Interval(middle, middle - reach, middle + reach)


def line_of(points: Sequence[tuple[float, float]]) -> Line:
    """The line through (sessions, cost). Raises `Refused` where the slope is not known.

    It is called bent when the upper half of the sizes has another slope than the lower half: by more than `BENT`, and
    their intervals do not meet.
    """
    slope, fixed = _fit(points)
    if slope.high - slope.low > 2 * WIDE * abs(slope.value):
        raise Refused(f"the slope is {slope.value:.3g}, anywhere from {slope.low:.3g} to {slope.high:.3g}")
    return Line(slope, fixed, _bend(points))


def _bend(points: Sequence[tuple[float, float]]) -> str | None:
    sizes = sorted({size for size, _ in points})
    if len(sizes) < 4:
        return None
    middle = sizes[len(sizes) // 2]
    below, above = [p for p in points if p[0] < middle], [p for p in points if p[0] >= middle]
    if min(len(below), len(above)) < 3:
        return None
    (lower, _), (upper, _) = _fit(below), _fit(above)
    apart = lower.high < upper.low or upper.high < lower.low
    if not apart or abs(upper.value - lower.value) <= BENT * abs(lower.value):
        return None
    return f"{'grows faster' if upper.value > lower.value else 'grows slower'} above {middle:g} sessions"


def _fit(points: Sequence[tuple[float, float]]) -> tuple[Interval, float]:
    """Slope and intercept by least squares."""
    if len({size for size, _ in points}) < 2 or len(points) < 3:
        raise Refused("two sizes and three measurements are the least for a line")
    centre, level = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - centre) ** 2 for x, _ in points)
    slope = sum((x - centre) * (y - level) for x, y in points) / spread
    fixed = level - slope * centre
    rest = sum((y - fixed - slope * x) ** 2 for x, y in points)
    reach = _t(len(points) - 2) * math.sqrt(rest / (len(points) - 2) / spread)
    return Interval(slope, slope - reach, slope + reach), fixed


def _t(freedom: int) -> float:
    return T975[min(freedom, len(T975)) - 1]


@dataclass(frozen=True, slots=True)
class Size:
    """How it was while a size was measured. `busy`: cores, by process that has one thread; `taken` by others."""

    sessions: int
    taken: float
    busy: dict[str, float]
    late: float = 0.0
    """Share of what was to be done in that time and was not."""


def fit_sizes(sizes: Sequence[Size]) -> tuple[list[int], list[str]]:
    """Which sizes count, and why the others do not. Raises `Refused` when fewer than three do."""
    kept, why = [], []
    for size in sizes:
        busiest = max(size.busy, key=lambda name: size.busy[name], default=None)
        if size.taken > TAKEN:
            why.append(f"{size.sessions}: others took {size.taken:.0%} of the processors")
        elif busiest is not None and size.busy[busiest] > BUSY:
            why.append(f"{size.sessions}: {busiest} was busy for {size.busy[busiest]:.0%} of the time")
        elif size.late > 0.1:
            why.append(f"{size.sessions}: {size.late:.0%} of the work was not done in its time")
        else:
            kept.append(size.sessions)
    if len(kept) < 3:
        raise Refused("fewer than three sizes can be counted: " + "; ".join(why))
    return kept, why
