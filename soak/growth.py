"""PURE: whether a process grows, from samples of its memory or its descriptors.

Each run of a process is judged by itself: a restart begins a new one. The first `WARM_UP` seconds of a run do not count
(caches fill, the first tree is put in place). What is left is cut into bins; a bin's *least* value stands for it,
because what a burst of work takes and gives back is no growth. The trend is the Theil-Sen slope over the bins: the
median of the slopes between any two, which a quarter of the bins could not move if they were all wrong.

One run's slope is noisy in ten minutes: an interpreter takes memory in steps of a megabyte. So a run is said to grow
only above a wide bound, and *all runs of a role together* are held to a narrow one by the median of their slopes,
because a leak is in the program and so in each of them. A rate counts only with a rise behind it that is more than a
step: one more connection in three minutes is twenty an hour, and no leak. A role with too little to go by is not
judged, and that is said.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

WARM_UP = 180.0
"""Seconds of a run that do not count. In a soak of ten minutes the median agent took 2.2 MB in its first three minutes
(52.7 to 54.8) and 0.9 MB in the seven after."""

LEAST = 150.0
"""Seconds of a run after its warm-up, below which it is not judged."""

BIN = 15.0
"""Seconds."""

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is allowed, in units per hour. `life`: of one run of a process. `role`: the median of all runs of a role."""

    life: float
    role: float
    step: float
    """Units. A rise of less, over all that was seen, is no growth whatever its rate."""


MEMORY = Bounds(life=36e6, role=12e6, step=2e6)
"""Bytes per hour: 6 MB and 2 MB in ten minutes. An agent at 45 MB that grows by 12 MB an hour has 140 MB when its
session ends after eight hours (SESSION_TTL), in a machine of 256 MB."""

SERVER_DESCRIPTORS = Bounds(life=30.0, role=12.0, step=25.0)
"""Of the orchestrator and the stand-in: one for each agent and each editor while they work, none in a pause."""

DESCRIPTORS = Bounds(life=30.0, role=12.0, step=12.0)
"""Of an agent, per hour: 5 and 2 in ten minutes, in which it makes some twenty new connections; one lost by each is
120. A transaction that is undone closes the dozen directories of a project that are kept open, and the saves after it
open them again: that is the step."""


@dataclass(frozen=True, slots=True)
class Trend:
    """Of one run of a process. `slope` in units per hour."""

    slope: float
    seconds: float
    """What it was seen over."""
    first: float
    last: float


def bins(
    samples: Sequence[tuple[float, float]], *, begin: float, width: float = BIN
) -> list[tuple[float, float]]:
    """The least value of each `width` seconds from `begin` on, at the bin's middle."""
    least: dict[int, float] = {}
    for at, value in samples:
        if at >= begin:
            number = int((at - begin) // width)
            least[number] = min(value, least.get(number, value))
    return [(begin + (number + 0.5) * width, value) for number, value in sorted(least.items())]


def trend(
    samples: Sequence[tuple[float, float]], *, warm_up: float = WARM_UP, least: float = LEAST
) -> Trend | None:
    """The trend of one run (seconds, value; in order). None: it was too short to say."""
    if not samples:
        return None
    points = bins(samples, begin=samples[0][0] + warm_up)
    if len(points) < 4 or points[-1][0] - points[0][0] < least - BIN:
        return None
    slopes = [(b - a) / (t - s) for (s, a), (t, b) in combinations(points, 2)]
    return Trend(
        slope=statistics.median(slopes) * HOUR,
        seconds=points[-1][0] - points[0][0],
        first=points[0][1],
        last=points[-1][1],
    )


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of one role. `median` is None when no run was long enough."""

    judged: int
    median: float | None
    worst: float | None
    grows: bool
    why: str


def judge(trends: Sequence[Trend | None], bounds: Bounds) -> Judgement:
    """Whether a role grows, by the runs that could be judged."""
    slopes = [each.slope for each in trends if each is not None]
    if not slopes:
        return Judgement(0, None, None, False, "no life was long enough to say")
    median, worst = statistics.median(slopes), max(slopes)
    rises = [each.slope * each.seconds / HOUR for each in trends if each is not None]
    if median > bounds.role and statistics.median(rises) > bounds.step:
        why = "the median life grows faster than the role may"
    elif any(slope > bounds.life and rise > bounds.step for slope, rise in zip(slopes, rises, strict=True)):
        why = "one life grows faster than any may"
    else:
        return Judgement(len(slopes), median, worst, False, "")
    return Judgement(len(slopes), median, worst, True, why)
