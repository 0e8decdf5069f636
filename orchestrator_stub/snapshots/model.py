"""What a snapshot is to those who ask for one: where it is fetched, and why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID


class SnapshotUnavailable(Exception):
    """The snapshot could not be built or signed now; trying later can help."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A snapshot ready to be fetched: the signed URL, and its manifest as the protocol writes it."""

    url: str
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        return f"Offer(revision={self.manifest.get('revision')})"


class SnapshotSource(Protocol):
    """Where snapshots come from."""

    async def offer(
        self,
        project_id: UUID,
        *,
        base_revision: int | None = None,
        rebuild: bool = False,
        resign: bool = False,
    ) -> Offer:
        """A snapshot of the project's head. `base_revision`: only what is newer. `rebuild`: not a kept one.
        `resign`: under a URL that nobody has tried yet.

        Raises `SnapshotUnavailable`.
        """
        ...
