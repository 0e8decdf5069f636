"""What becomes of each path when the directory and the project both changed while nobody watched: properties."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.devstack.three_way import UNCERTAIN, Theirs, compare
from orchestrator_stub.platform.source_files import LocalFile

FILES = [LocalFile(digest, executable) for digest in ("a", "b", "c") for executable in (False, True)]
PATHS = st.sampled_from(["x", "y", "z"])
here = st.dictionaries(PATHS, st.sampled_from(FILES))
base = st.dictionaries(PATHS, st.sampled_from([*FILES, UNCERTAIN]))
there = st.dictionaries(PATHS, st.builds(Theirs, st.sampled_from(FILES), st.integers(1, 9), st.booleans()))


@given(base, here, there)
def test_every_text_of_either_side_is_kept_somewhere(
    base: dict[str, LocalFile], here: dict[str, LocalFile], there: dict[str, Theirs]
) -> None:
    found = compare(base, here, there)
    for path in base.keys() | here.keys() | there.keys():
        sent, ours = base.get(path), here.get(path)
        theirs = there[path].file if path in there else None
        told = [path in found.same, path in found.conflicts, path in found.kept]
        assert sum(told) <= 1
        saved = ours != sent and not any(told)
        """As an ordinary save, which goes over what the project has."""
        if saved and theirs not in (None, ours):
            assert sent in (theirs, UNCERTAIN), "what nobody here has seen is gone over"
        if path in found.conflicts:
            assert found.conflicts[path] == there[path]
            assert ours is not None
        if path in found.same:
            assert ours == theirs
        if path in found.kept:
            assert ours is None
            assert theirs is not None


@given(base, here)
def test_what_changed_on_one_side_alone_is_no_conflict(
    base: dict[str, LocalFile], here: dict[str, LocalFile]
) -> None:
    there = {path: Theirs(file, 1, True) for path, file in base.items() if file != UNCERTAIN}
    found = compare(base, here, there)
    assert not found.conflicts
    assert not found.kept
