"""The token: its claims plan the refresh and nothing more; a rotated file is taken; the value never shows."""

from __future__ import annotations

import base64
import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import CredentialRejected, MalformedMessage
from agent.tokens import Token, Tokens, read_token
from tests.fakes.realtime import jwt


def test_claims_are_read() -> None:
    token = read_token(jwt(1_000, 400) + "\n")
    assert (token.issued_at, token.expires_at, token.role) == (400.0, 1_000.0, "preview_agent")


def test_the_value_never_shows() -> None:
    value = jwt(1_000, 400)
    assert value not in repr(read_token(value))
    assert value not in f"{read_token(value)!s}"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "a.b",
        "a.b.c",
        "a.b.c.d",
        "a..c",
        "a.bnVsbA.c",
        "a.W10.c",
        "ä.e30.c",
        "a.e30.c\nd",
        "a.\x00.c",
    ],
)
def test_what_is_no_jwt_is_refused_without_showing_it(value: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        read_token(value)
    assert len(value) < 10 or value not in str(caught.value)


@given(
    st.text(max_size=60) | st.binary(max_size=40).map(lambda b: f"a.{base64.urlsafe_b64encode(b).decode()}.c")
)
def test_junk_is_malformed_or_a_token(value: str) -> None:
    with contextlib.suppress(MalformedMessage):
        assert isinstance(read_token(value), Token)


def test_refresh_is_due_at_seventy_percent() -> None:
    token = Token("x", expires_at=1_000.0, issued_at=0.0)
    assert token.refresh_at(seen_at=0.0) == 700.0
    assert token.refresh_at(seen_at=0.0, spread=1.0) == pytest.approx(650.0)


def test_a_token_without_iat_lives_from_when_it_was_seen() -> None:
    assert Token("x", expires_at=1_000.0).refresh_at(seen_at=900.0) == pytest.approx(400.0 + 420.0)
    assert Token("x", expires_at=10_000.0).refresh_at(seen_at=0.0) == pytest.approx(7_000.0)


def test_a_token_that_never_ends_is_never_refreshed() -> None:
    assert Token("x").refresh_at(seen_at=0.0) is None
    assert not Token("x").expired(1e12)


@given(st.floats(0, 1e10), st.floats(0, 1e10), st.floats(0, 1e10), st.floats(0, 1))
def test_refresh_is_never_after_expiry(issued: float, expires: float, seen: float, spread: float) -> None:
    """However wrong the clocks: at the latest when the token ends."""
    at = Token("x", expires_at=expires, issued_at=issued).refresh_at(seen, spread)
    assert at is not None
    assert at <= expires


def test_an_issuer_ahead_of_us_does_not_make_a_loop() -> None:
    """`iat` lies in our future: the life left is what counts, and the refresh is not due at once."""
    at = Token("x", expires_at=1_600.0, issued_at=1_000.0).refresh_at(seen_at=900.0)
    assert at == pytest.approx(900.0 + 0.7 * 700.0)


def test_a_rotated_file_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(jwt(1_000, name="one"))
    tokens = Tokens(None, file)
    first = tokens.current()
    assert first is not None
    assert tokens.current() is first, "the same object until it changes"
    replacement = tmp_path / "token.new"
    replacement.write_text(jwt(2_000, name="two") + "\n")
    replacement.rename(file)
    second = tokens.current()
    assert second is not None
    assert second.expires_at == 2_000


def test_a_half_written_file_changes_nothing_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(jwt(1_000))
    tokens = Tokens(None, file)
    first = tokens.current()
    for junk in (b"", b"eyJ", b"\xff\xfe", jwt(1_000, name="three").encode()[:-40].replace(b".", b"")):
        file.write_bytes(junk)
        assert tokens.current() is first
        assert tokens.problem is not None
        assert "token" in tokens.problem
    file.write_text(jwt(3_000))
    third = tokens.current()
    assert third is not None
    assert third.expires_at == 3_000
    assert tokens.problem is None


def test_a_missing_file_is_no_end(tmp_path: Path) -> None:
    tokens = Tokens(jwt(1_000), tmp_path / "absent")
    assert tokens.current() is not None
    assert tokens.problem is not None


async def test_a_token_that_cannot_be_renewed_says_what_is_wrong_with_its_file(tmp_path: Path) -> None:
    tokens = Tokens(jwt(1_000), tmp_path / "absent", wall=lambda: 2_000)
    with pytest.raises(
        CredentialRejected, match=r"expired and there is no session API .*; cannot take .*absent"
    ):
        await tokens.renew_token()


def test_the_file_wins_over_the_environment_and_a_newer_issue_over_both(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(jwt(2_000))
    tokens = Tokens(jwt(1_000), file)
    current = tokens.current()
    assert current is not None
    assert current.expires_at == 2_000
    tokens.accept(jwt(3_000))
    os.utime(file)
    assert tokens.accept(jwt(3_000)).expires_at == 3_000


async def test_without_an_issuer_an_expired_token_is_the_end(tmp_path: Path) -> None:
    file = tmp_path / "token"
    tokens = Tokens(jwt(1_000), file, wall=lambda: 1_500.0)
    with pytest.raises(CredentialRejected, match="expired"):
        await tokens.renew_token()
    file.write_text(jwt(2_000))
    assert (await tokens.renew_token()).expires_at == 2_000
    with pytest.raises(CredentialRejected, match="no realtime token"):
        await Tokens().renew_token()
