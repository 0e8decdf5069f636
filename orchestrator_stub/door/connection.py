"""Serves one connection of a browser, or of a proxy in front: request after request, each judged for itself.

A proxy may send requests of several people and of several hosts on one connection, so nothing that was decided for one
request holds for the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import structlog

from orchestrator_stub.door import answers
from orchestrator_stub.door.answers import Answer
from orchestrator_stub.door.decision import (
    LIVEZ,
    Behind,
    Check,
    Enter,
    Follow,
    Grant,
    Proxy,
    Refuse,
    Wait,
    Wake,
    code_of,
    judge,
    known,
)
from orchestrator_stub.door.heads import (
    Asked,
    BadHead,
    RequestHead,
    ResponseHead,
    read,
    to_browser,
    to_project,
    values,
)
from orchestrator_stub.door.registry import Away, TooMany
from orchestrator_stub.door.upstream import (
    PIECE,
    Unreachable,
    Upstream,
    closed,
    connect,
    drained,
    splice,
    target_of,
)
from orchestrator_stub.door.wire import End, RequestWire, ResponseWire

if TYPE_CHECKING:
    from orchestrator_stub.door.service import Door

log = structlog.get_logger("door")

HEAD_SECONDS: Final = 10.0
"""From the first byte of a head to its last: who takes longer is holding a connection, not asking."""
IDLE_SECONDS: Final = 150.0
"""Between two requests: above the 60 to 120 s for which proxies in front keep connections."""
BODY_SECONDS: Final = 60.0
"""For the next piece of a request's body."""
ANSWER_SECONDS: Final = 300.0
"""For the head of an answer: a dev server may be building for minutes."""
LINGER_SECONDS: Final = 1.0
"""After the last answer, for the client to end the connection."""
REPEATABLE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
"""What is asked once more when a kept connection turns out to have ended."""


class Connection:
    """One accepted connection, until `run` returns."""

    def __init__(self, door: Door, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._door = door
        self._reader = reader
        self._writer = writer
        self._wire = RequestWire()
        self._upstream: Upstream | None = None
        self._sending: asyncio.Task[None] | None = None
        """The body of the request under way, on its way to the dev server."""
        self.busy = False
        """A request is being answered."""
        self.endless = False
        """It was upgraded, or it follows a start: it does not end by itself, and its page comes back."""

    async def run(self) -> None:
        """Serve it to its end."""
        try:
            try:
                while await self._one():
                    self.busy = False
            except BadHead as bad:
                self._door.count("malformed")
                self._send(answers.plain(bad.status, str(bad)), close=True)
            await self._linger()
            await closed(self._writer)
        except OSError:
            pass  # it is gone, or too slow
        finally:
            if self._upstream is not None:
                self._upstream.abort()
            # What is not sent yet would keep a socket open that nobody counts.
            self._writer.transport.abort()

    async def _linger(self) -> None:
        """Take what is still sent for a moment: a connection closed before that is reset, and its last answer lost."""
        if self._writer.is_closing() or self._reader.at_eof():
            return
        await drained(self._writer)
        with suppress(OSError):
            self._writer.write_eof()
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._reader.read(PIECE):
                    pass

    def abort(self) -> None:
        """End it now, whatever it is doing."""
        if self._upstream is not None:
            self._upstream.abort()
        self._writer.transport.abort()

    def gone(self) -> None:
        """The browser has left: whatever is asked of the dev server for it is not needed."""
        if self._upstream is not None and self.busy and not self.endless:
            self._upstream.abort()

    # --- what comes in

    async def _one(self) -> bool:
        """Answer one request; whether another may follow."""
        head = await self._head()
        if head is None:
            return False
        self.busy = True
        if head.target.partition(b"?")[0] == LIVEZ.encode():
            fresh = self._door.registry.fresh
            self._door.count("probe")
            return await self._answer(
                head, answers.plain(*((200, "open") if fresh else (503, "no database")))
            )
        asked = read(head, self._door.address.cookie)
        try:
            return await self._judged(head, asked)
        except Away:
            self._door.count("closed")
            return await self._answer(
                head, answers.refused(503, "The door cannot say who may come in now. Try again.", asked)
            )
        except TooMany:
            self._door.count("too_many")
            return await self._answer(head, answers.refused(429, "Too many connections are open.", asked))

    async def _head(self) -> RequestHead | None:
        """The next request's; None when there is none."""
        # It may have begun behind the one before.
        deadline = time.monotonic() + HEAD_SECONDS if self._wire.in_head else None
        while not self._wire.events:
            rest = IDLE_SECONDS if deadline is None else deadline - time.monotonic()
            try:
                async with asyncio.timeout(rest):
                    data = await self._reader.read(PIECE)
            except TimeoutError:
                if deadline is None:
                    return None
                raise BadHead(408, "the head took too long") from None
            if not data:
                return None
            if deadline is None:
                deadline = time.monotonic() + HEAD_SECONDS
            self._wire.feed(data)
        head = self._wire.events.popleft()
        assert isinstance(head, RequestHead)
        return head

    async def _piece(self) -> bytes | End:
        """The next piece of the request's body, or its end."""
        while not self._wire.events:
            async with asyncio.timeout(BODY_SECONDS):
                data = await self._reader.read(PIECE)
            if not data:
                raise ConnectionResetError
            self._wire.feed(data)
        found = self._wire.events.popleft()
        assert not isinstance(found, RequestHead)
        return found

    # --- what becomes of it

    async def _judged(self, head: RequestHead, asked: Asked) -> bool:
        door = self._door
        label = door.address.label(asked.host)
        standing = await door.registry.of(label) if label is not None else None
        code = code_of(asked)
        found_code = door.passes.read("code", code) if code else None
        if (
            label is not None
            and standing is not None
            and found_code is not None
            and not known(found_code, standing)
        ):
            standing = await door.registry.anew(label)
        action = judge(
            asked,
            standing,
            address=door.address,
            code=found_code,
            passes=[found for text in asked.cookies if (found := door.passes.read("cookie", text))],
            now=door.now(),
        )
        assert label is not None or isinstance(action, Refuse)
        match action:
            case Refuse(status, why):
                door.count("refused")
                return await self._answer(head, answers.refused(status, why, asked))
            case Enter(session, to):
                door.count("entered")
                return await self._answer(head, answers.entered(door, session, to, code or ""))
            case Check(to, blocked):
                door.count("blocked" if blocked else "checked")
                return await self._answer(head, answers.checked(to, code, blocked=blocked))
            case Wait(session, _):
                door.count("waiting")
                await door.wake(session)
                return await self._answer(head, answers.waiting(asked, session))
            case Wake(session, _):
                door.count("woken")
                await door.wake(session)
                return await self._answer(head, Answer(204))
            case Follow(session, grant):
                door.count("followed")
                assert label is not None
                with door.registry.hold(label, grant, self.abort):
                    return await self._follow(head, label, session)
            case Proxy(session, grant):
                if door.replay is not None and session.machine_driver == "fly":
                    door.count("replayed")
                    return await self._answer(head, answers.replayed(door.replay, session))
                assert label is not None
                with door.registry.hold(label, grant, self.abort):
                    return await self._proxy(head, asked, session, grant)

    async def _answer(self, head: RequestHead, answer: Answer) -> bool:
        """Give an answer of the door's own."""
        # The body of a request that nobody reads would be taken for the next request.
        keep = head.keep_alive and head.version == "1.1" and head.length == 0
        keep = keep and self._wire.rest is None and not self._door.draining
        self._send(answer, close=not keep, bodiless=head.method == "HEAD")
        await drained(self._writer)
        if keep:
            await self._piece()  # the end of a body that is empty
        return keep

    def _send(self, answer: Answer, *, close: bool, bodiless: bool = False) -> None:
        self._writer.write(answer.head(close=close) + (b"" if bodiless else answer.body))

    async def _follow(self, head: RequestHead, label: str, session: Behind) -> bool:
        """Tell how the start goes on, until it is ready or the browser leaves."""
        self._writer.write(answers.EVENTS_HEAD)
        self.endless = True
        async for line in self._door.progress(label, session):
            if self._writer.is_closing() or self._reader.at_eof():
                break
            self._writer.write(line)
            await drained(self._writer)
        return False

    # --- the project's own

    async def _proxy(self, head: RequestHead, asked: Asked, session: Behind, grant: Grant) -> bool:
        try:
            return await self._exchange(head, asked, session, grant)
        finally:
            if self._sending is not None:
                self._sending.cancel()
                await asyncio.gather(self._sending, return_exceptions=True)
                self._sending = None

    async def _exchange(self, head: RequestHead, asked: Asked, session: Behind, grant: Grant) -> bool:
        try:
            target = target_of(session.preview_url)
            upstream, kept = await self._upstream_for(target, head)
            wire, first = await self._ask(upstream, head)
            if first is None and kept and head.method in REPEATABLE and head.length == 0:
                upstream, _ = await self._upstream_for(target, head, fresh=True)
                wire, first = await self._ask(upstream, head)
            if first is None:
                raise Unreachable("it closed the connection without an answer")
        except Unreachable as error:
            self._door.count("unreachable")
            log.info("door.unreachable", session_id=str(session.session_id), reason=str(error))
            return await self._answer(head, answers.waiting(asked, session))
        except BadHead as bad:
            self._door.count("bad_answer")
            log.info("door.bad_answer", session_id=str(session.session_id), reason=str(bad))
            self._send(answers.refused(502, "The dev server's answer is no HTTP.", asked), close=True)
            return False
        if first.status == 101:
            return await self._spliced(head, upstream, wire, first)
        self._door.count("passed")
        return await self._copy(head, upstream, wire, first, answers.embedding(session, grant, first.headers))

    async def _upstream_for(
        self, target: tuple[str, int], head: RequestHead, *, fresh: bool = False
    ) -> tuple[Upstream, bool]:
        """A connection to `target`, and whether it is one that was kept. Raises `Unreachable`."""
        kept = self._upstream
        repeatable = head.method in REPEATABLE and head.length == 0 and not head.upgrade
        if kept is not None and kept.target == target and kept.usable and repeatable and not fresh:
            return kept, True
        if kept is not None:
            kept.abort()
        self._upstream = None
        self._upstream = await connect(target)
        return self._upstream, False

    async def _ask(self, upstream: Upstream, head: RequestHead) -> tuple[ResponseWire, ResponseHead | None]:
        """Send the request, and read the answer's head; None: the connection ended before it began."""
        address = self._door.address
        wire = ResponseWire(bodiless=head.method == "HEAD")
        upstream.writer.write(to_project(head, cookie=address.cookie, scheme=address.scheme))
        if head.length != 0:
            if values(head.headers, b"expect"):
                self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            self._sending = asyncio.create_task(self._send_body(upstream, chunked=head.length is None))
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return wire, await self._answer_head(upstream, wire)
        except ConnectionError:
            return wire, None
        except TimeoutError:
            raise Unreachable(f"no answer within {ANSWER_SECONDS:g} s") from None

    async def _answer_head(self, upstream: Upstream, wire: ResponseWire) -> ResponseHead | None:
        begun = False
        while True:
            while not wire.events:
                data = await upstream.reader.read(PIECE)
                if not data and not begun:
                    return None
                begun = True
                if data:
                    wire.feed(data)
                else:
                    wire.feed_eof()
            event = wire.events.popleft()
            if isinstance(event, ResponseHead) and (event.status >= 200 or event.status == 101):
                return event
            # Interim answers are of one connection; the door has said its own.

    async def _send_body(self, upstream: Upstream, *, chunked: bool) -> None:
        try:
            while not isinstance(piece := await self._piece(), End):
                upstream.writer.write(b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece)
                await drained(upstream.writer)
            if chunked:
                upstream.writer.write(b"0\r\n\r\n")
        except (BadHead, OSError):
            upstream.abort()  # half a body must not look like a whole one

    async def _copy(
        self,
        head: RequestHead,
        upstream: Upstream,
        wire: ResponseWire,
        first: ResponseHead,
        more: Sequence[tuple[bytes, bytes]],
    ) -> bool:
        """Copy an answer by its framing; whether the connection is good for another request."""
        chunked = first.length is None and head.version == "1.1"
        sent = self._sending is None or self._sending.done()
        close = not head.keep_alive or head.version != "1.1" or not sent or self._door.draining
        close = close or self._wire.rest is not None
        out = [to_browser(first, cookie=self._door.address.cookie, more=more, chunked=chunked, close=close)]
        try:
            ended = False
            while not ended:
                while wire.events:
                    event = wire.events.popleft()
                    if isinstance(event, End):
                        ended = True
                    elif isinstance(event, bytes):
                        out.append(b"%x\r\n%b\r\n" % (len(event), event) if chunked else event)
                if ended and chunked:
                    out.append(b"0\r\n\r\n")
                self._writer.write(b"".join(out))
                out.clear()
                await drained(self._writer)
                if not ended:
                    data = await upstream.reader.read(PIECE)
                    if data:
                        wire.feed(data)
                    else:
                        wire.feed_eof()
        except (BadHead, ConnectionError):
            # Half an answer must not look like a whole one.
            self._writer.transport.abort()
            return False
        if wire.surplus or first.until_close or not first.keep_alive:
            upstream.abort()
            self._upstream = None
        if close:
            return False
        if head.length == 0:
            await self._piece()  # the end of a body that is empty
        return True

    async def _spliced(
        self, head: RequestHead, upstream: Upstream, wire: ResponseWire, first: ResponseHead
    ) -> bool:
        if not head.upgrade or wire.rest is None or self._wire.rest is None:
            self._door.count("bad_answer")
            self._send(answers.plain(502, "The dev server switched protocols unasked."), close=True)
            return False
        self._door.count("upgraded")
        self._writer.write(to_browser(first, cookie=self._door.address.cookie, chunked=False, close=False))
        early, self._wire.rest = self._wire.rest, b""
        self._door.sockets.inc()
        self.endless = True
        try:
            await splice((self._reader, self._writer), upstream, early, wire.rest)
        finally:
            self._door.sockets.dec()
        return False
