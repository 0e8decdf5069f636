"""A change of the run settings reaches a preview that runs: its dev server starts again with it, its machine stays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.system.stack import Stack, until
from tests.trees import contents_below

pytestmark = pytest.mark.system

SERVER = """
const http = require('http')
console.log('the greeting is ' + process.env.GREETING)
http.createServer((request, response) => {
  response.setHeader('content-type', 'text/html')
  response.end('<p>' + (request.url === '/greeting' ? process.env.GREETING : process.cwd()) + '</p>')
}).listen(Number(process.env.PORT), '127.0.0.1')
"""
FIRST, SECOND = "a-greeting-that-is-secret", "another-that-is-secret-too"


@pytest.fixture
def project(idle_stack: Stack, tmp_path: Path) -> Stack:
    """A running stack whose project is a server that says what its environment says."""
    directory = tmp_path / "plain"
    for place in (directory, directory / "apps" / "other"):
        place.mkdir(parents=True)
        (place / "package.json").write_text(json.dumps({"scripts": {"dev": "node server.cjs"}}))
        (place / "server.cjs").write_text(SERVER)
    idle_stack.project = directory
    return idle_stack.start()


def api(stack: Stack, method: str, path: str, body: object = None) -> Any:
    headers = {"authorization": f"Bearer {stack.info['service_key']}"}
    answer = httpx.request(
        method, f"{stack.info['orchestrator_url']}{path}", json=body, headers=headers, timeout=20
    )
    answer.raise_for_status()
    return answer.json()


def change(stack: Stack, **settings: object) -> Any:
    """Change the run settings. A save has the agent's next heartbeat go out at once: its answer tells of the change."""
    shown = api(stack, "PUT", f"/v1/projects/{stack.info['project_id']}/run", settings)
    stack.save("note.txt", json.dumps(settings))
    return shown


def served(stack: Stack, path: str, text: str) -> bool:
    try:
        return text in httpx.get(f"{stack.info['preview_url']}{path}", timeout=5).text
    except httpx.HTTPError:
        return False


def test_a_change_restarts_the_dev_server_and_not_the_machine(project: Stack) -> None:
    session = f"/v1/sessions/{project.info['session_id']}"
    machine, agent = api(project, "GET", session)["machine"], project.info["agent_pid"]
    before = project.status()["dev_server"]["pid"]

    change(project, env={"GREETING": FIRST})
    until("the first value is served", lambda: served(project, "/greeting", FIRST), 60)
    assert project.status()["dev_server"]["pid"] != before

    shown = change(project, env={"GREETING": SECOND})
    until("the second value is served", lambda: served(project, "/greeting", SECOND), 60)
    assert project.status()["run_revision"] == shown["run_revision"] == 2

    change(project, root="apps/other")
    until("another directory is served", lambda: served(project, "/", "/project/apps/other"), 60)
    assert served(project, "/greeting", SECOND)
    change(project, root=None)
    until("the first directory again", lambda: served(project, "/", "/project</p>"), 60)

    assert api(project, "GET", session)["machine"] == machine
    assert project.status()["state"] == "serving"
    assert project.info["agent_pid"] == agent
    # The server prints its value: it is in no status and no log.
    assert "the greeting is [redacted]" in json.dumps(project.status())
    kept = contents_below(project.state, but=("postgres",))
    for secret in (FIRST, SECOND):
        assert secret not in json.dumps(project.status())
        assert secret not in project.log()
        assert [path for path, content in kept.items() if secret.encode() in content] == []


def test_a_new_machine_starts_with_them(project: Stack) -> None:
    run = f"/v1/projects/{project.info['project_id']}/run"
    api(project, "PUT", run, {"env": {"GREETING": FIRST}, "root": "apps/other"})
    project.interrupt()
    project.start()
    until("the value is served", lambda: served(project, "/greeting", FIRST), 60)
    assert served(project, "/", "/project/apps/other")
    assert project.status()["dev_server"]["restarts"] == 0
