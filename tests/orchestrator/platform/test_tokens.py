"""Keys and tokens: what counts, what does not, and rotation without a restart."""

from __future__ import annotations

import base64
import json
import os
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import jwt
import pytest

from orchestrator_stub.platform.tokens import (
    Keyring,
    SessionReader,
    TokenRejected,
    local_keyring,
    mint_session,
    new_es256,
    new_hs256,
    read_session,
)

PROJECT = UUID("7b0c6a1e-3f55-4f0e-9f5e-0d8a5f6b2c11")
SESSION = UUID("3a1f0a52-6a0b-4f6e-8a50-0b6c0a9d1e77")


def mint(keys: Keyring, **changed: Any) -> str:
    wanted = {
        "project_id": PROJECT,
        "session_id": SESSION,
        "generation": 2,
        "role": "preview_agent",
        "now": time.time(),
        "ttl": 600,
    }
    return mint_session(keys, **{**wanted, **changed})


def rejected(keys: Keyring, token: str, **options: Any) -> str:
    with pytest.raises(TokenRejected) as caught:
        read_session(keys, token, **options)
    return caught.value.reason


@pytest.mark.parametrize("jwk", [new_hs256("h"), new_es256("e")], ids=["HS256", "ES256"])
def test_a_session_token_says_which_machine_it_is_for(jwk: dict[str, Any]) -> None:
    keys = Keyring.from_jwks({"keys": [jwk]})
    token = mint(keys)
    claims = read_session(keys, token)
    assert (claims.project_id, claims.session_id, claims.generation) == (PROJECT, SESSION, 2)
    assert jwt.get_unverified_header(token)["kid"] == jwk["kid"]
    plain = jwt.decode(token, options={"verify_signature": False})
    assert plain["role"] == "preview_agent"
    assert isinstance(plain["iat"], int), "Realtime wants a number"
    now = time.time()
    assert mint(keys, now=now) != mint(keys, now=now), "a renewed token is another one, also within a second"


def test_what_does_not_count() -> None:
    keys = Keyring.from_jwks({"keys": [new_hs256("h"), new_es256("e")]})
    stranger = Keyring.from_jwks({"keys": [new_hs256("h")]})
    token = mint(keys)
    head, body, signature = token.split(".")
    forged = json.loads(base64.urlsafe_b64decode(body + "=="))
    forged["project_id"] = str(SESSION)
    changed = base64.urlsafe_b64encode(json.dumps(forged).encode()).decode().rstrip("=")
    assert rejected(keys, f"{head}.{changed}.{signature}") == "signature"
    assert rejected(keys, mint(stranger)) == "signature"
    assert rejected(keys, mint(Keyring.from_jwks({"keys": [new_hs256("unknown")]}))) == "key"
    assert rejected(keys, mint(keys, now=time.time() - 700)) == "expired"
    assert rejected(keys, "junk") == "malformed"
    assert rejected(keys, jwt.encode({"exp": time.time() + 60}, None, algorithm="none")) == "key"
    user = keys.sign({"role": "authenticated", "aud": "authenticated", "exp": time.time() + 60})
    assert rejected(keys, user) == "audience"
    assert rejected(keys, keys.sign({"role": "anon", "exp": time.time() + 60})) == "audience"
    assert rejected(keys, keys.sign({"aud": "preview-agent", "exp": time.time() + 60})) == "claims"
    assert rejected(keys, keys.sign({"aud": "preview-agent"})) == "claims"


def test_a_public_key_is_never_taken_for_a_secret() -> None:
    """The old trick: an HS256 token signed with the bytes of an ES256 public key."""
    key = new_es256("e")
    signer = Keyring.from_jwks({"keys": [key]})
    public = base64.urlsafe_b64decode(key["x"] + "=")
    claims = jwt.decode(mint(signer), options={"verify_signature": False})
    assert rejected(signer, jwt.encode(claims, public, algorithm="HS256", headers={"kid": "e"})) == "key"


def test_grace_is_for_the_expiry_alone() -> None:
    keys = Keyring.from_jwks({"keys": [new_hs256("h")]})
    old = mint(keys, now=time.time() - 3600)
    assert rejected(keys, old) == "expired"
    assert read_session(keys, old, grace=7200).session_id == SESSION
    assert rejected(keys, old, grace=60) == "expired"


def test_a_token_without_kid_is_tried_against_every_key_of_its_algorithm() -> None:
    secret = "s" * 40
    keys = Keyring.from_jwks(
        {
            "keys": [
                new_es256("e"),
                {"kty": "oct", "k": base64.urlsafe_b64encode(b"t" * 40).decode()},
                {"kty": "oct", "k": base64.urlsafe_b64encode(secret.encode()).decode()},
            ]
        }
    )
    assert read_session(keys, mint(Keyring.from_secret(secret))).generation == 2


def test_rotation_needs_no_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    old, new = new_hs256("old"), new_es256("new")

    def put(*keys: dict[str, Any]) -> None:
        draft = tmp_path / "draft"
        draft.write_text(json.dumps({"keys": keys}))
        draft.rename(path)

    put(old)
    keys = Keyring.open(path)
    before = mint(keys)
    put(new, old)
    after = mint(keys)
    assert jwt.get_unverified_header(after)["alg"] == "ES256"
    assert read_session(keys, before).session_id == read_session(keys, after).session_id
    put(new)
    assert rejected(keys, before) == "key"
    path.write_text("{ torn")
    assert read_session(keys, after).generation == 2, "a torn file keeps the keys there were"


@pytest.mark.parametrize(
    "jwks",
    [
        {},
        {"keys": []},
        {"keys": ["x"]},
        {"keys": [{"kty": "RSA"}]},
        {"keys": [{"kty": "oct", "k": "c2hvcnQ"}]},
        {"keys": [{"kty": "EC", "crv": "P-256", "x": "!", "y": "!"}]},
        {"keys": [{**new_hs256("h"), "kid": 7}]},
    ],
)
def test_a_bad_key_set_is_refused(jwks: object) -> None:
    with pytest.raises(ValueError, match="key"):
        Keyring.from_jwks(jwks)


def test_local_keys_are_made_once_and_kept_from_others(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    token = mint(local_keyring(path))
    assert read_session(local_keyring(path), token).generation == 2
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_remembered_token_is_forgotten_when_it_expires_and_when_the_keys_change(tmp_path: Path) -> None:
    path, now = tmp_path / "keys.json", time.time()
    path.write_text(json.dumps({"keys": [new_hs256("one")]}))
    keys = Keyring.open(path)
    clock = [now]
    reader = SessionReader(keys, lambda: clock[0])
    tokens = [mint(keys, generation=n, now=now - 500, ttl=502) for n in (1, 2, 3)]
    assert [reader.read(token).generation for token in tokens + tokens] == [1, 2, 3, 1, 2, 3]
    clock[0] = now + 100
    assert reader.read(tokens[2]).generation == 3, "the judge of an expiry is the library, by the real clock"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"keys": [new_es256("two")]}))
    other.rename(path)
    with pytest.raises(TokenRejected):
        reader.read(tokens[2])
    junk = "x.y.z"
    for _ in range(2):
        with pytest.raises(TokenRejected):
            reader.read(junk)
