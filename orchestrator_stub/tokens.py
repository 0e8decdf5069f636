"""Signing and checking JWTs: the session's token, and the project's own keys.

One *keyring* is a JSON Web Key Set. Its first private key signs; every key in it verifies, each only with its
own algorithm, so an ES256 public key can never be taken for an HS256 secret. `kid` picks the key; a token
without one (Supabase's legacy HS256 secret mints those) is tried against the keys of its algorithm. A keyring
opened from a file follows the file, without a restart: to rotate, write the new key first in the set, and
drop the old one once the longest-lived token signed with it has expired.

    TokenRejected    the token is not to be believed; `reason` is one word for problems and metrics
"""

from __future__ import annotations

import json
import os
import secrets
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

AUDIENCE: Final = "preview-agent"
"""Of session tokens: a user's or a service's token never passes for one, nor the other way round."""

LEEWAY: Final = 5
"""Seconds of clock difference forgiven between the minter and the checker."""

SECRET_BYTES: Final = 32
"""HS256 wants a key at least as long as its output (RFC 7518, 3.2)."""


class TokenRejected(Exception):
    """The token is not to be believed.

    `reason`: missing, malformed, key, signature, expired, claims or audience.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the set. `private` is what it signs with; None on a key that only verifies."""

    kid: str | None
    algorithm: str
    private: Any
    public: Any


@dataclass(frozen=True, slots=True)
class SessionClaims:
    """What a session's token says: which project, which session, which of its machines."""

    project_id: UUID
    session_id: UUID
    generation: int
    expires_at: int
    """Unix seconds."""


class Keyring:
    """The keys that sign and verify. See the module's docstring for how keys are chosen and rotated."""

    def __init__(self, keys: Sequence[Key], *, path: Path | None = None) -> None:
        self._keys = tuple(keys)
        self._path = path
        self._stamp = _stamp(path) if path else None

    @classmethod
    def from_secret(cls, secret: str, *, kid: str | None = None) -> Keyring:
        """The single HS256 secret of a Supabase project (`JWT_SECRET`). Raises `ValueError` if short."""
        key = secret.encode()
        if len(key) < SECRET_BYTES:
            raise ValueError(f"the JWT secret has {len(key)} bytes; HS256 needs at least {SECRET_BYTES}")
        return cls([Key(kid, "HS256", key, key)])

    @classmethod
    def from_jwks(cls, jwks: object, *, path: Path | None = None) -> Keyring:
        """A JSON Web Key Set with `oct` and `EC` P-256 keys. Raises `ValueError` on anything else."""
        return cls(_read_jwks(jwks), path=path)

    @classmethod
    def open(cls, path: Path) -> Keyring:
        """The key set in the file `path`, re-read when the file changes. Raises `OSError`, `ValueError`."""
        return cls.from_jwks(json.loads(path.read_text()), path=path)

    def sign(self, claims: Mapping[str, object]) -> str:
        """A compact JWT of `claims`, by the first private key. Raises `ValueError` when the ring has none."""
        for key in self._current():
            if key.private is not None:
                headers = {"kid": key.kid} if key.kid else None
                return jwt.encode(dict(claims), key.private, algorithm=key.algorithm, headers=headers)
        raise ValueError("the keyring has no private key to sign with")

    def verify(self, token: str, *, audience: str | None = None, grace: float = 0.0) -> dict[str, Any]:
        """The claims of a token that one of the keys signed and that has not expired.

        `audience` None: any, as PostgREST and Realtime do. `grace`: seconds for which an expired one still counts.
        Raises `TokenRejected`.
        """
        try:
            header = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as error:
            raise TokenRejected("malformed", f"not a JWT: {error}") from None
        kid, algorithm = header.get("kid"), header.get("alg")
        candidates = [
            k for k in self._current() if k.algorithm == algorithm and (not kid or k.kid in (kid, None))
        ]
        if not candidates:
            raise TokenRejected("key", f"signed with an unknown key (alg {algorithm!r}, kid {kid!r})")
        for key in candidates:
            try:
                return jwt.decode(
                    token,
                    key.public,
                    algorithms=[key.algorithm],
                    audience=audience,
                    leeway=LEEWAY + grace,
                    # A token from the future is one from an orchestrator whose clock is ahead: `exp` is what counts.
                    options={"require": ["exp"], "verify_aud": audience is not None, "verify_iat": False},
                )
            except jwt.InvalidSignatureError:
                continue
            except jwt.ExpiredSignatureError:
                raise TokenRejected("expired", "the token has expired") from None
            except (jwt.InvalidAudienceError, jwt.MissingRequiredClaimError) as error:
                reason = "claims" if "exp" in str(error) else "audience"
                raise TokenRejected(reason, str(error)) from None
            except jwt.InvalidTokenError as error:
                raise TokenRejected("malformed", str(error)) from None
        raise TokenRejected("signature", "the signature does not verify")

    def generation(self) -> object:
        """Changes (by identity) whenever the keys do: what was verified by other keys must be verified again."""
        return self._current()

    def _current(self) -> tuple[Key, ...]:
        """The keys, re-read when the file's stamp moved. A torn or missing file keeps the old ones."""
        if self._path is not None and (stamp := _stamp(self._path)) != self._stamp and stamp is not None:
            try:
                self._keys = tuple(_read_jwks(json.loads(self._path.read_text())))
                self._stamp = stamp
            except (OSError, ValueError):
                pass
        return self._keys


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _read_jwks(jwks: object) -> list[Key]:
    keys = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(keys, list) or not keys:
        raise ValueError('a key set is {"keys": [...]} with at least one key')
    return [_read_jwk(jwk) for jwk in keys]


def _read_jwk(jwk: object) -> Key:
    if not isinstance(jwk, dict):
        raise ValueError("a key of the set is not an object")
    kid = jwk.get("kid")
    if kid is not None and not isinstance(kid, str):
        raise ValueError("a key's kid is not text")
    match jwk.get("kty"), jwk.get("crv"):
        case "oct", _:
            secret = jwt.utils.base64url_decode(str(jwk.get("k", "")))
            if len(secret) < SECRET_BYTES:
                raise ValueError(f"key {kid!r}: HS256 needs at least {SECRET_BYTES} bytes")
            return Key(kid, "HS256", secret, secret)
        case "EC", "P-256":
            try:
                loaded = ECAlgorithm.from_jwk(jwk)
            except jwt.InvalidKeyError as error:
                raise ValueError(f"key {kid!r}: {error}") from None
            if isinstance(loaded, ec.EllipticCurvePrivateKey):
                return Key(kid, "ES256", loaded, loaded.public_key())
            return Key(kid, "ES256", None, loaded)
        case kty, crv:
            raise ValueError(f"key {kid!r}: kty {kty!r} crv {crv!r} is not supported; use oct or EC P-256")


def new_hs256(kid: str) -> dict[str, str]:
    """A fresh shared secret as a JWK."""
    secret = urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).rstrip(b"=").decode()
    return {"kty": "oct", "alg": "HS256", "kid": kid, "k": secret}


def new_es256(kid: str) -> dict[str, Any]:
    """A fresh P-256 private key as a JWK."""
    private = ec.generate_private_key(ec.SECP256R1())
    return {**ECAlgorithm.to_jwk(private, as_dict=True), "alg": "ES256", "kid": kid}


def mint_session(
    keys: Keyring, *, project_id: UUID, session_id: UUID, generation: int, role: str, now: float, ttl: float
) -> str:
    """The token of one machine of one session, unlike any other. `now` in Unix seconds, `ttl` in seconds.

    With HS256 two tokens of one second would be the same bytes but for their `jti` (RFC 7519, 4.1.7), and an agent that
    was refused with the one would take the other for no newer one.

    `role` is a real PostgreSQL role (Realtime insists): `preview_agent`, or what the settings say.
    """
    return keys.sign(
        {
            "role": role,
            "aud": AUDIENCE,
            "project_id": str(project_id),
            "session_id": str(session_id),
            "generation": generation,
            "iat": int(now),
            "exp": int(now + ttl),
            "jti": secrets.token_hex(8),
        }
    )


class SessionReader:
    """`read_session`, remembering the verdict on a token for as long as the keys and the token are good.

    A machine shows the same token hundreds of times; the signature's mathematics is most of what one answer costs.
    """

    def __init__(self, keys: Keyring, clock: Callable[[], float], *, remember: int = 10_000) -> None:
        self._keys = keys
        self._clock = clock
        self._remember = remember
        self._known: dict[str, SessionClaims] = {}
        self._by: object = None

    def read(self, token: str, *, grace: float = 0.0) -> SessionClaims:
        """As `read_session`. Raises `TokenRejected`."""
        if (generation := self._keys.generation()) is not self._by:
            self._known.clear()
            self._by = generation
        known = self._known.get(token)
        if known is not None and self._clock() < known.expires_at + LEEWAY + grace:
            return known
        claims = read_session(self._keys, token, grace=grace)
        if len(self._known) >= self._remember:
            del self._known[next(iter(self._known))]
        self._known[token] = claims
        return claims


def read_session(keys: Keyring, token: str, *, grace: float = 0.0) -> SessionClaims:
    """Check a session's token: signature, expiry, audience, claims. `grace` as in `Keyring.verify`.

    Raises `TokenRejected`.
    """
    claims = keys.verify(token, audience=AUDIENCE, grace=grace)
    try:
        generation = claims["generation"]
        if type(generation) is not int:
            raise ValueError("generation is not a whole number")
        return SessionClaims(
            UUID(claims["project_id"]), UUID(claims["session_id"]), generation, int(claims["exp"])
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise TokenRejected("claims", f"the token does not name its session: {error}") from None


def local_keyring(path: Path) -> Keyring:
    """The keys of a local stack, made at the first start and kept in `path`, readable by its owner only.

    Raises `OSError`, and `ValueError` when the file is there but is no key set.
    """
    if not path.exists():
        draft = path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({"keys": [new_hs256("local-1")]}, file)
        draft.rename(path)
    return Keyring.open(path)
