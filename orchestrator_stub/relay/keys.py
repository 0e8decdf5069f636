"""Keys and signed tokens in the form that NATS reads: ed25519 keys in base32 ("nkeys"), and JWTs signed with them.

Written here, on `cryptography`, because the orchestrator has that anyway and needs sixty lines of it; a test holds
every form against the `nkeys` package. Pure but for the random bytes of a new key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

Kind = Literal["operator", "account", "user"]

_PREFIX: Final[Mapping[str, int]] = {"operator": 14 << 3, "account": 0, "user": 20 << 3}
"""The first byte of a public key, which base32 shows as the letter O, A or U."""

_SEED: Final = 18 << 3
"""The first five bits of a private key, which base32 shows as the letter S."""


class Key:
    """One key pair. Neither the seed nor the private key shows in a repr."""

    def __init__(self, kind: Kind, private: Ed25519PrivateKey | None = None) -> None:
        self.kind: Kind = kind
        self._private = private or Ed25519PrivateKey.generate()
        raw = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self.public = _encoded(bytes([_PREFIX[kind]]) + raw)
        """The public key in base32: what NATS knows it by."""

    def __repr__(self) -> str:
        return f"Key({self.public})"

    @property
    def seed(self) -> str:
        """The private key in base32: a secret."""
        prefix = _PREFIX[self.kind]
        raw = self._private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        return _encoded(bytes([_SEED | prefix >> 5, (prefix & 31) << 3]) + raw)

    @classmethod
    def from_seed(cls, seed: str) -> Key:
        """Read a private key. Raises `ValueError`, without a word of the seed."""
        raw = _decoded(seed)
        if len(raw) != 34 or raw[0] & 0xF8 != _SEED:
            raise ValueError("it is no NATS seed")
        prefix = (raw[0] & 7) << 5 | raw[1] >> 3
        kind = next((kind for kind, number in _PREFIX.items() if number == prefix), None)
        if kind is None:
            raise ValueError("it is the seed of another kind of key")
        return cls(kind, Ed25519PrivateKey.from_private_bytes(raw[2:]))  # type: ignore[arg-type]

    def sign(self, claims: Mapping[str, Any]) -> str:
        """Sign claims as a JWT in the name of this key.

        Args:
            claims: `sub`, `name`, `iat`, `nats`, and `exp` where it ends (Unix seconds).
        """
        body: dict[str, Any] = {**claims, "iss": self.public}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
        body["jti"] = base64.b32encode(digest).decode().rstrip("=")
        text = f"{_HEAD}.{_base64(json.dumps(body).encode())}"
        return f"{text}.{_base64(self._private.sign(text.encode()))}"


def _encoded(raw: bytes) -> str:
    # CRC-16/XMODEM, which the standard library calls after a file format of its early days.
    return base64.b32encode(raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    """What `_encoded` was given. Raises `ValueError`."""
    try:
        whole = base64.b32decode(text + "=" * (-len(text) % 8))
    except (binascii.Error, ValueError):
        raise ValueError("it is no NATS key: not base32") from None
    raw = whole[:-2]
    if _encoded(raw) != text:
        raise ValueError("it is no NATS key: its checksum is another")
    return raw


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


_HEAD: Final = _base64(b'{"typ":"JWT","alg":"ed25519-nkey"}')
