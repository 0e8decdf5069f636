"""Observes whether a dev server is up, and whether the page that it serves is right: page, entry module, HMR socket.

Up and right are two questions. A server is *up* when it answers HTTP, with any status, at the address at which a
visitor reaches it; a server that shows its framework's error page is up. What is wrong with the page is in the
inspection's `rule` and `detail`.

What answers is the project's code, so it is not trusted: no redirect leaves the origin, no answer is read
past a bound or waited for past a deadline, and the agent's proxies and credentials are not sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import ssl
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from html.parser import HTMLParser
from urllib.parse import urljoin, urlsplit

import httpx
import websockets

from agent.devserver.state import Answered, Missed, Outdated, Probed

MOST_BYTES = 2 * 2**20
"""Of one answer. Vite's own client is 220 KB, an entry module a few."""
MOST_SEARCHED = 256 * 2**10
"""Characters of a page or module that are searched; scripts and imports stand at the top."""
MOST_DEPENDENCIES = 16
"""Pre-bundled dependencies of the entry module that are asked for: they are where a stale cache shows."""
REDIRECTS = 3
SILENT_EVERY = 0.03
"""Seconds between inspections of a server that does not answer yet. Vite needs about 0.4 s, one takes under 1 ms."""
WRONG_EVERY = 0.25
"""Seconds until the second inspection of a page that is not right; each further wait is twice as long, up to the
usual one: an inspection costs the project's server a request, and it may print its error at each."""

_DEPENDENCY = re.compile(
    r"""(?:from|import)\s{0,9}\(?\s{0,9}["'](/[^"']{0,250}/deps/[^"'?]{1,250}\?v=[^"']{1,64})["']"""
)
"""Every repetition is bounded, since the project may write a module that makes an unbounded search take for ever."""
_SCRIPT = re.compile(r"<script\b[^<>]{0,2000}>", re.IGNORECASE)
"""Its attributes have no angle brackets, which makes the search linear."""
MOST_SCRIPTS = 100
"""Scripts of a page that are looked into; Vite's own pages have three."""
_SOCKET = re.compile(r"""directSocketHost\s{0,9}=\s{0,9}["'`]([^"'`]{1,500})["'`]""")
CLIENTS = ("/@vite/client", "/bundledDevClient.mjs")
"""The hot-update client of Vite, and of its bundled dev mode."""
BUNDLING = "<h1>Bundling in progress</h1>"
"""What Vite's bundled dev mode serves until its first bundle is done."""
_ANY_CERTIFICATE = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # no authorities, which are a megabyte
_ANY_CERTIFICATE.check_hostname = False
_ANY_CERTIFICATE.verify_mode = ssl.CERT_NONE
LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0"})  # noqa: S104 - compared with, not bound to


class Outcome(StrEnum):
    """What an inspection found."""

    SERVED = "served"
    """Page, entry module and socket answer."""
    SOCKETLESS = "socketless"
    """Page and entry module answer, the hot-update socket refuses."""
    PENDING = "pending"
    """The server says that it is still making the page."""
    BROKEN = "broken"
    """It answers HTTP, and the page is not right."""
    OUTDATED = "outdated"
    """504 Outdated Optimize Dep: its dependency cache is not that of its module graph."""
    SILENT = "silent"
    """No answer."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result.

    Attributes:
        detail: A sentence for people.
        entry: The entry module's path when the page has one.
        rule: What is wrong with the page, as a label: `status`, `redirect`, `entry`, `address`, `parts`.
        url: The server that answered, `scheme://host:port`.
    """

    outcome: Outcome
    detail: str
    entry: str | None = None
    rule: str | None = None
    url: str | None = None

    @property
    def up(self) -> bool:
        """Whether the server answers HTTP."""
        return self.outcome is not Outcome.SILENT


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
    bases: Sequence[str], *, timeout: float
) -> AsyncGenerator[tuple[type[Probed] | None, Inspection], None]:
    """Inspect a server until it answers, then for ever.

    Args:
        bases: Where a visitor may reach it, `http://host:port` each; the first that answers counts.
        timeout: Seconds between two inspections of a page that is right, after which an answer that has not begun
            is missed, and in which the parts of the page have to answer. An answer that is missed is still waited
            for: a page that takes longer is slow, and its server is up.

    Yields:
        What was observed, and the inspection that showed it; None: a server that starts does not answer yet.
    """
    async with _client(timeout, patience=None) as http:
        known: Inspection | None = None
        refused = True
        pause = WRONG_EVERY
        while True:
            # A socket that opened is not opened again; one that was refused is tried until it opens.
            asked = asyncio.create_task(_first(http, bases, timeout, socket=refused), name="inspect")
            try:
                while not (await asyncio.wait({asked}, timeout=timeout))[0]:
                    yield (
                        Missed,
                        known or Inspection(Outcome.SILENT, f"no answer yet, after {timeout:g} s and more"),
                    )
                found = await asked
            finally:
                asked.cancel()
            if not found.up:
                yield (Missed, known) if known else (None, found)
                await asyncio.sleep(timeout if known else SILENT_EVERY)
                continue
            known = found
            refused = refused and found.outcome is not Outcome.SERVED
            yield Outdated if found.outcome is Outcome.OUTDATED else Answered, found
            right = found.outcome is Outcome.SERVED
            await asyncio.sleep(timeout if right else min(timeout, pause))
            pause = WRONG_EVERY if right else 2 * pause


def _client(timeout: float, patience: float | None) -> httpx.AsyncClient:
    """Make a client that connects within `timeout` seconds and waits `patience` for an answer; None: for ever.

    It takes any certificate: that is the project's own, and nothing is told to whoever answers.
    """
    limits = httpx.Timeout(timeout, read=patience)
    return httpx.AsyncClient(trust_env=False, verify=False, timeout=limits)  # noqa: S501


async def answers(base: str, *, timeout: float) -> bool:
    """Return whether a server answers HTTP or HTTPS there within `timeout` seconds."""
    async with _client(timeout, timeout) as http:
        return (await inspect(http, base, timeout=timeout, socket=False)).up


async def _first(
    http: httpx.AsyncClient, bases: Sequence[str], timeout: float, *, socket: bool
) -> Inspection:
    """Inspect the first of `bases` that answers."""
    found = Inspection(Outcome.SILENT, "no answer: there is no address")
    for base in bases:
        found = await inspect(http, base, timeout=timeout, socket=socket)
        if found.up:
            break
    return found


async def inspect(http: httpx.AsyncClient, base: str, *, timeout: float, socket: bool = True) -> Inspection:
    """Inspect the server once. Never raises for what it answers.

    Args:
        http: The client, which sends no credential and uses no proxy. Its own limit is how long the answer to the
            first request may take to begin.
        base: The server, `http://host:port`. One that answers no HTTP there is tried with HTTPS.
        timeout: Seconds for the parts of the page together.
        socket: Whether to try the hot-update socket too.
    """
    try:
        return await _inspect(http, base, timeout, socket)
    except (httpx.RemoteProtocolError, httpx.ReadError) as error:
        secure = base.replace("http://", "https://", 1)
        if secure == base:
            return Inspection(Outcome.SILENT, f"no answer: {type(error).__name__}")
        return await inspect(http, secure, timeout=timeout, socket=socket)
    except (httpx.HTTPError, OSError, TimeoutError) as error:
        return Inspection(Outcome.SILENT, f"no answer: {type(error).__name__}")


PAGE = {
    "Accept": "text/html", "Accept-Encoding": "identity", "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate"
}  # fmt: skip
"""As a browser that opens the page: Vite's bundled dev mode answers others differently while it bundles."""
MODULE = {"Accept": "*/*", "Sec-Fetch-Dest": "script", "Accept-Encoding": "identity"}
"""No answer is decompressed: 64 KB can unpack to 64 MB."""


async def _inspect(http: httpx.AsyncClient, base: str, timeout: float, socket: bool) -> Inspection:
    try:
        url, status, page, kind = await _get(http, f"{base}/", PAGE, timeout)
    except (httpx.InvalidURL, ValueError) as error:
        return Inspection(Outcome.BROKEN, f"GET / redirects to no page: {error}", rule="redirect", url=base)
    try:
        async with asyncio.timeout(timeout):
            found = await _page(http, base, url, status, page, kind, timeout, socket)
    except (httpx.HTTPError, OSError, TimeoutError) as error:
        said = f"the page answers, and a part of it does not: {type(error).__name__}"
        found = Inspection(Outcome.BROKEN, said, rule="parts")
    except (httpx.InvalidURL, ValueError) as error:
        found = Inspection(Outcome.BROKEN, f"the page names what is no address: {error}", rule="address")
    return replace(found, url=base)


async def _page(
    http: httpx.AsyncClient,
    base: str,
    url: str,
    status: int,
    page: str,
    kind: str,
    timeout: float,
    socket: bool,
) -> Inspection:
    """Judge what was answered to the first request, and ask for the page's parts."""
    if 300 <= status < 400:
        return _redirected(page)
    if status != 200:
        return Inspection(Outcome.BROKEN, f"GET {urlsplit(url).path} answers {status}", rule="status")
    if "html" not in kind:
        return Inspection(Outcome.SERVED, f"GET / answers {kind or 'no type'}; there is no page to inspect")
    if BUNDLING in page:
        return Inspection(Outcome.PENDING, "the server says that it is bundling")
    sources = [urljoin(url, source) for source in module_scripts(page)]
    ours = [source for source in sources if _same_origin(source, base)]
    entries = [source for source in ours if not urlsplit(source).path.endswith(CLIENTS)]
    entry = entries[-1] if entries else None
    path = urlsplit(entry).path if entry else None
    client = next((source for source in ours if urlsplit(source).path.endswith(CLIENTS)), None)
    if entry:
        _, status, module, kind = await _get(http, entry, MODULE, timeout)
        if status == 504 and "Outdated" in module:
            return Inspection(Outcome.OUTDATED, f"{path} answers 504 Outdated Optimize Dep", path)
        if status != 200:
            return Inspection(Outcome.BROKEN, f"the entry module {path} answers {status}", path, "entry")
        if "javascript" not in kind:
            return Inspection(
                Outcome.BROKEN, f"the entry module {path} is {kind or 'of no type'}", path, "entry"
            )
        for dependency in _DEPENDENCY.findall(module[:MOST_SEARCHED])[:MOST_DEPENDENCIES]:
            _, status, _, _ = await _get(http, urljoin(entry, dependency), MODULE, timeout, keep=False)
            if status == 504:
                return Inspection(Outcome.OUTDATED, f"{dependency} answers 504 Outdated Optimize Dep", path)
    if socket and client and not await _socket_accepts(http, client, base, timeout):
        return Inspection(
            Outcome.SOCKETLESS, "page and entry module are served; the hot-update socket refuses", path
        )
    return Inspection(Outcome.SERVED, "page and entry module are served", path)


def _redirected(target: str) -> Inspection:
    """Judge a page that is elsewhere: a visitor's browser goes there, and this machine's own name is not ours there."""
    there = urlsplit(target)
    shown = f"{there.scheme}://{there.netloc}{there.path}"[:200]
    if there.hostname in LOCAL_NAMES:
        said = f"GET / redirects to {shown}, where a visitor's browser finds nothing; redirect to a path"
        return Inspection(Outcome.BROKEN, said, rule="redirect")
    return Inspection(Outcome.SERVED, f"GET / redirects to {shown}; there is no page to inspect")


async def _get(
    http: httpx.AsyncClient, url: str, headers: dict[str, str], timeout: float, *, keep: bool = True
) -> tuple[str, int, str, str]:
    """Return final URL, status, text (bounded) and content type; of a redirect to another origin its target as text.

    What has come of a body within `timeout` seconds counts: an answer that began is an answer.
    """
    for _ in range(REDIRECTS + 1):
        async with http.stream("GET", url, headers=headers, follow_redirects=False) as answer:
            target = answer.headers.get("location")
            if answer.is_redirect and target:
                target = urljoin(url, target)
                if not _same_origin(target, url):
                    return url, answer.status_code, target, ""
                url = target
                continue
            body = bytearray()
            if keep:
                with contextlib.suppress(TimeoutError, httpx.HTTPError):
                    async with asyncio.timeout(timeout):
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


async def _socket_accepts(http: httpx.AsyncClient, client: str, base: str, timeout: float) -> bool:
    """Return whether the socket opens that Vite's own client would open.

    The client tries the page's own address, and then the server's, which its module has: a framework that runs Vite as
    a part of its own server serves the socket at the page's, a config that moves the socket at the other. Of that
    one only port and path are used.
    """
    _, _, source, _ = await _get(http, client, MODULE, timeout)
    here = urlsplit(base)
    named = _SOCKET.search(source)
    there = urlsplit(f"//{named[1]}") if named else None
    path = there.path if there and there.path else "/"
    scheme = "wss" if here.scheme == "https" else "ws"
    host = f"[{here.hostname}]" if ":" in str(here.hostname) else here.hostname
    ports = dict.fromkeys([here.port, (there.port if there else None) or here.port])
    for port in ports:
        if await _opens(f"{scheme}://{host}:{port}{path}"):
            return True
    return False


async def _opens(url: str) -> bool:
    try:
        async with websockets.connect(
            url,
            ssl=_ANY_CERTIFICATE if url.startswith("wss:") else None,
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
