"""tests/scenarios/README.md says what the library is, and the library is that: rows, files, what each replay meets."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from functools import cache
from pathlib import Path

import pytest

from agent.replay.result import Result
from agent.replay.runner import ReplayOptions, replay

TESTS = Path(__file__).parents[2]
LIBRARY = TESTS / "scenarios"
PAGE = (LIBRARY / "README.md").read_text()
BY_EVENTS, BY_TESTS, FLOWS = PAGE.split("\n## ")[1:]


def rows(section: str) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def undisturbed(name: str) -> Result:
    return replay(LIBRARY / f"{name}.jsonl")


def test_every_scenario_is_on_the_page_and_every_name_on_it_is_one() -> None:
    named = {name for section in (BY_EVENTS, FLOWS) for row in rows(section) for name in names(row[1])}
    assert named == {path.stem for path in LIBRARY.glob("*.jsonl")}
    assert len(named) >= 40
    beside = {path.name for path in LIBRARY.iterdir()} - {f"{name}.jsonl" for name in named} - {"README.md"}
    headers = [json.loads((LIBRARY / f"{name}.jsonl").open().readline()) for name in named]
    assert beside == {header["snapshot"] for header in headers if isinstance(header["snapshot"], str)}
    assert all(header["expect"]["tree_hash"] for header in headers)


def test_every_fault_has_one_row_and_what_no_event_expresses_has_a_test() -> None:
    faults = [row[0] for section in (BY_EVENTS, BY_TESTS) for row in rows(section)]
    assert len(faults) == len(set(faults))
    assert len(rows(BY_EVENTS)) + len(rows(BY_TESTS)) >= 45
    code = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    for fault, tests in rows(BY_TESTS):
        assert names(tests), fault
        for test in names(tests):
            assert re.search(rf"def {test}\(", code), f"{fault}: there is no {test}"


@pytest.mark.parametrize(
    ("name", "shows"),
    [(name, row[2]) for row in rows(BY_EVENTS) for name in names(row[1]) if len(row) > 2 and row[2]],
)
def test_a_scenario_meets_what_it_is_there_for(name: str, shows: str) -> None:
    assert set(shows.split(", ")) <= set(undisturbed(name).shown)


# --- what only a dev server shows


def with_dev_server(name: str, mode: str, directory: Path, **environ: str) -> Result:
    command = f"{sys.executable} {Path(__file__).parents[1] / 'devserver' / 'dev_server.py'} {mode}"
    given = {"PATH": os.environ["PATH"], "HOME": str(directory), "DEV_COMMAND": command, **environ}
    return replay(
        LIBRARY / f"{name}.jsonl", directory / "replay", ReplayOptions(real_time=True, environ=given)
    )


def test_a_dev_server_that_crashes_is_back_with_the_save_that_mends_it(tmp_path: Path) -> None:
    result = with_dev_server("dev-server-crashes", "crashes-unless-mended", tmp_path)
    assert result.differences == ()
    assert result.dev_server == "ready"
    assert "dev_server_backoff" in result.shown


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
def test_an_install_that_fails_is_made_good_by_the_next_change(tmp_path: Path) -> None:
    result = with_dev_server("install-fails", "serves", tmp_path)
    assert result.differences == ()
    assert result.dev_server == "ready"
    assert "install_failed" in result.shown
    assert (tmp_path / "replay/project/node_modules/dep/index.js").read_text() == "module.exports = 1\n"


@pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm")
def test_dependencies_that_change_are_installed_beside_what_runs(tmp_path: Path) -> None:
    result = with_dev_server("dependencies-change", "serves", tmp_path)
    assert result.differences == ()
    assert (result.dev_server, set(result.shown) & {"install_failed"}) == ("ready", set())
    assert (tmp_path / "replay/project/node_modules/dep/package.json").exists()
