"""Mints and reads the token that an offer needs: beside the session's own, for ten minutes, by a key of its own.

The key is derived from the service key, so that every orchestrator has the same without being told, and none of
Supabase's services takes the token for one of theirs: they check signatures, and ignore `aud`.
"""

from __future__ import annotations

import hashlib
import hmac
from secrets import token_hex
from typing import Final
from uuid import UUID

from orchestrator_stub.platform.tokens import Key, Keyring, SessionClaims, TokenRejected

AUDIENCE: Final = "preview-write"
SECONDS: Final = 600.0
"""How long a token is good: as long as a session's own, with which it is renewed."""


def write_keys(service_key: str) -> Keyring:
    """The keys that write tokens are signed with, derived from the service key."""
    secret = hmac.new(service_key.encode(), b"preview-sync write token 1", hashlib.sha256).digest()
    return Keyring([Key("write-1", "HS256", secret, secret)])


def mint_write(keys: Keyring, *, project_id: UUID, session_id: UUID, generation: int, now: float) -> str:
    """A token for one machine of one session. `now`: Unix seconds."""
    return keys.sign(
        {
            "aud": AUDIENCE,
            "project_id": str(project_id),
            "session_id": str(session_id),
            "generation": generation,
            "iat": int(now),
            "exp": int(now + SECONDS),
            "jti": token_hex(8),
        }
    )


def read_write(keys: Keyring, token: str) -> SessionClaims:
    """What a write token says. Raises `TokenRejected`."""
    claims = keys.verify(token, audience=AUDIENCE)
    try:
        return SessionClaims(
            UUID(claims["project_id"]),
            UUID(claims["session_id"]),
            int(claims["generation"]),
            int(claims["exp"]),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise TokenRejected("claims", f"the token does not name its session: {error}") from None
