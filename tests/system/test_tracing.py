"""A save's trace from the editor's request to the rename: database, channel, log, status, and a collector's span."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest

from tests.fakes.collector import attributes, collecting
from tests.system.plane import eventually, running_plane

pytestmark = pytest.mark.system


async def test_a_save_is_followed_through(database: str, tmp_path: Path) -> None:
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    parent = f"00-{trace_id}-{span_id}-01"
    with collecting() as collector:
        async with running_plane(database, tmp_path) as plane:
            project = await plane.project({"src/a.ts": "a\n"})
            agent = await project.session(
                tmp_path / "machine",
                OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
                OTEL_EXPORTER_OTLP_HEADERS="authorization=collector-secret-canary",
                OTEL_BSP_SCHEDULE_DELAY="100",
            )
            agent.start()
            await agent.equal()
            # Whatever the writer's own client is, its tracer adds one header to its request.
            plane.http.headers["traceparent"] = parent
            await project.save("src/a.ts", "traced\n")
            await project.save("src/big.txt", "x" * 300_000)
            del plane.http.headers["traceparent"]
            report = await agent.equal()

            async def exported() -> bool:
                return len(collector.named("preview.apply")) >= 2

            await eventually("both spans are at the collector", exported)
            assert await agent.stop() == 0
    assert report["last_applied"]["traceparent"] == parent
    applied = [
        line for text in agent.log().splitlines() if (line := json.loads(text))["event"] == "event.applied"
    ]
    assert [(line["file_path"], line["trace_id"], line["by"]) for line in applied] == [
        ("src/a.ts", trace_id, "event"),
        ("src/big.txt", trace_id, "sync"),
    ]
    spans = collector.named("preview.apply")
    assert {span.trace_id.hex() for span in spans} == {trace_id}
    assert {span.parent_span_id.hex() for span in spans} == {span_id}
    assert [attributes(span)["preview.revision"] for span in spans] == [2, 3]
    assert all(span.end_time_unix_nano > span.start_time_unix_nano for span in spans)
    assert len(collector.named("preview.hydrate")) == 1
    assert collector.headers[0]["authorization"] == "collector-secret-canary"
    assert "collector-secret-canary" not in agent.log() + json.dumps(report)
