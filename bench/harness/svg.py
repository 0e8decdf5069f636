"""Draws with matplotlib and returns the SVG as text: the same text for the same drawing, on white paper.

No pyplot: a `Figure` of its own needs no display and leaves no global state. Text stays text, so a picture is small and
can be searched. `bench.harness.plot` and `soak.chart` both draw with it.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import matplotlib.style
from matplotlib.figure import Figure

INK, FAINT, GRID = "#1f2328", "#656d76", "#e4e8ec"

STYLE = {
    "svg.hashsalt": "preview-sync",  # else each id in the file is a new random one
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: measured alike on every machine
    "font.size": 8,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": FAINT,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT,
    "xtick.major.size": 0,
    "xtick.major.pad": 6,
    "ytick.color": FAINT,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "path.simplify_threshold": 1.0,  # a pixel: an hour of twenty noisy agents is 217 KB instead of 337
}


def svg(width: float, height: float, draw: Callable[[Figure], None]) -> str:
    """Call `draw` with an empty figure of that size in inches (72 units of the SVG each); the whole document."""
    written = io.StringIO()
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height))
        draw(figure)
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue()
