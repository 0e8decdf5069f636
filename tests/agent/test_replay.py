"""Scenarios: every one of the library ends as it should, undisturbed and under mischief; a wrong end is told apart."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from agent.__main__ import main
from agent.errors import MalformedMessage
from agent.replay import replay
from agent.scenario import FAULTS, Broken, Committed, Delivered, Mischief, Step, play, read_scenario
from tests.profiles import NIGHTLY

LIBRARY = sorted((Path(__file__).parents[1] / "scenarios").glob("*.jsonl"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    yield
    structlog.reset_defaults()


def test_the_library_is_there() -> None:
    assert len(LIBRARY) >= 25
    texts = "".join(path.read_text() for path in LIBRARY)
    assert all(f'"fault":"{fault}"' in texts for fault in FAULTS)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_a_scenario_ends_as_it_should(path: Path, tmp_path: Path) -> None:
    result = replay(path, tmp_path)
    assert result.differences == ()
    assert result.tree_hash == result.expected_hash


@pytest.mark.parametrize("seed", range(20 if NIGHTLY else 1))
@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: path.stem)
def test_under_mischief_it_ends_the_same(path: Path, seed: int, tmp_path: Path) -> None:
    mischief = Mischief(seed, shuffle=True, duplicate=0.3, drop=0.3, disconnect=2, crash=1)
    assert replay(path, tmp_path, mischief=mischief).differences == ()


def test_a_wrong_end_is_a_diff_that_a_person_can_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (LIBRARY[0].parent / "first-save.jsonl").read_text().splitlines()
    header = json.loads(lines[0])
    header["expect"]["files"]["src/App.tsx"] = "something else\n"
    header["expect"]["files"]["gone.ts"] = "x"
    del header["expect"]["files"]["index.html"]
    scenario = tmp_path / "wrong.jsonl"
    scenario.write_text("\n".join([json.dumps(header), *lines[1:]]))
    report, junit = tmp_path / "report.json", tmp_path / "junit.xml"
    assert main(["replay", str(scenario), "--json", str(report), "--junit", str(junit)]) == 1
    printed = capsys.readouterr().out
    assert printed.startswith("NOT EQUAL  wrong: ")
    assert "- gone.ts: missing" in printed
    assert "+ index.html: should not be there" in printed
    assert "! src/App.tsx: " in printed
    assert json.loads(report.read_bytes())["results"][0]["ok"] is False
    suite = ET.parse(junit).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("1", "1")
    assert main(["replay", str(LIBRARY[0]), "--junit", str(junit)]) == 0
    assert capsys.readouterr().out.startswith("ok  ")


HEADER = '{"scenario":1,"project_id":"p","epoch":"e","revision":1,"snapshot":{"files":{}}}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "it is empty"),
        ("not json", "line 1): not JSON"),
        ('{"scenario":2}', "scenario is 2, not 1"),
        ('{"scenario":1}', "KeyError"),
        ('{"scenario":1,"project_id":"p","epoch":"e","revision":1,"snapshot":{"files":{"../x":""}}}', "dot_segment"),
        (HEADER + '{"at_ms":1}', "line 2"),
        (HEADER + '{"at_ms":1,"fault":"fire"}', "'fire'"),
    ],
)  # fmt: skip
def test_a_scenario_that_cannot_be_read_says_where_and_why(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(MalformedMessage) as error:
        read_scenario(text)
    assert says.replace("1)", "1") in str(error.value)
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    assert main(["replay", str(path)]) == 1


STEPS = st.lists(st.integers(0, 3), max_size=12).map(
    lambda kinds: tuple(
        Step(n, fault="disconnect", lost=kind) if kind else Step(n, "file:update")
        for n, kind in enumerate(kinds)
    )
)


@given(STEPS, st.integers(), st.booleans(), st.floats(0, 1), st.floats(0, 1))
def test_nothing_is_delivered_before_it_is_committed(
    steps: tuple[Step, ...], seed: int, shuffle: bool, duplicate: float, drop: float
) -> None:
    mischief = Mischief(seed, shuffle=shuffle, duplicate=duplicate, drop=drop, disconnect=1, crash=1)
    committed: list[Step] = []
    for happening in play(steps, mischief):
        if isinstance(happening, Committed):
            committed.append(happening.step)
        elif isinstance(happening, Delivered):
            assert happening.step in committed
        else:
            assert isinstance(happening, Broken)
    assert committed == [step for step in steps if step.event]
    undisturbed = [h.step for h in play(steps, Mischief()) if isinstance(h, Delivered)]
    assert all(step in steps for step in undisturbed)
