"""What the orchestrator's logs never say, and what they still do."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator_stub.config import Settings, SettingsError
from orchestrator_stub.platform.redaction import REDACTED, Redactor, secrets_of
from tests.fakes.realtime import jwt

SECRET = "a-secret-of-some-length"

values = st.recursive(
    st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(values, st.text(), st.text())
def test_a_known_secret_never_survives(value: object, before: str, after: str) -> None:
    hidden = {f"key {SECRET}": 1, "deep": [{"x": (f"{before}{SECRET}{after}", value)}]}
    assert SECRET not in json.dumps(Redactor([SECRET]).value(hidden))


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (f"Bearer {jwt(4e9)}", f"Bearer {REDACTED}"),
        (f"cut: {jwt(4e9)[:60]}", f"cut: {REDACTED}"),
        ("https://s/x.zip?token=abc&x=1", f"https://s/x.zip?token={REDACTED}&x=1"),
        ("https://s/x?X-Amz-Signature=abc", f"https://s/x?X-Amz-Signature={REDACTED}"),
        ("sb_secret_abc_d-e is wrong", f"{REDACTED} is wrong"),
        ("postgresql://u:p4ss@h:5432/d", f"postgresql://u:{REDACTED}@h:5432/d"),
        ("redis://:p4ss@h/0 is away", f"redis://:{REDACTED}@h/0 is away"),
        ("nothing = secret, eyJust a word", "nothing = secret, eyJust a word"),
    ],
)
def test_others_go_by_their_shape(said: str, left: str) -> None:
    assert Redactor().text(said) == left


def test_the_settings_secrets_are_all_known() -> None:
    given = {
        "database_url": "postgresql://u:the%20password@h/d", "supabase_url": "http://s", "redis_url": "redis://r/0",
        "supabase_anon_key": "anon-key-x", "supabase_service_role_key": "service-key-x", "fly_api_token": "fly-token-x",
        "supabase_jwt_secret": "jwt-secret-x",
    }  # fmt: skip
    known = secrets_of(Settings.of(given))
    assert {"the password", *given.values()} - {"http://s"} == set(known)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://u:half@other-half@h/d",
        "postgresql://u:pass/word@h/d",
        "postgresql://u:p@h:7q/d",
        "host='",
    ],
)
def test_an_address_that_would_be_taken_apart_wrongly_is_refused_without_a_word_of_it(dsn: str) -> None:
    with pytest.raises(SettingsError) as refused:
        Settings.of({"database_url": dsn, "supabase_url": "http://s", "supabase_anon_key": "a",
                     "supabase_service_role_key": "s"})  # fmt: skip
    (problem,) = refused.value.problems
    assert problem.startswith("DATABASE_URL: ")
    assert "percent-encode" in problem
    assert not [
        word for word in ("half", "word", "7q", "'") if word in problem.removesuffix("in its password")
    ]


def test_what_a_library_warns_of_passes_the_redactor_too() -> None:
    """In a process of its own: the tests' logging is pytest's."""
    script = (
        "import logging, sys; from orchestrator_stub.process import configure_logs;"
        "from orchestrator_stub.platform.redaction import Redactor;"
        " configure_logs('info', 'json', Redactor([sys.argv[1]]));"
        "logging.getLogger('uvicorn.error').error('lost %s', sys.argv[1])"
    )
    told = subprocess.run([sys.executable, "-c", script, SECRET], capture_output=True, text=True, check=True)
    line = json.loads(told.stderr)
    assert (line["event"], line["level"]) == (f"lost {REDACTED}", logging.getLevelName(logging.ERROR).lower())
