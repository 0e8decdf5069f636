"""What a terminal, the log and `/status` show while a hydration runs."""

from __future__ import annotations

import asyncio
import io

import pytest
import structlog

from agent.snapshot import unpack
from agent.snapshot.unpack import Progress, reported


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_bar_tells_what_is_known() -> None:
    progress = Progress(attempt=1, received_bytes=1_500_000)
    assert "..." in progress.bar()
    progress.expected_bytes = 3_000_000
    assert "50%" in progress.bar()
    progress.files, progress.files_total = 1_000, 2_000
    progress.unpacked_bytes, progress.unpacked_total = 3, 4
    assert "75%" in progress.bar()
    assert "1,000 of 2,000 files, 1.5 MB" in progress.bar()
    progress.restart()
    assert progress.report() == {
        "attempt": 2, "received_bytes": 0, "expected_bytes": None, "files": 0, "files_total": None,
        "unpacked_bytes": 0, "unpacked_total": None,
    }  # fmt: skip
    assert progress.bar().endswith("attempt 2")


async def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "REDRAW", 0.001)
    terminal = Terminal()
    async with reported(Progress(attempt=1, files=3), terminal):
        async with asyncio.timeout(10):
            while "3 files" not in terminal.getvalue():
                await asyncio.sleep(0.001)
    assert terminal.getvalue().endswith("\r\x1b[K")


async def test_what_is_no_terminal_gets_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "LOG_EVERY", 0.001)
    stream = io.StringIO()
    with structlog.testing.capture_logs() as lines:
        async with reported(Progress(attempt=1, files=3), stream):
            async with asyncio.timeout(10):
                while len(lines) < 2:
                    await asyncio.sleep(0.001)
    assert lines[0]["event"] == "hydrate.progress"
    assert (lines[0]["files"], lines[0]["files_total"]) == (3, None)
    assert stream.getvalue() == ""
