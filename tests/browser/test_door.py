"""A real browser at the door: by TLS behind nginx, also inside another site, through a start, an edit, an end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.browser.conftest import Browser, missing
from tests.orchestrator.door.test_in_front import certificate, nginx
from tests.ports import free_port
from tests.system.stack import REPOSITORY, Stack, until

pytestmark = pytest.mark.browser

PRODUCT = """
server {{
    listen 127.0.0.1:{port} ssl;
    server_name app.product.test;
    ssl_certificate {cert};
    ssl_certificate_key {key};
    default_type text/html;
    location / {{ return 200 '<h1>Product</h1><iframe src="$arg_u" width="800" height="600"></iframe>'; }}
}}
"""


@dataclass
class Doors:
    """Two doors to a stack's previews: by TLS behind nginx, and by http on loopback."""

    stack: Stack
    place: Path
    tls: int = field(default_factory=free_port)
    ports: dict[str, int] = field(default_factory=lambda: {"tls": free_port(), "plain": free_port()})
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """Start one door, as somebody deploys it."""
        domain = f"preview.test:{self.tls}" if name == "tls" else f"preview.localhost:{self.ports[name]}"
        environment = {
            "PATH": os.environ["PATH"], "DATABASE_URL": self.stack.info["database_url"],
            "PREVIEW_DOMAIN": domain, "DOOR_KEYS": (self.stack.state / "door.key").read_text(),
            "DOOR_PORT": str(self.ports[name]), "LOG_LEVEL": "warning",
        }  # fmt: skip
        with (self.place / f"{name}.log").open("a") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "orchestrator_stub", "door"],
                env=environment,
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
        url = f"http://127.0.0.1:{self.ports[name]}/.preview-door/livez"

        def open() -> bool:
            try:
                return httpx.get(url, timeout=2).status_code == 200
            except httpx.TransportError:
                return False

        until(f"the door is open: {self.place / name}.log", open)

    def stop(self, name: str) -> None:
        self.processes[name].terminate()
        assert self.processes[name].wait(20) == 0

    def api(self, method: str, path: str, **body: object) -> httpx.Response:
        """Ask the session API as the product does."""
        info = self.stack.info
        answer = httpx.request(
            method, f"{info['orchestrator_url']}{path}", json=body or None, timeout=30,
            headers={"authorization": f"Bearer {info['service_key']}"},
        )  # fmt: skip
        answer.raise_for_status()
        return answer

    def url(self, session_id: str, name: str = "tls") -> str:
        """The address that lets a browser in, at one of the doors."""
        url = urlsplit(self.api("POST", f"/v1/sessions/{session_id}/door").json()["url"])
        label = url.netloc.partition(".")[0]
        where = f"https://{label}.preview.test:{self.tls}" if name == "tls" else (
            f"http://{label}.preview.localhost:{self.ports[name]}"
        )  # fmt: skip
        return f"{where}{url.path}?{url.query}"

    def inside(self, url: str) -> str:
        """The product's page with this address in a frame."""
        return f"https://app.product.test:{self.tls}/?u={url}"


@pytest.fixture(scope="module")
def doors(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    if (why := missing()) is not None:
        pytest.skip(why)
    if shutil.which("nginx") is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    place = tmp_path_factory.mktemp("doors")
    doors = Doors(stack, place)
    cert, key = certificate(place)
    product = PRODUCT.format(port=doors.tls, cert=cert, key=key)
    # Vite answers only hosts that it is told of; `serve` tells it the door's own by itself.
    doors.api("PUT", f"/v1/projects/{stack.info['project_id']}/run", allowed_hosts=[".preview.test"])
    command = nginx(place, doors.tls, doors.ports["tls"], more=product)
    with (place / "nginx.log").open("w") as log:
        front = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for name in ("tls", "plain"):
            doors.start(name)
        yield doors
    finally:
        for process in (front, *doors.processes.values()):
            process.terminate()
            process.wait()


def words(stack: Stack, text: str) -> None:
    """Have the page show `text`."""
    stack.save("src/App.tsx", f"export default function App() {{ return <p data-word>{text}</p> }}\n"
               f"export {{ App }}\n")  # fmt: skip


def shows(text: str) -> str:
    return f"document.querySelector('[data-word]')?.textContent === '{text}'"


WAITING = "document.title === 'Starting your preview'"
NOT_OPEN = "document.querySelector('[role=alert]')?.textContent.includes('not open to you')"


@pytest.mark.parametrize("framed", [False, True], ids=["in a tab", "inside another site"])
def test_a_start_and_a_wake_are_seen_to_their_end_and_access_to_its(
    browser: Browser, doors: Doors, framed: bool
) -> None:
    stack = doors.stack
    words(stack, "first")
    made = doors.api("POST", "/v1/sessions", project_id=stack.info["project_id"]).json()
    session = made["session_id"]

    def open_it() -> None:
        url = doors.url(session)
        browser.do("open", url=doors.inside(url) if framed else url)

    open_it()
    browser.do("wait", code=WAITING, inner=framed)
    said = browser.run("document.querySelector('[role=status]').textContent", inner=framed)
    assert said
    # It becomes the preview by itself.
    browser.do("wait", code=shows("first"), inner=framed, seconds=120)
    assert "code=" not in browser.run("location.href", inner=framed)
    browser.run("void (window.kept = true)", inner=framed)
    words(stack, "second")
    browser.do("wait", code=f"window.kept && {shows('second')}", inner=framed)

    # It sleeps when nobody looks, and wakes for whoever opens it.
    browser.do("close")
    assert doors.api("POST", f"/v1/sessions/{session}/suspend").json()["state"] == "suspended"
    words(stack, "while it slept")
    open_it()
    browser.do("wait", code=shows("while it slept"), inner=framed, seconds=60)
    waited = [each for each in browser.do("seen")["refused"] if each.startswith("503 ")]
    assert waited, "the page that waits was there first"
    browser.run("void (window.kept = true)", inner=framed)
    words(stack, "awake")
    browser.do("wait", code=f"window.kept && {shows('awake')}", inner=framed)

    # The door's cookie is nothing that the page's scripts see.
    assert "preview" not in browser.run("document.cookie", inner=framed)
    doors.api("POST", f"/v1/sessions/{session}/door/revoke")
    begun = time.monotonic()
    refused = "fetch('/src/App.tsx?t=' + Math.random()).then((answer) => answer.status === 401)"
    browser.do("wait", code=refused, inner=framed, seconds=5)
    print(f"refused after {time.monotonic() - begun:.2f} s")
    browser.run("void setTimeout(() => location.reload())", inner=framed)
    browser.do("wait", code=NOT_OPEN, inner=framed)
    doors.api("DELETE", f"/v1/sessions/{session}")


def comes_back(browser: Browser, doors: Doors, restarts: int, open_seconds: float) -> None:
    """One page while its door is started anew, its socket open for so long in between."""
    stack = doors.stack
    words(stack, "before")
    browser.do("open", url=doors.url(stack.info["session_id"]))
    browser.do("wait", code=shows("before"))
    for n in range(restarts):
        browser.run("void (window.kept = true)")
        doors.stop("tls")
        words(stack, f"after {n}")
        doors.start("tls")
        browser.do("wait", code=shows(f"after {n}"))
        # And hot updates pass again, with nothing loaded anew.
        browser.do("wait", code="!window.kept")
        browser.run("void (window.again = true)")
        until_then = time.monotonic() + open_seconds
        while time.monotonic() < until_then:
            assert browser.run("window.again === true"), "the page was loaded anew though nothing happened"
            time.sleep(min(5.0, open_seconds))
        words(stack, f"hot {n}")
        browser.do("wait", code=f"window.again && {shows(f'hot {n}')}")


def test_a_page_comes_back_by_itself_when_its_door_does(browser: Browser, doors: Doors) -> None:
    comes_back(browser, doors, 2, 0)


@pytest.mark.nightly
def test_a_page_comes_back_over_half_an_hour_of_restarts(browser: Browser, doors: Doors) -> None:
    """DOOR_MINUTES of it: half an hour is above every time after which something on the way forgets a silent socket."""
    comes_back(browser, doors, 5, float(os.environ.get("DOOR_MINUTES", "30")) * 60 / 5)


def test_a_browser_that_blocks_the_cookie_is_told_and_has_a_way(browser: Browser, doors: Doors) -> None:
    stack = doors.stack
    words(stack, "shown")
    url = doors.url(stack.info["session_id"], "plain")
    browser.do("open", url=doors.inside(url))
    browser.do("wait", code="document.title === 'Cookies are blocked'", inner=True)
    link = browser.run("document.querySelector('a').href", inner=True)
    browser.do("open", "other", url=link)
    browser.do("wait", "other", code=shows("shown"))


def test_a_stranger_sees_that_it_is_not_open(browser: Browser, doors: Doors) -> None:
    url = urlsplit(doors.url(doors.stack.info["session_id"]))
    browser.do("open", url=f"{url.scheme}://{url.netloc}/")
    browser.do("wait", code=NOT_OPEN)
