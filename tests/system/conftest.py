from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.stack import Stack, copy_example


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One running stack for the tests of a module; each works on files of its own."""
    place = tmp_path_factory.mktemp("stack")
    running = Stack(copy_example(place / "app"), place / "state")
    try:
        yield running.start()
    finally:
        running.kill()


@pytest.fixture
def idle_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack that the test itself starts."""
    waiting = Stack(copy_example(tmp_path / "app"), tmp_path / "state")
    try:
        yield waiting
    finally:
        waiting.kill()
