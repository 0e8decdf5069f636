"""What README and docs/measured.md show of a run: tables and plot are the JSON's, and none makes a number up."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import bench.__main__ as command
from bench.harness import publish
from bench.harness.machine import Others
from bench.harness.plot import MET, MISSED, picture, points
from bench.harness.publish import JSON, MEASURED, PAGES, README, SCREEN_SVG, SVG
from bench.harness.results import Ratio, Result, Row
from bench.harness.svg import FAINT
from bench.harness.table import BEGIN, END, FIRST, QUOTED, SCREEN, Quoted, found, rows_of, table, with_table

NAMESPACE = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"
KEPT: dict[str, Any] = json.loads(JSON.read_text())


def run_of(*rows: Row, module: str = "link") -> dict[str, Any]:
    return {
        "at": "2026-11-28T02:00:00+00:00", "seconds": 1200,
        "machine": {"cpu": "a <cpu>", "cores": 2, "system": "Linux"},
        "results": {module: {"rows": [row.as_json() for row in rows]}},
    }  # fmt: skip


def broadcasts(value: float = 16.0, **more: Any) -> Row:
    name = "receive + decode, 1 KB broadcasts"
    ratio = Ratio(value, value * 0.9, value * 1.1)
    return Row(
        name, 284_924.3, "messages/s", "realtime", 17_000.0, ratio, "speed", **{"at_least": 10.0, **more}
    )


def words(drawn: str) -> list[str]:
    return [
        line.text or ""
        for text in ElementTree.fromstring(drawn).iter(f"{NAMESPACE}text")
        for line in (text, *text)
    ]


def dots(drawn: str, colour: str) -> list[tuple[float, float]]:
    """Where the picture has a median in that colour."""
    found = []
    picture = ElementTree.fromstring(drawn)
    round_ones = {
        f"#{path.get('id')}" for path in picture.iter(f"{NAMESPACE}path") if path.get("d", "").count("C") > 4
    }
    for use in picture.iter(f"{NAMESPACE}use"):
        if use.get(f"{XLINK}href") in round_ones and f"fill: {colour}" in use.get("style", ""):
            found.append((float(use.attrib["x"]), float(use.attrib["y"])))
    return found


@pytest.mark.parametrize(("page", "rows", "plot"), PAGES, ids=lambda given: getattr(given, "stem", ""))
def test_the_pages_say_what_the_kept_run_says(page: Path, rows: tuple[Quoted, ...], plot: str) -> None:
    text = page.read_text()
    assert with_table(text, KEPT, rows, plot) == text, "run `make bench-readme`"


def test_readme_has_a_few_of_the_rows_and_leads_to_all() -> None:
    assert 0 < len(FIRST) <= 10
    assert set(FIRST) < set(QUOTED)
    assert all(found(KEPT, quoted) for quoted in FIRST)
    assert "(docs/measured.md)" in README.read_text()


def test_the_pictures_are_of_the_kept_run() -> None:
    assert SVG.read_text() == picture(KEPT), "run `make bench-readme`"
    assert "(../bench/results/latest.svg)" in MEASURED.read_text()
    if rows_of(KEPT, "screen"):
        assert SCREEN_SVG.read_text() == picture(KEPT, "screen"), "run `make bench-readme`"


def test_the_page_of_the_screen_shows_its_picture_when_it_was_measured() -> None:
    slow = Row(
        "screen: rename to painted, p50", 30.0, "ms", "vite alone", 30.0, Ratio(1.0, 0.9, 1.1), at_most=1.2
    )
    page = f"{BEGIN}\n{END}"
    assert "![a]" in with_table(page, run_of(slow, module="screen"), SCREEN, "![a](b)")
    assert "![a]" not in with_table(page, run_of(slow), SCREEN, "![a](b)")
    both = run_of(slow, module="screen")
    both["results"] |= run_of(broadcasts())["results"]
    assert [point.name for point in points(both, "screen")] == [slow.name]
    assert len(list(points(both))) == 2
    assert ElementTree.fromstring(picture(both, "screen")).tag == f"{NAMESPACE}svg"


def test_the_picture_is_small_undated_and_on_white_paper() -> None:
    drawn = SVG.read_text()
    assert len(drawn) < 100_000
    assert not re.search(r"<dc:(date|creator)>", drawn)
    paper = next(ElementTree.fromstring(drawn).iter(f"{NAMESPACE}path"))
    _, _, width, height = ElementTree.fromstring(drawn).attrib["viewBox"].split()
    assert paper.attrib["style"] == "fill: #ffffff"
    assert {width, height} <= set(paper.attrib["d"].split())


@pytest.mark.parametrize("page", [README, MEASURED], ids=["README", "measured"])
def test_no_page_has_a_measured_number_outside_of_the_table(page: Path) -> None:
    text = page.read_text()
    prose = text[: text.index(BEGIN)] + text[text.index(END) :]
    assert not re.findall(r"\d[\d.,]* ?(?:×|µs|ms\b|times (?:as|the))", prose)


def test_a_row_reads_as_it_was_measured() -> None:
    said = table(run_of(broadcasts()))
    assert "| 16.0 × its speed (14.4–17.6), 285,000 messages/s | ≥ 10 |" in said
    assert "One run of `make bench-save` on 2026-11-28" in said
    assert "≥ 10: **not met**" in table(run_of(broadcasts(3.0)))


def test_what_was_refused_or_not_measured_says_so_and_has_no_number() -> None:
    refused = run_of(broadcasts(taken=0.4))
    (line,) = [line for line in table(refused).splitlines() if "broadcasts |" in line]
    assert line.split("|")[3].strip() == "refused: too noisy"
    (row,) = refused["results"]["link"]["rows"]
    assert (row["ratio"], row["interval"], row["ours"], row["theirs"]) == (None,) * 4
    drawn = picture(refused)
    assert "too noisy" in words(drawn)
    assert not re.search(r"16|0\.06|14\.4|17\.6|284|17,?000", " ".join(words(drawn)))
    assert not dots(drawn, MET)
    absent = table(run_of(broadcasts())).partition("does not have: ")[2]
    assert sum(int(count) for count in re.findall(r"(\d+) of", absent)) == len(QUOTED) - 1
    assert "link" not in absent


@pytest.mark.parametrize("page", ["no marks", BEGIN, END + BEGIN])
def test_a_page_without_a_place_for_it_is_left_alone(page: str) -> None:
    with pytest.raises(ValueError, match="no place for the table"):
        with_table(page, KEPT)


def test_only_the_place_between_the_marks_changes() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = with_table(text, run_of(broadcasts()))
    assert once.startswith(f"before\n{BEGIN}\n")
    assert once.endswith(f"\n{END}\nafter\n")
    assert "old" not in once
    assert with_table(once, run_of(broadcasts())) == once


def test_in_the_picture_left_is_better_whatever_was_measured() -> None:
    rows = [
        broadcasts(),
        Row("t", 1.0, "s", "p", 2.0, Ratio(0.5, 0.4, 0.6), at_most=0.25),
        broadcasts(waited=0.5),
        Row("  detail", 1.0, "s", "p", 2.0, Ratio(0.5, 0.4, 0.6)),
        Row("alone", 47.0, "MB", at_most=48),
    ]
    speed, time, noisy, detail = points(run_of(*rows))
    assert (speed.middle, speed.bound, speed.result) == (1 / 16, 0.1, Result.MET)
    assert speed.low < 1 / 16 < speed.high
    assert (time.low, time.middle, time.high, time.bound) == (0.4, 0.5, 0.6, 0.25)
    assert (time.result, noisy.result) == (Result.NOT_MET, Result.TOO_NOISY)
    assert math.isnan(noisy.middle)
    assert detail.name == "receive + decode, 1 KB broadcasts: detail"


def test_the_picture_is_whole_xml_with_every_row_in_it() -> None:
    run = run_of(
        broadcasts(),
        broadcasts(3.0),
        broadcasts(0.004, at_least=None, note="<&>"),
        Row("<slow> & so on", 1.0, "s", "p", 2.0, Ratio(0.5, 0.4, 0.6), at_most=0.25),
    )
    drawn = picture(run)
    assert {"receive + decode, 1 KB broadcasts", "<slow> & so on", "0.062 ×", "250 ×"} <= set(words(drawn))
    assert {"1 of 3 bounds are met", "≤ 0.1", "not ≤ 0.1", "not ≤ 0.25"} <= set(words(drawn))
    assert any("a <cpu>, 2 cores" in said for said in words(drawn))
    _, _, width, height = map(float, ElementTree.fromstring(drawn).attrib["viewBox"].split())
    (met,), missed, free = (dots(drawn, colour) for colour in (MET, MISSED, FAINT))
    assert (len(missed), len(free)) == (2, 1)
    assert all(0 < x < width and 0 < y < height for x, y in (met, *missed, *free))
    assert met[0] < min(x for x, _ in missed) < free[0][0]


def test_there_is_a_picture_of_nothing() -> None:
    assert ElementTree.fromstring(picture(run_of())).tag == f"{NAMESPACE}svg"


def test_each_quoted_row_is_one_that_its_module_makes() -> None:
    """In the source, so that a row that is renamed does not silently go from the tables."""
    for quoted in QUOTED:
        source = (Path(__file__).parents[2] / "bench" / "cases" / f"{quoted.module}.py").read_text()
        assert re.search(r"\bdef run\(", source), quoted
        if quoted.peer is not None and quoted.module != "mirror":
            assert f'"{quoted.peer}"' in source, quoted


def test_a_kept_row_is_found_by_name_and_peer() -> None:
    run = copy.deepcopy(KEPT)
    quoted = next(quoted for quoted in QUOTED if quoted.module == "link")
    row = found(run, quoted)
    assert row is not None
    row["peer"] = "somebody else"
    assert found(run, quoted) is None


@pytest.mark.parametrize("fails", [False, True])
def test_a_saved_run_is_json_plot_and_tables_at_once_and_a_failed_one_is_none(
    fails: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(quick: bool) -> list[Row]:
        if fails:
            raise RuntimeError("a bug")
        return [broadcasts()]

    monkeypatch.setattr(publish, "REPOSITORY", tmp_path)
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    pages = {"README": tmp_path / "README.md", "MEASURED": tmp_path / "measured.md"}
    for name, path in {"JSON": tmp_path / "results/it.json", "SVG": tmp_path / "results/it.svg"}.items():
        monkeypatch.setattr(publish, name, path)
    monkeypatch.setattr(publish, "PAGES", ((pages["README"], FIRST, ""), (pages["MEASURED"], QUOTED, "")))
    for path in pages.values():
        path.write_text(f"before\n{BEGIN}\n{END}\n")
    monkeypatch.setattr(command, "modules", lambda wanted: {"link": run})
    monkeypatch.setattr(command, "quiet", lambda patience: None)
    monkeypatch.setattr(Others, "share", lambda others: 0.02)
    assert command.main(["--save"]) == (2 if fails else 0)
    readme, measured = (path.read_text() for path in pages.values())
    if fails:
        assert "not saved" in capsys.readouterr().out
        assert readme == measured == f"before\n{BEGIN}\n{END}\n"
        assert not (tmp_path / "results").exists()
        return
    written = json.loads((tmp_path / "results/it.json").read_text())
    assert {"at", "commit", "machine", "peers", "seconds", "results"} <= set(written)
    assert written["results"]["link"]["others"] == 0.02
    assert readme == with_table(readme, written, FIRST)
    assert measured == with_table(measured, written)
    assert all("16.0 × its speed" in page for page in (readme, measured))
    assert (tmp_path / "results/it.svg").read_text() == picture(written)
