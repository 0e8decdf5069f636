"""A disk to hydrate into, and the agent's client."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from agent.fs.project_dir import ProjectDir


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ProjectDir]:
    disk = ProjectDir(tmp_path / "project", tmp_path / "staging")
    disk.open()
    yield disk
    disk.close()


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(trust_env=False) as client:
        yield client
