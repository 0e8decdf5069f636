"""Makes the secrets of a deployment on one machine: `preview-orchestrator secrets < .env.example > .env`.

The two API keys follow from the JWT secret, as in the Supabase CLI's local stack, so the three are made together.
"""

from __future__ import annotations

import re
import secrets
from base64 import b64encode

from orchestrator_stub.local_supabase.keys import ProjectKeys
from orchestrator_stub.platform.sealing import KEY_BYTES
from orchestrator_stub.platform.tokens import Keyring

RINGS = ("RUN_SETTINGS_KEYS", "DOOR_KEYS")
"""Settings of keys that have names, each with one."""
_EMPTY = re.compile(r"(?m)^([A-Z][A-Z0-9_]*)=[ \t]*$")
_SECRET = re.compile(r"(?m)^SUPABASE_JWT_SECRET=[ \t]*(\S+)[ \t]*$")


def filled_in(text: str) -> str:
    """An environment file whose empty secrets are filled in; every other line stays as it is.

    Args:
        text: lines `NAME=value`. API keys are made for the SUPABASE_JWT_SECRET that it has, if it has one.

    Raises `ValueError` when that secret is too short.
    """
    given = _SECRET.search(text)
    jwt_secret = given[1] if given else secrets.token_urlsafe(48)
    keys = ProjectKeys.of(Keyring.from_secret(jwt_secret))
    made = {
        "SUPABASE_JWT_SECRET": jwt_secret,
        "SUPABASE_ANON_KEY": keys.anon_key,
        "SUPABASE_SERVICE_ROLE_KEY": keys.service_key,
        **{name: f"k1:{b64encode(secrets.token_bytes(KEY_BYTES)).decode()}" for name in RINGS},
    }
    return _EMPTY.sub(lambda line: f"{line[1]}={made.get(line[1], '')}", text)
