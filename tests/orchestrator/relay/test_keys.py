"""NATS keys and tokens, held against the `nkeys` package."""

from __future__ import annotations

import base64
import json
from typing import Any

import nkeys
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.relay.keys import Key, Kind

KINDS = ("operator", "account", "user")


@given(st.binary(min_size=32, max_size=32), st.sampled_from(KINDS), st.binary(max_size=100))
def test_every_key_is_the_reference_s(raw: bytes, kind: Kind, text: bytes) -> None:
    ours = Key(kind, Ed25519PrivateKey.from_private_bytes(raw))
    theirs = nkeys.from_seed(bytearray(ours.seed, "ascii"))
    assert bytes(theirs.public_key).decode() == ours.public
    assert bytes(theirs.seed).decode() == ours.seed
    again = Key.from_seed(ours.seed)
    assert (again.kind, again.public, again.seed) == (kind, ours.public, ours.seed)
    token = ours.sign({"sub": "x", "name": text.hex(), "nats": {}})
    signed, _, signature = token.rpartition(".")
    assert theirs.verify(signed.encode(), base64.urlsafe_b64decode(signature + "=="))
    assert claims(token)["iss"] == ours.public


@given(st.text(max_size=70) | st.text("ASUO234567", min_size=58, max_size=58))
def test_what_is_no_seed_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"^it is ") as refused:
        Key.from_seed(text)
    assert len(text) < 8 or text not in str(refused.value)


def test_a_seed_with_one_letter_changed_is_refused() -> None:
    seed = Key("account").seed
    for place in range(len(seed)):
        other = "A" if seed[place] != "A" else "B"
        with pytest.raises(ValueError, match="no NATS"):
            Key.from_seed(seed[:place] + other + seed[place + 1 :])


def test_a_key_does_not_show_its_seed() -> None:
    key = Key("account")
    assert key.seed not in repr(key)
    assert repr(key) == f"Key({key.public})"


def claims(token: str) -> dict[str, Any]:
    body = token.split(".")[1]
    read: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return read
