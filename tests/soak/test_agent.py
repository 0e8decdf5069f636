"""The agents of a soak have a wall clock of their own, which jumps without touching anybody else's."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import agent.__main__
from soak.agent import main


def test_the_agents_clock_follows_its_file_and_nobody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = tmp_path / "clocks" / "s1"
    clock.parent.mkdir()
    monkeypatch.setenv("SESSION_ID", "s1")
    true, true_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", true)
    monkeypatch.setattr(time, "time_ns", true_ns)
    off: list[float] = []

    def run(words: tuple[str, ...]) -> int:
        assert words == ("run",)
        for by in ("", "600", "-600.5", "nonsense"):
            clock.write_text(by)
            off.extend((time.time() - true(), (time.time_ns() - true_ns()) / 1e9))
        clock.unlink()
        off.append(time.time() - true())
        return 3

    monkeypatch.setattr(agent.__main__, "main", run)
    assert main(str(clock.parent), "run") == 3
    assert off == pytest.approx([0, 0, 600, 600, -600.5, -600.5, 0, 0, 0], abs=1.0)
