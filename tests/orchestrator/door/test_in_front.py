"""The door behind what ends TLS: nginx and Caddy, with the configurations of docs/door.md but for their addresses."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.orchestrator.door.test_refused import UPGRADE
from tests.orchestrator.door.world import World, body, fields, status, within
from tests.ports import free_port

DOCS = Path(__file__).parents[3] / "docs" / "door"


def certificate(directory: Path, domain: str = "preview.test", days: int = 2) -> tuple[Path, Path]:
    """A certificate of its own making for everything below `domain`."""
    cert, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-days", str(days),
         "-subj", f"/CN={domain}", "-addext", f"subjectAltName=DNS:*.{domain}", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


def nginx(directory: Path, port: int, door: int, domain: str = "preview.test", more: str = "") -> list[str]:
    """The command that runs nginx with the configuration of the docs."""
    cert, key = certificate(directory, domain)
    text = (DOCS / "nginx.conf").read_text()
    for before, after in (
        ("127.0.0.1:54380", f"127.0.0.1:{door}"), ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("*.preview.example.com", f"*.{domain}"),
        ("/etc/ssl/preview.example.com/fullchain.pem", str(cert)),
        ("/etc/ssl/preview.example.com/privkey.pem", str(key)),
    ):  # fmt: skip
        assert before in text
        text = text.replace(before, after)
    temporary = "".join(
        f"{name}_temp_path {directory}/{name};\n"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (directory / "nginx.conf").write_text(
        f"daemon off; pid {directory}/pid; error_log {directory}/error.log; worker_processes 1;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{temporary}{text}{more}}}\n"
    )
    return ["nginx", "-c", str(directory / "nginx.conf"), "-g", f"user {os.environ.get('USER', 'root')};"]


def caddy(directory: Path, port: int, door: int) -> list[str]:
    """The command that runs Caddy with the configuration of the docs."""
    cert, key = certificate(directory)
    text = (DOCS / "Caddyfile").read_text()
    begin, end = text.index("\ttls {"), text.index("\treverse_proxy")
    text = text[:begin] + f"\ttls {cert} {key}\n" + text[end:]
    text = text.replace("127.0.0.1:54380", f"127.0.0.1:{door}")
    text = text.replace("*.preview.example.com", f"*.preview.test:{port}")
    (directory / "Caddyfile").write_text(f"{{\n\tadmin off\n\tauto_https off\n}}\n{text}")
    return ["caddy", "run", "--config", str(directory / "Caddyfile"), "--adapter", "caddyfile"]


@asynccontextmanager
async def running(command: list[str], port: int, directory: Path) -> AsyncIterator[None]:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}: apt-get install {command[0]}")
    env = {**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory)}
    with (directory / "out.log").open("w") as log:
        process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, env=env)

    async def up() -> bool:
        assert process.returncode is None, (directory / "out.log").read_text()
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        writer.close()
        return True

    try:
        await within(f"{command[0]} listens", up, 20)
        yield
    finally:
        process.terminate()
        await process.wait()


@pytest.mark.parametrize("front", [nginx, caddy])
async def test_what_passes_passes_by_tls_too(world: World, tmp_path: Path, front: object) -> None:
    port = free_port()
    preview, other = await world.preview(), await world.preview()
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    async def connect(host: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=host)

    async def ask(request: bytes, host: str) -> bytes:
        reader, writer = await connect(host)
        writer.write(request)
        async with asyncio.timeout(10):
            answer = await reader.read()
        writer.close()
        return answer

    assert callable(front)
    async with running(front(tmp_path, port, world.port), port, tmp_path):
        # Many on one connection of the proxy's to the door, of two hosts and of a stranger.
        for _ in range(3):
            for each in (preview, other):
                assert (
                    status(await ask(await each.request("/", "GET", "Connection: close"), each.host)) == 200
                )
                stranger = await each.request("/", "GET", "Connection: close", cookie=False)
                assert status(await ask(stranger, each.host)) == 401
        code = await preview.code()
        enter = await preview.request(
            f"/.preview-door/enter?code={code}&to=/x", "GET", "Connection: close", cookie=False
        )
        assert fields(await ask(enter, preview.host), "set-cookie")[0].startswith("__Host-preview=")
        world.dev.answers["/big"] = (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"4000\r\n"
            + (b"x" * 0x4000 + b"\r\n")
            + b"0\r\n\r\n"
        )
        answer = await ask(await preview.request("/big", "GET", "Connection: close"), preview.host)
        assert body(answer).count(b"x") == 0x4000
        # A hot-update socket, with the page's origin as a browser writes it.
        reader, writer = await connect(preview.host)
        key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version: 13"
        writer.write(await preview.request("/ws", "GET", *UPGRADE, *key, f"Origin: https://{preview.host}"))
        assert status(await reader.readuntil(b"\r\n\r\n")) == 101
        writer.write(b"\x81\x02hi")
        assert await reader.readexactly(4) == b"\x81\x02hi"
        await world.access.revoke(preview.session_id)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()
        assert status(await ask(await other.request("/", "GET", "Connection: close"), other.host)) == 200
