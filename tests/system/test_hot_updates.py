"""One revision is one hot update: however files are put in place, the browser is told once, and of nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin, Subprotocol

from tests.system.stack import Stack, until

pytestmark = pytest.mark.system

SAVES = 20
MODULES = ("src/main.tsx", "src/App.tsx", "src/Coast.tsx", "src/hours.ts")


@pytest.fixture
def browser(stack: Stack) -> Iterator[ClientConnection]:
    """A page with the app's modules loaded and its hot-update socket open."""
    address = stack.info["preview_url"].replace("http", "ws", 1)
    origin = Origin(stack.info["preview_url"])
    token = re.search(r'const wsToken = "([^"]+)"', stack.fetch("@vite/client").text)
    assert token is not None, "Vite lets in pages that know its token"
    with connect(
        f"{address}/?token={token[1]}", origin=origin, subprotocols=[Subprotocol("vite-hmr")], proxy=None
    ) as socket:
        assert json.loads(socket.recv(10))["type"] == "connected"
        for module in MODULES:
            until(f"{module} is served", lambda m=module: stack.fetch(m).status_code == 200)
        yield socket


def told(socket: ClientConnection) -> list[str]:
    """The paths of the next frame, or its type if it is no update."""
    while (frame := json.loads(socket.recv(10)))["type"] == "custom":
        assert frame["event"].startswith("preview:"), "which revision it is, for our own client"
    if frame["type"] != "update":
        return [frame["type"]]
    return [update["path"] for update in frame["updates"]]


def test_a_save_is_told_once_whether_alone_or_in_a_bulk(stack: Stack, browser: ClientConnection) -> None:
    source = (stack.project / "src/Coast.tsx").read_text()
    for n in range(SAVES):
        stack.save("src/Coast.tsx", f"{source}// save {n}\n")
        assert told(browser) == ["/src/Coast.tsx"], f"save {n}"
        until("it is served", lambda t=f"// save {n}": stack.serves("src/Coast.tsx", t))

    app = (stack.project / "src/App.tsx").read_text()
    files = [
        {"action": "update", "file_path": path, "content": f"{text}// both\n"}
        for path, text in (("src/App.tsx", app), ("src/Coast.tsx", source))
    ]
    stack.rpc("apply_project_files", changes=files)
    assert sorted(told(browser)) == ["/src/App.tsx", "/src/Coast.tsx"], "one revision is one update"

    # Had one of those been told twice, this would not be the next frame.
    stack.save("src/App.tsx", f"{app}// the last\n")
    assert told(browser) == ["/src/App.tsx"]
