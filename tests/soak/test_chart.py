"""The plots are SVG that any viewer reads, whatever the numbers, and the same for the same numbers."""

from __future__ import annotations

import re
import warnings
import xml.etree.ElementTree as ElementTree

import pytest

from soak.chart import Line, Mark, line_chart

SVG = "{http://www.w3.org/2000/svg}"
BLUE = "#0969da"


def lines(drawn: str) -> list[list[list[tuple[float, float]]]]:
    """The curves in blue: each as its unbroken pieces, each of those as points."""
    curves = []
    for path in ElementTree.fromstring(drawn).iter(f"{SVG}path"):
        if path.get("clip-path") and f"stroke: {BLUE}" in path.get("style", ""):
            curves.append([
                [(float(x), float(y)) for x, y in re.findall(r"(\S+) (\S+)", piece)]
                for piece in path.get("d", "").replace("L ", "").split("M ")[1:]
            ])  # fmt: skip
    return curves


def words(drawn: str) -> list[str]:
    return [e.text or "" for e in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def test_a_chart_is_well_formed_and_stays_within_itself() -> None:
    points = [(float(n), 40.0 + n % 7) for n in range(100)]
    drawn = line_chart("a < b", "MB", [Line("one & two", points, BLUE)], [Mark("<killed>", [50])])
    _, _, width, height = map(float, ElementTree.fromstring(drawn).attrib["viewBox"].split())
    [[piece]] = lines(drawn)
    assert len(piece) == 100
    assert all(0 <= x <= width and 0 <= y <= height for x, y in piece)
    assert {"a < b (MB)", "one & two", "<killed>"} <= set(words(drawn))


@pytest.mark.parametrize("points", [[], [(0.0, 0.0)], [(0.0, None)], [(5.0, 1e9)], [(0.0, -3.0), (9.0, 3.0)]])
@pytest.mark.parametrize("log", [True, False])
def test_there_is_a_chart_of_anything(points: list[tuple[float, float | None]], log: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ElementTree.fromstring(line_chart("t", "u", [Line("n", points, BLUE)], [Mark("m", [])], log=log))


def test_a_hole_is_a_hole_and_a_peak_is_kept() -> None:
    [pieces] = lines(line_chart("t", "u", [Line("n", [(0, 1), (9, 1), (10, None), (11, 1), (20, 1)], BLUE)]))
    assert len(pieces) == 2
    many: list[tuple[float, float | None]] = [(float(n), 1000.0 if n == 4321 else 1.0) for n in range(10_000)]
    drawn = line_chart("t", "u", [Line("n", many, BLUE)])
    [[piece]] = lines(drawn)
    assert len(drawn) < 20_000
    assert min(y for _, y in piece) < 50 < max(y for _, y in piece)


def test_lines_of_one_name_are_one_entry_of_the_legend() -> None:
    drawn = line_chart("t", "u", [Line("agents", [(0, 1), (9, n)], BLUE, faint=True) for n in range(5)])
    assert words(drawn).count("agents") == 1
    assert len(lines(drawn)) == 5


def test_the_same_numbers_are_the_same_file() -> None:
    given = [Line("n", [(float(n), float(n % 5)) for n in range(50)], BLUE)]
    assert line_chart("t", "u", given) == line_chart("t", "u", given)
