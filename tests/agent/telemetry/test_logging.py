"""Secrets do not leave, whatever the key and however deep; logs are JSON lines."""

from __future__ import annotations

import json

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from agent.config import read_environment
from agent.telemetry.logging import REDACTED, Redactor, configure_logs, get_logger, redactor_for
from tests.agent.test_config import GOOD

SECRET = "s3cr3t-canary-value"


@given(
    st.recursive(st.text() | st.integers() | st.none(), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_a_known_secret_never_survives(value: object) -> None:
    redact = Redactor([SECRET])
    hidden = {"plain": SECRET, f"key {SECRET}": 1, "deep": [{"x": [f"before {SECRET} after", value]}]}
    assert SECRET not in json.dumps(redact.value(hidden))


def test_secrets_minted_later_go_by_their_shape() -> None:
    redact = Redactor()
    token = "eyJhbGciOiJIUzI1NiJ9.eyJyb2xlIjoiYSJ9.c2ln"
    assert redact.text(f"Bearer {token}!") == f"Bearer {REDACTED}!"
    assert redact.text("https://s/x.zip?token=abc&x=1") == f"https://s/x.zip?token={REDACTED}&x=1"
    assert redact.text("wss://r/websocket?apikey=abc") == f"wss://r/websocket?apikey={REDACTED}"
    assert redact.text("an ordinary line = fine") == "an ordinary line = fine"


def test_lines_are_json_with_the_session_s_names_and_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    settings = read_environment({**GOOD, "LOG_FORMAT": "json"})
    try:
        configure_logs(settings, redactor_for(settings))
        try:
            raise ValueError(f"cannot open {GOOD['SNAPSHOT_URL']}")
        except ValueError:
            get_logger("test").error("thing.failed", why=GOOD["REALTIME_TOKEN"], exc_info=True)
    finally:
        structlog.reset_defaults()
        structlog.contextvars.clear_contextvars()
    printed = capsys.readouterr().out
    line = json.loads(printed)
    assert line["event"] == "thing.failed"
    assert line["project_id"] == GOOD["PROJECT_ID"]
    assert line["session_id"] == GOOD["SESSION_ID"]
    assert "Traceback" in line["exception"]
    assert "canary" not in printed
    assert GOOD["REALTIME_TOKEN"] not in printed
