"""What the log and `/status` show while a hydration runs."""

from __future__ import annotations

import asyncio

import pytest
import structlog

from agent.snapshot import unpack
from agent.snapshot.unpack import Progress, reported


def test_a_new_attempt_begins_from_nothing() -> None:
    progress = Progress(
        attempt=1, received_bytes=1_500_000, expected_bytes=3_000_000, files=1_000, files_total=2_000
    )
    progress.restart()
    assert progress.report() == {
        "attempt": 2, "received_bytes": 0, "expected_bytes": None, "files": 0, "files_total": None,
        "unpacked_bytes": 0, "unpacked_total": None,
    }  # fmt: skip


async def test_a_long_hydration_is_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "LOG_EVERY", 0.001)
    with structlog.testing.capture_logs() as lines:
        async with reported(Progress(attempt=1, files=3)):
            async with asyncio.timeout(10):
                while len(lines) < 2:
                    await asyncio.sleep(0.001)
    assert lines[0]["event"] == "hydrate.progress"
    assert (lines[0]["files"], lines[0]["files_total"]) == (3, None)
