"""The result of a soak, from what is known in the end."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from soak.equality import Check, differences, read_saved, read_tree
from soak.logs import read_logs
from soak.report import RESULTS, charts, result_of, write
from soak.run import Outcome
from soak.schedule import Fault, Kind, Settings
from soak.watch import ProcessRun, Tick, quantile


def outcome(*, leak: float = 0.0, wrong: tuple[str, ...] = (), interrupted: bool = False) -> Outcome:
    samples = [(n * 5.0, int(50e6 + leak * n * 5 / 3600), 20) for n in range(120)]
    fault = Fault(1.0, Kind.AGENT_KILLED, 1, 0, 1.0, 1, False)
    return Outcome(
        Settings(7),
        seconds=600,
        interrupted=interrupted,
        faults=[(1.0, fault, "agent 1, process 5")],
        checks=[Check(90.0, True, took={0: 0.5, 1: 1.5})],
        lives=[ProcessRun(role, role, 5, samples) for role in ("agent", "agent", "orchestrator", "supabase")],
        ticks=[Tick(n * 5.0, ((0.01, 3.0), (0.1, 1.0)), 0, 20, 10**9) for n in range(120)],
        wrong=list(wrong),
    )


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        (outcome(), 0, "passed"),
        (outcome(leak=20e6), 1, "the agent's memory grows: +20"),
        (outcome(wrong=("agent 3 is not equal",)), 1, "agent 3 is not equal"),
        (outcome(interrupted=True), 130, "interrupted"),
        (outcome(interrupted=True, wrong=("left behind: process 5",)), 1, "left behind"),
        (Outcome(Settings(7), wrong=["19 of 20 sessions are ready"]), 1, "19 of 20 sessions are ready"),
    ],
)
def test_the_exit_says_how_it_went(given: Outcome, code: int, said: str, tmp_path: Path) -> None:
    assert result_of(given).exit_code == code
    assert said in write(given, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "report.json", "report.md", "memory.svg", "descriptors.svg", "lag.svg", "behind.svg",
    }  # fmt: skip
    whole = json.loads((tmp_path / "out" / "report.json").read_text())
    assert whole["passed"] == (code == 0)
    assert whole["settings"]["seed"] == 7
    assert said in (tmp_path / "out" / "report.md").read_text()


def test_the_kept_plots_are_what_the_kept_report_says() -> None:
    drawn = charts(json.loads((RESULTS / "report.json").read_text()))
    assert {path.name for path in RESULTS.glob("*.svg")} == set(drawn)
    for name, text in drawn.items():
        assert (RESULTS / name).read_text() == text, "run `make bench-readme`"
        assert len(text) < 100_000
        assert not re.search(r"<dc:(date|creator)>", text)
        assert f"({name})" in (RESULTS / "report.md").read_text()


def test_the_plots_show_every_fault_and_life(tmp_path: Path) -> None:
    write(outcome(), tmp_path)
    said = {name: (tmp_path / f"{name}.svg").read_text() for name in ("memory", "lag", "behind")}
    for word in (
        "agents<",
        "orchestrator<",
        "supabase<",
        "other fault<",
        "equality checked<",
        "Resident memory (MB)<",
    ):
        assert word in said["memory"]
    assert "95 %<" in said["lag"]
    assert "median<" in said["lag"]
    assert "behind the database<" in said["behind"]


def test_two_trees_differ_by_bytes_mode_and_names(tmp_path: Path) -> None:
    for name, text in (("same", "s"), ("bytes", "a"), ("mode", "m"), ("gone", "g"), ("node_modules/x", "n")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = read_tree(tmp_path)
    assert "node_modules/x" not in before
    assert read_saved(tmp_path) == before
    (tmp_path / "bytes").write_text("b")
    (tmp_path / "mode").chmod(0o755)
    (tmp_path / "gone").unlink()
    (tmp_path / "new").symlink_to("same")
    assert differences(before, read_tree(tmp_path)) == [
        "bytes has other bytes", "gone is missing", "mode has another mode", "new is too many",
    ]  # fmt: skip


def test_a_bug_in_a_log_is_found_and_the_projects_own_output_is_not_one(tmp_path: Path) -> None:
    (tmp_path / "agent-3.log").write_text(
        '{"event": "dev_server.output", "source": "dev", "line": "Traceback (most recent call last):"}\n'
        '{"event": "sync.failed", "level": "warning"}\n'
        '{"event": "agent.stopped", "exit": 0, "level": "info"}\n'
    )
    found = read_logs(tmp_path)
    assert not found.wrong
    assert found.counts == {"agent: sync.failed": 1, "agent: stopped with exit 0": 1}
    (tmp_path / "orchestrator.log").write_text(
        '{"event": "request.failed", "level": "error"}\nTask exception was never retrieved\n'
    )
    assert [each.partition(" said")[0] for each in read_logs(tmp_path).wrong] == ["orchestrator"] * 2


def test_a_file_of_a_terabyte_is_another_file_and_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    os.truncate(tmp_path / "a", 2**40)
    assert read_tree(tmp_path) == {"a": ("1099511627776 bytes", False)}


def test_a_quantile_is_read_from_buckets() -> None:
    assert quantile([], 0.5) is None
    assert quantile([(0.1, 50), (0.2, 50)], 0.5) == pytest.approx(0.1)
    assert quantile([(0.1, 50), (0.2, 50)], 0.75) == pytest.approx(0.15)
    assert quantile([(0.1, 50), (float("inf"), 50)], 0.99) == pytest.approx(0.1)
