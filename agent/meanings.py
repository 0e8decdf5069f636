"""What a frame from the server may mean, and what its error texts are about. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple


class Broadcast(NamedTuple):
    """An application event on our topic. `at`: as given to `receive`, Unix seconds when its frame was read.

    A tuple and not a dataclass, because there may be a hundred thousand a second of them.
    """

    event: str
    payload: dict[str, object]
    at: float


@dataclass(frozen=True, slots=True)
class Joined:
    """Our join was accepted: from here on nothing is missed, everything before may have been."""


@dataclass(frozen=True, slots=True)
class ReplicationReady:
    """The server's own feed from the database is up; broadcasts from before that may be lost."""


@dataclass(frozen=True, slots=True)
class TokenExpired:
    """The socket is fine; give `new_token` a fresh one and the channel is joined again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """The token was turned away for another reason than its age."""

    reason: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """Close this socket and open another. `cause` is one word for metrics, `reason` a sentence."""

    cause: str
    reason: str


Meaning = Broadcast | Joined | ReplicationReady | TokenExpired | Refused | Dropped

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
"""How the server's texts name a credential it will not take (supabase/realtime: realtime_channel.ex)."""


def judge(reason: str) -> str:
    """What a server's error text is about: `expired`, `credential`, `rate_limited` or `other`."""
    if "has expired" in reason:
        return "expired"
    if any(word in reason for word in _CREDENTIAL_WORDS):
        return "credential"
    if "Too many" in reason or "RateLimit" in reason:
        return "rate_limited"
    return "other"
