"""`preview-agent check` on machines that are well and that are not."""

from __future__ import annotations

import base64
import json
import os
import socket
import time
from pathlib import Path

import websockets

from agent.check import check
from tests.agent.processes import free_port


def jwt(expires_in: float) -> str:
    claims = {"role": "preview_agent", "exp": int(time.time() + expires_in)}
    parts = ({"alg": "HS256"}, claims)
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
    return ".".join([*encoded, "c2lnbmF0dXJl"])


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    dead = f"127.0.0.1:{free_port()}"
    given = {
        "PATH": os.environ["PATH"], "PROJECT_ID": "1" * 32, "SESSION_ID": "2" * 32, "REALTIME_TOKEN": jwt(600),
        "REALTIME_URL": f"ws://{dead}/realtime/v1", "REALTIME_API_KEY": "publishable-key-of-the-test",
        "SESSION_API_URL": f"http://{dead}", "SNAPSHOT_URL": f"http://{dead}/object/sign/a.zip?token=abcdefghijk",
        "PROJECT_DIR": str(tmp_path / "project"), "STATE_DIR": str(tmp_path / "state"),
        "DEV_PORT": str(free_port()), "HEALTH_PORT": str(free_port()),
    }  # fmt: skip
    return given | more


async def asked(environ: dict[str, str]) -> tuple[int, dict[str, str]]:
    lines: list[str] = []
    code = await check(environ, lines.append)
    assert all(len(line.splitlines()) == 1 for line in lines)
    told = "\n".join(lines)
    for secret in (environ.get("REALTIME_TOKEN", "-" * 9), "abcdefghijk", "publishable-key-of-the-test"):
        assert secret not in told
    return code, {line[6:19].strip(): line[:4].strip() + ": " + line[20:] for line in lines}


async def test_bad_settings_are_all_told_and_nothing_else_is_asked(tmp_path: Path) -> None:
    code, told = await asked({"PROJECT_DIR": str(tmp_path)})
    assert code == 64
    assert set(told) == {"settings"}


async def test_peers_that_do_not_answer_are_named(tmp_path: Path) -> None:
    code, told = await asked(environment(tmp_path))
    assert code == 69
    assert told["settings"].startswith("ok: complete")
    for subject in ("snapshot", "realtime", "session api"):
        assert told[subject].startswith("fail: 127.0.0.1:"), told[subject]
    assert told["PROJECT_DIR"] == f"ok: {tmp_path / 'project'}: will be made in {tmp_path}"
    assert "GiB" in told["disk"]
    assert told["token"].startswith("ok: role preview_agent, valid for ")
    assert told["project"] == "ok: nothing there yet"
    assert told["isolation"].startswith("warn: none: DEV_USER is not set")
    assert told["DEV_PORT"].endswith("is free")


async def test_peers_that_answer_are_well(tmp_path: Path) -> None:
    async def hello(socket: websockets.ServerConnection) -> None:
        await socket.wait_closed()

    def plain(
        connection: websockets.ServerConnection, request: websockets.Request
    ) -> websockets.Response | None:
        return None if "Upgrade" in request.headers else connection.respond(200, "zip")

    async with websockets.serve(hello, "127.0.0.1", 0, process_request=plain) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        code, told = await asked(
            environment(
                tmp_path, REALTIME_URL=f"ws://127.0.0.1:{port}/realtime/v1", SESSION_API_URL=f"http://127.0.0.1:{port}",
                SNAPSHOT_URL=f"http://127.0.0.1:{port}/a.zip?token=abcdefghijk",
            )
        )  # fmt: skip
    assert told["realtime"] == f"ok: 127.0.0.1:{port} accepts the socket"
    assert told["snapshot"] == f"ok: 127.0.0.1:{port} serves 3 bytes"
    assert told["session api"].startswith("ok:")
    assert code == 0, told


async def test_an_expired_token_and_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        _, told = await asked(
            environment(tmp_path, REALTIME_TOKEN=jwt(-90), DEV_PORT=port, DEV_HOST="127.0.0.1")
        )
    assert told["DEV_PORT"] == f"warn: 127.0.0.1:{port} is in use: an agent that runs?"
    assert "expired 9" in told["token"]


async def test_a_project_is_told_with_what_would_start_it(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "package.json").write_text('{"scripts": {"dev": "vite"}}')
    _, told = await asked(environment(tmp_path))
    assert told["project"].startswith(f"ok: {project}/node_modules/.bin/vite --host ")
    (project / "package.json").write_text("{")
    _, told = await asked(environment(tmp_path))
    assert told["project"].startswith("warn: cannot read package.json")


async def test_a_directory_that_cannot_be_made_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, told = await asked(environment(tmp_path, PROJECT_DIR=str(tmp_path / "file" / "project")))
    assert code == 71
    assert told["PROJECT_DIR"].startswith("fail: ")


async def test_a_user_that_does_not_exist(tmp_path: Path) -> None:
    code, told = await asked(environment(tmp_path, DEV_USER="nobody-of-that-name"))
    assert code == 64
    assert told["DEV_USER"].startswith("fail: ")


async def test_in_shadow_mode_the_live_directory_is_only_looked_at(tmp_path: Path) -> None:
    live = tmp_path / "project"
    given = environment(tmp_path, SYNC_MODE="shadow", DEV_USER="")
    _, told = await asked(given)
    assert told["PROJECT_DIR"].startswith("warn:"), "it is not there yet"
    live.mkdir()
    (live / "a.ts").write_text("a")
    _, told = await asked(given)
    assert told["PROJECT_DIR"] == f"ok: {live} is compared and never touched: 1 files"
    assert told["SHADOW_DIR"] == f"ok: {tmp_path / '.preview-shadow'}: will be made in {tmp_path}"
    assert {"DEV_PORT", "MODULES_DIR", "node", "project", "isolation"}.isdisjoint(told)
    assert list(tmp_path.iterdir()) == [live]
