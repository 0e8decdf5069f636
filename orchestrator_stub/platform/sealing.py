"""Encrypts short texts for the database, each bound to its project and its name.

AES-256-GCM of `cryptography`, a fresh nonce each time. Project and name are authenticated with the text, so a row that
somebody copies to another project, or a value to another name, cannot be opened there. Several keys may be in force:
the first seals, all open, so a key is rotated by putting the new one first and leaving the old one until everything
was written again.

    CannotSeal    there is no key to seal with
    CannotOpen    the key is not among ours, or the text is not what was sealed for this project and name
"""

from __future__ import annotations

import os
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
"""As NIST SP 800-38D wants it; random nonces are good for 2^32 texts a key."""


class CannotSeal(Exception):
    """There is no key to seal with."""


class CannotOpen(Exception):
    """What is stored cannot be opened; the message has nothing of it."""


class SealingKeys:
    """The keys in force, by id; the first seals."""

    def __init__(self, keys: Mapping[str, bytes] | None = None) -> None:
        self._keys = {name: AESGCM(key) for name, key in (keys or {}).items()}

    @classmethod
    def read(cls, text: str) -> SealingKeys:
        """Read `ID:BASE64` words. Raises `ValueError`, whose message has nothing of a key."""
        keys: dict[str, bytes] = {}
        for number, word in enumerate(text.split(), 1):
            name, _, encoded = word.partition(":")
            try:
                key = b64decode(encoded, validate=True)
            except ValueError:
                key = b""
            if not (name.isascii() and name.isalnum()) or len(key) != KEY_BYTES:
                raise ValueError(f"key {number} is not ID:KEY with {KEY_BYTES} bytes in base64")
            if name in keys:
                raise ValueError(f"key {number} has the id of another")
            keys[name] = key
        return cls(keys)

    def seal(self, project_id: UUID, name: str, text: str) -> str:
        """Encrypt `text` for this project and name. Raises `CannotSeal`."""
        if not self._keys:
            raise CannotSeal("there is no key to encrypt with")
        key_id, key = next(iter(self._keys.items()))
        nonce = os.urandom(NONCE_BYTES)
        sealed = nonce + key.encrypt(nonce, text.encode(), _bound_to(project_id, name))
        return f"{key_id}.{b64encode(sealed).decode()}"

    def open(self, project_id: UUID, name: str, sealed: str) -> str:
        """Decrypt what `seal` gave for the same project and name. Raises `CannotOpen`."""
        key_id, _, encoded = sealed.partition(".")
        key = self._keys.get(key_id)
        if key is None:
            raise CannotOpen(f"the key {key_id[:40]!r} is not among RUN_SETTINGS_KEYS")
        try:
            raw = b64decode(encoded, validate=True)
            return key.decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], _bound_to(project_id, name)).decode()
        except (ValueError, InvalidTag):
            raise CannotOpen("a value is not what was encrypted for this project and name") from None


def _bound_to(project_id: UUID, name: str) -> bytes:
    return f"{project_id}\0{name}".encode()
