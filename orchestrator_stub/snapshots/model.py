"""What a snapshot is to those who ask for one: a signed URL with its manifest, or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol
from uuid import UUID


class SnapshotUnavailable(Exception):
    """The snapshot could not be built or signed now; trying later can help."""


@dataclass(frozen=True, slots=True)
class SignedSnapshot:
    """A URL that opens the archive until it expires, and the manifest as the protocol writes it."""

    url: str
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        return f"SignedSnapshot(revision={self.manifest.get('revision')})"


class SnapshotSource(Protocol):
    """Gives signed snapshots."""

    async def signed_snapshot(
        self,
        project_id: UUID,
        *,
        base_revision: int | None = None,
        rebuild: bool = False,
        resign: bool = False,
        payer: UUID | None = None,
        earlier: bool = False,
    ) -> SignedSnapshot:
        """A snapshot of the project's head.

        Args:
            base_revision: Leave out what is not newer than this revision.
            rebuild: Don't use a cached archive: it was found broken.
            resign: Don't use a cached URL: it was tried in vain.
            earlier: An archive of an earlier revision will do, where one is kept and little was saved since. Its
                manifest is then `{"revision": …}`.
            payer: The session that an archive is built for, out of its allowance; None: nobody's.

        Raises:
            SnapshotUnavailable: It could not be built or signed now.
            AllowanceSpent: It would have to be built, and the payer has had enough stored.
        """
        ...
