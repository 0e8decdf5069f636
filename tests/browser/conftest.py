from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.stack import Stack, copy_example

HERE = Path(__file__).parent


def missing() -> str | None:
    """What keeps these tests from running, or None."""
    if shutil.which("chromium") is None:
        return "needs Chromium: apt-get install chromium"
    if not (HERE / "node_modules" / "playwright-core").is_dir():
        return "needs playwright-core: npm --prefix tests/browser ci"
    return None


class Browser:
    """Chromium, by way of `driver.mjs`."""

    def __init__(self) -> None:
        self._driver = subprocess.Popen(
            ["node", str(HERE / "driver.mjs")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, command: str, page: str = "page", **given: object) -> Any:
        """Carry out one command of the driver's; its answer. Fails with what the browser says."""
        assert self._driver.stdin is not None
        assert self._driver.stdout is not None
        print(json.dumps({"command": command, "page": page, **given}), file=self._driver.stdin, flush=True)
        answer = json.loads(self._driver.stdout.readline())
        assert "error" not in answer, answer
        return answer

    def run(self, code: str, page: str = "page", **given: object) -> Any:
        """What an expression is in the page."""
        return self.do("run", page, code=code, **given).get("value")

    def close(self) -> None:
        """End Chromium."""
        assert self._driver.stdin is not None
        self._driver.stdin.close()
        try:
            self._driver.wait(20)
        except subprocess.TimeoutExpired:
            self._driver.kill()
            self._driver.wait()


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    if (why := missing()) is not None:
        pytest.skip(why)
    running = Browser()
    yield running
    running.close()


@pytest.fixture
def browser(chromium: Browser) -> Iterator[Browser]:
    """A browser whose page named `page` is closed afterwards."""
    yield chromium
    for name in ("page", "other"):
        chromium.do("close", name)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One running stack for the tests of a module."""
    if (why := missing()) is not None:
        pytest.skip(why)
    place = tmp_path_factory.mktemp("stack")
    running = Stack(copy_example(place / "app"), place / "state", options=("--no-watch",))
    try:
        yield running.start()
    finally:
        running.kill()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the example's packages are installed, once, for every `Served`."""
    if (why := missing()) is not None:
        pytest.skip(why)
    return tmp_path_factory.mktemp("modules")
