"""PURE: lines over time as one SVG, without a library: axes, a legend, and marks where something happened.

It knows nothing of soaks: `line_chart("memory", "MB", [Line("agent", ((0, 45), (60, 46)))], [Mark(30, "killed")])`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 960, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 40, 56
COLOURS = ("#2a6fdb", "#d1495b", "#2e8b57", "#9b59b6", "#d68910", "#5d6d7e", "#148f77", "#a04000")
MOST_POINTS = 400
"""Of one line; more than pixels is more than anybody sees."""


@dataclass(frozen=True, slots=True)
class Line:
    """Points (seconds, value) in order; None as a value is a hole. `name` "" leaves it out of the legend."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: str | None = None
    faint: bool = False
    """One of many that are the background to others."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment, with what it was."""

    at: float
    text: str
    colour: str = "#d1495b"


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    marks: Sequence[Mark] = (),
    *,
    zero: bool = True,
    end: float = 1.0,
) -> str:
    """The whole SVG document. `zero`: the vertical axis begins at 0. `end`: the horizontal one goes at least so far."""
    points = [(at, value) for line in lines for at, value in line.points if value is not None]
    # One second at the least: what could not even begin is reported too, on empty charts.
    end = max([at for at, _ in points] + [mark.at for mark in marks] + [end, 1.0])
    high = max([value for _, value in points] + [0.0])
    low = 0.0 if zero or not points else min(value for _, value in points)
    ticks = _ticks(low, high)
    low, high = ticks[0], ticks[-1]

    def x(at: float) -> float:
        return LEFT + at / end * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="11" fill="#333">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="20" font-size="14" font-weight="600">{escape(title)} ({escape(unit)})</text>',
    ]
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for minute in _ticks(0, end / 60):
        if minute * 60 <= end * 1.001:
            at = x(minute * 60)
            parts.append(
                f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{minute:g} min</text>'
            )
    for mark in marks:
        parts.append(
            f'<path d="M{x(mark.at):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="{mark.colour}" opacity=".25">'
            f"<title>{escape(mark.text)}</title></path>"
        )
    names: list[tuple[str, str]] = []
    for number, line in enumerate(lines):
        colour = line.colour or COLOURS[number % len(COLOURS)]
        style = 'stroke-width="1" opacity=".35"' if line.faint else 'stroke-width="1.6"'
        drawn = _path(_thin(line.points), x, y)
        if drawn:
            parts.append(f'<path d="{drawn}" fill="none" stroke="{colour}" {style}/>')
        if line.name and (line.name, colour) not in names:
            names.append((line.name, colour))
    at = float(LEFT)
    for name, colour in names:
        parts.append(f'<path d="M{at:.0f} {HEIGHT - 14}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{at + 23:.0f}" y="{HEIGHT - 10}">{escape(name)}</text>')
        at += 40 + 6.5 * len(name)
    return "\n".join([*parts, "</svg>", ""])


def _path(
    points: Iterable[tuple[float, float | None]], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    words: list[str] = []
    begun = False
    for at, value in points:
        if value is None:
            begun = False
            continue
        words.append(f"{'L' if begun else 'M'}{x(at):.1f} {y(value):.1f}")
        begun = True
    return "".join(words)


def _thin(points: Sequence[tuple[float, float | None]]) -> Sequence[tuple[float, float | None]]:
    """At most `MOST_POINTS`; of each run of neighbours the greatest, so that no peak is hidden."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / MOST_POINTS)
    runs = (points[start : start + size] for start in range(0, len(points), size))
    return [max(run, key=lambda point: -math.inf if point[1] is None else point[1]) for run in runs]


def _ticks(low: float, high: float) -> list[float]:
    """Round values from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    step = 10 ** math.floor(math.log10(span / 4))
    step *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (step * factor) <= 6)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [round(number * step, 9) for number in range(first, last + 1)]
