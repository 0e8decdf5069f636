"""Reads and rewrites heads of HTTP messages. PURE: bytes in, bytes out.

What is syntactically no HTTP is refused by the parser (`wire`); here is what the door asks of a head beyond that, what
of it may pass, and what must not: hop-by-hop fields (RFC 9110, 7.6.1), the door's cookie in both directions, and what
an answer of the project's code could tell the proxies in front of the door.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

Headers = tuple[tuple[bytes, bytes], ...]
"""As they came: names in whatever case."""

HOP_BY_HOP: Final = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate", b"proxy-authorization",
        b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect",
    }
)  # fmt: skip
"""Of one connection; each side of the door has its own."""

NEVER_NAMED: Final = frozenset({b"host", b"content-length", b"cookie", b"origin", b"set-cookie"})
"""What `Connection` may not take away: the door has judged by it, or frames by it."""

SAID_BY_THE_DOOR: Final = frozenset({b"x-forwarded-host", b"x-forwarded-proto", b"forwarded"})
"""What a client could claim of itself and the project's code would believe."""

TO_PROXIES: Final = re.compile(rb"(fly-|x-accel-|x-sendfile|x-lighttpd-|alt-svc$)", re.IGNORECASE)
"""Fields of an answer that a proxy in front of the door obeys: `fly-replay` would send a request on to any app of the
organization, `X-Accel-Redirect` has nginx serve a file of its own. The project's code has no say there."""

DIRECTIVE: Final = re.compile(rb'(?:[^,"]|"[^"]*"?)+')
FOR_SHARED_CACHES: Final = frozenset({b"public", b"private", b"s-maxage"})

HOST: Final = re.compile(rb"([a-z0-9-]+(?:\.[a-z0-9-]+)*|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.IGNORECASE)

MOST_COOKIES: Final = 4
"""Values of the door's name that are read: a partitioned and an unpartitioned one, and what a page's script set."""

WEBSOCKET: Final = b"websocket"


class BadHead(Exception):
    """The head cannot be served; `status` says why, to the client too."""

    def __init__(self, status: int, why: str) -> None:
        self.status = status
        super().__init__(why)


@dataclass(frozen=True, slots=True)
class RequestHead:
    """A request's head. `length` None: chunked."""

    method: str
    target: bytes
    version: str
    headers: Headers
    length: int | None
    keep_alive: bool
    upgrade: bool
    """Whether it asks for a WebSocket."""


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """An answer's head. `length` None: chunked or until the end of the connection."""

    status: int
    reason: bytes
    headers: Headers
    length: int | None
    until_close: bool
    keep_alive: bool


@dataclass(frozen=True, slots=True)
class Asked:
    """What the door decides by. `host` in lower case, with its port when one was given."""

    method: str
    path: str
    query: str
    host: str
    cookies: tuple[str, ...]
    """Values of the door's cookie."""
    origin: str | None
    fetch_site: str | None
    fetch_mode: str | None
    accepts_html: bool
    upgrade: bool

    @property
    def wants_page(self) -> bool:
        """Whether a person waits for a document, rather than a page for one of its parts."""
        if self.method != "GET" or self.upgrade:
            return False
        return self.fetch_mode == "navigate" if self.fetch_mode is not None else self.accepts_html


def values(headers: Headers, name: bytes) -> list[bytes]:
    """Every value of the field `name` (in lower case)."""
    return [value for each, value in headers if each.lower() == name]


def read(head: RequestHead, cookie: bytes) -> Asked:
    """What a request asks of the door.

    Args:
        head: The request's.
        cookie: The name of the door's cookie.

    Raises:
        BadHead: No or several hosts, a target that names another, or something else that nobody honest sends.
    """
    hosts = values(head.headers, b"host")
    if len(hosts) != 1:
        raise BadHead(400, "a request has one Host")
    if HOST.fullmatch(hosts[0]) is None:
        raise BadHead(400, "the Host is no host")
    if not head.target.startswith(b"/"):
        # The absolute form names a host of its own, CONNECT another machine.
        raise BadHead(400, "only paths of this host are served")
    origins = values(head.headers, b"origin")
    if len(origins) > 1:
        raise BadHead(400, "a request has one Origin at most")
    path, _, query = head.target.partition(b"?")
    return Asked(
        method=head.method,
        path=path.decode("latin-1"),
        query=query.decode("latin-1"),
        host=hosts[0].decode("ascii").lower(),
        cookies=tuple(cookie_values(head.headers, cookie)),
        origin=origins[0].decode("latin-1") if origins else None,
        fetch_site=_one(head.headers, b"sec-fetch-site"),
        fetch_mode=_one(head.headers, b"sec-fetch-mode"),
        accepts_html=any(b"text/html" in value.lower() for value in values(head.headers, b"accept")),
        upgrade=head.upgrade,
    )


def _one(headers: Headers, name: bytes) -> str | None:
    found = values(headers, name)
    return found[0].decode("latin-1").lower() if found else None


def kept_private(headers: Headers) -> bytes:
    """What `Cache-Control` of these fields says, and that no proxy may keep the answer.

    Without the project's own words a browser would show from its cache what a dev server has it ask for each time.
    """
    words = [word.strip() for value in values(headers, b"cache-control") for word in DIRECTIVE.findall(value)]
    kept = [word for word in words if word and word.partition(b"=")[0].lower() not in FOR_SHARED_CACHES]
    return b", ".join([*kept, b"private"])


def asks_for_websocket(method: str, headers: Headers) -> bool:
    """Whether these are the fields of a WebSocket's handshake."""
    upgrades = [word.strip().lower() for value in values(headers, b"upgrade") for word in value.split(b",")]
    options = _named(headers)
    return method == "GET" and upgrades == [WEBSOCKET] and b"upgrade" in options


def _named(headers: Headers) -> set[bytes]:
    """The words of `Connection`."""
    return {
        word.strip().lower() for value in values(headers, b"connection") for word in value.split(b",")
    } - NEVER_NAMED


def cookie_values(headers: Headers, name: bytes) -> list[str]:
    """The values of the cookie `name`, at most `MOST_COOKIES`."""
    found: list[str] = []
    for line in values(headers, b"cookie"):
        for pair in line.split(b";"):
            key, _, value = pair.strip().partition(b"=")
            if key.strip() == name and len(found) < MOST_COOKIES:
                found.append(value.strip().strip(b'"').decode("latin-1"))
    return found


def without_cookie(line: bytes, name: bytes) -> bytes:
    """A `Cookie` line without the cookie `name`; empty when nothing is left."""
    kept = [pair.strip() for pair in line.split(b";") if pair.partition(b"=")[0].strip() != name]
    return b"; ".join(pair for pair in kept if pair)


def to_project(head: RequestHead, *, cookie: bytes, scheme: str) -> bytes:
    """The request's head as the dev server gets it: to the end of the head, its framing included."""
    dropped = HOP_BY_HOP | SAID_BY_THE_DOOR | _named(head.headers)
    lines = [head.method.encode() + b" " + head.target + b" HTTP/1.1"]
    host = b""
    for name, value in head.headers:
        lower = name.lower()
        if lower in dropped or lower == b"content-length":
            continue
        if lower == b"cookie":
            value = without_cookie(value, cookie)
            if not value:
                continue
        if lower == b"host":
            host = value
        lines.append(name + b": " + value)
    lines += [b"X-Forwarded-Host: " + host, b"X-Forwarded-Proto: " + scheme.encode()]
    if head.length is None:
        lines.append(b"Transfer-Encoding: chunked")
    elif head.length or values(head.headers, b"content-length"):
        lines.append(b"Content-Length: %d" % head.length)
    lines += [b"Connection: Upgrade", b"Upgrade: websocket"] if head.upgrade else [b"Connection: keep-alive"]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def to_browser(
    head: ResponseHead, *, cookie: bytes, more: Iterable[tuple[bytes, bytes]] = (), chunked: bool, close: bool
) -> bytes:
    """An answer's head as the browser gets it.

    Args:
        head: The dev server's.
        cookie: The name of the door's cookie, which the project's code may not set.
        more: Fields of the door's own; they take the place of the project's of the same name but for `frame-ancestors`,
            which holds beside whatever policy there is.
        chunked: The body is sent in chunks.
        close: The connection ends with it.
    """
    more = list(more)
    dropped = (
        HOP_BY_HOP | _named(head.headers) | {name.lower() for name, _ in more}
    ) - {b"content-security-policy"}  # fmt: skip
    switching = head.status == 101
    lines = [b"HTTP/1.1 %d %s" % (head.status, head.reason)]
    for name, value in head.headers:
        lower = name.lower()
        if lower in dropped or TO_PROXIES.match(lower) or (chunked and lower == b"content-length"):
            continue
        if lower == b"set-cookie" and value.partition(b"=")[0].strip() == cookie:
            continue
        lines.append(name + b": " + value)
    lines += [name + b": " + value for name, value in more]
    if switching:
        lines += [b"Connection: Upgrade", b"Upgrade: websocket"]
    else:
        if chunked:
            lines.append(b"Transfer-Encoding: chunked")
        lines.append(b"Connection: close" if close else b"Connection: keep-alive")
    return b"\r\n".join(lines) + b"\r\n\r\n"
