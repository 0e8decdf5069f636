"""PURE: lines over the minutes of a soak as one SVG, with marks where something happened.

It knows nothing of soaks: `line_chart("memory", "MB", [Line("agent", ((0, 45), (60, 46)), "green")])`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

from matplotlib.figure import Figure

from bench.harness.svg import FAINT, svg


@dataclass(frozen=True, slots=True)
class Line:
    """Points (seconds, value) in order; None as a value is a hole. Lines of one name are one entry of the legend."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: str
    faint: bool = False
    """One of many that are the background to others."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The seconds at which one kind of thing happened: lines from top to bottom, or `small` ones at the bottom."""

    name: str
    at: Sequence[float]
    colour: str = FAINT
    small: bool = False


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    *,
    end: float = 1.0,
    log: bool = False,
) -> str:
    """The whole document. Values begin at 0, or are on a logarithmic scale; the minutes go at least to `end` s."""
    points = [(at, value) for line in lines for at, value in line.points if value is not None]
    log = log and any(value > 0 for _, value in points)

    def draw(paper: Figure) -> None:
        axes = paper.add_axes((0.06, 0.2, 0.925, 0.68), yscale="log" if log else "linear")
        axes.set_title(f"{title} ({unit})", loc="left", weight="bold")
        axes.grid(axis="y")
        for mark in marks:
            axes.vlines(
                [at / 60 for at in mark.at], 0, 0.04 if mark.small else 1, mark.colour,
                transform=axes.get_xaxis_transform(), linewidth=0.8, label=mark.name,
            )  # fmt: skip
        named = {mark.name for mark in marks}
        for line in lines:
            axes.plot(
                [at / 60 for at, _ in line.points], [nan if value is None else value for _, value in line.points],
                color=line.colour, linewidth=0.8 if line.faint else 1.5, alpha=0.4 if line.faint else 1,
                label=None if line.name in named else line.name,
            )  # fmt: skip
            named.add(line.name)
        axes.set_xlim(0, max([at for at, _ in points] + [end, 1.0]) / 60)
        axes.xaxis.set_major_formatter("{x:g} min")
        if not log:
            axes.set_ylim(bottom=min([value for _, value in points] + [0.0]))
            axes.locator_params(axis="y", integer=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(named))

    return svg(10, 3.4, draw)
