"""The stand-in served for real, on a free port, over a fresh database."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.serving import Local, serve_local


@pytest.fixture
async def local(database: str, tmp_path: Path) -> AsyncIterator[Local]:
    """The whole stand-in, with its faults, and refused joins answered at once."""
    async with serve_local(database, tmp_path / "storage") as running:
        yield running
