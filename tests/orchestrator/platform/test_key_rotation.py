"""A key set that changes under a running keyring: what counts then, and that nothing is passed over in silence."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from structlog.testing import capture_logs

from orchestrator_stub.platform.tokens import (
    LOOK_AGAIN,
    CannotSign,
    Keyring,
    TokenRejected,
    local_keyring,
    new_es256,
    new_hs256,
)

Change = Callable[[str], None]


def token_of(keys: Keyring) -> str:
    return keys.sign({"role": "service_role", "exp": int(time.time()) + 600})


def refused(keys: Keyring, token: str) -> str:
    with pytest.raises(TokenRejected) as caught:
        keys.verify(token)
    return caught.value.reason


def kid_of(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def rsa_key() -> dict[str, Any]:
    private = rsa.generate_private_key(65537, 2048)
    return {**RSAAlgorithm.to_jwk(private, as_dict=True), "kid": "other"}


GOOD = new_es256("good")
BROKEN: dict[str, Any] = {
    "RSA": rsa_key(),
    "RSA, public": RSAAlgorithm.to_jwk(rsa.generate_private_key(65537, 2048).public_key(), as_dict=True),
    "Ed25519": OKPAlgorithm.to_jwk(ed25519.Ed25519PrivateKey.generate(), as_dict=True),
    "P-384": ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP384R1()), as_dict=True),
    "no kty": {"kid": "x", "k": "A" * 43},
    "short": {"kty": "oct", "k": "c2hvcnQ"},
    "no k": {"kty": "oct", "kid": "x"},
    "a typo in k": {"kty": "oct", "k": "*" + new_hs256("x")["k"]},
    "k is a number": {"kty": "oct", "k": 10**50},
    "another algorithm": {**new_hs256("x"), "alg": "HS512"},
    "no y": {name: value for name, value in GOOD.items() if name != "y"},
    "x is a number": {**GOOD, "x": 7},
    "a point beside the curve": {**GOOD, "x": new_es256("other")["x"]},
    "d is another's": {**GOOD, "d": "AA"},
    "kid is a number": {**new_hs256("x"), "kid": 7},
    "no object": "a key",
    "nothing": None,
}


class File:
    """A key set's file, a keyring over it, and a clock that stands still unless told."""

    def __init__(self, path: Path, *keys: Any) -> None:
        self.path = path
        self.now = 1000.0
        self.put(*keys)
        self.keys = Keyring.open(path, clock=lambda: self.now)

    def put(self, *keys: Any) -> None:
        self.write(json.dumps({"keys": keys}))

    def write(self, text: str | bytes) -> None:
        draft = self.path.with_name("draft")
        draft.write_bytes(text.encode() if isinstance(text, str) else text)
        draft.rename(self.path)


@pytest.mark.parametrize("what", BROKEN)
def test_one_key_that_cannot_be_used_keeps_no_dropped_key_alive(tmp_path: Path, what: str) -> None:
    leaked = new_hs256("leaked")
    file = File(tmp_path / "keys.json", leaked)
    stolen = token_of(file.keys)
    file.put(BROKEN[what], GOOD)
    with capture_logs() as said:
        assert refused(file.keys, stolen) == "key"
        fresh = token_of(file.keys)
        assert kid_of(fresh) == "good"
        assert file.keys.verify(fresh)["role"] == "service_role"
    [line] = said
    assert (line["event"], line["log_level"]) == ("keys.skipped", "error")
    assert "key 1" in line["reason"]
    assert file.keys.problems()["skipped"] == 1
    for secret in (BROKEN[what].get(name) for name in ("k", "d", "p", "q") if isinstance(BROKEN[what], dict)):
        assert secret is None or str(secret) not in str(line)
    # The same at a start: who can run with it can start with it.
    with capture_logs() as said:
        again = Keyring.open(file.path)
        assert again.verify(fresh)["role"] == "service_role"
    assert [line["event"] for line in said] == ["keys.skipped"]
    # And once it is mended, nothing is wrong any more.
    file.put(GOOD)
    assert not any(file.keys.problems().values())


def no_file(path: Path) -> None:
    path.unlink()


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


UNUSABLE: dict[str, str | bytes | Callable[[Path], None]] = {
    "torn": '{"keys": [{"kty": "oct", "k',
    "empty": "",
    "not UTF-8": b'{"keys": ["\xff"]}',
    "an empty set": '{"keys": []}',
    "a list": json.dumps([GOOD]),
    "one bare key": json.dumps(GOOD),
    "keys by name": json.dumps({"keys": {"good": GOOD}}),
    "text": '"keys"',
    "nested": "[" * 100_000,
    "only keys of others": json.dumps({"keys": [BROKEN["RSA"], BROKEN["P-384"]]}),
    "missing": no_file,
    "a directory": a_directory,
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_set_that_cannot_be_used_keeps_the_last_good_one_and_says_so_each_time(
    tmp_path: Path, what: str
) -> None:
    file = File(tmp_path / "keys.json", new_hs256("first"), new_hs256("second"))
    token = token_of(file.keys)
    damage = UNUSABLE[what]
    damage(file.path) if callable(damage) else file.write(damage)
    with capture_logs() as said:
        for _ in range(5):
            assert file.keys.verify(token)["role"] == "service_role"
    assert [(line["event"], line["log_level"]) for line in said] == [("keys.unread", "error")], "once a look"
    assert said[0]["reason"]
    assert file.keys.problems() == {"unread": 1, "skipped": 0, "named_twice": 0, "cannot_sign": 0}
    for _ in range(3):
        file.now += LOOK_AGAIN
        with capture_logs() as said:
            assert kid_of(token_of(file.keys)) == "first"
        assert [line["event"] for line in said] == ["keys.unread"], "and again, for as long as it lasts"
    if file.path.is_dir():
        file.path.rmdir()
    file.put(GOOD)
    assert refused(file.keys, token) == "key"
    assert kid_of(token_of(file.keys)) == "good"
    assert not any(file.keys.problems().values())


def test_a_start_refuses_what_no_key_of_can_be_used(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    for content in UNUSABLE.values():
        if not callable(content):
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            with pytest.raises(ValueError, match=r".") as caught:
                Keyring.open(path)
            assert len(str(caught.value)) < 1000
            with pytest.raises(ValueError, match=r"."):
                local_keyring(path)


def test_a_file_that_was_away_is_taken_up_again(tmp_path: Path) -> None:
    file = File(tmp_path / "keys.json", GOOD)
    token = token_of(file.keys)
    aside = file.path.rename(tmp_path / "aside")
    assert file.keys.problems()["unread"] == 1
    aside.rename(file.path)
    assert file.keys.problems()["unread"] == 0, "the same file, untouched"
    assert file.keys.verify(token)


def test_a_set_that_becomes_readable_without_a_change_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rights were mended, or descriptors are to be had again: neither shows in time, size or inode."""
    file = File(tmp_path / "keys.json", new_hs256("dropped"))
    token = token_of(file.keys)
    file.put(GOOD)
    real = Path.read_bytes
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda path: real(path.with_name("not there")))
        assert file.keys.verify(token)
        assert file.keys.problems()["unread"] == 1
    file.now += LOOK_AGAIN
    assert refused(file.keys, token) == "key"


def test_a_change_while_it_is_read_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": [new_hs256("dropped")]}))
    real = Path.read_bytes

    def read_then_replaced(self: Path) -> bytes:
        content = real(self)
        draft = tmp_path / "draft"
        draft.write_text(json.dumps({"keys": [GOOD]}))
        draft.rename(path)
        return content

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read_then_replaced)
        keys = Keyring.open(path)
    assert kid_of(token_of(keys)) == "good"


def test_two_keys_of_one_name_both_count_and_are_said(tmp_path: Path) -> None:
    one, two, nameless = new_hs256("same"), new_es256("same"), new_hs256("")
    nameless.pop("kid")
    with capture_logs() as said:
        file = File(tmp_path / "keys.json", one, two, new_hs256("same"), nameless, nameless)
    [line] = said
    assert (line["event"], line["log_level"]) == ("keys.named_twice", "error")
    assert "'same'" in line["reason"]
    assert file.keys.problems()["named_twice"] == 1
    for key in (one, two, nameless):
        assert file.keys.verify(token_of(Keyring.from_jwks({"keys": [key]})))


def test_a_set_without_a_private_key_verifies_and_says_that_it_cannot_sign(tmp_path: Path) -> None:
    public = {name: value for name, value in GOOD.items() if name != "d"}
    file = File(tmp_path / "keys.json", new_hs256("dropped"))
    dropped = token_of(file.keys)
    file.put(public)
    with capture_logs() as said:
        assert refused(file.keys, dropped) == "key"
    assert [line["event"] for line in said] == ["keys.cannot_sign"]
    assert file.keys.problems()["cannot_sign"] == 1
    assert file.keys.verify(token_of(Keyring.from_jwks({"keys": [GOOD]})))
    with pytest.raises(CannotSign, match="private"):
        token_of(file.keys)


def test_a_secret_with_a_typo_is_not_another_secret() -> None:
    """Python's decoder drops what is not base64: a key with one wrong character would be one that nobody has."""
    secret = base64.urlsafe_b64encode(b"s" * 48).decode()
    for damaged in (
        secret[:9] + "*" + secret[9:],
        secret[:9] + " " + secret[9:],
        secret[:9] + "é" + secret[9:],
    ):
        with pytest.raises(ValueError, match="base64url"):
            Keyring.from_jwks({"keys": [{"kty": "oct", "k": damaged}]})
    padded = base64.urlsafe_b64encode(b"s" * 40).decode()
    assert padded.endswith("=")
    Keyring.from_jwks({"keys": [{"kty": "oct", "k": padded}]})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
ODD_KEY = st.fixed_dictionaries(
    {},
    optional={
        "kty": st.sampled_from(["oct", "EC", "RSA", "OKP"]) | JSON,
        "crv": st.sampled_from(["P-256", "P-384", "secp256k1"]) | JSON,
        "k": st.sampled_from([GOOD["x"], "A" * 43]) | JSON,
        "x": st.sampled_from([GOOD["x"]]) | JSON,
        "y": st.sampled_from([GOOD["y"]]) | JSON,
        "d": st.sampled_from([GOOD["d"]]) | JSON,
        "kid": JSON,
        "alg": st.sampled_from(["HS256", "ES256"]) | JSON,
    },
)


@given(st.lists(ODD_KEY | JSON, max_size=4))
def test_whatever_stands_beside_a_good_key_the_good_one_counts(odd: list[Any]) -> None:
    token = token_of(Keyring.from_jwks({"keys": [GOOD]}))
    assert Keyring.from_jwks({"keys": [*odd, GOOD]}).verify(token)["role"] == "service_role"


@given(JSON)
def test_whatever_is_no_key_set_is_refused_as_one(odd: Any) -> None:
    for jwks in (odd, {"keys": odd}):
        try:
            Keyring.from_jwks(jwks)
        except ValueError:
            continue
        raise AssertionError("taken")
