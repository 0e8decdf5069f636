"""A peer that loses files, or ends, is a row that says so; the others go on, and the run is none that failed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
from anyio.from_thread import start_blocking_portal

import bench.__main__ as command
from bench.cases import mirror
from bench.harness import peers
from bench.harness.machine import Others
from bench.harness.peers import Mirror
from bench.harness.plot import picture
from bench.harness.results import PeerFailed, Result, Row, in_turn
from bench.harness.table import table


class Whole(Mirror):
    """Copies what is newer, again and again."""

    name = "whole"
    programs = ("bash", "cp")
    edits = 1
    left_out = ""

    def commands(self) -> Sequence[Sequence[str]]:
        copy = f'cp -u "{self.source}"/!({self.left_out}) "{self.target}" 2>/dev/null'
        return [["bash", "-O", "extglob", "-c", f"while {self.goes_on()}; do {copy}; sleep 0.05; done"]]

    def goes_on(self) -> str:
        return "true"


class Losing(Whole):
    """Two of five hundred never come."""

    name = "losing"
    left_out = "file123.ts|file321.ts"


class Dying(Whole):
    """Ends once there are many files."""

    name = "dying"

    def goes_on(self) -> str:
        return f'[ "$(ls "{self.source}" | wc -l)" -lt 100 ]'


class Absent(Whole):
    """Ends before it has begun."""

    name = "absent"

    def commands(self) -> Sequence[Sequence[str]]:
        return [["false"]]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """A contest of them and of ours."""
    monkeypatch.setattr(mirror, "MIRRORS", [Losing, Absent, Dying, Whole])
    monkeypatch.setattr(mirror, "EDITS", 3)
    monkeypatch.setattr(mirror, "at_rest", lambda: None)
    monkeypatch.setattr(peers, "DEADLINE", 5.0)
    numbers = count()

    def fresh() -> contextlib.AbstractContextManager[Path]:
        place = tmp_path / str(next(numbers))
        place.mkdir()
        return contextlib.nullcontext(place)

    with start_blocking_portal() as portal, contextlib.ExitStack() as stack:
        contest = mirror.Contest(portal, fresh, stack)
        return [*mirror.latency(contest, 1), *mirror.burst(contest, 2)]


@pytest.mark.nightly
def test_it_is_a_row_that_says_so_and_the_others_go_on(
    rows: list[Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = {(row.name, row.peer): row for row in rows}
    many, one = f"burst of {peers.FILES} files, events", "event to file, p50"
    assert {peer for name, peer in said if name == many} == {"losing", "absent", "dying", "whole"}
    assert said[many, "losing"].failure == "lost 2 of 500 files: they were not there after 5 s"
    assert said[many, "dying"].failure == "it ended, with 0"
    assert said[many, "absent"].failure == said[one, "absent"].failure == "it ended at once, with 1"
    for name in (many, one):
        whole = said[name, "whole"]
        assert (whole.failure, whole.ratio is not None, whole.samples) == ("", True, 2 if name == many else 1)
    for peer in ("losing", "dying"):
        assert said[one, peer].ratio is not None, "what it did before counts"
        assert said[many, peer].ratio is None
        assert said[many, peer].result is Result.PEER_FAILED
        assert said[many, peer].ours > 0

    def run(quick: bool) -> Sequence[Row]:
        return [said[many, "losing"], Row("it", 1.0, "ms")]

    monkeypatch.setattr(command, "modules", lambda wanted: {"mirror": run})
    monkeypatch.setattr(Others, "share", lambda others: 0.0)
    assert command.main(("--quick", "--json", str(tmp_path / "run.json"))) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "losing" in line]
    assert "peer failed" in line
    assert "lost 2 of 500" in line
    written = json.loads((tmp_path / "run.json").read_text())
    kept = written["results"]["mirror"]["rows"][0]
    assert (kept["ratio"], kept["theirs"], kept["result"]) == (None, None, "peer failed")
    kept["peer"] = "lsyncd"  # README quotes it
    assert "| lsyncd | not compared: lost 2 of 500 files" in table(written)
    assert "peer failed" in picture(written)
    assert "too noisy" not in picture(written)


def test_who_drops_out_has_no_turn_any_more() -> None:
    order: list[str] = []

    def contestant(name: str) -> float:
        order.append(name)
        if name == "b" and order.count("b") == 3:
            raise PeerFailed("enough")
        return 1.0

    samples = in_turn({name: lambda name=name: contestant(name) for name in "abc"}, 4)  # type: ignore[misc]
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "c": 4}
    assert order.count("b") == 3
