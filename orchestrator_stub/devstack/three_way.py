"""Decides what becomes of each path when the directory and the project both changed while nobody watched.

Pure: what was sent last (`base`), what the directory holds (`here`) and what the project holds (`there`) go in. A
change on one side alone is an ordinary save, or is left as it is; a change on both keeps both texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from orchestrator_stub.platform.source_files import LocalFile

UNCERTAIN: Final = LocalFile("", False)
"""What the project holds at a path when nobody knows whether the last save was taken: equal to nothing."""


@dataclass(frozen=True, slots=True)
class Theirs:
    """What the project holds at one path."""

    file: LocalFile
    version: int
    is_text: bool


@dataclass(slots=True)
class Comparison:
    """What to do; what is not named here is to be saved as ever.

    `same`: both sides came to the same, which is the new base (None: both removed it). `conflicts`: both changed it;
    what the project has is to be kept beside the directory's, which is then saved. `kept`: removed here and changed
    there; the project's stays, for a removal never goes over a text that nobody here has seen.
    """

    same: dict[str, LocalFile | None] = field(default_factory=dict)
    conflicts: dict[str, Theirs] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


def compare(
    base: Mapping[str, LocalFile], here: Mapping[str, LocalFile], there: Mapping[str, Theirs]
) -> Comparison:
    """Compare the three. A path that is `UNCERTAIN` in `base` is saved as ever: what is there may be our own."""
    found = Comparison()
    for path in sorted(base.keys() | here.keys()):
        sent, ours, theirs = base.get(path), here.get(path), there.get(path)
        if ours == sent or sent == UNCERTAIN:
            continue
        held = theirs.file if theirs is not None else None
        if held == sent:
            continue
        if held == ours:
            found.same[path] = ours
        elif ours is None:
            found.kept.append(path)
        elif theirs is not None:
            found.conflicts[path] = theirs
    return found
