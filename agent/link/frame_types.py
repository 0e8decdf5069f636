"""The events of a channel: what frames from the server say, and what its error texts are about. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, NamedTuple


class Broadcast(NamedTuple):
    """An application event on our topic.

    A tuple, because one is made for every message, in half the time of a frozen dataclass.
    """

    event: str
    payload: dict[str, object]
    at: float
    """When its frame was read, Unix seconds."""


@dataclass(frozen=True, slots=True)
class Joined:
    """The server accepted our join: broadcasts arrive from here on, those before it may be lost."""


@dataclass(frozen=True, slots=True)
class ReplicationReady:
    """The server's own feed from the database is up: broadcasts from before that may be lost."""


@dataclass(frozen=True, slots=True)
class TokenExpired:
    """The server closed the channel because the token expired; the socket stays, and a new token joins again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The server turned the token away for another reason than its age."""

    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """The socket or its channel is of no use any more: close it and open another."""

    cause: str
    """One word, for metrics."""
    reason: str
    """A sentence, for a person."""


ChannelEvent = Broadcast | Joined | ReplicationReady | TokenExpired | Refused | Dropped

ErrorKind = Literal["expired", "credential", "rate_limited", "other"]

_CREDENTIAL_WORDS: Final = (
    "Unauthorized",
    "InvalidJWT",
    "MalformedJWT",
    "JwtSign",
    "JWT signature",
    "JWT signer",
    "valid JWT",
    "`role` and `exp`",
    "permission",
    "Token expiration time is invalid",
)
"""How the server's texts name a credential that it does not take (supabase/realtime: realtime_channel.ex)."""


def classify_error(reason: str) -> ErrorKind:
    """Return what an error text of the server is about. The protocol has no codes for it, only texts."""
    if "has expired" in reason:
        return "expired"
    if any(word in reason for word in _CREDENTIAL_WORDS):
        return "credential"
    if "Too many" in reason or "RateLimit" in reason:
        return "rate_limited"
    return "other"
