"""Fixtures of the agent's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "react-app"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for installs that all tests share: the example is installed once and linked afterwards."""
    return tmp_path_factory.mktemp("modules")
