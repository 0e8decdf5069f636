"""How far a hydration has come, for the three who ask: `/status`, the log, and a person at a terminal."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TextIO

from agent.telemetry.metrics import get_logger

EVERY: Final = 1.0
"""Seconds between two log lines of long work. What is done before the first is not announced at all."""

REDRAW: Final = 0.1
"""Seconds between two drawings of the bar: fluent to the eye, nothing to the terminal."""

BAR_WIDTH: Final = 30

log = get_logger("hydrate")


@dataclass(slots=True)
class Progress:
    """Written by `snapshot.download`, read by everybody. Totals are None until known."""

    attempt: int = 0
    received_bytes: int = 0
    expected_bytes: int | None = None
    files: int = 0
    files_total: int | None = None
    unpacked_bytes: int = 0
    unpacked_total: int | None = None

    def restart(self) -> None:
        """A new attempt begins: nothing of the last one is kept."""
        self.attempt += 1
        self.received_bytes = self.files = self.unpacked_bytes = 0
        self.expected_bytes = self.files_total = self.unpacked_total = None

    def report(self) -> dict[str, int | None]:
        """For `/status` and the log."""
        return {
            "attempt": self.attempt,
            "received_bytes": self.received_bytes,
            "expected_bytes": self.expected_bytes,
            "files": self.files,
            "files_total": self.files_total,
            "unpacked_bytes": self.unpacked_bytes,
            "unpacked_total": self.unpacked_total,
        }

    @property
    def share(self) -> float | None:
        """Of the whole, 0 to 1: by unpacked bytes when the manifest told the total, else by received ones."""
        if self.unpacked_total:
            return min(1.0, self.unpacked_bytes / self.unpacked_total)
        if self.expected_bytes:
            return min(1.0, self.received_bytes / self.expected_bytes)
        return None

    def bar(self) -> str:
        """One line for a terminal."""
        share = self.share
        filled = int(BAR_WIDTH * (share or 0.0))
        drawn = "█" * filled + "░" * (BAR_WIDTH - filled)
        percent = " ..." if share is None else f"{share:4.0%}"
        of_files = "" if self.files_total is None else f" of {self.files_total:,}"
        again = f", attempt {self.attempt}" if self.attempt > 1 else ""
        return f"hydrating {drawn} {percent}  {self.files:,}{of_files} files, {self.received_bytes / 1e6:.1f} MB{again}"


@asynccontextmanager
async def announced(progress: Progress, terminal: TextIO | None = None) -> AsyncIterator[None]:
    """Tell of `progress` while the block runs: a bar when `terminal` (default: stderr) is one, else log lines."""
    stream = terminal if terminal is not None else sys.stderr
    telling = asyncio.create_task(
        _draw(progress, stream) if stream.isatty() else _log(progress), name="hydrate-progress"
    )
    try:
        yield
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def _log(progress: Progress) -> None:
    while True:
        await asyncio.sleep(EVERY)
        log.info("hydrate.progress", **progress.report())


async def _draw(progress: Progress, stream: TextIO) -> None:
    # What is quick draws nothing, so a small project's start stays clean.
    await asyncio.sleep(3 * REDRAW)
    try:
        while True:
            stream.write(f"\r\x1b[K{progress.bar()}")
            stream.flush()
            await asyncio.sleep(REDRAW)
    finally:
        stream.write("\r\x1b[K")
        stream.flush()
