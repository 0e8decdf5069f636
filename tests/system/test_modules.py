"""A project is opened a second time from its layer: `dev` as a person runs it, its agent, its storage, its page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.agent.devserver.installs import needs_npm, with_dependency
from tests.system.stack import Stack, until

pytestmark = [pytest.mark.system, needs_npm]

SERVER = """
const dep = require("dep");
require("http").createServer((_, answer) => answer.end(`the dependency says ${dep}`)).listen(process.env.PORT);
"""


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with_dependency(tmp_path / "app", scripts={"dev": "node server.js"})
    (tmp_path / "app/server.js").write_text(SERVER)
    running = Stack(tmp_path / "app", tmp_path / "state", ("--timeline",))
    try:
        yield running
    finally:
        running.kill()


def machines_log(stack: Stack) -> list[dict[str, object]]:
    (log,) = stack.state.glob("machines/*/agent.log")
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def test_dev_opens_a_project_again_from_its_layer(stack: Stack) -> None:
    stack.start()
    assert stack.status()["dev_server"]["install"]["result"] == "installed"
    until(
        "the layer is sent",
        lambda: [1 for line in machines_log(stack) if line["event"] == "modules.sent"],
        60,
    )
    assert stack.interrupt() == 0
    shutil.rmtree(stack.state / "machines")
    (stack.state / "session.json").unlink()

    stack.start()
    status = stack.status()
    assert status["dev_server"]["install"]["result"] == "layer"
    assert list(status["start"])[:4] == ["hydrated", "modules", "dev_server", "first_page"]
    assert sorted(status["start"].values()) == list(status["start"].values())
    assert stack.serves("/", "the dependency says 1")
    # Drawn once the page is there.
    until("both starts are drawn", lambda: stack.log().count("node_modules in place") == 2)
    urls = [line for line in machines_log(stack) if "preview-modules" in json.dumps(line)]
    assert urls == [], "signed URLs are in no log"
