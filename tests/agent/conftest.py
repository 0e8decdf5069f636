"""Fixtures of the agent's tests."""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from agent.fs import transaction
from agent.fs.project_dir import ProjectDir
from tests.agent.disks import Agent, in_staging, mounted
from tests.agent.link.one_link import TRANSPORTS, Issuer, Server, wall

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


@pytest.fixture
async def server(request: pytest.FixtureRequest) -> AsyncIterator[Server]:
    """A server for one link, in the link's simulated time: Realtime, or the transport that a test asks for."""
    async with TRANSPORTS[getattr(request, "param", "realtime")](wall=wall) as server:
        yield server


@pytest.fixture
async def issuer() -> Issuer:
    """Who gives the link its tokens."""
    return Issuer()


@pytest.fixture(params=["exchange", "copy"])
def keeping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a transaction keeps what it replaces: by exchanging names, or as on a system that cannot."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if request.param == "copy":
        monkeypatch.setattr(transaction, "exchange", refuse)
    return str(request.param)


@pytest.fixture
def disk(root: Path, tmp_path: Path) -> Iterator[ProjectDir]:
    """An open disk; nothing may stay in its staging."""
    disk = ProjectDir(root, tmp_path / "staging")
    disk.open()
    yield disk
    assert not in_staging(tmp_path / "staging"), "a transaction left something in staging"
    disk.close()


@pytest.fixture
def agent(disk: ProjectDir) -> Agent:
    """`disk`, and what its agent remembers."""
    return Agent(disk)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The project of `disk`."""
    return tmp_path / "project"
