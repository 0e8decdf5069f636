"""Signs and verifies the code in an address and the cookie that it is exchanged for.

Both are JWTs by keys that nothing else knows and nothing else is signed with: PostgREST and Realtime ignore `aud`, so
an audience alone would not keep a cookie from being shown there. A code never passes for a cookie, nor the other way
round. Each names one session and the version of its door: `revoke` raises the version, and what carries an older one
is over.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Callable
from typing import Final, Literal
from uuid import UUID, uuid4

from orchestrator_stub.door.decision import Pass
from orchestrator_stub.platform.tokens import LEEWAY, Key, Keyring, TokenRejected

CODE_SECONDS: Final = 60.0
"""A code stands in an address, which is logged and kept: long enough for a slow browser to follow it."""

KEY_BYTES: Final = 32
REMEMBERED: Final = 10_000
"""Cookies whose signature is known to be good."""

Kind = Literal["code", "cookie"]
AUDIENCES: Final[dict[Kind, str]] = {"code": "preview-door-code", "cookie": "preview-door"}


def door_keys(words: str) -> Keyring:
    """Read `ID:BASE64` words; the first signs. Raises `ValueError`, whose message has nothing of a key."""
    keys: list[Key] = []
    for number, word in enumerate(words.split(), 1):
        name, _, encoded = word.partition(":")
        try:
            secret = b64decode(encoded, validate=True)
        except ValueError:
            secret = b""
        if not (name.isascii() and name.isalnum()) or len(secret) != KEY_BYTES:
            raise ValueError(f"key {number} is not ID:KEY with {KEY_BYTES} bytes in base64")
        if any(key.kid == name for key in keys):
            raise ValueError(f"key {number} has the id of another")
        keys.append(Key(name, "HS256", secret, secret))
    if not keys:
        raise ValueError("there is no key; openssl rand -base64 32 makes one")
    return Keyring(keys)


class Passes:
    """Signs and reads passes by `keys`. `clock` gives Unix seconds."""

    def __init__(self, keys: Keyring, clock: Callable[[], float]) -> None:
        self._keys = keys
        self._clock = clock
        self._known: dict[str, Pass] = {}

    def code(self, session_id: UUID, version: int) -> tuple[str, float]:
        """A code, and when it expires (Unix seconds)."""
        expires_at = self._clock() + CODE_SECONDS
        return self._sign("code", Pass(session_id, version, expires_at)), expires_at

    def cookie(self, session_id: UUID, version: int, expires_at: float) -> str:
        """The value of a cookie that is good until then."""
        return self._sign("cookie", Pass(session_id, version, expires_at))

    def _sign(self, kind: Kind, given: Pass) -> str:
        return self._keys.sign(
            {
                "aud": AUDIENCES[kind],
                "session_id": str(given.session_id),
                "version": given.version,
                "exp": int(given.expires_at),
                "jti": uuid4().hex,
            }
        )

    def read(self, kind: Kind, text: str) -> Pass | None:
        """What a code or a cookie says; None when it is not to be believed, or no longer."""
        known = self._known.get(text) if kind == "cookie" else None
        if known is not None and self._clock() < known.expires_at + LEEWAY:
            return known
        try:
            claims = self._keys.verify(text, audience=AUDIENCES[kind])
            version = claims["version"]
            if type(version) is not int:
                return None
            found = Pass(UUID(claims["session_id"]), version, float(claims["exp"]))
        except (TokenRejected, KeyError, ValueError, TypeError, AttributeError):
            return None
        if kind == "cookie":
            if len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[text] = found
        return found
