"""Trees to pack, archives that nobody of ours writes, and a service that has layers."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import UUID

import httpx

from agent.modules import archive
from agent.modules.layers import LayerStore, given_layer
from agent.session_api import SessionApi
from agent.tokens import Tokens
from tests.fakes.realtime import jwt

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd


def tree(root: Path, files: Mapping[str, str | bytes | tuple[str]]) -> Path:
    """Make files; a tuple of one text is a link to it."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            path.symlink_to(content[0])
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


SMALL: Mapping[str, str | bytes | tuple[str]] = {
    "node_modules/a/package.json": "{}",
    "node_modules/a/cli.js": "#!/usr/bin/env node",
    "node_modules/.bin/a": ("../a/cli.js",),
    "node_modules/empty": b"",
    "packages/web/node_modules/b/index.js": "module.exports = 1",
}


def listing(root: Path) -> dict[str, tuple[str, bytes]]:
    """What is in a tree: content or target, and whether it can be run."""
    found: dict[str, tuple[str, bytes]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path).encode())
        elif path.is_file():
            found[name] = ("755" if path.stat().st_mode & 0o100 else "644", path.read_bytes())
    return found


def packed(root: Path) -> bytes:
    target = io.BytesIO()
    archive.pack(str(root), target)
    return target.getvalue()


def made_of(*entries: tarfile.TarInfo | tuple[tarfile.TarInfo, bytes], end: bytes = bytes(1024)) -> bytes:
    """A layer of any entries: what a hostile machine could upload."""
    raw = b""
    for entry in entries:
        info, content = entry if isinstance(entry, tuple) else (entry, b"")
        raw += info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)
    return zstd.compress(raw + end)


def tarball(files: Mapping[str, str]) -> bytes:
    """A package as a registry has it."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz") as archived:
        for name, content in files.items():
            info, data = entry(name, content.encode())
            archived.addfile(info, io.BytesIO(data))
    return target.getvalue()


def entry(name: str, content: bytes | None = None, /, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content or b"")
    info.mode = 0o644
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content or b""


def link(name: str, target: str) -> tuple[tarfile.TarInfo, bytes]:
    return entry(name, type=tarfile.SYMTYPE, linkname=target)


class Service:
    """Session API and storage of layers in one, over HTTP. What is put into `faults` goes wrong."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.layers: dict[str, list[dict[str, object]]] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refused: list[str] = []
        self.slow: set[str] = set()
        """Objects that come half, then wait for `release`."""
        self.behind: set[str] = set()
        """Keys that the next machine is not told of when it is made."""
        self.faults: dict[str, object] = {}
        self.release = threading.Event()

    def asked_for_layers(self) -> list[str]:
        """The keys that were asked for, but for those of what Vite bundles ahead."""
        return [key for key in self.asked if key not in self.behind]

    def keep(self, key: str, content: bytes, size: int = 2**20) -> None:
        """Have a layer, in parts."""
        parts = []
        for number, at in enumerate(range(0, len(content), size)):
            part = content[at : at + size]
            self.objects[f"/objects/{key}.{number}"] = part
            parts.append(
                {
                    "url": f"{self.url}/objects/{key}.{number}",
                    "sha256": hashlib.sha256(part).hexdigest(),
                    "size": len(part),
                }
            )
        self.layers[key] = parts

    def store(self, http: httpx.AsyncClient, given: str | None = None) -> LayerStore:
        """A session's view of it."""
        api = SessionApi(self.url, UUID(int=1), Tokens(jwt(2_000_000_000)), http)
        layer = given_layer(given, json.dumps(self.layers[given])) if given else None
        return LayerStore(api, http, layer)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    service: Service

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding"):
            raise AssertionError("an upload says its length")
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def do_GET(self) -> None:
        service = self.service
        content = service.objects.get(self.path)
        if content is None or service.faults.get("storage") == "down":
            self._answer(503 if content is not None else 400, b"{}")
            return
        if service.faults.get("storage") == "slow" or self.path in service.slow:
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            service.release.wait(60)
            self.wfile.write(content[len(content) // 2 :])
            return
        self._answer(200, content, "application/octet-stream")

    def do_POST(self) -> None:
        asked = json.loads(self._body())
        key, service = asked["key"], self.service
        service.asked.append(key)
        if not asked.get("ahead", True):
            service.behind.add(key)
        if key in service.layers and asked.get("refused") == service.layers[key][0]["sha256"]:
            service.refused.append(key)
            del service.layers[key]
        if service.faults.get("api") == "down":
            self._answer(503, b"{}")
        elif key in service.layers:
            self._answer(200, json.dumps({"kind": "layer", "parts": service.layers[key]}).encode())
        else:
            urls = [f"{service.url}/objects/{key}.{number}" for number in range(4)]
            missing = {
                "kind": "missing",
                "upload_urls": urls if asked.get("send", True) else [],
                "max_bytes": 2**30,
            }
            self._answer(200, json.dumps(missing).encode())

    def do_PUT(self) -> None:
        body, service = self._body(), self.service
        if self.path.startswith("/objects/"):
            service.objects[self.path] = body
            self._answer(200, b"{}")
            return
        told = json.loads(body)
        service.layers[told["key"]] = [
            {**part, "url": f"{service.url}/objects/{told['key']}.{number}"}
            for number, part in enumerate(told["parts"])
        ]
        self._answer(200, b'{"kind": "layer"}')


@contextmanager
def serving() -> Iterator[Service]:
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    service = handler.service = Service(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield service
    finally:
        service.release.set()
        server.shutdown()
        thread.join()
        server.server_close()
