"""What the editors do stays a project that a database would take, of the size it began with."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from soak.writing import ASSISTED, MARKER, TURN, Action, File, Writing


def started(seed: int) -> Writing:
    writing = Writing({"package.json": File(b"{}")}, random.Random(seed))
    writing.begin()
    return writing


@pytest.mark.parametrize("seed", range(10))
def test_the_steps_make_the_files_and_the_size_stays(seed: int) -> None:
    writing = started(seed)
    mirror = dict(writing.files)
    count = len(mirror)
    size = sum(len(file.content) for file in mirror.values())
    done: Counter[Action] = Counter()
    for _ in range(400):
        action, steps = writing.act(ASSISTED)
        done[action] += 1
        assert steps
        for step in steps:
            assert step
            for path, file in step.items():
                assert mirror.get(path) != file, "a step holds only what it changes"
                if file is None:
                    del mirror[path]
                else:
                    mirror[path] = file
        assert mirror == writing.files
        assert not {parent for path in mirror for parent in _parents(path)} & mirror.keys()
        assert count / 3 < len(mirror) < count * 2
    assert set(done) == set(Action)
    assert size / 3 < sum(len(file.content) for file in mirror.values()) < size * 3


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def test_an_ai_turn_is_forty_files_with_binary_ones() -> None:
    writing = started(1)
    _, [step] = writing.act({Action.AI_TURN: 1})
    assert TURN * 0.8 < len(step) <= TURN
    assert sum(file is not None and b"\0" in file.content for file in step.values()) == 2
    assert any(file is None for file in step.values())


def test_some_texts_are_too_large_to_travel_in_an_event() -> None:
    writing = started(2)
    sizes = [len(file.content) for path, file in writing.files.items() if "tables/" in path]
    for _ in range(20):
        _, [step] = writing.act({Action.TABLE: 1})
        sizes += [len(file.content) for file in step.values() if file]
    assert max(sizes) > 200_000 > min(sizes)


def test_undo_gives_back_what_was_there() -> None:
    writing = started(3)
    before = dict(writing.files)
    writing.act({Action.SAVE: 1})
    assert writing.files != before
    writing.act({Action.UNDO: 1})
    assert writing.files == before
    writing.act({Action.DELETE_AND_UNDO: 1})
    assert writing.files == before


def test_a_last_word_is_a_save_of_the_marker() -> None:
    writing = started(4)
    assert set(writing.last_word("over")) == {MARKER}
    assert b"over" in writing.files[MARKER].content
    assert set(writing.touch(["src/features/f0/Part0.js", "gone.js"])) == {"src/features/f0/Part0.js"}
