"""One stand-in for all referees, and their JavaScript packages installed when missing."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from orchestrator_stub.local_supabase.realtime.faults import Faults
from tests.fakes.serving import Local, serve_local
from tests.referees.clients import NODE


@pytest.fixture(scope="session")
def packages() -> None:
    """The official JavaScript clients, exactly as locked; installed once, by npm."""
    lock, installed = NODE / "package-lock.json", NODE / "node_modules" / ".package-lock.json"
    with lock.open() as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if installed.exists() and installed.stat().st_mtime >= lock.stat().st_mtime:
            return
        npm = shutil.which("npm")
        assert npm is not None, "the referees need Node with npm"
        quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
        done = subprocess.run([npm, "ci", *quiet], cwd=NODE, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"npm ci failed:\n{done.stderr}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(module_database: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Local]:
    async with serve_local(module_database, tmp_path_factory.mktemp("referees") / "storage") as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def local(served: Local) -> AsyncIterator[Local]:
    yield served
    served.stand_in.realtime.faults = Faults()
