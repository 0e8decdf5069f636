"""Signs and checks JWTs: the session's token, and the project's own keys.

One *keyring* is a JSON Web Key Set. Its first private key signs; every key in it verifies, each only with its
own algorithm, so an ES256 public key can never be taken for an HS256 secret. `kid` picks the key; a token
without one (Supabase's legacy HS256 secret mints those) is tried against the keys of its algorithm. A keyring
opened from a file follows the file, without a restart: to rotate, write the new key first in the set, and
drop the old one once the longest-lived token signed with it has expired.

A key that cannot be used (of another kind, or with a typo) is left out and the rest of the set counts: a key that was
dropped never outlives its set because of what stands beside it. A file that gives no key at all leaves the last good
set in force. Both are errors in the log, and in `Keyring.problems` for as long as they last.

    TokenRejected    the token is not to be believed; `reason` is one word for problems and metrics
    CannotSign       no key of the set is private
"""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from base64 import urlsafe_b64encode
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from orchestrator_stub.platform.recent import Recent

log = structlog.get_logger("tokens")

AUDIENCE: Final = "preview-agent"
"""Of session tokens: a user's or a service's token never passes for one, nor the other way round."""

LEEWAY: Final = 5
"""Seconds of clock difference forgiven between the minter and the checker."""

SECRET_BYTES: Final = 32
"""HS256 wants a key at least as long as its output (RFC 7518, 3.2)."""


LOOK_AGAIN: Final = 10.0
"""Seconds between two looks at a file that cannot be used and has not changed: its rights may have, or the disk."""

KEY_PROBLEMS: Final = ("unread", "skipped", "named_twice", "cannot_sign")
"""What can be wrong with a key set: the file gives none, keys left out, names shared, nothing to sign with."""


class CannotSign(Exception):
    """No key of the set is private."""


class TokenRejected(Exception):
    """The token is not to be believed.

    `reason`: missing, malformed, key, signature, expired, claims or audience.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        super().__init__(detail)


def names_a_user(claims: Mapping[str, Any]) -> bool:
    """Whether the database can take a user's claims: a UUID for `sub`, and no NUL in any text."""
    try:
        UUID(claims["sub"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return False
    return "\\u0000" not in json.dumps(claims)


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


@dataclass(frozen=True, slots=True)
class KeySet:
    """The keys of a set that can be used, in its order; why others were left out; the names that several keys have."""

    keys: tuple[Key, ...]
    skipped: tuple[str, ...] = ()
    named_twice: tuple[str, ...] = ()

    @property
    def cannot_sign(self) -> bool:
        return all(key.private is None for key in self.keys)

    def say(self, path: Path | None) -> None:
        """An error line for each thing that is wrong with it."""
        file = str(path) if path else None
        for reason in self.skipped:
            log.error("keys.skipped", file=file, reason=f"{reason}; it neither signs nor verifies")
        for name in self.named_twice:
            log.error("keys.named_twice", file=file, reason=f"several keys are named {name}; name each once")
        if self.cannot_sign:
            log.error(
                "keys.cannot_sign", file=file, reason="no key of the set is private; add one that signs"
            )


Stamp = tuple[int, int, int] | None


class Keyring:
    """The keys that sign and verify. See the module's docstring for how keys are chosen and rotated.

    `path` is the file they were read from, `stamp` what it looked like before that; `clock` gives monotonic seconds.
    """

    def __init__(
        self,
        keys: Sequence[Key] | KeySet,
        *,
        path: Path | None = None,
        stamp: Stamp = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._set = keys if isinstance(keys, KeySet) else KeySet(tuple(keys))
        self._path = path
        self._clock = clock
        self._stamp = stamp
        """Of the file when the set in force was read."""
        self._unread: tuple[Stamp, float] | None = None
        """The file's stamp when it last gave no set, and when to look again if that does not change."""

    @classmethod
    def from_secret(cls, secret: str, *, kid: str | None = None) -> Keyring:
        """The single HS256 secret of a Supabase project (`JWT_SECRET`). Raises `ValueError` if short."""
        key = secret.encode()
        if len(key) < SECRET_BYTES:
            raise ValueError(f"the JWT secret has {len(key)} bytes; HS256 needs at least {SECRET_BYTES}")
        return cls([Key(kid, "HS256", key, key)])

    @classmethod
    def from_jwks(cls, jwks: object) -> Keyring:
        """A JSON Web Key Set with `oct` and `EC` P-256 keys. Raises `ValueError` when it has none of them."""
        found = _read_jwks(jwks)
        found.say(None)
        return cls(found)

    @classmethod
    def open(cls, path: Path, *, clock: Callable[[], float] = time.monotonic) -> Keyring:
        """The key set in the file `path`, re-read when the file changes. Raises `OSError`, `ValueError`."""
        stamp = _stamp(path)
        found = _read_file(path)
        found.say(path)
        return cls(found, path=path, stamp=stamp, clock=clock)

    def sign(self, claims: Mapping[str, object]) -> str:
        """A compact JWT of `claims`, by the first private key. Raises `CannotSign` when the ring has none."""
        key = self.signer()
        if key is None:
            raise CannotSign("no key of the set is private, so nothing can be signed; add one to the key set")
        headers = {"kid": key.kid} if key.kid else None
        return jwt.encode(dict(claims), key.private, algorithm=key.algorithm, headers=headers)

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

    def known(self) -> tuple[Key, ...]:
        """The keys that verify now."""
        return self._current()

    def signer(self) -> Key | None:
        """The key that signs now: the first private one of the set."""
        return next((key for key in self._current() if key.private is not None), None)

    def generation(self) -> object:
        """Changes (by identity) whenever the keys do: what was verified by other keys must be verified again."""
        return self._current()

    def problems(self) -> dict[str, int]:
        """How many things of each of `KEY_PROBLEMS` are wrong with the set now; looks at the file first."""
        self._current()
        found = (self._unread is not None, len(self._set.skipped), len(self._set.named_twice))
        return dict(zip(KEY_PROBLEMS, map(int, (*found, self._set.cannot_sign)), strict=True))

    def _current(self) -> tuple[Key, ...]:
        """The keys, re-read when the file's stamp moved. When it gives no set the old ones stay, which is said."""
        if self._path is None:
            return self._set.keys
        stamp, now = _stamp(self._path), self._clock()
        if stamp is not None and stamp == self._stamp:
            self._unread = None
        elif self._unread is None or self._unread[0] != stamp or self._unread[1] <= now:
            try:
                self._set = _read_file(self._path)
            except (OSError, ValueError) as error:
                self._unread = stamp, now + LOOK_AGAIN
                log.error(
                    "keys.unread", file=str(self._path), reason=f"{error}; the keys of before stay in force"
                )
            else:
                self._stamp, self._unread = stamp, None
                self._set.say(self._path)
        return self._set.keys


def _stamp(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _read_file(path: Path) -> KeySet:
    """Raises `OSError`, and `ValueError` for what is no key set."""
    try:
        return _read_jwks(json.loads(path.read_bytes()))
    except RecursionError:
        raise ValueError("it is nested too deep to be a key set") from None


def _read_jwks(jwks: object) -> KeySet:
    """The keys that can be used. Raises `ValueError` when there is none."""
    listed = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(listed, list) or not listed:
        raise ValueError('a key set is {"keys": [...]} with at least one key')
    keys, skipped = [], []
    for number, jwk in enumerate(listed, 1):
        try:
            keys.append(_read_jwk(jwk))
        except ValueError as error:
            skipped.append(f"key {number} of the set: {error}")
    if not keys:
        raise ValueError(f"no key of the set can be used; {'; '.join(skipped[:5])}")
    names = Counter(key.kid for key in keys if key.kid is not None)
    return KeySet(
        tuple(keys), tuple(skipped), tuple(_shown(name) for name, times in names.items() if times > 1)
    )


def _read_jwk(jwk: object) -> Key:
    """One key. Raises `ValueError`, whose text repeats none of its secrets."""
    if not isinstance(jwk, dict):
        raise ValueError("it is no object")
    kid, algorithm = jwk.get("kid"), jwk.get("alg")
    if kid is not None and not isinstance(kid, str):
        raise ValueError("its kid is not text")
    named = f"{_shown(kid)}: " if kid else ""
    match jwk.get("kty"), jwk.get("crv"):
        case "oct", _ if algorithm in (None, "HS256"):
            secret = _secret(jwk.get("k"))
            if len(secret) < SECRET_BYTES:
                raise ValueError(f"{named}HS256 needs at least {SECRET_BYTES} bytes")
            return Key(kid, "HS256", secret, secret)
        case "EC", "P-256" if algorithm in (None, "ES256"):
            try:
                loaded = ECAlgorithm.from_jwk(jwk)
            except (jwt.InvalidKeyError, ValueError, TypeError) as error:
                raise ValueError(f"{named}it is no key on P-256 ({error})") from None
            if isinstance(loaded, ec.EllipticCurvePrivateKey):
                return Key(kid, "ES256", loaded, loaded.public_key())
            return Key(kid, "ES256", None, loaded)
        case kty, crv:
            what = ", ".join(
                f"{n} {_shown(v)}" for n, v in (("kty", kty), ("crv", crv), ("alg", algorithm)) if v
            )
            raise ValueError(
                f"{named}{what or 'no kty'} is not supported; use oct with HS256 or EC P-256 with ES256"
            )


def _secret(text: object) -> bytes:
    if not isinstance(text, str) or not re.fullmatch(r"[A-Za-z0-9+/_-]+={0,2}", text):
        raise ValueError("its k is not base64url")
    return jwt.utils.base64url_decode(text)


def _shown(value: object) -> str:
    """A name out of a key set as it may stand in a log: short, and never a whole structure."""
    return repr(value[:40]) if isinstance(value, str) else f"a {type(value).__name__}"


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
    """`read_session`, remembering the result for a token for as long as the keys and the token are good.

    A machine shows the same token hundreds of times; the signature's mathematics is most of what one answer costs.
    """

    def __init__(self, keys: Keyring, clock: Callable[[], float]) -> None:
        self._keys = keys
        self._clock = clock
        self._known: Recent[str, SessionClaims] = Recent()
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
        self._known.put(token, claims)
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
