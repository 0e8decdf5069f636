"""Holds the session's token, reads how long it lives, and plans when to ask for the next.

The claims are read, never trusted: they only plan the refresh. Whoever receives the token verifies it.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import random
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

import orjson

from agent.core.errors import CredentialRejected, MalformedMessage

REFRESH_SHARE: Final = 0.7
"""Share of a token's lifetime after which the next is asked for: the rest is for a slow orchestrator's retries."""

REFRESH_JITTER: Final = 0.05
"""Share of a token's lifetime by which the refresh is spread: sessions opened together must not ask together."""

LARGEST_FILE: Final = 64 * 1024
"""Bytes that are read of a token's file. A token has one kilobyte."""

ASSUMED_LIFETIME: Final = 600.0
"""Seconds that a token without `iat` is taken to last when it is first seen: the protocol says minutes."""


@dataclass(frozen=True, slots=True)
class Token:
    """A JWT and its claims. The value never shows in a repr.

    `issued_at` and `expires_at` are Unix seconds; `expires_at` None: it does not say. `generation`: of the session's
    machine, in a token to write with.
    """

    value: str = field(repr=False)
    expires_at: float | None = None
    issued_at: float | None = None
    role: str | None = None
    generation: int | None = None
    nats_jwt: str | None = field(default=None, repr=False)
    """What NATS is shown, where events come over it; it is issued with this one and ends with it."""

    def expired(self, now: float) -> bool:
        """Return whether its claims say that it is over at `now` (Unix seconds)."""
        return self.expires_at is not None and now >= self.expires_at

    def refresh_at(self, seen_at: float, spread: float = 0.0) -> float | None:
        """Plan when to ask for the next one, in Unix seconds; None: never, it does not expire.

        Args:
            seen_at: when it was first seen, Unix seconds; stands in for a missing or impossible `iat`.
            spread: in 0…1, the share of the jitter to take off.
        """
        if self.expires_at is None:
            return None
        start = self.issued_at if self.issued_at is not None else self.expires_at - ASSUMED_LIFETIME
        # A clock behind the issuer's would plan the refresh too late, one ahead of it at once and for ever:
        # what counts is the time that is left from when the token was first seen.
        if not start <= seen_at < self.expires_at:
            start = min(seen_at, self.expires_at)
        lifetime = self.expires_at - start
        return start + lifetime * (REFRESH_SHARE - REFRESH_JITTER * spread)


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
    role, generation = claims.get("role"), claims.get("generation")
    return Token(
        value,
        _moment(claims.get("exp")),
        _moment(claims.get("iat")),
        role if isinstance(role, str) else None,
        generation if type(generation) is int else None,
    )


def _moment(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


class TokenSource(Protocol):
    """Has the token in force, and can get the next one."""

    def current(self) -> Token | None:
        """Return the token in force; the same object until it is replaced. Cheap: called every second."""

    @property
    def problem(self) -> str | None:
        """Why a token that somebody put there cannot be taken, when it cannot."""

    async def renew_token(self) -> Token:
        """Get a newer one. Raises `CredentialRejected`, `SessionGone` or `Unavailable`."""


class Tokens:
    """Holds the token in force: the environment's, a rotated file's, or a newer one that was `accept`ed.

    Also a `TokenSource`, for an agent without a session API: it can only wait for the file to change.
    """

    def __init__(
        self,
        first: str | None = None,
        file: Path | None = None,
        wall: Callable[[], float] = time.time,
        on_token: Callable[[str], None] = lambda token: None,
        nats_jwt: str | None = None,
    ) -> None:
        """Hold `first` and its `nats_jwt`, which is the file's token's, too.

        `on_token` is called with every other token before anything is done with it.
        """
        self._file = file
        self._file_seen: tuple[int, int, int] | None = None
        self.problem: str | None = None
        """Why the file could not be read, when it could not."""
        self._wall = wall
        self._on_token = on_token
        self._nats_jwt = nats_jwt
        self._held = replace(read_token(first), nats_jwt=nats_jwt) if first else None

    def current(self) -> Token | None:
        """Return the token in force; reads the file again when it has changed."""
        self._reread()
        return self._held

    def accept(self, value: str, nats_jwt: str | None = None) -> Token:
        """Hold a newer token; one that brings no `nats_jwt` goes on with the last.

        Raises `MalformedMessage`, and keeps the old one, when it cannot be read.
        """
        self._on_token(value.strip())
        if nats_jwt is not None:
            self._on_token(nats_jwt)
            read_token(nats_jwt)
        token = replace(read_token(value), nats_jwt=nats_jwt or self._nats_jwt)
        self._nats_jwt = token.nats_jwt
        if token != self._held:
            self._held = token
        return self._held or token

    def read_second(self, value: object) -> Token | None:
        """Read a token that came beside this one and is a secret, too; None when it is none."""
        if not isinstance(value, str):
            return None
        self._on_token(value.strip())
        try:
            return read_token(value)
        except MalformedMessage:
            return None

    async def renew_token(self) -> Token:
        """Return the file's token while it is good: there is nobody to ask. Raises `CredentialRejected` otherwise."""
        token = self.current()
        if token is not None and not token.expired(self._wall()):
            return token
        what = "there is no realtime token" if token is None else "the realtime token has expired"
        why = f"; {self.problem}" if self.problem else ""
        raise CredentialRejected(f"{what} and there is no session API to ask for one{why}")

    def _reread(self) -> None:
        """Read the file again when its stat has changed.

        RACE: a writer that does not rename may be seen half way; that is no JWT, and the old token stays until the next
        reading.
        """
        if self._file is None:
            return
        try:
            found = self._file.stat()
            seen = (found.st_mtime_ns, found.st_size, found.st_ino)
            if seen == self._file_seen:
                return
            self.accept(_read_small(self._file).decode("ascii"))
            self._file_seen, self.problem = seen, None
        except (OSError, UnicodeDecodeError, MalformedMessage) as error:
            self.problem = f"cannot take the token from {self._file}: {error}"


def _read_small(file: Path) -> bytes:
    """Read a file without waiting for it, as one would for a pipe, and no more of it than a token may have.

    Raises `OSError`; what is no regular file is none.
    """
    with open(file, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as opened:
        if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return opened.read(LARGEST_FILE)


def spread() -> float:
    """Return a random number in 0…1, to spread what many agents do."""
    return random.random()  # noqa: S311 - spreads load, guards nothing
