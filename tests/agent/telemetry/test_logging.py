"""Secrets do not leave, whatever the key and however deep; logs are JSON lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st

from agent.config import read_environment
from agent.telemetry.logging import REDACTED, Redactor, configure_logs, get_logger, redactor_for
from tests.agent.test_config import GOOD

ROOT = Path(__file__).parents[3]
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


UNCAUGHT = """
import gc, threading
from agent.config import read_environment
from agent.telemetry.logging import configure_logs, log_uncaught, redactor_for
from tests.agent.test_config import GOOD

settings, secret = read_environment({**GOOD, "LOG_FORMAT": "json"}), GOOD["REALTIME_TOKEN"]
configure_logs(settings, redactor_for(settings))
log_uncaught()

class Unraisable:
    def __del__(self):
        raise ValueError(secret)

def fail():
    raise RuntimeError(secret)

thread = threading.Thread(target=fail, name="worker")
thread.start()
thread.join()
Unraisable()
gc.collect()
raise KeyError(secret)
"""


def test_what_nothing_catches_is_a_redacted_line_in_any_thread() -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCAUGHT], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["agent.bug"] * 3, done.stderr
    kinds = ["RuntimeError", "ValueError", "KeyError"]
    assert all(kind in line["exception"] for kind, line in zip(kinds, lines, strict=True))
    assert lines[0]["thread"] == "worker"
    assert GOOD["REALTIME_TOKEN"] not in done.stdout + done.stderr
