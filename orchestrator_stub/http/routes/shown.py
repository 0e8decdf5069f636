"""Serves what is on the screen: `GET /v1/sessions/{id}/shown` and `GET /v1/projects/{id}/shown`."""

from __future__ import annotations

import math
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from orchestrator_stub.http.forms import json_answer
from orchestrator_stub.http.problems import Refusal, session_over, unknown_session
from orchestrator_stub.http.requests import Requests
from orchestrator_stub.sessions.lifecycle import ENDED, KEPT
from orchestrator_stub.sessions.shown import MOST_WAITERS, Screens, TooManyWaiters
from orchestrator_stub.sessions.store import SessionStore

MOST_WAIT = 30.0
"""Seconds; proxies close what is silent for a minute."""
QUIET = 0.3
"""Seconds without an error after which a revision that is painted counts as shown: effects have run by then."""
MOST_REVISION = 2**63 - 1


class ShownRoutes:
    """For whoever saved, and wants to know what became of it."""

    def __init__(self, requests: Requests, store: SessionStore, screens: Screens) -> None:
        self._requests = requests
        self._store = store
        self._screens = screens

    def routes(self) -> list[BaseRoute]:
        """To be mounted at the root."""
        return [
            self._requests.route("/v1/sessions/{session_id}/shown", GET=self.of_session, more=MOST_WAIT),
            self._requests.route("/v1/projects/{project_id}/shown", GET=self.of_project, more=MOST_WAIT),
        ]

    async def of_session(self, request: Request) -> Response:
        """What became of a revision: on the screen, or what keeps it from being so."""
        session = await self._requests.seen(request)
        return json_answer(await _shown(request, self._screens, session.id))

    async def of_project(self, request: Request) -> Response:
        """The same of a project's newest live session."""
        _, project_id = await self._requests.project(request)
        sessions = await self._store.listing(project_id=project_id, ended=False, limit=100)
        newest = next((each for each in sessions if each.state in KEPT), None)
        if newest is None:
            raise Refusal(404, "session_unknown", "The project has no live session. Create one.")
        return json_answer(await _shown(request, self._screens, newest.id))


async def _shown(request: Request, screens: Screens, session_id: UUID) -> dict[str, object]:
    """What became of the revision of the query, as it travels. Raises `Refusal`."""
    query = request.query_params
    text = query.get("revision", "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= 19 and int(text) <= MOST_REVISION):
        raise Refusal(400, "bad_query", "revision must be a whole number.")
    epoch = query.get("epoch") or None
    if epoch is not None and (len(epoch) > 255 or "\x00" in epoch):
        raise Refusal(400, "bad_query", "epoch is too long.")
    wait = _seconds(query.get("wait"), 0.0, MOST_WAIT, "wait")
    quiet = _seconds(query.get("quiet"), QUIET, 10.0, "quiet")
    try:
        found = await screens.wait(session_id, epoch=epoch, revision=int(text), seconds=wait, quiet=quiet)
    except TooManyWaiters:
        detail = f"{MOST_WAITERS} requests wait for this session already."
        raise Refusal(429, "too_many_waiters", detail, retry_after=1.0) from None
    if found is None:
        raise unknown_session(session_id)
    session, outcome, screen = found
    if session.state in ENDED:
        raise session_over(session)
    return {"session_id": str(session.id), "outcome": outcome, **screen.form()}


def _seconds(text: str | None, default: float, most: float, name: str) -> float:
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise Refusal(400, "bad_query", f"{name} must be seconds from 0 to {most:g}.")
    return value
