"""The golden messages: what travels between the two sides, one file a form. Neither side imports the other; both are
held against these.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "golden"


def load(name: str) -> Any:
    """The golden message `name`."""
    return json.loads((DIRECTORY / f"{name}.json").read_text())


def assert_same_form(
    actual: object, golden: object, *, optional: frozenset[str] = frozenset(), at: str = ""
) -> None:
    """`actual` has the keys of `golden` and values of the same JSON types, all the way down.

    A null in the golden message stands for any type. Objects in lists are held against the golden list's items by their
    keys, so that a list may be longer and its items of either form; what else is in a list, by its place. `optional`
    keys may be missing or extra.
    """
    where = at or "message"
    if golden is None or actual is None:
        return
    if isinstance(golden, bool) or isinstance(actual, bool):
        assert isinstance(actual, bool), f"{where}: {actual!r} is no boolean"
        assert isinstance(golden, bool), f"{where}: {actual!r} is a boolean"
        return
    if isinstance(golden, dict):
        assert isinstance(actual, dict), f"{where}: {actual!r} is no object"
        assert set(actual) - optional == set(golden) - optional, (
            f"{where}: {sorted(actual)} != {sorted(golden)}"
        )
        for key in set(actual) & set(golden):
            assert_same_form(actual[key], golden[key], optional=optional, at=f"{where}.{key}")
        return
    if isinstance(golden, list):
        assert isinstance(actual, list), f"{where}: {actual!r} is no list"
        forms = {frozenset(item) - optional: item for item in golden if isinstance(item, dict)}
        for n, item in enumerate(actual):
            if not isinstance(item, dict):
                assert_same_form(item, golden[min(n, len(golden) - 1)], optional=optional, at=f"{where}[{n}]")
                continue
            form = forms.get(frozenset(item) - optional)
            assert form is not None, f"{where}[{n}]: no golden item has the keys {sorted(item)}"
            assert_same_form(item, form, optional=optional, at=f"{where}[{n}]")
        return
    kind = (int, float) if isinstance(golden, (int, float)) else type(golden)
    assert isinstance(actual, kind), f"{where}: {actual!r} is not of the type of {golden!r}"
