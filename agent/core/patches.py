"""Applies splices to a base text and gives the whole content. Pure; the base is read through a function passed in.

A base is found by its digest: in a commit that waits (so that three saves within the spacing are three patches, each of
the one before, of which the last is written), else on the disk. What cannot be made, or does not have the hash that it
should, stays a change by reference, and is fetched as any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum

from msgspec import structs

from agent.core.model import Change, Commit, Entry, RelPath, digest_of

Read = Callable[[RelPath, int], bytes | None]
"""Gives what the file at a path holds if it has so many bytes, None when it cannot be had."""

MOST_BYTES = 32 * 2**20
"""Read from the disk for one commit or answer, on the event loop: what the database takes in one write. Past it changes
stay by reference."""


class PatchOutcome(StrEnum):
    """What became of one change that came as splices; the label of `patches_total`."""

    APPLIED = "applied"
    NO_BASE = "no_base"
    MISMATCH = "mismatch"


class Patches:
    """`outcomes` and `saved_bytes` (content that was made, less what its splices insert) count since the start."""

    def __init__(self) -> None:
        self.outcomes: Counter[PatchOutcome] = Counter()
        self.saved_bytes = 0

    def made(
        self,
        changes: Iterable[Change],
        entries: Mapping[RelPath, Entry],
        waiting: Sequence[Commit],
        read: Read,
    ) -> tuple[Change, ...]:
        """Return `changes` with the content of each that has a patch, where it can be made.

        Args:
            changes: of one commit or answer.
            entries: the tree's.
            waiting: the commits that are not applied yet, oldest first.
            read: the disk.
        """
        left = MOST_BYTES

        def read_some(path: RelPath, size: int) -> bytes | None:
            nonlocal left
            left -= size
            return read(path, size) if left >= 0 else None

        return tuple([self._made(change, entries.get(change.path), waiting, read_some) for change in changes])

    def _made(self, change: Change, entry: Entry | None, waiting: Sequence[Commit], read: Read) -> Change:
        patch = change.patch
        known = entry is not None and (entry.digest == change.digest or (change.version or 0) < entry.version)
        if patch is None or known:
            return change
        base = next(
            (
                each.content
                for commit in reversed(waiting)
                for each in commit.changes
                if each.path == change.path and each.digest == patch.base and each.content is not None
            ),
            None,
        )
        if base is None and entry is not None and entry.digest == patch.base:
            base = read(change.path, entry.size)
        if base is None:
            self.outcomes[PatchOutcome.NO_BASE] += 1
            return change
        content = patch.applied_to(base)
        if content is None or digest_of(content) != change.digest:
            self.outcomes[PatchOutcome.MISMATCH] += 1
            return change
        self.outcomes[PatchOutcome.APPLIED] += 1
        self.saved_bytes += len(content) - sum(len(insert) for _, _, insert in patch.splices)
        return structs.replace(change, content=content, size=len(content))
