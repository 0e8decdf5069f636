"""Runs every framework, and writes the table in docs/dev-server.md from what was seen (`make frameworks`).

python -m tests.frameworks            run all, then write
python -m tests.frameworks --write    write from the last run
python -m tests.frameworks -k nuxt    run some again, keep what was seen of the others
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.frameworks.app import App, read_all

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "dev-server.md"
RESULTS = Path(__file__).with_name("results.json")
BEGIN, END = "<!-- frameworks: made by `make frameworks` -->", "<!-- end of frameworks -->"
HEAD = [
    "project",
    "its script",
    "what is started",
    "in",
    "served",
    "save",
    "deletion",
    "dependency",
    "config mended",
]


def row(app: App, seen: dict[str, object]) -> list[str]:
    """Return the cells of an app."""

    def cell(name: str) -> str:
        return "yes" if name in seen else "**no**"

    return [
        app.title, f"`{app.script}`" if app.script else "none", app.server, f"`{app.directory}`", cell("served"),
        cell("save"), cell("delete") if app.delete else app.note, cell("dependency") if app.manifest else "",
        cell("mended") if app.config else "",
    ]  # fmt: skip


def table(results: dict[str, dict[str, object]]) -> str:
    """Return the table, in Markdown."""
    rows = [HEAD, ["---"] * len(HEAD)]
    rows += [row(app, results[app.name]) for app in read_all() if app.name in results]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in each) + " |" for each in rows)


def write() -> None:
    """Write the table from the last run."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    made = table(json.loads(RESULTS.read_text()))
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


def main(arguments: list[str]) -> int:
    """Run and write. Returns the tests' exit code."""
    code = 0
    if arguments != ["--write"]:
        os.environ["FRAMEWORKS_RESULTS"] = str(RESULTS)
        code = pytest.main([str(Path(__file__).parent), "-m", "frameworks", "--durations=0", *arguments])
    write()
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
