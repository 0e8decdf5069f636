"""Say where two directories differ that should not: what the database says, and what another flow has put there.

Pure; time is passed in, in monotonic seconds. Both sides move while a save travels, each at its own pace, so a
difference counts only when *it stood*: both sides as they are now for the settling time. Whatever moves on either side
starts that time anew, so a file in flight is never a difference, and a person who types does not make one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import translate

from agent.core.model import Digest, Entry, Problem, RelPath


class Rule(StrEnum):
    """How a path differs."""

    DIFFERS = "differs"
    MISSING = "missing"
    EXTRA = "extra"
    UNREADABLE = "unreadable"


TOLD: Mapping[Rule, str] = {
    Rule.DIFFERS: "holds something else than the database",
    Rule.MISSING: "is in the database and not in the live directory",
    Rule.EXTRA: "is in the live directory and not in the database",
    Rule.UNREADABLE: "cannot be read in the live directory",
}


Found = Digest | bytes | None
"""What is in the live directory at a path: its digest; bytes for content that is another for sure and was not read;
None for what cannot be read, or need not be because nobody wants it."""

Pair = tuple[Digest | None, Found]
"""What the database wants at a path (None: nothing) and what was found."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One path that differs. `since`: when it was first seen so."""

    path: RelPath
    rule: Rule
    pair: Pair
    since: float

    def problem(self) -> Problem:
        """As status, metrics, log and heartbeat show it."""
        return Problem("shadow_difference", f"{self.path} {TOLD[self.rule]}", self.path, self.rule.value)


class Comparison:
    """See the module. `settle` in seconds; `ignore`: file name patterns whose *extra* files are no difference.

    A path that the database has, or had, is compared whatever its name: build output is what a pattern is for.
    """

    def __init__(self, settle: float, ignore: Iterable[str] = ()) -> None:
        self.settle = settle
        self._ignored = re.compile("|".join(map(translate, ignore)) or r"(?!)")
        self._standing: dict[RelPath, Difference] = {}
        """Every path that differs, and since when in this way."""
        self.open: Mapping[RelPath, Difference] = {}
        """The differences that stand, by path."""
        self.compared = 0
        """Files that were compared last."""

    def compare(self, wanted: Mapping[RelPath, Entry], found: Mapping[RelPath, Found], now: float) -> None:
        """Take in what both sides hold now. `found`: the files that are there."""
        before, self._standing = self._standing, {}
        for path, rule, pair in self._unequal(wanted, found):
            fresh, known = Difference(path, rule, pair, now), before.get(path)
            same = known is not None and (known.rule, known.pair) == (rule, pair)
            self._standing[path] = known if known is not None and same else fresh
        self.compared = sum(1 for entry in wanted.values() if entry.is_file)
        self.open = {
            path: each for path, each in sorted(self._standing.items()) if now - each.since >= self.settle
        }

    def _unequal(
        self, wanted: Mapping[RelPath, Entry], found: Mapping[RelPath, Found]
    ) -> Iterator[tuple[RelPath, Rule, Pair]]:
        for path, entry in wanted.items():
            if entry.digest is None:
                continue
            if path not in found:
                yield path, Rule.MISSING, (entry.digest, None)
            elif (here := found[path]) != entry.digest:
                yield path, Rule.UNREADABLE if here is None else Rule.DIFFERS, (entry.digest, here)
        for path, here in found.items():
            known = wanted.get(path)
            if (known is None and not self._is_ignored(path)) or (known is not None and known.digest is None):
                yield path, Rule.EXTRA, (None, here)

    @property
    def unsettled(self) -> int:
        """Paths that differ now and may be in flight."""
        return len(self._standing) - len(self.open)

    def counts(self) -> dict[str, int]:
        """How many differences stand, by rule; every rule is there."""
        counted = Counter(difference.rule for difference in self.open.values())
        return {rule.value: counted[rule] for rule in Rule}

    def _is_ignored(self, path: RelPath) -> bool:
        return any(self._ignored.fullmatch(segment) for segment in path.split("/"))
