"""What is kept of a run: its JSON, the plot of it, the tables in README.md and docs/measured.md. They all say the same,
and a test holds them against each other.

    python -m bench.harness.publish      make plot and tables again from bench/results/latest.json
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from bench.harness.table import FIRST, QUOTED, SCREEN, rows_of, with_table

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "bench" / "results"
JSON, SVG = RESULTS / "latest.json", RESULTS / "latest.svg"
SCREEN_SVG = RESULTS / "screen.svg"
README, MEASURED, SCREEN_PAGE = (
    REPOSITORY / name for name in ("README.md", "docs/measured.md", "docs/screen.md")
)
PLOT = "![From a save to the pixels, as multiples of Vite's time alone](../bench/results/screen.svg)"

PAGES = ((README, FIRST, ""), (MEASURED, QUOTED, ""), (SCREEN_PAGE, SCREEN, PLOT))
"""Each page with its rows, and the picture below them."""


def keep(run: Mapping[str, object]) -> list[str]:
    """Write all of it; the files' names."""
    RESULTS.mkdir(exist_ok=True)
    JSON.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    return [str(path.relative_to(REPOSITORY)) for path in (JSON, *derive())]


def derive() -> list[Path]:
    """Plot and tables from the JSON that is kept; what was written."""
    from bench.harness.plot import picture  # not above: a run measures without matplotlib in its memory

    run = json.loads(JSON.read_text())
    SVG.write_text(picture(run))
    written = [SVG]
    if rows_of(run, "screen"):
        SCREEN_SVG.write_text(picture(run, "screen"))
        written.append(SCREEN_SVG)
    for page, rows, plot in PAGES:
        page.write_text(with_table(page.read_text(), run, rows, plot))
        written.append(page)
    return written


if __name__ == "__main__":
    print("made again: " + ", ".join(str(path.relative_to(REPOSITORY)) for path in derive()))
