"""The frameworks that people use, each really installed and started by an agent that follows a project."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from agent.devserver.sandbox import FOR_INSTALLS
from tests.frameworks.app import ADDED, App, read_all
from tests.ports import free_port
from tests.system.plane import Agent, Project, eventually, running_plane

INSTALL_SECONDS = 300.0
"""For an install from an empty cache and the first page. The largest of them, Expo, takes 40 s on two quiet cores."""
SEEN_SECONDS = 60.0
"""For what takes a dev server milliseconds, or a restart."""
PASSED_ON = {
    name: os.environ[name] for name in ("HOME", "NODE_EXTRA_CA_CERTS", *FOR_INSTALLS) if name in os.environ
}
"""What npm needs of this machine."""
ELSEWHERE = frozenset({"preview_unobserved"})
"""A problem of every server that is not Vite, which hides nothing here."""

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.skipif(shutil.which("npm") is None, reason="needs Node and npm"),
]


@pytest.fixture(scope="session")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODULES_DIR of all the agents: a package manager is fetched once."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def seen(request: pytest.FixtureRequest) -> Iterator[dict[str, object]]:
    """What was seen of an app, kept in the file FRAMEWORKS_RESULTS for the table in the docs."""
    found: dict[str, object] = {}
    yield found
    if place := os.environ.get("FRAMEWORKS_RESULTS"):
        kept = json.loads(Path(place).read_text()) if Path(place).exists() else {}
        kept[request.node.callspec.id] = found
        Path(place).write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


class Browser:
    """What somebody sees who asks the dev server."""

    def __init__(self, app: App, agent: Agent, port: int) -> None:
        self._agent = agent
        insecure = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        insecure.check_hostname, insecure.verify_mode = False, ssl.CERT_NONE  # it signed for itself
        self._http = httpx.AsyncClient(
            base_url=f"{app.scheme}://localhost:{port}", verify=insecure, trust_env=False, timeout=30,
            follow_redirects=True,
        )  # fmt: skip

    async def get(self, url: str) -> tuple[int, str]:
        """Status and text of an answer; 0 while there is none."""
        accept = "text/html" if "." not in url.rpartition("/")[2] else "*/*"
        try:
            answer = await self._http.get(url, headers={"Accept": accept})
        except httpx.HTTPError:
            return 0, ""
        return answer.status_code, answer.text

    async def shows(self, url: str, text: str, seconds: float = SEEN_SECONDS) -> float:
        """Wait until `url` has `text`. Returns the seconds it took."""
        what = f"{url} has {text!r}"
        return await self._eventually(what, url, lambda code, page: code == 200 and text in page, seconds)

    async def shows_no(self, url: str, text: str) -> float:
        """Wait until `url` answers, and has no `text`."""
        return await self._eventually(
            f"{url} has no {text!r}", url, lambda code, page: code > 0 and text not in page
        )

    async def _eventually(
        self, what: str, url: str, true: Callable[[int, str], bool], seconds: float = SEEN_SECONDS
    ) -> float:
        began = time.monotonic()
        last: tuple[int, str] = (0, "")

        async def seen() -> bool:
            nonlocal last
            assert self._agent.process is not None
            assert self._agent.process.poll() is None, self._agent.log()[-3000:]
            last = await self.get(url)
            await asyncio.sleep(0.05)
            return true(*last)

        try:
            await eventually(what, seen, seconds)
        except AssertionError as error:
            report = await self._agent.status() or {}
            dev = report.get("dev_server") or {}
            told = {name: dev.get(name) for name in ("state", "reason", "detail", "preview")}
            said = "\n".join(dev.get("log", [])[-25:])
            raise AssertionError(
                f"{error}; it answers {last[0]} {last[1][:300]!r}\n{told}\n{report.get('problems')}\n{said}"
            ) from None
        return time.monotonic() - began

    async def close(self) -> None:
        await self._http.aclose()


def parameters() -> list[object]:
    return [
        pytest.param(app, id=app.name, marks=[pytest.mark.nightly] if app.nightly else [])
        for app in read_all()
    ]


@pytest.mark.parametrize("app", parameters())
async def test_it_is_installed_started_and_follows_every_change(
    app: App, database: str, tmp_path: Path, modules: Path, seen: dict[str, object]
) -> None:
    port = free_port()
    anywhere = "::" if socket.has_dualstack_ipv6() else "127.0.0.1"
    environ = {
        "DEV_PORT": str(port),
        "DEV_HOST": anywhere,
        "MODULES_DIR": str(modules),
        **PASSED_ON,
    }
    async with running_plane(database, tmp_path) as plane:
        project = await plane.project(app.files)
        agent = await project.session(tmp_path / "machine", **environ, **app.environ)
        agent.start()
        browser = Browser(app, agent, port)
        try:
            seen["served"] = round(await browser.shows(app.save.url, "One", INSTALL_SECONDS), 1)
            await follows(app, project, agent, browser, seen)
        finally:
            await browser.close()
            await agent.stop()


async def follows(
    app: App, project: Project, agent: Agent, browser: Browser, seen: dict[str, object]
) -> None:
    """What is saved, deleted, added, broken and mended is seen."""
    report = await agent.status()
    assert report is not None
    preview = report["dev_server"]["preview"]
    assert (preview["server"], preview["directory"]) == (app.server, app.directory)
    seen["flags"] = True
    assert (await browser.get(app.page))[0] == 200

    await project.save(app.save.path, app.files[app.save.path].replace("One", "Two"))
    seen["save"] = round(await browser.shows(app.save.url, "Two"), 2)
    if app.delete:
        await browser.shows(app.delete.url, "Gone")
        await project.delete(app.delete.path)
        seen["delete"] = round(await browser.shows_no(app.delete.url, "Gone"), 2)
    if app.manifest:
        await project.save(app.manifest, app.with_dependency)
        installed = [
            agent.tree,
            *(p for p in (agent.tree / app.manifest).parents if p.is_relative_to(agent.tree)),
        ]
        await eventually(
            "the dependency is installed",
            lambda: asyncio.to_thread(lambda: any((p / "node_modules" / ADDED).exists() for p in installed)),
            INSTALL_SECONDS,
        )
        seen["dependency"] = round(await browser.shows(app.save.url, "Two", INSTALL_SECONDS), 1)
    if app.config:
        good = app.with_dependency if app.config == app.manifest else app.files[app.config]
        await project.save(app.config, good + "\n{{ this is no configuration")
        broken = (agent.tree / app.config).read_text
        await eventually("the configuration is broken", lambda: asyncio.to_thread(lambda: "{{" in broken()))
        await browser.get(app.page)
        await project.save(app.config, good)
        await browser.shows(app.save.url, "Two", INSTALL_SECONDS)
    await project.save(app.save.path, app.files[app.save.path].replace("One", "Three"))
    seen["mended"] = round(await browser.shows(app.save.url, "Three", INSTALL_SECONDS), 2)

    async def well() -> bool:
        now = await agent.status()
        return now is not None and now["ready"] and {each["kind"] for each in now["problems"]} <= ELSEWHERE

    await eventually(f"no problem is left: {await agent.status()}", well, SEEN_SECONDS)
    seen["ready"] = True
