"""Decides which paths the container may write back, and in which mode. Pure.

The dialect is the database's: `*` and `?` within a segment, `**` as a whole segment for any number of segments (none
too). No braces, no classes, no negation: whoever reads a rule must see what it allows. Both sides are held against the
same cases (tests/contract/globs.json).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final, Literal

from msgspec import Struct

from agent.core.errors import MalformedMessage
from agent.core.model import RelPath

LONGEST_GLOB: Final = 512
"""Characters."""

Mode = Literal["generated", "authored"]
"""What an output becomes: a version of the file at once, or a proposal that a member accepts."""


class Rule(Struct, frozen=True, gc=False):
    """Paths that may be given back. `max_bytes`: of one file. `deletes`: whether its deletion may, too."""

    glob: str
    mode: Mode = "generated"
    max_bytes: int = 2**20
    deletes: bool = False

    def matches(self, path: str) -> bool:
        """Return whether the rule speaks of `path`."""
        return _compiled(self.glob).fullmatch(path) is not None

    @property
    def root(self) -> str:
        """The deepest directory that all its paths are in; "" for the project's own."""
        fixed: list[str] = []
        for segment in self.glob.split("/")[:-1]:
            if "*" in segment or "?" in segment:
                break
            fixed.append(segment)
        return "/".join(fixed)

    @property
    def deep(self) -> bool:
        """Whether its paths may be in directories below `root`."""
        rest = self.glob[len(self.root) :].strip("/").split("/")
        return len(rest) > 1 or rest == ["**"]


def rule_for(rules: Sequence[Rule], path: RelPath) -> Rule | None:
    """Return the first of `rules` that speaks of `path`; None: it may not be given back."""
    return next((rule for rule in rules if rule.matches(path)), None)


def roots(rules: Iterable[Rule]) -> dict[str, bool]:
    """Return the directories to be watched for `rules`, and whether those below them are, too."""
    found: dict[str, bool] = {}
    for rule in rules:
        found[rule.root] = found.get(rule.root, False) or rule.deep
    return found


def read_rules(obj: object) -> tuple[Rule, ...]:
    """Read the rules of the run settings. None, and the flag of an older orchestrator: there are none.

    Raises `MalformedMessage`: what cannot be read allows nothing.
    """
    if obj is None or isinstance(obj, bool):
        return ()
    if not isinstance(obj, list):
        raise MalformedMessage("run settings", "write_back is no list")
    return tuple(map(_rule, obj))


def _rule(each: object) -> Rule:
    if not isinstance(each, dict):
        raise MalformedMessage("run settings", "a rule of write_back is no object")
    glob, mode, most = each.get("glob"), each.get("mode", "generated"), each.get("max_bytes")
    if not isinstance(glob, str) or not 0 < len(glob) <= LONGEST_GLOB or glob.startswith("/"):
        raise MalformedMessage("run settings", "a rule of write_back has no glob")
    if mode not in ("generated", "authored") or type(most) is not int or most < 0:
        raise MalformedMessage("run settings", "a rule of write_back has no mode or size")
    return Rule(glob, mode, most, each.get("deletes") is True)


@lru_cache(maxsize=512)
def _compiled(glob: str) -> re.Pattern[str]:
    """A pattern that takes time by the length of a path, not by a power of it: the container chooses the path.

    What stands between two wildcards is looked for once, at its first place: where a later one does, that one does.
    """
    groups: list[list[str]] = [[]]
    for segment in glob.split("/"):
        if segment == "**":
            groups.append([])
        else:
            groups[-1].append(_segment(segment))
    first, *between, last = groups if len(groups) > 1 else [[], *groups]
    if len(groups) == 1:
        return re.compile("/".join(last), re.DOTALL)
    parts = [f"{segment}/" for segment in first]
    parts += [f"(?>(?:[^/]+/)*?{'/'.join(group)}/)" for group in between if group]
    parts.append(f"(?:[^/]+/)*{'/'.join(last)}" if last else ".+")
    return re.compile("".join(parts), re.DOTALL)


def _segment(text: str) -> str:
    first, *more = (
        "".join("[^/]" if mark == "?" else re.escape(mark) for mark in part) for part in text.split("*")
    )
    if not more:
        return first
    return "".join((first, *(f"(?>[^/]*?{part})" for part in more[:-1] if part), "[^/]*", more[-1]))
