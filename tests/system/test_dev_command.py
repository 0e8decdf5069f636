"""`preview-orchestrator dev` as a person uses it: what it says when it cannot start, what it leaves when it stops."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchestrator_stub.devstack.terminal import DevOptions
from orchestrator_stub.machines.local import LocalMachines
from tests.orchestrator.machines.driver_contract import ANOTHER, spec_for
from tests.system.stack import REPOSITORY, Stack, copy_example, until

pytestmark = pytest.mark.system


def dev(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "orchestrator_stub", "dev", *arguments],
        cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def assert_one_clear_line(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr + ended.stdout
    said = [line for line in ended.stderr.splitlines() if line.startswith("preview-orchestrator: ")]
    assert len(said) == 1, ended.stderr
    for word in words:
        assert word in said[0]


def test_a_directory_without_package_json_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    state = tmp_path / "state"
    assert_one_clear_line(dev(str(tmp_path / "app"), "--port", "0", "--state", str(state)), "package.json")
    assert_one_clear_line(dev(str(tmp_path / "nowhere"), "--port", "0", "--state", str(state)), "nowhere")
    assert not Stack(tmp_path, state).processes()


STATE_AND_PROJECT = {
    "inside": ("app", "app/state"),
    "deep inside": ("app", "app/src/x/state"),
    "the same": ("app", "app"),
    "the same, said otherwise": ("app", "app/src/.."),
    "inside, by a link": ("app", "link/state"),
    "inside, of a project by a link": ("link", "app/state"),
    "inside, as a link": ("app", "linked-state"),
    "inside, behind a default name that leads elsewhere": ("app", "app/.preview-sync"),
    "around it": ("around/app", "around"),
    "around it, far": ("around/deep/er/app", "around"),
    "around it, by a link": ("link-to-inner", "around"),
}


@pytest.mark.parametrize("case", STATE_AND_PROJECT)
def test_a_state_among_the_project_s_files_is_one_clear_line(tmp_path: Path, case: str) -> None:
    """Its keys and its database would be files of the project, and served."""
    app = copy_example(tmp_path / "app")
    for inner in ("around/app", "around/deep/er/app"):
        (tmp_path / inner).mkdir(parents=True)
        (tmp_path / inner / "package.json").write_text("{}")
    (tmp_path / "link").symlink_to(app)
    (tmp_path / "linked-state").symlink_to(app / "kept")
    (tmp_path / "link-to-inner").symlink_to(tmp_path / "around/deep")
    (tmp_path / "around/deep/package.json").write_text("{}")
    (app / ".preview-sync").symlink_to("public")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    project, state = (tmp_path / part for part in STATE_AND_PROJECT[case])
    assert_one_clear_line(
        dev(str(project), "--port", "0", "--state", str(state), "--once"), "--state", str(state)
    )
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before, "nothing was made"


@pytest.mark.parametrize("state", [".preview-sync", ".preview-sync/two", "node_modules/.cache/x", "../state"])
def test_a_state_that_is_no_part_of_the_project_may_lie_in_its_directory(tmp_path: Path, state: str) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app/package.json").write_text("{}")
    options = DevOptions(tmp_path / "app", tmp_path / "app" / state)
    options.check()


def test_a_taken_port_is_one_clear_line(tmp_path: Path) -> None:
    app = copy_example(tmp_path / "app")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ended = dev(str(app), "--port", port, "--state", str(tmp_path / "state"))
    assert_one_clear_line(ended, port, "--port")
    assert not Stack(app, tmp_path / "state").processes()


def test_a_node_that_is_too_old_is_one_clear_line(tmp_path: Path) -> None:
    app = copy_example(tmp_path / "app")
    old = tmp_path / "bin" / "node"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho v18.19.0\n")
    old.chmod(0o755)
    environ = {**os.environ, "PATH": f"{old.parent}:{os.environ['PATH']}"}
    ended = dev(str(app), "--port", "0", "--state", str(tmp_path / "state"), environ=environ)
    assert_one_clear_line(ended, "18.19.0", "20.19")
    assert not Stack(app, tmp_path / "state").processes()


def assert_the_user_signs_in(info: dict[str, Any], old_password: str) -> None:
    """With this start's password and not the last one's; and the token is the same user's, for both sides."""
    with httpx.Client(
        base_url=info["orchestrator_url"], headers={"apikey": info["anon_key"]}, timeout=30
    ) as http:

        def sign_in(password: str) -> httpx.Response:
            body = {"email": info["user_email"], "password": password}
            return http.post("/auth/v1/token?grant_type=password", json=body)

        assert sign_in(old_password).status_code == 400
        token = {"Authorization": f"Bearer {info['user_token']}"}
        signed_in = sign_in(info["user_password"]).json()["user"]["id"]
        assert http.get("/auth/v1/user", headers=token).json()["id"] == signed_in
        page = {**token, "Origin": "http://localhost:3000"}
        sessions = http.get(f"/v1/sessions?project_id={info['project_id']}", headers=page)
        assert (sessions.status_code, sessions.headers["access-control-allow-origin"]) == (200, "*")


def test_ctrl_c_leaves_nothing_and_the_next_start_goes_on(idle_stack: Stack, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir(mode=0o777)
    temporary.chmod(0o1777)
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(temporary)
    try:
        idle_stack.start()
        idle_stack.save("src/kept.ts", "export const said = 'kept over the night'\n")
        until("it is served", lambda: idle_stack.serves("src/kept.ts", "kept over the night"))
        port = httpx.URL(idle_stack.info["orchestrator_url"]).port
        preview = httpx.URL(idle_stack.info["preview_url"]).port
        assert idle_stack.interrupt() == 0, idle_stack.log()
        assert not idle_stack.processes()
        assert not list(temporary.iterdir())
        for each in (port, preview):
            assert each is not None
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", each)) != 0, f"{each} still listens"

        first = dict(idle_stack.info)
        idle_stack.start()
        assert_the_user_signs_in(idle_stack.info, first["user_password"])
        assert idle_stack.info["project_id"] == first["project_id"]
        until("it is served again", lambda: idle_stack.serves("src/kept.ts", "kept over the night"))

        again = dev(str(idle_stack.project), "--port", "0", "--state", str(idle_stack.state))
        assert_one_clear_line(again, "another dev", "--state")
        assert idle_stack.interrupt() == 0
        assert not idle_stack.processes()
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


async def test_once_edits_measures_and_stops(tmp_path: Path) -> None:
    """And leaves alone an orchestrator's machines, in the directory that is the default of both."""
    app, state = copy_example(tmp_path / "app"), tmp_path / "state"
    files = {path: path.read_bytes() for path in app.rglob("*") if path.is_file()}
    command = (sys.executable, "-c", "import time; time.sleep(600)")
    others = LocalMachines(state / "machines", environment={}, command=command)
    other = await others.create(spec_for(of=ANOTHER))
    try:
        ended = await asyncio.to_thread(dev, str(app), "--port", "0", "--state", str(state), "--once")
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert "save to served" in ended.stdout
        assert {path: path.read_bytes() for path in app.rglob("*") if path.is_file()} == files
        assert (await others.inspect(other.id)) == other
        assert len(Stack(app, state).processes()) == 1
    finally:
        await others.destroy(other.id)
        await others.close()
    assert not Stack(app, state).processes()
