"""The measuring itself: what is refused, what is reported, and that the contestants really take turns."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import bench.__main__ as command
from bench.harness.machine import Others
from bench.harness.results import Ratio, Result, Row, Unmeasurable, Waits, figure, in_turn, ratio_of


def row(low: float, value: float, high: float, **bound: float) -> Row:
    return Row("it", 1.0, "µs", peer="peer", theirs=2.0, ratio=Ratio(value, low, high), **bound)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("measured", "result"),
    [
        (row(0.8, 0.9, 1.0, at_least=0.7), Result.MET),
        (row(0.5, 0.6, 0.65, at_least=0.7), Result.NOT_MET),
        (row(0.6, 0.72, 0.8, at_least=0.7), Result.TOO_NOISY),
        (row(0.1, 0.2, 0.24, at_most=0.25), Result.MET),
        (row(0.3, 0.4, 0.5, at_most=0.25), Result.NOT_MET),
        (row(0.2, 0.24, 0.3, at_most=0.25), Result.TOO_NOISY),
        (row(0.9, 1.0, 1.1), Result.MEASURED),
        (row(0.5, 1.0, 1.5), Result.TOO_NOISY),
        (row(0.8, 0.9, 1.0, at_least=0.7, waited=0.11), Result.TOO_NOISY),
        (row(0.5, 0.6, 0.65, at_least=0.7, waited=0.11), Result.TOO_NOISY),
        (row(0.8, 0.9, 1.0, at_least=0.7, taken=0.11), Result.TOO_NOISY),
        (row(0.8, 0.9, 1.0, at_least=0.7, taken=0.09), Result.MET),
        (Row("memory", 47.0, "MB", sense="memory", at_most=48, taken=0.5), Result.MET),
        (Row("alone", 47.0, "MB", at_most=48), Result.MET),
        (Row("alone", 49.0, "MB", at_most=48), Result.NOT_MET),
    ],
)
def test_a_bound_is_met_only_by_the_whole_interval(measured: Row, result: Result) -> None:
    assert measured.result is result


def test_a_refused_number_appears_nowhere() -> None:
    refused = dataclasses.replace(row(0.6, 0.7213, 0.8, at_least=0.7), note="best 0.7213")
    assert "0.7213" not in json.dumps(refused.as_json())
    assert refused.as_json()["ours"] is None
    assert "0.72" not in command.line(refused)
    assert "waited for a processor 42%" in command.line(row(0.8, 0.9, 1.0, waited=0.42))


@pytest.mark.parametrize("seed", range(5))
def test_the_interval_holds_the_truth_as_often_as_it_says(seed: int) -> None:
    chance = random.Random(seed)
    held = 0
    for _ in range(400):
        pairs = [(chance.lognormvariate(0.5, 0.6), chance.lognormvariate(0, 0.6)) for _ in range(31)]
        ratio = ratio_of([a for a, _ in pairs], [b for _, b in pairs])
        assert ratio.low <= ratio.value <= ratio.high
        held += ratio.low <= 2.718281828**0.5 <= ratio.high
    assert held / 400 > 0.93


def test_noise_that_hits_both_of_a_round_cancels() -> None:
    chance = random.Random(1)
    busy = [chance.uniform(1, 20) for _ in range(31)]
    ratio = ratio_of([b * 2 for b in busy], busy)
    assert (ratio.low, ratio.value, ratio.high) == (2.0, 2.0, 2.0)


def test_nothing_measured_is_no_ratio() -> None:
    with pytest.raises(ValueError, match="no samples"):
        ratio_of([], [])


def test_contestants_take_turns_and_the_warm_up_does_not_count() -> None:
    order: list[str] = []

    def contestant(name: str) -> float:
        order.append(name)
        return float(len(order))

    samples = in_turn({name: lambda name=name: contestant(name) for name in "ab"}, 4, warm_up=2)  # type: ignore[misc]
    assert [len(taken) for taken in samples.values()] == [4, 4]
    assert min(map(min, samples.values())) > 4
    assert "".join(order[4:]) == "abba" * 2


def test_a_process_that_has_to_share_its_processor_is_seen_waiting() -> None:
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel does not say how long a process waits")
    core = str(min(os.sched_getaffinity(0)))
    burn = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"
    turn = """
import os, sys, time
from bench.harness.results import Waits
os.sched_setaffinity(0, {int(sys.argv[1])})
waits, deadline = Waits(), time.monotonic() + 10
while waits.share < 0.25 and time.monotonic() < deadline:
    with waits.turn():
        began = time.process_time()
        while time.process_time() < began + 0.05: pass
print(waits.share)
"""
    with subprocess.Popen([sys.executable, "-c", burn, core], stdout=subprocess.PIPE) as busy:
        try:
            assert busy.stdout is not None
            busy.stdout.readline()
            command_line = [sys.executable, "-c", turn, core]
            done = subprocess.run(command_line, check=True, capture_output=True, text=True)
        finally:
            busy.kill()
    assert float(done.stdout) >= 0.25


def test_what_passes_between_turns_is_nobodys_waiting() -> None:
    waits = Waits()
    assert waits.share == 0.0
    waits.add(900, 100)
    waits.add(1_000, 0)
    assert waits.share == 0.05


def run_with(monkeypatch: pytest.MonkeyPatch, outcome: Sequence[Row] | Exception, *arguments: str) -> int:
    def run(quick: bool) -> Sequence[Row]:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(command, "modules", lambda wanted: {"fake": run})
    # How busy the machine is that runs the tests is not what these are about.
    monkeypatch.setattr(Others, "share", lambda others: 0.0)
    return command.main(("--quick", *arguments))


@pytest.mark.parametrize(
    ("outcome", "code", "said"),
    [
        ([row(0.8, 0.9, 1.0, at_least=0.7)], 0, "0.90"),
        ([row(0.5, 0.6, 0.65, at_least=0.7)], 1, "NOT MET"),
        ([row(0.6, 0.72, 0.8, at_least=0.7)], 3, "too noisy"),
        ([row(0.5, 1.0, 1.5), row(0.8, 0.9, 1.0, at_least=0.7)], 0, "too noisy"),
        ([row(0.5, 1.0, 1.5), row(0.6, 0.72, 0.8, at_least=0.7)], 3, "too noisy"),
        (Unmeasurable("no C compiler"), 0, "not measured: no C compiler"),
        (RuntimeError("a bug"), 2, "a bug"),
    ],
)
def test_the_exit_says_how_it_went(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    outcome: Sequence[Row] | Exception,
    code: int,
    said: str,
) -> None:
    assert run_with(monkeypatch, outcome, "--json", str(tmp_path / "new/results.json")) == code
    assert said in capsys.readouterr().out
    written = json.loads((tmp_path / "new/results.json").read_text())
    assert written["machine"]["cores"] >= 1
    assert {"load", "load_after"} <= set(written["machine"])
    assert written["peers"]["websockets"]
    assert "fake" in written["results"]


def test_help_lists_every_measurement_and_says_what_a_refusal_means(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("apply", "hydrate", "mirror", "too noisy", "exit code", "--save"))
    assert "results   " not in said


@pytest.mark.parametrize("more", [["--quick"], ["apply"]])
def test_only_a_whole_run_is_kept(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(["--save", *more])
    assert "one whole run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(0.0034567, "0.0035"), (0.456, "0.46"), (4.528, "4.53"), (16.38, "16.4"), (1234.5, "1,234")],
)
def test_a_ratio_is_read_with_two_or_three_figures(ratio: float, said: str) -> None:
    assert figure(ratio) == said


def test_an_unknown_name_is_one_line() -> None:
    with pytest.raises(SystemExit, match="there is no measurement 'nonsense'"):
        command.main(["nonsense"])


def test_the_measurement_of_apply_runs(tmp_path: Path) -> None:
    from bench.cases.apply import EXCHANGING, FOLLOWED, OURS, RENAMING, compile_peer, measure

    try:
        binary = compile_peer(tmp_path)
    except Unmeasurable as reason:
        pytest.skip(str(reason))
    row = measure(tmp_path / "home", binary, 1000, rounds=3)
    rows = [
        row("", OURS, RENAMING, 0.7),
        row("", OURS, EXCHANGING),
        row(", planned, recorded", FOLLOWED, RENAMING),
    ]
    assert [r.name for r in rows] == ["apply 1 KB", "apply 1 KB", "apply 1 KB, planned, recorded"]
    assert all(r.ours > 0 and r.theirs and r.ratio and 0 <= r.waited < 1 for r in rows)
    left = sorted(f.read_bytes()[:1] for f in (tmp_path / "home/renaming").rglob("*.tsx"))
    assert left == [b"c"] * 50
