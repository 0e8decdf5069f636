"""Fixtures of the agent's tests."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.agent.disks import mounted

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


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts file systems, and unmounts them at the end."""
    places: list[Path] = []

    def make(*options: str, kind: str = "tmpfs", source: str = "tmpfs") -> Path:
        place = tmp_path / f"mount{len(places)}"
        mounted(place, *options, kind=kind, source=source)
        places.append(place)
        return place

    yield make
    for place in places:
        subprocess.run(["umount", "-l", str(place)], check=True)
