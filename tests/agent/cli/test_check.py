"""`preview-agent check` on machines that are well and that are not."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import pytest
import websockets

from agent.cli.check import check
from tests.ports import free_port


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
    for secret in (environ.get("REALTIME_TOKEN") or "-" * 9, "abcdefghijk", "publishable-key-of-the-test"):
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
    assert told["preview"] == "ok: nothing there yet"
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
    assert told["DEV_PORT"].startswith(f"warn: 127.0.0.1:{port} is in use: by an agent that runs?")
    assert "expired 9" in told["token"]


async def test_a_project_is_told_with_what_would_start_it(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "package.json").write_text('{"scripts": {"predev": "x", "dev": "vite --mode a"}}')
    _, told = await asked(environment(tmp_path))
    assert told["preview"] == "ok: .: Vite; package.json is at the top"
    assert told["command"] == "ok: npm run dev: vite --mode a"
    (project / "package.json").write_text("{")
    _, told = await asked(environment(tmp_path))
    assert told["preview"].startswith("warn: cannot read package.json")


async def test_what_a_start_would_preview_and_what_is_missing_for_it_is_told(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("apps/site", "apps/docs"):
        (project / name).mkdir(parents=True)
        package = {
            "scripts": {"dev": "astro dev"}, "dependencies": {"astro": "7"}, "engines": {"node": ">=98"},
            "packageManager": "pnpm@9.0.1",
        }  # fmt: skip
        (project / name / "package.json").write_text(json.dumps(package))
    _, told = await asked(environment(tmp_path))
    assert told["preview"] == "ok: apps/site: Astro; of apps/docs, apps/site it has the name of a front end"
    assert told["dependencies"] == (
        "ok: pnpm@9.0.1, no lock file; node_modules will be installed; "
        "this release is not installed here: npm fetches it"
    )
    assert told["engine"].startswith("warn: the project needs Node 98 or later, and v")
    _, told = await asked(environment(tmp_path, DEV_ROOT="apps/docs"))
    assert told["preview"] == "ok: apps/docs: Astro; DEV_ROOT names it"
    _, told = await asked(environment(tmp_path, DEV_ROOT="apps/none"))
    assert told["preview"].startswith(
        "warn: DEV_ROOT is 'apps/none', and the project has no such directory; "
    )
    _, told = await asked(environment(tmp_path, DEV_COMMAND="python3 -m http.server"))
    assert told["command"] == "ok: python3 -m http.server"


async def test_another_kind_of_project_is_told_what_makes_it_run(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    _, told = await asked(environment(tmp_path))
    assert told["preview"].startswith(
        "warn: there is no package.json and no index.html in the project; add a "
    )
    (project / "go.mod").touch()
    _, told = await asked(environment(tmp_path))
    assert "set DEV_COMMAND (dev_command of the run settings)" in told["preview"]
    assert "such as 'go run .'" in told["preview"]
    _, told = await asked(environment(tmp_path, DEV_COMMAND="no-such-go run ."))
    assert told["command"] == "warn: there is no program 'no-such-go' here; use an image that has it"
    (project / "serve").write_text("#!/bin/sh\n")
    (project / "serve").chmod(0o755)
    _, told = await asked(environment(tmp_path, DEV_COMMAND="./serve"))
    assert told["command"] == "ok: ./serve"


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
    assert {"DEV_PORT", "MODULES_DIR", "node", "preview", "isolation"}.isdisjoint(told)
    assert list(tmp_path.iterdir()) == [live]


async def test_a_storage_and_a_realtime_server_that_refuse(tmp_path: Path) -> None:
    def plain(connection: websockets.ServerConnection, request: websockets.Request) -> websockets.Response:
        return connection.respond(403, "no\x1b[31m such key\n")

    async with websockets.serve(
        lambda socket: socket.wait_closed(), "127.0.0.1", 0, process_request=plain
    ) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        given = environment(
            tmp_path, REALTIME_URL=f"ws://127.0.0.1:{port}/realtime/v1",
            SNAPSHOT_URL=f"http://127.0.0.1:{port}/a.zip?token=abcdefghijk", SESSION_API_URL="",
        )  # fmt: skip
        code, told = await asked(given)
    assert code == 1
    assert told["snapshot"].startswith(f"fail: 127.0.0.1:{port} answers 403: the signed URL has expired")
    assert "start a new session" in told["snapshot"]
    assert told["realtime"] == f"fail: 127.0.0.1:{port} answers 403 (no such key); check REALTIME_API_KEY"


async def test_a_name_without_an_address_and_a_certificate_of_nobodys(tmp_path: Path) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=x", "-days", "1"]
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    await asyncio.to_thread(
        subprocess.run, [*command, "-keyout", key, "-out", certificate], check=True, capture_output=True
    )
    context.load_cert_chain(certificate, key)
    async with websockets.serve(lambda socket: socket.wait_closed(), "127.0.0.1", 0, ssl=context) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        _, told = await asked(
            environment(
                tmp_path, REALTIME_URL="wss://nobody.invalid/realtime/v1", SESSION_API_URL=f"https://127.0.0.1:{port}"
            )
        )  # fmt: skip
    assert told["realtime"].startswith("fail: nobody.invalid: the name has no address; check REALTIME_URL")
    assert told["session api"].startswith(f"fail: 127.0.0.1:{port}: CERTIFICATE_VERIFY_FAILED; check")


async def test_a_token_file_that_is_not_there(tmp_path: Path) -> None:
    given = environment(tmp_path, REALTIME_TOKEN="", REALTIME_TOKEN_FILE=str(tmp_path / "token"))
    code, told = await asked(given)
    assert code == 64
    assert told["token"] == f"fail: REALTIME_TOKEN_FILE: {tmp_path / 'token'}: No such file or directory"
    (tmp_path / "token").write_text(jwt(600) + "\n")
    _, told = await asked(given)
    assert told["token"].startswith("ok: role preview_agent")


async def test_no_node_an_old_one_and_one_that_the_projects_user_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    _, told = await asked(environment(tmp_path))
    assert told["node"] == "fail: not found on PATH; the image needs Node 20.19 or later, with npm"
    node = tools / "node"
    node.write_text("#!/bin/sh\necho v18.20.4\n")
    node.chmod(0o755)
    _, told = await asked(environment(tmp_path))
    assert told["node"] == "warn: v18.20.4, run by the agent; Vite needs Node 20.19 or later"
    assert told["npm"].startswith("warn: not found on PATH")
    if os.geteuid() == 0:
        node.chmod(0o700)
        _, told = await asked(environment(tmp_path, DEV_USER="nobody"))
        assert told["node"].startswith("fail: cannot be run by nobody: cannot run node: ")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
async def test_directories_and_capabilities_that_are_wrong(tmp_path: Path) -> None:
    """As in a container whose engine was told to drop everything, with a project of somebody else's."""
    (tmp_path / "project").mkdir()
    os.chown(tmp_path / "project", 12_345, 12_345)
    given = environment(tmp_path, DEV_USER="nobody", STATE_DIR="/proc/nowhere")
    done = await asyncio.create_subprocess_exec(
        "setpriv", "--bounding-set", "-setuid,-kill", sys.executable, "-m", "agent", "check",
        env=given, cwd=Path(__file__).parents[3], stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    said = (await done.communicate())[0].decode()
    assert done.returncode == 71
    assert "fail  STATE_DIR     uid 0 cannot write in /proc (" in said
    assert "); make it writable, or set STATE_DIR to another place" in said
    assert "fail  isolation     root without KILL, SETUID: give the container these capabilities" in said
    assert "cannot install there: chown nobody " in said


async def test_one_port_for_two_servers(tmp_path: Path) -> None:
    code, told = await asked(environment(tmp_path, DEV_PORT="9464", HEALTH_PORT="9464"))
    assert (code, told["settings"]) == (64, "fail: HEALTH_PORT: is DEV_PORT too; give each a port of its own")
