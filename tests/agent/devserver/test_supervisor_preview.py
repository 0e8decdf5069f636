"""What the supervisor previews as the project changes, and what it says where it previews nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from uuid import UUID

import httpx
import pytest

from agent.config import Settings
from agent.core.model import RelPath
from agent.devserver import forward
from agent.devserver.state import Phase
from agent.devserver.supervisor import Supervisor
from tests.agent.devserver.test_supervisor_faults import QUICK
from tests.agent.processes import until
from tests.ports import free_port

ECHO = """
import http.server, os, sys
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.wfile.write(" ".join([os.environ.get("WORD", ""), os.path.basename(os.getcwd()), *sys.argv[1:]]).encode())
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Answers).serve_forever()
"""
"""A server that says where it runs, and with what."""


def app(script: str = "{server}", **package: object) -> dict[str, str]:
    """The files of an app that runs it."""
    scripts = {"dev": script.format(server=f"{sys.executable} s.py")}
    return {"package.json": json.dumps({"scripts": scripts, **package}), "s.py": ECHO}


class Preview:
    """A project and its supervisor."""

    def __init__(self, directory: Path, environ: Mapping[str, str], **settings: object) -> None:
        self.directory = directory / "project"
        self.directory.mkdir(parents=True)
        given: dict[str, object] = {"project_id": UUID(int=1), "session_id": UUID(int=1), **settings}
        self.supervisor = Supervisor(
            Settings(
                project_dir=self.directory, dev_host="127.0.0.1", dev_port=free_port(), dev_stop_seconds=0.3, **given
            ),  # type: ignore[arg-type]
            environ=environ, policy=QUICK, chance=lambda: 0.5,
        )  # fmt: skip

    def save(self, files: Mapping[str, str | None]) -> None:
        """As the sync does: written, then told. None deletes."""
        for path, content in files.items():
            place = self.directory / path
            if content is None:
                place.unlink()
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(content)
        self.supervisor.files_changed({RelPath(path) for path in files})

    async def serves(self, text: str) -> None:
        async def served() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                async with httpx.AsyncClient(base_url=self.supervisor.url) as http:
                    return (await http.get("/")).text == text
            return False

        async with asyncio.timeout(30):
            while not await served():
                await asyncio.sleep(0.02)

    @property
    def kinds(self) -> list[str]:
        return [problem.kind for problem in self.supervisor.problems()]


@contextlib.asynccontextmanager
async def previewed(
    tmp_path: Path, files: Mapping[str, str], environ: Mapping[str, str] | None = None, **settings: object
) -> AsyncIterator[Preview]:
    preview = Preview(tmp_path, environ or os.environ, **settings)
    preview.save(files)
    task = asyncio.create_task(preview.supervisor.run(), name="supervisor")
    preview.supervisor.project_ready()
    try:
        yield preview
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize(
    "files",
    [
        {"README.md": "hello"},
        {"package.json": '{"scripts": {"serve": "vite"}}'},
        {"a/package.json": '{"scripts": {"dev": "x"}}', "b/package.json": '{"scripts": {"dev": "x"}}'},
    ],
)
async def test_nothing_to_serve_is_a_problem_until_there_is_something(
    tmp_path: Path, files: dict[str, str]
) -> None:
    async with previewed(tmp_path, files) as preview:
        await until(lambda: preview.kinds == ["nothing_to_serve"])
        assert preview.supervisor.state is Phase.ABSENT
        preview.save({f"web/{path}": content for path, content in app(dependencies={}).items()})
        if "a/package.json" in files:
            preview.save({"a/package.json": None})
        await preview.serves(" web")
        await until(lambda: preview.supervisor.ready)
        assert preview.kinds == []


async def test_the_sentence_for_another_kind_of_project_makes_it_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in Python that knows nothing of PORT, as people write them."""
    monkeypatch.setattr(forward, "SETTLED_SECONDS", 0.1)
    monkeypatch.setattr(forward, "READ_EVERY", 0.1)
    elsewhere = ECHO.replace('int(os.environ["PORT"])', str(free_port()))
    files = {"app.py": elsewhere, "templates/index.html": "<p>{{ name }}"}
    async with previewed(tmp_path / "without", files) as preview:
        await until(lambda: preview.kinds == ["nothing_to_serve"])
        (said,) = preview.supervisor.problems()
    command = re.search(r"such as '([^']+)'", said.detail)
    assert command is not None
    async with previewed(tmp_path / "with", files, dev_command=tuple(command[1].split())) as preview:
        await preview.serves(" project")
        assert preview.kinds == []


@pytest.mark.parametrize("script", ["{server} & exit", "(setsid {server} &); true", "true"])
async def test_a_script_that_forks_away_is_told_to_stay(tmp_path: Path, script: str) -> None:
    async with previewed(tmp_path, app(script)) as preview:
        await until(lambda: preview.supervisor.state is Phase.FAILED)
        (said,) = preview.supervisor.problems()
        assert said.detail.startswith("the command ended by itself")
        assert '"&"' in said.detail
        preview.save(app("{server} & wait"))
        await preview.serves(" project")


async def test_a_command_that_is_not_in_the_image_is_named(tmp_path: Path) -> None:
    async with previewed(tmp_path, {"go.mod": ""}, dev_command=("no-such-go", "run", ".")) as preview:
        await until(lambda: preview.supervisor.state is Phase.FAILED)
        (said,) = preview.supervisor.problems()
    assert "no-such-go" in said.detail


async def test_a_changed_script_restarts_the_server_and_a_changed_version_of_nothing_does_not(
    tmp_path: Path,
) -> None:
    async with previewed(tmp_path, app("WORD=one {server}")) as preview:
        await preview.serves("one project")
        preview.save(app("WORD=two {server}"))
        await preview.serves("two project")
        assert preview.supervisor.restarts == 1
        preview.save(app("WORD=two {server}", description="x"))
        preview.save(app("WORD=three {server}"))
        await preview.serves("three project")
        assert preview.supervisor.restarts == 2


async def test_a_project_that_moves_into_a_directory_is_started_there(tmp_path: Path) -> None:
    files = app("WORD=x {server}")
    async with previewed(tmp_path, files) as preview:
        await preview.serves("x project")
        preview.save(dict.fromkeys(files) | {f"web/{path}": text for path, text in files.items()})
        await preview.serves("x web")
        report = preview.supervisor.report()["preview"]
        assert isinstance(report, dict)
        assert (report["directory"], preview.supervisor.restarts) == ("web", 1)
        assert preview.kinds == []


async def test_a_changed_script_before_it_restarts_it_too(tmp_path: Path) -> None:
    files = app()
    package = json.loads(files["package.json"])
    async with previewed(tmp_path, files) as preview:
        await preview.serves(" project")
        package["scripts"]["predev"] = "touch made"
        preview.save({"package.json": json.dumps(package)})
        await until((preview.directory / "made").exists)
        await preview.serves(" project")


async def test_dev_root_is_where_it_runs(tmp_path: Path) -> None:
    files = {f"{place}/{path}": text for place in ("web", "other") for path, text in app().items()}
    async with previewed(tmp_path, files, dev_root="other") as preview:
        await preview.serves(" other")
        preview.save({path: None for path in files if path.startswith("other/")})
        await until(lambda: preview.kinds == ["nothing_to_serve"])
        assert "DEV_ROOT" in preview.supervisor.problems()[0].detail


async def test_a_project_that_is_gone_when_it_is_to_start_ends_nothing(tmp_path: Path) -> None:
    package = tmp_path / "project/package.json"
    install = ("sh", "-c", f"mkdir node_modules; rm -f {package}")
    async with previewed(tmp_path, app(dependencies={"x": "1"}), install_command=install) as preview:
        await until(
            lambda: preview.kinds[:1] == ["nothing_to_serve"] and preview.supervisor.state is Phase.FAILED
        )
        preview.save(app())
        await preview.serves(" project")


async def test_a_watcher_that_ends_with_its_standard_input_goes_on(tmp_path: Path) -> None:
    """As Tailwind's and esbuild's do, so as not to outlive who started them."""
    async with previewed(tmp_path, app("{server} & cat >/dev/null; touch ended")) as preview:
        await preview.serves(" project")
        assert not (preview.directory / "ended").exists()


@pytest.mark.parametrize(
    "name", ["certs/dev.pem", "schema.graphql", "content/post.md", "prisma/schema.prisma"]
)
async def test_saving_the_file_that_was_missing_starts_a_failed_server(tmp_path: Path, name: str) -> None:
    async with previewed(tmp_path, app(f"cat {name} && {{server}}")) as preview:
        await until(lambda: preview.supervisor.state is Phase.FAILED)
        preview.save({name: "x"})
        await preview.serves(" project")


@pytest.mark.parametrize("node", [None, "echo v18.20.4"])
async def test_no_node_or_one_that_is_too_old_is_said_where_it_matters(
    tmp_path: Path, node: str | None
) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "mkdir", "rm", "uname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or "")
    if node:
        (tmp_path / "bin/node").write_text(f"#!/bin/sh\n{node}\n[ $1 = --version ]\n")
        (tmp_path / "bin/node").chmod(0o755)
    files = {"package.json": json.dumps({"scripts": {"dev": "node s.js x"}, "engines": {"node": ">=22"}})}
    async with previewed(tmp_path, files, {"PATH": str(tmp_path / "bin")}) as preview:
        await until(lambda: preview.supervisor.state is Phase.FAILED)
        (problem,) = preview.supervisor.problems()
        said = problem.detail.splitlines()[0]
        if node is None:
            assert said.startswith("Node cannot be run here: use an image with Node and npm")
        else:
            assert said.startswith("the project needs Node 22 or later, and v18.20.4 is here: use an image ")
