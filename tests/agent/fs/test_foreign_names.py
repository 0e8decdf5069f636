"""Names that are not UTF-8. None can be the database's, and anything in the project can make them anywhere."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from immutables import Map

from agent.core.model import Cursor, RelPath, digest_of
from agent.devserver.project import find
from agent.sync.ledger import Ledger
from agent.sync.workspace import Workspace
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems
from tests.agent.devserver.installs import write as write_package
from tests.agent.disks import Agent, kinds, write
from tests.agent.sync.test_shadow import shadow_of

LATIN = os.fsdecode(b"caf\xe9")
"""As Python spells it: with a surrogate, which no UTF-8 has."""


def plant(root: Path) -> None:
    (root / LATIN).mkdir(parents=True)
    (root / LATIN / "inside").write_text("x")
    (root / f"{LATIN}.txt").write_text("x")
    (root / f"link-{LATIN}").symlink_to("nowhere")
    os.mkfifo(root / f"pipe-{LATIN}")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    yield ledger
    ledger.close()


@pytest.fixture
def workspace(ledger: Ledger, agent: Agent) -> Workspace:
    return Workspace(agent.disk, ledger, Problems(Metrics()))


@pytest.mark.parametrize("empty", [LATIN, f"{LATIN}/b", f"b/{LATIN}"])
def test_empty_directories_of_such_names_give_way_and_the_ledger_goes_on(
    workspace: Workspace, ledger: Ledger, root: Path, empty: str
) -> None:
    (root / "a" / empty).mkdir(parents=True)
    applied = workspace.apply([write("a", "file")], Map())
    assert applied.done == {"a"}
    workspace.record(Cursor("e", 1))
    workspace.close(Cursor("e", 1))
    ledger.close()
    loaded = ledger.load()
    assert loaded is not None
    assert loaded.tree.files().keys() == {"a"}


def test_a_directory_with_such_a_file_stays_and_is_one_problem(agent: Agent, root: Path) -> None:
    plant(root / "a")
    before = sorted(os.listdir(os.fsencode(root / "a")))
    assert kinds(agent.apply(write("a", "file"), write("b", "1"))) == [
        ("path_unusable", "a", "directory_in_the_way")
    ]
    assert sorted(os.listdir(os.fsencode(root / "a"))) == before
    assert (root / "b").read_text() == "1"


def test_no_look_at_a_directory_takes_or_stumbles_over_them(agent: Agent, root: Path) -> None:
    agent.put({"src/a": "1"})
    for place in (root, root / "src"):
        plant(place)
    assert agent.disk.scan() == agent.known
    shadow = shadow_of(root, {"src/a": "1", "b": "2"})
    found = shadow.read(shadow.wanted())
    assert found == {"src/a": digest_of(b"1")}
    shadow.compare(shadow.wanted(), found)
    assert json.dumps(shadow.report())


def test_no_project_is_looked_for_in_them(tmp_path: Path) -> None:
    write_package(tmp_path / LATIN, scripts={"dev": "vite"})
    assert find(tmp_path) is None
    frontend = write_package(tmp_path / "frontend", scripts={"dev": "vite"})
    assert find(tmp_path) == frontend


def test_a_directory_of_them_counts_as_empty(workspace: Workspace, root: Path) -> None:
    plant(root)
    assert workspace.found() == set()
    workspace.apply([write("src/a", "1")], Map())
    assert workspace.disk.made == {RelPath("src")}
