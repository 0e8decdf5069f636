"""Observes whether a dev server serves a preview, as a browser would: page, entry module, hot-update socket.

What answers is the project's code, so it is not trusted: no redirect leaves the origin, no answer is read
past a bound or waited for past a deadline, and the agent's proxies and credentials are not sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from enum import StrEnum
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import httpx
import websockets

from agent.devserver.state import Answered, Missed, Outdated, Probed, Served

MOST_BYTES = 2 * 2**20
"""Of one answer. Vite's own client is 220 KB, an entry module a few."""
MOST_SEARCHED = 256 * 2**10
"""Characters of a page or module that are searched; scripts and imports stand at the top."""
MOST_DEPENDENCIES = 16
"""Pre-bundled dependencies of the entry module that are asked for: they are where a stale cache shows."""
REDIRECTS = 3
SILENT_EVERY = 0.03
"""Seconds between inspections of a server that does not answer yet. Vite needs about 0.4 s, one takes under 1 ms."""
ANSWERING_EVERY = 0.25
"""Seconds between inspections of one that answers without serving a preview, until the project is fixed."""
SOCKET_WITHIN = 10.0
"""Seconds after which a preview without its socket counts as served: the project may have turned it off."""

_DEPENDENCY = re.compile(
    r"""(?:from|import)\s{0,9}\(?\s{0,9}["'](/[^"']{0,250}/deps/[^"'?]{1,250}\?v=[^"']{1,64})["']"""
)
"""Every repetition is bounded, since the project may write a module that makes an unbounded search take for ever."""
_SCRIPT = re.compile(r"<script\b[^<>]{0,2000}>", re.IGNORECASE)
"""Its attributes have no angle brackets, which makes the search linear."""
MOST_SCRIPTS = 100
"""Scripts of a page that are looked into; Vite's own pages have three."""
_SOCKET = re.compile(r"""directSocketHost\s*=\s*["'`]([^"'`]+)["'`]""")
CLIENT = "/@vite/client"


class Outcome(StrEnum):
    """What an inspection found."""

    SERVED = "served"
    """Page, entry module and socket answer."""
    SOCKETLESS = "socketless"
    """Page and entry module answer, the hot-update socket refuses."""
    BROKEN = "broken"
    """It speaks HTTP, and what it answers is no preview."""
    OUTDATED = "outdated"
    """504 Outdated Optimize Dep: its dependency cache is not that of its module graph."""
    SILENT = "silent"
    """No answer."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result. `detail` is a sentence for people; `entry` is the entry module's path when the page has one."""

    outcome: Outcome
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
    """Return the `src` of every module script of a page, in order.

    The parser is given the tags of scripts alone: it takes microseconds for each character of what is no HTML, and a
    page of 256 KB of `<` held the event loop for a third of a second.
    """
    parser = _Scripts()
    tags = _SCRIPT.finditer(_without_comments(page[:MOST_SEARCHED]))
    for tag in itertools.islice(tags, MOST_SCRIPTS):
        # It fails with an assertion on what is no HTML (`<![x`).
        with contextlib.suppress(AssertionError):
            parser.feed(tag[0])
            parser.reset()
    return parser.sources


def _without_comments(page: str) -> str:
    """Leave out comments and declarations; one that does not end goes to the end of the page, as in a browser."""
    kept, at = [], 0
    while (begin := page.find("<!", at)) >= 0:
        kept.append(page[at:begin])
        ending = "-->" if page.startswith("<!--", begin) else ">"
        end = page.find(ending, begin + 2)
        if end < 0:
            return " ".join(kept)
        at = end + len(ending)
    return " ".join([*kept, page[at:]])


async def observe(
    base: str, *, timeout: float, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[tuple[type[Probed] | None, Inspection]]:
    """Inspect a server until it serves a preview, then check for ever that it answers.

    Args:
        base: The server, `http://host:port`.
        timeout: Seconds for an inspection, and between two checks.
        clock: Monotonic, seconds.

    Yields:
        What was observed, and the inspection that showed it; None: a server that starts does not answer yet.
    """
    async with httpx.AsyncClient(trust_env=False, timeout=timeout) as http:
        socketless_since: float | None = None
        while True:
            found = await inspect(http, base, timeout=timeout)
            yield None if found.outcome is Outcome.SILENT else Answered, found
            if found.outcome is Outcome.OUTDATED:
                yield Outdated, found
            if found.outcome is Outcome.SOCKETLESS:
                socketless_since = socketless_since or clock()
            if found.outcome is Outcome.SERVED or (
                socketless_since and clock() - socketless_since >= SOCKET_WITHIN
            ):
                break
            await asyncio.sleep(SILENT_EVERY if found.outcome is Outcome.SILENT else ANSWERING_EVERY)
        yield Served, found
        refused = found.outcome is Outcome.SOCKETLESS
        while True:
            await asyncio.sleep(timeout)
            # A socket that opened is not opened again; one that was refused is tried until it opens.
            latest = await inspect(http, base, timeout=timeout, socket=refused)
            if latest.outcome is Outcome.SILENT and not await ping(http, base, timeout=timeout):
                yield Missed, found
                continue
            found = latest
            refused = refused and found.outcome is not Outcome.SERVED
            yield Outdated if found.outcome is Outcome.OUTDATED else Answered, found


async def inspect(http: httpx.AsyncClient, base: str, *, timeout: float, socket: bool = True) -> Inspection:
    """Inspect the server once. Never raises for what it answers.

    Args:
        http: The client, which sends no credential and uses no proxy.
        base: The server, `http://host:port`.
        timeout: Seconds for everything together.
        socket: Whether to try the hot-update socket too.
    """
    try:
        async with asyncio.timeout(timeout):
            return await _inspect(http, base, socket)
    except (httpx.HTTPError, OSError, TimeoutError) as error:
        return Inspection(Outcome.SILENT, f"no answer: {type(error).__name__}")
    except (httpx.InvalidURL, ValueError) as error:
        return Inspection(Outcome.BROKEN, f"the page names what is no address: {error}")


async def ping(http: httpx.AsyncClient, base: str, *, timeout: float) -> bool:
    """Return whether the server answers HTTP at all, with any status, within `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout), http.stream("GET", base, headers=PAGE):
            return True
    except (httpx.HTTPError, OSError, TimeoutError, ValueError):
        return False


PAGE = {"Accept": "text/html", "Accept-Encoding": "identity"}
MODULE = {"Accept": "*/*", "Sec-Fetch-Dest": "script", "Accept-Encoding": "identity"}
"""No answer is decompressed: 64 KB can unpack to 64 MB."""


async def _inspect(http: httpx.AsyncClient, base: str, socket: bool) -> Inspection:
    url, status, page, kind = await _get(http, f"{base}/", PAGE)
    if status != 200:
        return Inspection(Outcome.BROKEN, f"GET {urlsplit(url).path} answers {status}")
    if "html" not in kind:
        return Inspection(Outcome.SERVED, f"GET / answers {kind or 'no type'}; there is no page to inspect")
    sources = [urljoin(url, source) for source in module_scripts(page)]
    ours = [source for source in sources if _same_origin(source, base)]
    entries = [source for source in ours if not urlsplit(source).path.endswith(CLIENT)]
    entry = entries[-1] if entries else None
    path = urlsplit(entry).path if entry else None
    if entry:
        _, status, module, kind = await _get(http, entry, MODULE)
        if status == 504 and "Outdated" in module:
            return Inspection(Outcome.OUTDATED, f"{path} answers 504 Outdated Optimize Dep", path)
        if status != 200:
            return Inspection(Outcome.BROKEN, f"the entry module {path} answers {status}", path)
        if "javascript" not in kind:
            return Inspection(Outcome.BROKEN, f"the entry module {path} is {kind or 'of no type'}", path)
        for dependency in _DEPENDENCY.findall(module[:MOST_SEARCHED])[:MOST_DEPENDENCIES]:
            _, status, _, _ = await _get(http, urljoin(entry, dependency), MODULE, keep=False)
            if status == 504:
                return Inspection(Outcome.OUTDATED, f"{dependency} answers 504 Outdated Optimize Dep", path)
    client = next((source for source in ours if urlsplit(source).path.endswith(CLIENT)), None)
    if socket and client and not await _socket_accepts(http, client, base):
        return Inspection(
            Outcome.SOCKETLESS, "page and entry module are served; the hot-update socket refuses", path
        )
    return Inspection(Outcome.SERVED, "page and entry module are served", path)


async def _get(
    http: httpx.AsyncClient, url: str, headers: dict[str, str], *, keep: bool = True
) -> tuple[str, int, str, str]:
    """Return final URL, status, text (bounded) and content type. Follows redirects on the same origin only."""
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
            text = bytes(body[: 4 * MOST_SEARCHED]).decode(errors="replace")
            return url, answer.status_code, text, kind
    raise ValueError("redirects without end")


def _same_origin(one: str, other: str) -> bool:
    return urlsplit(one)[:2] == urlsplit(other)[:2]


async def _socket_accepts(http: httpx.AsyncClient, client: str, base: str) -> bool:
    """Return whether the socket opens that Vite's own client would open.

    The client module has the server's address, which differs from the page's when the project's config
    moves the socket; only its port and path are used.
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
