"""Fixtures of the agent's tests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "react-app"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for installs that all tests share: the example is installed once and linked afterwards."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def open_path() -> Iterator[Path]:
    """As `tmp_path`, and other users may look in: pytest's own is closed to them at every level."""
    with tempfile.TemporaryDirectory(prefix="preview-test-") as name:
        Path(name).chmod(0o755)
        yield Path(name)
