"""Makes the answers that the door gives itself. Bytes; no sockets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Final
from urllib.parse import urlencode

from orchestrator_stub.door import pages
from orchestrator_stub.door.decision import CHECK, Behind, Grant
from orchestrator_stub.door.heads import Asked, Headers, kept_private

if TYPE_CHECKING:
    from orchestrator_stub.door.service import Door

EVENTS_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-store\r\nX-Accel-Buffering: no\r\n"
    b"Connection: close\r\n\r\n"
)
"""Of the events of a start. The last field has nginx pass them on as they come."""

RETRY_SECONDS: Final = 2


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole."""

    status: int
    body: bytes = b""
    kind: bytes = b"text/plain; charset=utf-8"
    more: tuple[tuple[bytes, bytes], ...] = ()

    def head(self, *, close: bool) -> bytes:
        """Its head, to the end."""
        lines = [b"HTTP/1.1 %d %s" % (self.status, HTTPStatus(self.status).phrase.encode())]
        if self.body:
            lines.append(b"Content-Type: " + self.kind)
        if self.status != HTTPStatus.NO_CONTENT:
            lines.append(b"Content-Length: %d" % len(self.body))
        lines += [
            b"Cache-Control: no-store",
            b"Referrer-Policy: no-referrer",
            b"X-Content-Type-Options: nosniff",
        ]
        lines += [name + b": " + value for name, value in self.more]
        lines.append(b"Connection: close" if close else b"Connection: keep-alive")
        return b"\r\n".join(lines) + b"\r\n\r\n"


def plain(status: int, text: str) -> Answer:
    """A line of text."""
    return Answer(status, text.encode() + b"\n")


def refused(status: int, why: str, asked: Asked) -> Answer:
    """No, as a page for a person and a line for a program."""
    if not asked.wants_page:
        return plain(status, why)
    body, policy = pages.refused(why)
    return _page(status, body, policy)


def waiting(asked: Asked, session: Behind) -> Answer:
    """The page that becomes the preview; 503 to a program."""
    retry = (b"Retry-After", b"%d" % RETRY_SECONDS)
    if not asked.wants_page:
        answer = plain(503, "The preview is not up yet.")
        return Answer(answer.status, answer.body, answer.kind, (retry,))
    body, policy = pages.waiting()
    return _page(503, body, policy, retry, *_embedding(session.run))


def entered(door: Door, session: Behind, to: str, code: str) -> Answer:
    """The cookie, and the way to where it is seen whether it came back."""
    value = door.passes.cookie(session.session_id, session.version, session.expires_at)
    seconds = max(0, int(session.expires_at - door.now()))
    if door.address.plain:
        kept = "HttpOnly; SameSite=Lax; Path=/"
    else:
        kept = "Secure; HttpOnly; Path=/; SameSite=None; Partitioned"
    cookie = f"{door.address.cookie.decode()}={value}; Max-Age={seconds}; {kept}"
    on = f"{CHECK}?{urlencode({'code': code, 'to': to})}"
    return Answer(302, more=((b"Location", on.encode()), (b"Set-Cookie", cookie.encode())))


def checked(to: str, code: str | None, *, blocked: bool) -> Answer:
    """On to the preview, or the page for a browser that kept no cookie."""
    if not blocked:
        return Answer(302, more=((b"Location", to.encode()),))
    body, policy = pages.blocked(code, to)
    return _page(200, body, policy)


def replayed(app: str, session: Behind) -> Answer:
    """Have Fly's proxy send the request to the machine itself."""
    return Answer(200, more=((b"fly-replay", f"app={app};instance={session.machine_id}".encode()),))


def embedding(session: Behind, grant: Grant, headers: Headers) -> tuple[tuple[bytes, bytes], ...]:
    """What the door adds to an answer of the project's: who may frame it, and that no proxy may keep it."""
    private = () if grant.version is None else ((b"Cache-Control", kept_private(headers)),)
    return (*_embedding(session.run), *private)


def _embedding(run: Mapping[str, object]) -> tuple[tuple[bytes, bytes], ...]:
    fields: list[tuple[bytes, bytes]] = []
    ancestors = run.get("frame_ancestors")
    if isinstance(ancestors, list) and ancestors:
        who = " ".join(str(each) for each in ancestors)
        fields.append((b"Content-Security-Policy", f"frame-ancestors {who}".encode()))
    for name, field in (("coep", b"Cross-Origin-Embedder-Policy"), ("corp", b"Cross-Origin-Resource-Policy")):
        if isinstance(value := run.get(name), str):
            fields.append((field, value.encode()))
    return tuple(fields)


def _page(status: int, body: bytes, policy: bytes, *more: tuple[bytes, bytes]) -> Answer:
    return Answer(status, body, b"text/html; charset=utf-8", ((b"Content-Security-Policy", policy), *more))
