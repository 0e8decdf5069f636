"""A run as a picture: JSON in, SVG out, the same for the same.

Each row is a ratio to a peer, on a logarithmic scale of the peer's time (or of 1 / speed, or memory), so left is always
better: a dot for the median, a line for the interval of 95 % confidence. Where there is a bound, a green band runs up
to it: a dot within the band has met it. Rows without a bound stand below, in grey. A refused row has no dot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.harness.results import Result, figure
from bench.harness.svg import FAINT, svg

MARGIN, LEFT, RIGHT = 0.015, 0.4, 0.87
"""Where names begin, the scale begins and the scale ends, as shares of the width."""

HEAD, ROW = 0.8, 0.19
"""Inches: above the scale, and of a row."""

MET, MISSED, BAND = "#1a7f37", "#cf222e", "#dafbe1"
COLOURS = {Result.MET: MET, Result.NOT_MET: MISSED}


@dataclass(frozen=True, slots=True)
class Point:
    """One row of the picture. Figures are of the peer's time, less is better; `nan` when refused."""

    name: str
    peer: str
    result: Result
    low: float
    middle: float
    high: float
    bound: float | None


def points(run: Mapping[str, Any], only: str | None = None) -> Iterator[Point]:
    """The run's rows that have a peer; those of one measurement when it is named."""
    for module, result in run["results"].items():
        if only not in (None, module):
            continue
        parent = ""
        for row in result.get("rows", ()):
            name = row["name"].strip()
            if row["name"].startswith(" "):  # a detail of the row above
                name = f"{parent}: {name}"
            else:
                parent = name
            if row["peer"] is None:
                continue
            low, high = row["interval"] if row["ratio"] is not None else (nan, nan)
            middle = row["ratio"] if row["ratio"] is not None else nan
            bound = row["at_least"] if row["at_least"] is not None else row["at_most"]
            if row["sense"] == "speed":
                low, middle, high, bound = 1 / high, 1 / middle, 1 / low, bound and 1 / bound
            yield Point(name, row["peer"], Result(row["result"]), low, middle, high, bound)


def picture(run: Mapping[str, Any], only: str | None = None) -> str:
    """The picture: rows with a bound above, the others below; of one measurement when it is named."""
    shown = list(points(run, only))
    bounded = [point for point in shown if point.bound is not None]
    free = [point for point in shown if point.bound is None]
    met, machine = sum(point.result == Result.MET for point in bounded), run["machine"]
    about = (
        "Our time as a multiple of the peer's: further left is faster. Dot: the median. Line: its 95 % interval.\n"
        f"Green band: what the bound allows. {run['at'][:10]}, {machine['cpu']}, {machine['cores']} cores."
    )
    height = HEAD + ROW * (len(shown) + 4)

    def draw(paper: Figure) -> None:
        paper.subplots_adjust(LEFT, 0.4 / height, RIGHT, 1 - HEAD / height, hspace=2 * ROW / height)
        with_bound, without = paper.subplots(
            2, 1, sharex=True, height_ratios=(len(bounded) + 1, len(free) + 1)
        )
        _panel(with_bound, f"{met} of {len(bounded)} bounds are met", bounded)
        _panel(without, "Without a bound, for comparison", free)
        with_bound.tick_params(labeltop=True)
        paper.text(MARGIN, 1 - 0.2 / height, about, va="top", color=FAINT)

    return svg(11, height, draw)


def _panel(axes: Axes, heading: str, its: Sequence[Point]) -> None:
    rows = range(len(its))
    colours = [COLOURS.get(point.result, FAINT) for point in its]
    axes.set(xscale="log", ylim=(len(its) - 0.5, -1.5), yticks=())
    axes.xaxis.set_major_formatter(lambda x, _: "the peer" if x == 1 else f"{x:g} ×")
    axes.minorticks_off()
    axes.grid(axis="x")
    axes.axvline(1, color=FAINT)
    bounds = [point.bound or nan for point in its]
    axes.stairs(
        bounds, [row - 0.5 for row in range(len(its) + 1)], orientation="horizontal", fill=True, color=BAND
    )
    axes.plot(bounds, rows, "|", color=MET, markersize=9)
    axes.hlines(rows, [point.low for point in its], [point.high for point in its], colours)
    for colour in dict.fromkeys(colours):
        its_own = [point.middle if each == colour else nan for point, each in zip(its, colours, strict=True)]
        axes.plot(its_own, rows, "o", color=colour, markersize=4)

    def text(x: float, y: float, said: str, **style: Any) -> None:
        x = (x - LEFT) / (RIGHT - LEFT)
        axes.text(x, y, said, transform=axes.get_yaxis_transform(), va="center_baseline", **style)

    text(MARGIN, -1, heading, fontsize=10, weight="bold")
    for row, point in enumerate(its):
        if not row or its[row - 1].name != point.name:
            text(MARGIN, row, point.name)
        text(LEFT - 0.01, row, point.peer, ha="right", color=FAINT)
        text(0.93, row, point.result if isnan(point.middle) else f"{figure(point.middle)} ×", ha="right")
        if point.bound is not None:
            wanted = f"{'not ' if point.result == Result.NOT_MET else ''}≤ {point.bound:.3g}"
            text(0.94, row, wanted, color=colours[row])
