"""What a measurement is: samples of two contestants taken in turn, a ratio with its uncertainty, and a result.

The machine's other work disturbs both contestants of a round alike when they run back to back, so ratios are formed
round by round and only then summarized. The interval is the one that holds the true median with 95 % confidence,
from the ranks alone, so no shape of noise is assumed. A ratio whose interval lies on neither side of its bound, or is
too wide to mean anything, is refused as too noisy: no number is better than a wrong one. So is whatever was measured
while others took the processors, however narrow its interval: that moves the ratio itself, not just its spread.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

WIDEST = 0.30
"""An interval wider than this share of its median says nothing worth printing."""

BUSIEST = 0.10
"""Share of their turns that contestants may spend ready to run and waiting for a processor. It hits the one that
computes more harder than the one that waits for the disk more, so it moves the ratio itself, not just its spread."""

TAKEN = 0.10
"""Share of all processors that others may take while a measurement lasts, see `bench.harness.machine`. Two tenths of a
core on two cores: an idle desktop takes a tenth of that, and one program that computes takes five times as much."""


class Unmeasurable(Exception):
    """This machine lacks what a measurement needs (a compiler, a peer); the sentence says what."""


class PeerFailed(Exception):
    """A peer did not do what is measured: it lost files, or ended. The sentence says what; the others go on."""


class Result(StrEnum):
    """What a row comes to. `MEASURED`: there is no bound to meet. `PEER_FAILED`: nothing to compare with."""

    MET = "met"
    NOT_MET = "NOT MET"
    TOO_NOISY = "too noisy"
    MEASURED = "measured"
    PEER_FAILED = "peer failed"


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the rounds' ratios, and the interval of 95 % confidence around it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    `ratio` is ours to `peer`'s in the sense that `sense` says ("speed": higher is better; "time", "memory", "size":
    lower).
    `at_least`, `at_most`: the bound, if one was set. `ours`, `theirs`: medians in `unit`. A row without a peer has no
    ratio and its bound is on `ours`. `waited`: the contestants' `Waits.share`, where it was asked.
    `taken`: the share of all processors that others took meanwhile. `failure`: what the peer did instead of being
    measured; then there is no ratio.
    """

    name: str
    ours: float
    unit: str
    peer: str | None = None
    theirs: float | None = None
    ratio: Ratio | None = None
    sense: str = "time"
    at_least: float | None = None
    at_most: float | None = None
    samples: int = 0
    note: str = ""
    waited: float = 0.0
    taken: float = 0.0
    failure: str = ""

    @property
    def disturbed(self) -> bool:
        """Whether the machine was too busy for this to mean anything. Memory and sizes are the same on a busy one."""
        return self.sense not in ("memory", "size") and (self.waited > BUSIEST or self.taken > TAKEN)

    @property
    def result(self) -> Result:
        if self.failure:
            return Result.PEER_FAILED
        if self.disturbed:
            return Result.TOO_NOISY
        low, high = (self.ratio.low, self.ratio.high) if self.ratio else (self.ours, self.ours)
        if self.at_least is not None:
            if low >= self.at_least:
                return Result.MET
            return Result.NOT_MET if high < self.at_least else Result.TOO_NOISY
        if self.at_most is not None:
            if high <= self.at_most:
                return Result.MET
            return Result.NOT_MET if low > self.at_most else Result.TOO_NOISY
        if self.ratio is not None and high - low > WIDEST * self.ratio.value:
            return Result.TOO_NOISY
        return Result.MEASURED

    def as_json(self) -> dict[str, object]:
        """Everything, for machines. A number that was refused is not in it."""
        noisy = self.result is Result.TOO_NOISY
        return {
            "name": self.name,
            "result": str(self.result),
            "sense": self.sense,
            "ratio": None if noisy or self.ratio is None else _figures(self.ratio.value),
            "interval": None
            if self.disturbed or self.ratio is None
            else [_figures(self.ratio.low), _figures(self.ratio.high)],
            "at_least": self.at_least,
            "at_most": self.at_most,
            "peer": self.peer,
            "ours": None if noisy else self.ours,
            "theirs": None if noisy else self.theirs,
            "unit": self.unit,
            "samples": self.samples,
            "waited": round(self.waited, 3),
            "note": "" if noisy else self.note,
            **({"failure": self.failure} if self.failure else {}),
        }


def figure(ratio: float) -> str:
    """For reading: two decimals, or two figures of a small one, or three of a large one."""
    if ratio >= 10:
        return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.1f}"
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _figures(ratio: float) -> float:
    """Four figures of it: a ratio may be a thousandth."""
    return float(f"{ratio:.4g}")


@dataclass(slots=True)
class Waits:
    """For how much of their turns contestants were ready to run and had no processor, by the kernel's schedstat.

    Asked by whoever has the turn, right before it and right after. Asked from outside, the time that a program takes to
    wake up for its turn would count, which no figure holds: beside a turn of a millisecond that looked like a seventh.
    """

    ran: int = 0
    waited: int = 0

    def add(self, ran: int, waited: int) -> None:
        """A turn of so many nanoseconds."""
        self.ran += ran
        self.waited += waited

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """A turn of this process's first thread."""
        ran, waited = scheduled()
        yield
        ran_now, waited_now = scheduled()
        self.add(ran_now - ran, waited_now - waited)

    @property
    def share(self) -> float:
        """0 where the kernel does not say."""
        return self.waited / (self.ran + self.waited) if self.ran + self.waited else 0.0


def scheduled() -> tuple[int, int]:
    """Nanoseconds that this process's first thread has run, and waited ready to run."""
    with contextlib.suppress(OSError):
        ran, waited, _ = Path("/proc/self/schedstat").read_text().split()
        return int(ran), int(waited)
    return 0, 0


def in_turn(
    contestants: Mapping[str, Callable[[], float]], rounds: int, *, warm_up: int = 1
) -> dict[str, list[float]]:
    """Each contestant once a round, who goes first changing from round to round; what each call returned.

    Who raises `PeerFailed` drops out, and what was measured of it does not count.
    """
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-warm_up, rounds):
        _progress(f"round {number + 1} of {rounds}" if number >= 0 else "warming up")
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if name not in samples:
                continue
            try:
                taken = contestants[name]()
            except PeerFailed:
                del samples[name]
                continue
            if number >= 0:
                samples[name].append(taken)
    _progress("")
    return samples


def _progress(text: str) -> None:
    """On a terminal alone, and gone when the rows come."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K  {text}" if text else "\r\x1b[K")
        sys.stderr.flush()


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours to theirs, round by round. Raises `ValueError` without samples."""
    ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    if not ratios:
        raise ValueError("no samples to compare")
    low, high = _ranks(len(ratios))
    return Ratio(statistics.median(ratios), ratios[low], ratios[high])


def _ranks(count: int) -> tuple[int, int]:
    """Between which order statistics the true median lies with 95 % confidence (binomial, p = 1/2)."""
    below, rank = 0.0, 0
    while rank < count // 2:
        below += math.comb(count, rank) / 2**count
        if below > 0.025:
            break
        rank += 1
    low = max(rank - 1, 0)
    return low, count - 1 - low
