"""Disk, stats, ledger and problems move as one: what is recorded is what is on disk, whatever fails in between."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from immutables import Map

from agent.core.errors import RootUnusable
from agent.core.model import Cursor, Entry, Operation, Problem, RelPath, Tree
from agent.fs.project_dir import ProjectDir
from agent.sync.drift import Observed
from agent.sync.ledger import Ledger, LedgerState
from agent.sync.workspace import ENVIRONMENT_PROBLEMS, ApplyResult, Workspace
from agent.telemetry.metrics import Metrics
from agent.telemetry.status import Problems
from tests.agent.disks import in_staging, remove, seen, staged, write
from tests.agent.sync.world import paths, undone_disk

A, B = RelPath("a"), RelPath("src/b")


class Place:
    """A workspace that is open, and the tree that an agent would have of it."""

    def __init__(self, place: Path, disk: type[ProjectDir] = ProjectDir) -> None:
        self.place = place
        self.root = place / "project"
        self.problems = Problems(Metrics())
        self.disk = disk(self.root, place / "staging")
        self.ledger = Ledger(place / "ledger.sqlite")
        self.workspace = Workspace(self.disk, self.ledger, self.problems)
        self.entries: Map[RelPath, Entry] = Map()
        self.revision = 0
        self.loaded = self.workspace.open()

    def apply(self, *operations: Operation) -> ApplyResult:
        result = self.workspace.apply(operations, self.entries)
        done = {each.path: each.entry for each in operations if each.path in result.done}
        self.entries = self.entries.update(done)
        return result

    @property
    def tree(self) -> Tree:
        self.revision += 1
        return Tree(Cursor("e", self.revision), self.entries)

    @property
    def kinds(self) -> list[str]:
        return sorted(problem.kind for problem in self.problems.open.values())

    def kill(self) -> None:
        """End without a farewell."""
        self.disk.close()
        self.ledger.close()


@contextmanager
def opened(place: Path, disk: type[ProjectDir] = ProjectDir) -> Iterator[Place]:
    each = Place(place, disk)
    try:
        yield each
    finally:
        each.kill()


@contextmanager
def full(place: Path) -> Iterator[None]:
    """A ledger that cannot be written: another process has it locked."""
    path = place / "ledger.sqlite"
    path.unlink(missing_ok=True)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("begin exclusive")
    try:
        yield
    finally:
        other.close()
        path.unlink()


def recorded(place: Path) -> LedgerState | None:
    ledger = Ledger(place / "ledger.sqlite")
    try:
        return ledger.load()
    finally:
        ledger.close()


def test_what_was_done_is_recorded_with_its_stat_and_its_directories(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        assert place.loaded is None
        result = place.apply(write("a", "1"), write("src/b", "1"))
        assert result == ApplyResult(done=paths("a", "src/b"))
        place.workspace.record(place.tree.cursor)
        stats = dict(place.workspace.stats)
        assert stats == {A: place.disk.stat(A), B: place.disk.stat(B)}
    state = recorded(tmp_path)
    assert state is not None
    assert state.tree == Tree(Cursor("e", 1), place.entries)
    assert (state.stats, state.directories, state.leftovers) == (stats, paths("src"), frozenset())


def test_nothing_to_do_is_nothing_done(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        assert place.apply() == ApplyResult()
        assert not (tmp_path / "ledger.sqlite").exists()


def test_a_removal_takes_the_stat_with_it(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        place.apply(write("a", "1"))
        assert place.apply(remove("a")).done == paths("a")
        assert place.workspace.stats == {}
        place.workspace.record(place.tree.cursor)
    state = recorded(tmp_path)
    assert state is not None
    assert not state.tree.files()


def test_a_kill_before_the_record_leaves_files_that_the_next_run_removes(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        place.apply(write("a", "1"))
        place.workspace.record(place.tree.cursor)
        place.apply(write("a", "2"), write("src/b", "new"))
    with opened(tmp_path) as place:
        assert place.loaded is not None
        assert seen(place.root) == {"a": "2", "src/": ""}


async def test_a_kill_before_the_record_leaves_a_replaced_file_for_unconfirmed(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        place.apply(write("a", "1"), write("src/b", "1"))
        place.workspace.record_whole(place.tree)
        place.apply(write("a", "22"))
    with opened(tmp_path) as place:
        assert place.loaded is not None
        tree, drifts = await place.workspace.audit(place.loaded)
        assert [(drift.path, drift.rule) for drift in drifts] == [("a", "changed")]
        assert (tree.entries[A].provisional, tree.entries[A].size, tree.entries[A].version) == (True, 2, 1)
        assert tree.entries[B] == place.loaded.tree.entries[B]
        assert place.workspace.stats[A] == place.disk.stat(A)


def test_a_ledger_without_a_cursor_is_no_run_to_go_on_from_and_its_leftovers_go(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        place.apply(write("a", "1"))
    with opened(tmp_path) as place:
        assert place.loaded is None
        assert place.workspace.found() == set()


def test_a_directory_with_files_is_seen(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        assert place.workspace.found() == set()
        (place.root / "notes").write_text("x")
        assert place.workspace.found() == {"notes"}


def test_a_root_that_cannot_be_used_is_said(tmp_path: Path) -> None:
    (tmp_path / "project").write_text("a file")
    with pytest.raises(RootUnusable, match=r"cannot use the project directory"):
        Place(tmp_path)


# --- failures


def test_when_the_ledger_cannot_take_the_announcement_nothing_is_written(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        with full(tmp_path):
            assert place.apply(write("a", "1")) == ApplyResult(undone=True)
            assert (seen(place.root), place.kinds) == ({}, ["io_error"])
            assert "ledger" in place.workspace.failure
        assert place.apply(write("a", "1")).done == paths("a")
        assert place.workspace.record(place.tree.cursor)
        assert place.kinds == []


@pytest.mark.parametrize("whole", [False, True])
def test_what_the_ledger_could_not_record_goes_with_the_next_record(tmp_path: Path, whole: bool) -> None:
    with opened(tmp_path) as place:
        place.apply(write("a", "1"))
        place.ledger.close()
        with full(tmp_path):
            if whole:
                place.workspace.record_whole(place.tree)
            else:
                place.workspace.record(place.tree.cursor)
            assert place.kinds == ["io_error"]
        place.workspace.record(place.tree.cursor)
    state = recorded(tmp_path)
    assert state is not None
    assert state.tree == Tree(Cursor("e", 2), place.entries)


def test_what_the_environment_undoes_is_a_problem_until_a_transaction_is_done(tmp_path: Path) -> None:
    with opened(tmp_path, undone_disk(len(ENVIRONMENT_PROBLEMS))) as place:
        for _ in ENVIRONMENT_PROBLEMS:
            assert place.apply(write("a", "1")) == ApplyResult(undone=True)
        assert place.workspace.failure == "the test says so"
        assert (place.kinds, place.workspace.stats) == (["disk_full"], {})
        place.apply(write("a", "1"))
        assert place.kinds == []


@pytest.mark.parametrize("kind", ENVIRONMENT_PROBLEMS)
def test_every_kind_that_speaks_of_the_machine_is_over_with_it(tmp_path: Path, kind: str) -> None:
    with opened(tmp_path) as place:
        place.problems.owned_by("sync.workspace").add(Problem(kind, "x", "elsewhere"))  # type: ignore[arg-type]
        place.apply(write("a", "1"))
        assert place.kinds == []


def test_where_the_undoing_failed_what_stands_there_is_said_and_recorded(tmp_path: Path) -> None:
    with opened(tmp_path, undone_disk(1, done=["a"])) as place:
        assert place.apply(write("a", "1"), write("src/b", "1")) == ApplyResult(paths("a"), undone=True)
        assert set(place.workspace.stats) == {A}
        place.workspace.record(place.tree.cursor)
    state = recorded(tmp_path)
    assert state is not None
    assert set(state.tree.files()) == {A}


def test_a_path_that_this_disk_cannot_hold_is_a_problem_until_it_can(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        place.apply(write("a", "1"))
        assert place.apply(write("a/below", "1"), write("src/b", "1")) == ApplyResult(
            paths("src/b"), failed=paths("a/below")
        )
        assert place.kinds == ["path_unusable"]
        assert place.apply(write("src/b", "2")).done == paths("src/b")
        assert place.kinds == ["path_unusable"]
        place.apply(remove("a"), write("a/below", "2"))
        assert place.kinds == []


def test_overwritten_drift_is_no_problem(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        place.apply(write("a", "1"))
        (place.root / "a").write_text("another process's")
        assert place.apply(write("a", "2")).done == paths("a")
        assert (seen(place.root), place.kinds) == ({"a": "2"}, [])


def test_other_owners_problems_are_left_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        place.problems.owned_by("sync.engine").add(Problem("drift", "x", "a"))
        place.apply(write("a", "1"))
        assert place.kinds == ["drift"]


# --- what other processes did


def test_a_file_that_was_only_touched_keeps_its_entry_and_gets_its_new_stat(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        place.apply(write("a", "1"))
        os.utime(place.root / "a", (1, 1))
        look = place.disk.stat(A)
        assert look is not None
        assert look != place.workspace.stats[A]
        place.workspace.remember_stats(Observed((), (), {A: look}))
        assert place.workspace.expected(Tree(entries=place.entries)) == (place.entries, {A: look})


# --- the end


def test_the_end_clears_staging_and_records(tmp_path: Path) -> None:
    with opened(tmp_path) as place:
        place.apply(write("a", "1"))
        staged(place.disk, "src/b", "half an answer")
        place.apply(write("a", "2"))
        place.workspace.close(place.tree.cursor)
        assert in_staging(tmp_path / "staging") == []
    state = recorded(tmp_path)
    assert state is not None
    assert state.tree == Tree(Cursor("e", 1), place.entries)
