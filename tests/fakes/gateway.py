"""What a Storage client talks to: Storage's own HTTP server, and nginx as a gateway that keeps its connections."""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.ports import free_port

NODE = Path(__file__).with_name("storage.mjs")

NGINX = """
daemon off; worker_processes 1; pid {place}/pid; error_log {place}/error.log;
events {{ }}
http {{
  access_log off; client_body_temp_path {place}/t1; proxy_temp_path {place}/t2; fastcgi_temp_path {place}/t3;
  uwsgi_temp_path {place}/t4; scgi_temp_path {place}/t5; client_max_body_size 100m;
  upstream storage {{ server 127.0.0.1:{behind}; keepalive 8; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ proxy_pass http://storage; proxy_http_version 1.1; proxy_set_header Connection ""; }}
  }}
}}
"""


@asynccontextmanager
async def node_storage() -> AsyncIterator[int]:
    """The port of a Storage that leaves the body of a refused upload unread, as the real one does."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    server = await asyncio.create_subprocess_exec("node", NODE, stdout=asyncio.subprocess.PIPE)
    assert server.stdout is not None
    try:
        async with asyncio.timeout(20):
            port = int(await server.stdout.readline())
        yield port
    finally:
        server.kill()
        await server.wait()


@asynccontextmanager
async def nginx(behind: int) -> AsyncIterator[int]:
    """The port of an nginx that keeps its connections to the server on the port `behind`."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        place.chmod(0o755)
        port = free_port()
        (place / "nginx.conf").write_text(NGINX.format(place=place, port=port, behind=behind))
        server = await asyncio.create_subprocess_exec("nginx", "-p", place, "-c", place / "nginx.conf")
        try:
            async with asyncio.timeout(20):
                while True:
                    try:
                        socket.create_connection(("127.0.0.1", port), 1).close()
                        break
                    except OSError:
                        assert server.returncode is None, (place / "error.log").read_text()
                        await asyncio.sleep(0.02)
            yield port
        finally:
            server.terminate()
            await server.wait()
