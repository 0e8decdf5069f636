"""Serves what is on the screen: `GET /v1/sessions/{id}/shown` and `GET /v1/projects/{id}/shown`."""

from __future__ import annotations

import math
from uuid import UUID

from starlette.requests import Request

from orchestrator_stub.http.problems import Refusal
from orchestrator_stub.sessions.lifecycle import ENDED, Session
from orchestrator_stub.sessions.shown import MOST_WAITERS, Screens, TooManyWaiters

MOST_WAIT = 30.0
"""Seconds; proxies close what is silent for a minute."""
QUIET = 0.3
"""Seconds without an error after which a revision that is painted counts as shown: effects have run by then."""
MOST_REVISION = 2**63 - 1


async def shown(request: Request, screens: Screens, session_id: UUID) -> tuple[Session, dict[str, object]]:
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
        raise Refusal(404, "session_unknown", f"There is no session {session_id}, or it is not yours.")
    session, outcome, screen = found
    if session.state in ENDED:
        raise Refusal(410, "session_over", f"The session is {session.state}. Create a new one.")
    return session, {"session_id": str(session.id), "outcome": outcome, **screen.form()}


def _seconds(text: str | None, default: float, most: float, name: str) -> float:
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= most:
        raise Refusal(400, "bad_query", f"{name} must be seconds from 0 to {most:g}.")
    return value
