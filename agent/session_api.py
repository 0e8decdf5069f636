"""Calls the session API: sync, token, status, run. One call is one try; retrying is the caller's decision.

Errors are sorted by what can be done about them. 401 and 403 are final for the token (`CredentialRejected`), 404 and
410 for the session (`SessionGone`), 409 names a newer machine (`Superseded`). These end things, so they are believed of
the orchestrator alone, whose refusals are problem documents of its own types: a proxy in front of it answers with the
same numbers when it is deployed badly, and no session is over because of that. 413 and 422, whoever answers them, mean
that the request is not taken as it is (`TooLarge`): the caller asks with less, or otherwise, never the same again;
everything else that may pass is `Unavailable`, with the wait that was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, Literal
from uuid import UUID

import httpx
import orjson

from agent.core.clock_skew import ClockSkew, Moment
from agent.core.errors import (
    AgentError,
    CredentialRejected,
    MalformedMessage,
    SessionGone,
    Superseded,
    TooLarge,
    Unavailable,
)
from agent.core.messages import Head, SyncAnswer, read_head, read_sync_answer
from agent.core.model import Problem, ProblemKind, RelPath
from agent.net import coding, exchange, json_bytes, read_start, read_whole
from agent.retry import http_date, retry_after, within
from agent.tokens import Token, Tokens

MAX_ANSWER_BYTES: Final = 64 * 1024 * 1024
"""An answer larger than this is not read to its end: sync offers a snapshot long before."""

MAX_REFUSAL_BYTES: Final = 64 * 1024
"""Of a refusal: the orchestrator's are below 2 KB, a proxy in front of it may send a page of any size."""

PROBLEM_MEDIA_TYPE: Final = "application/problem+json"
PROBLEM_TYPE: Final = "urn:preview-sync:problem:"
"""What the `type` of each of the orchestrator's problem documents (RFC 9457) begins with."""

PATH_UNKNOWN: Final = PROBLEM_TYPE + "path_unknown"
"""The orchestrator does not serve this path: SESSION_API_URL is wrong. It says nothing of the session."""

WHOLE_CALL: Final = 120.0
"""Seconds for a call from its first byte to its last: `TIMEOUT` is between two bytes, and answers may trickle."""

TIMEOUT: Final = httpx.Timeout(10.0, read=30.0)
"""Seconds. A snapshot may have to be built before sync can answer, hence the longer read."""


Question = Literal["sync", "token", "status"]


class SessionApi:
    """The session's own endpoints, Bearer the token in force. Also a `TokenSource`.

    `http` is the agent's shared client; nothing of its defaults is relied on. `skew` learns from every answer how
    far the orchestrator's clock is from ours; `clock` reads both of ours, which must run together.
    """

    def __init__(
        self,
        base_url: str,
        session_id: UUID | str,
        tokens: Tokens,
        http: httpx.AsyncClient,
        *,
        timeout: httpx.Timeout = TIMEOUT,
        whole: float = WHOLE_CALL,
        clock: Callable[[], Moment] = lambda: Moment(time.time(), time.monotonic()),
        skew: ClockSkew | None = None,
    ) -> None:
        self._base = f"{base_url.rstrip('/')}/v1/sessions/{session_id}"
        self._tokens = tokens
        self._http = http
        self._timeout = timeout
        self._whole = whole
        self._clock = clock
        self._skew = skew or ClockSkew()
        self._write_token: Token | None = None
        self._failures: dict[Question, tuple[Token | None, AgentError]] = {}
        """By question: how it failed when it was asked last, and with which token."""

    def current(self) -> Token | None:
        """The token in force."""
        return self._tokens.current()

    @property
    def write_token(self) -> Token | None:
        """What outputs are given back with; None: the session may not, or the token was not renewed yet."""
        return self._write_token

    def forget_write_token(self) -> None:
        """Note that it was refused: the next comes with the next token."""
        self._write_token = None

    @property
    def problem(self) -> str | None:
        """Why a rotated token cannot be taken, when it cannot."""
        return self._tokens.problem

    async def sync(
        self,
        epoch: str | None,
        revision: int,
        reason: str,
        paths: Sequence[RelPath] | None = None,
        accept: Sequence[str] = (),
    ) -> SyncAnswer:
        """Ask what happened above (`epoch`, `revision`).

        `paths` asks for the content of these as well; `accept` says what forms besides whole contents are understood.
        """
        body: dict[str, object] = {"epoch": epoch, "revision": revision, "reason": reason}
        if paths is not None:
            body["paths"] = list(paths)
        if accept:
            body["accept"] = list(accept)
        with self._noting("sync"):
            return read_sync_answer(await self._call("POST", "sync", body))

    async def renew_token(self) -> Token:
        """Ask for the next token and put it in force."""
        with self._noting("token"):
            answer = await self._call("POST", "token", {})
            form = answer if isinstance(answer, dict) else {}
            value, nats_jwt = form.get("realtime_token"), form.get("nats_jwt")
            if not isinstance(value, str):
                raise MalformedMessage("token answer", "realtime_token is missing or not text")
            if nats_jwt is not None and not isinstance(nats_jwt, str):
                raise MalformedMessage("token answer", "nats_jwt is not text")
            self._write_token = self._tokens.read_second(form.get("write_token"))
            return self._tokens.accept(value, nats_jwt)

    async def run_settings(self) -> object:
        """Ask for the run settings, secrets included. The caller reads the answer and owns what goes wrong."""
        return await self._call("GET", "run", None)

    async def offer_changes(self, offer: Mapping[str, object], token: Token) -> object:
        """Offer what tools made. The caller reads the answer and owns what goes wrong: nothing of it ends a session."""
        return await self._call("POST", "changes", offer, token)

    async def find_modules(
        self, key: str, *, refused: str | None = None, ahead: bool = True, send: bool = True
    ) -> object:
        """Ask for the layer of that key. The caller reads the answer and owns what goes wrong.

        Args:
            key: Of the layer.
            refused: The hash of the first part of the one that was answered before, and is no good.
            ahead: Whether the project's next machine is to be told of it when it is made.
            send: Whether the answer is to say where to send one that is missing.
        """
        more: dict[str, object] = {"refused": refused} if refused else {}
        more |= {name: False for name, value in (("ahead", ahead), ("send", send)) if not value}
        return await self._call("POST", "modules", {"key": key, **more})

    async def add_modules(
        self, key: str, parts: Sequence[Mapping[str, object]], *, ahead: bool = True
    ) -> object:
        """Say that the parts of a layer are uploaded. The caller owns what goes wrong. `ahead`: as above."""
        more = {} if ahead else {"ahead": False}
        return await self._call("PUT", "modules", {"key": key, "parts": parts, **more})

    async def report_status(self, status: Mapping[str, object]) -> Head:
        """Say how we are; hear where the database is."""
        with self._noting("status"):
            return read_head(await self._call("PUT", "status", status))

    def problems(self) -> tuple[Problem, ...]:
        """Return what is wrong now: for each question that failed when it was asked last, with the token in force."""
        token = self._tokens.current()
        found: dict[ProblemKind, Problem] = {}
        for asked_with, error in self._failures.values():
            if asked_with is token:
                kind = _kind(error)
                found.setdefault(kind, Problem(kind, str(error)))
        return tuple(found.values())

    def forget_failure(self, question: Question) -> None:
        """Note that a question that failed is not asked any more, because nobody needs its answer."""
        self._failures.pop(question, None)

    @contextmanager
    def _noting(self, question: Question) -> Iterator[None]:
        token = self._tokens.current()
        try:
            yield
        except (CredentialRejected, MalformedMessage, Unavailable) as error:
            # A status that is too large is sent again at once without its problems: nothing is unreachable.
            if not (question == "status" and isinstance(error, TooLarge)):
                self._failures[question] = (token, error)
            raise
        self._failures.pop(question, None)

    async def _call(
        self, method: str, name: str, body: Mapping[str, object] | None, token: Token | None = None
    ) -> object:
        token = token or self._tokens.current()
        if token is None:
            raise CredentialRejected("there is no session token to call the session API with")
        what = f"session API ({name})"
        headers = {"authorization": f"Bearer {token.value}", "content-type": "application/json"}
        sent = self._clock()
        try:
            async with (
                within(self._whole, what, f"no whole answer within {self._whole:g} s"),
                exchange(
                    self._http,
                    method,
                    f"{self._base}/{name}",
                    content=None if body is None else json_bytes(body),
                    headers=headers,
                    timeout=self._timeout,
                ) as response,
            ):
                self._learn_skew(response, sent)
                if not response.is_success:
                    raise await self._refusal(what, response)
                content = await read_whole(response, what, MAX_ANSWER_BYTES)
        except httpx.HTTPError as error:
            # The class, not the text: httpx writes URLs and header values into some of its messages.
            raise Unavailable(what, type(error).__name__) from None
        try:
            return orjson.loads(content)
        except ValueError:
            raise Unavailable(what, _not_the_orchestrators(response, "JSON")) from None

    def _learn_skew(self, response: httpx.Response, sent: Moment) -> None:
        date = http_date(response.headers.get("date"))
        if date is not None:
            self._skew.answered(date, sent, self._clock())

    async def _refusal(self, what: str, response: httpx.Response) -> Exception:
        """Return the error that an answer without success means."""
        status = response.status_code
        document = await _problem(response)
        said = _not_the_orchestrators(response, "a problem document of the orchestrator's")
        if document is not None:
            told = (document.get("title"), document.get("detail"))
            said = f"HTTP {status}, {': '.join(text for text in told if isinstance(text, str))[:200]}"
        wait = retry_after(response.headers.get("retry-after"), self._clock().wall)
        if status in (413, 422):
            return TooLarge(what, said, wait)
        if status in (408, 429) or status >= 500 or document is None or document["type"] == PATH_UNKNOWN:
            return Unavailable(what, said, wait)
        if status in (401, 403):
            return CredentialRejected(f"{what} refused the token: {said}")
        if status in (404, 410):
            return SessionGone(f"{what} does not know the session: {said}")
        if status == 409:
            return Superseded(f"{what} names a conflict: {said}")
        return MalformedMessage(what, f"unexpected answer: {said}")


def _kind(error: AgentError) -> ProblemKind:
    """The problem that a failed question is."""
    if isinstance(error, CredentialRejected):
        return "session_api_refused"
    return "request_too_large" if isinstance(error, TooLarge) else "session_api_unreachable"


async def _problem(response: httpx.Response) -> dict[str, object] | None:
    """Read the orchestrator's own problem document; None when the answer is anything else."""
    if _media(response) != PROBLEM_MEDIA_TYPE or coding(response) is not None:
        return None
    try:
        document = orjson.loads(await read_start(response, MAX_REFUSAL_BYTES))
    except ValueError:
        return None
    if not isinstance(document, dict) or document.get("status") != response.status_code:
        return None
    kind = document.get("type")
    return document if isinstance(kind, str) and kind.startswith(PROBLEM_TYPE) else None


def _media(response: httpx.Response) -> str:
    return str(response.headers.get("content-type", "")).partition(";")[0].strip().lower()


def _not_the_orchestrators(response: httpx.Response, wanted: str) -> str:
    came = repr(_media(response)[:50]) if _media(response) else "no type"
    return f"HTTP {response.status_code} with {came}, not {wanted}: see what answers at SESSION_API_URL"
