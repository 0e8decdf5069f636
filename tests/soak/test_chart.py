"""The plots are SVG that any viewer reads, whatever the numbers."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from soak.chart import HEIGHT, MOST_POINTS, WIDTH, Line, Mark, line_chart


def paths(drawn: str) -> list[str]:
    root = ElementTree.fromstring(drawn)
    return [e.get("d", "") for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("fill") == "none"]


def test_a_chart_is_well_formed_and_stays_within_itself() -> None:
    points = [(float(n), 40.0 + n % 7) for n in range(100)]
    [path] = paths(line_chart("a < b", "MB", [Line("one & two", points)], [Mark(50, "<killed>")]))
    pairs = [pair.split() for pair in path[1:].split("L")]
    assert len(pairs) == 100
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in pairs)


@pytest.mark.parametrize("points", [[], [(0.0, 0.0)], [(0.0, None)], [(5.0, 1e9)], [(0.0, -3.0), (9.0, 3.0)]])
@pytest.mark.parametrize("zero", [True, False])
def test_there_is_a_chart_of_anything(points: list[tuple[float, float | None]], zero: bool) -> None:
    ElementTree.fromstring(line_chart("t", "u", [Line("n", points)], zero=zero))


def test_a_hole_is_a_hole_and_a_peak_is_kept() -> None:
    [path] = paths(line_chart("t", "u", [Line("n", [(0, 1), (1, None), (2, 1)])]))
    assert path.count("M") == 2
    many: list[tuple[float, float | None]] = [(float(n), 1000.0 if n == 4321 else 1.0) for n in range(10_000)]
    [path] = paths(line_chart("t", "u", [Line("n", many)]))
    ys = [float(pair.split()[1]) for pair in path[1:].split("L")]
    assert len(ys) <= MOST_POINTS
    assert min(ys) < 60
