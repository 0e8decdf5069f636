"""Whether a preview is there, asked as a browser would: page, entry module, hot-update socket.

What answers is the project's code, so it is not believed: no redirect leaves the origin, no answer is read
past a bound or waited for past a deadline, and the agent's proxies and credentials are not sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass
from enum import StrEnum
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import httpx
import websockets

MOST_BYTES = 2 * 2**20
"""Of one answer. Vite's own client is 220 KB, an entry module a few."""
LOOKED_INTO = 256 * 2**10
"""Characters of a page or module that are searched; scripts and imports stand at the top."""
MOST_DEPENDENCIES = 16
"""Pre-bundled dependencies of the entry module that are asked for: they are where a stale cache shows."""
REDIRECTS = 3

_DEPENDENCY = re.compile(
    r"""(?:from|import)\s{0,9}\(?\s{0,9}["'](/[^"']{0,250}/deps/[^"'?]{1,250}\?v=[^"']{1,64})["']"""
)
"""Everything counted: a module that is written to be searched for ever is the project's to write."""
_SOCKET = re.compile(r"""directSocketHost\s*=\s*["'`]([^"'`]+)["'`]""")
CLIENT = "/@vite/client"


class Verdict(StrEnum):
    """What the server is worth."""

    SERVED = "served"
    """Page, entry module and socket."""
    SOCKETLESS = "socketless"
    """Page and entry module, but nothing would be hot-updated."""
    BROKEN = "broken"
    """It speaks HTTP, and what it says is no preview."""
    OUTDATED = "outdated"
    """504 Outdated Optimize Dep: its dependency cache is not that of its module graph."""
    SILENT = "silent"
    """No answer."""


@dataclass(frozen=True, slots=True)
class Seen:
    """One look. `detail` is one sentence for people; `entry` the entry module's path when the page has one."""

    verdict: Verdict
    detail: str
    entry: str | None = None


class _Scripts(HTMLParser):
    """Collects the sources of module scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "script" and given.get("type") == "module" and (source := given.get("src")):
            self.sources.append(source)


def module_scripts(page: str) -> list[str]:
    """The `src` of every module script of a page, in order."""
    parser = _Scripts()
    # What is no HTML at all (`<![x`) ends the parser with an assertion; what stood before it counts.
    with contextlib.suppress(AssertionError):
        parser.feed(page[:LOOKED_INTO])
    return parser.sources


async def look(http: httpx.AsyncClient, base: str, *, timeout: float, socket: bool = True) -> Seen:
    """Look at the server at `base` (`http://host:port`) once; at most `timeout` seconds. Never raises for it.

    `socket` False leaves the hot-update socket out.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _look(http, base, socket)
    except (httpx.HTTPError, OSError, TimeoutError) as error:
        return Seen(Verdict.SILENT, f"no answer: {type(error).__name__}")
    except (httpx.InvalidURL, ValueError) as error:
        return Seen(Verdict.BROKEN, f"the page names what is no address: {error}")


async def ping(http: httpx.AsyncClient, base: str, *, timeout: float) -> bool:
    """Whether the server answers HTTP at all, whatever it says."""
    try:
        async with asyncio.timeout(timeout), http.stream("GET", base, headers=PAGE):
            return True
    except (httpx.HTTPError, OSError, TimeoutError, ValueError):
        return False


PAGE = {"Accept": "text/html", "Accept-Encoding": "identity"}
MODULE = {"Accept": "*/*", "Sec-Fetch-Dest": "script", "Accept-Encoding": "identity"}
"""Nothing is unpacked, whatever is sent: 64 KB of an answer can unpack to 64 MB."""


async def _look(http: httpx.AsyncClient, base: str, socket: bool) -> Seen:
    url, status, page, kind = await _get(http, f"{base}/", PAGE)
    if status != 200:
        return Seen(Verdict.BROKEN, f"GET {urlsplit(url).path} answers {status}")
    if "html" not in kind:
        return Seen(Verdict.SERVED, f"GET / answers {kind or 'no type'}; there is no page to look into")
    sources = [urljoin(url, source) for source in module_scripts(page)]
    ours = [source for source in sources if _same_origin(source, base)]
    entries = [source for source in ours if not urlsplit(source).path.endswith(CLIENT)]
    entry = entries[-1] if entries else None
    path = urlsplit(entry).path if entry else None
    if entry:
        _, status, module, kind = await _get(http, entry, MODULE)
        if status == 504 and "Outdated" in module:
            return Seen(Verdict.OUTDATED, f"{path} answers 504 Outdated Optimize Dep", path)
        if status != 200:
            return Seen(Verdict.BROKEN, f"the entry module {path} answers {status}", path)
        if "javascript" not in kind:
            return Seen(Verdict.BROKEN, f"the entry module {path} is {kind or 'of no type'}", path)
        for dependency in _DEPENDENCY.findall(module[:LOOKED_INTO])[:MOST_DEPENDENCIES]:
            _, status, _, _ = await _get(http, urljoin(entry, dependency), MODULE, keep=False)
            if status == 504:
                return Seen(Verdict.OUTDATED, f"{dependency} answers 504 Outdated Optimize Dep", path)
    client = next((source for source in ours if urlsplit(source).path.endswith(CLIENT)), None)
    if socket and client and not await _socket_accepts(http, client, base):
        return Seen(
            Verdict.SOCKETLESS, "page and entry module are served; the hot-update socket refuses", path
        )
    return Seen(Verdict.SERVED, "page and entry module are served", path)


async def _get(
    http: httpx.AsyncClient, url: str, headers: dict[str, str], *, keep: bool = True
) -> tuple[str, int, str, str]:
    """Final URL, status, text (bounded) and content type. Redirects stay on the origin."""
    for _ in range(REDIRECTS + 1):
        async with http.stream("GET", url, headers=headers, follow_redirects=False) as answer:
            target = answer.headers.get("location")
            if answer.is_redirect and target and _same_origin(urljoin(url, target), url):
                url = urljoin(url, target)
                continue
            body = bytearray()
            if keep:
                async for chunk in answer.aiter_raw():
                    body += chunk
                    if len(body) > MOST_BYTES:
                        break
            kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            text = bytes(body[:MOST_BYTES]).decode(errors="replace")
            return url, answer.status_code, text, kind
    raise ValueError("redirects without end")


def _same_origin(one: str, other: str) -> bool:
    return urlsplit(one)[:2] == urlsplit(other)[:2]


async def _socket_accepts(http: httpx.AsyncClient, client: str, base: str) -> bool:
    """Open the socket that Vite's own client would open.

    The client module names the server's address, which differs from the page's when the project's config
    moves the socket; only the port and the path are taken from there.
    """
    _, _, source, _ = await _get(http, client, MODULE)
    here = urlsplit(base)
    named = _SOCKET.search(source)
    there = urlsplit(f"//{named[1]}") if named else None
    port = (there.port if there else None) or here.port
    path = there.path if there and there.path else "/"
    host = f"[{here.hostname}]" if ":" in str(here.hostname) else here.hostname
    try:
        async with websockets.connect(
            f"ws://{host}:{port}{path}",
            subprotocols=[websockets.Subprotocol("vite-hmr")],
            proxy=None,
            compression=None,
            max_size=MOST_BYTES,
            open_timeout=2.0,
            close_timeout=0.2,
            user_agent_header=None,
        ):
            return True
    except (OSError, TimeoutError, websockets.WebSocketException, ValueError):
        return False
