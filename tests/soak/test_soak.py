"""A soak for real: a tiny one that has to pass, ones that are sabotaged and have to fail, and ten minutes at night."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from soak.__main__ import main, run
from soak.report import result_of
from soak.run import Outcome, Soak
from soak.schedule import Settings
from soak.stack import processes_of

pytestmark = pytest.mark.system

TINY = Settings(
    seed=1,
    minutes=0.08,
    agents=2,
    vite=0,
    fault_every=0.4,
    longest=0.4,
    pause=0.15,
    last_word=1.0,
    patience=120.0,
)


async def test_a_tiny_soak_passes_and_leaves_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    outcome = await run(TINY, tmp_path / "state", said.append)
    assert result_of(outcome).wrong == (), said[-5:]
    assert result_of(outcome).exit_code == 0
    assert outcome.edits["commits"] > 5
    assert len(outcome.faults) > 3
    assert [len(check.took) for check in outcome.checks] == [2]
    assert {life.role for life in outcome.lives} == {"agent", "orchestrator", "supabase"}
    assert processes_of(tmp_path / "state") == {}


def spoil(soak: Soak) -> None:
    """A file that was saved is not in the agent's tree, and nobody is told."""
    tree = soak._stack.tree(1)
    (tree / "package.json").write_text("{}")


def stray(soak: Soak) -> None:
    """A process that stays."""
    subprocess.Popen(["sleep", "600"], cwd=soak._stack.state, start_new_session=True)


def bug(soak: Soak) -> None:
    """The orchestrator dies by itself."""
    pid = soak._stack.orchestrator.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("sabotage", "why"),
    [
        (spoil, "agent 1 is not equal after 5 s: disk: package.json has other bytes"),
        (stray, "left behind: process"),
        (bug, "orchestrator ended by itself, exit -9"),
    ],
)
async def test_what_is_wrong_is_found(sabotage: Callable[[Soak], None], why: str, tmp_path: Path) -> None:
    settings = Settings(seed=4, minutes=0.1, agents=2, vite=0, fault_every=1e9, last_word=1.0, patience=5.0)
    soak = Soak(settings, tmp_path / "state", lambda _: None, asyncio.Event())
    running = asyncio.create_task(soak.run())
    while not soak._working.is_set():
        assert not running.done(), running.result().wrong
        await asyncio.sleep(0.05)
    sabotage(soak)
    outcome: Outcome = await running
    assert any(each.startswith(why) for each in outcome.wrong), outcome.wrong
    assert result_of(outcome).exit_code == 1
    assert processes_of(tmp_path / "state") == {}, "what was left behind is ended all the same"


@pytest.mark.nightly
def test_ctrl_c_stops_it_and_there_is_a_report(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "soak", "--minutes", "60", "--agents", "2", "--vite", "0", "--seed", "5",
        "--state", tmp_path / "state", "--out", tmp_path / "out",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "commits" in line:
                process.send_signal(signal.SIGINT)
                break
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["interrupted"]
    assert report["wrong"] == []
    assert len(report["checks"]) == 1
    assert processes_of(tmp_path / "state") == {}


@pytest.mark.nightly
def test_ten_minutes_with_twenty_agents(tmp_path: Path) -> None:
    """`make soak MINUTES=10`: no growth, nothing lost, no agent left behind, and every kind of fault struck."""
    code = main(
        [
            "--minutes",
            "10",
            "--state",
            str(tmp_path / "state"),
            "--out",
            str(tmp_path / "out"),
        ]
    )
    report = (tmp_path / "out" / "report.md").read_text()
    assert code == 0, report
    if os.geteuid() == 0:
        assert "Did not strike" not in report


def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--minutes", "0"])
    assert ended.value.code == 64
    assert capsys.readouterr().err == "soak: --minutes and --agents must be above 0\n"
