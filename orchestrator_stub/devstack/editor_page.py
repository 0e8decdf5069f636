"""Serves the editor page at `/` of a local stack, and builds it from `examples/editor` where this is a checkout.

An installed package has the built page in it. In a checkout it is built once, beside everything else, and again when
its sources have changed: the preview never waits for it. What the page needs to sign in is given to this page alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gzip
import hashlib
import mimetypes
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

BUILT: Final = Path(__file__).parents[1] / "editor_page"
"""The page as browsers load it; in no commit."""
SOURCES: Final = Path(__file__).parents[2] / "examples" / "editor"
NAME_BYTES: Final = 255
"""Of a file's name, on every file system in use; a longer one is an error and not a miss."""
COMPRESSED: Final = (".css", ".html", ".js", ".json", ".svg")
"""What is smaller by gzip; pictures and fonts are not."""
LAST_LINES: Final = 12
"""Of a failed build's output, shown."""

WAITING = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<title>Editor</title>{refresh}<body style="font:16px system-ui;padding:2em"><h1 style="font-size:1.2em">{title}</h1>
<pre style="white-space:pre-wrap">{text}</pre>"""


class PageNotBuilt(Exception):
    """Why the page could not be built, with the end of what the program said."""


class EditorPage:
    """The page, its way to a browser, and its build."""

    def __init__(self, built: Path = BUILT, sources: Path = SOURCES) -> None:
        self._built = built
        self._sources = sources
        self._failed: str | None = None
        self._ready = False
        """What is there is of its sources. An older page would ask for parts that a build replaces."""
        self._info: dict[str, Any] | None = None

    def publish(self, info: dict[str, Any]) -> None:
        """Take what the page is told: where everything is, and who signs in."""
        self._info = info

    @property
    def current(self) -> bool:
        """Whether the page is there, as of its sources."""
        if not (self._built / "index.html").is_file():
            return False
        if not (self._sources / "package.json").is_file():
            return True
        with contextlib.suppress(OSError):
            return (self._built / ".sources").read_text() == digest(self._sources)
        return False

    async def build(self, say: Callable[[str], None]) -> None:
        """Build the page if it is not current; what goes wrong is said, and shown in its place."""
        if await asyncio.to_thread(lambda: self.current):
            self._ready = True
            return
        if not (self._sources / "package.json").is_file():
            self._failed = "This installation came without the editor page."
            return
        say("building the editor page")
        try:
            await build(self._sources, self._built)
        except (PageNotBuilt, OSError) as error:
            self._failed = str(error)
            say(f"the editor page could not be built: {str(error).splitlines()[0]}")
        else:
            self._ready = True
            say("the editor page is built")

    def routes(self) -> list[Route]:
        """`/`, `/editor.json` and the page's assets."""
        return [
            Route("/", self._index, methods=["GET"]),
            Route("/editor.json", self._config, methods=["GET"]),
            Route("/assets/{name}", self._asset, methods=["GET"]),
            Route("/worker.js", self._worker, methods=["GET"]),
        ]

    async def _index(self, request: Request) -> Response:
        if not _for_this_page(request):
            return Response(status_code=403)
        if self._failed is not None:
            return HTMLResponse(
                WAITING.format(
                    title="The editor page could not be built", text=_escaped(self._failed), refresh=""
                )
            )
        if self._info is None or not self._ready:
            text = "The page comes by itself."
            refresh = '<meta http-equiv="refresh" content="1">'
            return HTMLResponse(WAITING.format(title="Starting …", text=text, refresh=refresh))
        headers = {"Cache-Control": "no-store", "X-Frame-Options": "DENY", "X-Editor-Page": "built"}
        return await _file(request, self._built / "index.html", headers)

    async def _worker(self, request: Request) -> Response:
        """What keeps the page for a start without the stack. At the top: its scope is where it comes from."""
        return await _file(request, self._built / "worker.js", {"Cache-Control": "no-cache"})

    async def _asset(self, request: Request) -> Response:
        # One segment of a route: it has no slash in it, and ".." is no file.
        path = self._built / "assets" / request.path_params["name"]
        return await _file(request, path, {"Cache-Control": "public, max-age=31536000, immutable"})

    async def _config(self, request: Request) -> Response:
        """What signs the local user in. Not for another site's page, nor for one whose name was pointed at loopback."""
        if (
            not _for_this_page(request)
            or request.headers.get("sec-fetch-site", "same-origin") != "same-origin"
        ):
            return Response(status_code=403)
        if self._info is None:
            return Response(status_code=503, headers={"Retry-After": "1"})
        return JSONResponse(self._info, headers={"Cache-Control": "no-store"})


async def _file(request: Request, path: Path, headers: dict[str, str]) -> Response:
    """A file of the page: as it was compressed when it was built, where the browser takes that; 304 where it has it."""
    if len(path.name.encode()) > NAME_BYTES or not await asyncio.to_thread(path.is_file):
        return Response(status_code=404)
    packed = _packed(path)
    media_type = mimetypes.guess_type(path)[0]
    if await asyncio.to_thread(packed.is_file):
        headers = {**headers, "Vary": "Accept-Encoding"}
        if takes_gzip(request.headers.get("accept-encoding", "")):
            path, headers = packed, {**headers, "Content-Encoding": "gzip"}
    stat = await asyncio.to_thread(path.stat)
    answer = FileResponse(path, headers=headers, media_type=media_type, stat_result=stat)
    if answer.headers["etag"] not in request.headers.get("if-none-match", "").replace("W/", "").split(", "):
        return answer
    kept = ("cache-control", "etag", "vary", "x-frame-options")
    return Response(status_code=304, headers={k: v for k, v in answer.headers.items() if k in kept})


def takes_gzip(accepted: str) -> bool:
    """Whether an `Accept-Encoding` allows gzip. By name, else by the star (RFC 9110, 12.5.3)."""
    allowed: dict[str, bool] = {}
    for each in accepted.lower().split(","):
        name, _, weight = each.replace(" ", "").partition(";")
        allowed[name] = not re.fullmatch(r"q=0(\.0{0,3})?", weight)
    return allowed.get("gzip", allowed.get("*", False))


def _packed(path: Path) -> Path:
    return path.with_name(f"{path.name}.gz")


def compress(page: Path) -> None:
    """Lay beside each file of a built page what gzip makes of it, for as long as the page is served."""
    for path in sorted(page.rglob("*")):
        if path.suffix in COMPRESSED:
            content = path.read_bytes()
            packed = gzip.compress(content, mtime=0)
            if len(packed) < len(content):
                _packed(path).write_bytes(packed)


def _for_this_page(request: Request) -> bool:
    """Whether it was asked for by a loopback address: any other name was pointed here by somebody else."""
    host = request.headers.get("host", "").rpartition(":")[0]
    return host in ("127.0.0.1", "localhost", "[::1]")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def digest(sources: Path) -> str:
    """Return a hash of everything that the built page follows from."""
    found = hashlib.sha256(b"compressed\0")
    top = [
        sources / name
        for name in ("index.html", "package-lock.json", "package.json", "tsconfig.json", "vite.config.ts")
    ]
    for path in sorted([*top, *(sources / "src").rglob("*"), *(sources / "public").rglob("*")]):
        if path.is_file():
            found.update(f"{path.relative_to(sources)}\0".encode())
            found.update(hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


async def build(sources: Path, built: Path) -> None:
    """Build the page of `sources` into `built`, which changes in one step. Raises `PageNotBuilt`, `OSError`."""
    npm = shutil.which("npm")
    if npm is None:
        raise PageNotBuilt("npm is not on PATH: install Node 20.19 or newer")
    with (sources / ".build.lock").open("w") as lock:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)  # another build may be on its way
        wanted = digest(sources)
        with contextlib.suppress(OSError):
            if (built / ".sources").read_text() == wanted:
                return
        await _run(sources, npm, "ci", "--loglevel=error", "--no-audit", "--no-fund")
        with tempfile.TemporaryDirectory(dir=built.parent, prefix=".editor-page-") as place:
            fresh = Path(place) / "page"
            await _run(
                sources, npm, "run", "--silent", "build", "--", "--outDir", str(fresh), "--emptyOutDir"
            )
            await asyncio.to_thread(compress, fresh)
            (fresh / ".sources").write_text(wanted)
            _replace(built, fresh, Path(place) / "old")


def _replace(built: Path, fresh: Path, old: Path) -> None:
    if built.exists():
        built.rename(old)
    fresh.rename(built)


async def _run(cwd: Path, *argv: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv, cwd=cwd, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = await process.communicate()
    except asyncio.CancelledError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    if process.returncode:
        lines = output.decode(errors="replace").splitlines()[-LAST_LINES:]
        raise PageNotBuilt(
            "\n".join([f"`{' '.join(Path(a).name if a == argv[0] else a for a in argv)}` failed", *lines])
        )


def main() -> None:
    """Build the page if it is not current: `make page`."""
    page = EditorPage()
    if page.current:
        return
    try:
        asyncio.run(build(SOURCES, BUILT))
    except (PageNotBuilt, OSError) as error:
        sys.exit(f"the editor page could not be built: {error}")


if __name__ == "__main__":
    main()
