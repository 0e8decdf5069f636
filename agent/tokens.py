"""The one credential of the session: where it comes from, how long it lives, when to ask for the next.

The claims are read, never trusted: they only plan the refresh. Whoever receives the token verifies it.
"""

from __future__ import annotations

import base64
import binascii
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import orjson

from agent.core.errors import CredentialRejected, MalformedMessage

REFRESH_SHARE: Final = 0.7
"""Share of a token's life after which the next is asked for: enough is left for a slow orchestrator's retries."""

REFRESH_JITTER: Final = 0.05
"""Share of a token's life by which the refresh is spread, so that sessions opened together do not ask together."""

ASSUMED_LIFE: Final = 600.0
"""Seconds a token without `iat` is taken to live when it is first seen: the protocol says minutes."""


@dataclass(frozen=True, slots=True)
class Token:
    """A JWT and what its claims say. The value never shows in a repr.

    `issued_at` and `expires_at` are Unix seconds; `expires_at` None: it does not say.
    """

    value: str = field(repr=False)
    expires_at: float | None = None
    issued_at: float | None = None
    role: str | None = None

    def expired(self, now: float) -> bool:
        """Whether it is of no use at `now` (Unix seconds), as far as it says."""
        return self.expires_at is not None and now >= self.expires_at

    def refresh_at(self, seen_at: float, spread: float = 0.0) -> float | None:
        """When to ask for the next one, Unix seconds; None: never by itself.

        `seen_at` stands in for a missing or impossible `iat`; `spread` in 0…1 takes that share of the jitter off.
        """
        if self.expires_at is None:
            return None
        start = self.issued_at if self.issued_at is not None else self.expires_at - ASSUMED_LIFE
        # A clock behind the issuer's would plan the refresh too late, one ahead of it at once and for ever:
        # what counts is the life that is left from when we first saw the token.
        if not start <= seen_at < self.expires_at:
            start = min(seen_at, self.expires_at)
        life = self.expires_at - start
        return start + life * (REFRESH_SHARE - REFRESH_JITTER * spread)


def read_token(value: str) -> Token:
    """Read a JWT's claims without verifying it. Raises `MalformedMessage` when it is not a JWT."""
    value = value.strip()
    parts = value.split(".")
    if len(parts) != 3 or not value.isascii() or not value.isprintable():
        raise MalformedMessage("realtime token", "not a JWT")
    try:
        claims = orjson.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        raise MalformedMessage("realtime token", "its claims are not base64url JSON") from None
    if not isinstance(claims, dict):
        raise MalformedMessage("realtime token", "its claims are not an object")
    role = claims.get("role")
    return Token(
        value, _moment(claims.get("exp")), _moment(claims.get("iat")), role if isinstance(role, str) else None
    )


def _moment(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class TokenSource(Protocol):
    """Who has the token in force, and can get the next one."""

    def current(self) -> Token | None:
        """The token in force; the same object until it is replaced. Cheap: called every second."""

    async def renew_token(self) -> Token:
        """A newer one. Raises `CredentialRejected`, `SessionGone` or `Unavailable`."""


class Tokens:
    """The token in force, first from the environment or a rotated file, later from whoever `accept`s one for us.

    As a `TokenSource` of its own (no session API) it can only wait for the file to change.
    """

    def __init__(
        self, first: str | None = None, file: Path | None = None, wall: Callable[[], float] = time.time
    ) -> None:
        self._file = file
        self._file_seen: tuple[int, int, int] | None = None
        self._file_problem: str | None = None
        self._wall = wall
        self._held = read_token(first) if first else None

    def current(self) -> Token | None:
        """The token in force, after a look at whether the file changed."""
        self._reread()
        return self._held

    def accept(self, value: str) -> Token:
        """Hold a newer one. Raises `MalformedMessage` and keeps the old when it cannot be read."""
        token = read_token(value)
        if self._held is None or token.value != self._held.value:
            self._held = token
        return self._held

    @property
    def problem(self) -> str | None:
        """Why the file could not be taken, when it could not."""
        return self._file_problem

    async def renew_token(self) -> Token:
        """Without an issuer there is only the file: its token if it is still good, else the end.

        Raises `CredentialRejected`.
        """
        token = self.current()
        if token is None:
            raise CredentialRejected("there is no realtime token and no session API to ask for one")
        if token.expired(self._wall()):
            raise CredentialRejected("the realtime token has expired and there is no session API to renew it")
        return token

    def _reread(self) -> None:
        """RACE: a writer that does not rename may be seen half way; then it is no JWT and the old one stays in
        force until the next look.
        """
        if self._file is None:
            return
        try:
            stat = self._file.stat()
            seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
            if seen == self._file_seen:
                return
            self.accept(self._file.read_text("ascii"))
            self._file_seen, self._file_problem = seen, None
        except (OSError, UnicodeDecodeError, MalformedMessage) as error:
            self._file_problem = f"cannot take the token from {self._file}: {error}"


def spread() -> float:
    """A share of the refresh jitter, 0…1."""
    return random.random()  # noqa: S311 - spreads load, guards nothing
