"""Says which database a project or a session is on: its id does. PURE.

An id whose third group begins with 8 ends with the database's number; every other id is on number 0. Nothing is looked
up, so nothing has to agree or to be there, and a database more moves no project. `preview.shard_of` is the same in SQL.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

MARKED: Final = "8"
"""The version of an id that says its database: RFC 9562 leaves version 8 to whoever makes it."""

MOST: Final = 256
"""Databases: what the last byte tells apart."""


def shard_of(id: UUID) -> int:
    """The number of the database that `id`, a project's or a session's, is on."""
    return id.bytes[15] if id.hex[12] == MARKED else 0


def id_of_shard(shard: int, random: UUID) -> UUID:
    """`random` as an id on the database `shard`, from 0 to 255."""
    text = random.hex
    return UUID(f"{text[:12]}{MARKED}{text[13:30]}{shard:02x}")


@dataclass(frozen=True, slots=True)
class Shards:
    """The addresses of all databases' orchestrators, by number, and which of them is `own`."""

    urls: tuple[str, ...]
    own: int

    def url_of(self, shard: int) -> str | None:
        """Where the orchestrators of that database are; None: there is no such database."""
        return self.urls[shard] if shard < len(self.urls) else None

    def elsewhere(self, ids: Iterable[UUID]) -> int | None:
        """The number of the database that the first id which is not on ours is on; None: all are here."""
        return next((shard for id in ids if (shard := shard_of(id)) != self.own), None)


def shards_of(urls: Sequence[str], own: str) -> Shards | None:
    """The databases, of which `own` is the address of ours; None where there is only one. Raises `ValueError`."""
    if not urls:
        return None
    plain = tuple(url.rstrip("/") for url in urls)
    if len(plain) > MOST:
        raise ValueError(f"SHARDS has more than {MOST} addresses")
    if len(set(plain)) < len(plain):
        raise ValueError("SHARDS has an address twice")
    if own.rstrip("/") not in plain:
        raise ValueError("PUBLIC_URL must be one of SHARDS: its place there is the number of this database")
    return Shards(plain, plain.index(own.rstrip("/")))
