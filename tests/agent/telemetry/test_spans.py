"""Spans reach a collector when one is named; otherwise the SDK is not even imported."""

from __future__ import annotations

import subprocess
import sys
import time
from uuid import UUID

import pytest
from structlog.testing import capture_logs

from agent.core.model import TraceParent
from agent.telemetry import spans as spans_module
from agent.telemetry.spans import ENDPOINT, FLUSH_SECONDS, Spans, credentials, open_spans
from tests.fakes.collector import attributes, collecting

PROJECT, SESSION = UUID(int=1), UUID(int=2)
PARENT = TraceParent("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", "01")
START = 1_800_000_000.0


def opened(monkeypatch: pytest.MonkeyPatch, url: str) -> Spans:
    monkeypatch.setenv(ENDPOINT, url)
    spans = open_spans({ENDPOINT: url}, PROJECT, SESSION)
    assert spans is not None
    return spans


def test_a_span_arrives_below_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        spans = opened(monkeypatch, collector.url)
        spans.record("preview.apply", START, START + 0.25, {"preview.revision": 7, "left out": None}, PARENT)
        spans.record("preview.hydrate", START, START - 1, {})
        spans.close()
    assert collector.paths == ["/v1/traces"]
    (span,), (root,) = collector.named("preview.apply"), collector.named("preview.hydrate")
    assert span.trace_id.hex() == PARENT.trace_id
    assert span.parent_span_id.hex() == PARENT.span_id
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(250e6, abs=1e3)
    assert attributes(span) == {"preview.revision": 7}
    assert root.parent_span_id == b""
    assert root.trace_id.hex() != PARENT.trace_id
    assert root.start_time_unix_nano == root.end_time_unix_nano, "no span ends before it starts"
    assert collector.resources[0]["service.name"] == "preview-agent"
    assert collector.resources[0]["preview.session_id"] == str(SESSION)


def test_a_writer_that_does_not_sample_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        spans = opened(monkeypatch, collector.url)
        spans.record("preview.apply", START, START, {}, TraceParent(PARENT.trace_id, PARENT.span_id, "00"))
        spans.close()
    assert collector.spans == []


def test_a_collector_that_is_away_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    spans = opened(monkeypatch, "http://127.0.0.1:9")
    for _ in range(5_000):  # more than the SDK's queue holds
        spans.record("preview.apply", START, START, {}, PARENT)
    started = time.monotonic()
    spans.close()
    assert time.monotonic() - started < FLUSH_SECONDS + 3  # the SDK alone waits for five seconds


def test_without_the_variable_there_are_none_and_nothing_is_imported() -> None:
    assert open_spans({}, PROJECT, SESSION) is None
    assert open_spans({ENDPOINT: ""}, PROJECT, SESSION) is None
    loaded = "import sys, agent.daemon; print([m for m in sys.modules if m.split('.')[0] in "
    loaded += "('opentelemetry', 'google', 'requests', 'urllib3')])"
    told = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_the_variable_without_the_sdk_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk", None)
    with capture_logs() as lines:
        monkeypatch.setattr(spans_module, "log", spans_module.get_logger("spans"))
        assert open_spans({ENDPOINT: "http://collector:4318"}, PROJECT, SESSION) is None
    (line,) = lines
    assert line["event"] == "spans.unavailable"
    assert "OTEL_EXPORTER_OTLP_ENDPOINT is set" in line["why"]
    assert "preview-sync[otel]" in line["remedy"]


def test_the_collector_s_credentials_are_known_to_the_redactor() -> None:
    environ = {"OTEL_EXPORTER_OTLP_HEADERS": "x-team=a-long-team, authorization=Bearer%20abc"}
    known = credentials(environ)
    assert set(known) == {
        "x-team=a-long-team", "a-long-team", "authorization=Bearer%20abc", "Bearer%20abc", "Bearer abc",
    }  # fmt: skip
    assert credentials({}) == []
