"""A room, a file and a function stay small enough to be read at once; what is larger is named here, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.rooms import PACKAGES, ROOT, functions, rooms

MOST_MODULES = 12
"""Of one room, its `__init__` not counted."""
MOST_FILES = 9
"""Directly in `agent/`, `__init__` and `__main__` too."""
MOST_LINES = 500
"""Of a file."""
MOST_CODE = 60
"""Lines of one function, without docstring, comments and blank lines."""

LARGER = {
    (
        "soak/faults.py",
        "Faults._strike",
    ): "a table, one case for each kind of fault: mypy says that none is missing",
}
"""What may be larger, and why."""

SOURCES = [
    path.relative_to(ROOT)
    for package in (*PACKAGES, "bench", "soak")
    for path in sorted((ROOT / package).rglob("*.py"))
]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_room_has_more_modules_than_a_reader_keeps_in_mind(package: str) -> None:
    sizes = {room: sum(path.stem != "__init__" for path in paths) for room, paths in rooms(package).items()}
    assert {room: size for room, size in sizes.items() if size > MOST_MODULES} == {}


def test_the_agent_s_own_folder_is_a_list_of_rooms() -> None:
    assert len(list((ROOT / "agent").glob("*.py"))) <= MOST_FILES


def test_no_file_is_longer_than_it_is_read() -> None:
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_no_function_hides_a_second_one() -> None:
    larger = {
        (str(path), name): code
        for path in SOURCES
        for name, code in functions(ROOT / path, longer_than=MOST_CODE).items()
        if code > MOST_CODE
    }
    assert larger.keys() == LARGER.keys(), "too large, or no longer so"


def test_what_a_function_measures(tmp_path: Path) -> None:
    text = '''
class Room:
    """Of no function."""

    async def enter(self):
        """Not counted,

        all of it."""
        # nor this

        def inner():
            return (
                1
            )
        return inner

if True:
    def one(): return """two
    lines"""
'''
    (tmp_path / "it.py").write_text(text)
    assert functions(tmp_path / "it.py") == {"Room.enter": 6, "one": 2}
