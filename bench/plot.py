"""A run as a picture: JSON in, SVG out, the same for the same.

Each ratio is a bar over its interval of 95 % confidence with the median in it, on a logarithmic scale of the peer's
time (or of 1 / speed, or memory), so that left is always better; a bound is a mark on the row. A refused row says so
and has no bar, as does one whose peer failed. The picture brings its own background, light or dark as the reader has
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from bench.results import figure

WIDTH = 920
LABELS = 400
"""Where the scale begins: left of it are the names."""

SCALE_END = 790
ROW = 19
HEAD = 64
GROUP = 12
FOOT = 34

STYLE = """
  .paper { fill: #ffffff; stroke: #d0d7de } text { font: 12px system-ui, sans-serif; fill: #1f2328 }
  .title { font-size: 15px; font-weight: 600 } .group { font-weight: 600 }
  .faint { fill: #656d76 } .grid { stroke: #e4e8ec }
  .one { stroke: #656d76 } .bound { stroke: #1f2328; stroke-width: 2 }
  .met { fill: #2da44e } .missed { fill: #e5534b } .free { fill: #4493f8 }
  .peer, .right { text-anchor: end } .centre { text-anchor: middle }
  @media (prefers-color-scheme: dark) {
    .paper { fill: #161b22; stroke: #30363d } text { fill: #e6edf3 } .faint { fill: #9198a1 } .grid { stroke: #2a313a }
    .one { stroke: #9198a1 } .bound { stroke: #e6edf3 }
  }
"""

CLASSES = {"met": "met", "NOT MET": "missed", "measured": "free"}


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of the picture; figures are of the peer's time, less is better. `middle` None: refused."""

    name: str
    peer: str
    said: str
    style: str
    low: float = 1.0
    middle: float | None = None
    high: float = 1.0
    bound: float | None = None


def bars(rows: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Of the rows that have a peer."""
    made = []
    for row in rows:
        if row["peer"] is None:
            continue
        name, style = row["name"].strip(), CLASSES.get(row["verdict"], "faint")
        bound = row["at_least"] if row["at_least"] is not None else row["at_most"]
        faster = row["sense"] == "speed"
        if bound is not None and faster:
            bound = 1 / bound
        if row["ratio"] is None:
            said = row.get("failure", "too noisy").partition(":")[0]
            made.append(Bar(name, row["peer"], said, style, bound=bound))
            continue
        low, middle, high = row["interval"][0], row["ratio"], row["interval"][1]
        if faster:
            low, middle, high = 1 / high, 1 / middle, 1 / low
        made.append(Bar(name, row["peer"], f"{figure(middle)} ×", style, low, middle, high, bound))
    return made


def svg(run: Mapping[str, Any]) -> str:
    """The picture."""
    groups = {name: made for name, result in run["results"].items() if (made := bars(result.get("rows", ())))}
    shown = [bar for made in groups.values() for bar in made]
    values = [v for bar in shown for v in (bar.low, bar.high, bar.bound or 1.0)] or [1.0]
    first, last = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    last = max(last, first + 1)

    def x(value: float) -> float:
        return LABELS + (math.log10(value) - first) / (last - first) * (SCALE_END - LABELS)

    height = HEAD + len(shown) * ROW + len(groups) * (ROW + GROUP) + FOOT
    body = [*_scale(first, last, x, height)]
    y = float(HEAD)
    for name, made in groups.items():
        y += GROUP + ROW
        body.append(_text(16, y - 5, name, "group"))
        for bar in made:
            body.extend(_row(bar, y, x))
            y += ROW
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}"'
            f' height="{height}" role="img" aria-label="Measured ratios to peers">',
            f"<style>{STYLE}</style>",
            f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
            _text(16, 26, "Ours as a multiple of the peer's time: left of 1 is faster", "title"),
            _text(16, 46, _about(run), "faint"),
            *body,
            "</svg>\n",
        ]
    )


def _about(run: Mapping[str, Any]) -> str:
    machine = run["machine"]
    return (
        f"{run['at'][:10]} · {machine['cpu']}, {machine['cores']} cores · bar: 95 % interval · tick: the bound · "
        "green met, red not met, blue no bound"
    )


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _scale(first: int, last: int, x: Callable[[float], float], height: float) -> Iterator[str]:
    """A line and a figure for each power of ten; the peer's own time stands out."""
    for power in range(first, last + 1):
        at = x(10.0**power)
        style = "one" if power == 0 else "grid"
        yield f'<path class="{style}" d="M{at:.1f} {HEAD}V{height - FOOT + 4:.1f}"/>'
        label = f"{10.0**power:g} ×" if power else "the peer"
        yield _text(at, height - 12, label, "faint centre")


def _row(bar: Bar, y: float, x: Callable[[float], float]) -> Iterator[str]:
    middle = y + ROW / 2
    yield _text(28, middle + 4, bar.name)
    yield _text(LABELS - 12, middle + 4, bar.peer, "faint peer")
    if bar.middle is not None:
        left, right = x(bar.low), x(bar.high)
        yield (
            f'<rect class="{bar.style}" x="{left:.1f}" y="{middle - 5:.1f}" width="{max(right - left, 2):.1f}"'
            ' height="10" rx="2" fill-opacity="0.55"/>'
        )
        yield f'<circle class="{bar.style}" cx="{x(bar.middle):.1f}" cy="{middle:.1f}" r="3.5"/>'
    if bar.bound is not None:
        yield f'<path class="bound" d="M{x(bar.bound):.1f} {middle - 7:.1f}v14"/>'
    yield _text(WIDTH - 16, middle + 4, bar.said + (" not met" if bar.style == "missed" else ""), "right")
